"""Sums of the rewards of a sample, and the overlong penalty, as functions of arrays.

Axis letters: B tasks, G rollouts a task, F reward functions.
"""

import jax.numpy as jnp

from jaxrft.learn import masked
from jaxrft.shapes import REAL, check_dtypes, check_shapes
from jaxrft.types import Array


def total(
    rewards: Array, valid: Array, reward_weights: Array, *, success: int | Array
) -> tuple[Array, Array]:
    """Computes the weighted sum [B, G] of the rewards of a sample, and whether the sample has one,
    [B, G] bool.

    `rewards` [B, G, F]; one that is not `valid` [B, G, F] adds 0, and the other weights stay as
    they are. `reward_weights` [F]. `success` is the index of the reward that measures success, one
    for all tasks or [B]. A sample without that reward has no sum, 0 here.
    """
    exists = take_reward(valid.astype(bool), success)
    return masked.zero(jnp.sum(_terms(rewards, valid, reward_weights), axis=-1), exists), exists


def magnitude(rewards: Array, valid: Array, reward_weights: Array) -> Array:
    """Computes sum |weight reward| [B, G] of the valid rewards, which the rounding of `total` is
    relative to.

    `rewards` and `valid` [B, G, F], `reward_weights` [F], as those of `total`.
    """
    return jnp.sum(jnp.abs(_terms(rewards, valid, reward_weights)), axis=-1)


def _terms(rewards: Array, valid: Array, reward_weights: Array) -> Array:
    """Returns weight times reward [B, G, F], 0 where the reward is not valid."""
    check_shapes(
        rewards=(rewards, "BGF", REAL),
        valid=(valid, "BGF", REAL),
        reward_weights=(reward_weights, "F", REAL),
    )
    return masked.zero(rewards, valid) * reward_weights.reshape(1, 1, -1)


def take_reward(rewards: Array, which: int | Array) -> Array:
    """Returns the rewards [B, G] of number `which`, one for all tasks or [B], of `rewards` [B, G,
    F].
    """
    index = jnp.asarray(which, jnp.int32)
    check_shapes(rewards=(rewards, "BGF"), which=(index, "B" if index.ndim else ""))
    index = jnp.broadcast_to(index, rewards.shape[:1])
    return jnp.take_along_axis(rewards, index[:, None, None], axis=2)[..., 0]


def overlong(
    lengths: Array,
    *,
    max_completion_length: int,
    overlong_buffer: int,
    overlong_penalty: float = 1.0,
) -> Array:
    """Computes the soft overlong punishment of DAPO, arXiv 2503.14476.

    -overlong_penalty * clip((lengths - start) / overlong_buffer, 0, 1), in tokens, with
    start = max_completion_length - overlong_buffer

    The punishment begins `overlong_buffer` tokens, 1 or more, before the longest completion, and is
    `overlong_penalty` at its end. `lengths` of any shape; returns the same shape, float32.
    """
    check_dtypes(REAL, lengths=lengths)
    excess = lengths.astype(jnp.float32) - float(max_completion_length - overlong_buffer)
    return -overlong_penalty * jnp.clip(excess / float(overlong_buffer), 0.0, 1.0)
