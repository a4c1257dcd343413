"""What of a config's model and tasks is here, and a run described from it; what is not here stands
in by its shape.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.lm import hub, model, published, weights
from jaxrft.lm.policy import (
    LanguageModel,
    check_length,
    check_rank,
    lora_config,
    make_policy,
    read_model,
)
from jaxrft.select.dots.predictor import Origin, Predictor, load_predictor, untrained_predictor
from jaxrft.tasks import embeddings, projections, sources
from jaxrft.tasks.open_sets import (
    check_columns,
    mix_sets,
    tokenize,
    uses_embeddings,
    with_embeddings,
)
from jaxrft.tasks.sources import Rows
from jaxrft.tasks.table import TaskTable, tabulate
from jaxrft.types import Missing, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Set(NamedTuple):
    """One set of tasks."""

    config: TasksConfig
    table: TaskTable | None  # None: it is not here
    missing: str  # why, and what to do; or why it has no embeddings yet


class Pool(NamedTuple):
    """The tasks to train on."""

    sets: tuple[Set, ...]
    table: TaskTable  # of the sets that are here; if none is, of one batch of tasks without content
    whole: bool  # whether all sets are here
    tokenized: bool  # if not, the prompts are taken to be as long as the config allows


class Found(NamedTuple):
    """What is here, and a sentence for each thing that is not."""

    lm: LanguageModel  # its parameters described; without its files it has no tokenizer
    weights: bool  # whether its files are here
    pool: Pool
    held_out: tuple[Set, ...]
    # one of the published sizes stands in for that of a file which is not here
    predictor: Predictor | None
    missing: tuple[str, ...]


def look(config: Config, mesh: meshes.AnyMesh) -> Found:
    """Opens what is here; raises InputError for what cannot be used, and for a model whose shape is
    not known.
    """
    folder = hub.local(config.model)
    lm = _published(config, mesh) if folder is None else read_model(config, folder, mesh)
    missing = []
    if folder is None:
        missing.append(
            f"{config.model}, its weights and its tokenizer: run "
            f"{hub.download_command(config.model)}"
        )
    else:
        weights.check(folder, lm.config)
    pool = open_pool(config, lm.tokenizer, lm.config.hidden_size)
    held_out = tuple(open_set(tasks, config, lm.tokenizer) for tasks in config.evaluation.tasks)
    missing += [each.missing for each in (*pool.sets, *held_out) if each.missing]
    predictor, absent = open_predictor(config, pool, mesh)
    missing += [absent] * bool(absent)
    return Found(
        _described(config, lm, mesh), folder is not None, pool, held_out, predictor, tuple(missing)
    )


def _published(config: Config, mesh: meshes.AnyMesh) -> LanguageModel:
    """Describes a model whose files are not here by its published shape.

    Raises Missing if its shape is not known.
    """
    keys = published.keys(config.model)
    if keys is None:
        raise Missing(
            f"{config.model} is not here, and its shape is not known: give the folder of a "
            "Hugging Face checkpoint, or "
            f"run {hub.download_command(config.model)}"
        )
    limit = keys.get("max_position_embeddings")
    assert limit is None or isinstance(limit, int)
    check_length(config, limit)
    shape = weights.model_config(keys, config.model)._replace(lora=lora_config(config))
    check_rank(config, shape)
    return LanguageModel(
        shape, make_policy(config, shape, mesh), None, {}, None, (0,), Path(config.model)
    )


def _described(config: Config, lm: LanguageModel, mesh: meshes.AnyMesh) -> LanguageModel:
    """Adds the parameters to a model, trained and frozen ones, as shapes on the mesh."""
    where = model.shardings(lm.config, mesh)

    def describe(rows: tuple[model.Weight, ...], dtype: DTypeLike) -> PyTree:
        return {
            row.name: jax.ShapeDtypeStruct(row.shape, dtype, sharding=where[row.name])
            for row in rows
        }

    if lm.config.lora is None:
        return lm._replace(params=describe(model.base(lm.config), jnp.float32))
    frozen = describe(model.base(lm.config), jnp.dtype(config.dtype))
    return lm._replace(params=describe(model.adapters(lm.config), jnp.float32), frozen=frozen)


def open_set(tasks: TasksConfig, config: Config, text: "PreTrainedTokenizerBase | None") -> Set:
    """Opens a set of tasks, and tokenizes its prompts if there is a tokenizer.

    Without a tokenizer the set gets no embeddings. Prompts that are too long may lack embeddings,
    and which prompts these are is not known without a tokenizer.
    Raises InputError for a set that cannot be used.
    """
    found = None
    try:
        rows = sources.load(tasks)
        found = (
            _untokenized(rows, tasks.title, config)
            if text is None
            else tokenize(rows, tasks, config, text)
        )
        check_columns(config, found, tasks.source)
        if text is not None:
            found = with_embeddings(found, tasks)
        elif tasks.embeddings is not None:
            embeddings.read(tasks.embeddings)
        return Set(tasks, found, "")
    except Missing as missing:
        return Set(tasks, found, str(missing))


def open_pool(config: Config, text: "PreTrainedTokenizerBase | None", width: int) -> Pool:
    """Opens the tasks to train on, as far as they are here.

    Zeros of this `width` stand in for embeddings that are not here.
    """
    sets = tuple(open_set(tasks, config, text) for tasks in config.task_sets)
    tables = {found.config.title: found.table for found in sets if found.table is not None}
    if not tables:
        nothing = _untokenized(_stand_in(config), "tasks", config)
        return Pool(sets, _stand_in_embeddings(config, nothing, width), False, False)
    # such as a file that is not here yet
    if any(found.embeddings is None for found in tables.values()):
        tables = {
            title: found._replace(embeddings=None, embedded_by=None)
            for title, found in tables.items()
        }
    joined = _stand_in_embeddings(config, mix_sets(config, tables), width)
    return Pool(sets, joined, len(tables) == len(sets), text is not None)


def open_predictor(
    config: Config, pool: Pool, mesh: meshes.AnyMesh
) -> tuple[Predictor | None, str]:
    """Opens the predictor that the config asks for, if any.

    Returns it and a sentence, "" if the predictor is here. If it is not, the sentence says what to
    do, and an untrained predictor stands in for it.
    """
    if config.select.name != "dots":
        return None, ""
    if pool.whole:
        projections.check_reference_set(config, len(pool.table.lengths), mesh)
    embedded: Any = pool.table.embeddings
    try:
        if "width" in (pool.table.embedded_by or {}):  # then they are read from a file
            return projections.open_predictor(config, pool.table, mesh), ""
        return load_predictor(config.select.predictor or ""), ""
    except Missing as missing:
        return untrained_predictor(Origin(config.model, embedded.shape[1])), str(missing)


def _untokenized(rows: Rows, name: str, config: Config) -> TaskTable:
    """Builds a table of tasks without tokens, whose prompts are as long as the config allows."""
    keep = np.arange(len(rows.prompts))
    lengths = np.full(len(keep), config.max_prompt_length, np.int32)
    return tabulate(rows, keep, np.zeros((len(keep), 1), np.int32), lengths, name=name)


def _stand_in_embeddings(config: Config, found: TaskTable, width: int) -> TaskTable:
    """Adds embeddings [N, width] of zeros to tasks that will have embeddings but have none yet."""
    if found.embeddings is not None or not uses_embeddings(config):
        return found
    own = not any(tasks.embeddings is not None for tasks in config.task_sets)
    made_by = {"model": "the policy itself", "pooling": embeddings.POOLING} if own else None
    zeros = np.zeros((len(found.lengths), width), np.float32)
    return found._replace(embeddings=zeros, embedded_by=made_by)


def _stand_in(config: Config) -> Rows:
    """Builds a batch of tasks without content, with pass rates for selectors that need some."""
    policies = max(2, *(len(tasks.pass_rate_columns) for tasks in config.task_sets))
    rates = np.full((config.batch_size, policies), 0.5, np.float32)
    return Rows([""] * config.batch_size, {"answer": [""] * config.batch_size}, rates)
