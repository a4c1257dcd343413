"""From pass rates to a batch: draws, distances to the target, and an exact top-k over a sharded table."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain, shards
from jaxrft.select import posterior
from jaxrft.types import Array


def thompson(key: Array, state: posterior.BetaState, *, batch_size: int, target: ArrayLike = 0.5) -> Array:
    """Ids [B] of the tasks whose draw theta_i ~ Beta(alpha_i, beta_i) is nearest `target` [arXiv 2510.26374]."""
    key_draw, key_tie = jax.random.split(key)
    return nearest(key_tie, posterior.sample(key_draw, state), batch_size=batch_size, target=target)


def nearest(key: Array, pass_rate: Array, *, batch_size: int, target: ArrayLike = 0.5) -> Array:
    """Ids [B] of the tasks whose `pass_rate` [N] is nearest `target`; ties at random, NaN last."""
    return smallest(key, jnp.abs(pass_rate - jnp.asarray(target, pass_rate.dtype)), batch_size=batch_size)


def softmax(key: Array, score: Array, *, batch_size: int, temperature: ArrayLike = 1.0) -> Array:
    """Ids [B] drawn one after another, without replacement, each with chance proportional to exp(score / temperature).

    Exact, by the B largest of score / temperature + Gumbel noise [arXiv 1903.06059]; -inf and NaN are drawn last.
    """
    key_noise, key_tie = jax.random.split(key)
    noise = jax.random.gumbel(key_noise, score.shape, score.dtype)
    return largest(key_tie, score / jnp.asarray(temperature, score.dtype) + noise, batch_size=batch_size)


def informative(pass_rate: Array, num_generations: int) -> Array:
    """Chance 1 - p^G - (1 - p)^G that a group of G rollouts is neither all right nor all wrong."""
    return 1 - pass_rate**num_generations - (1 - pass_rate) ** num_generations


def informative_beta(state: posterior.BetaState, num_generations: int) -> Array:
    """Chance of an informative group of G rollouts under Beta(a, b), [N].

    1 - prod_k (a + k) / (a + b + k) - prod_k (b + k) / (a + b + k), k = 0..G-1: products, since a difference of
    log-gammas in float32 loses it for large a and b.
    """

    def multiply(k: Array, products: tuple[Array, Array]) -> tuple[Array, Array]:
        k = k.astype(state.alpha.dtype)
        total = state.alpha + state.beta + k
        return products[0] * ((state.alpha + k) / total), products[1] * ((state.beta + k) / total)

    one = jnp.ones_like(state.alpha)
    right, wrong = jax.lax.fori_loop(0, num_generations, multiply, (one, one))
    return 1 - right - wrong


def signal(pass_rate: Array) -> Array:
    """4 p (1 - p), proportional to the expected squared gradient without group normalisation [arXiv 2506.05316]."""
    return 4 * pass_rate * (1 - pass_rate)


def per_token(utility: Array, tokens: Array) -> Array:
    """Utility [N] per expected completion token; unknown `tokens` [N] (0 or NaN) count as the mean of the others."""
    known = tokens > 0
    mean = jnp.where(known, tokens, 0).sum() / jnp.maximum(known.sum(), 1).astype(tokens.dtype)
    return utility / jnp.where(known, tokens, jnp.where(mean > 0, mean, 1))


def priced(
    key: Array, utility: Array, interest: Array, *, batch_size: int, weight: ArrayLike, price: ArrayLike
) -> Array:
    """Ids [B]: the greatest `utility` [N], but for as many of the greatest utility + `weight` * interest as are paid.

    The first k places go to the curious ranking, k as large as keeps the sum of utilities at or above
    (1 - `price`) times the sum of the B greatest; the others to the greatest utilities left.
    """
    key_best, key_curious, key_rest = jax.random.split(key, 3)
    weight, price = (jnp.asarray(x, utility.dtype) for x in (weight, price))
    best = utility[largest(key_best, utility, batch_size=batch_size)]
    curious = largest(key_curious, utility + weight * interest, batch_size=batch_size)
    rest = jnp.concatenate([jnp.cumsum(best[:-1])[::-1], jnp.zeros(1, utility.dtype)])  # of the B - k best, k = 1..B
    count = (jnp.cumsum(utility[curious]) + rest >= (1 - price) * best.sum()).sum()
    first = jnp.where(jnp.arange(batch_size) < count, curious, utility.shape[0])
    ahead = jnp.zeros(utility.shape, bool).at[first].set(True, mode="drop")
    return largest(key_rest, jnp.where(ahead, jnp.inf, utility), batch_size=batch_size)


def cool_down(utility: Array, since: Array, *, steps: int) -> Array:
    """`utility` [N] with tasks chosen fewer than `steps` steps ago (`since` [N]) behind all others, in their order."""
    spread = jnp.nanmax(utility) - jnp.nanmin(utility)
    return jnp.where(since < steps, utility - spread - 1, utility)


def largest(key: Array, score: Array, *, batch_size: int) -> Array:
    """Ids [B] int32, distinct, of the B largest scores [N], largest first; ties at random by `key`, NaN last."""
    return smallest(key, -score, batch_size=batch_size)


def smallest(key: Array, score: Array, *, batch_size: int) -> Array:
    """Ids [B] int32, distinct, of the B smallest scores [N], smallest first; ties at random by `key`, NaN last.

    Exact, and the same on any mesh: every shard of the table sorts its own rows, and the B best of each meet.
    """
    num_tasks = score.shape[0]
    count = shards(jax.sharding.get_abstract_mesh(), "task")
    count = count if num_tasks % count == 0 else 1
    table = (score, jax.random.bits(key, (num_tasks,)), jnp.arange(num_tasks, dtype=jnp.int32))
    if count > 1:
        rows = [constrain(x.reshape(count, -1), "task", None) for x in table]
        table = [x[:, :batch_size].reshape(-1) for x in jax.lax.sort(rows, dimension=1, num_keys=2)]
    return jax.lax.sort(table, num_keys=2)[2][:batch_size]  # sort puts NaN behind infinity
