"""Reads metrics.jsonl, of which any line may be damaged."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxrft.errors import InputError
from jaxrft.host.files import JSON, UnreadableJSON, open_regular, parse_json

LARGEST = 3.4028235e38  # the largest number of float32
MAX_SPANS = 5  # of steps in one sentence
MAX_LINE = 1 << 20  # bytes; a line of a run with 1,000 domains has about 100 kB


class Records(NamedTuple):
    """The content of a metrics.jsonl."""

    entries: list[dict[str, JSON]]  # in the order of the file
    damaged: list[bytes]  # lines that are no records


def read(path: Path, last: float = math.inf) -> Records:
    """Reads the records of all steps up to `last`; a file that is not there has none.

    A record is a line that holds an object of numbers, texts and nulls, among them a whole number
    `step`. A last line without its end is neither a record nor damaged: a kill in the middle of a
    write leaves one. Raises InputError for what cannot be opened as a file.
    """
    entries = []
    damaged = []
    for line in _lines(path):
        entry = _parse(line)
        if entry is None:
            damaged.append(line)
        elif entry["step"] <= last:
            entries.append(entry)
    return Records(entries, damaged)


def _lines(path: Path) -> Iterator[bytes]:
    """Yields the lines that have an end, without it; longer ones than MAX_LINE in pieces."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while (line := file.readline(MAX_LINE)).endswith(b"\n") or len(line) == MAX_LINE:
                yield line.removesuffix(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): move it away") from error


def _parse(line: bytes) -> dict[str, JSON] | None:
    """Returns the record in a line, None if there is none."""
    try:
        entry = parse_json(line, dict)
    except UnreadableJSON:
        return None
    fits = type(entry.get("step")) is int and entry["step"] >= 0
    return entry if fits and all(map(_is_value, entry.values())) else None


def _is_value(value: object) -> bool:
    """Returns whether a value is null, a text, or a number that float32 can hold, which no metric
    exceeds.
    """
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, int | float) and abs(value) <= LARGEST)
    )


def spans(steps: list[int]) -> str:
    """Returns the steps, which ascend, as a phrase.

    >>> spans([1, 2, 3, 7])
    'steps 1 to 3, 7'
    """
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], step]
        else:
            runs.append([step])
    phrases = [" to ".join(map(str, run)) for run in runs[:MAX_SPANS]]
    if len(runs) > MAX_SPANS:
        phrases.append(f"and others up to {steps[-1]}")
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(phrases)
