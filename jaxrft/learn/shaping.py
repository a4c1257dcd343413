"""What a sample's rewards come to, as functions of arrays.

Axis letters: B tasks, G rollouts a task, F reward functions.
"""

import jax.numpy as jnp

from jaxrft.learn import masked
from jaxrft.types import Array


def total(rewards: Array, reward_weights: Array, *, success: int) -> tuple[Array, Array]:
    """The weighted sum [B, G] over the rewards that apply to a sample, and whether the sample has one [B, G] bool.

    `rewards` [B, G, F]; what is not finite does not apply, and nothing takes its share. `reward_weights` [F]. A sample
    without the reward number `success` has no sum, 0 here: it says nothing about its task.
    """
    applies = jnp.isfinite(rewards)
    exists = applies[..., success]
    summed = jnp.sum(masked.zero(rewards, applies) * reward_weights.reshape(1, 1, -1), axis=-1)
    return masked.zero(summed, exists), exists


def overlong(
    lengths: Array, *, max_completion_length: int, overlong_buffer: int, overlong_penalty: float = 1.0
) -> Array:
    """-overlong_penalty * clip((lengths - (max_completion_length - overlong_buffer)) / overlong_buffer, 0, 1), tokens.

    Source: the soft overlong punishment of DAPO, arXiv 2503.14476. It begins `overlong_buffer` tokens, 1 or more,
    before the longest completion and is whole at its end. `lengths` of any shape; returns the same shape, float32.
    """
    excess = lengths.astype(jnp.float32) - float(max_completion_length - overlong_buffer)
    return -overlong_penalty * jnp.clip(excess / float(overlong_buffer), 0.0, 1.0)
