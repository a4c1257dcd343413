"""Selects tasks as MoPPS does, from posteriors of the tasks rolled out alone [arXiv 2507.04632]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.select import acquisition, posterior, topk
from jaxrft.select.base import Selector
from jaxrft.select.checks import (
    SHARE,
    check,
    check_balance,
    check_belief,
    check_count,
    check_generations,
    check_select,
    check_table,
    credible,
)
from jaxrft.types import Array, Choice, Feedback, Tasks


class MoppsState(NamedTuple):
    """The posteriors of all tasks."""

    posterior: posterior.BetaState


def mopps(
    num_generations: int,
    *,
    discount: ArrayLike = 0.5,
    candidates: int = 8,
    target: ArrayLike = 0.5,
    prior: posterior.Prior = (1.0, 1.0),
    balance: topk.Balance = "none",
) -> Selector:
    """Chooses tasks by model predictive prompt selection [arXiv 2507.04632].

    Each task has a Beta posterior of its own rollouts. Thompson sampling chooses among candidates.

    alpha <- discount alpha + (1 - discount) alpha0 + s, and beta with the failures, for the tasks
    rolled out; others stay as they are. A step draws `candidates` * batch_size tasks uniformly
    (all, if there are fewer), and of these takes the ones whose draw from the posterior is nearest
    `target`. `discount` in [0, 1]: share of the evidence that survives a visit. `balance` between
    the domains, of the candidates and of the batch: as `topk.quota` says. Deviation: candidates are
    drawn anew every step, where the paper takes them in epochs.
    """
    num_generations = check_generations(num_generations)
    check("discount", discount, SHARE)
    candidates = check_count("candidates", candidates)
    check_belief(target, prior)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> MoppsState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        return MoppsState(posterior.init(num_tasks, prior=prior))

    def select(
        key: Array,
        state: MoppsState,
        tasks: Tasks,
        *,
        batch_size: int,
        exclude: Array | None = None,
    ) -> tuple[Choice, MoppsState]:
        batch_size = check_select(
            key, state.posterior.alpha, tasks, batch_size=batch_size, exclude=exclude
        )
        key_first, key_candidates, key_quota, key_draw, key_tie = jax.random.split(key, 5)
        num_tasks = state.posterior.alpha.shape[0]
        count = min(candidates * batch_size, num_tasks)
        pool_quota = topk.quota(
            key_first, tasks, batch_size=count, balance=balance, exclude=exclude
        )
        equal = jnp.zeros(num_tasks)
        pool = topk.smallest(
            key_candidates, equal, batch_size=count, quota=pool_quota, exclude=exclude
        )
        draws = posterior.sample(key_draw, jax.tree.map(lambda x: x[pool], state.posterior))
        quota = topk.quota(
            key_quota, tasks, batch_size=batch_size, balance=balance, among=pool, exclude=exclude
        )
        excluded = None if exclude is None else exclude[pool]
        best = acquisition.nearest(
            key_tie, draws, batch_size=batch_size, target=target, quota=quota, exclude=excluded
        )
        ids = pool[best]
        return Choice(ids, posterior.mean(state.posterior)[ids]), state

    def update(state: MoppsState, tasks: Tasks, feedback: Feedback) -> MoppsState:
        feedback = credible(feedback, state.posterior.alpha.shape[0])
        return MoppsState(
            posterior.update_visited(state.posterior, feedback, discount=discount, prior=prior)
        )

    def pass_rate(state: MoppsState, tasks: Tasks) -> Array:
        return posterior.mean(state.posterior)

    return Selector(init, select, update, pass_rate)
