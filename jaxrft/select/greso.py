"""Selects tasks as GRESO does, which skips zero-variance tasks [arXiv 2506.02177]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquisition, topk
from jaxrft.select.base import Selector, no_belief
from jaxrft.select.checks import (
    BELOW_ONE,
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


class GresoState(NamedTuple):
    """Counters of every task, and the base chances of exploration."""

    passes: Array  # [N] int32, epochs in which the task was rolled out or skipped
    streak: Array  # [N] int32, latest visits in a row that were all right; negative: all wrong
    explore: Array  # [2], base chance of rolling out tasks all right, tasks all wrong


def greso(
    num_generations: int,
    *,
    explore: ArrayLike = 0.5,
    explore_step: ArrayLike = 0.01,
    zero_variance: ArrayLike = 0.25,
    balance: topk.Balance = "none",
) -> Selector:
    """Skips tasks whose last visits had zero variance [arXiv 2506.02177].

    In shuffled epochs, a task whose last z visits were all right (or all wrong) is rolled out with
    chance explore_easy^z (explore_hard^z), else skipped until the next epoch. Both bases begin at
    `explore` and move by `explore_step` a step, down when the share of such groups in the batch is
    above its target and up otherwise; the targets are 1/3 and 2/3 of `zero_variance`, the target
    fraction of zero-variance groups. With a `balance` of the batch between the domains,
    as `topk.quota` says, each domain has epochs of its own. Every update moves both bases: a batch
    in two halves is two steps. Deviations: the bases stay in [0.05, 0.95]; a batch is filled up
    with skipped tasks if no others are left; the batch has a constant size, and zero-variance
    groups are not resampled.
    """
    num_generations = check_generations(num_generations)
    check("explore", explore, Range(lambda x: (x >= 0.05) & (x <= 0.95), "in [0.05, 0.95]"))
    check("explore_step", explore_step, BELOW_ONE)
    check("zero_variance", zero_variance, SHARE)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> GresoState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        zeros = jnp.zeros(num_tasks, jnp.int32)
        return GresoState(zeros, jnp.array(zeros), jnp.full(2, explore, jnp.float32))

    def select(
        key: Array,
        state: GresoState,
        tasks: Tasks,
        *,
        batch_size: int,
        exclude: Array | None = None,
    ) -> tuple[Choice, GresoState]:
        batch_size = check_select(key, state.streak, tasks, batch_size=batch_size, exclude=exclude)
        key_quota, key_order, key_skip, key_tie = jax.random.split(key, 4)
        quota = topk.quota(
            key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude
        )
        shape = state.streak.shape
        base = jnp.where(state.streak < 0, state.explore[1], state.explore[0])
        chance = base ** jnp.abs(state.streak).astype(jnp.float32)
        explored = jax.random.uniform(key_skip, shape) < chance
        seen = acquisition.epoch(state.passes, quota=quota, exclude=exclude).astype(jnp.float32)
        # the rest of this epoch, then the next one
        order = seen + jax.random.uniform(key_order, shape)
        score = jnp.where(explored, order, order + 2)
        ids = topk.smallest(key_tie, score, batch_size=batch_size, quota=quota, exclude=exclude)
        passed = _passed(order, score, ids, quota=quota, exclude=exclude)
        passes = constrain(state.passes + passed.astype(jnp.int32), "task")
        return Choice(ids, no_belief(ids)), state._replace(passes=passes)

    def update(state: GresoState, tasks: Tasks, feedback: Feedback) -> GresoState:
        feedback = credible(feedback, state.streak.shape[0])
        seen = feedback.trials > 0
        easy = seen & (feedback.successes >= feedback.trials)
        hard = seen & (feedback.successes <= 0)
        old = state.streak[jnp.where(seen, feedback.ids, 0)]
        new = jnp.where(easy, jnp.maximum(old, 0) + 1, jnp.where(hard, jnp.minimum(old, 0) - 1, 0))
        # padding points behind the table and is dropped
        ids = jnp.where(seen, feedback.ids, state.streak.shape[0])
        share = jnp.stack([easy.sum(), hard.sum()]) / jnp.maximum(seen.sum(), 1)  # [2]
        targets = jnp.asarray(zero_variance, jnp.float32) * jnp.array([1 / 3, 2 / 3])
        step = jnp.where(seen.any(), jnp.asarray(explore_step, jnp.float32), 0.0)
        explore = jnp.clip(state.explore + jnp.where(share > targets, -step, step), 0.05, 0.95)
        streak = constrain(state.streak.at[ids].set(new, mode="drop"), "task")
        return state._replace(streak=streak, explore=explore)

    def pass_rate(state: GresoState, tasks: Tasks) -> Array:
        return no_belief(state.streak)

    return Selector(init, select, update, pass_rate)


def _passed(
    order: Array, score: Array, ids: Array, *, quota: topk.Quota | None, exclude: Array | None
) -> Array:
    """Marks the tasks [N] that are chosen, `ids` [B], or skipped on the way to the last chosen one.

    `order` [N] is the way through the epoch, `score` [N] that of the choice.
    """
    reached = score if exclude is None else jnp.where(exclude, -jnp.inf, score)
    last = reached[ids].max()
    if quota is not None:
        last = -acquisition.least_by_domain(quota, -reached[ids], ids)
    passed = order <= last
    return passed if exclude is None else (passed & ~exclude).at[ids].set(True)
