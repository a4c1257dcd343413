"""The state of a run at a step, as one pytree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.learn.replay import Buffer
from jaxrft.learn.update import OptimizerState
from jaxrft.lm.model import Params
from jaxrft.types import Array, Feedback, PyTree

MILLION = 1_000_000


class Counters(NamedTuple):
    """Counts over the whole run, for metrics."""

    last_seen: Array  # [N] int32, the step that last rolled the task out, -1 = none
    tokens: Array  # [2] int32, sampled tokens: millions and rest, since int32 alone would overflow
    rollouts: Array  # [2] int32, likewise


class TrainState(NamedTuple):
    """The state of a run at a step; everything else derives from the config and the step."""

    step: Array  # [] int32, steps done
    params: Params  # what is trained, float32
    optimizer: OptimizerState
    selector: PyTree  # of the selector's own type
    replay: Buffer | None
    counters: Counters


def no_rollouts(num_tasks: int) -> Counters:
    """Returns the counters before the first step."""
    return Counters(
        last_seen=jnp.full(num_tasks, -1, jnp.int32),
        tokens=jnp.zeros(2, jnp.int32),
        rollouts=jnp.zeros(2, jnp.int32),
    )


def count_rollouts(
    counters: Counters, feedback: Feedback, step: Array, *, num_generations: int
) -> Counters:
    """Counts the rollouts of the tasks of `feedback` [B] in a step; a task N is padding."""
    num_tasks = counters.last_seen.shape[0]
    tokens = jnp.sum(feedback.tokens.astype(jnp.int32))
    groups = jnp.sum(feedback.ids < num_tasks, dtype=jnp.int32)
    return Counters(
        last_seen=counters.last_seen.at[feedback.ids].set(step, mode="drop"),
        tokens=_add(counters.tokens, tokens),
        rollouts=_add(counters.rollouts, groups * num_generations),
    )


def _add(number: Array, more: Array) -> Array:
    """Adds to a number that is held as millions and rest [2]."""
    rest = number[1] + more
    return jnp.stack([number[0] + rest // MILLION, rest % MILLION])


def counter_metrics(counters: Counters) -> dict[str, int]:
    """Returns the tokens and rollouts sampled so far, as metrics name them."""
    numbers = {"num_tokens": counters.tokens, "rollouts": counters.rollouts}
    return {name: MILLION * int(x[0]) + int(x[1]) for name, x in jax.device_get(numbers).items()}
