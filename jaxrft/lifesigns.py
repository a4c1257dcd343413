"""Which of a run's processes has gone, when JAX says only that a connection to it broke."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from jaxrft import witness
from jaxrft.types import InputError

BEAT = 2.0  # seconds from one sign of life to the next


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within it a process gives signs of life: it changes a file of its own in <folder>/.alive again and again.

    An error of JAX's then becomes an InputError that names the processes that have stopped doing so, if any has; a
    witness says it of a process that JAX ends.
    """
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        yield
        return
    signs, over = folder / ".alive", threading.Event()
    own = signs / f"{index}"

    def beat() -> None:
        number = 0
        while not over.wait(BEAT if number else 0):
            number += 1
            with suppress(OSError):  # such as a full disk: no sign of life is no reason to die
                signs.mkdir(exist_ok=True)
                own.write_text(str(number), encoding="utf-8")

    threading.Thread(target=beat, daemon=True).start()
    command = [sys.executable, "-m", "jaxrft.witness", str(signs), str(index), str(count)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # Ctrl-C is not for it
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if found := witness.gone(signs, count):
            raise InputError(witness.sentence(found, count)) from error
        raise
    finally:
        over.set()
        with suppress(OSError):
            child.communicate(b"over")
        with suppress(OSError):  # not empty, while others are at work
            own.unlink()
            signs.rmdir()
