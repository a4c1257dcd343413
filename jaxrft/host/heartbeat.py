"""Says which of a run's processes has died, when JAX says only that a connection to it broke.

Each process changes a file of its own, its heartbeat, again and again, and has a child, its
witness:

    python jaxrft/host/launch.py jaxrft.host.heartbeat FOLDER OWN COUNT TRACEBACK

JAX ends a process by SIGABRT and in words of its own: at once if the first of all dies, which
coordinates them, and up to a minute after another has hung. Nothing in a process can answer that,
but what it leaves on the standard input of its witness tells how it ended. Where a witness dies
with its process, as in a container, those of the others speak.
"""

import faulthandler
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxrft.errors import InputError
from jaxrft.host import launch, signals
from jaxrft.host.files import read_regular, replace_file
from jaxrft.host.lock import beating

BEAT = 2.0  # seconds from one heartbeat to the next
SILENT = 12.0  # seconds without a new heartbeat after which a process counts as dead
PATIENCE = 10.0  # seconds that a witness has to end, and JAX a process without the first one
MAX_BYTES = 100  # of a heartbeat
OVER = "over"  # on a witness's standard input: the process ended by itself
# What a witness leaves in the place of the last heartbeat.
KILLED = "killed"
ABORTED = "aborted"


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Keeps a heartbeat in <folder>/.alive, and a witness, within the block.

    An error then becomes an InputError that names the processes that have died, if any has. The
    witness says so where JAX ends this process. A native traceback stays what it is unless another
    process has died.
    """
    import jax  # here, since a witness needs none

    index = jax.process_index()
    count = jax.process_count()
    if count == 1:
        yield
        return
    beats = folder / ".alive"
    with _beating(beats / f"{index}"), _witnessed(beats, index, count):
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a broken connection is a JaxRuntimeError or a ValueError
            found = dead(beats, [other for other in range(count) if other != index])
            if not found:
                raise
            # JAX is about to end this process as well, before it could say a word; its witness can
            if 0 in found:
                time.sleep(PATIENCE)
            raise InputError(sentence(found, count)) from error


@contextmanager
def _beating(own: Path) -> Iterator[None]:
    """Writes to the file `own` every few seconds, and deletes it in the end."""
    numbers = itertools.count(1)

    def beat() -> None:
        number = next(numbers)
        if own.parent.is_symlink():
            own.parent.unlink()
        own.parent.mkdir(exist_ok=True)
        replace_file(own, str(number), durable=False)

    try:
        with beating(beat, BEAT):
            yield
    finally:
        with suppress(OSError):  # not empty, while others are at work
            own.unlink()
            own.parent.rmdir()


@contextmanager
def _witnessed(beats: Path, index: int, count: int) -> Iterator[None]:
    """Starts a witness, to which native tracebacks are written, and tells it how the process ended.

    A native traceback that the user asked for, as with PYTHONFAULTHANDLER=1, it prints in any case.
    """
    asked = faulthandler.is_enabled()
    arguments = (str(beats), str(index), str(count), "always" if asked else "alone")
    command = launch.command("jaxrft.host.heartbeat", *arguments)
    # Ctrl-C is not for it
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert child.stdin is not None
    # which writes when JAX aborts, and not on a kill
    faulthandler.enable(child.stdin, all_threads=asked)
    try:
        yield
    finally:
        faulthandler.disable()
        if asked:
            faulthandler.enable()
        try:
            child.communicate(OVER.encode(), timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def dead(beats: Path, others: list[int]) -> list[int]:
    """Returns which of the `others` have died, by their heartbeats in the folder `beats`."""
    before = {index: _read(beats / f"{index}") for index in others}
    if found := [index for index, beat in before.items() if beat == KILLED]:
        return found
    time.sleep(SILENT)
    after = {index: _read(beats / f"{index}") for index in others}
    return [
        index
        for index in others
        if after[index] == KILLED or before[index] == after[index] not in ("", ABORTED)
    ]


def _read(beat: Path) -> str:
    """Returns a heartbeat; an empty text for none."""
    with suppress(OSError):
        return read_regular(beat, MAX_BYTES, flags=os.O_RDONLY | os.O_NOFOLLOW).decode(
            errors="replace"
        )
    return ""


def sentence(found: list[int], count: int) -> str:
    """Formats the sentence that says which processes have died."""
    return (
        f"process {', '.join(map(str, found))} of {count} gives no sign of life any more: "
        "start all of them again, and "
        "the run goes on from the newest checkpoint"
    )


def main(folder: str, own: str, count: str, traceback: str) -> None:
    """Waits for the end of the process `own`, and looks for a reason.

    `traceback`: whether a native traceback is printed "always", or "alone", when no other process
    has died.
    """
    for number in signals.numbers():  # which schedulers send to all that a job has started
        signal.signal(number, signal.SIG_IGN)
    said = sys.stdin.read()
    if said == OVER:
        return
    beats = Path(folder)
    others = [index for index in range(int(count)) if index != int(own)]
    with suppress(OSError):
        replace_file(beats / own, ABORTED if said else KILLED, durable=False)
    found = dead(beats, others)
    with suppress(OSError):
        if said and (traceback == "always" or not found):
            print(said.removesuffix(OVER), file=sys.stderr)
        if found:
            print(f"jaxrft: error: {sentence(found, int(count))}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
