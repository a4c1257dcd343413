"""Runs selectors in simulated worlds, and computes their figures."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import stats
from jaxrft.report import metrics
from jaxrft.select import reference_groups
from jaxrft.select.base import Selector
from jaxrft.select.dots import attention
from jaxrft.simulate.worlds import World
from jaxrft.types import Array, Feedback, InputError, PyTree, Tasks

RECENT = 50  # steps over which coverage is counted


class Trace(NamedTuple):
    """Records of each step; leaves are [steps, ...], or [seeds, steps, ...] of several runs.

    A step has B slots for the groups of the batch and K for those of the reference set.
    """

    ids: Array  # [B + K] int32
    rolled: Array  # [B + K] bool, whether the slot holds a group
    seen: Array  # [B + K] bool, whether the group has trials
    informative: Array  # [B + K] bool, rewards not all equal
    believed: Array  # [B], pass rates believed before the step; NaN where nothing was chosen
    true: Array  # [B], pass rates of the policy; NaN likewise
    squared_error: Array  # [], of what is believed of all tasks
    pearson: Array  # [], of what is believed of all tasks
    ability: Array  # [], mean pass rate of the policy over all tasks


class Rolled(NamedTuple):
    """The rollouts of a step."""

    batch: Feedback  # [B], trained on
    chosen: Array  # [B] bool: the others are references
    references: Feedback  # [K], with trials 0 in a step without a reference set


def run(
    world: World,
    selector: Selector,
    seeds: int,
    steps: int,
    *,
    batch_size: int,
    first_seed: int = 0,
    reveal: Callable[[PyTree, Array], PyTree] | None = None,
    predictor: attention.Params | None = None,
    target: float = 0.5,
) -> Trace:
    """Runs a selector in a world once for each seed, side by side; traces are [seeds, steps, ...].

    The same seed meets the same world, whatever the selector. Seeds are the whole numbers from
    `first_seed` on.

    `reveal(state, pass_rates)` puts the true pass rates into the selector's state before every
    step, as an oracle needs. A selector with reference sets needs a `predictor`, which sees the
    tasks by their embeddings. Informative reference groups, those nearest `target` first, are
    trained on as in `select.reference_groups`. Raises InputError for a predictor in a world without
    embeddings, or with embeddings of another width.
    """

    def trial(seed: Array) -> Trace:
        key_world, key_run = jax.random.split(jax.random.key(seed))
        tasks, state = world.init(key_world)
        if predictor is not None:
            tasks = _projected(tasks, predictor)
        selector_state = selector.init(tasks, world.num_tasks)

        def step(carry, index):
            state, selector_state = carry
            keys = jax.random.split(jax.random.fold_in(key_run, index), 5)
            truth = world.pass_rates(state, index)
            if reveal is not None:
                selector_state = reveal(selector_state, truth)

            def roll_out(key: Array, ids: Array) -> Feedback:
                return world.roll_out(key, state, index, ids)

            if selector.reference_set is None:
                expected = selector.pass_rate(selector_state, tasks)
                selector_state, rolled = _choose(
                    keys, selector, selector_state, tasks, roll_out, batch_size=batch_size
                )
            else:
                selector_state, references = _references(
                    keys[3:], selector, selector_state, tasks, index, roll_out
                )
                expected = selector.pass_rate(selector_state, tasks)
                selector_state, rolled = _fill(
                    keys,
                    selector,
                    selector_state,
                    tasks,
                    references,
                    roll_out,
                    batch_size=batch_size,
                    target=target,
                )
            state = world.learn(keys[2], state, rolled.batch)
            return (state, selector_state), _trace(rolled, expected, truth)

        return jax.lax.scan(step, (state, selector_state), jnp.arange(steps))[1]

    return jax.device_get(jax.jit(jax.vmap(trial))(first_seed + jnp.arange(seeds)))


def _choose(
    keys: Array,
    selector: Selector,
    selector_state: PyTree,
    tasks: Tasks,
    roll_out: Callable[..., Feedback],
    *,
    batch_size: int,
) -> tuple[PyTree, Rolled]:
    """Rolls out a batch of chosen tasks, and updates the selector's state by them."""
    choice, chosen = selector.select(keys[0], selector_state, tasks, batch_size=batch_size)
    feedback = roll_out(keys[1], choice.ids)
    no_references = jax.tree.map(lambda x: x[:0], feedback)
    rolled = Rolled(feedback, jnp.ones(choice.ids.shape, bool), no_references)
    return selector.update(chosen, tasks, feedback), rolled


def _projected(tasks: Tasks, predictor: attention.Params) -> Tasks:
    """Adds the projections of the tasks that the selector dots needs."""
    if tasks.embeddings is None:
        raise InputError(
            "the selector dots needs embeddings, but this world has none: give it some, or leave "
            "out dots"
        )
    return tasks._replace(projections=attention.project_table(predictor, tasks.embeddings))


