"""The process between the trainer and a worker: whichever way either ends, nothing that grading started remains.

On Linux the warden inherits the orphans of all its descendants, sessions of their own included, so that killing its
children until it has none reaches every process; the kernel tells it of the trainer's death. Elsewhere it kills the
worker's process group when it is told to end or the worker does.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from jaxrft import signals

# What ends a warden. Not SIGTERM or SIGHUP, which a whole job may get: the trainer has a step to finish and to save.
END = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def guard(trainer: int, wire: int) -> None:
    """Forks. Returns in the child, the worker; the parent becomes its warden, lets go of `wire` and never returns.

    END, and on Linux the trainer's death, end the warden and all below it; SIGTERM, SIGHUP and Ctrl-C do nothing to
    either.
    Call it with one thread.
    """
    warden = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    die_with(trainer, END)
    for number in signals.numbers():
        signal.signal(number, _pass)
    worker = os.fork()
    if worker == 0:
        die_with(warden, signal.SIGKILL)
        return
    os.close(wire)

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)

    signal.signal(END, end)
    if os.getppid() != trainer:
        end(END, None)
    with suppress(ChildProcessError):
        while os.wait()[0] != worker:
            pass
    _kill_children()
    os.killpg(0, signal.SIGKILL)  # where orphans are not inherited, and the warden itself


def _pass(number: int, frame: FrameType | None) -> None:
    """Does nothing; unlike SIG_IGN it is not handed down to the programs that graders start."""


def die_with(parent: int, number: signal.Signals) -> None:
    """Has Linux send this process a signal when its parent dies; elsewhere a closed wire must end it."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _kill_children() -> None:
    """Kills the children, then those that they leave behind, until there are none."""
    while children := list(_children()):
        for child in children:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        for _ in children:
            with suppress(ChildProcessError):
                os.wait()


def _children() -> Iterator[int]:
    """The processes whose parent is this one, where there is a /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                yield int(stat.parent.name)
