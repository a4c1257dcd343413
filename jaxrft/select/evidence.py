"""Implicit evidence: estimates of the pass rates of all tasks from the rollouts of some."""

from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxrft.mesh import constrain
from jaxrft.select import checks
from jaxrft.select.base import Init, PassRate, State, Update
from jaxrft.select.checks import count_domains
from jaxrft.shapes import check_shapes
from jaxrft.types import Array, Feedback, InputError, Tasks

# of the published estimator; it bounds the capability when two references agree on the batch
EPSILON = 1e-6
SHRINKAGE = 1.0  # pseudo-tasks with the common capability in each domain of a batch


class Evidence(NamedTuple, Generic[State]):
    """Pure functions of a model of evidence; the state is updated before it predicts."""

    init: Init[State]
    update: Update[State]
    predict: PassRate[State]  # [N]; NaN = no evidence


class NoEvidenceState(NamedTuple):
    """Pass rates of NaN, since there is no implicit evidence."""

    pass_rate: Array  # [N], NaN


class InterpolationState(NamedTuple):
    """The capability of the current policy relative to the reference policies."""

    # [], 0 = the weakest reference, K - 1 = the strongest; NaN before the first feedback
    capability: Array
    # [domains], of each; NaN before the first feedback on one of its tasks
    domains: Array | None = None


def none() -> Evidence[NoEvidenceState]:
    """Makes a model without implicit evidence, so that explicit counts alone matter."""
    return Evidence(
        init=lambda tasks, num_tasks: NoEvidenceState(jnp.full(num_tasks, jnp.nan, jnp.float32)),
        update=lambda state, tasks, feedback: state,
        predict=lambda state, tasks: state.pass_rate,
    )


def interpolation(
    momentum: ArrayLike = 0.9, *, per_domain: bool = False
) -> Evidence[InterpolationState]:
    """Interpolates pass rates between reference policies at a capability [arXiv 2510.26374].

    The capability c is estimated from each batch and smoothed. The first c_t is taken unsmoothed.

    c_t = (mean_B(s/n) - mean_B(p_w)) / (mean_B(p_S) - mean_B(p_w) + 1e-6),   c <- momentum c + (1 -
    momentum) c_t, p~ = clip(p_w + c (p_S - p_w), 0, 1)

    `tasks.reference_pass_rates` is [N, K], weakest policy first. Deviations: with K > 2 the line is
    piecewise, bent at every reference, and c counts along them from 0 to K - 1; a task with a NaN
    among its references gets no evidence (NaN) and is left out of the means. A batch without any
    usable task leaves c as it is.

    `per_domain`: each of `tasks.domain` has a c of its own, by the means over its tasks in the
    batch and `SHRINKAGE` tasks more that are like the whole batch: the fewer its tasks, the nearer
    to the common c. A domain keeps its own when a batch has none of it, and follows the common one
    until a first batch has. With one domain nothing changes. `init` raises InputError for
    references that are missing, of another shape, or outside [0, 1], and, `per_domain`, for domains
    that are missing or negative.
    """

    def init(tasks: Tasks, num_tasks: int) -> InterpolationState:
        check_references(tasks, num_tasks)
        dtype = jnp.asarray(tasks.reference_pass_rates).dtype
        dtype = dtype if dtype == jnp.float64 else jnp.float32
        domains = jnp.full(count_domains(tasks, num_tasks), jnp.nan, dtype) if per_domain else None
        return InterpolationState(jnp.full((), jnp.nan, dtype), domains)

    def smoothed(old: Array, new: Array) -> Array:
        weight = jnp.asarray(momentum, old.dtype)
        return jnp.where(jnp.isnan(old), new, weight * old + (1 - weight) * new)

    def update(state: InterpolationState, tasks: Tasks, feedback: Feedback) -> InterpolationState:
        dtype = state.capability.dtype
        feedback = checks.check_feedback(feedback)
        references = _references(tasks, dtype)[feedback.ids]  # [B, K]
        used = (feedback.trials > 0) & ~jnp.isnan(references).any(axis=1)  # [B]
        successes, trials = (x.astype(dtype) for x in (feedback.successes, feedback.trials))
        rates = jnp.concatenate(
            [(successes / jnp.where(used, trials, 1))[:, None], references], axis=1
        )
        rates = jnp.where(used[:, None], rates, 0)  # [B, 1 + K], observed ones first
        count = used.sum().astype(dtype)
        mean = rates.sum(axis=0) / jnp.maximum(count, 1)
        common = jnp.where(
            count > 0, smoothed(state.capability, _capability(mean)), state.capability
        )
        if state.domains is None:
            return InterpolationState(common)

        assert tasks.domain is not None
        domain = tasks.domain[feedback.ids]
        counts = jnp.zeros_like(state.domains).at[domain].add(used.astype(dtype))
        sums = (
            jnp.zeros((*counts.shape, len(mean)), dtype).at[domain].add(rates)
            + SHRINKAGE * mean[None]
        )
        capabilities = jax.vmap(_capability)(sums / (counts + SHRINKAGE)[:, None])
        domains = jnp.where(counts > 0, smoothed(state.domains, capabilities), state.domains)
        return InterpolationState(common, domains)

    def predict(state: InterpolationState, tasks: Tasks) -> Array:
        references = _references(tasks, state.capability.dtype)
        capability = state.capability[None]
        if state.domains is not None:
            assert tasks.domain is not None
            capability = jnp.where(jnp.isnan(state.domains), state.capability, state.domains)[
                tasks.domain
            ]
        pass_rate = _interpolate(references, capability)
        return constrain(jnp.where(jnp.isnan(references).any(axis=1), jnp.nan, pass_rate), "task")

    return Evidence(init, update, predict)


