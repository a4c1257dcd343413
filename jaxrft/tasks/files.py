"""Rows of .jsonl, .json and .parquet files. Rows and lines in messages count from 1."""

import difflib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrft.types import InputError, Missing

Columns = dict[str, list[Any]]  # name -> [N] entries

ENDINGS = (".parquet", ".jsonl", ".json")
KINDS = "a .parquet, .jsonl or .json file"


def read(path: Path) -> Columns:
    """The columns of a file; a key that a row does not have is None in it.

    Raises InputError for a file that is not there or cannot be read, and for a row that is no object.
    """
    if _ending(path) == ".parquet":  # by column, without the rows in between
        import pyarrow.parquet

        with _reading_parquet(path):
            return pyarrow.parquet.read_table(path).to_pydict()
    rows = list(entries(path))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number} is {shown(row)}: each row must be a JSON object")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def entries(path: Path, names: Collection[str] = ()) -> Iterator[Any]:
    """The rows of a file, one after the other; of parquet only the columns `names`, if some are given.

    Rows are dicts, or whatever else the list in a .json file holds. Raises InputError as `read` does.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": lambda path: _parquet(path, names)}
    return readers[_ending(path)](path)


def joined(parts: Iterable[Columns]) -> Columns:
    """The rows of several files; a column that a file does not have is None in its rows."""
    counted = [(part, len(next(iter(part.values()), ()))) for part in parts]
    names = dict.fromkeys(name for part, _ in counted for name in part)
    return {name: [entry for part, n in counted for entry in part.get(name, [None] * n)] for name in names}


def shown(value: Any) -> str:
    """The value as a message shows it: on one line, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _ending(path: Path) -> str:
    """The ending of a file, which must be there and of a kind that can be read."""
    if path.suffix not in ENDINGS:
        raise InputError(f"{path} is of no kind that can be read: give {KINDS}")
    if not path.is_file():
        there = [file.name for file in path.parent.iterdir() if file.is_file()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=3)
        hint = f"did you mean {' or '.join(near)} there?" if near else f"give the path of {KINDS}"
        raise Missing(f"no file {path}: {hint}")
    return path.suffix


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _parsed(line)
            except ValueError as error:
                raise InputError(
                    f"{path} line {number} is not JSON ({_reason(error)}): write one object a line"
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is {shown(row)}: write one JSON object a line")
            yield row


def _json(path: Path) -> Iterator[Any]:
    """The entries of a list, the only object, or one object a line, which is often named .json too."""
    try:
        data = _parsed(path.read_bytes())
    except ValueError as error:
        if getattr(error, "msg", None) == "Extra data":
            yield from _jsonl(path)
            return
        raise InputError(f"{path} is not JSON ({_reason(error)}): write a list of objects") from error
    if not isinstance(data, list | dict):
        raise InputError(f"{path} is {shown(data)}: write a list of objects")
    yield from data if isinstance(data, list) else [data]


def _parsed(text: bytes) -> Any:
    """A JSON value; raises ValueError also for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if rb"\ud" in text or rb"\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _reason(error: ValueError) -> str:
    """What a JSON parser found wrong."""
    return "not UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "msg", str(error))


def _parquet(path: Path, names: Collection[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with _reading_parquet(path), pyarrow.parquet.ParquetFile(path) as file:
        found = [name for name in file.schema_arrow.names if name in names] if names else None
        for rows in file.iter_batches(batch_size=1024, columns=found):
            yield from rows.to_pylist()


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    """Raises InputError for what pyarrow cannot read."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as parquet ({reason}): write the file again") from error
