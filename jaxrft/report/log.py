"""metrics.jsonl: a line a step, written while the devices learn from the next one."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxrft.checkpoint import writing
from jaxrft.files import replace_file
from jaxrft.report.console import Display
from jaxrft.types import InputError

logger = logging.getLogger(__name__)


def plain(value: Any) -> float | int | str | None:
    """A JSON value of a scalar: null for NaN and infinities."""
    if isinstance(value, str):
        return value
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def read(path: Path, last: int) -> list[dict[str, Any]]:
    """The entries up to step `last`; a line torn by a kill in the middle of a write is passed over."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if entry["step"] <= last]


def _lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)


class Reporter:
    """Writes the metrics of a step when the next one is under way.

    With its first write it cuts the file back to `start`, the step that the run goes on from (-1 = afresh), so that
    each step stands there once; until then the file stays as it is. What a full disk does not take it writes later.
    """

    def __init__(self, path: Path, display: Display, *, start: int = -1, write: bool = True):
        """To `path`, if this process is the one that writes."""
        self.path, self.display, self.write = path, display, write
        self.earlier: list[dict[str, Any]] | None = read(path, start) if write else []
        self.step, self.metrics = start, {}
        self.unwritten: list[dict[str, Any]] = []
        self.trouble: InputError | None = None  # why they are
        self.without_signal = 0

    def evaluated(self, step: int) -> bool:
        """Whether the file has an evaluation of the step that the run goes on from."""
        return any(name.startswith("eval/") for e in self.earlier or () if e["step"] == step for name in e)

    def best(self, name: str) -> float:
        """The highest value of a metric at any step up to the one that the run goes on from; -infinity without any."""
        values = [entry.get(name) for entry in self.earlier or () if entry["step"] > 0]
        return max((value for value in values if value is not None), default=-math.inf)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Holds metrics of `step`, device scalars among them; more of the same step join them."""
        if step != self.step:
            self.flush()
        self.step = step
        self.metrics |= metrics

    def flush(self) -> None:
        """Writes what is held."""
        if not self.metrics:
            return
        entry = {"step": self.step} | {name: plain(value) for name, value in sorted(self.metrics.items())}
        self.metrics = {}
        if self.write:
            self.unwritten.append(entry)
            self._write()
        if "reward" in entry:
            self.display.step(self.step, entry)
            if skipped := entry.get("skipped_updates"):
                self.display.say(f"step {self.step}: {skipped:g} updates skipped, loss or gradient is not finite")
            self._say_without_signal(entry["frac_reward_zero_std"] == 1.0 and entry["grad_norm"] == 0.0)

    def check_written(self) -> None:
        """Raises InputError when the disk has not taken all."""
        if self.unwritten:
            self._write()
        if self.trouble:
            raise self.trouble

    def _write(self) -> None:
        """Writes what is unwritten, or says, once, why it cannot be."""
        try:
            with writing(self.path.parent):
                self._append() if self.earlier is None else self._replace(self.earlier)
            self.unwritten, self.trouble = [], None
        except InputError as error:
            if self.trouble is None:
                logger.warning("the metrics of step %d wait in memory, and the run goes on: %s", self.step, error)
            self.trouble = error

    def _append(self) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(self.unwritten))
        except OSError:
            os.truncate(self.path, size)  # or what is written later would join half a line
            raise

    def _replace(self, earlier: list[dict[str, Any]]) -> None:
        """Puts the unwritten entries, after the earlier ones, into a new file that takes the old one's place."""
        first, *others = self.unwritten
        if earlier and earlier[-1]["step"] == first["step"]:  # an evaluation that a stop left out
            *earlier, left = earlier
            first = dict(sorted((left | first).items(), key=lambda item: (item[0] != "step", item[0])))
        replace_file(self.path, _lines([*earlier, first, *others]))
        self.earlier = None

    def _say_without_signal(self, silent: bool) -> None:
        """Says so, at the first of several steps and then now and then, when a step had nothing to learn from."""
        self.without_signal = self.without_signal + 1 if silent else 0
        if self.without_signal % 10 == 1:
            self.display.say(
                f"step {self.step}: the rewards of every group are all equal, so that its gradient is exactly zero "
                f"({self.without_signal} such steps in a row)"
            )


class Timer:
    """Seconds between laps."""

    def __init__(self) -> None:
        """Starts."""
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends the lap `name`."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def metrics(self) -> dict[str, float]:
        """timing/<lap>, select/seconds and step_time so far."""
        found = {f"timing/{name}": seconds for name, seconds in self.laps.items()}
        return found | {"select/seconds": self.laps["select"], "step_time": self.last - self.start}
