"""Reads and tokenizes the sets of tasks of a config."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from jaxrft.config import Config, TasksConfig
from jaxrft.rewards import REWARDS, ground_truth
from jaxrft.rewards.lookup import STRUCTURED_REWARDS
from jaxrft.select import selectors
from jaxrft.tasks import embeddings, mixture, sources, table
from jaxrft.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def open_tasks(
    tasks: TasksConfig, config: Config, tokenizer: PreTrainedTokenizerBase
) -> table.TaskTable:
    """Reads and tokenizes tasks; raises InputError when they do not load or lack what the rewards
    need.
    """
    rows = tokenize(sources.load(tasks), tasks, config, tokenizer)
    check_columns(config, rows, tasks.source)
    return with_embeddings(rows, tasks)


def tokenize(
    rows: sources.Rows, tasks: TasksConfig, config: Config, tokenizer: PreTrainedTokenizerBase
) -> table.TaskTable:
    """Tokenizes the prompts of a set's rows, and tabulates the tasks."""
    return table.prepare(
        rows,
        tokenizer,
        config.max_prompt_length,
        name=tasks.title,
        variables=json.loads(config.chat_template_kwargs),
        date=config.chat_template_date,
    )


def with_embeddings(rows: table.TaskTable, tasks: TasksConfig) -> table.TaskTable:
    """Adds to the tasks of a set the embeddings of its file, if it has one.

    Raises InputError when the file lacks an embedding.
    """
    if tasks.embeddings is None:
        return rows
    content = embeddings.read(tasks.embeddings)
    values = embeddings.of_prompts(content, rows.prompts, path=tasks.embeddings, name=tasks.title)
    return rows._replace(embeddings=values, embedded_by=content.source)


def uses_embeddings(config: Config) -> bool:
    """Checks whether the tasks of a run have embeddings.

    They are read from a file, or made by the policy for a selector that uses them.
    """
    by_policy = (
        config.select.embeddings == "policy" and config.select.name in selectors.USE_EMBEDDINGS
    )
    return by_policy or any(tasks.embeddings is not None for tasks in config.task_sets)


def open_mixture(config: Config, tokenizer: PreTrainedTokenizerBase) -> table.TaskTable:
    """Reads and tokenizes the tasks to train on, and warns of duplicates.

    They are those of all sets, in the shares that their weights ask for.
    """
    tables = {tasks.title: open_tasks(tasks, config, tokenizer) for tasks in config.task_sets}
    mixed = mix_sets(config, tables)
    if count := mixture.duplicates(mixed):
        logger.warning(
            "%d of %d tasks have the prompt and answer of another one", count, len(mixed.lengths)
        )
    return mixed


def mix_sets(config: Config, tables: dict[str, table.TaskTable]) -> table.TaskTable:
    """Mixes the sets of the config that have a table, in the shares that their weights ask for."""
    sets = [tasks for tasks in config.task_sets if tasks.title in tables]
    weights = [tasks.weight for tasks in sets if tasks.weight is not None]
    return mixture.mix(tables, weights or None, seed=config.seed)


def check_columns(config: Config, tasks: table.TaskTable, source: str) -> None:
    """Raises InputError when a built-in reward has no ground truths to compare with, or some
    without a meaning.
    """
    built_in = [
        name for name in config.rewards if name in REWARDS and name not in STRUCTURED_REWARDS
    ]
    if not built_in:
        return
    structured = [name for name in config.rewards if name in STRUCTURED_REWARDS]
    if "answer" not in tasks.columns:
        if structured:  # which find tests in columns of other names
            return
        others = ", ".join(tasks.columns)
        raise InputError(
            f"the reward {built_in[0]} needs ground truths but {source} has "
            + (
                f"only the columns {others}: name theirs with tasks.answer_column"
                if others
                else "prompts only: add a column of them, and name it with tasks.answer_column"
            )
        )
    ground_truth.check(
        tasks.columns["answer"],
        [int(row) for row in tasks.rows],
        source,
        several=set(built_in) <= {"math"},
        only=len(built_in) == len(config.rewards),
        may_lack_all=bool(structured),
    )
