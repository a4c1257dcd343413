"""Selects tasks by knowing the answer."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import topk
from jaxrft.select.base import Selector, ignore_feedback
from jaxrft.select.checks import (
    BELOW_ONE,
    BETWEEN,
    check,
    check_balance,
    check_batch,
    check_count,
    check_generations,
    check_pass_rates,
    check_table,
)
from jaxrft.select.uniform import VisitsState
from jaxrft.types import Array, Choice, InputError, Tasks

MANY_VISITS = 2.0**20  # more than a task has


def oracle(
    num_generations: int,
    *,
    target: ArrayLike = 0.5,
    tolerance: ArrayLike = 0.4,
    measured: int = 512,
    measure_every: int = 4,
    balance: topk.Balance = "none",
) -> Selector:
    """Chooses by `tasks.pass_rates`, which the caller measures by rollouts that nobody counts: what knowing is worth.

    The tasks within `tolerance` of `target`, those chosen least often first and ties at random, then the nearest; a
    task without a pass rate (NaN) comes last. Pass rates are wanted of `measured` tasks drawn at random, or of all when
    there are no more, every `measure_every` steps. `balance` of the batch between the domains: as `topk.quota`
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
        quota = topk.quota(key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        distance = jnp.abs(_measured(tasks, state.visits.shape[0]) - jnp.asarray(target, jnp.float32))
        near = distance <= jnp.asarray(tolerance, jnp.float32)
        score = jnp.where(near, state.visits.astype(jnp.float32), MANY_VISITS * (1 + distance))
        ids = topk.smallest(key_tie, score, batch_size=batch_size, quota=quota, exclude=exclude)
        visits = constrain(state.visits.at[ids].add(1), "task")
        return Choice(ids, _measured(tasks, state.visits.shape[0])[ids]), VisitsState(visits)

    def pass_rate(state: VisitsState, tasks: Tasks) -> Array:
        return _measured(tasks, state.visits.shape[0])

    def measure(key: Array, num_tasks: int) -> Array:
        return jax.random.permutation(key, num_tasks)[:measured].astype(jnp.int32)

    return Selector(init, select, ignore_feedback, pass_rate, measure=measure, measure_every=measure_every)


def _measured(tasks: Tasks, num_tasks: int) -> Array:
    """The policy's own pass rates [N]."""
    if tasks.pass_rates is None:
        raise InputError(
            "the oracle is given no pass rates: measure them and pass them in Tasks.pass_rates at every step"
        )
    check_pass_rates(tasks.pass_rates, num_tasks)
    return jnp.asarray(tasks.pass_rates, jnp.float32)
