"""selection.jsonl: which tasks a run chose, what was believed of them and what came out, by step.

A line is an object of a step; lists have an entry for each of BINS equal bins of believed pass
rates, from 0 to 1.

| name | meaning |
|---|---|
| `step` | the step |
| `groups` | a list, groups rolled out of tasks with such a belief |
| `believed` | a list, sums of the believed pass rates of their samples |
| `successes`, `trials` | lists, sums over their samples |
| `unknown` | groups of tasks without a belief |
| `domains` | groups by domain, where there are 2 to 32 |
| `belief` | a list, tasks of the table with such a belief after the step; in some steps only |

Reference sets are left out, since no belief chose their tasks. Nothing depends on this file but
`jaxrft report`.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrft.errors import InputError
from jaxrft.host.disk import writing
from jaxrft.host.files import JSON, UnreadableJSON, parse_json, replace_file
from jaxrft.report.log import append
from jaxrft.report.metrics import BINS, MOST_DOMAINS

logger = logging.getLogger(__name__)

FILE = "selection.jsonl"
COLUMNS = 200  # steps of a run with the belief over the table, at most
LISTS = ("groups", "believed", "successes", "trials")


class Chosen(NamedTuple):
    """Groups that were rolled out in a step; n of them."""

    pass_rate: np.ndarray  # [n] float32, believed; NaN = unknown
    successes: np.ndarray  # [n] float32
    trials: np.ndarray  # [n] float32
    domain: np.ndarray  # [n] int32, indices of names


def is_drawn(step: int, steps: int) -> bool:
    """Decides whether the belief over the table is kept after a step of a run of `steps`."""
    return step == 1 or step % -(-steps // COLUMNS) == 0


def record(step: int, chosen: Chosen, domains: Sequence[str]) -> dict[str, JSON]:
    """Returns the line of a step without `belief`."""
    known = ~np.isnan(chosen.pass_rate)
    believed = chosen.pass_rate[known]
    bins = np.minimum((believed * BINS).astype(int), BINS - 1)
    trials = chosen.trials[known]
    weights = (np.ones(len(bins)), believed * trials, chosen.successes[known], trials)
    lists = {
        name: list(map(_short, np.bincount(bins, weight, minlength=BINS).tolist()))
        for name, weight in zip(LISTS, weights, strict=True)
    }
    entry: dict[str, JSON] = {"step": step} | lists | {"unknown": int((~known).sum())}
    if 1 < len(domains) <= MOST_DOMAINS:
        counts = np.bincount(chosen.domain, minlength=len(domains)).tolist()
        entry["domains"] = dict(zip(domains, counts, strict=True))
    return entry


def _short(value: float) -> float | int:
    """Rounds to four digits; 8 is shorter than 8.0."""
    return int(value) if float(value).is_integer() else round(value, 4)


class SelectionLog:
    """Appends a line a step.

    With its first write it cuts the file back to the step that the run resumes from. A line that
    cannot be written, as on a full disk, is left out; the first is a warning.
    """

    def __init__(self, run: Path, start: int) -> None:
        """Writes nothing yet; `start` is the number of steps done."""
        self.path = run / FILE
        self.start: int | None = start
        self.failed = False

    def write(self, entry: dict[str, JSON]) -> None:
        """Writes the line of a step."""
        try:
            with writing(self.path.parent):
                if self.start is not None:
                    earlier = [each for each in read(self.path) if each["step"] <= self.start]
                    replace_file(self.path, _lines(earlier))
                    self.start = None
                append(self.path, _lines([entry]).encode())
        except InputError as error:
            if not self.failed:
                logger.warning(
                    "step %d is missing in %s, and the run goes on: %s",
                    entry["step"],
                    self.path,
                    error,
                )
            self.failed = True


def _lines(entries: list[dict[str, JSON]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def read(path: Path) -> list[dict[str, JSON]]:
    """Reads the valid lines of a selection.jsonl, one object a step; none if there is no file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [entry for line in lines if (entry := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, JSON] | None:
    try:
        entry = parse_json(line, dict)
    except UnreadableJSON:
        return None
    lists = [entry.get(name) for name in LISTS]
    if "belief" in entry:
        lists.append(entry["belief"])
    fits = type(entry.get("step")) is int and isinstance(entry.get("unknown"), int)
    domains = entry.get("domains", {})
    fits = fits and isinstance(domains, dict) and all(map(_is_number, domains.values()))
    return entry if fits and all(map(_is_histogram, lists)) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_histogram(value: object) -> bool:
    return isinstance(value, list) and len(value) == BINS and all(map(_is_number, value))
