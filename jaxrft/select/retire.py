"""Selects tasks uniformly, without those that the policy has mastered [arXiv 2510.13786]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquisition, topk
from jaxrft.select.base import Selector
from jaxrft.select.checks import (
    SHARE,
    Range,
    check,
    check_balance,
    check_generations,
    check_select,
    check_table,
    credible,
)
from jaxrft.types import Array, Choice, Feedback, Tasks

LARGEST = jnp.iinfo(jnp.int32).max
RETIRED = 2**24  # sorts retired tasks behind active ones, whose epochs are fewer


class RetireState(NamedTuple):
    """The last pass rate of every task, and its number of epochs."""

    last_pass_rate: Array  # [N] float32; NaN = never observed
    epochs: Array  # [N] int32, epochs in which the task was chosen, or was retired


def retire(
    num_generations: int,
    *,
    retire_above: ArrayLike = 0.9,
    review: ArrayLike = 0.02,
    balance: topk.Balance = "none",
) -> Selector:
    """Chooses every task equally often until its last pass rate shows mastery [arXiv 2510.13786].

    A task is retired while its last observed pass rate is at least `retire_above`, in (0, 1]. All
    others are active, those never observed among them. Active tasks are chosen in shuffled epochs,
    as by `uniform`: none comes twice before all have come once. A task that becomes active again
    joins the current epoch. A batch has `review` * batch_size slots for retired tasks, the
    fraction at random: 0.64 slots are one with chance 0.64, else none. Retired tasks fill up a
    batch for which too few are active. For both, those least chosen in this epoch come first. With
    a `balance` of the batch between the domains, as `topk.quota` says, each domain has epochs of
    its own, and its own retired tasks fill up its slots. The pass rate that is believed is the
    last one observed. Every feedback replaces it, also one of a part of a task's rollouts.
    Deviation: the paper never chooses a retired task again, which is `review` 0.
    """
    num_generations = check_generations(num_generations)
    check("retire_above", retire_above, Range(lambda x: (x > 0) & (x <= 1), "in (0, 1]"))
    check("review", review, SHARE)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> RetireState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        return RetireState(
            jnp.full(num_tasks, jnp.nan, jnp.float32), jnp.zeros(num_tasks, jnp.int32)
        )

    def select(
        key: Array,
        state: RetireState,
        tasks: Tasks,
        *,
        batch_size: int,
        exclude: Array | None = None,
    ) -> tuple[Choice, RetireState]:
        batch_size = check_select(key, state.epochs, tasks, batch_size=batch_size, exclude=exclude)
        key_quota, key_slots, key_review, key_tie = jax.random.split(key, 4)
        quota = topk.quota(
            key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude
        )
        # not where it is NaN
        retired = state.last_pass_rate >= jnp.asarray(retire_above, jnp.float32)
        epochs = _keep_pace(state.epochs, retired, quota, exclude)
        order = jnp.where(retired, RETIRED + epochs, epochs)
        reviewed = _reviewed(
            key_review,
            epochs,
            retired,
            acquisition.has_slot(key_slots, review, batch_size=batch_size),
            batch_size=batch_size,
            quota=quota,
            exclude=exclude,
        )
        order = order.at[reviewed].set(-1, mode="drop")
        ids = topk.smallest(key_tie, order, batch_size=batch_size, quota=quota, exclude=exclude)
        epochs = constrain(epochs.at[ids].add(1), "task")
        return Choice(ids, state.last_pass_rate[ids]), state._replace(epochs=epochs)

    def update(state: RetireState, tasks: Tasks, feedback: Feedback) -> RetireState:
        num_tasks = state.last_pass_rate.shape[0]
        feedback = credible(feedback, num_tasks)
        seen = feedback.trials > 0
        observed = (feedback.successes / jnp.where(seen, feedback.trials, 1)).astype(jnp.float32)
        # padding points behind the table and is dropped
        ids = jnp.where(seen, feedback.ids, num_tasks)
        last = state.last_pass_rate.at[ids].set(observed, mode="drop")
        return state._replace(last_pass_rate=constrain(last, "task"))

    def pass_rate(state: RetireState, tasks: Tasks) -> Array:
        return state.last_pass_rate

    return Selector(init, select, update, pass_rate)


def _keep_pace(
    epochs: Array, retired: Array, quota: topk.Quota | None, exclude: Array | None
) -> Array:
    """Returns the epochs [N], of `retired` tasks at least those of the active task that is furthest
    behind.

    Else a task that becomes active again would be chosen in every batch until it had caught up.
    """
    not_counted = retired if exclude is None else retired | exclude
    least = acquisition.least_visits(epochs, quota=quota, exclude=not_counted)
    least = jnp.where(least == LARGEST, 0, least)  # no task is active
    return jnp.where(retired, jnp.maximum(epochs, least), epochs)


def _reviewed(
    key: Array,
    epochs: Array,
    retired: Array,
    has_slot: Array,
    *,
    batch_size: int,
    quota: topk.Quota | None,
    exclude: Array | None,
) -> Array:
    """Draws the ids [B] of retired tasks for the slots of the mask `has_slot` [B].

    Those least chosen come first. A slot without a retired task, or not in the mask, has the id N.
    """
    order = jnp.where(retired, epochs, LARGEST)
    ids = topk.smallest(key, order, batch_size=batch_size, quota=quota, exclude=exclude)
    eligible = retired if exclude is None else retired & ~exclude
    return jnp.where(has_slot & eligible[ids], ids, epochs.shape[0])
