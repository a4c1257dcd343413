"""Rows of .jsonl, .json, .csv and .parquet files. Rows and lines in messages count from 1."""

import codecs
import csv
import difflib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxrft.errors import InputError, Missing
from jaxrft.errors import shown as shown
from jaxrft.host.files import JSON, outline, parse_json
from jaxrft.tasks.memory import DICT, OBJECT, Budget

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch
    from pyarrow.parquet import ColumnChunkMetaData, ColumnSchema, ParquetFile

# [N] of a column: JSON values, and what else parquet and TFDS have, such as bytes and dates
Entries = list[Any]
Columns = dict[str, Entries]  # by their names

ENDINGS = (".parquet", ".jsonl", ".json")
KINDS = "a .parquet, .jsonl or .json file"
CSV = ".csv"  # for tasks only: what is written for training has types
KINDS_OF_TASKS = "a .parquet, .jsonl, .json or .csv file"
BATCH = 1024  # rows of parquet that are unpacked together


def read(path: Path, limit: int | None = None) -> Columns:
    """Returns the columns of a file, of its first `limit` rows if given; a key that a row does not
    have is None in it.

    Raises InputError for a file that is not there or cannot be read, for a row that is no object,
    and for rows that take more than half of the memory that is available.
    """
    ending = _ending(path, (*ENDINGS, CSV))
    if ending == ".parquet":
        return _parquet_columns(path, limit)
    if ending == CSV:
        return _csv_columns(path, limit)
    rows = list(islice(_rows(path, keep=True), limit))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number} is {shown(row)}: each row must be a JSON object")
    return {
        name: [row.get(name) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row)
    }


def entries(path: Path, names: Collection[str] = ()) -> Iterator[object]:
    """Yields the rows of a file, one after the other; of parquet only the columns `names`, if some
    are given.

    Rows are dicts, or whatever else the list in a .json file holds. Raises InputError as `read`
    does, but only what is in memory at one time counts.
    """
    if _ending(path) == ".parquet":
        return _parquet_rows(path, names)
    return _rows(path)


def _rows(path: Path, *, keep: bool = False) -> Iterator[JSON]:
    """Yields the rows of a JSON file; with `keep`, all that were yielded count as being in
    memory.
    """
    budget = Budget(path)
    return _jsonl(path, budget, keep) if path.suffix == ".jsonl" else _json(path, budget, keep)


def concatenate(tables: Collection[tuple[Columns, int]]) -> Columns:
    """Concatenates the columns of several files, given with their numbers of rows.

    A column that a file does not have is None in its rows.
    """
    names = dict.fromkeys(name for columns, _ in tables for name in columns)
    return {
        name: [entry for columns, n in tables for entry in columns.get(name, [None] * n)]
        for name in names
    }


def _ending(path: Path, endings: Collection[str] = ENDINGS) -> str:
    """Checks that a file exists and is of a kind that can be read; returns its ending."""
    kinds = KINDS_OF_TASKS if CSV in endings else KINDS
    if path.suffix not in endings:
        raise InputError(f"{path} is of no kind that can be read: give {kinds}")
    if not path.is_file():
        siblings = (
            [file.name for file in path.parent.iterdir() if file.is_file()]
            if path.parent.is_dir()
            else []
        )
        near = difflib.get_close_matches(path.name, siblings, n=3)
        hint = f"did you mean {' or '.join(near)} there?" if near else f"give the path of {kinds}"
        raise Missing(f"no file {path}: {hint}")
    return path.suffix


