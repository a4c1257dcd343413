"""Posteriors over the pass rate of every task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxrft.mesh import constrain
from jaxrft.select.checks import check_feedback
from jaxrft.select.random_bits import beta_logit
from jaxrft.shapes import check_shapes
from jaxrft.types import Array, Feedback, InputError

Prior = tuple[ArrayLike, ArrayLike]  # (alpha0, beta0), scalars or [N], positive


class BetaState(NamedTuple):
    """Beta(alpha, beta) over the pass rate of each task."""

    alpha: Array  # [N], pseudo-successes
    beta: Array  # [N], pseudo-failures


def init(num_tasks: int, *, prior: Prior = (1.0, 1.0), dtype: DTypeLike = jnp.float32) -> BetaState:
    """Returns the prior of every task, in arrays [N] of its own (donating them leaves `prior`
    alone).

    Raises InputError for a prior that is neither one for all tasks nor one for each.
    """
    for shape in map(np.shape, prior):
        if shape not in ((), (num_tasks,)):
            raise InputError(
                f"prior has shape {shape}: give one for all tasks, or one for each of {num_tasks}"
            )
    alpha, beta = (
        jnp.array(jnp.broadcast_to(jnp.asarray(count, dtype), (num_tasks,))) for count in prior
    )
    return BetaState(alpha, beta)


def update(
    state: BetaState,
    feedback: Feedback,
    implicit_pass_rate: Array,
    *,
    decay: ArrayLike,
    rho: ArrayLike,
    num_generations: int,
    prior: Prior = (1.0, 1.0),
) -> BetaState:
    """Updates the counts of every task by explicit and implicit evidence [arXiv 2510.26374].

    alpha <- (1 - decay) alpha + decay alpha0 + (1 - rho) s + rho s~, and beta with the failures.

    s~ = num_generations * p~ for p~ = `implicit_pass_rate` [N], where NaN adds nothing. An observed
    task has p~ = s/n, hence its full counts whatever rho is. Successes may be fractional; rows with
    `trials == 0` change nothing. Deviation: the prior may differ per task.
    """
    dtype = state.alpha.dtype
    num_tasks = state.alpha.shape[0]
    check_shapes(
        alpha=(state.alpha, "N"),
        beta=(state.beta, "N"),
        implicit_pass_rate=(implicit_pass_rate, "N", float),
    )
    decay = jnp.asarray(decay, dtype)
    rho = jnp.asarray(rho, dtype)
    successes, trials = counts(feedback, num_tasks, dtype=dtype)
    implicit = implicit_pass_rate.astype(dtype)
    weight = jnp.where(jnp.isnan(implicit), 0, rho * num_generations)  # [N], implicit rollouts
    implicit = jnp.nan_to_num(implicit)

    solved = jnp.where(trials > 0, successes, weight * implicit)
    failed = jnp.where(trials > 0, trials - successes, weight * (1 - implicit))
    return _step(state, 1 - decay, decay, prior, (solved, failed))


def update_visited(
    state: BetaState, feedback: Feedback, *, discount: ArrayLike, prior: Prior = (1.0, 1.0)
) -> BetaState:
    """Updates the counts of each task by the evidence of its own rollouts [arXiv 2507.04632].

    alpha <- discount alpha + (1 - discount) alpha0 + s, and beta with the failures.

    Tasks that were not rolled out stay as they are. Deviation: the prior may differ per task.
    """
    dtype = state.alpha.dtype
    check_shapes(alpha=(state.alpha, "N"), beta=(state.beta, "N"))
    successes, trials = counts(feedback, state.alpha.shape[0], dtype=dtype)
    retention = jnp.where(trials > 0, jnp.asarray(discount, dtype), 1)  # [N]

    return _step(state, retention, 1 - retention, prior, (successes, trials - successes))


def _step(
    state: BetaState, retention: Array, pull: Array, prior: Prior, evidence: tuple[Array, Array]
) -> BetaState:
    """Adds `retention` times the counts, `pull` times those of the prior, and the new counts."""
    counts = zip(state, prior, evidence, strict=True)
    return BetaState(
        *(
            constrain(retention * old + pull * jnp.asarray(first, old.dtype) + new, "task")
            for old, first, new in counts
        )
    )


def counts(
    feedback: Feedback, num_tasks: int, *, dtype: DTypeLike = jnp.float32
) -> tuple[Array, Array]:
    """Sums the successes and trials of every task, [N] each; 0 where nothing was rolled out."""
    feedback = check_feedback(feedback)
    # padding points behind the table and is dropped
    ids = jnp.where(feedback.trials > 0, feedback.ids, num_tasks)
    successes, trials = (
        constrain(jnp.zeros(num_tasks, dtype).at[ids].add(x.astype(dtype), mode="drop"), "task")
        for x in (feedback.successes, feedback.trials)
    )
    return successes, trials


def mean(state: BetaState) -> Array:
    """Computes the posterior mean alpha / (alpha + beta) of every pass rate, [N]."""
    return state.alpha / (state.alpha + state.beta)


def sample(key: Array, state: BetaState) -> Array:
    """Draws one pass rate from the posterior of every task, [N], for Thompson sampling.

    The draws are exact, by `beta_logit`.
    """
    check_shapes(alpha=(state.alpha, "N", float), beta=(state.beta, "N", float))
    draw = jax.nn.sigmoid(beta_logit(key, state.alpha, state.beta))
    return constrain(draw.astype(state.alpha.dtype), "task")
