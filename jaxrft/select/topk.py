"""Finds the tasks of the best scores in a table that may be sharded, with a quota for each domain
and a mask.

The top-k is exact, and the same on any mesh.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrft.mesh import constrain, shards, spec
from jaxrft.select.random_bits import random_bits
from jaxrft.shapes import REAL, check_shapes
from jaxrft.types import Array, Tasks

Balance = Literal["none", "proportional", "equal"]


class Quota(NamedTuple):
    """The slots of a batch for each domain: they sum to the batch size, and no domain has more than
    it has tasks to choose from.
    """

    domain: Array  # [N] int32, of every task
    slots: Array  # [N] int32, of each domain; the number of tasks bounds that of domains


def quota(
    key: Array,
    tasks: Tasks,
    *,
    batch_size: int,
    balance: Balance = "none",
    among: Array | None = None,
    exclude: Array | None = None,
) -> Quota | None:
    """Computes the slots of a batch of B for each domain of the tasks [N], or of those `among` [M];
    None = unbalanced.

    `proportional`: B n_d / N for a domain of n_d tasks, rounded up or down such that this is the
    expectation. `equal`: the same number for each domain, except that a domain has no more than its
    tasks; slots that remain go to other domains at random. Tasks of the mask `exclude` [N] are not
    counted.
    """
    if balance == "none" or tasks.domain is None:
        return None
    check_shapes(domain=(tasks.domain, "N"), exclude=(exclude, "N"), among=(among, "M"))
    counted = jnp.ones(tasks.domain.shape, jnp.int32)
    if exclude is not None:
        counted = counted - exclude.astype(jnp.int32)
    domain = tasks.domain
    if among is not None:
        domain = domain[among]
        counted = counted[among]
    sizes = jnp.zeros(tasks.domain.shape, jnp.int32).at[domain].add(counted)
    divide = _proportional if balance == "proportional" else _equal
    slots = divide(key, sizes, counted.sum(), batch_size)
    return Quota(domain, jnp.minimum(slots, sizes))


def _proportional(key: Array, sizes: Array, num_tasks: Array, batch_size: int) -> Array:
    """Computes the slots of each domain by systematic sampling.

    B tasks are N / B apart in a table sorted by domain, the first at random. A domain has a slot
    for each of these tasks in it.
    """
    start = jax.random.randint(key, (), 0, num_tasks)
    slot = jnp.arange(batch_size)
    quotient, remainder = divmod(num_tasks, batch_size)
    # floor((slot * N + start) / B), without the overflow of slot * N
    row = slot * quotient + (slot * remainder + start) // batch_size
    return jnp.zeros_like(sizes).at[jnp.searchsorted(jnp.cumsum(sizes), row, side="right")].add(1)


def _equal(key: Array, sizes: Array, num_tasks: Array, batch_size: int) -> Array:
    """Computes equal numbers of slots for all domains; a smaller domain has one for each task.

    The slots that remain go one each to domains that can fill them, from a random domain on.
    """
    # domains by size
    count = jnp.zeros(batch_size + 1, jnp.int32).at[jnp.minimum(sizes, batch_size)].add(1)
    larger = jnp.cumsum(count[::-1])[::-1][1:]  # [B], domains of 1, 2, ... tasks and more
    level = (jnp.cumsum(larger) <= batch_size).sum()
    slots = jnp.minimum(sizes, level)
    has_room = sizes > level
    count_with_room = jnp.maximum(has_room.sum(), 1)
    start = jax.random.randint(key, (), 0, count_with_room)
    turn = (jnp.cumsum(has_room) + start) % count_with_room
    return slots + (has_room & (turn < batch_size - slots.sum())).astype(jnp.int32)


def largest(
    key: Array,
    score: Array,
    *,
    batch_size: int,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Returns the distinct ids [B] int32 of the B largest scores [N], as `smallest` does of the
    smallest.
    """
    return smallest(key, -score, batch_size=batch_size, quota=quota, exclude=exclude)


