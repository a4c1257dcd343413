"""Reports which of a run's processes has died, when JAX reports only a broken connection.

Each process rewrites a file, its heartbeat, every few seconds, and has a child process, its
monitor:

    python jaxrft/host/launch.py jaxrft.host.heartbeat FOLDER INDEX COUNT TRACEBACK

JAX ends a process by SIGABRT, with a message of its own: at once if process 0 dies, which
coordinates the others, and up to a minute after another has hung. The process cannot prevent that,
but its monitor reads from its standard input how the process ended. Where a monitor dies with its
process, as in a container, the monitors of the others report it.
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
PATIENCE = 10.0  # seconds for a monitor to end, and for JAX to end a process without process 0
MAX_BYTES = 100  # of a heartbeat
OVER = "over"  # on a monitor's standard input: the process ended by itself
# What a monitor writes in place of the last heartbeat.
KILLED = "killed"
ABORTED = "aborted"


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Keeps a heartbeat in <folder>/.alive, and a monitor, within the block.

    If other processes have died, an error becomes an InputError that names them. The monitor
    reports them where JAX ends this process. A native traceback is printed unless another process
    has died.
    """
    import jax  # here, since a monitor does not need it

    index = jax.process_index()
    count = jax.process_count()
    if count == 1:
        yield
        return
    beats = folder / ".alive"
    with _beating(beats / f"{index}"), _monitored(beats, index, count):
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a broken connection is a JaxRuntimeError or a ValueError
            died = dead_processes(beats, [other for other in range(count) if other != index])
            if not died:
                raise
            # JAX is about to end this process as well; its monitor reports the dead processes
            if 0 in died:
                time.sleep(PATIENCE)
            raise InputError(sentence(died, count)) from error


@contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Writes to the file `path` every few seconds, and deletes it in the end."""
    numbers = itertools.count(1)

    def beat() -> None:
        number = next(numbers)
        if path.parent.is_symlink():
            path.parent.unlink()
        path.parent.mkdir(exist_ok=True)
        replace_file(path, str(number), durable=False)

    try:
        with beating(beat, BEAT):
            yield
    finally:
        with suppress(OSError):  # not empty, while others are at work
            path.unlink()
            path.parent.rmdir()


@contextmanager
def _monitored(beats: Path, index: int, count: int) -> Iterator[None]:
    """Starts a monitor, to which native tracebacks are written, and tells it how the process ended.

    It always prints a native traceback that the user asked for, as with PYTHONFAULTHANDLER=1.
    """
    requested = faulthandler.is_enabled()
    arguments = (str(beats), str(index), str(count), "always" if requested else "alone")
    command = launch.command("jaxrft.host.heartbeat", *arguments)
    # Ctrl-C is not for it
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert child.stdin is not None
    # which writes when JAX aborts, and not on a kill
    faulthandler.enable(child.stdin, all_threads=requested)
    try:
        yield
    finally:
        faulthandler.disable()
        if requested:
            faulthandler.enable()
        try:
            child.communicate(OVER.encode(), timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def dead_processes(beats: Path, others: list[int]) -> list[int]:
    """Returns which of the `others` have died, by their heartbeats in the folder `beats`."""
    before = {index: _read(beats / f"{index}") for index in others}
    if killed := [index for index, beat in before.items() if beat == KILLED]:
        return killed
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


def sentence(died: list[int], count: int) -> str:
    """Formats the sentence that says which processes have died."""
    return (
        f"process {', '.join(map(str, died))} of {count} gives no sign of life any more: "
        "start all of them again to resume from the newest checkpoint"
    )


def main(folder: str, index: str, count: str, traceback: str) -> None:
    """Waits for the end of the process `index`, and reports its reason.

    `traceback`: whether a native traceback is printed "always", or "alone", when no other process
    has died.
    """
    for number in signals.numbers():  # which schedulers send to all that a job has started
        signal.signal(number, signal.SIG_IGN)
    received = sys.stdin.read()
    if received == OVER:
        return
    beats = Path(folder)
    others = [other for other in range(int(count)) if other != int(index)]
    with suppress(OSError):
        replace_file(beats / index, ABORTED if received else KILLED, durable=False)
    died = dead_processes(beats, others)
    with suppress(OSError):
        if received and (traceback == "always" or not died):
            print(received.removesuffix(OVER), file=sys.stderr)
        if died:
            print(f"jaxrft: error: {sentence(died, int(count))}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