def _interpolate(references: Array, capability: Array) -> Array:
    """Computes the pass rates [N] at a capability [1 or N] on the lines through references [N, K].

    A line extends beyond the first and the last reference, and is clipped to [0, 1].
    """
    # [K - 1], each gone through from 0 to 1, the end ones beyond
    segment = jnp.arange(references.shape[1] - 1)
    low = jnp.where(segment == 0, -jnp.inf, 0)
    high = jnp.where(segment == segment[-1], jnp.inf, 1)
    low, high, segment = (x.astype(references.dtype)[None] for x in (low, high, segment))
    along = jnp.clip(capability[:, None] - segment, low, high)  # [1 or N, K - 1]
    rise = (along * jnp.diff(references, axis=1)).sum(axis=1)
    return jnp.clip(references[:, 0] + rise, 0, 1)


def _capability(mean: Array) -> Array:
    """Locates the mean observed pass rate of a batch on the line through its mean references.

    `mean` [1 + K] holds the observed pass rate, then those of the references. The line extends
    beyond the first and the last reference.
    """
    observed = mean[0]
    references = mean[1:]
    # the first that reaches it
    segment = jnp.cumprod((references[1:-1] <= observed).astype(jnp.int32)).sum()
    weak = references[segment]
    strong = references[segment + 1]
    return segment.astype(observed.dtype) + (observed - weak) / (strong - weak + EPSILON)


def _references(tasks: Tasks, dtype: DTypeLike) -> Array:
    """Converts the reference pass rates [N, K] to `dtype`; raises InputError without any."""
    if tasks.reference_pass_rates is None:
        raise InputError(_NO_REFERENCES)
    check_shapes(
        reference_pass_rates=(tasks.reference_pass_rates, "NK"), domain=(tasks.domain, "N")
    )
    return constrain(jnp.asarray(tasks.reference_pass_rates, dtype), "task", None)


_NO_REFERENCES = (
    "no task has the pass rates of reference policies that this selector needs: "
    "name their columns in tasks.pass_rate_columns, or choose select.name uniform (from Python: "
    "Tasks(reference_pass_rates), or another selector)"
)


def check_references(tasks: Tasks, num_tasks: int, *, least: int = 2) -> None:
    """Raises InputError unless reference pass rates are [N, K >= `least`] in [0, 1] or NaN, and
    some task has all.
    """
    rates = tasks.reference_pass_rates
    if rates is None:
        raise InputError(_NO_REFERENCES)
    checks.check_references(rates, num_tasks, least=least)
    if isinstance(rates, Tracer):
        return
    with jax.ensure_compile_time_eval():
        if jnp.isnan(rates).any(axis=1).all():
            raise InputError(_NO_REFERENCES)
