"""Holds back what is printed to standard error, also by libraries that are not Python."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from jaxrft.host import signals

_one_at_a_time = threading.RLock()  # or threads would restore each other's standard error


class Held:
    """What was held back, once that is over."""

    printed: bytes = b""


@contextmanager
def held_back() -> Iterator[Held]:
    """Keeps from standard error what its body prints; sentences of `signals` come at once."""
    held = Held()
    with _one_at_a_time, tempfile.TemporaryFile() as file:
        before = _redirect(file.fileno())
        try:
            yield held
        finally:
            _restore(before)
            file.seek(0)
            held.printed = file.read()


def write(data: bytes) -> None:
    """Writes to standard error, or drops what it does not take."""
    with suppress(OSError):
        os.write(2, data)


def _redirect(file: int) -> int | None:
    """Makes standard error lead to `file`; returns where it led to, None when there is no standard
    error.
    """
    try:
        before = os.dup(2)
    except OSError:
        return None
    signals.say_to(before)
    os.dup2(file, 2)
    return before


def _restore(before: int | None) -> None:
    """Makes standard error lead where it did."""
    if before is None:
        return
    os.dup2(before, 2)
    signals.say_to(2)
    os.close(before)
