"""A selector in a world, step after step, and what is measured of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.special import stdtrit
from scipy.stats import rankdata

from jaxrft.select.selectors import Selector
from jaxrft.simulate.worlds import World
from jaxrft.types import Array, Tasks

RECENT = 50  # steps over which coverage is counted


class Trace(NamedTuple):
    """What happened at each step; leaves are [steps, ...], or [seeds, steps, ...] of several runs."""

    ids: Array  # [B] int32
    seen: Array  # [B] bool, rolled out
    informative: Array  # [B] bool, rewards not all equal
    believed: Array  # [B], pass rates believed before the step
    true: Array  # [B], pass rates of the policy
    squared_error: Array  # [], of what is believed of all tasks
    pearson: Array  # [], of what is believed of all tasks
    ability: Array  # [], mean pass rate of the policy over all tasks


def run(world: World, selector: Selector, seeds: int, steps: int, *, oracle: bool = False) -> Trace:
    """Runs side by side, one a seed, [seeds, steps, ...]; the same seed meets the same world whatever the selector.

    With `oracle`, `Tasks.pass_rates` hold the true pass rates at every step.
    """

    def trial(seed: Array) -> Trace:
        key_world, key_run = jax.random.split(jax.random.key(seed))
        tasks, state = world.init(key_world)

        def told(truth: Array) -> Tasks:
            return tasks._replace(pass_rates=truth) if oracle else tasks

        believes = selector.init(told(world.pass_rates(state, jnp.int32(0))), world.num_tasks)

        def step(carry, index):
            state, believes = carry
            keys = jax.random.split(jax.random.fold_in(key_run, index), 3)
            truth = world.pass_rates(state, index)
            known = told(truth)
            expected = selector.pass_rate(believes, known)
            choice, believes = selector.select(keys[0], believes, known)
            feedback = world.roll_out(keys[1], state, index, choice.ids)
            believes = selector.update(believes, known, feedback)
            state = world.learn(keys[2], state, feedback)
            seen = feedback.trials > 0
            trace = Trace(
                ids=choice.ids,
                seen=seen,
                informative=seen & (feedback.successes > 0) & (feedback.successes < feedback.trials),
                believed=expected[choice.ids],
                true=truth[choice.ids],
                squared_error=jnp.nanmean((expected - truth) ** 2),
                pearson=_pearson(expected, truth),
                ability=jnp.nanmean(truth),
            )
            return (state, believes), trace

        return jax.lax.scan(step, (state, believes), jnp.arange(steps))[1]

    return jax.device_get(jax.jit(jax.vmap(trial))(jnp.arange(seeds)))


def _pearson(x: Array, y: Array) -> Array:
    """Correlation of x and y [N] where both are known; NaN when either does not vary."""
    known = ~(jnp.isnan(x) | jnp.isnan(y))
    x, y = (jnp.where(known, a - jnp.mean(a, where=known), 0.0) for a in (x, y))
    return (x * y).sum() / jnp.sqrt((x * x).sum() * (y * y).sum())


def scores(trace: Trace, num_tasks: int) -> dict[str, np.ndarray]:
    """The figures of a trace [seeds, steps, ...], one number a seed each; NaN where nothing is believed."""
    found = {
        "effective_group_ratio": trace.informative.mean(axis=(1, 2)),
        "signal": np.nanmean(4 * trace.true * (1 - trace.true), axis=(1, 2)),
        "mse": trace.squared_error.mean(axis=1),
        "pearson": _mean_of_known(trace.pearson),
        "auc": np.array([auc(p * (1 - p), y) for p, y in zip(trace.believed, trace.informative, strict=True)]),
        "coverage": np.array([coverage(*x, num_tasks) for x in zip(trace.ids, trace.seen, strict=True)]),
        "ability": trace.ability[:, -1],
    }
    return {name: np.asarray(value) for name, value in found.items()}


def _mean_of_known(x: ArrayLike) -> np.ndarray:
    """Means [seeds] of x [seeds, steps], NaN left out (nothing varies before the first step)."""
    count = np.isfinite(x).sum(axis=1)
    return np.where(count > 0, np.nansum(x, axis=1) / np.maximum(count, 1), np.nan)


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores higher than a negative, ties counting half; NaN without both or without scores."""
    score, positive = score.ravel(), positive.ravel()
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros or np.isnan(score).any():
        return float("nan")
    return float((rankdata(score)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def coverage(ids: np.ndarray, seen: np.ndarray, num_tasks: int) -> float:
    """Share of the tasks rolled out in the last 50 steps; ids, seen [steps, B]."""
    return len(np.unique(ids[-RECENT:][seen[-RECENT:]])) / num_tasks


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean's 95 % interval by Student's t over seeds; NaN for a single one."""
    count = len(values)
    if count < 2:
        return float("nan"), float("nan")
    half = stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count)
    return float(values.mean() - half), float(values.mean() + half)
