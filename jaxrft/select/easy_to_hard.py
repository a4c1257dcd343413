"""Selects tasks by a fixed curriculum, from easy to hard."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.select import acquisition, evidence, topk
from jaxrft.select.base import Selector, ignore_feedback, no_pass_rate, select_smallest
from jaxrft.select.checks import (
    check_balance,
    check_generations,
    check_table,
)
from jaxrft.types import Array, Tasks


class EasyToHardState(NamedTuple):
    """How often each task has been chosen, and where it stands from easy to hard."""

    visits: Array  # [N] int32
    rank: Array  # [N] int32, 0 = the easiest


def easy_to_hard(num_generations: int, *, balance: topk.Balance = "none") -> Selector:
    """Chooses tasks by a fixed curriculum, in epochs from the easiest task to the hardest.

    The easiest task has the highest mean reference pass rate. Tasks without any known reference
    pass rate come last. Ties are in the order of the table. With a `balance` of the batch between
    the domains, as `topk.quota` says, each domain has epochs of its own.
    `init` raises InputError for references that are missing or outside [0, 1].
    """
    num_generations = check_generations(num_generations)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> EasyToHardState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        evidence.check_references(tasks, num_tasks, least=1)
        # NaN sorts last
        mean = jnp.nanmean(jnp.asarray(tasks.reference_pass_rates, jnp.float32), axis=1)
        row = jnp.arange(num_tasks, dtype=jnp.int32)
        order = jax.lax.sort((-mean, row), num_keys=2)[1]
        return EasyToHardState(
            jnp.zeros(num_tasks, jnp.int32), jnp.zeros(num_tasks, jnp.int32).at[order].set(row)
        )

    def score(state: EasyToHardState, quota: topk.Quota | None, exclude: Array | None) -> Array:
        return (
            acquisition.epoch(state.visits, quota=quota, exclude=exclude) * state.rank.shape[0]
            + state.rank
        )

    return Selector(
        init, select_smallest(score, no_pass_rate, balance), ignore_feedback, no_pass_rate
    )
