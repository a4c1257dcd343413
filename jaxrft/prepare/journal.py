"""What a long job has done so far, so that a kill costs no more than the piece of work in hand."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from jax.experimental import multihost_utils

from jaxrft.host import disk, files, lock
from jaxrft.host.files import JSON
from jaxrft.types import InputError

logger = logging.getLogger(__name__)


class Journal:
    """A file of JSON lines: what the job is, then a line for every piece of work, by its number, as
    soon as it is done.

    `done` maps the numbers of finished pieces to what came of them. A last line torn by a kill is
    cut off. Other lines that are no JSON, and results that do not fit, are passed over and left in
    the file: their pieces are done anew. A context manager, which leaves the file for the next
    process that goes on, unless there is nothing in it. While it is open no other process opens it.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, JSON],
        fits: Callable[[int, JSON], bool] = lambda *_: True,
    ):
        """Opens the journal at `path`, or begins one for the job that `identity` tells from all
        others.

        `fits` says whether a result is one of the piece of that number. Raises InputError, which
        names the first difference, when the one at `path` is another job's and has begun, and when
        another process is at it.
        """
        self.path = path
        identity = json.loads(json.dumps(identity))
        remedy = "wait for the end of that command, or choose another file"
        with writing(path), ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(path.with_name(f".{path.name}.lock"), f"{path}", remedy))
            self._file = stack.enter_context(open_own(path, "ab"))
            found = _read(path)
            self.done = {
                number: result for number, result in found.pieces.items() if fits(number, result)
            }
            if found.pieces:
                _check(path, identity, found.identity)
                _say_damage(path, found, len(self.done))
            self._file.truncate(found.end if self.done else 0)
            if not self.done:  # a job that has done nothing yet is any job
                self._write(identity)
            self._open = stack.pop_all()

    def add(self, number: int, result: JSON) -> None:
        """Notes that piece `number` is done; when it returns, the note outlasts a kill or a loss of
        power.
        """
        with writing(self.path):
            self._write([number, result])
        self.done[number] = result

    def __enter__(self) -> "Journal":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file, and deletes it when no piece is finished."""
        with self._open:
            if not self.done:
                self.path.unlink(missing_ok=True)

    def _write(self, entry: JSON) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


writing = partial(
    disk.writing, remedy="put that right, and the same command goes on where it stopped"
)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` at the end of the block; errors are as in
    `writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            yield file


def open_own(path: Path, mode: Literal["ab", "r+b"]) -> BinaryIO:
    """Opens a file that only this command writes, makes it if need be, and follows no link to a
    file of others.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if mode == "ab" else 0)
    return os.fdopen(files.open_regular(path, flags), mode)


def note_of(out: Path) -> Path:
    """Names the journal that is kept until the file `out` is complete: OUT.partial."""
    return out.with_name(f"{out.name}.partial")


def unfinished(journal: Journal | None, number: int) -> list[int]:
    """Lists, on every process, the pieces 0..number - 1 that the journal of process 0 lacks."""
    missing = np.ones(number, bool)
    missing[list(journal.done) if journal is not None else []] = False
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(missing)).tolist()


def begun(path: Path) -> bool:
    """Checks whether `path` holds a journal with a finished piece of work."""
    with writing(path):
        return bool(_read(path).pieces)


def identity_at(path: Path) -> dict[str, JSON]:
    """Reads the job's identity from the journal at `path`; {} when no piece of it is finished."""
    with writing(path):
        found = _read(path)
    return found.identity if found.pieces else {}


class _Content(NamedTuple):
    """What is in the file of a journal."""

    identity: dict[str, JSON]
    pieces: dict[int, JSON]  # number -> result
    damaged: int  # lines that are neither
    end: int  # the byte where the last whole line ends


def _read(path: Path) -> _Content:
    """Reads a journal; raises InputError for a file that is something else, which must not be
    written over.
    """
    try:
        content = files.read_regular(path, flags=os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        content = b""
    end = content.rfind(b"\n") + 1
    first, *lines = content[:end].split(b"\n")[:-1] or [b"{}"]
    parsed = [_parse(line) for line in lines]
    pieces = dict(piece for piece in parsed if piece is not None)
    try:
        if (end == 0 and content[:1] not in (b"", b"{")) or (lines and not pieces):
            raise files.UnreadableJSON("it has no line of a journal")
        identity = files.parse_json(first, dict)
    except files.UnreadableJSON as error:
        raise InputError(
            f"{path} is not the journal of a command: move it away, or choose another file"
        ) from error
    return _Content(identity, pieces, parsed.count(None), end)


def _parse(line: bytes) -> tuple[int, JSON] | None:
    """Parses a line as (number, result); returns None for a damaged one."""
    try:
        number, result = files.parse_json(line, list)
    except ValueError:  # no JSON, no list, or one of another length
        return None
    return (number, result) if type(number) is int else None


def _say_damage(path: Path, found: _Content, fitting: int) -> None:
    """Logs how many lines of a journal are passed over."""
    if passed := found.damaged + len(found.pieces) - fitting:
        logger.warning(
            "passing over %d damaged lines of %s: what they noted is done anew", passed, path
        )


def _check(path: Path, identity: dict[str, JSON], saved: dict[str, JSON]) -> None:
    for name in identity | saved:
        here = identity.get(name)
        there = saved.get(name)
        if here != there:
            raise InputError(
                f"{path} holds the beginning of other work: its {name} is {there!r}, that of "
                f"this command is {here!r}; "
                "repeat the command that began it, or remove the file to start afresh"
            )
