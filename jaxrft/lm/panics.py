"""Turns panics of the tokenizers library, which is written in Rust, into ordinary exceptions."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxrft.host import stderr


class Panic(Exception):
    """Reports that a library has panicked; the message is the panic's."""


@contextmanager
def caught() -> Iterator[None]:
    """Raises Panic when its body panics, and keeps from the terminal the stack that Rust prints
    then.

    A panic is no Exception, so that `except Exception` does not see it. What else is printed to
    standard error meanwhile comes afterwards; sentences of `signals` come at once.
    """
    held = stderr.Held()
    panicked = False
    try:
        with stderr.held_back() as held:
            yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        panicked = True
        raise Panic(f"{type(error).__name__}: {error}") from None
    finally:
        if not panicked:
            stderr.write(held.printed)
