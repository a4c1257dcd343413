"""Draws runs side by side: python -m jaxrft.report.picture RUN [RUN ...] --out FILE."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrft.errors import InputError
from jaxrft.fields import path_argument
from jaxrft.report import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (  # title, how the metric's name begins and ends
    ("share of informative groups", "select/effective_group_ratio", ""),
    ("held-out accuracy, sampled", "eval/", "/avg@"),
    ("held-out accuracy, greedy", "eval/", "/greedy"),
)
WINDOW = 5  # steps of the running mean drawn over what is measured at every step


def read(run: Path) -> list[dict]:
    """Returns the records of a run's metrics.jsonl; raises InputError without any."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"no {path}: give the output_dir of a run")
    content = records.read(path)
    if not content.entries:
        raise InputError(f"{path} holds no records of steps: give the output_dir of a run")
    if content.damaged:
        print(
            f"skipping {len(content.damaged)} lines of {path} that are no records",
            file=sys.stderr,
        )
    return content.entries


def series(lines: list[dict], begin: str, end: str) -> tuple[list[int], list[float]]:
    """Collects the steps and the values of a metric.

    It is the first, by alphabet, whose name begins with `begin` and contains `end`. Those of whole
    sets come before those of domains.
    """
    names = {name for line in lines for name in line if name.startswith(begin) and end in name}
    name = min(names, key=lambda name: (name.count("/"), name), default="")
    points = [
        (line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)
    ]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float]) -> list[float]:
    """Averages each value with up to WINDOW - 1 values just before it."""
    windows = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


@contextmanager
def panels(count: int, out: str | Path, *, height: float = 3.2) -> Iterator[Sequence["Axes"]]:
    """Yields axes side by side, and writes them to `out` at the end of the block; the suffix
    chooses the format.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(11, height), constrained_layout=True)
    yield axes
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def draw(runs: list[Path], out: Path) -> None:
    """Writes the picture of `runs` to `out`."""
    with panels(len(PANELS), out) as axes:
        for run in runs:
            lines = read(run)
            for axis, (title, begin, end) in zip(axes, PANELS, strict=True):
                steps, values = series(lines, begin, end)
                mean = values if end else smooth(values)
                (line,) = axis.plot(steps, mean, label=run.name, marker="o" if end else None)
                if not end:
                    axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
                axis.set(title=title, xlabel="step", ylim=(0, 1))
        axes[0].legend(frameon=False)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command: draws the runs into a file."""
    parser = argparse.ArgumentParser(prog="python -m jaxrft.report.picture", description=__doc__)
    parser.add_argument("runs", nargs="+", type=path_argument, help="output_dir of a run")
    parser.add_argument(
        "--out", type=path_argument, required=True, help="file to write: .png, .svg or .pdf"
    )
    options = parser.parse_args(arguments)
    try:
        draw(options.runs, options.out)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
