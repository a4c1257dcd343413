"""The table of all prompts as tokens, and batches of it in a few widths."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxrft.lm import tokenizer as tokenizers
from jaxrft.lm.tokenizer import Prompt
from jaxrft.tasks.sources import Columns, Rows
from jaxrft.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TaskTable(NamedTuple):
    """The tasks of a run; entry i of every field is about task i."""

    tokens: np.ndarray  # [N, P] int32, right-padded with 0
    lengths: np.ndarray  # [N] int32, tokens of the prompt, 1..P
    prompts: list[Prompt]  # [N] text or messages, as rewards get them
    columns: Columns  # [N] entries each, handed to rewards by name
    reference_pass_rates: np.ndarray | None  # [N, K] float32, NaN = unknown
    dropped: int  # tasks left out because their prompts were too long


def prepare(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> TaskTable:
    """Tokenizes all prompts and drops, never cuts, those of more than `max_prompt_length` tokens.

    Raises InputError for a prompt without any token, and when no prompt is short enough.
    """
    encoded = [tokenizers.render(tokenizer, prompt) for prompt in rows.prompts]
    lengths = np.array([len(tokens) for tokens in encoded], np.int32)
    if not lengths.all():
        raise InputError(f"the prompt of task row {lengths.argmin() + 1} has no token: give it text or leave it out")
    keep = np.flatnonzero(lengths <= max_prompt_length)
    dropped = len(lengths) - len(keep)
    if not len(keep):
        raise InputError(
            f"no prompt is short enough: the shortest has {lengths.min()} tokens, raise max_prompt_length "
            f"(now {max_prompt_length}) to at least that"
        )
    if dropped:
        logger.warning("%d of %d tasks dropped: prompts over %d tokens", dropped, len(lengths), max_prompt_length)
    lengths = lengths[keep]
    tokens = np.zeros((len(keep), buckets(lengths)[-1]), np.int32)
    for row, i in enumerate(keep):
        tokens[row, : lengths[row]] = encoded[i]
    return TaskTable(
        tokens=tokens,
        lengths=lengths,
        prompts=[rows.prompts[i] for i in keep],
        columns={name: [entries[i] for i in keep] for name, entries in rows.columns.items()},
        reference_pass_rates=None if rows.reference_pass_rates is None else rows.reference_pass_rates[keep],
        dropped=dropped,
    )


def buckets(lengths: np.ndarray) -> tuple[int, ...]:
    """At most four widths, each a compiled program: the longest of `lengths` [N] and its half, quarter and eighth.

    They ascend and are rounded up to multiples of 8, the rows of a TPU tile; the last one holds every prompt.
    """
    longest = int(lengths.max())
    widths = {8 * -(-longest // (8 * part)) for part in (1, 2, 4, 8)}
    return tuple(sorted(width for width in widths if width >= lengths.min()))


def bucket_of(lengths: np.ndarray, widths: tuple[int, ...]) -> int:
    """The smallest of the ascending `widths` that holds prompts of these `lengths` [B]."""
    return next(width for width in widths if width >= lengths.max())


def batch(table: TaskTable, ids: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, width] int32 and lengths [B] int32 of the tasks `ids` [B].

    Raises ValueError when `width` would cut a prompt.
    """
    lengths = table.lengths[ids]
    if lengths.max() > width:
        raise ValueError(f"width {width} cuts a prompt of {lengths.max()} tokens: take the width from bucket_of")
    return table.tokens[ids, :width], lengths
