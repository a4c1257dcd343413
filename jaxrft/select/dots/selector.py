"""DOTS: a few tasks are rolled out in order to know, and attention tells the pass rates of all the others from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquire
from jaxrft.select.checks import (
    BETWEEN,
    POSITIVE,
    check,
    check_balance,
    check_count,
    check_sizes,
    check_table,
    credible,
)
from jaxrft.select.contract import Selector
from jaxrft.select.dots import attention
from jaxrft.types import Array, Choice, Feedback, InputError, Projections, Tasks


class DotsState(NamedTuple):
    """What the last probe found, and what follows from it for every task."""

    references: Array  # [K] int32, tasks probed last
    reference_pass_rates: Array  # [K] float32, what they showed; NaN = no task
    predicted: Array  # [N] float32, pass rates that follow; NaN before the first probe
    chosen: Array  # [N] bool, chosen, with feedback still to come


def dots(
    batch_size: int,
    num_generations: int,
    *,
    predictor: attention.Params,
    calibration: attention.Calibration = "group_logit_temp",
    attention_temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    num_references: int = 256,
    probe_every: int = 2,
    target: ArrayLike = 0.5,
    temperature: ArrayLike = 1e-3,
    balance: acquire.Balance = "none",
) -> Selector:
    """Difficulty-targeted online selection as published [arXiv 2506.05316]: probes, attention, softmax.

    Every `probe_every` steps, before it selects, the loop rolls out the `num_references` tasks (all, if there are
    fewer) that `probe` draws uniformly, and gives their feedback to `update`. `attention.predict_projected` tells the
    pass rates p~ of all tasks from theirs; a batch is drawn without replacement, each task with chance proportional
    to exp(-|p~ - `target`| / `temperature`).
    `tasks.projections` holds the table as the frozen `predictor` sees it, project(predictor, embeddings, embeddings):
    an argument, which no checkpoint carries; the embeddings themselves are not needed any more.
    Whoever trains on the groups of some probes marks their tasks in `tasks.taken` for `select`.
    Only probes are references, a uniform sample as the predictor was trained on: the feedback of a chosen batch is
    known by its ids and leaves the belief as it is. Feedback of a part of a probe replaces the oldest references.
    Deviation: before the first probe, choices are uniform. `balance` of what is chosen, not of the probes, between
    the domains: as `acquire.quota` says.
    `init` raises InputError for a table that is not projected or smaller than a batch.
    """
    batch_size, num_generations = check_sizes(batch_size, num_generations)
    num_references = check_count("num_references", num_references)
    probe_every = check_count("probe_every", probe_every)
    check("target", target, BETWEEN)
    check("temperature", temperature, POSITIVE)
    check("attention_temperature", attention_temperature, POSITIVE)
    if top_k is not None:
        top_k = check_count("top_k", top_k, wanted="a whole number, at least 1, or None")
    attention.check_calibration(predictor, calibration)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> DotsState:
        num_tasks = check_table(tasks, num_tasks, batch_size=batch_size, balance=balance)
        _projections(tasks)
        count = min(num_references, num_tasks)
        return DotsState(
            references=jnp.zeros(count, jnp.int32),
            reference_pass_rates=jnp.full(count, jnp.nan, jnp.float32),
            predicted=jnp.full(num_tasks, jnp.nan, jnp.float32),
            chosen=jnp.zeros(num_tasks, bool),
        )

    def probe(key: Array, state: DotsState, tasks: Tasks) -> Array:
        return acquire.smallest(key, jnp.zeros(state.chosen.shape), batch_size=state.references.shape[0])

    def select(key: Array, state: DotsState, tasks: Tasks) -> tuple[Choice, DotsState]:
        exclude = tasks.taken
        distance = jnp.abs(state.predicted - jnp.asarray(target, jnp.float32))
        key_quota, key_draw = jax.random.split(key)
        quota = acquire.quota(key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        ids = acquire.softmax(
            key_draw, -distance, batch_size=batch_size, temperature=temperature, quota=quota, exclude=exclude
        )
        chosen = constrain(state.chosen.at[ids].set(True), "task")
        return Choice(ids, state.predicted[ids]), state._replace(chosen=chosen)

    def predict(references: Array, pass_rates: Array, tasks: Tasks) -> Array:  # [K], [K] -> [N]
        query, reference = _projections(tasks)
        near = Projections(constrain(query, "task", None), constrain(reference[references], None, None))
        options = {"calibration": calibration, "temperature": attention_temperature, "top_k": top_k}
        return attention.predict_projected(predictor, near, pass_rates, **options)

    def update(state: DotsState, tasks: Tasks, feedback: Feedback) -> DotsState:
        feedback = credible(feedback, state.chosen.shape[0])
        seen = feedback.trials > 0
        ids = jnp.where(seen, feedback.ids, state.chosen.shape[0])  # padding points behind the table and is dropped
        probed = seen & ~state.chosen.at[ids].get(mode="fill", fill_value=True)
        new = Feedback(jnp.where(probed, ids, 0), *feedback[1:])
        references, pass_rates = _latest(state, new, probed)
        predicted = jax.lax.cond(  # a prediction costs N K h multiply-adds; a batch gives no reason for one
            probed.any(), lambda: predict(references, pass_rates, tasks), lambda: state.predicted
        )
        chosen = constrain(state.chosen.at[ids].set(False, mode="drop"), "task")
        return DotsState(references, pass_rates, constrain(predicted, "task"), chosen)

    def pass_rate(state: DotsState, tasks: Tasks) -> Array:
        return state.predicted

    return Selector(init, select, update, pass_rate, probe, probe_every)


def _latest(state: DotsState, feedback: Feedback, probed: Array) -> tuple[Array, Array]:
    """The K tasks probed last and their pass rates: those of `feedback` [B] that are `probed` [B], then known ones."""
    again = ((state.references[:, None] == feedback.ids[None]) & probed[None]).any(axis=1)  # [K]
    known = jnp.concatenate([probed, ~jnp.isnan(state.reference_pass_rates) & ~again])
    ids = jnp.concatenate([feedback.ids.astype(jnp.int32), state.references])
    rates = jnp.concatenate([feedback.successes / jnp.where(probed, feedback.trials, 1), state.reference_pass_rates])
    latest = jnp.argsort(~known, stable=True)[: state.references.shape[0]]
    kept = known[latest]
    return jnp.where(kept, ids[latest], 0), jnp.where(kept, rates[latest], jnp.nan)


def _projections(tasks: Tasks) -> Projections:
    """The table as the predictor sees it."""
    if tasks.projections is None:
        raise InputError(
            "the dots selector needs every task's embedding as its predictor sees it: pass them in Tasks.projections, "
            "by attention.project(predictor, embeddings, embeddings)"
        )
    return tasks.projections
