"""Reads the folders of runs, and groups those that differ in their seeds only."""

import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrft.config import flat
from jaxrft.host.files import JSON, UnreadableJSON, read_json
from jaxrft.report import completions, selection
from jaxrft.report.picture import read as read_records
from jaxrft.stats import mean_interval

# Fields in which the runs of a group may differ, beside the seed: they change no number.
FREE = ("output_dir", "report_to", "keep_checkpoints", "save_steps", "chat_template_date", "resume")


class Run(NamedTuple):
    """What is in the folder of a run."""

    name: str
    folder: Path
    records: list[dict[str, JSON]]  # of metrics.jsonl, in the order of the steps
    choices: list[dict[str, JSON]]  # of selection.jsonl
    config: dict[str, JSON]  # by dotted field; {} if it is unknown
    versions: dict[str, JSON]


class Group(NamedTuple):
    """Runs that differ in their seeds only."""

    name: str
    runs: tuple[Run, ...]


class Curve(NamedTuple):
    """A metric of a group at n points: the mean of its runs, and a 95 % interval."""

    x: list[float]
    mean: list[float]
    low: list[float]  # of several runs, else []
    high: list[float]


def open_run(folder: Path) -> Run:
    """Reads a run; raises InputError if the folder has no metrics."""
    records = sorted(read_records(folder), key=lambda entry: entry["step"])
    choices = selection.read(folder / selection.FILE)
    config = flat(_json(folder / "config.json"))
    name = Path(os.path.abspath(folder)).name
    return Run(name, folder, records, choices, config, _json(folder / "versions.json"))


def _json(path: Path) -> dict[str, JSON]:
    try:
        return read_json(path, dict)
    except (OSError, UnreadableJSON):
        return {}


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs; those of one name are named by their paths."""
    runs = [open_run(folder) for folder in folders]
    names = Counter(run.name for run in runs)
    return [run._replace(name=str(run.folder)) if names[run.name] > 1 else run for run in runs]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups the runs whose configs are known and equal but for the seed and FREE fields."""
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        fixed = {name: x for name, x in run.config.items() if name not in ("seed", *FREE)}
        key = repr(sorted(fixed.items())) if fixed else run.name
        by_config.setdefault(key, []).append(run)
    return [Group(_name(members), tuple(members)) for members in by_config.values()]


def _name(runs: list[Run]) -> str:
    """Names a group of runs by the common beginning of their names and their number."""
    if len(runs) == 1:
        return runs[0].name
    common = os.path.commonprefix([run.name for run in runs]).rstrip("-_. ")
    common = common.removesuffix("seed").rstrip("-_. ") or runs[0].name
    return f"{common} ({len(runs)} seeds)"


def numbers(run: Run, name: str) -> dict[int, float]:
    """Returns {step: value} of a metric, without steps at which it does not exist."""
    found = {entry["step"]: entry.get(name) for entry in run.records}
    return {step: float(x) for step, x in found.items() if isinstance(x, int | float)}


def positions(run: Run, axis: str) -> dict[int, float]:
    """Returns {step: position} on an axis: steps, rollouts, tokens or seconds.

    Seconds are those of the training steps, without evaluations and the start.
    """
    steps = [entry["step"] for entry in run.records]
    if axis == "steps":
        return {step: float(step) for step in steps}
    if axis == "seconds":
        seconds = numbers(run, "step_time")
        total = np.cumsum([seconds.get(step, 0.0) for step in steps])
        return dict(zip(steps, total.tolist(), strict=True))
    counted = numbers(run, {"rollouts": "rollouts", "tokens": "num_tokens"}[axis])
    return {0: 0.0} | counted


def curve(group: Group, metric: str, axis: str, *, window: int = 1) -> Curve:
    """Returns a metric of a group at the steps that all of its runs have.

    Before, each run is smoothed by a running mean over `window` points.
    """
    values = [_smooth(numbers(run, metric), window) for run in group.runs]
    places = [positions(run, axis) for run in group.runs]
    shared = set.intersection(*(set(x) for x in (*values, *places)))
    result = Curve([], [], [], [])
    for step in sorted(shared):
        result.x.append(float(np.mean([place[step] for place in places])))
        interval = mean_interval([value[step] for value in values])
        result.mean.append(interval.mean)
        if len(values) > 1:
            result.low.append(interval.low)
            result.high.append(interval.high)
    return result


def _smooth(values: dict[int, float], window: int) -> dict[int, float]:
    """Averages each value with up to `window` - 1 values before it."""
    result = {}
    recent: deque[float] = deque(maxlen=window)
    for step in sorted(values):
        recent.append(values[step])
        result[step] = sum(recent) / len(recent)
    return result


def metric_names(runs: Sequence[Run], prefix: str, suffix: str = "") -> list[str]:
    """Lists the metrics of any of the runs whose names begin and end in this way."""
    names = {name for run in runs for entry in run.records for name in entry}
    return sorted(name for name in names if name.startswith(prefix) and name.endswith(suffix))


def samples(run: Run) -> list[dict[str, JSON]]:
    """Returns the completions of the last step that has some in the run's folder."""
    paths = completions.saved(run.folder)
    if not paths:
        return []
    last = completions.step_of(paths[-1])
    rows: list[dict[str, JSON]] = []
    for path in paths:
        if completions.step_of(path) == last:
            try:
                rows += pq.read_table(path).to_pylist()
            except (OSError, pa.ArrowInvalid):
                continue  # a file that is damaged
    return rows
