"""Asks a run to stop by a signal, at a place where it may."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxrft.host import signals


class Stopped(Exception):
    """A signal has come while something is done that the run which goes on from here does anew."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Sets a flag, which the value tells, on the signals of `signals.to_save`; a second Ctrl-C
    interrupts at once.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    # Python delivers signals to the main thread only
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in signals.to_save()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
