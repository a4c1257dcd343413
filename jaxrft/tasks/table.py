"""The table of all prompts as tokens, and batches of it in a few widths."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxrft import mesh as meshes
from jaxrft.host.files import JSON, short_digest
from jaxrft.lm import prompts
from jaxrft.lm.prompts import Prompt
from jaxrft.tasks.sources import Columns, Rows
from jaxrft.types import Array, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Dropped(NamedTuple):
    """Tasks that were left out for one reason."""

    name: str  # of their set
    count: int
    reason: str


class TaskTable(NamedTuple):
    """The tasks of a run; entry i of every field is about task i."""

    tokens: np.ndarray  # [N, P] int32, right-padded with 0
    lengths: np.ndarray  # [N] int32, tokens of the prompt, 1..P
    prompts: list[Prompt]  # [N] text or messages, as rewards get them
    columns: Columns  # [N] entries each, handed to rewards by name
    reference_pass_rates: np.ndarray | None  # [N, K] float32, NaN = unknown
    embeddings: np.ndarray | None  # [N, E] float32
    # the source of the embeddings, as `embeddings.Embeddings.source`
    embedded_by: dict[str, JSON] | None
    rows: np.ndarray  # [N] int32, the tasks' rows in the source of their set, from 0
    domain: np.ndarray  # [N] int32, index into `domains`
    domains: tuple[str, ...]  # names, in the order of their first tasks
    dropped: tuple[Dropped, ...]  # tasks that are not in the table, and why


def prepare(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    *,
    name: str = "tasks",
    variables: dict[str, JSON] | None = None,
    date: str | None = None,
) -> TaskTable:
    """Tokenizes all prompts and drops, never cuts, those of more than `max_prompt_length` tokens,
    and empty ones.

    `name` is the set's, and the domain of its tasks if they have none of their own. `variables` are
    the arguments of chat templates, unless a task has its own; `date`, in ISO form, is the date
    that they see, today's by default. Raises InputError when no task is left, and for prompts
    that cannot be encoded, as `prompts.encode` says.
    """
    arguments = [
        (variables or {}) | overrides for overrides in rows.variables or [{}] * len(rows.prompts)
    ]
    options = prompts.Options(arguments, date, name)
    encoded: dict[int, list[int]] = {}
    lengths = np.zeros(len(rows.prompts), np.int32)
    for i, ids in enumerate(prompts.encode(tokenizer, rows.prompts, options)):
        lengths[i] = len(ids)
        if len(ids) <= max_prompt_length:
            encoded[i] = ids
    longest = int(lengths.max())
    keep = np.flatnonzero((lengths > 0) & (lengths <= max_prompt_length))
    if not len(keep) and longest > 0:
        raise InputError(
            f"no prompt of {name} is short enough: the shortest has {lengths[lengths > 0].min()} "
            f"tokens, raise max_prompt_length (now {max_prompt_length}) to at least that"
        )
    if not len(keep):
        raise InputError(f"no prompt of {name} has any token: give them text")
    candidates = (
        Dropped(
            name,
            int((lengths > max_prompt_length).sum()),
            f"over {max_prompt_length} tokens, up to {longest}",
        ),
        Dropped(name, int((lengths == 0).sum()), "without any token"),
    )
    dropped = tuple(drop for drop in candidates if drop.count)
    for drop in dropped:
        logger.warning(
            "%d of %d tasks of %s dropped: prompts %s", drop.count, len(lengths), name, drop.reason
        )
    tokens = np.zeros((len(keep), buckets(lengths[keep])[-1]), np.int32)
    for row, i in enumerate(keep.tolist()):
        tokens[row, : lengths[i]] = encoded[i]
    return tabulate(rows, keep, tokens, lengths[keep], name=name)._replace(dropped=dropped)


def tabulate(
    rows: Rows, keep: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, *, name: str
) -> TaskTable:
    """Builds the table of the rows `keep` [N] of a set.

    `tokens` [N, P] and `lengths` [N] are those of the rows' prompts.
    """
    numbers = {
        domain: number for number, domain in enumerate(dict.fromkeys(rows.domains or [name]))
    }
    return TaskTable(
        tokens=tokens,
        lengths=lengths,
        prompts=[rows.prompts[i] for i in keep],
        columns=take_rows(rows.columns, keep),
        reference_pass_rates=None
        if rows.reference_pass_rates is None
        else rows.reference_pass_rates[keep],
        embeddings=None,
        embedded_by=None,
        rows=keep.astype(np.int32),
        domain=np.array([numbers[rows.domains[i]] if rows.domains else 0 for i in keep], np.int32),
        domains=tuple(numbers),
        dropped=(),
    )


def take(table: TaskTable, ids: np.ndarray, *dropped: Dropped) -> TaskTable:
    """Selects the tasks `ids` of a table, in that order; `dropped` says why others are left out."""
    lengths = table.lengths[ids]
    rates = table.reference_pass_rates
    return table._replace(
        tokens=table.tokens[ids, : buckets(lengths)[-1]],
        lengths=lengths,
        prompts=[table.prompts[i] for i in ids],
        columns=take_rows(table.columns, ids),
        reference_pass_rates=None if rates is None else rates[ids],
        embeddings=None if table.embeddings is None else table.embeddings[ids],
        rows=table.rows[ids],
        domain=table.domain[ids],
        dropped=(*table.dropped, *dropped),
    )


def take_rows(columns: Columns, ids: Iterable[int]) -> Columns:
    """Selects the entries `ids` of every column."""
    return {name: [entries[i] for i in ids] for name, entries in columns.items()}


def reference(table: TaskTable, task: int) -> str | None:
    """Returns a right answer as the column `reference` has it, else the ground truth as text.

    Returns None without ground truths. A ground truth that is an object says how answers are
    graded, and need not be an answer itself.
    """
    truth = table.columns["answer"][task] if "answer" in table.columns else None
    if isinstance(truth, dict) and "reference" in table.columns:
        text = table.columns["reference"][task]
        if isinstance(text, str):
            return text
    return None if truth is None else str(truth)


def identity(table: TaskTable) -> dict[str, JSON]:
    """Identifies the tasks, by their number and digests of their prompts and ground truths."""
    answers = table.columns.get("answer")
    return {
        "number of tasks": len(table.lengths),
        "digest of the tasks": short_digest(table.tokens.tobytes() + table.lengths.tobytes()),
        "digest of the ground truths": None
        if answers is None
        else short_digest(json.dumps(answers, default=str).encode()),
    }


def keys(prompts: list[Prompt], columns: Columns) -> list[str]:
    """Computes a digest of the prompt and the ground truth of each task, [N]."""
    pairs = zip(prompts, columns.get("answer", [None] * len(prompts)), strict=True)
    return [short_digest(json.dumps(pair, sort_keys=True, default=str).encode()) for pair in pairs]


def batches(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Splits tasks into batches of `size`, longest prompts first; the last may be smaller.

    So batches of one width follow each other, and a batch that does not fit into memory fails
    first.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    return [order[start : start + size] for start in range(0, len(order), size)]


def buckets(lengths: np.ndarray) -> tuple[int, ...]:
    """Computes at most four widths of prompts, each a compiled program.

    They are the longest of `lengths` [N], its half, its quarter and its eighth, rounded up to
    multiples of 8, the rows of a TPU tile. They ascend, and the last one holds every prompt. A
    width that holds no prompt is left out.
    """
    longest = int(lengths.max())
    widths = {8 * -(-longest // (8 * part)) for part in (1, 2, 4, 8)}
    return tuple(sorted(width for width in widths if width >= lengths.min()))


def bucket_of(lengths: np.ndarray, widths: tuple[int, ...]) -> int:
    """Finds the smallest of the ascending `widths` that holds prompts of `lengths` [B]."""
    return next(width for width in widths if width >= lengths.max())


def batch(table: TaskTable, ids: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Looks up the tokens [B, width] int32 and the lengths [B] int32 of the tasks `ids` [B].

    Raises ValueError when `width` would cut a prompt.
    """
    lengths = table.lengths[ids]
    if lengths.max() > width:
        raise ValueError(
            f"width {width} cuts a prompt of {lengths.max()} tokens: take the width from bucket_of"
        )
    return table.tokens[ids, :width], lengths


def prompt_batch(
    tasks: TaskTable, ids: np.ndarray, widths: tuple[int, ...], mesh: meshes.AnyMesh
) -> tuple[Array, Array]:
    """Copies the prompts [B, P] of the tasks `ids`, and their lengths [B], to the mesh.

    P is the smallest of the widths that holds them.
    """
    tokens, lengths = batch(tasks, ids, bucket_of(tasks.lengths[ids], widths))
    return meshes.from_host(mesh, tokens, "batch", None), meshes.from_host(mesh, lengths, "batch")
