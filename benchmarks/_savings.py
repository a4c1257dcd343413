"""From learning curves to what a selector saves: costs to a level, savings against uniform, shares
of the headroom.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrft.stats import mean_interval, ratio_interval

WINDOW = 3  # evaluations in a row whose mean counts
COSTS = ("rollouts", "tokens", "seconds")


class Curve(NamedTuple):
    """What a run showed: a number an evaluation, and a share."""

    held_out: list[float]  # sampled accuracy on held-out tasks
    rollouts: list[int]  # so far, as the next two are
    tokens: list[int]
    seconds: list[float]  # of steps alone, without evaluations and what the oracle measures
    informative: float  # groups of the whole run


class Saving(NamedTuple):
    """What a run spent on getting to uniform's level, beside what uniform did."""

    log: dict[str, float]  # of uniform's cost over this one's, for each of COSTS
    with_references: float  # the same of rollouts, if those of the references count
    rollouts: int  # to the level, or all of them when it was not reached
    reached: bool


def final(curve: Curve) -> float:
    """The level at the end, the mean of the last evaluations."""
    return float(np.mean(curve.held_out[-WINDOW:]))


def reached(held_out: Sequence[float], level: float) -> int | None:
    """The first evaluation at which the mean of it and the two before is at least `level`; None if
    there is none.
    """
    means = np.convolve(held_out, np.ones(WINDOW) / WINDOW, mode="valid")
    above = np.flatnonzero(means >= level - 1e-9)
    return int(above[0]) + WINDOW - 1 if len(above) else None


def saving(curve: Curve, uniform: Curve, *, references: int = 0) -> Saving:
    """What a run saves on uniform's of the same seed; `references`: rollouts behind the reference
    pass rates.

    The level is uniform's final one, for uniform too. A run that does not reach it enters with all
    that it cost, which flatters it.
    """
    level = final(uniform)
    own, theirs = reached(curve.held_out, level), reached(uniform.held_out, level)
    assert theirs is not None  # by its last evaluations
    cost = {name: getattr(curve, name)[-1 if own is None else own] for name in COSTS}
    usual = {name: getattr(uniform, name)[theirs] for name in COSTS}
    return Saving(
        log={name: float(np.log(usual[name] / cost[name])) for name in COSTS},
        with_references=float(np.log(usual["rollouts"] / (cost["rollouts"] + references))),
        rollouts=cost["rollouts"],
        reached=own is not None,
    )


def row(
    own: list[Curve], uniform: list[Curve], oracle: list[Curve], *, references: int = 0
) -> dict[str, Any]:
    """The figures of a selector on a family, of runs paired by seed."""
    savings = [saving(a, b, references=references) for a, b in zip(own, uniform, strict=True)]
    best = [saving(a, b) for a, b in zip(oracle, uniform, strict=True)]
    pairs = list(zip(own, uniform, strict=True))
    return {
        "seeds": len(own),
        "informative": mean_interval([curve.informative for curve in own]),
        "not_reached": sum(not each.reached for each in savings),
        "rollouts_to_level": float(np.median([each.rollouts for each in savings])),
        "reference_rollouts": references,
        "log_saving": {name: mean_interval([each.log[name] for each in savings]) for name in COSTS},
        "log_saving_with_references": mean_interval([each.with_references for each in savings]),
        "share": {
            name: ratio_interval([s.log[name] for s in savings], [s.log[name] for s in best])
            for name in COSTS
        },
        "final": mean_interval([final(curve) for curve in own]),
        "final_minus_uniform": mean_interval([final(a) - final(b) for a, b in pairs]),
        "mean_minus_uniform": mean_interval(
            [float(np.mean(a.held_out) - np.mean(b.held_out)) for a, b in pairs]
        ),
    }
