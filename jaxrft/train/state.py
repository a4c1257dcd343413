"""All that a run is at a step, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.types import Array, Feedback

MILLION = 1_000_000


class Counters(NamedTuple):
    """What metrics count over a whole run."""

    last_seen: Array  # [N] int32, the step that last rolled the task out, -1 = none
    tokens: Array  # [2] int32, sampled tokens: millions and rest, since int32 alone would overflow
    rollouts: Array  # [2] int32, likewise


def count_rollouts(tally: Counters, feedback: Feedback, step: Array, num_generations: int) -> Counters:
    """The tally after a step that rolled out the tasks of `feedback` [B], each so many times; a task N is padding."""
    ids, tokens = feedback.ids, jnp.sum(feedback.tokens.astype(jnp.int32))
    return Counters(
        last_seen=tally.last_seen.at[ids].set(step, mode="drop"),
        tokens=_add(tally.tokens, tokens),
        rollouts=_add(tally.rollouts, jnp.sum(ids < tally.last_seen.shape[0], dtype=jnp.int32) * num_generations),
    )


def _add(number: Array, more: Array | int) -> Array:
    rest = number[1] + more
    return jnp.stack([number[0] + rest // MILLION, rest % MILLION])


def counter_metrics(tally: Counters) -> dict[str, int]:
    """Tokens and rollouts sampled so far, as metrics name them."""
    numbers = {"num_tokens": tally.tokens, "rollouts": tally.rollouts}
    return {name: MILLION * int(x[0]) + int(x[1]) for name, x in jax.device_get(numbers).items()}


class TrainState(NamedTuple):
    """All that a run is at a step: what is not here derives from the config and the step."""

    step: Array  # scalar int32, steps done
    params: Any  # what is trained, float32
    optimizer: Any
    selector: Any
    replay: Any
    tally: Counters
