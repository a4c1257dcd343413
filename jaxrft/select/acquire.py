"""From pass rates to a batch: draws, distances to the target, and an exact top-k over a sharded table.

Whatever chooses takes a `quota` of the batch for each domain and a mask `exclude` [N] of tasks that come last, or None.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxrft.mesh import constrain, shards, spec
from jaxrft.select import draws, posterior
from jaxrft.types import Array, Tasks

Balance = Literal["none", "proportional", "equal"]


class Quota(NamedTuple):
    """A batch's places by domain: they sum to its size, and no domain has more than it has tasks to choose from."""

    domain: Array  # [N] int32, of every task
    places: Array  # [N] int32, of the domain of that number; there are at most as many domains as tasks


def quota(
    key: Array,
    tasks: Tasks,
    *,
    batch_size: int,
    balance: Balance = "none",
    among: Array | None = None,
    exclude: Array | None = None,
) -> Quota | None:
    """Computes the places of a batch of B for each domain of the tasks [N], or of those `among` [M]; None = unbalanced.

    `proportional`: B n_d / N for a domain of n_d tasks, rounded up or down such that this is the expectation; `equal`:
    as many for each as there are tasks, the places that small domains cannot fill and what does not divide for others
    at random. Tasks of the mask `exclude` [N] are not counted.
    """
    if balance == "none" or tasks.domain is None:
        return None
    counted = jnp.ones(tasks.domain.shape, jnp.int32)
    if exclude is not None:
        counted = counted - exclude.astype(jnp.int32)
    domain = tasks.domain
    if among is not None:
        domain = domain[among]
        counted = counted[among]
    sizes = jnp.zeros(tasks.domain.shape, jnp.int32).at[domain].add(counted)
    divide = _proportional if balance == "proportional" else _equal
    places = divide(key, sizes, counted.sum(), batch_size)
    return Quota(domain, jnp.minimum(places, sizes))


def _proportional(key: Array, sizes: Array, num_tasks: Array, batch_size: int) -> Array:
    """The domains of B tasks that stand N / B apart from each other, from a random one on, in a table by domain."""
    start, place = jax.random.randint(key, (), 0, num_tasks), jnp.arange(batch_size)
    whole, rest = divmod(num_tasks, batch_size)
    row = place * whole + (place * rest + start) // batch_size  # floor((place * N + start) / B), which may overflow
    return jnp.zeros_like(sizes).at[jnp.searchsorted(jnp.cumsum(sizes), row, side="right")].add(1)


def _equal(key: Array, sizes: Array, num_tasks: Array, batch_size: int) -> Array:
    """As many places for each domain as all can have, or its tasks; one more for some, beginning at a random one."""
    count = jnp.zeros(batch_size + 1, jnp.int32).at[jnp.minimum(sizes, batch_size)].add(1)  # domains by size
    larger = jnp.cumsum(count[::-1])[::-1][1:]  # [B], domains of 1, 2, ... tasks and more
    level = (jnp.cumsum(larger) <= batch_size).sum()
    places, open_to = jnp.minimum(sizes, level), sizes > level
    number = jnp.maximum(open_to.sum(), 1)
    turn = (jnp.cumsum(open_to) + jax.random.randint(key, (), 0, number)) % number
    return places + (open_to & (turn < batch_size - places.sum())).astype(jnp.int32)


