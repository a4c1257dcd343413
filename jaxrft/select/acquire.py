"""From pass rates to a batch: draws, distances to the target, and an exact top-k over a sharded table.

Whatever chooses takes a `quota` of the batch for each domain, or None.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxrft.mesh import constrain, shards, spec
from jaxrft.select import draws, posterior
from jaxrft.types import Array, Tasks

Balance = Literal["none", "proportional", "equal"]


class Quota(NamedTuple):
    """A batch's places by domain: they sum to its size, and no domain has more than it has tasks."""

    domain: Array  # [N] int32, of every task
    places: Array  # [N] or [N + 1] int32, of the domain of that number; there are at most as many domains as tasks


def quota(
    key: Array,
    tasks: Tasks,
    *,
    batch_size: int,
    balance: Balance = "none",
    among: Array | None = None,
) -> Quota | None:
    """The places of a batch of B for each domain of the tasks [N]; `among` [M]: of these alone.

    `proportional`: B n_d / N for a domain of n_d tasks, rounded up or down such that this is the expectation; `equal`:
    as many for each as there are tasks, the places that small domains cannot fill and what does not divide for others
    at random. Tasks that are `taken` are counted for no domain: theirs is one more, without places, so that they come
    last, behind NaN. None without a balance where no task is taken.
    """
    domain, taken = tasks.domain, tasks.taken
    if balance == "none" or domain is None:
        if taken is None:
            return None
        domain, divide = jnp.zeros(taken.shape, jnp.int32), _undivided
    else:
        divide = _proportional if balance == "proportional" else _equal
    free = jnp.ones(domain.shape, jnp.int32) if taken is None else 1 - taken.astype(jnp.int32)
    rows, free = (domain, free) if among is None else (domain[among], free[among])
    places = divide(key, jnp.zeros(domain.shape, jnp.int32).at[rows].add(free), free.sum(), batch_size)
    if taken is None:
        return Quota(rows, places)
    return Quota(jnp.where(free > 0, rows, domain.shape[0]), jnp.concatenate([places, jnp.zeros(1, jnp.int32)]))


def _undivided(key: Array, sizes: Array, num_tasks: Array, batch_size: int) -> Array:
    """All places for the only domain."""
    return jnp.zeros_like(sizes).at[0].set(batch_size)


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
) -> Array:
    """Ids [B] of the tasks whose draw theta_i ~ Beta(alpha_i, beta_i) is nearest `target` [arXiv 2510.26374]."""
    key_draw, key_tie = jax.random.split(key)
    return nearest(key_tie, posterior.sample(key_draw, state), batch_size=batch_size, target=target, quota=quota)


def nearest(
    key: Array, pass_rate: Array, *, batch_size: int, target: ArrayLike = 0.5, quota: Quota | None = None
) -> Array:
    """Ids [B] of the tasks whose `pass_rate` [N] is nearest `target`; ties at random, NaN last."""
    distance = jnp.abs(pass_rate - jnp.asarray(target, pass_rate.dtype))
    return smallest(key, distance, batch_size=batch_size, quota=quota)


def softmax(
    key: Array, score: Array, *, batch_size: int, temperature: ArrayLike = 1.0, quota: Quota | None = None
) -> Array:
    """Ids [B] drawn one after another, without replacement, each with chance proportional to exp(score / temperature).

    Exact, by the B largest of score / temperature + Gumbel noise [arXiv 1903.06059]; -inf and NaN are drawn last.
    """
    key_noise, key_tie = jax.random.split(key)
    noise = jax.random.gumbel(key_noise, score.shape, score.dtype)
    score = score / jnp.asarray(temperature, score.dtype) + noise
    return largest(key_tie, score, batch_size=batch_size, quota=quota)


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
    ids = largest(key_best, utility, batch_size=batch_size, quota=quota)
    best = utility[ids]
    score = utility + weight * interest
    score = score if first is None else score.at[first].set(jnp.inf, mode="drop")
    curious = largest(key_curious, score, batch_size=batch_size, quota=quota)
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
    return largest(key_rest, utility.at[ahead].set(jnp.inf, mode="drop"), batch_size=batch_size, quota=quota)


def by_chance(utility: Array, quota: Quota | None = None) -> Array:
    """Mean `utility` [] of a batch taken by chance from all tasks [N]; with a quota, of each domain by chance."""
    if quota is None:
        return utility.mean()
    places = quota.places.astype(utility.dtype)
    sizes = jnp.zeros_like(places).at[quota.domain].add(1)
    chance = (places / jnp.maximum(sizes, 1))[quota.domain]  # of every task
    return (chance * utility).sum() / jnp.maximum(places.sum(), 1)


