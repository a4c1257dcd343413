"""Which of a run's processes has gone, when JAX says only that a connection to it broke."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from jaxrft.types import InputError

BEAT = 2.0  # seconds from one sign of life to the next
SILENT = 12.0  # seconds without any after which a process counts as gone


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within it a process gives signs of life: it changes a file of its own in <folder>/.alive again and again.

    An error of JAX's then becomes an InputError that names the processes that have stopped doing so, if any has.
    """
    if jax.process_count() == 1:
        yield
        return
    signs, over = folder / ".alive", threading.Event()
    own = signs / f"{jax.process_index()}"

    def beat() -> None:
        number = 0
        while not over.wait(BEAT if number else 0):
            number += 1
            with suppress(OSError):  # such as a full disk: no sign of life is no reason to die
                signs.mkdir(exist_ok=True)
                own.write_text(str(number), encoding="utf-8")

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if gone := silent(signs):
            raise InputError(
                f"process {', '.join(map(str, gone))} of {jax.process_count()} gives no sign of life any more: start "
                "all of them again, and the run goes on from the newest checkpoint"
            ) from error
        raise
    finally:
        over.set()
        with suppress(OSError):  # not empty, while others are at work
            own.unlink()
            signs.rmdir()


def silent(signs: Path) -> list[int]:
    """The processes whose file in `signs` does not change for so long."""

    def read(index: int) -> str:
        with suppress(OSError):
            return (signs / f"{index}").read_text(encoding="utf-8")
        return ""

    before = [read(index) for index in range(jax.process_count())]
    time.sleep(SILENT)
    return [index for index, sign in enumerate(before) if sign and sign == read(index)]
