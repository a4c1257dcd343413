"""Selectors: what a training loop calls to learn which tasks come next.

A new one is a factory that returns a `Selector`, and a row in `SELECTORS`, which are those that a configuration can
name.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

from jaxrft.errors import shown
from jaxrft.select import acquire, evidence, posterior
from jaxrft.select.adaptive import adaptive as adaptive
from jaxrft.select.base import Selector as Selector
from jaxrft.select.baselines import easy_to_hard as easy_to_hard
from jaxrft.select.baselines import oracle as oracle
from jaxrft.select.baselines import uniform as uniform
from jaxrft.select.checks import (
    BELOW_ONE,
    SHARE,
    check,
    check_balance,
    check_batch,
    check_belief,
    check_flag,
    check_generations,
    check_table,
    credible,
)
from jaxrft.select.dots.attention import Params
from jaxrft.select.dots.selector import dots as dots
from jaxrft.select.peers import greso as greso
from jaxrft.select.peers import mopps as mopps
from jaxrft.types import Array, Choice, Feedback, InputError, Tasks


class BotsState(NamedTuple):
    """What BOTS believes of every task, and of the policy."""

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
    balance: acquire.Balance = "none",
) -> Selector:
    """Bayesian online task selection as published [arXiv 2510.26374]: posteriors, interpolated evidence, Thompson.

    `decay` in [0, 1]: pull towards `prior` a step; `rho` in [0, 1]: weight of implicit against explicit evidence;
    `momentum` in [0, 1): smoothing of the capability; `target` in (0, 1): the pass rate whose neighbours are chosen;
    `prior`: pseudo-successes and pseudo-failures, scalars or [N]. Any of them may be a tracer (a sweep by `vmap`).
    `per_domain`: a capability for each of `tasks.domain`, which the paper has not; `balance` of the batch between them
    as `acquire.quota` says.
    The state keeps float64 references' dtype, else float32. Deviations: those of `posterior.update` and
    `evidence.interpolation`.
    `init` raises InputError for references that are missing or outside [0, 1].
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
        return BotsState(posterior.init(num_tasks, prior=prior, dtype=state.capability.dtype), state)

    def select(
        key: Array, state: BotsState, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, BotsState]:
        batch_size = check_batch(batch_size, state.posterior.alpha, exclude)
        key_quota, key_draw = jax.random.split(key)
        quota = acquire.quota(key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        ids = acquire.thompson(
            key_draw, state.posterior, batch_size=batch_size, target=target, quota=quota, exclude=exclude
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


SELECTORS: dict[str, Callable[..., Selector]] = {
    "uniform": uniform,
    "easy_to_hard": easy_to_hard,
    "mopps": mopps,
    "greso": greso,
    "bots": bots,
    "dots": dots,
    "adaptive": adaptive,
    "oracle": oracle,
}
USE_EMBEDDINGS = ("adaptive", "dots")


def make(name: str, num_generations: int, **hyper_parameters: Any) -> Selector:
    """The selector called `name`, given those of `hyper_parameters` that are its own and not another selector's.

    Raises InputError for an unknown selector, or a hyper-parameter of none, and for `dots` without a predictor.
    """
    if not isinstance(name, str) or name not in SELECTORS:
        near = _nearest(str(name)[:80], SELECTORS) if isinstance(name, str) else "uniform"
        raise InputError(f"no selector {shown(name)}: did you mean {near}? ({', '.join(SELECTORS)})")
    known = set().union(*map(fields, SELECTORS))
    for unknown in hyper_parameters.keys() - known:
        raise InputError(f"no selector has a field {shown(unknown)}: did you mean {_nearest(unknown, known)}?")
    if name == "dots" and not isinstance(hyper_parameters.get("predictor"), Params):
        raise InputError(
            "the selector dots needs `predictor`, the parameters of a similarity predictor such as jaxrft prepare "
            "predictor trains: give them, or choose another selector"
        )
    own = {field: value for field, value in hyper_parameters.items() if field in fields(name)}
    return SELECTORS[name](num_generations, **own)


def fields(name: str) -> set[str]:
    """The hyper-parameters of the selector called `name`, its factory's keyword-only arguments."""
    return {p.name for p in inspect.signature(SELECTORS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _nearest(name: str, names: Any) -> str:
    """The one of `names` spelt most like `name`."""
    return difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.0)[0]
