"""Selectors that learn nothing: by turns, by a fixed curriculum, and by knowing the answer."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquire, evidence
from jaxrft.select.base import Selector
from jaxrft.select.checks import (
    BELOW_ONE,
    BETWEEN,
    check,
    check_balance,
    check_batch,
    check_choice,
    check_count,
    check_generations,
    check_pass_rates,
    check_table,
)
from jaxrft.types import Array, Choice, Feedback, InputError, Tasks


class VisitsState(NamedTuple):
    """How often each task has been chosen."""

    visits: Array  # [N] int32


class EasyToHardState(NamedTuple):
    """How often each task has been chosen, and where it stands from easy to hard."""

    visits: Array  # [N] int32
    rank: Array  # [N] int32, 0 = the easiest


Order = Literal["shuffled", "replacement", "sequential"]
MANY_VISITS = 2.0**20  # more than a task has


def uniform(num_generations: int, *, order: Order = "shuffled", balance: acquire.Balance = "none") -> Selector:
    """Every task as often as any other.

    `shuffled` goes through the table in epochs, each in a random order; `sequential` in the order of the table;
    `replacement` draws every batch afresh. In epochs no task comes twice before all have come once, and a batch is
    distinct even where one epoch ends and the next begins. With a `balance` of the batch between the domains, as
    `acquire.quota` says, each domain has epochs of its own.
    """
    num_generations = check_generations(num_generations)
    check_choice("order", order, get_args(Order), " of the uniform selector")
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> VisitsState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        return VisitsState(jnp.zeros(num_tasks, jnp.int32))

    def score(visits: Array, quota: acquire.Quota | None, exclude: Array | None) -> Array:
        """[N] int32; the smallest are chosen and ties broken at random."""
        if order == "replacement":
            return jnp.zeros_like(visits)
        seen = acquire.epoch(visits, quota=quota, exclude=exclude)
        if order == "shuffled":
            return seen
        num_tasks = visits.shape[0]
        return seen * num_tasks + jnp.arange(num_tasks, dtype=jnp.int32)

    def select(
        key: Array, state: VisitsState, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, VisitsState]:
        batch_size = check_batch(batch_size, state.visits, exclude)
        key_quota, key_tie = jax.random.split(key)
        quota = acquire.quota(key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        ids = acquire.smallest(
            key_tie, score(state.visits, quota, exclude), batch_size=batch_size, quota=quota, exclude=exclude
        )
        visits = constrain(state.visits.at[ids].add(1), "task")
        return Choice(ids, jnp.full(batch_size, jnp.nan, jnp.float32)), VisitsState(visits)

    return Selector(init, select, _unchanged, _unknown)


def easy_to_hard(num_generations: int, *, balance: acquire.Balance = "none") -> Selector:
    """A fixed curriculum: epochs in the order of the mean reference pass rate, easiest first.

    Tasks without any known reference pass rate come last; ties in the order of the table. With a `balance` of the batch
    between the domains, as `acquire.quota` says, each domain has epochs of its own.
    `init` raises InputError for references that are missing or outside [0, 1].
    """
    num_generations = check_generations(num_generations)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> EasyToHardState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        evidence.check_references(tasks, num_tasks, least=1)
        mean = jnp.nanmean(jnp.asarray(tasks.reference_pass_rates, jnp.float32), axis=1)  # NaN sorts last
        row = jnp.arange(num_tasks, dtype=jnp.int32)
        order = jax.lax.sort((-mean, row), num_keys=2)[1]
        return EasyToHardState(jnp.zeros(num_tasks, jnp.int32), jnp.zeros(num_tasks, jnp.int32).at[order].set(row))

    def select(
        key: Array, state: EasyToHardState, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, EasyToHardState]:
        batch_size = check_batch(batch_size, state.visits, exclude)
        key_quota, key_tie = jax.random.split(key)
        quota = acquire.quota(key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        rank = acquire.epoch(state.visits, quota=quota, exclude=exclude) * state.rank.shape[0] + state.rank
        ids = acquire.smallest(key_tie, rank, batch_size=batch_size, quota=quota, exclude=exclude)
        visits = constrain(state.visits.at[ids].add(1), "task")
        return Choice(ids, jnp.full(batch_size, jnp.nan, jnp.float32)), state._replace(visits=visits)

    return Selector(init, select, _unchanged, _unknown)


def oracle(
    num_generations: int,
    *,
    target: ArrayLike = 0.5,
    tolerance: ArrayLike = 0.4,
    measured: int = 512,
    measure_every: int = 4,
    balance: acquire.Balance = "none",
) -> Selector:
    """Chooses by `tasks.pass_rates`, which the caller measures by rollouts that nobody counts: what knowing is worth.

    The tasks within `tolerance` of `target`, those chosen least often first and ties at random, then the nearest; a
    task without a pass rate (NaN) comes last. Pass rates are wanted of `measured` tasks drawn at random, or of all when
    there are no more, every `measure_every` steps. `balance` of the batch between the domains: as `acquire.quota`
    says.
    `init` raises InputError when there are none.
    """
    num_generations = check_generations(num_generations)
    check("target", target, BETWEEN)
    check("tolerance", tolerance, BELOW_ONE)
    measured = check_count("measured", measured)
    measure_every = check_count("measure_every", measure_every)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> VisitsState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        _measured(tasks, num_tasks)
        return VisitsState(jnp.zeros(num_tasks, jnp.int32))

    def select(
        key: Array, state: VisitsState, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, VisitsState]:
        batch_size = check_batch(batch_size, state.visits, exclude)
        key_quota, key_tie = jax.random.split(key)
        quota = acquire.quota(key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        distance = jnp.abs(_measured(tasks, state.visits.shape[0]) - jnp.asarray(target, jnp.float32))
        near = distance <= jnp.asarray(tolerance, jnp.float32)
        score = jnp.where(near, state.visits.astype(jnp.float32), MANY_VISITS * (1 + distance))
        ids = acquire.smallest(key_tie, score, batch_size=batch_size, quota=quota, exclude=exclude)
        visits = constrain(state.visits.at[ids].add(1), "task")
        return Choice(ids, _measured(tasks, state.visits.shape[0])[ids]), VisitsState(visits)

    def pass_rate(state: VisitsState, tasks: Tasks) -> Array:
        return _measured(tasks, state.visits.shape[0])

    def measure(key: Array, num_tasks: int) -> Array:
        return jax.random.permutation(key, num_tasks)[:measured].astype(jnp.int32)

    return Selector(init, select, _unchanged, pass_rate, measure=measure, measure_every=measure_every)


def _unchanged(state: Any, tasks: Tasks, feedback: Feedback) -> Any:
    """What feedback teaches: nothing."""
    return state


def _unknown(state: VisitsState | EasyToHardState, tasks: Tasks) -> Array:
    """No belief about any task, [N]."""
    return jnp.full(state.visits.shape, jnp.nan, jnp.float32)


def _measured(tasks: Tasks, num_tasks: int) -> Array:
    """The policy's own pass rates [N]."""
    if tasks.pass_rates is None:
        raise InputError(
            "the oracle is given no pass rates: measure them and pass them in Tasks.pass_rates at every step"
        )
    check_pass_rates(tasks.pass_rates, num_tasks)
    return jnp.asarray(tasks.pass_rates, jnp.float32)