def _jsonl(path: Path, budget: Budget, keep: bool) -> Iterator[dict[str, JSON]]:
    """Yields one JSON object a line; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(_lines(lines, budget), 1):
            if not line.strip():
                continue
            try:
                row = _parsed(line, budget, keep)
            except InputError:
                raise
            except ValueError as error:
                raise InputError(
                    f"{path} line {number} is not JSON ({_reason(error)}): write one object a line"
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path} line {number} is {shown(row)}: write one JSON object a line"
                )
            yield row


def _csv_columns(path: Path, limit: int | None) -> Columns:
    """Returns the columns of a file of comma-separated texts, whose first line names them."""
    budget = Budget(path)
    columns: Columns = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = (row for row in csv.reader(file, strict=True) if row)
            names = next(rows, [])
            columns = {name: [] for name in names}
            if len(columns) < len(names):
                raise InputError(f"{path} has several columns of one name: rename all but one")
            for number, row in enumerate(islice(rows, limit), 1):
                if len(row) != len(names):
                    raise InputError(
                        f"{path} row {number} has {len(row)} entries for {len(names)} columns: "
                        "quote texts that have commas"
                    )
                budget.take(sum(OBJECT + len(entry) for entry in row))
                for name, entry in zip(names, row, strict=True):
                    columns[name].append(entry)
    except (csv.Error, UnicodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else error
        raise InputError(
            f"{path} cannot be read as CSV ({reason}): write the file again"
        ) from error
    return columns


def _lines(file: BinaryIO, budget: Budget) -> Iterator[bytes]:
    """Yields the lines of a file; one that does not end is never held as a whole."""
    while line := file.readline(budget.limit + 1):
        budget.hold(len(line))
        yield line


def _json(path: Path, budget: Budget, keep: bool) -> Iterator[JSON]:
    """Yields the entries of a list, the only object, or one object a line, which is often named
    .json too.
    """
    budget.hold(path.stat().st_size)
    try:
        data = _parsed(path.read_bytes(), budget, False)
    except InputError:
        raise
    except ValueError as error:
        if getattr(error.__cause__, "msg", None) == "Extra data":
            yield from _jsonl(path, budget, keep)
            return
        raise InputError(
            f"{path} is not JSON ({_reason(error)}): write a list of objects"
        ) from error
    if not isinstance(data, list | dict):
        raise InputError(f"{path} is {shown(data)}: write a list of objects")
    yield from data if isinstance(data, list) else [data]


def _parsed(text: bytes, budget: Budget, keep: bool) -> JSON:
    """Returns a JSON value; NaN, which Python and pandas write, is one.

    Raises ValueError also for half of a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    encoding = json.detect_encoding(text)
    data = (
        text.removeprefix(codecs.BOM_UTF8)
        if encoding.startswith("utf-8")
        else text.decode(encoding).encode()
    )
    bare = outline(data)
    size = (
        len(data)
        + OBJECT * (bare.count(b",") + bare.count(b":"))
        + DICT * (bare.count(b"{") + bare.count(b"["))
    )
    (budget.take if keep else budget.hold)(size)
    value = parse_json(data, object, max_bytes=len(data), allow_nan=True)
    if rb"\ud" in data or rb"\uD" in data:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _reason(error: ValueError) -> str:
    """Returns what a JSON parser found wrong."""
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeError):
        return "not UTF-8 text"
    return getattr(cause, "msg", str(cause)).removeprefix("it is ")


def check_parquet(path: Path, limit: int | None = None) -> None:
    """Raises InputError for a parquet file that cannot be read, or whose rows are too large to be
    held in memory.
    """
    budget = Budget(path)
    with _parquet(path) as file:
        if limit is None:  # at once, where the file is honest about its size
            budget.hold(
                sum(
                    chunk.total_uncompressed_size + OBJECT * chunk.num_values
                    for chunk in _chunks(file)
                )
            )
        for batch in _batches(file, budget, limit=limit):
            budget.take(sum(map(_unpacked_size, batch.columns)))


def _parquet_columns(path: Path, limit: int | None) -> Columns:
    """Returns the columns of a parquet file, without the rows in between."""
    check_parquet(path, limit)
    with _parquet(path) as file:
        columns: Columns = {name: [] for name in file.schema_arrow.names}
        for batch in _batches(file, Budget(path), limit=limit):
            for entries, column in zip(columns.values(), batch.columns, strict=True):
                entries += column.to_pylist()
        return columns