def smallest(
    key: Array,
    score: Array,
    *,
    batch_size: int,
    quota: Quota | None = None,
    exclude: Array | None = None,
) -> Array:
    """Returns the distinct ids [B] int32 of the B smallest scores [N], smallest first.

    Ties are broken at random by `key`. NaN comes last, and the tasks of the mask `exclude` [N]
    behind it, at random. With a quota, the smallest of each domain fill its slots. Exact, and the
    same on any mesh: each shard finds its own smallest, and the smallest of these are taken.
    """
    domain = None if quota is None else quota.domain
    check_shapes(score=(score, "N", REAL), exclude=(exclude, "N", bool), domain=(domain, "N"))
    num_tasks = score.shape[0]
    count = shards(jax.sharding.get_abstract_mesh(), "task")
    count = count if num_tasks % count == 0 else 1
    ids = jnp.arange(num_tasks, dtype=jnp.int32)
    if exclude is not None:
        floating = jnp.issubdtype(score.dtype, jnp.floating)
        # the score that sorts last
        last = jnp.nan if floating else jnp.iinfo(score.dtype).max
        score = jnp.where(exclude, jnp.array(last, score.dtype), score)
    if quota is not None:
        table = [score, _ties(key, ids, exclude), ids, quota.domain]
        if count > 1:
            rows = [constrain(x.reshape(count, -1), "task", None) for x in table]
            table = [x.reshape(-1) for x in _first(rows, quota.slots, batch_size)]
        return _first(table, quota.slots, batch_size)[2]
    if count > 1:
        smallest_of_shard = functools.partial(_smallest, count=min(batch_size, num_tasks // count))
        table = spec("task")
        smallest_of_shards = jax.shard_map(
            smallest_of_shard, in_specs=(PartitionSpec(), table, table, table), out_specs=table
        )
        score, ids, exclude = smallest_of_shards(key, score, ids, exclude)
    return _smallest(key, score, ids, exclude, count=batch_size)[1]


def _first(table: list[Array], slots: Array, batch_size: int) -> list[Array]:
    """Selects the B first rows of (score, tie, id, domain) [..., n].

    Rows beyond the `slots` of their domain come last.
    """
    score, ties, ids, domain = table
    domain, score, ties, ids = jax.lax.sort((domain, score, ties, ids), num_keys=3)
    row = jax.lax.broadcasted_iota(jnp.int32, domain.shape, domain.ndim - 1)
    begins = jnp.diff(domain, axis=-1, prepend=-1) != 0
    rank = row - jax.lax.cummax(jnp.where(begins, row, 0), axis=domain.ndim - 1)  # in its domain
    # puts NaN behind infinity
    rows = jax.lax.sort([rank >= slots[domain], score, ties, ids, domain], num_keys=3)
    return [x[..., :batch_size] for x in rows][1:]


# outside of any program, each operation would be one
@functools.partial(jax.jit, static_argnames="count")
def _smallest(
    key: Array, score: Array, ids: Array, exclude: Array | None, *, count: int
) -> tuple[Array, Array, Array | None]:
    """Returns score, id and mask [count] of the smallest of [n], smallest first; ties in random
    order.

    This takes a pass of `top_k`, a second one if there are ties with the last, and a sort of the
    results. On CPUs that is 50 times as fast as a sort of the table.
    """
    # The barrier keeps XLA from computing the scores again below, where they could be rounded
    # otherwise and have other ranks.
    rank = jax.lax.optimization_barrier(-_order(score))
    size = min(count + 1, rank.size)  # one more shows whether others tie with the last
    best, best_rows = jax.lax.top_k(rank, size)
    # slices of `best` would make XLA sort instead
    last = jnp.where(jnp.arange(size) < count, best, jnp.inf).min()
    tied = (best >= last).sum() > count

    def draw_among_ties() -> list[Array]:
        ties = -_order(_ties(key, ids, exclude))
        return list(jax.lax.top_k(jnp.where(rank == last, ties, -jnp.inf), size))

    # candidates for the last slots
    drawn, tied_rows = jax.lax.cond(tied, draw_among_ties, lambda: [best, best_rows])
    rows = jnp.concatenate([best_rows, tied_rows])
    behind = jnp.concatenate([(best < last) | (tied & (best == last)), ~tied | (drawn == -jnp.inf)])
    order = jnp.concatenate([-best, jnp.full_like(best, -last)])
    ties = _ties(key, ids[rows], None if exclude is None else exclude[rows])
    chosen = jax.lax.sort((behind, order, ties, rows), num_keys=3)[3][:count]
    return score[chosen], ids[chosen], None if exclude is None else exclude[chosen]


def _ties(key: Array, ids: Array, exclude: Array | None) -> Array:
    """Draws a random int32 of 30 bits for each of `ids`; of the mask `exclude`, one above all
    others.
    """
    bits = random_bits(key, ids.astype(jnp.uint32), np.uint32(0))[0] >> np.uint32(2)
    ties = bits.astype(jnp.int32)
    return ties if exclude is None else jnp.where(exclude, 2**30 + ties // 2, ties)


def _order(score: Array) -> Array:
    """Maps scores to floats in the same order, with NaN behind infinity.

    `top_k` of integers would sort them all.
    """
    if jnp.issubdtype(score.dtype, jnp.floating):
        return jnp.where(jnp.isnan(score), jnp.inf, jnp.minimum(score, jnp.finfo(score.dtype).max))
    # the bits of a normal float
    size = jnp.minimum(jnp.abs(score), np.int32(2**31 - 2**25)) + np.int32(2**23)
    size = jax.lax.bitcast_convert_type(size, jnp.float32)
    return jnp.where(score < 0, -size, size)
