"""Ends the process with one sentence when a signal comes before there is a state to save.

Imports only modules that Python itself has loaded at its start: a Ctrl-C may come while JAX is
being imported, and then ends in a stack trace unless `leave_early` was called before.
"""

import _thread
import os
import signal
import time
from types import FrameType

# To add a signal, name it here; `to_save` lists those that save once a run has begun.
ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
GRACE = 3.0  # seconds
_patience = [0.0]  # seconds between the sentence and the end
_leaving = _thread.RLock()  # held by the thread that ends the process
_says_so: list[bool] = []  # not empty once that thread has said its sentence
_watched: list[bool] = []  # not empty once a thread receives signals
_standard_error = 2
_CLEAR_LINE = b"\r\x1b[2K"
_SHOW_CURSOR = b"\x1b[?25h"


def open_descriptors() -> None:
    """Opens those of the descriptors 0, 1 and 2 that the process was started without.

    Otherwise the next file that is opened takes the number, and what prints to standard output
    writes into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one


def say_to(descriptor: int) -> None:
    """Has sentences written to another descriptor, while what is printed to standard error is held
    back.
    """
    global _standard_error
    _standard_error = descriptor


def leave_early() -> None:
    """Makes every signal of ENDING end the process at once, until another handler is set.

    Python runs handlers between two of its instructions, which may take minutes while XLA compiles.
    Therefore a thread receives signals, too; it also ends the process at a second Ctrl-C, whatever
    the handler is. A signal that is ignored stays ignored, as under `nohup`. Call it once, from
    the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    for number in numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    _thread.start_new_thread(_watch, (reader,))
    _watched.append(True)


def are_watched() -> bool:
    """Checks whether `leave_early` was called, so that a second Ctrl-C ends the process."""
    return bool(_watched)


def leave_to_kernel() -> None:
    """Gives every signal of ENDING its default action again, for the end of the process when all is
    done.
    """
    for number in numbers():
        if signal.getsignal(number) is leave:
            signal.signal(number, signal.SIG_DFL)


def leave_last() -> None:
    """Makes this process say its sentence at once, and end GRACE seconds later.

    It is for the first of several processes: JAX aborts the others, with a stack trace, as soon as
    that has gone.
    """
    _patience[0] = GRACE


def leave(number: int, _: FrameType | None = None) -> None:
    """Handles a signal: ends the process with a sentence and the exit code 128 + number; it is safe
    in any thread.
    """
    _end(number, "with nothing to save; run the same command again")


def leave_again(number: int) -> None:
    """Ends the process at a second Ctrl-C; it is safe in any thread.

    Nothing is unwound: XLA may still compute in other threads, which end with it.
    """
    _end(
        number,
        "for the second time, without saving; the same command resumes from what was saved last",
    )


def _end(number: int, what: str) -> None:
    while not _leaving.acquire(blocking=False):
        time.sleep(1)  # another thread ends the process, and this one must not get in its way
    if _says_so:
        return  # a handler that interrupts the sleep below
    _says_so.append(True)
    _show_cursor()
    _say(f"stopped by {signal.Signals(number).name} {what}")
    time.sleep(_patience[0])
    os._exit(128 + number)


def _say(sentence: str) -> None:
    """Writes a sentence, on a terminal in place of the line that shows the progress."""
    try:
        clear = _CLEAR_LINE if os.isatty(_standard_error) else b""
        os.write(_standard_error, clear + f"jaxrft: {sentence}\n".encode())
    except OSError:
        pass  # the terminal is gone


def _show_cursor() -> None:
    """Shows the cursor of a terminal again, which the display of the progress hides."""
    for descriptor in (1, _standard_error):
        try:
            if os.isatty(descriptor):
                os.write(descriptor, _SHOW_CURSOR)
                return
        except OSError:
            pass  # the terminal is gone


def numbers() -> list[signal.Signals]:
    """Returns the signals of ENDING that this machine has."""
    return [signal.Signals[name] for name in ENDING if name in signal.Signals.__members__]


def to_save() -> list[signal.Signals]:
    """Returns the signals on which a run saves: those of ENDING but for ignored ones, SIGTERM even
    if it is.
    """
    ignored = [number for number in numbers() if signal.getsignal(number) is signal.SIG_IGN]
    return [number for number in numbers() if number not in ignored or number == signal.SIGTERM]


def _forget() -> None:
    """Keeps a forked child from telling its parent of signals; it has no thread that listens."""
    signal.set_wakeup_fd(-1)
    _watched.clear()


def _watch(reader: int) -> None:
    """Reads the numbers of signals as they come, for ever."""
    interrupted = False
    while True:
        for number in os.read(reader, 64):
            if number == signal.SIGINT and interrupted:
                leave_again(number)
            elif signal.getsignal(number) is leave:
                leave(number)
            elif number == signal.SIGINT:
                interrupted = True
                _say(
                    "stopping after the current step; a second Ctrl-C ends the process at "
                    "once, without saving"
                )
