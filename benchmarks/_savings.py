"""From learning curves to what a selector saves: costs to a level, savings against uniform, shares
of the headroom.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxrft.stats import RESAMPLES, Interval, mean_interval

WINDOW = 3  # evaluations in a row whose mean counts
COSTS = ("rollouts", "tokens", "seconds")


class Curve(NamedTuple):
    """The learning curve of a run, a number an evaluation, and its share of informative groups."""

    held_out: list[float]  # sampled accuracy on held-out tasks
    rollouts: list[int]  # so far, as the next two are
    tokens: list[int]
    seconds: list[float]  # of steps alone, without evaluations and what the oracle measures
    informative: float  # groups of the whole run


class Saving(NamedTuple):
    """The cost of a run to reach uniform's level, relative to the cost of uniform."""

    log: dict[str, float]  # of uniform's cost over this one's, for each of COSTS
    with_references: float  # the same of rollouts, if those of the references count
    rollouts: int  # to the level, or all of them when it was not reached
    reached: bool


def final(curve: Curve) -> float:
    """Computes the final level, the mean of the last evaluations."""
    return float(np.mean(curve.held_out[-WINDOW:]))


def reached(held_out: Sequence[float], level: float) -> int | None:
    """Finds the first evaluation at which the mean of it and the two before is at least `level`;
    None if there is none.
    """
    means = np.convolve(held_out, np.ones(WINDOW) / WINDOW, mode="valid")
    above = np.flatnonzero(means >= level - 1e-9)
    return int(above[0]) + WINDOW - 1 if len(above) else None


def saving(curve: Curve, uniform: Curve, *, references: int = 0) -> Saving:
    """Computes the savings of a run relative to uniform's of the same seed.

    `references`: rollouts behind the reference pass rates. The level is uniform's final one, for
    uniform too. A run that does not reach it counts with its full cost, which underestimates it.
    """
    level = final(uniform)
    index = reached(curve.held_out, level)
    uniform_index = reached(uniform.held_out, level)
    assert uniform_index is not None  # by its last evaluations
    cost = {name: getattr(curve, name)[-1 if index is None else index] for name in COSTS}
    uniform_cost = {name: getattr(uniform, name)[uniform_index] for name in COSTS}
    return Saving(
        log={name: float(np.log(uniform_cost[name] / cost[name])) for name in COSTS},
        with_references=float(np.log(uniform_cost["rollouts"] / (cost["rollouts"] + references))),
        rollouts=cost["rollouts"],
        reached=index is not None,
    )


def row(
    curves: list[Curve], uniform: list[Curve], oracle: list[Curve], *, references: int = 0
) -> dict[str, Any]:
    """Computes the figures of a selector on a family, from runs paired by seed."""
    pairs = list(zip(curves, uniform, strict=True))
    savings = [saving(a, b, references=references) for a, b in pairs]
    best = [saving(a, b) for a, b in zip(oracle, uniform, strict=True)]
    return {
        "seeds": len(curves),
        "informative": mean_interval([curve.informative for curve in curves]),
        "not_reached": sum(not each.reached for each in savings),
        "rollouts_to_level": float(np.median([each.rollouts for each in savings])),
        "reference_rollouts": references,
        "log_saving": {name: mean_interval([each.log[name] for each in savings]) for name in COSTS},
        "log_saving_with_references": mean_interval([each.with_references for each in savings]),
        "share": {
            name: ratio_interval([s.log[name] for s in savings], [s.log[name] for s in best])
            for name in COSTS
        },
        "final": mean_interval([final(curve) for curve in curves]),
        "final_minus_uniform": mean_interval([final(a) - final(b) for a, b in pairs]),
        "mean_minus_uniform": mean_interval(
            [float(np.mean(a.held_out) - np.mean(b.held_out)) for a, b in pairs]
        ),
    }


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike) -> Interval:
    """Returns mean(numerators) / mean(denominators) with a percentile bootstrap over pairs [n].

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3. Resamples
    without a ratio (0 / 0) are left out.
    """
    pairs = np.array([numerators, denominators])  # [2, n]
    count = pairs.shape[1]
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    numerator, denominator = pairs[:, drawn].mean(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanpercentile(numerator / denominator, [2.5, 97.5])
        ratio = pairs[0].mean() / pairs[1].mean()
    return Interval(float(ratio), float(low), float(high))
