"""The figures of an evaluation as a table for the console, of at most 80 columns."""

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from jaxrft.config import Config, pass_at
from jaxrft.stats import Interval
from jaxrft.train import estimates
from jaxrft.train.estimates import Trials

WIDTH = 80  # columns
NAME = 21  # columns of the longest name of a domain that is shown in full


class _Column(NamedTuple):
    """A column of the table: its heading and its entry for each row."""

    heading: str
    entries: list[str]


def table(
    sets: Mapping[str, Trials], intervals: Mapping[str, Interval], config: Config
) -> list[str]:
    """Returns the lines of the table of all sets: a row a domain, and pass@k and lengths below.

    `intervals` are those of `estimates.intervals`, `config` is that of the evaluation's sampling.
    """
    lines = []
    for name, trials in sets.items():
        rows = {name: trials, **estimates.by_domain(name, trials)}
        lines += [_title(name, trials), *_grid(_columns(name, rows, intervals))]
        if _num_samples(trials):
            lines += _wrapped(_ladder(name, trials, intervals))
            lines += _wrapped(_lengths(name, trials, intervals, config))
        lines.append("")
    return [*lines, *_wrapped(_sampling(sets, config))]


def _num_samples(trials: Trials) -> int:
    return trials.samples.success.shape[1]


def _title(name: str, trials: Trials) -> str:
    k = _num_samples(trials)
    samples = f", {k} sample{'s' * (k != 1)} each" if k else ", greedy only"
    dropped = f" ({trials.num_dropped:,} left out)" if trials.num_dropped else ""
    return f"{name}: {len(trials.greedy):,} tasks{dropped}{samples}"


def _columns(
    name: str, rows: Mapping[str, Trials], intervals: Mapping[str, Interval]
) -> list[_Column]:
    """Returns the columns of a set's table; the interval belongs to the figure before it."""
    k = _num_samples(rows[name])
    labels = [_shortened(row.removeprefix(f"{name}/")) for row in list(rows)[1:]]
    counts = [f"{len(trials.greedy):,}" for trials in rows.values()]

    def figures(kind: str) -> _Column:
        return _Column(kind, [f"{intervals[f'eval/{row}/{kind}'].mean:.3f}" for row in rows])

    def ends(kind: str) -> _Column:
        found = [intervals[f"eval/{row}/{kind}"] for row in rows]
        return _Column("95 %", [f"{each.low:.3f}-{each.high:.3f}" for each in found])

    first = [_Column("", ["all", *labels]), _Column("tasks", counts), figures("greedy")]
    if not k:
        return [*first, ends("greedy")]
    means = [intervals[f"eval/{row}/mean_length"].mean for row in rows]
    cut = [intervals[f"eval/{row}/clipped_ratio"].mean for row in rows]
    has_majority = f"eval/{name}/maj@{k}" in intervals
    return [
        *first,
        figures(f"avg@{k}"),
        ends(f"avg@{k}"),
        figures(f"pass@{k}"),
        *([figures(f"maj@{k}")] if has_majority else []),
        _Column("tokens", [f"{mean:,.0f}" for mean in means]),
        _Column("cut", [f"{share:.0%}" for share in cut]),
    ]


def _grid(columns: list[_Column]) -> list[str]:
    """Aligns the first column to the left and the others to the right.

    Two spaces are between them where the line has room, else one.
    """
    widths = [max(map(len, (column.heading, *column.entries))) for column in columns]
    table = [[column.heading for column in columns]]
    table += [list(row) for row in zip(*(column.entries for column in columns), strict=True)]
    between = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    return [
        between.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def _shortened(label: str) -> str:
    return label if len(label) <= NAME else f"{label[: NAME - 1]}."


def _ladder(name: str, trials: Trials, intervals: Mapping[str, Interval]) -> str:
    """Returns pass@k for all k, ascending."""
    figures = [
        f"pass@{k} {intervals[f'eval/{name}/pass@{k}'].mean:.3f}"
        for k in sorted(pass_at(_num_samples(trials)))
    ]
    return ", ".join(figures)


def _lengths(name: str, trials: Trials, intervals: Mapping[str, Interval], config: Config) -> str:
    mean = intervals[f"eval/{name}/mean_length"].mean
    cut = intervals[f"eval/{name}/clipped_ratio"].mean
    return (
        f"tokens: mean {mean:,.0f}, median {estimates.median_length(trials):,.0f}; {cut:.1%} of "
        f"the samples cut at max_completion_length {config.max_completion_length:,}"
    )


def _sampling(sets: Mapping[str, Trials], config: Config) -> str:
    """Says how samples were drawn; empty if there are none."""
    if not any(map(_num_samples, sets.values())):
        return ""
    shown = {"temperature": config.temperature, "top_p": config.top_p}
    others = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    values = {name: getattr(config, name) for name in others}
    shown |= {name: value for name, value in values.items() if value != others[name]}
    sampled = ", ".join(f"{name} {value:g}" for name, value in shown.items())
    return f"samples at {sampled}; intervals are of a bootstrap over tasks"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)
