"""metrics.jsonl: a line a step, written while the devices learn from the next one."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrft.host.disk import writing
from jaxrft.host.files import JSON, open_regular, replace_file
from jaxrft.host.multihost import on_host0
from jaxrft.report import records
from jaxrft.report.console import Display
from jaxrft.types import InputError

logger = logging.getLogger(__name__)

WAITING = 10_000  # entries that wait in memory at most, 20 MB of those of an ordinary run


def plain(value: Any) -> float | int | str | None:
    """Converts a scalar to a JSON value: null for NaN and infinities."""
    if isinstance(value, str):
        return value
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def _lines(entries: list[dict[str, JSON]]) -> str:
    return "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)


class Reporter:
    """Writes the metrics of a step when the next one is under way.

    With its first write it cuts the file back to `start`, the step that the run resumes from (-1 =
    afresh), so that each step stands there once; until then the file stays as it is. Lines that are
    no records then move to another file, `metrics.jsonl.damaged`. Entries that cannot be written,
    as on a full disk, or while something else has the name of the file, wait in memory, at most
    WAITING of them, and are written later. A file that was removed is begun anew.
    """

    def __init__(
        self,
        path: Path,
        display: Display,
        *,
        start: int = -1,
        write: bool = True,
        track: Callable[[int, dict[str, JSON]], None] = lambda step, entry: None,
    ):
        """Opens the log at `path`, if this process is the one that writes; raises InputError if it
        cannot be read.

        `track` gets every entry that is written.
        """
        read = (
            on_host0(lambda: records.read(path, start))
            if write or jax.process_count() > 1
            else None
        )
        self.path = path
        self.display = display
        self.write = write
        self.track = track
        self.earlier: list[dict[str, JSON]] | None = read.entries if read else []
        self.damaged: list[bytes] = read.damaged if read else []
        self.step = start
        self.metrics = {}
        self.newest: dict[str, JSON] = {}  # what was written last
        self.unwritten: list[dict[str, JSON]] = []
        self.dropped: list[int] = []  # steps for which there was no more room in memory
        self.trouble = ""  # why they are
        self.size = 0  # of the file after the last write
        self.without_signal = 0
        if read:
            self._warn_of_damage(read.entries, start)

    def _warn_of_damage(self, entries: list[dict[str, JSON]], start: int) -> None:
        """Warns of the number of lines that are no records, and of steps without one."""
        if self.damaged:
            target = _damaged(self.path)
            logger.warning(
                "%d lines of %s are no records: the next write moves them to %s",
                len(self.damaged),
                self.path,
                target,
            )
        known = {entry["step"] for entry in entries}
        if missing := [step for step in range(1, start + 1) if step not in known]:
            steps = records.spans(missing)
            logger.warning(
                "%s has no record of %s any more, nor of evaluations there: the run continues",
                self.path,
                steps,
            )

    def evaluated(self, step: int) -> bool:
        """Checks whether the file has an evaluation of `step`, from which the run resumes."""
        return any(
            name.startswith("eval/") for e in self.earlier or () if e["step"] == step for name in e
        )

    def best(self, name: str) -> tuple[float, int]:
        """Finds the highest value of a metric at steps from 1 to the one that the run resumes from,
        and the first step that has it.

        Returns (-infinity, 0) if the metric has no value.
        """
        values = [(entry.get(name), entry["step"]) for entry in self.earlier or ()]
        known = [
            (value, step) for value, step in values if step > 0 and isinstance(value, int | float)
        ]
        return max(known, key=lambda pair: pair[0], default=(-math.inf, 0))

    def add(self, step: int, metrics: Mapping[str, object]) -> None:
        """Collects metrics of `step`, which may be device scalars; another step flushes them."""
        if step != self.step:
            self.flush()
        self.step = step
        self.metrics |= metrics

    def evaluations_after(self, step: int, name: str) -> int:
        """Counts the steps after `step` that have a metric, up to the one that the run resumes
        from.
        """
        return sum(entry["step"] > step and name in entry for entry in self.earlier or ())

    def flush(self) -> None:
        """Writes the metrics that `add` has collected of a step."""
        if not self.metrics:
            return
        entry = {"step": self.step} | {
            name: plain(value) for name, value in sorted(self.metrics.items())
        }
        self.metrics = {}
        self.newest = entry
        if self.write:
            self.unwritten.append(entry)
            self._write()
            self.track(self.step, entry)
        if "reward" in entry:
            self.display.step(self.step, entry)
            if skipped := entry.get("skipped_updates"):
                self.display.say(
                    f"step {self.step}: {skipped:g} updates skipped, loss or gradient is not finite"
                )
            self._say_without_signal(
                entry["frac_reward_zero_std"] == 1.0 and entry["grad_norm"] == 0.0
            )

    def check_written(self) -> None:
        """Raises InputError when metrics are not written, after one more try."""
        if self.unwritten:
            self._write()
        if lost := self.dropped + [entry["step"] for entry in self.unwritten]:
            raise InputError(
                f"the metrics of {records.spans(lost)} are lost, since they could not be "
                f"written: {self.trouble}"
            )

    def _write(self) -> None:
        """Writes what is unwritten, or says, once, why it cannot be."""
        try:
            with writing(self.path.parent):
                self._append() if self.earlier is None else self._replace(self.earlier)
            self.unwritten = []
            self.trouble = "" if not self.dropped else self.trouble
        except InputError as error:
            if not self.trouble:
                logger.warning(
                    "the metrics of step %d wait in memory, and the run continues: %s",
                    self.step,
                    error,
                )
            self.trouble = str(error)
            self.dropped += [entry["step"] for entry in self.unwritten[:-WAITING]]
            self.unwritten = self.unwritten[-WAITING:]

    def _append(self) -> None:
        before = self.path.lstat().st_size if os.path.lexists(self.path) else 0
        size = append(self.path, _lines(self.unwritten).encode())
        if before < self.size:
            logger.warning(
                "%s was removed, emptied or cut from outside: it continues with step %d, "
                "and what it had is lost",
                self.path,
                self.unwritten[0]["step"],
            )
        self.size = size

    def _replace(self, earlier: list[dict[str, JSON]]) -> None:
        """Writes the earlier and the unwritten entries to a file that replaces the old one."""
        if self.damaged:
            append(_damaged(self.path), b"".join(line + b"\n" for line in self.damaged))
            self.damaged = []
        first, *others = self.unwritten
        if earlier and earlier[-1]["step"] == first["step"]:  # an evaluation that a stop left out
            *earlier, last = earlier
            first = dict(
                sorted((last | first).items(), key=lambda item: (item[0] != "step", item[0]))
            )
        content = _lines([*earlier, first, *others]).encode()
        replace_file(self.path, content)
        self.earlier = None
        self.size = len(content)

    def _say_without_signal(self, silent: bool) -> None:
        """Reports a step without a training signal.

        Of several such steps in a row it reports the first, and then every tenth.
        """
        self.without_signal = self.without_signal + 1 if silent else 0
        if self.without_signal % 10 == 1:
            self.display.say(
                f"step {self.step}: the rewards of every group are all equal, so that its "
                f"gradient is exactly zero ({self.without_signal} such steps in a row)"
            )


def _damaged(path: Path) -> Path:
    """Returns where the lines of `path` that are no records are kept."""
    return path.with_name(f"{path.name}.damaged")


def append(path: Path, data: bytes) -> int:
    """Appends lines to a file, which is made if need be, or leaves it as it is; returns its size.

    Raises OSError, also for a link and for what is no file. A last line without its end gets one.
    """
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            rest = data
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.truncate(descriptor, size)  # or what is written later would join half a line
            raise
    finally:
        os.close(descriptor)
    return size + len(data)


class Timer:
    """Seconds between laps."""

    def __init__(self) -> None:
        """Starts."""
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends the lap `name`."""
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now

    def metrics(self) -> dict[str, float]:
        """Collects timing/<lap>, select/seconds and step_time so far."""
        laps = {f"timing/{name}": seconds for name, seconds in self.laps.items()}
        return laps | {"select/seconds": self.laps["select"], "step_time": self.last - self.start}
