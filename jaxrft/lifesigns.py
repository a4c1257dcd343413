"""Which of a run's processes has gone, when JAX says only that a connection to it broke."""

import faulthandler
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from jaxrft import witness
from jaxrft.host import launch
from jaxrft.host.files import replace_file
from jaxrft.types import InputError

BEAT = 2.0  # seconds from one sign of life to the next
PATIENCE = 10.0  # seconds that a witness has to end, and JAX a process without the first one


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within it a process gives signs of life: it changes a file of its own in <folder>/.alive again and again.

    An error then becomes an InputError that names the processes that have stopped doing so, if any has; a witness says
    it of a process that JAX ends.
    """
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        yield
        return
    signs = folder / ".alive"
    with _beating(signs / f"{index}"), _witnessed(str(signs), str(index), str(count)):
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a broken connection is a JaxRuntimeError or a ValueError
            found = witness.gone(signs, [other for other in range(count) if other != index])
            if not found:
                raise
            if 0 in found:  # JAX is about to end this process as well, before it could say a word; its witness can
                time.sleep(PATIENCE)
            raise InputError(witness.sentence(found, count)) from error


@contextmanager
def _beating(own: Path) -> Iterator[None]:
    """Writes to the file `own` every few seconds, and deletes it in the end."""
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(BEAT if number else 0):
            number += 1
            with suppress(OSError):  # such as a full disk: no sign of life is no reason to die
                if own.parent.is_symlink():
                    own.parent.unlink()
                own.parent.mkdir(exist_ok=True)
                replace_file(own, str(number), durable=False)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join(BEAT)
        with suppress(OSError):  # not empty, while others are at work
            own.unlink()
            own.parent.rmdir()


@contextmanager
def _witnessed(*arguments: str) -> Iterator[None]:
    """A witness beside the process, which is told how that ends."""
    command = launch.command("jaxrft.witness", *arguments)
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # Ctrl-C is not for it
    assert child.stdin is not None
    before = faulthandler.is_enabled()
    faulthandler.enable(child.stdin, all_threads=False)  # which writes when JAX aborts, and not on a kill
    try:
        yield
    finally:
        faulthandler.disable()
        if before:
            faulthandler.enable()
        try:
            child.communicate(witness.OVER.encode(), timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
