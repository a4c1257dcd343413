"""Records the finished pieces of a long job, so that a kill loses only the current piece."""

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

    `done` maps the numbers of finished pieces to their results. A last line torn by a kill is cut
    off. Other lines that are no JSON, and results that do not fit, are skipped and left in the
    file: their pieces are done anew. A context manager, which leaves the file for the process that
    resumes, unless it is empty. While it is open no other process opens it.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, JSON],
        fits: Callable[[int, JSON], bool] = lambda *_: True,
    ):
        """Opens the journal at `path`, or begins one for the job that `identity` identifies.

        `fits` checks the result of the piece of a number. Raises InputError, which
        names the first difference, when the one at `path` is another job's and has begun, and when
        another process has it open.
        """
        self.path = path
        identity = json.loads(json.dumps(identity))
        remedy = "wait for the end of that command, or choose another file"
        with writing(path), ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(path.with_name(f".{path.name}.lock"), f"{path}", remedy))
            self._file = stack.enter_context(open_private(path, "ab"))
            content = _read(path)
            self.done = {
                number: result for number, result in content.pieces.items() if fits(number, result)
            }
            if content.pieces:
                _check(path, identity, content.identity)
                _warn_of_damage(path, content, len(self.done))
            self._file.truncate(content.end if self.done else 0)
            if (
                not self.done
            ):  # without a finished piece, the journal may become that of another job
                self._write(identity)
            self._open = stack.pop_all()

    def add(self, number: int, result: JSON) -> None:
        """Records that piece `number` is done; when it returns, the record outlasts a kill or a
        loss of power.
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


writing = partial(disk.writing, remedy="put that right, and run the same command to resume")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` at the end of the block; errors are as in `writing`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            yield file


def open_private(path: Path, mode: Literal["ab", "r+b"]) -> BinaryIO:
    """Opens a file that only this command writes, makes it if need be, and follows no link to a
    file of others.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if mode == "ab" else 0)
    return os.fdopen(files.open_regular(path, flags), mode)


def journal_of(out: Path) -> Path:
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


def read_identity(path: Path) -> dict[str, JSON]:
    """Reads the job's identity from the journal at `path`; {} when no piece of it is finished."""
    with writing(path):
        content = _read(path)
    return content.identity if content.pieces else {}


class _Content(NamedTuple):
    """The content of a journal."""

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


def _warn_of_damage(path: Path, content: _Content, fitting: int) -> None:
    """Logs the number of lines of a journal that are skipped."""
    if skipped := content.damaged + len(content.pieces) - fitting:
        logger.warning("skipping %d damaged lines of %s: their pieces are done anew", skipped, path)


def _check(path: Path, identity: dict[str, JSON], saved: dict[str, JSON]) -> None:
    for name in identity | saved:
        wanted = identity.get(name)
        actual = saved.get(name)
        if wanted != actual:
            raise InputError(
                f"{path} holds the beginning of other work: its {name} is {actual!r}, that of "
                f"this command is {wanted!r}; repeat the command that began it, or remove the file "
                "to start afresh"
            )
