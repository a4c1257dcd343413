"""Reads JSON of unknown origin, writes files atomically, and keeps names inside their folder."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

# the largest index of a published checkpoint is below 1 MiB, a tokenizer.json below 64 MiB
MAX_JSON_BYTES = 256 << 20
MAX_JSON_DEPTH = 100  # configs and metrics nest fewer than 10 deep
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[{]|[\]}]")
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
}

JSON = Any  # a parsed document, or a part of it: dict, list, str, int, float, bool or None


class UnreadableJSON(ValueError):
    """Reports text that is not the JSON that was expected; the message completes "FILE cannot be
    read: ...".
    """


def parse_json(
    text: str | bytes, kind: type[T], *, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = False
) -> T:
    """Parses a JSON document whose outermost value is of the type `kind`: dict, list, str, int,
    float, bool or object.

    Raises UnreadableJSON for more than `max_bytes` bytes, for text that is not UTF-8 or not JSON,
    for NaN and infinities, which JSON has not, unless `allow_nan`, for values nested more than
    MAX_JSON_DEPTH deep, and for a value of another type; an `object` may be of any.

    >>> parse_json('{"step": 3}', dict)
    {'step': 3}
    """
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if len(data) > max_bytes:
        raise UnreadableJSON(f"it has {len(data):,} bytes, more than {max_bytes:,}")
    # few of them cannot nest deep, and most rows of data have few
    brackets = data.count(b"[") + data.count(b"{")
    if brackets > MAX_JSON_DEPTH and _depth(outline(data)) > MAX_JSON_DEPTH:
        raise UnreadableJSON(f"it is nested more than {MAX_JSON_DEPTH} deep")
    try:
        value: object = json.loads(
            data.decode(), parse_constant=None if allow_nan else _reject_constant
        )
    except UnicodeDecodeError as error:
        raise UnreadableJSON(
            f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnreadableJSON(
            f"it is not JSON ({error})" if data.strip() else "it is empty"
        ) from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        actual = "null" if value is None else _NAMES[type(value)]
        raise UnreadableJSON(f"it holds {actual}, not {_NAMES[kind]}")
    return value


def read_json(path: Path, kind: type[T]) -> T:
    """Reads a file of one JSON document as `parse_json` does; raises OSError when the file cannot
    be opened.
    """
    return parse_json(read_regular(path, MAX_JSON_BYTES + 1), kind)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def outline(data: bytes) -> bytes:
    """Returns JSON text without its strings: the brackets, commas and numbers from which its size
    in memory is estimated.
    """
    return _STRING.sub(b"", data)


def _depth(bare: bytes) -> int:
    """Computes how deep the brackets of an outline are nested."""
    depth = 0
    deepest = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def inside(folder: Path, name: str) -> Path:
    """Returns the path of the file that `name`, a relative path read from data, has in `folder`.

    Raises ValueError for an absolute path, a path with "..", a drive or a NUL, and an empty one:
    what a file names lies in its own folder. Symbolic links are followed, since the cache of the
    Hugging Face hub is made of them.
    """
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts
    if outside or not parts or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in {folder}")
    return folder / name


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file, as os.open does with `flags`, and returns its descriptor.

    Raises OSError for a folder, a device and a pipe, which it would wait for, and with
    os.O_NOFOLLOW for a link.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def read_regular(path: Path, max_bytes: int = -1, *, flags: int = os.O_RDONLY) -> bytes:
    """Reads the first `max_bytes` bytes, or all, of a file that is opened by `open_regular`."""
    with os.fdopen(open_regular(path, flags), "rb") as file:
        return file.read(max_bytes)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` at the end of the block, unless the block raises.

    So `path` never exists in part. Raises OSError. What is written goes to a new file `.NAME.tmp`
    in the same folder first. That name is never followed as a link. A `durable` file outlasts a
    loss of power.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a process that was killed
    try:
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb"
        ) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Writes `content` to a file as `replacing` does."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, but nothing that a link leads to;
    no error if absent.

    Raises OSError for what cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def short_digest(content: bytes) -> str:
    """Computes the first 12 hexadecimal digits of the SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()[:12]
