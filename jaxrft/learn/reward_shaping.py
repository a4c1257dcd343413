"""What a sample's rewards come to, as functions of arrays.

Axis letters: B tasks, G rollouts a task, F reward functions.
"""

import jax.numpy as jnp

from jaxrft.learn import masked
from jaxrft.shapes import REAL, check_dtypes, check_shapes
from jaxrft.types import Array


def total(rewards: Array, reward_weights: Array, *, success: int | Array) -> tuple[Array, Array]:
    """The weighted sum [B, G] over the rewards that apply to a sample, and whether the sample has one [B, G] bool.

    `rewards` [B, G, F]; what is not finite does not apply, and nothing takes its share. `reward_weights` [F]. A sample
    without the reward number `success`, one for all tasks or [B], has no sum, 0 here: it says nothing about its task.
    """
    check_shapes(rewards=(rewards, "BGF"), reward_weights=(reward_weights, "F"))
    check_dtypes(REAL, rewards=rewards, reward_weights=reward_weights)
    applies = jnp.isfinite(rewards)
    exists = of_tasks(applies, success)
    summed = jnp.sum(masked.zero(rewards, applies) * reward_weights.reshape(1, 1, -1), axis=-1)
    return masked.zero(summed, exists), exists


def magnitude(rewards: Array, reward_weights: Array) -> Array:
    """Returns sum |weight reward| [B, G] over the rewards that apply, which the rounding of `total` is relative to.

    `rewards` [B, G, F], `reward_weights` [F], as those of `total`.
    """
    check_shapes(rewards=(rewards, "BGF"), reward_weights=(reward_weights, "F"))
    check_dtypes(REAL, rewards=rewards, reward_weights=reward_weights)
    terms = masked.zero(rewards, jnp.isfinite(rewards)) * reward_weights.reshape(1, 1, -1)
    return jnp.sum(jnp.abs(terms), axis=-1)


def of_tasks(rewards: Array, which: int | Array) -> Array:
    """Returns of `rewards` [B, G, F] those of number `which`, one for all tasks or [B], as [B, G]."""
    index = jnp.asarray(which, jnp.int32)
    check_shapes(rewards=(rewards, "BGF"), which=(index, "B" if index.ndim else ""))
    index = jnp.broadcast_to(index, rewards.shape[:1])
    return jnp.take_along_axis(rewards, index[:, None, None], axis=2)[..., 0]


def overlong(
    lengths: Array, *, max_completion_length: int, overlong_buffer: int, overlong_penalty: float = 1.0
) -> Array:
    """-overlong_penalty * clip((lengths - (max_completion_length - overlong_buffer)) / overlong_buffer, 0, 1), tokens.

    Source: the soft overlong punishment of DAPO, arXiv 2503.14476. It begins `overlong_buffer` tokens, 1 or more,
    before the longest completion and is whole at its end. `lengths` of any shape; returns the same shape, float32.
    """
    check_dtypes(REAL, lengths=lengths)
    excess = lengths.astype(jnp.float32) - float(max_completion_length - overlong_buffer)
    return -overlong_penalty * jnp.clip(excess / float(overlong_buffer), 0.0, 1.0)
