"""What all logits have in common: a policy that learns moves everywhere at once."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrft.types import Array

SHIFT_NOISE, VELOCITY_NOISE = 0.02, 1e-4  # variance that a step adds to the common position and to its velocity
MEMORY = 0.9  # share of the evidence for `share` that survives a step


class DriftState(NamedTuple):
    """The common movement, and which share of it tasks have turned out to follow."""

    position: Array  # [], logits moved since the start
    velocity: Array  # [], logits a step
    covariance: Array  # [2, 2], of both
    followed: Array  # [2], weighted sums of (movement * what the task moved) and of movement^2


def init() -> DriftState:
    """No movement yet, and one unit of evidence that tasks follow it."""
    return DriftState(
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.float32),
        jnp.diag(jnp.array([1.0, 1e-3], jnp.float32)),
        jnp.ones(2, jnp.float32),
    )


def share(state: DriftState) -> Array:
    """The share in [0, 1] of the common movement that holds for a task, by regression over the tasks that came back."""
    return jnp.clip(state.followed[0] / state.followed[1], 0, 1)


def update(state: DriftState, innovation: Array, variance: Array, moved: Array, valid: Array) -> DriftState:
    """A step: a Kalman update of position and velocity by a batch's innovations, and of the share that tasks follow.

    `innovation` [B]: observed minus predicted logit, of `variance`; `moved` [B]: the common movement since the task's
    last visit, 0 for a first one; rows that are not `valid` count for nothing.
    """
    weight = jnp.where(valid, 1 / variance, 0)
    gain = state.covariance[:, 0] / (1 + state.covariance[0, 0] * weight.sum())
    shift, push = gain * (weight * innovation).sum()
    covariance = state.covariance - jnp.outer(gain, state.covariance[0]) * weight.sum()

    own = innovation + share(state) * moved  # what the task itself moved
    evidence = jnp.stack([(weight * moved * own).sum(), (weight * moved * moved).sum()])
    forgotten = (1 - MEMORY) * jnp.array([0.5, 1.0], jnp.float32)
    return DriftState(
        state.position + shift,
        state.velocity + push,
        covariance,
        MEMORY * state.followed + forgotten + evidence,
    )


def advance(state: DriftState) -> DriftState:
    """The prediction for the next step."""
    move = jnp.array([[1, 1], [0, 1]], jnp.float32)
    noise = jnp.diag(jnp.array([SHIFT_NOISE, VELOCITY_NOISE], jnp.float32))
    covariance = move @ state.covariance @ move.T + noise
    return state._replace(position=state.position + state.velocity, covariance=covariance)
