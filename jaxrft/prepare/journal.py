"""What a long job has done so far, so that a kill costs no more than the piece of work in hand."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrft.types import InputError


class Journal:
    """A file of JSON lines: what the job is, then a line for every piece of work, by its number, as soon as it is done.

    `done` maps the numbers of finished pieces to what came of them. A last line torn by a kill is cut off. A context
    manager, which leaves the file for the next process that goes on, unless there is nothing in it. While it is open
    no other process opens it, where the file system has locks.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        """Opens the journal at `path`, or begins one for the job that `identity` tells from all others.

        Raises InputError, which names the first difference, when the one at `path` is another job's and has begun, and
        when another process is at it.
        """
        self.path = path
        identity = json.loads(json.dumps(identity))
        with writing(path), ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = stack.enter_context(path.open("ab"))
            _lock(self._file, path)
            (saved, *entries), end = _read(path)
            self.done: dict[int, Any] = {number: result for number, result in entries}
            if self.done:
                _check(path, identity, saved)
            self._file.truncate(end if self.done else 0)
            if not self.done:  # a job that has done nothing yet is any job
                self._write(identity)
            stack.pop_all()  # stays open

    def add(self, number: int, result: Any) -> None:
        """Notes that piece `number` is done; when it returns, the note outlasts a kill or a loss of power."""
        with writing(self.path):
            self._write([number, result])
        self.done[number] = result

    def __enter__(self) -> "Journal":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file; one without any finished piece goes."""
        self._file.close()
        if not self.done:
            self.path.unlink(missing_ok=True)

    def _write(self, entry: Any) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises InputError for what the disk refuses to take or to give."""
    try:
        yield
    except OSError as error:
        remedy = "put that right, and the same command goes on where it stopped"
        raise InputError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path`, which is at no time there in part; as in `writing`."""
    fresh = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)


def note_of(out: Path) -> Path:
    """Where the journal is while the file `out` is being made."""
    return out.with_name(f"{out.name}.partial")


def finished(journal: Journal | None, number: int) -> np.ndarray:
    """Which of so many pieces are in the journal of process 0, [number] bool."""
    done = np.zeros(number, bool)
    done[list(journal.done) if journal is not None else []] = True
    return done if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(done))


def begun(path: Path) -> bool:
    """Whether there is a journal at `path` with a finished piece of work."""
    return len(_read(path)[0]) > 1


def identity_at(path: Path) -> dict[str, Any]:
    """Returns what job the journal at `path` is of, {} when there is none with a finished piece of work."""
    (identity, *entries), _ = _read(path)
    return identity if entries else {}


def _lock(file: Any, path: Path) -> None:
    """Keeps other processes from a journal until the file is closed; raises InputError when one is at it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink == 0:  # another process removed it at its end, after it was opened here
            raise BlockingIOError
    except BlockingIOError as error:
        raise InputError(f"another command is writing {path}: wait for its end, or choose another file") from error
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):  # what file systems without locks say
            raise


def _read(path: Path) -> tuple[list[Any], int]:
    """The entries of a journal, the identity first, and the byte where the last whole line ends.

    Raises InputError for a file that is something else, which must not be written over.
    """
    entries, end = [], 0
    content = path.read_bytes() if path.exists() else b""
    fits = not content or content.startswith(b"{")
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        fits = fits and (not entries or isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int))
        entries.append(entry)
        end += len(line)
    if not fits:
        raise InputError(f"{path} is not the journal of a command: move it away, or choose another file")
    return entries or [None], end


def _check(path: Path, identity: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in identity | saved:
        here, there = identity.get(name), saved.get(name)
        if here != there:
            raise InputError(
                f"{path} holds the beginning of other work: its {name} is {there!r}, that of this command is {here!r}; "
                "repeat the command that began it, or remove the file to start afresh"
            )
