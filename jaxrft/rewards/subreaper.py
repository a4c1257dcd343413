"""The process between the trainer and a worker: when either ends, in whatever way, it kills every
process that grading started.

On Linux it is the subreaper (prctl(2), PR_SET_CHILD_SUBREAPER) of all its descendants, sessions of
their own included: the kernel makes each orphan among them its child. A subreaper without children
has therefore no descendant. It freezes them before it kills them, so that none can start another
meanwhile, and repeats both until it has no child. Elsewhere it kills the worker's process group.

The number of processes is not limited: RLIMIT_NPROC counts all processes of the user, those of
other jobs included, and does not hold for root; a control group is rarely there to be written. A
grader that kills its subreaper escapes.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType

from jaxrft.host import signals

# The signal that ends a subreaper. Not SIGTERM or SIGHUP, which schedulers send to all processes of
# a job: the trainer has a step to finish and to save.
END = signal.SIGUSR2
# for the last descendant to be frozen; afterwards each is killed when it is seen
FREEZE_SECONDS = 3.0
SWEEP_SECONDS = 8.0  # for all of them to be gone, less than the trainer waits for a subreaper
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def guard(trainer: int, wire: int) -> None:
    """Forks. Returns in the child, the worker; the parent becomes its subreaper, closes `wire` and
    never returns.

    END, and on Linux the trainer's death, end the subreaper and all its descendants; SIGTERM,
    SIGHUP and Ctrl-C do nothing to either. Call it with one thread.
    """
    subreaper = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    die_with(trainer, END)
    for number in signals.numbers():
        signal.signal(number, _pass)
    worker = os.fork()
    if worker == 0:
        die_with(subreaper, signal.SIGKILL)
        # multiprocessing ends its processes with SIGTERM; one that comes in between is held
        os.register_at_fork(
            before=_block_signals, after_in_child=_obey_signals, after_in_parent=_unblock_signals
        )
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
    signal.signal(END, _pass)  # the number of the worker may be another process' now
    _end_descendants()
    os.killpg(0, signal.SIGKILL)  # where orphans are not inherited, and the subreaper itself


def _pass(number: int, frame: FrameType | None) -> None:
    """Does nothing; unlike SIG_IGN it is not handed down to the programs that graders start."""


def _obey_signals() -> None:
    """Lets signals that do nothing to the worker end what it forks, as they end the programs that
    it starts.
    """
    for number in signals.numbers():
        if signal.getsignal(number) is _pass:
            signal.signal(number, signal.SIG_DFL)
    _unblock_signals()


def _block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.numbers())


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.numbers())


def die_with(parent: int, number: signal.Signals) -> None:
    """Has Linux send this process a signal when its parent dies; elsewhere a closed wire must end
    it.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_descendants() -> None:
    """Kills all descendants; gives up, and says so, after SWEEP_SECONDS.

    Each sweep sends SIGSTOP to every descendant, parents first. When a sweep finds only processes
    that an earlier one has stopped, none is left that could start another, and all are killed. The
    dead are reaped, since they would slow down the next sweep.
    """
    with suppress(OSError):
        os.nice(-20)  # root's subreaper does not wait for its turn among thousands of processes
    start = time.monotonic()
    stopped: set[int] = set()
    while _has_children():
        seconds = time.monotonic() - start
        if seconds > SWEEP_SECONDS:
            print(
                f"processes that a reward started cannot be killed: {sorted(stopped)}",
                file=sys.stderr,
                flush=True,
            )
            return
        descendants = _signal_descendants(signal.SIGSTOP)
        if descendants <= stopped or seconds > FREEZE_SECONDS:
            _signal_descendants(signal.SIGKILL)
            time.sleep(0.001)  # for the kernel to take them down
        stopped = descendants


def _has_children() -> bool:
    """Reaps dead children and checks whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _signal_descendants(number: signal.Signals) -> set[int]:
    """Sends a signal to all descendants, parents first, and returns their process ids."""
    descendants: set[int] = set()
    parents = [os.getpid()]
    while parents:
        for child in _children(parents.pop()):
            if child in descendants:
                continue
            with suppress(ProcessLookupError, PermissionError):
                os.kill(child, number)
            descendants.add(child)
            parents.append(child)
    return descendants


def _children(parent: int) -> Iterator[int]:
    """Yields the processes whose parent is `parent`, where there is a /proc."""
    if not os.path.exists("/proc/thread-self/children"):  # a kernel without CONFIG_PROC_CHILDREN
        yield from _children_by_scan(parent)
        return
    for thread in _names(f"/proc/{parent}/task"):
        with suppress(OSError):  # it is gone
            with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                yield from map(int, file.read().split())


def _children_by_scan(parent: int) -> Iterator[int]:
    """Yields the processes whose parent is `parent`, by a scan of every process of the machine.

    The scan takes a hundred times as long as a read of the parent's list.
    """
    for process in filter(str.isdigit, _names("/proc")):
        with (
            suppress(OSError),
            open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file,
        ):
            if int(file.read().rpartition(")")[2].split()[1]) == parent:
                yield int(process)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