def _references(
    keys: Array,
    selector: Selector,
    selector_state: PyTree,
    tasks: Tasks,
    index: Array,
    roll_out: Callable[..., Feedback],
) -> tuple[PyTree, Feedback]:
    """Rolls out the references of a step, and updates the selector's state by them.

    Returns the state and the feedback, whose trials are 0 in a step without references.
    """
    assert selector.reference_set is not None and selector.update_references is not None
    draw = selector.reference_set
    update = selector.update_references

    def roll_out_references() -> tuple[PyTree, Feedback]:
        feedback = roll_out(keys[1], draw(keys[0], selector_state, tasks))
        return update(selector_state, tasks, feedback), feedback

    no_feedback = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(roll_out_references)[1]
    )
    is_due = index % selector.reference_every == 0
    return jax.lax.cond(is_due, roll_out_references, lambda: (selector_state, no_feedback))


def _fill(
    keys: Array,
    selector: Selector,
    selector_state: PyTree,
    tasks: Tasks,
    references: Feedback,
    roll_out: Callable[..., Feedback],
    *,
    batch_size: int,
    target: float,
) -> tuple[PyTree, Rolled]:
    """Fills the batch of a step with informative references, those nearest the target, and with
    chosen tasks.
    """
    rate = references.successes / jnp.maximum(references.trials, 1)
    informative = _informative(references)
    nearest = jnp.argsort(jnp.where(informative, jnp.abs(rate - target), jnp.inf))

    def fill(fresh: int) -> tuple[PyTree, Rolled]:
        reused = jax.tree.map(lambda x: x[nearest[: batch_size - fresh]], references)
        included = jnp.zeros(selector.pass_rate(selector_state, tasks).shape, bool)
        exclude = included.at[reused.ids].set(True)
        choice, chosen = selector.select(
            keys[0], selector_state, tasks, batch_size=fresh, exclude=exclude
        )
        feedback = roll_out(keys[1], choice.ids)
        batch = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), feedback, reused)
        is_chosen = jnp.arange(batch_size) < fresh
        return selector.update(chosen, tasks, feedback), Rolled(batch, is_chosen, references)

    count = informative.sum(dtype=jnp.int32)
    sizes = reference_groups.batch_sizes(batch_size)
    return jax.lax.switch(
        reference_groups.batch_size_index(batch_size, count),
        [partial(fill, fresh) for fresh in sizes],
    )


def _informative(feedback: Feedback) -> Array:
    return (feedback.successes > 0) & (feedback.successes < feedback.trials)


def _trace(rolled: Rolled, expected: Array, truth: Array) -> Trace:
    """Records a step, given the pass rates `expected` [N] and the true ones [N]."""
    groups = jax.tree.map(lambda *x: jnp.concatenate(x), rolled.batch, rolled.references)
    has_group = jnp.concatenate([rolled.chosen, rolled.references.trials > 0])
    chosen = rolled.batch.ids
    return Trace(
        ids=groups.ids,
        rolled=has_group,
        seen=has_group & (groups.trials > 0),
        informative=has_group & _informative(groups),
        believed=jnp.where(rolled.chosen, expected[chosen], jnp.nan),
        true=jnp.where(rolled.chosen, truth[chosen], jnp.nan),
        squared_error=jnp.nanmean((expected - truth) ** 2),
        pearson=metrics.pearson(expected, truth, ~(jnp.isnan(expected) | jnp.isnan(truth))),
        ability=jnp.nanmean(truth),
    )


def scores(trace: Trace, num_tasks: int) -> dict[str, np.ndarray]:
    """Computes the figures of a trace [seeds, steps, ...], each with one number for every seed.

    Figures of beliefs are NaN where the selector has none.
    """
    batch = trace.believed.shape[2]
    predicted = zip(
        trace.believed, trace.informative[:, :, :batch], trace.rolled[:, :, :batch], strict=True
    )
    figures = {
        "effective_group_ratio": trace.informative.sum(axis=(1, 2)) / trace.rolled.sum(axis=(1, 2)),
        "signal": np.nanmean(4 * trace.true * (1 - trace.true), axis=(1, 2)),
        "mse": trace.squared_error.mean(axis=1),
        "pearson": stats.known_mean(trace.pearson, axis=1),
        "auc": np.array(
            [stats.auc(p[chosen] * (1 - p[chosen]), y[chosen]) for p, y, chosen in predicted]
        ),
        "coverage": np.array(
            [coverage(*x, num_tasks) for x in zip(trace.ids, trace.seen, strict=True)]
        ),
        "ability": trace.ability[:, -1],
        "groups": trace.rolled.sum(axis=(1, 2)).astype(float),
    }
    return {name: np.asarray(value) for name, value in figures.items()}


def coverage(ids: np.ndarray, seen: np.ndarray, num_tasks: int) -> float:
    """Computes the share of the tasks rolled out in the last 50 steps; ids, seen [steps, B]."""
    return len(np.unique(ids[-RECENT:][seen[-RECENT:]])) / num_tasks