def _by_domain(quota: Quota, score: Array, ids: Array) -> Array:
    """The least `score` [B] of the tasks `ids` [B] in the domain of every task, [N]; infinite where there is none."""
    least = jnp.full(quota.places.shape, jnp.inf, score.dtype).at[quota.domain[ids]].min(score)
    return least[quota.domain]


def cool_down(utility: Array, since: Array, *, steps: int) -> Array:
    """`utility` [N] with tasks chosen fewer than `steps` steps ago (`since` [N]) behind all others, in their order."""
    spread = jnp.nanmax(utility) - jnp.nanmin(utility)
    return jnp.where(since < steps, utility - spread - 1, utility)


def epoch(visits: Array, *, quota: Quota | None = None) -> Array:
    """1 for tasks visited more often than the least visited one, else 0, [N] int32; with a quota, than its domain's."""
    least = visits.min()
    if quota is not None:
        most = jnp.full(quota.places.shape, jnp.iinfo(visits.dtype).max, visits.dtype)
        least = most.at[quota.domain].min(visits)[quota.domain]
    return (visits > least).astype(jnp.int32)


def largest(key: Array, score: Array, *, batch_size: int, quota: Quota | None = None) -> Array:
    """Ids [B] int32, distinct, of the B largest scores [N], largest first; ties at random by `key`, NaN last."""
    return smallest(key, -score, batch_size=batch_size, quota=quota)


def smallest(key: Array, score: Array, *, batch_size: int, quota: Quota | None = None) -> Array:
    """Ids [B] int32, distinct, of the B smallest scores [N], smallest first; ties at random by `key`, NaN last.

    With a quota, of as many of the smallest in each domain as it has places. Exact, and the same on any mesh: every
    shard of the table finds its own best, and these meet.
    """
    num_tasks = score.shape[0]
    count = shards(jax.sharding.get_abstract_mesh(), "task")
    count = count if num_tasks % count == 0 else 1
    ids = jnp.arange(num_tasks, dtype=jnp.int32)
    if quota is not None:
        table = [score, _ties(key, ids), ids, quota.domain]
        if count > 1:
            rows = [constrain(x.reshape(count, -1), "task", None) for x in table]
            table = [x.reshape(-1) for x in _first(rows, quota.places, batch_size)]
        return _first(table, quota.places, batch_size)[2]
    if count > 1:
        own, table = functools.partial(_smallest, count=min(batch_size, num_tasks // count)), spec("task")
        score, ids = jax.shard_map(own, in_specs=(PartitionSpec(), table, table), out_specs=table)(key, score, ids)
    return _smallest(key, score, ids, count=batch_size)[1]


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
def _smallest(key: Array, score: Array, ids: Array, *, count: int) -> tuple[Array, Array]:
    """Score and id [count] of the smallest of [n], smallest first; of equal ones, by random numbers of their ids.

    A pass of `top_k`, another if more are as small as the last, and a sort of what they found: on CPUs a fiftieth of
    the time of a sort of the table.
    """
    rank = -_order(score)
    found = min(count + 1, rank.size)  # one more tells whether there are others like the last
    best, ahead = jax.lax.top_k(rank, found)
    last = jnp.where(jnp.arange(found) < count, best, jnp.inf).min()  # slices of `best` would make XLA sort instead

    def drawn() -> Array:
        return jax.lax.top_k(jnp.where(rank == last, -_order(_ties(key, ids)), -jnp.inf), found)[1]

    level = jax.lax.cond((best >= last).sum() > count, drawn, lambda: ahead)  # who may have the last places
    rows = jnp.concatenate([ahead, level])
    behind = jnp.concatenate([rank[ahead] <= last, rank[level] != last])
    chosen = jax.lax.sort((behind, -rank[rows], _ties(key, ids[rows]), rows), num_keys=3)[3][:count]
    return score[chosen], ids[chosen]


def _ties(key: Array, ids: Array) -> Array:
    """A random int32 of 30 bits for each of `ids`."""
    return (draws.words(key, ids.astype(jnp.uint32), np.uint32(0))[0] >> np.uint32(2)).astype(jnp.int32)


def _order(score: Array) -> Array:
    """Floats in the order of the scores, NaN beside infinity; `top_k` of integers would sort them all."""
    if jnp.issubdtype(score.dtype, jnp.floating):
        return jnp.where(jnp.isnan(score), jnp.inf, jnp.minimum(score, jnp.finfo(score.dtype).max))
    size = jnp.minimum(jnp.abs(score), np.int32(2**31 - 2**25)) + np.int32(2**23)  # the bits of a normal float
    size = jax.lax.bitcast_convert_type(size, jnp.float32)
    return jnp.where(score < 0, -size, size)
