"""Turns panics of the tokenizers library, which is written in Rust, into ordinary exceptions."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Panic(Exception):
    """Reports that a library has panicked; the message is the panic's."""


@contextmanager
def caught() -> Iterator[None]:
    """Raises Panic when its body panics, and keeps from the terminal what Rust prints then, a stack.

    A panic is no Exception, so that `except Exception` does not see it. All that is printed to standard error
    meanwhile comes afterwards, unless there was a panic.
    """
    panicked = False
    with tempfile.TemporaryFile() as held:
        before = _redirect(held.fileno())
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            panicked = True
            raise Panic(f"{type(error).__name__}: {error}") from None
        finally:
            if before is not None:
                os.dup2(before, 2)
                os.close(before)
            held.seek(0)
            if not panicked and (printed := held.read()):
                with suppress(OSError):
                    os.write(2, printed)


def _redirect(file: int) -> int | None:
    """Makes standard error lead to `file`; returns what it led to, None when there is no standard error."""
    try:
        before = os.dup(2)
    except OSError:
        return None
    os.dup2(file, 2)
    return before
