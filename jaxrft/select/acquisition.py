"""Turns pass rates into a batch: draws, distances to the target, and utilities.

Functions that choose tasks take a `quota` of the batch for each domain, and a mask `exclude` [N] of
tasks that come last; both may be None.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.select import posterior
from jaxrft.select.topk import Quota, largest, smallest
from jaxrft.shapes import check_dtypes, check_shapes
from jaxrft.types import Array


def thompson(
    key: Array,
    state: posterior.BetaState,
    *,
    batch_size: int,
    target: ArrayLike = 0.5,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Chooses the tasks whose draw theta_i ~ Beta(alpha_i, beta_i) is nearest `target`.

    Returns their ids [B]. This is Thompson sampling of the pass rates [arXiv 2510.26374].
    """
    key_draw, key_tie = jax.random.split(key)
    draw = posterior.sample(key_draw, state)
    return nearest(
        key_tie, draw, batch_size=batch_size, target=target, quota=quota, exclude=exclude
    )


def nearest(
    key: Array,
    pass_rate: Array,
    *,
    batch_size: int,
    target: ArrayLike = 0.5,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Chooses the tasks whose `pass_rate` [N] is nearest `target`, and returns their ids [B].

    Ties are broken at random, and NaN comes last.
    """
    check_dtypes(float, pass_rate=pass_rate)
    distance = jnp.abs(pass_rate - jnp.asarray(target, pass_rate.dtype))
    return smallest(key, distance, batch_size=batch_size, quota=quota, exclude=exclude)


def softmax(
    key: Array,
    score: Array,
    *,
    batch_size: int,
    temperature: ArrayLike = 1.0,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Draws ids [B] without replacement, each with chance proportional to exp(score / temperature).

    The ids are drawn one after another. The draw is exact: it takes the B largest of
    score / temperature + Gumbel noise [arXiv 1903.06059]. Scores of -inf and NaN are drawn last.
    """
    check_dtypes(float, score=score)
    key_noise, key_tie = jax.random.split(key)
    noise = jax.random.gumbel(key_noise, score.shape, score.dtype)
    score = score / jnp.asarray(temperature, score.dtype) + noise
    return largest(key_tie, score, batch_size=batch_size, quota=quota, exclude=exclude)


def informative(pass_rate: Array, num_generations: int) -> Array:
    """Computes the chance that a group of G rollouts is neither all right nor all wrong.

    1 - p^G - (1 - p)^G
    """
    check_dtypes(float, pass_rate=pass_rate)
    return 1 - pass_rate**num_generations - (1 - pass_rate) ** num_generations


def informative_beta(state: posterior.BetaState, num_generations: int) -> Array:
    """Computes the chance of an informative group of G rollouts under Beta(a, b), [N].

    1 - prod_k (a + k) / (a + b + k) - prod_k (b + k) / (a + b + k), k = 0..G-1

    The products keep their digits for large a and b, where a difference of log-gammas in float32
    loses them.
    """

    def multiply(k: Array, products: tuple[Array, Array]) -> tuple[Array, Array]:
        k = k.astype(state.alpha.dtype)
        total = state.alpha + state.beta + k
        return products[0] * ((state.alpha + k) / total), products[1] * ((state.beta + k) / total)

    check_shapes(alpha=(state.alpha, "N", float), beta=(state.beta, "N", float))
    one = jnp.ones_like(state.alpha)
    right, wrong = jax.lax.fori_loop(0, num_generations, multiply, (one, one))
    return 1 - right - wrong


def signal(pass_rate: Array) -> Array:
    """Computes the gradient signal 4 p (1 - p) of a pass rate p.

    It is proportional to the expected squared gradient without group normalization
    [arXiv 2506.05316].
    """
    check_dtypes(float, pass_rate=pass_rate)
    return 4 * pass_rate * (1 - pass_rate)


def per_token(utility: Array, tokens: Array) -> Array:
    """Divides a utility [N] by the expected number of completion tokens, `tokens` [N].

    Unknown `tokens` (0 or NaN) count as the mean of the others.
    """
    check_shapes(utility=(utility, "N"), tokens=(tokens, "N"))
    known = tokens > 0
    mean = jnp.where(known, tokens, 0).sum() / jnp.maximum(known.sum(), 1).astype(tokens.dtype)
    return utility / jnp.where(known, tokens, jnp.where(mean > 0, mean, 1))


def has_slot(key: Array, share: ArrayLike, *, batch_size: int) -> Array:
    """Draws a mask [B] of the first slots, of which a `share` in [0, 1] is the mean.

    The number of slots is share * B, rounded up or down at random.
    """
    slots = jnp.asarray(share, jnp.float32) * batch_size + jax.random.uniform(key)
    return jnp.arange(batch_size) < slots.astype(jnp.int32)


def least_by_domain(quota: Quota, score: Array, ids: Array) -> Array:
    """Finds, for every task [N], the least `score` [B] of the tasks `ids` [B] in its domain.

    It is infinite for a domain with none of `ids`.
    """
    least = jnp.full(quota.slots.shape, jnp.inf, score.dtype).at[quota.domain[ids]].min(score)
    return least[quota.domain]


def cool_down(utility: Array, since: Array, *, steps: int) -> Array:
    """Lowers `utility` [N] of recently chosen tasks below that of all others.

    These are the tasks chosen fewer than `steps` steps ago (`since` [N]). They keep their order.
    """
    check_shapes(utility=(utility, "N", float), since=(since, "N"))
    spread = jnp.nanmax(utility) - jnp.nanmin(utility)
    return jnp.where(since < steps, utility - spread - 1, utility)


def epoch(visits: Array, *, quota: Quota | None = None, exclude: Array | None = None) -> Array:
    """Returns 1 for tasks visited more often than the least visited one, else 0, [N] int32; with a
    quota, by domain.
    """
    return (visits > least_visits(visits, quota=quota, exclude=exclude)).astype(jnp.int32)


def least_visits(
    visits: Array, *, quota: Quota | None = None, exclude: Array | None = None
) -> Array:
    """Returns the visits of the least visited task, []; with a quota, of the one in each task's
    domain, [N].

    Tasks of the mask `exclude` [N] are not counted. Without any other it is the largest integer.
    """
    check_shapes(visits=(visits, "N", int), exclude=(exclude, "N"))
    largest_visits = jnp.iinfo(visits.dtype).max
    counted = visits if exclude is None else jnp.where(exclude, largest_visits, visits)
    if quota is None:
        return counted.min()
    least = jnp.full(quota.slots.shape, largest_visits, visits.dtype).at[quota.domain].min(counted)
    return least[quota.domain]
