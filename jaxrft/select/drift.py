"""What logits have in common: a policy that learns moves everywhere at once, and alike tasks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.types import Array

SHIFT_NOISE, VELOCITY_NOISE = 0.02, 1e-4  # variance that a step adds to the common position and to its velocity
FEATURE_NOISE = 0.005  # and to the movement by each feature
JUMP_VARIANCE = 4.0  # of the movement of a feature all of whose tasks jump
MEMORY = 0.9  # share of the evidence for `shares` that survives a step


class DriftState(NamedTuple):
    """The common movement, what the features add to it, and which share of both tasks have turned out to follow."""

    position: Array  # [2 + F]: logits moved since the start in common, the same a step, and by each feature
    covariance: Array  # [2 + F, 2 + F]
    squares: Array  # [2, 2], weighted sums of products of what the common part and the features' part moved
    products: Array  # [2], and of those with what the task moved


def init(num_features: int) -> DriftState:
    """No movement yet, and one unit of evidence that tasks follow the common part, half a unit for the features'."""
    first = jnp.array([1.0, 1e-3], jnp.float32)
    return DriftState(
        jnp.zeros(2 + num_features, jnp.float32),
        jnp.diag(jnp.pad(first, (0, num_features))),
        jnp.eye(2, dtype=jnp.float32),
        jnp.array([1.0, 0.5], jnp.float32),
    )


def shares(state: DriftState) -> Array:
    """The shares [2] in [0, 1] of the common movement and of the features' that hold for a task, by regression."""
    (a, b), (_, d) = state.squares
    x, y = state.products
    second = jnp.clip((a * y - b * x) / (a * d - b * b), 0, 1)
    first = jnp.clip((x - b * second) / a, 0, 1)
    return jnp.stack([first, second])


def moved(state: DriftState, features: Array) -> Array:
    """[N, 2]: how far the common movement and that of the `features` [N, F] have come for every task."""
    common = jnp.broadcast_to(state.position[0], features.shape[:1])
    return jnp.stack([common, features @ state.position[2:]], axis=1)


def come(state: DriftState, along: Array, anchor: Array) -> Array:
    """[N]: how far tasks have followed both movements from `anchor` [N, 2] on; `along` [N]: features @ position[2:]."""
    common, own = shares(state)
    return common * (state.position[0] - anchor[:, 0]) + own * (along - anchor[:, 1])


def update(
    state: DriftState, features: Array, innovation: Array, variance: Array, moved: Array, valid: Array, jumped: Array
) -> DriftState:
    """A step: a Kalman update by a batch's innovations, and of the shares that tasks follow.

    `features` [B, F]; `innovation` [B]: observed minus predicted logit, of `variance`; `moved` [B, 2]: both movements
    since the task's last visit, 0 for a first one; rows that are not `valid` count for nothing. Where tasks `jumped`
    [B], the movement of their features gets the variance of a jump, in proportion to how many of the batch's tasks
    alike jumped too.
    """
    told = jnp.where(valid[:, None], features, 0)
    alike = ((told @ told.T) ** 2).sum(axis=1)
    leap = told * jnp.where(jumped, 1 / jnp.maximum(alike, 1e-6), 0)[:, None]
    covariance = state.covariance.at[2:, 2:].add(JUMP_VARIANCE * leap.T @ told)

    one = valid.astype(jnp.float32)[:, None]
    rows = jnp.concatenate([one, 0 * one, told], axis=1)  # [B, 2 + F]
    across = covariance @ rows.T
    gain = jax.scipy.linalg.solve(rows @ across + jnp.diag(variance), across.T, assume_a="pos").T
    covariance = covariance - gain @ across.T

    own = innovation + moved @ shares(state)  # what the task itself moved
    weighted = moved * jnp.where(valid, 1 / variance, 0)[:, None]
    return DriftState(
        state.position + gain @ jnp.where(valid, innovation, 0),
        (covariance + covariance.T) / 2,
        MEMORY * state.squares + (1 - MEMORY) * jnp.eye(2, dtype=jnp.float32) + weighted.T @ moved,
        MEMORY * state.products + (1 - MEMORY) * jnp.full(2, 0.5, jnp.float32) + weighted.T @ own,
    )


def advance(state: DriftState) -> DriftState:
    """The prediction for the next step."""
    size = state.position.shape[0]
    move = jnp.eye(size, dtype=jnp.float32).at[0, 1].set(1)
    noise = jnp.full(size, FEATURE_NOISE, jnp.float32).at[0].set(SHIFT_NOISE).at[1].set(VELOCITY_NOISE)
    covariance = move @ state.covariance @ move.T + jnp.diag(noise)
    return state._replace(position=move @ state.position, covariance=covariance)
