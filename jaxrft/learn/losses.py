"""The objectives of the GRPO family as rows of one table: the ratio, its bounds, and the average
over tokens.

Axis letters: R rows, T completion tokens. Everything is [R, T] float32 with 0 under the mask,
unless noted.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.learn import masked
from jaxrft.shapes import check_same_shape
from jaxrft.types import Array


class Bounds(NamedTuple):
    """The bounds of importance ratios."""

    low: Array  # lower end of the clip range
    high: Array  # upper end of the clip range
    top: Array  # of two-sided clipping, inf without it


class Clipped(NamedTuple):
    """Masks of the tokens on which each bound acts, bool."""

    low: Array
    high: Array
    top: Array


def ppo_losses(
    ratio: Array, logprobs: Array, advantages: Array, bounds: Bounds
) -> tuple[Array, Clipped]:
    """Computes PPO's clipped objective -min(min(r, top) A, clip(r, low, high) A).

    Sources: arXiv 1707.06347; `top` is the bound of two-sided clipping, arXiv 2505.07291.
    Where a bound acts the loss is constant, and its gradient 0.
    """
    check_same_shape(ratio=ratio, logprobs=logprobs, advantages=advantages)
    low, high, top = bounds
    clipped = Clipped(
        (ratio < low) & (advantages < 0),
        (ratio > high) & (advantages > 0),
        (ratio > top) & (advantages < 0),
    )
    bounded = jnp.where(clipped.top, top, ratio)
    bounded = jnp.where(clipped.high, high, bounded)
    bounded = jnp.where(clipped.low, low, bounded)
    return -advantages * bounded, clipped


def cispo_losses(
    ratio: Array, logprobs: Array, advantages: Array, bounds: Bounds
) -> tuple[Array, Clipped]:
    """Computes CISPO's objective -sg(min(r, high)) A log pi, where sg stops the gradient.

    Source: arXiv 2506.13585. No token loses its gradient. As in the paper's own runs there is no
    lower bound.
    """
    check_same_shape(ratio=ratio, logprobs=logprobs, advantages=advantages)
    high = (ratio > bounds.high) & (advantages != 0)
    unused = jnp.zeros(ratio.shape, bool)
    weights = jax.lax.stop_gradient(jnp.minimum(ratio, bounds.high))
    return -weights * advantages * logprobs, Clipped(unused, high, unused)


def token_log_ratio(log_ratio: Array, mask: Array, sequences: Array | None = None) -> Array:
    """Returns the log-ratio of each token unchanged."""
    check_same_shape(log_ratio=log_ratio, mask=mask)
    return log_ratio


def sequence_log_ratio(log_ratio: Array, mask: Array, sequences: Array | None = None) -> Array:
    """Averages the log-ratios of each sequence, and gives the mean to each of its tokens. [R, T].

    Source: GSPO, arXiv 2507.18071.
    """
    total = _sum_over_sequence(masked.zero(log_ratio, mask), sequences)
    return total / _tokens_of_sequence(mask, sequences)


def _sum_over_sequence(x: Array, sequences: Array | None) -> Array:
    """Sums x [R, T] over the tokens of each sequence, for each of its tokens. [R, T].

    `sequences` [R, T] int32 is the number of a token's sequence in its row, from 0 to T - 1. Tokens
    of a number outside are in no sum. None: a row is one sequence.
    """
    if sequences is None:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape)
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=x.shape[1]))(x, sequences)
    return jnp.take_along_axis(sums, jnp.maximum(sequences, 0), axis=1)


def _tokens_of_sequence(mask: Array, sequences: Array | None) -> Array:
    """Counts the tokens in the loss of each token's sequence, at least 1. [R, T] float32."""
    return jnp.maximum(_sum_over_sequence(mask.astype(bool).astype(jnp.float32), sequences), 1.0)


class Reduction(NamedTuple):
    """How losses and metrics of tokens [R, T] become one number: sum(weights * x) / count.

    Weights are functions of (mask [R, T], max_completion_length, sequences), where `sequences` [R,
    T] is the number of a token's sequence in its row, None if a row is one; the count is one of
    (mask, max_completion_length), of one sequence a row. Weights depend on the token's sequence
    only, and only the count on the batch, so that parts of a batch divided by the batch's count add
    up to the batch.
    """

    weights: Callable[[Array, int, Array | None], Array]  # [R, T], of the token losses
    # [R, T], the metric of a constant is that constant
    metric_weights: Callable[[Array, int, Array | None], Array]
    count: Callable[[Array, int], Array]  # [], of the whole batch


def _each_token(mask: Array, length: int, sequences: Array | None) -> Array:
    """Returns 1 for every token. [R, T]."""
    return mask.astype(jnp.float32)


def _share_of_sequence(mask: Array, length: int, sequences: Array | None) -> Array:
    """Returns 1 / (tokens of the sequence) for every token. [R, T]."""
    return mask.astype(jnp.float32) / _tokens_of_sequence(mask, sequences)


def _tokens(mask: Array) -> Array:
    """Counts the tokens in the loss, at least 1. []."""
    return jnp.maximum(masked.count(mask), 1.0)


def _rows(mask: Array) -> Array:
    """Counts the rows that have a token in the loss, at least 1. []."""
    return jnp.maximum(masked.count(jnp.any(mask.astype(bool), axis=1)), 1.0)


OVER_ROWS = Reduction(_share_of_sequence, _share_of_sequence, lambda mask, length: _rows(mask))
OVER_TOKENS = Reduction(_each_token, _each_token, lambda mask, length: _tokens(mask))
OVER_LENGTH = Reduction(
    _each_token,
    lambda mask, length, sequences: length * _share_of_sequence(mask, length, sequences),
    lambda mask, length: length * _rows(mask),
)


class LossType(NamedTuple):
    """A loss as a function of ratios and advantages."""

    log_ratio: Callable[[Array, Array, Array | None], Array]
    """(log pi - log mu, mask, sequences) -> the log-ratio that is bounded"""
    # (ratio, log pi, advantages, bounds)
    losses: Callable[[Array, Array, Array, Bounds], tuple[Array, Clipped]]
    reduction: Reduction


# loss_type -> log-ratio, objective and reduction.
LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType(token_log_ratio, ppo_losses, OVER_ROWS),
    "dapo": LossType(token_log_ratio, ppo_losses, OVER_TOKENS),
    "dr_grpo": LossType(token_log_ratio, ppo_losses, OVER_LENGTH),
    "gspo": LossType(sequence_log_ratio, ppo_losses, OVER_ROWS),
    "cispo": LossType(token_log_ratio, cispo_losses, OVER_TOKENS),
}
