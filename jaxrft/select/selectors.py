"""Selectors: what a training loop calls to learn which tasks come next.

A new one is a factory that returns a `Selector`, and a row in `SELECTORS`.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquire, evidence, posterior
from jaxrft.types import Array, Choice, Feedback, InputError, Tasks


class Selector(NamedTuple):
    """Pure functions; their state is a pytree of NamedTuples, a fixed point of `update` in shape and dtype."""

    init: Callable[[Tasks, int], Any]  # (tasks, N) -> state
    select: Callable[[Array, Any, Tasks], tuple[Choice, Any]]  # (key, state, tasks)
    update: Callable[[Any, Tasks, Feedback], Any]  # -> state
    pass_rate: Callable[[Any, Tasks], Array]  # [N], what is believed of every task; NaN where nothing is
    probe: Callable[[Array, Any, Tasks], Array] | None = None  # ids [K] to roll out only in order to know, every
    probe_every: int = 0  # so many steps; their feedback goes through the same update


class UniformState(NamedTuple):
    """How often each task has been chosen."""

    visits: Array  # [N] int32


class BotsState(NamedTuple):
    """What BOTS believes of every task, and of the policy."""

    posterior: posterior.BetaState
    evidence: evidence.InterpolationState


Order = Literal["shuffled", "replacement", "sequential"]


def uniform(batch_size: int, num_generations: int, *, order: Order = "shuffled") -> Selector:
    """Every task as often as any other.

    `shuffled` goes through the table in epochs, each in a random order; `sequential` in the order of the table;
    `replacement` draws every batch afresh. In epochs no task comes twice before all have come once, and a batch is
    distinct even where one epoch ends and the next begins.
    """
    _check_sizes(batch_size, num_generations)
    if order not in get_args(Order):
        raise InputError(f"no order {order!r} of the uniform selector: choose one of {', '.join(get_args(Order))}")

    def init(tasks: Tasks, num_tasks: int) -> UniformState:
        _check_table(batch_size, num_tasks)
        return UniformState(jnp.zeros(num_tasks, jnp.int32))

    def score(visits: Array) -> Array:  # [N] int32, the smallest are chosen and ties broken at random
        if order == "replacement":
            return jnp.zeros_like(visits)
        seen = (visits > visits.min()).astype(jnp.int32)  # in this epoch
        if order == "shuffled":
            return seen
        num_tasks = visits.shape[0]
        return seen * num_tasks + jnp.arange(num_tasks, dtype=jnp.int32)

    def select(key: Array, state: UniformState, tasks: Tasks) -> tuple[Choice, UniformState]:
        ids = acquire.smallest(key, score(state.visits), batch_size=batch_size)
        visits = constrain(state.visits.at[ids].add(1), "task")
        return Choice(ids, jnp.full(batch_size, jnp.nan, jnp.float32)), UniformState(visits)

    def update(state: UniformState, tasks: Tasks, feedback: Feedback) -> UniformState:
        return state

    def pass_rate(state: UniformState, tasks: Tasks) -> Array:
        return jnp.full(state.visits.shape, jnp.nan, jnp.float32)

    return Selector(init, select, update, pass_rate)


def bots(
    batch_size: int,
    num_generations: int,
    *,
    decay: ArrayLike = 0.1,
    rho: ArrayLike = 0.1,
    momentum: ArrayLike = 0.9,
    target: ArrayLike = 0.5,
    prior: posterior.Prior = (1.0, 1.0),
) -> Selector:
    """Bayesian online task selection as published [arXiv 2510.26374]: posteriors, interpolated evidence, Thompson.

    `decay` in [0, 1]: pull towards `prior` a step; `rho` in [0, 1]: weight of implicit against explicit evidence;
    `momentum` in [0, 1): smoothing of the capability; `target` in (0, 1): the pass rate whose neighbours are chosen;
    `prior`: pseudo-successes and pseudo-failures, scalars or [N]. Any of them may be a tracer (a sweep by `vmap`).
    The state keeps float64 references' dtype, else float32. Deviations: those of `posterior.update` and
    `evidence.interpolation`.
    `init` raises InputError for references that are missing or outside [0, 1] and for a table smaller than a batch.
    """
    _check_sizes(batch_size, num_generations)
    _check("decay", decay, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
    _check("rho", rho, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
    _check("momentum", momentum, lambda x: (x >= 0) & (x < 1), "in [0, 1)")
    _check("target", target, lambda x: (x > 0) & (x < 1), "in (0, 1)")
    for count in prior:
        _check("prior", count, lambda x: (x > 0) & (x < np.inf), "two positive numbers")
    implicit = evidence.interpolation(momentum)

    def init(tasks: Tasks, num_tasks: int) -> BotsState:
        _check_table(batch_size, num_tasks)
        state = implicit.init(tasks, num_tasks)
        return BotsState(posterior.init(num_tasks, prior=prior, dtype=state.capability.dtype), state)

    def select(key: Array, state: BotsState, tasks: Tasks) -> tuple[Choice, BotsState]:
        ids = acquire.thompson(key, state.posterior, batch_size=batch_size, target=target)
        return Choice(ids, posterior.mean(state.posterior)[ids]), state

    def update(state: BotsState, tasks: Tasks, feedback: Feedback) -> BotsState:
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


SELECTORS: dict[str, Callable[..., Selector]] = {"uniform": uniform, "bots": bots}


def make(name: str, batch_size: int, num_generations: int, **hyper_parameters: Any) -> Selector:
    """The selector called `name`, given those of `hyper_parameters` that are its own and not another selector's.

    Raises InputError for an unknown selector, or a hyper-parameter of none.
    """
    if name not in SELECTORS:
        raise InputError(f"no selector {name!r}: did you mean {_nearest(name, SELECTORS)}? ({', '.join(SELECTORS)})")
    fields = {each: _fields(factory) for each, factory in SELECTORS.items()}
    known = set().union(*fields.values())
    for unknown in hyper_parameters.keys() - known:
        raise InputError(f"no selector has a field {unknown!r}: did you mean {_nearest(unknown, known)}?")
    own = {field: value for field, value in hyper_parameters.items() if field in fields[name]}
    return SELECTORS[name](batch_size, num_generations, **own)


def _fields(factory: Callable[..., Selector]) -> set[str]:
    """Names of the factory's hyper-parameters, its keyword-only arguments."""
    return {p.name for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _nearest(name: str, names: Any) -> str:
    """The one of `names` spelt most like `name`."""
    return difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.0)[0]


def _check(name: str, value: ArrayLike, fits: Callable[[np.ndarray], Any], wanted: str) -> None:
    """Raises InputError unless all of `value` `fits`; a tracer has no value to check."""
    if not isinstance(value, Tracer) and not np.all(fits(np.asarray(value))):
        raise InputError(f"{name} is {value}: it must be {wanted}")


def _check_sizes(batch_size: int, num_generations: int) -> None:
    """Raises InputError unless both are at least 1."""
    _check("batch_size", batch_size, lambda x: x >= 1, "at least 1")
    _check("num_generations", num_generations, lambda x: x >= 1, "at least 1")


def _check_table(batch_size: int, num_tasks: int) -> None:
    """Raises InputError for a table smaller than a batch, whose ids could not be distinct."""
    if num_tasks < batch_size:
        raise InputError(f"batch_size is {batch_size} but there are {num_tasks} tasks: give more tasks, or lower it")
