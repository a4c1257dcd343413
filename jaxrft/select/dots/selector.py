"""DOTS: measures the pass rates of a few reference tasks, and predicts all others by attention."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquisition, topk
from jaxrft.select.base import Selector, ignore_feedback
from jaxrft.select.checks import (
    BETWEEN,
    POSITIVE,
    check,
    check_balance,
    check_count,
    check_generations,
    check_select,
    check_table,
    credible,
)
from jaxrft.select.dots import attention
from jaxrft.types import Array, Choice, Feedback, InputError, Projections, Tasks


class DotsState(NamedTuple):
    """The pass rates of the latest references, and those predicted for every task."""

    references: Array  # [K] int32, tasks rolled out last
    reference_pass_rates: Array  # [K] float32, measured; NaN = no task
    predicted: Array  # [N] float32; NaN before the first reference set


def dots(
    num_generations: int,
    *,
    predictor: attention.Params,
    calibration: attention.Calibration = "group_logit_temp",
    attention_temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    num_references: int = 256,
    reference_every: int = 2,
    target: ArrayLike = 0.5,
    temperature: ArrayLike = 1e-3,
    balance: topk.Balance = "none",
) -> Selector:
    """Chooses tasks with predicted pass rates near `target`, as published [arXiv 2506.05316].

    Every `reference_every` steps, before it selects, the loop rolls out the `num_references` tasks
    (all, if there are fewer) that `reference_set` draws uniformly, and gives their feedback to
    `update_references`. `attention.predict_projected` predicts the pass rates p~ of all tasks from
    those of the references. A batch is drawn without replacement, each task with chance
    proportional to exp(-|p~ - `target`| / `temperature`). `tasks.projections` holds the table as
    the frozen `predictor` sees it, project(predictor, embeddings, embeddings): an argument, which
    no checkpoint carries; the embeddings themselves are not needed any more. A loop that trains on
    the groups of some references excludes their tasks from `select`. References are a uniform
    sample, as the predictor was trained on: `update`, of a chosen batch, leaves the belief as it
    is. Feedback of a part of a reference set replaces the oldest references. Deviation: before the
    first reference set, choices are uniform. `balance` of what is chosen, not of the references,
    between the domains: as `topk.quota` says. `init` raises InputError for a table that is not
    projected.
    """
    num_generations = check_generations(num_generations)
    num_references = check_count("num_references", num_references)
    reference_every = check_count("reference_every", reference_every)
    check("target", target, BETWEEN)
    check("temperature", temperature, POSITIVE)
    check("attention_temperature", attention_temperature, POSITIVE)
    if top_k is not None:
        top_k = check_count("top_k", top_k, wanted="a whole number, at least 1, or None")
    attention.check_calibration(predictor, calibration)
    check_balance(balance)
    predict = partial(
        attention.predict_projected,
        predictor,
        calibration=calibration,
        temperature=attention_temperature,
        top_k=top_k,
    )

    def init(tasks: Tasks, num_tasks: int) -> DotsState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        _projections(tasks)
        count = min(num_references, num_tasks)
        return DotsState(
            references=jnp.zeros(count, jnp.int32),
            reference_pass_rates=jnp.full(count, jnp.nan, jnp.float32),
            predicted=jnp.full(num_tasks, jnp.nan, jnp.float32),
        )

    def reference_set(key: Array, state: DotsState, tasks: Tasks) -> Array:
        count = state.references.shape[0]
        check_select(key, state.predicted, tasks, batch_size=count, exclude=None)
        equal = jnp.zeros(state.predicted.shape)
        return topk.smallest(key, equal, batch_size=count)

    def select(
        key: Array, state: DotsState, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, DotsState]:
        batch_size = check_select(
            key, state.predicted, tasks, batch_size=batch_size, exclude=exclude
        )
        distance = jnp.abs(state.predicted - jnp.asarray(target, jnp.float32))
        key_quota, key_draw = jax.random.split(key)
        quota = topk.quota(
            key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude
        )
        ids = acquisition.softmax(
            key_draw,
            -distance,
            batch_size=batch_size,
            temperature=temperature,
            quota=quota,
            exclude=exclude,
        )
        return Choice(ids, state.predicted[ids]), state

    def update_references(state: DotsState, tasks: Tasks, feedback: Feedback) -> DotsState:
        feedback = credible(feedback, state.predicted.shape[0])
        valid = feedback.trials > 0
        references, pass_rates = _latest(state, feedback, valid)
        predicted = jax.lax.cond(
            valid.any(),
            lambda: predict(_of_references(tasks, references), pass_rates),
            lambda: state.predicted,
        )
        return DotsState(references, pass_rates, constrain(predicted, "task"))

    def pass_rate(state: DotsState, tasks: Tasks) -> Array:
        return state.predicted

    # A chosen batch is no sample of the table, so that its feedback is ignored.
    return Selector(
        init, select, ignore_feedback, pass_rate, reference_set, update_references, reference_every
    )


def _latest(state: DotsState, feedback: Feedback, valid: Array) -> tuple[Array, Array]:
    """Returns the K latest references and their pass rates: those of `feedback` [B] that are
    `valid` [B] come first.
    """
    again = ((state.references[:, None] == feedback.ids[None]) & valid[None]).any(axis=1)  # [K]
    known = jnp.concatenate([valid, ~jnp.isnan(state.reference_pass_rates) & ~again])
    ids = jnp.concatenate([feedback.ids.astype(jnp.int32), state.references])
    rates = jnp.concatenate(
        [feedback.successes / jnp.where(valid, feedback.trials, 1), state.reference_pass_rates]
    )
    latest = jnp.argsort(~known, stable=True)[: state.references.shape[0]]
    is_known = known[latest]
    return jnp.where(is_known, ids[latest], 0), jnp.where(is_known, rates[latest], jnp.nan)


def _of_references(tasks: Tasks, references: Array) -> Projections:
    """Returns the projected embeddings of all tasks and of the `references` [K]."""
    query, reference = _projections(tasks)
    return Projections(constrain(query, "task", None), constrain(reference[references], None, None))


def _projections(tasks: Tasks) -> Projections:
    """Returns the projected embeddings of the table; raises InputError without them."""
    if tasks.projections is None:
        raise InputError(
            "the dots selector needs the projected embeddings of all tasks: set "
            "Tasks.projections to attention.project(predictor, embeddings, embeddings)"
        )
    return tasks.projections
