"""Selects tasks as BOTS does, by posteriors, interpolated evidence and Thompson draws [arXiv
2510.26374].
"""

from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from jaxrft.select import acquisition, evidence, posterior, topk
from jaxrft.select.base import Selector
from jaxrft.select.checks import (
    BELOW_ONE,
    SHARE,
    check,
    check_balance,
    check_belief,
    check_flag,
    check_generations,
    check_select,
    check_table,
    credible,
)
from jaxrft.types import Array, Choice, Feedback, Tasks


class BotsState(NamedTuple):
    """The posteriors of all tasks, and the state of the implicit evidence."""

    posterior: posterior.BetaState
    evidence: evidence.InterpolationState


def bots(
    num_generations: int,
    *,
    decay: ArrayLike = 0.1,
    rho: ArrayLike = 0.1,
    momentum: ArrayLike = 0.9,
    per_domain: bool = False,
    target: ArrayLike = 0.5,
    prior: posterior.Prior = (1.0, 1.0),
    balance: topk.Balance = "none",
) -> Selector:
    """Chooses tasks by Bayesian online task selection, as published [arXiv 2510.26374].

    Each task has a Beta posterior, updated by its own rollouts and by implicit evidence. The
    implicit evidence is interpolated between reference policies. Thompson sampling chooses from the
    posteriors.

    `decay` in [0, 1]: pull towards `prior` a step; `rho` in [0, 1]: weight of implicit against
    explicit evidence; `momentum` in [0, 1): smoothing of the capability; `target` in (0, 1): the
    pass rate whose neighbors are chosen; `prior`: pseudo-successes and pseudo-failures, scalars or
    [N]. Any of them may be a tracer (a sweep by `vmap`). `per_domain`: a capability for each of
    `tasks.domain`, which the paper has not; `balance` of the batch between them as `topk.quota`
    says. Every update is one step of `decay`, of implicit evidence and of `momentum`: a batch in
    two halves is two steps. The state keeps float64 references' dtype, else float32. Deviations:
    those of `posterior.update` and `evidence.interpolation`. `init` raises InputError for
    references that are missing or outside [0, 1].
    """
    num_generations = check_generations(num_generations)
    check("decay", decay, SHARE)
    check("rho", rho, SHARE)
    check("momentum", momentum, BELOW_ONE)
    check_belief(target, prior)
    check_balance(balance)
    per_domain = check_flag("per_domain", per_domain)
    implicit = evidence.interpolation(momentum, per_domain=per_domain)

    def init(tasks: Tasks, num_tasks: int) -> BotsState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        state = implicit.init(tasks, num_tasks)
        return BotsState(
            posterior.init(num_tasks, prior=prior, dtype=state.capability.dtype), state
        )

    def select(
        key: Array, state: BotsState, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, BotsState]:
        batch_size = check_select(
            key, state.posterior.alpha, tasks, batch_size=batch_size, exclude=exclude
        )
        key_quota, key_draw = jax.random.split(key)
        quota = topk.quota(
            key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude
        )
        ids = acquisition.thompson(
            key_draw,
            state.posterior,
            batch_size=batch_size,
            target=target,
            quota=quota,
            exclude=exclude,
        )
        return Choice(ids, posterior.mean(state.posterior)[ids]), state

    def update(state: BotsState, tasks: Tasks, feedback: Feedback) -> BotsState:
        feedback = credible(feedback, state.posterior.alpha.shape[0])
        seen = implicit.update(state.evidence, tasks, feedback)
        believed = posterior.update(
            state.posterior,
            feedback,
            implicit.predict(seen, tasks),
            decay=decay,
            rho=rho,
            num_generations=num_generations,
            prior=prior,
        )
        return BotsState(believed, seen)

    def pass_rate(state: BotsState, tasks: Tasks) -> Array:
        return posterior.mean(state.posterior)

    return Selector(init, select, update, pass_rate)
