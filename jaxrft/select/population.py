"""What is believed of tasks never visited: the mean and the spread of those that were, or what their features say."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.select import logit
from jaxrft.types import Array

PRIOR_VARIANCE = 4.0  # of a task's logit before any rollout, worth two tasks
DOUBTED = -2.0  # log odds of the features before they have predicted anything
MEMORY, TEMPER = 0.95, 0.5  # share of their evidence that survives a step, and of a visit's that counts


class Population(NamedTuple):
    """Two predictions of a logit, N(center, spread[0]) and N(center + features @ weights, spread[1])."""

    center: Array  # []
    weights: Array  # [F]
    spread: Array  # [2], variances
    odds: Array  # [], log odds of the second, by what both predicted of first visits


def init(num_features: int) -> Population:
    """Pass rates of one half on the average, and nothing expected of the features."""
    spread = jnp.full(2, PRIOR_VARIANCE, jnp.float32)
    return Population(
        jnp.zeros((), jnp.float32), jnp.zeros(num_features, jnp.float32), spread, jnp.full((), DOUBTED, jnp.float32)
    )


def share(state: Population) -> Array:
    """The weight [] in [0, 1] of what features say, by what they have predicted; 0 while they say nothing."""
    return jnp.where((state.weights != 0).any(), jax.nn.sigmoid(state.odds), 0)


def predict(state: Population, told: Array) -> tuple[Array, Array]:
    """Mean and variance [N] of the logits of tasks never visited, as the mixture of both predictions.

    `told` [N]: features @ weights.
    """
    weight = share(state)
    variance = (1 - weight) * state.spread[0] + weight * state.spread[1] + weight * (1 - weight) * told * told
    return state.center + weight * told, variance


def earn(state: Population, features: Array, successes: Array, trials: Array, first: Array) -> Population:
    """The odds after a batch [B]: each `first` visit adds the log ratio of what both predictions gave its outcome."""
    plain, told = (
        logit.evidence(mean, jnp.broadcast_to(variance, mean.shape), successes, trials)
        for mean, variance in zip(
            (jnp.broadcast_to(state.center, trials.shape), state.center + features @ state.weights),
            state.spread,
            strict=True,
        )
    )
    gained = jnp.where(first, told - plain, 0).sum()
    odds = DOUBTED + MEMORY * (state.odds - DOUBTED) + TEMPER * gained
    return state._replace(odds=jnp.clip(odds, -8, 8))


def fit(state: Population, features: Array, mean: Array, variance: Array, seen: Array) -> Population:
    """Both predictions from what is believed (`mean`, `variance`) of the tasks `seen`, the second by ridge regression.

    A task counts with 1 / (variance + spread), the weights have the spread as their own variance a priori, and the
    second spread counts the degrees of freedom that they use up.
    """
    count = seen.sum().astype(jnp.float32)
    center = jnp.where(seen, mean, 0).sum() / (count + 1)
    plain = (jnp.where(seen, (mean - center) ** 2 + variance, 0).sum() + 2 * PRIOR_VARIANCE) / (count + 2)
    weight = jnp.where(seen, 1 / (variance + plain), 0)
    size = features.shape[1]
    known = features.T @ (features * weight[:, None])
    inverse = jnp.linalg.inv(known + jnp.eye(size, dtype=jnp.float32) / plain)
    weights = inverse @ (features.T @ (weight * (mean - center)))
    used = jnp.sum(inverse * known)
    left = jnp.where(seen, (mean - center - features @ weights) ** 2 + variance, 0).sum()
    told = (left + 2 * plain) / jnp.maximum(count + 2 - used, 1)
    return state._replace(center=center, weights=weights, spread=jnp.stack([plain, told]))
