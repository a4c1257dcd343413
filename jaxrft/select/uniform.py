"""Selects every task as often as any other."""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp

from jaxrft.select import acquisition, topk
from jaxrft.select.base import Selector, ignore_feedback, no_pass_rate, select_smallest
from jaxrft.select.checks import check_balance, check_choice, check_generations, check_table
from jaxrft.types import Array, Tasks

Order = Literal["shuffled", "replacement", "sequential"]


class VisitsState(NamedTuple):
    """How often each task has been chosen."""

    visits: Array  # [N] int32


def uniform(
    num_generations: int, *, order: Order = "shuffled", balance: topk.Balance = "none"
) -> Selector:
    """Chooses every task equally often.

    `shuffled` goes through the table in epochs, each in a random order; `sequential` in the order
    of the table; `replacement` draws every batch afresh. In epochs no task comes twice before all
    have come once, and a batch is distinct even where one epoch ends and the next begins. With a
    `balance` of the batch between the domains, as `topk.quota` says, each domain has epochs of its
    own.
    """
    num_generations = check_generations(num_generations)
    check_choice("order", order, get_args(Order), " of the uniform selector")
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> VisitsState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        return VisitsState(jnp.zeros(num_tasks, jnp.int32))

    # [N] int32
    def score(state: VisitsState, quota: topk.Quota | None, exclude: Array | None) -> Array:
        if order == "replacement":
            return jnp.zeros_like(state.visits)
        seen = acquisition.epoch(state.visits, quota=quota, exclude=exclude)
        if order == "shuffled":
            return seen
        num_tasks = state.visits.shape[0]
        return seen * num_tasks + jnp.arange(num_tasks, dtype=jnp.int32)

    return Selector(
        init, select_smallest(score, no_pass_rate, balance), ignore_feedback, no_pass_rate
    )
