"""Selects tasks by their true pass rates, which only a simulation or a measurement knows."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.select import topk
from jaxrft.select.base import Selector, ignore_feedback, select_smallest
from jaxrft.select.checks import (
    BELOW_ONE,
    BETWEEN,
    check,
    check_balance,
    check_generations,
    check_table,
)
from jaxrft.types import Array, Tasks

MANY_VISITS = 2.0**20  # more than a task has


class OracleState(NamedTuple):
    """How often each task has been chosen, and the policy's pass rates."""

    visits: Array  # [N] int32
    pass_rates: Array  # [N] float32; NaN where unknown


def oracle(
    num_generations: int,
    *,
    target: ArrayLike = 0.5,
    tolerance: ArrayLike = 0.4,
    balance: topk.Balance = "none",
) -> Selector[OracleState]:
    """Returns an upper bound for selectors: it chooses by the pass rates that `reveal` puts into
    its state.

    Tasks within `tolerance` of `target` come first. Among them, the least often chosen come first,
    and ties are broken at random. The other tasks follow in order of their distance to `target`.
    Tasks without a pass rate (NaN) come last. `balance` of the batch between the domains: as
    `topk.quota` says.
    """
    check_generations(num_generations)
    check("target", target, BETWEEN)
    check("tolerance", tolerance, BELOW_ONE)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> OracleState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        unknown = jnp.full(num_tasks, jnp.nan, jnp.float32)
        return OracleState(jnp.zeros(num_tasks, jnp.int32), unknown)

    def score(state: OracleState, quota: topk.Quota | None, exclude: Array | None) -> Array:
        distance = jnp.abs(state.pass_rates - jnp.asarray(target, jnp.float32))
        near = distance <= jnp.asarray(tolerance, jnp.float32)
        return jnp.where(near, state.visits.astype(jnp.float32), MANY_VISITS * (1 + distance))

    def pass_rate(state: OracleState, tasks: Tasks) -> Array:
        return state.pass_rates

    return Selector(init, select_smallest(score, pass_rate, balance), ignore_feedback, pass_rate)


def reveal(state: OracleState, pass_rates: Array) -> OracleState:
    """Puts a copy of the pass rates [N] of the current policy into the state; NaN where they are
    unknown.
    """
    return state._replace(pass_rates=jnp.array(pass_rates, jnp.float32))