def _parquet_rows(path: Path, names: Collection[str]) -> Iterator[dict[str, object]]:
    """Yields the rows of a parquet file."""
    budget = Budget(path)
    with _parquet(path) as file:
        columns = [name for name in file.schema_arrow.names if name in names] if names else None
        for batch in _batches(file, budget, columns=columns):
            budget.hold(sum(map(_unpacked_size, batch.columns)))
            yield from batch.to_pylist()


@contextmanager
def _parquet(path: Path) -> Iterator["ParquetFile"]:
    """Opens a parquet file whose texts stay dictionaries: each different one is unpacked once,
    however often it comes.

    Raises InputError for what pyarrow cannot read, there and in the block.
    """
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            texts = [column.path for column in _leaves(file) if _is_text(column)]
            texts = [text for text in texts if not _largest_delta_chunk(file, text)]
        with ParquetFile(path, read_dictionary=texts) as file:
            names = file.schema_arrow.names
            if twice := {name for name in names if names.count(name) > 1}:
                raise InputError(
                    f"{path} has several columns called {shown(min(twice))}: rename all but one"
                )
            yield file
    except InputError:
        raise
    # pyarrow's errors are of every kind, those of text that is not UTF-8 and of dates too
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read as parquet ({reason}): write the file again"
        ) from error


def _batches(
    file: "ParquetFile",
    budget: Budget,
    *,
    columns: list[str] | None = None,
    limit: int | None = None,
) -> Iterator["RecordBatch"]:
    """Yields the rows of a file, a few at a time, and no more than `limit`.

    Texts in a DELTA encoding, each stored as the difference to the one before, cannot stay
    dictionaries, and each may be as large as its whole chunk. Of these only as many rows are
    unpacked together as fit into memory in any case.
    """
    largest = max((_largest_delta_chunk(file, column.path) for column in _leaves(file)), default=0)
    rows = min(BATCH, budget.rows(largest))
    remaining = file.metadata.num_rows if limit is None else limit
    for batch in file.iter_batches(batch_size=rows, columns=columns):
        yield batch.slice(0, remaining)
        remaining -= batch.num_rows
        if remaining <= 0:
            return


def _leaves(file: "ParquetFile") -> list["ColumnSchema"]:
    """Returns the columns of a parquet file, those inside of lists and structs too."""
    schema = file.metadata.schema
    return [schema.column(number) for number in range(len(schema))]


def _chunks(file: "ParquetFile") -> Iterator["ColumnChunkMetaData"]:
    """Yields the metadata of each column in each group of rows."""
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        yield from map(group.column, range(group.num_columns))


def _is_text(column: "ColumnSchema") -> bool:
    """Returns whether a column holds texts or bytes of any length."""
    return column.physical_type == "BYTE_ARRAY" and column.logical_type.type != "DECIMAL"


def _largest_delta_chunk(file: "ParquetFile", column: str) -> int:
    """Returns the bytes of a column's largest chunk in a DELTA encoding; 0 without any."""
    chunks = (chunk for chunk in _chunks(file) if chunk.path_in_schema == column)
    stored = [
        chunk
        for chunk in chunks
        if any(encoding.startswith("DELTA_") for encoding in chunk.encodings)
    ]
    return max((chunk.total_uncompressed_size for chunk in stored), default=0)


def _unpacked_size(array: "Array") -> int:
    """Returns about how many bytes a column's entries [n] take as Python's."""
    from pyarrow import types
    from pyarrow.compute import call_function

    if types.is_dictionary(array.type):
        lengths = call_function("binary_length", [array.dictionary])
        return OBJECT * len(array) + (
            call_function("sum", [lengths.take(array.indices)]).as_py() or 0
        )
    if types.is_struct(array.type):
        return DICT * len(array) + sum(map(_unpacked_size, array.flatten()))
    if types.is_nested(array.type):
        return OBJECT * len(array) + _unpacked_size(array.flatten())
    return OBJECT * len(array) + array.nbytes
