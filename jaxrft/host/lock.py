"""Keeps two processes from writing to one folder, or one file, at the same time."""

import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxrft.errors import InputError
from jaxrft.host.files import UnreadableJSON, open_regular, parse_json

logger = logging.getLogger(__name__)

BEAT = 5.0  # seconds from one heartbeat of a holder to the next
# seconds without a heartbeat after which a holder is gone; shared storage may be slow
SILENT = 20.0
MAX_BYTES = 4096  # of what a holder writes of itself


@contextmanager
def held(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Holds the lock file `path` within the block; raises InputError, about `what`, while another
    process holds it.

    The kernel releases the lock when its holder ends, however that happens, so that the file of a
    dead holder does not block others. File systems may keep locks within a host, or have none.
    There a holder is alive while it sets the time of its file, every BEAT seconds, and gone after
    SILENT seconds without. Raises OSError when the file cannot be opened.
    """
    descriptor = _acquire(path, what, remedy)
    try:
        who = {"host": socket.gethostname(), "process": os.getpid(), "kernel": _kernel()}
        who["since"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        with suppress(OSError):  # on a full disk the lock holds, too
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(who).encode(), 0)
        with beating(lambda: os.utime(descriptor), BEAT):
            yield
    finally:
        if _is_at(descriptor, path):
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, what: str, remedy: str) -> int:
    """Returns the descriptor of the lock file once this process has the lock."""
    while True:
        with suppress(OSError):
            path.readlink()
            path.unlink()  # a link is no lock of ours, and is not followed
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            if not _lock(descriptor, path):
                raise InputError(f"{what} is in use by {_name(_holder(descriptor))}: {remedy}")
            # otherwise its holder has ended, and removed it, since it was opened
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Returns whether the file is locked for this process now."""
    holder = _holder(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "no locks on the file system of %s (%s): it serves as one by its time",
            path,
            error.strerror,
        )
        return not (holder and _beats(path))
    elsewhere = holder.get("kernel", _kernel()) != _kernel()
    return not (elsewhere and _beats(path))


def _kernel() -> str:
    """Identifies the running kernel, which differs between hosts and after a restart."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def _beats(path: Path) -> bool:
    """Returns whether the time of the lock file is set again and again, by the clock of its file
    system.
    """
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        now = os.fstat(scratch.fileno()).st_mtime
    first = _time(path)
    wait = min(SILENT, first + SILENT - now)
    until = time.monotonic() + wait
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT / 10))
        if _time(path) != first:
            return True
    return False


def _time(path: Path) -> float:
    """Returns when the file was changed; it is opened for that, as network file systems then ask
    their server.
    """
    try:
        descriptor = open_regular(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0.0
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> dict[str, object]:
    """Returns the description that the holder has written; {} if it cannot be read."""
    try:
        return parse_json(os.pread(descriptor, MAX_BYTES, 0), dict)
    except (OSError, UnreadableJSON):
        return {}


def _name(holder: dict[str, object]) -> str:
    if not {"host", "process", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['process']} on host {holder['host']} since {holder['since']}"


def _is_at(descriptor: int, path: Path) -> bool:
    """Returns whether the path leads to the open file still."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    return False


@contextmanager
def beating(beat: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `beat` at once and every `seconds` within the block; errors of the disk are ignored."""
    over = threading.Event()

    def run() -> None:
        beating = True
        while beating:
            with suppress(OSError):  # such as a full disk, which must not end the process
                beat()
            beating = not over.wait(seconds)

    heart = threading.Thread(target=run, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join(seconds)