def thompson(
    key: Array,
    state: posterior.BetaState,
    *,
    batch_size: int,
    target: ArrayLike = 0.5,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Ids [B] of the tasks whose draw theta_i ~ Beta(alpha_i, beta_i) is nearest `target` [arXiv 2510.26374]."""
    key_draw, key_tie = jax.random.split(key)
    draw = posterior.sample(key_draw, state)
    return nearest(key_tie, draw, batch_size=batch_size, target=target, quota=quota, exclude=exclude)


def nearest(
    key: Array,
    pass_rate: Array,
    *,
    batch_size: int,
    target: ArrayLike = 0.5,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Ids [B] of the tasks whose `pass_rate` [N] is nearest `target`; ties at random, NaN last."""
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
    """Ids [B] drawn one after another, without replacement, each with chance proportional to exp(score / temperature).

    Exact, by the B largest of score / temperature + Gumbel noise [arXiv 1903.06059]; -inf and NaN are drawn last.
    """
    key_noise, key_tie = jax.random.split(key)
    noise = jax.random.gumbel(key_noise, score.shape, score.dtype)
    score = score / jnp.asarray(temperature, score.dtype) + noise
    return largest(key_tie, score, batch_size=batch_size, quota=quota, exclude=exclude)


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
    key: Array,
    utility: Array,
    interest: Array,
    *,
    batch_size: int,
    weight: ArrayLike,
    price: ArrayLike | Callable[[Array], ArrayLike],
    chance: ArrayLike = 0.0,
    first: Array | None = None,
    alike: ArrayLike = 0.0,
    preference: Array | None = None,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Ids [B]: the greatest `utility` [N], but for as many of the greatest utility + `weight` * interest as are paid.

    The first k places go to the curious ranking, k as large as keeps the sum of utilities from falling below that of
    the B greatest by more than the share `price` of what this is above B * `chance`, the utility of a task taken by
    chance (`by_chance`); one more with the probability that is the part of its cost left to pay, which small batches
    would lose to rounding; the others to the greatest utilities left. `price` may be a function of that gain as a share
    [] of the sum, if utilities are not negative. What k places leave is counted as theirs and the B - k greatest, with
    a quota as many as are left of every domain, though some may be both, so that a curious ranking of the best costs
    less than nothing. The tasks `first` [K], ids where N is none, head the curious ranking and have their places at any
    price. With a `preference` [N], utilities of at least (1 - `alike`) times the least of the B greatest, with a quota
    those in the domain, count as equal, and the greatest preference has the place. Utilities are finite, preferences
    not negative.
    """
    key_best, key_curious, key_part, key_rest = jax.random.split(key, 4)
    weight, chance, alike = (jnp.asarray(x, utility.dtype) for x in (weight, chance, alike))
    rank = functools.partial(largest, batch_size=batch_size, quota=quota, exclude=exclude)
    ids = rank(key_best, utility)
    best = utility[ids]
    score = utility + weight * interest
    score = score if first is None else score.at[first].set(jnp.inf, mode="drop")
    curious = rank(key_curious, score)
    displaced = best[::-1]  # of the best, by each of the curious ranking in turn
    if quota is not None:  # the least of its own domain
        order = jnp.argsort(quota.domain[curious])
        displaced = displaced.at[order].set(best[jnp.lexsort((best, quota.domain[ids]))])
    rest = jnp.concatenate([jnp.cumsum(displaced[:0:-1])[::-1], jnp.zeros(1, utility.dtype)])  # left, k = 1..B
    gain = jnp.maximum(best.sum() - batch_size * chance, 0)
    share = gain / jnp.where(gain > 0, best.sum(), 1)
    price = jnp.asarray(price(share) if callable(price) else price, utility.dtype)
    cost = best.sum() - (jnp.cumsum(utility[curious]) + rest)  # of k places, k = 1..B
    last = jnp.maximum(jnp.diff(cost, prepend=0), 0)  # of the k-th alone
    paid = (cost - jax.random.uniform(key_part, dtype=utility.dtype) * last <= price * gain).sum()
    count = jnp.maximum(paid, jnp.isinf(score[curious]).sum())
    ahead = jnp.where(jnp.arange(batch_size) < count, curious, utility.shape[0])
    if preference is not None:
        least = best.min() if quota is None else _by_domain(quota, best, ids)
        equal = utility >= (1 - alike) * least
        utility = jnp.where(equal, best.max() + 1 + preference, utility)  # above all that are not, of the same domain
    return rank(key_rest, utility.at[ahead].set(jnp.inf, mode="drop"))


def by_chance(utility: Array, quota: Quota | None = None, exclude: Array | None = None) -> Array:
    """Computes the mean `utility` [] of a batch taken by chance from all tasks [N]; with a quota, of each domain."""
    counted = jnp.ones_like(utility) if exclude is None else 1 - exclude.astype(utility.dtype)
    if quota is None:
        return utility.mean() if exclude is None else (counted * utility).sum() / jnp.maximum(counted.sum(), 1)
    places = quota.places.astype(utility.dtype)
    sizes = jnp.zeros_like(places).at[quota.domain].add(counted)
    chance = counted * (places / jnp.maximum(sizes, 1))[quota.domain]  # of every task
    return (chance * utility).sum() / jnp.maximum(places.sum(), 1)


def _by_domain(quota: Quota, score: Array, ids: Array) -> Array:
    """The least `score` [B] of the tasks `ids` [B] in the domain of every task, [N]; infinite where there is none."""
    least = jnp.full(quota.places.shape, jnp.inf, score.dtype).at[quota.domain[ids]].min(score)
    return least[quota.domain]


def cool_down(utility: Array, since: Array, *, steps: int) -> Array:
    """`utility` [N] with tasks chosen fewer than `steps` steps ago (`since` [N]) behind all others, in their order."""
    spread = jnp.nanmax(utility) - jnp.nanmin(utility)
    return jnp.where(since < steps, utility - spread - 1, utility)


def epoch(visits: Array, *, quota: Quota | None = None, exclude: Array | None = None) -> Array:
    """Returns 1 for tasks visited more often than the least visited one, else 0, [N] int32; with a quota, by domain."""
    counted = visits if exclude is None else jnp.where(exclude, jnp.iinfo(visits.dtype).max, visits)
    if quota is None:
        return (visits > counted.min()).astype(jnp.int32)
    most = jnp.full(quota.places.shape, jnp.iinfo(visits.dtype).max, visits.dtype)
    least = most.at[quota.domain].min(counted)[quota.domain]
    return (visits > least).astype(jnp.int32)


def largest(
    key: Array, score: Array, *, batch_size: int, quota: Quota | None = None, exclude: Array | None = None
) -> Array:
    """Returns the distinct ids [B] int32 of the B largest scores [N], as `smallest` does of the smallest."""
    return smallest(key, -score, batch_size=batch_size, quota=quota, exclude=exclude)


def smallest(
    key: Array, score: Array, *, batch_size: int, quota: Quota | None = None, exclude: Array | None = None
) -> Array:
    """Returns the distinct ids [B] int32 of the B smallest scores [N], smallest first.

    Ties are broken at random by `key`. NaN comes last, and the tasks of the mask `exclude` [N] behind it, at random.
    With a quota, as many of the smallest of each domain as it has places. Exact, and the same on any mesh: every
    shard of the table finds its own best, and these meet.
    """
    num_tasks = score.shape[0]
    count = shards(jax.sharding.get_abstract_mesh(), "task")
    count = count if num_tasks % count == 0 else 1
    ids = jnp.arange(num_tasks, dtype=jnp.int32)
    if exclude is not None:
        score = jnp.where(exclude, _last(score.dtype), score)
    if quota is not None:
        table = [score, _ties(key, ids, exclude), ids, quota.domain]
        if count > 1:
            rows = [constrain(x.reshape(count, -1), "task", None) for x in table]
            table = [x.reshape(-1) for x in _first(rows, quota.places, batch_size)]
        return _first(table, quota.places, batch_size)[2]
    if count > 1:
        own = functools.partial(_smallest, count=min(batch_size, num_tasks // count))
        table = spec("task")
        of_shards = jax.shard_map(own, in_specs=(PartitionSpec(), table, table, table), out_specs=table)
        score, ids, exclude = of_shards(key, score, ids, exclude)
    return _smallest(key, score, ids, exclude, count=batch_size)[1]


def _last(dtype: DTypeLike) -> Array:
    """Returns the score that no other stands behind."""
    return jnp.array(jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max, dtype)


def _first(table: list[Array], places: Array, batch_size: int) -> list[Array]:
    """The B first rows of (score, tie, id, domain) [..., n], those behind their domain's `places` last."""
    score, ties, ids, domain = table
    domain, score, ties, ids = jax.lax.sort((domain, score, ties, ids), num_keys=3)
    row = jax.lax.broadcasted_iota(jnp.int32, domain.shape, domain.ndim - 1)
    begins = jnp.diff(domain, axis=-1, prepend=-1) != 0
    rank = row - jax.lax.cummax(jnp.where(begins, row, 0), axis=domain.ndim - 1)  # in its domain
    rows = jax.lax.sort([rank >= places[domain], score, ties, ids, domain], num_keys=3)  # puts NaN behind infinity
    return [x[..., :batch_size] for x in rows][1:]


@functools.partial(jax.jit, static_argnames="count")  # outside of any program, each operation would be one
def _smallest(
    key: Array, score: Array, ids: Array, exclude: Array | None, *, count: int
) -> tuple[Array, Array, Array | None]:
    """Returns score, id and mask [count] of the smallest of [n], smallest first; of equal ones, by random numbers.

    A pass of `top_k`, another if more are as small as the last, and a sort of what they found: on CPUs a fiftieth of
    the time of a sort of the table.
    """
    rank = -_order(score)
    found = min(count + 1, rank.size)  # one more tells whether there are others like the last
    best, ahead = jax.lax.top_k(rank, found)
    last = jnp.where(jnp.arange(found) < count, best, jnp.inf).min()  # slices of `best` would make XLA sort instead

    def drawn() -> Array:
        return jax.lax.top_k(jnp.where(rank == last, -_order(_ties(key, ids, exclude)), -jnp.inf), found)[1]

    level = jax.lax.cond((best >= last).sum() > count, drawn, lambda: ahead)  # who may have the last places
    rows = jnp.concatenate([ahead, level])
    behind = jnp.concatenate([rank[ahead] <= last, rank[level] != last])
    ties = _ties(key, ids[rows], None if exclude is None else exclude[rows])
    chosen = jax.lax.sort((behind, -rank[rows], ties, rows), num_keys=3)[3][:count]
    return score[chosen], ids[chosen], None if exclude is None else exclude[chosen]


def _ties(key: Array, ids: Array, exclude: Array | None) -> Array:
    """Draws a random int32 of 30 bits for each of `ids`; of the mask `exclude`, one above all others."""
    bits = draws.words(key, ids.astype(jnp.uint32), np.uint32(0))[0] >> np.uint32(2)
    ties = bits.astype(jnp.int32)
    return ties if exclude is None else jnp.where(exclude, 2**30 + ties // 2, ties)


def _order(score: Array) -> Array:
    """Floats in the order of the scores, NaN beside infinity; `top_k` of integers would sort them all."""
    if jnp.issubdtype(score.dtype, jnp.floating):
        return jnp.where(jnp.isnan(score), jnp.inf, jnp.minimum(score, jnp.finfo(score.dtype).max))
    size = jnp.minimum(jnp.abs(score), np.int32(2**31 - 2**25)) + np.int32(2**23)  # the bits of a normal float
    size = jax.lax.bitcast_convert_type(size, jnp.float32)
    return jnp.where(score < 0, -size, size)
