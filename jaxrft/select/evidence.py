"""Implicit evidence: what the rollouts of some tasks say about the pass rates of all the others."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxrft.mesh import constrain
from jaxrft.types import Array, Feedback, InputError, Tasks

EPSILON = 1e-6  # of the published estimator; it bounds the capability when two references agree on the batch


class Evidence(NamedTuple):
    """Pure functions of a model of evidence; the state is updated before it predicts."""

    init: Callable[[Tasks, int], Any]  # (tasks, N) -> state
    update: Callable[[Any, Tasks, Feedback], Any]  # -> state
    predict: Callable[[Any, Tasks], Array]  # [N], pass rates; NaN = no evidence


class NoEvidenceState(NamedTuple):
    """What is known of every task by implicit evidence: nothing."""

    pass_rate: Array  # [N], NaN


class InterpolationState(NamedTuple):
    """Where the current policy stands among the reference policies."""

    capability: Array  # [], 0 = the weakest reference, K - 1 = the strongest; NaN before the first feedback


def none() -> Evidence:
    """No implicit evidence: explicit counts only."""
    return Evidence(
        init=lambda tasks, num_tasks: NoEvidenceState(jnp.full(num_tasks, jnp.nan, jnp.float32)),
        update=lambda state, tasks, feedback: state,
        predict=lambda state, tasks: state.pass_rate,
    )


def interpolation(momentum: ArrayLike = 0.9) -> Evidence:
    """Pass rates interpolated between reference policies at the capability seen on the batch [arXiv 2510.26374].

    c_t = (mean_B(s/n) - mean_B(p_w)) / (mean_B(p_S) - mean_B(p_w) + 1e-6),   c <- momentum c + (1 - momentum) c_t,
    p~ = clip(p_w + c (p_S - p_w), 0, 1); the first c_t is taken unsmoothed.

    `tasks.reference_pass_rates` is [N, K], weakest policy first. Deviations: with K > 2 the line is piecewise, bent at
    every reference, and c counts along them from 0 to K - 1; a task with a NaN among its references gets no evidence
    (NaN) and is left out of the means. A batch without any usable task leaves c as it is.
    `init` raises InputError for references that are missing, of another shape, or outside [0, 1].
    """

    def init(tasks: Tasks, num_tasks: int) -> InterpolationState:
        check_references(tasks, num_tasks)
        dtype = jnp.asarray(tasks.reference_pass_rates).dtype
        return InterpolationState(jnp.full((), jnp.nan, dtype if dtype == jnp.float64 else jnp.float32))

    def update(state: InterpolationState, tasks: Tasks, feedback: Feedback) -> InterpolationState:
        dtype = state.capability.dtype
        references = _references(tasks, dtype)[feedback.ids]  # [B, K]
        used = (feedback.trials > 0) & ~jnp.isnan(references).any(axis=1)  # [B]
        count = used.sum()

        def mean(x: Array) -> Array:  # [B] -> []
            return jnp.where(used, x, 0).sum() / jnp.maximum(count, 1).astype(dtype)

        successes, trials = (x.astype(dtype) for x in (feedback.successes, feedback.trials))
        observed = mean(successes / jnp.where(used, trials, 1))
        new = _capability(observed, jax.vmap(mean, in_axes=1)(references))
        kept = jnp.asarray(momentum, dtype)
        smoothed = jnp.where(jnp.isnan(state.capability), new, kept * state.capability + (1 - kept) * new)
        return InterpolationState(jnp.where(count > 0, smoothed, state.capability))

    def predict(state: InterpolationState, tasks: Tasks) -> Array:
        capability = state.capability
        references = _references(tasks, capability.dtype)
        bends = jnp.arange(1, references.shape[1] - 1, dtype=capability.dtype)  # [K - 2]
        segment = (capability >= bends).sum()
        weak, strong = (jnp.take(references, segment + i, axis=1) for i in (0, 1))
        pass_rate = jnp.clip(weak + (capability - segment.astype(capability.dtype)) * (strong - weak), 0, 1)
        return constrain(jnp.where(jnp.isnan(references).any(axis=1), jnp.nan, pass_rate), "task")

    return Evidence(init, update, predict)


def _capability(observed: Array, references: Array) -> Array:
    """Where `observed` [] lies along the batch means `references` [K]; beyond the ends the end segments go on."""
    segment = jnp.cumprod((references[1:-1] <= observed).astype(jnp.int32)).sum()  # the first that reaches it
    weak, strong = references[segment], references[segment + 1]
    return segment.astype(observed.dtype) + (observed - weak) / (strong - weak + EPSILON)


def _references(tasks: Tasks, dtype: DTypeLike) -> Array:
    """The reference pass rates [N, K] in `dtype`."""
    if tasks.reference_pass_rates is None:
        raise InputError(_NO_REFERENCES)
    return constrain(jnp.asarray(tasks.reference_pass_rates, dtype), "task", None)


_NO_REFERENCES = (
    "no task has the pass rates of reference policies that this selector needs: "
    "name their columns in tasks.pass_rate_columns, or choose select.name uniform"
)


def check_references(tasks: Tasks, num_tasks: int, *, least: int = 2) -> None:
    """Raises InputError unless reference pass rates are [N, K >= `least`] in [0, 1] or NaN; values of tracers pass."""
    rates = tasks.reference_pass_rates
    if rates is None:
        raise InputError(_NO_REFERENCES)
    if rates.ndim != 2 or rates.shape[0] != num_tasks or rates.shape[1] < least:
        raise InputError(
            f"reference pass rates have shape {rates.shape}: they must be [{num_tasks}, K], a row a task and "
            f"a column for each of at least {least} reference policies, weakest first (tasks.pass_rate_columns)"
        )
    if isinstance(rates, Tracer):
        return
    with jax.ensure_compile_time_eval():  # on the device: a process may hold a part of the table only
        wrong = (rates < 0) | (rates > 1)
        if wrong.any():
            row, column = divmod(int(jnp.argmax(wrong)), rates.shape[1])
            value = float(rates[row, column])
            raise InputError(
                f"reference pass rate of task {row}, column {column} is {value:g}: "
                "it must lie in [0, 1], or be NaN where it is unknown"
            )
        if jnp.isnan(rates).any(axis=1).all():
            raise InputError(_NO_REFERENCES)
