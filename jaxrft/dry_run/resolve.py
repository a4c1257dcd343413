"""Opens those inputs of a config that exist on this machine; placeholders of the same shapes
replace the others.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig, graded_by
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


class TaskSet(NamedTuple):
    """One set of tasks."""

    config: TasksConfig
    table: TaskTable | None  # None: the set is missing
    missing: str  # why it, or its embeddings, are missing, and what to do; "" if nothing is


class TaskPool(NamedTuple):
    """The tasks to train on."""

    sets: tuple[TaskSet, ...]
    table: TaskTable  # of the sets that exist; if none does, of one batch of tasks without content
    complete: bool  # whether all sets exist
    tokenized: bool  # if not, the prompts are taken to be as long as the config allows


class Inputs(NamedTuple):
    """The inputs of a run as far as they exist, and a sentence for each that is missing."""

    lm: LanguageModel  # its parameters described; without its files it has no tokenizer
    weights: bool  # whether its files exist
    pool: TaskPool
    held_out: tuple[TaskSet, ...]
    predictor: Predictor | None  # an untrained one of the published size if its file is missing
    missing: tuple[str, ...]


def resolve_inputs(config: Config, mesh: meshes.AnyMesh) -> Inputs:
    """Opens the inputs that exist.

    Raises InputError for inputs that cannot be used, and for a model whose shape is not known.
    """
    folder = hub.local(config.model)
    lm = _published_model(config, mesh) if folder is None else read_model(config, folder, mesh)
    missing = []
    if folder is None:
        missing.append(
            f"{config.model}, its weights and its tokenizer: run "
            f"{hub.download_command(config.model)}"
        )
    else:
        weights.check(folder, lm.config)
    pool = open_pool(config, lm.tokenizer, lm.config.hidden_size)
    held_out = tuple(
        open_set(tasks, graded_by(config, tasks), lm.tokenizer) for tasks in config.evaluation.tasks
    )
    missing += [task_set.missing for task_set in (*pool.sets, *held_out) if task_set.missing]
    predictor, remedy = open_predictor(config, pool, mesh)
    missing += [remedy] * bool(remedy)
    return Inputs(
        _with_parameters(config, lm, mesh),
        folder is not None,
        pool,
        held_out,
        predictor,
        tuple(missing),
    )


def _published_model(config: Config, mesh: meshes.AnyMesh) -> LanguageModel:
    """Describes a model whose files are not here by its published shape.

    Raises Missing if its shape is not known.
    """
    keys = published.keys(config.model)
    if keys is None:
        raise Missing(
            f"{config.model} is not here, and its shape is not known: give the folder of a "
            f"Hugging Face checkpoint, or run {hub.download_command(config.model)}"
        )
    limit = keys.get("max_position_embeddings")
    assert limit is None or isinstance(limit, int)
    check_length(config, limit)
    shape = weights.model_config(keys, config.model)._replace(lora=lora_config(config))
    check_rank(config, shape)
    return LanguageModel(
        shape, make_policy(config, shape, mesh), None, {}, None, (0,), Path(config.model)
    )


def _with_parameters(config: Config, lm: LanguageModel, mesh: meshes.AnyMesh) -> LanguageModel:
    """Adds the parameters to a model, trained and frozen ones, as shapes on the mesh."""
    shardings = model.shardings(lm.config, mesh)

    def describe(rows: tuple[model.Weight, ...], dtype: DTypeLike) -> PyTree:
        return {
            row.name: jax.ShapeDtypeStruct(row.shape, dtype, sharding=shardings[row.name])
            for row in rows
        }

    if lm.config.lora is None:
        return lm._replace(params=describe(model.base(lm.config), jnp.float32))
    frozen = describe(model.base(lm.config), jnp.dtype(config.dtype))
    return lm._replace(params=describe(model.adapters(lm.config), jnp.float32), frozen=frozen)


def open_set(
    tasks: TasksConfig, config: Config, tokenizer: "PreTrainedTokenizerBase | None"
) -> TaskSet:
    """Opens a set of tasks, and tokenizes its prompts if there is a tokenizer.

    Without a tokenizer the set gets no embeddings. Prompts that are too long may lack embeddings,
    and which prompts these are is not known without a tokenizer.
    Raises InputError for a set that cannot be used.
    """
    table = None
    try:
        rows = sources.load(tasks)
        table = (
            _untokenized(rows, tasks.title, config)
            if tokenizer is None
            else tokenize(rows, tasks, config, tokenizer)
        )
        check_columns(config, table, tasks.source)
        if tokenizer is not None:
            table = with_embeddings(table, tasks)
        elif tasks.embeddings is not None:
            embeddings.read(tasks.embeddings)
        return TaskSet(tasks, table, "")
    except Missing as missing:
        return TaskSet(tasks, table, str(missing))


def open_pool(config: Config, tokenizer: "PreTrainedTokenizerBase | None", width: int) -> TaskPool:
    """Opens the sets to train on that exist.

    Zeros of this `width` replace missing embeddings.
    """
    sets = tuple(open_set(tasks, config, tokenizer) for tasks in config.task_sets)
    tables = {each.config.title: each.table for each in sets if each.table is not None}
    if not tables:
        empty = _untokenized(_placeholder_rows(config), "tasks", config)
        return TaskPool(sets, _with_placeholder_embeddings(config, empty, width), False, False)
    # such as a file that is missing
    if any(table.embeddings is None for table in tables.values()):
        tables = {
            title: table._replace(embeddings=None, embedded_by=None)
            for title, table in tables.items()
        }
    mixed = _with_placeholder_embeddings(config, mix_sets(config, tables), width)
    return TaskPool(sets, mixed, len(tables) == len(sets), tokenizer is not None)


def open_predictor(
    config: Config, pool: TaskPool, mesh: meshes.AnyMesh
) -> tuple[Predictor | None, str]:
    """Opens the predictor that the config asks for, if any.

    Returns it and a sentence, "" if its file exists. Otherwise the sentence says what to do, and
    the predictor is an untrained one.
    """
    if config.select.name != "dots":
        return None, ""
    if pool.complete:
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


def _with_placeholder_embeddings(config: Config, table: TaskTable, width: int) -> TaskTable:
    """Adds embeddings [N, width] of zeros to tasks that will have embeddings but have none yet."""
    if table.embeddings is not None or not uses_embeddings(config):
        return table
    by_policy = not any(tasks.embeddings is not None for tasks in config.task_sets)
    source = {"model": "the policy itself", "pooling": embeddings.POOLING} if by_policy else None
    zeros = np.zeros((len(table.lengths), width), np.float32)
    return table._replace(embeddings=zeros, embedded_by=source)


def _placeholder_rows(config: Config) -> Rows:
    """Builds a batch of tasks without content, with pass rates for selectors that need some."""
    policies = max(2, *(len(tasks.pass_rate_columns) for tasks in config.task_sets))
    rates = np.full((config.batch_size, policies), 0.5, np.float32)
    return Rows([""] * config.batch_size, {"answer": [""] * config.batch_size}, rates)
