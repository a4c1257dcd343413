"""The results of closed loops as Markdown and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._savings import COSTS, Curve
from jaxrft.stats import Interval, mean_interval

HEAD = (
    "selector",
    "informative groups",
    "rollouts to the level (median)",
    "not reached",
    "rollouts saved, factor",
    "with references",
    "tokens saved",
    "seconds saved",
    "share of the headroom",
    "final - uniform's",
    "mean over the run - uniform's",
)

COLUMNS = 3  # panels side by side, whose text is still read where a page makes the picture smaller


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the rows of a family as a table."""
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    saved = {name: factor(row["log_saving"][name]) for name in COSTS}
    return (
        row["selector"],
        f"{row['informative'].mean:.2f}",
        f"{row['rollouts_to_level']:,.0f}",
        f"{row['not_reached']} of {row['seeds']}",
        saved["rollouts"],
        factor(row["log_saving_with_references"]) if row["reference_rollouts"] else "",
        saved["tokens"],
        saved["seconds"],
        shown(row["share"]["rollouts"]),
        shown(row["final_minus_uniform"], "+"),
        shown(row["mean_minus_uniform"], "+"),
    )


def factor(log: Interval) -> str:
    """Formats a factor from the interval of its log."""
    return shown(Interval._make(np.exp(log)))


def shown(value: Interval, sign: str = "") -> str:
    """Formats an interval."""
    return f"{value.mean:{sign}.2f} ({value.low:{sign}.2f} to {value.high:{sign}.2f})"


def draw(curves: dict[str, dict[str, list[Curve]]], out: Path) -> None:
    """Draws held-out accuracy against rollouts, a panel a family: the mean over seeds, with its
    95 % interval shaded.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(3.2 * columns, 2.7 * rows + 0.4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    color = {
        name: f"C{i}"
        for i, name in enumerate(
            dict.fromkeys(name for by_selector in curves.values() for name in by_selector)
        )
    }
    panels = axes.flat[: len(curves)]
    for axis, (family, by_selector) in zip(panels, curves.items(), strict=True):
        for selector, runs in by_selector.items():
            held_out = np.array([run.held_out for run in runs])  # [seeds, evaluations]
            rollouts = np.mean([run.rollouts for run in runs], axis=0)
            mean, low, high = np.array([tuple(mean_interval(column)) for column in held_out.T]).T
            axis.plot(rollouts, mean, label=selector, color=color[selector])
            axis.fill_between(rollouts, low, high, color=color[selector], alpha=0.15, linewidth=0)
        axis.set(title=family, xlabel="rollouts", ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set(ylabel="held-out accuracy")
    handles = {
        label: h
        for axis in panels
        for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
