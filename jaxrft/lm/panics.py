"""Turns panics of the tokenizers library, which is written in Rust, into ordinary exceptions."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from jaxrft.host import signals

_one_at_a_time = threading.RLock()  # or threads would restore each other's standard error


class Panic(Exception):
    """Reports that a library has panicked; the message is the panic's."""


@contextmanager
def caught() -> Iterator[None]:
    """Raises Panic when its body panics, and keeps from the terminal the stack that Rust prints
    then.

    A panic is no Exception, so that `except Exception` does not see it. What else is printed to
    standard error meanwhile comes afterwards; sentences of `signals` come at once.
    """
    with _one_at_a_time, tempfile.TemporaryFile() as held:
        before = _redirect(held.fileno())
        panicked = False
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            panicked = True
            raise Panic(f"{type(error).__name__}: {error}") from None
        finally:
            _restore(before)
            held.seek(0)
            printed = held.read()
            if printed and not panicked:
                with suppress(OSError):
                    os.write(2, printed)


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
