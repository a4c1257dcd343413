"""Asks a run by a signal to stop when it can be resumed."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxrft.host import signals


class Stopped(Exception):
    """A signal has come during work that the resumed run repeats."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that checks whether a signal of `signals.to_save` has come; a second Ctrl-C
    ends a command at once, and raises KeyboardInterrupt in other programs.
    """
    received: list[int] = []

    def record(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            if signals.are_watched():
                signals.leave_again(number)
            raise KeyboardInterrupt
        received.append(number)

    # Python delivers signals to the main thread only
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, record) for number in signals.to_save()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
