"""Reads, joins and writes parquet files of tasks, task by task."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from jaxrft.config import TasksConfig
from jaxrft.prepare.journal import replacing
from jaxrft.tasks import sources
from jaxrft.tasks.files import Entries
from jaxrft.tasks.sources import Rows
from jaxrft.tasks.table import keys
from jaxrft.types import InputError


class TaskFile(NamedTuple):
    """Tasks with all the columns of their source, under its own names."""

    source: str  # where they come from
    table: pyarrow.Table  # N rows
    rows: Rows  # the same N tasks as a run reads them
    # [N] digest of prompt and ground truth, and the number of earlier rows with the same
    keys: list[tuple[str, int]]


def load(tasks: TasksConfig) -> TaskFile:
    """Reads the tasks of any source into a table, and interprets them as read from a parquet file.

    Raises InputError for a source that cannot be read, and for a column that parquet cannot hold.
    """
    columns, _ = sources.read(tasks)
    table = pyarrow.table(
        {name: _column(name, entries, tasks.source) for name, entries in columns.items()}
    )
    rows = sources.interpret(table.to_pydict(), None, tasks)
    return TaskFile(tasks.source, table, rows, _keys(rows))


def matched(base: TaskFile, other: TaskFile) -> list[int]:
    """Finds the row in `other` of each task of `base`.

    Raises InputError when the two do not hold the same tasks.
    """
    rows = {key: row for row, key in enumerate(other.keys)}
    if rows.keys() != set(base.keys):
        raise InputError(
            f"{base.source} holds other tasks than {other.source}: "
            f"{len(rows.keys() & set(base.keys))} of its {len(base.keys)} are among the other's "
            f"{len(rows)}; give the same tasks, or another file with --out"
        )
    return [rows[key] for key in base.keys]


def join(base: TaskFile, other: TaskFile, *, overwrite: bool = False) -> TaskFile:
    """Adds to `base` the columns of `other` that it lacks, task by task.

    With `overwrite`, columns of `other` replace those of the same name. Raises InputError when the
    two hold different tasks, or, unless `overwrite`, different values of one column.
    """
    table = base.table
    order = pyarrow.array(matched(base, other))
    for name in other.table.column_names:
        column = other.table.column(name).take(order)
        if name not in table.column_names:
            table = table.append_column(name, column)
        elif overwrite:
            table = table.set_column(table.column_names.index(name), name, column)
        # unlike ==, takes NaN for equal to NaN
        elif repr(table.column(name).to_pylist()) != repr(column.to_pylist()):
            raise InputError(
                f"{base.source} and {other.source} have different values in the column {name}: "
                "rename one of them, or give --overwrite to take the latter's"
            )
    return base._replace(table=table)


def write(path: Path, table: pyarrow.Table) -> None:
    """Replaces the file at `path`, atomically; equal tables make equal files."""
    with replacing(path) as file:
        pyarrow.parquet.write_table(table, file)


def _column(name: str, entries: Entries, source: str) -> pyarrow.Array:
    """Converts entries to a parquet column; raises InputError when parquet cannot hold them.

    Parquet holds one type a column and no empty objects.
    """
    try:
        column = pyarrow.array(entries)
        pyarrow.parquet.write_table(pyarrow.table({name: column}), pyarrow.BufferOutputStream())
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source}: parquet cannot hold the column {name} ({reason}): give its entries one "
            "type, or leave it out"
        ) from error
    return column


def _keys(rows: Rows) -> list[tuple[str, int]]:
    seen = Counter[str]()
    numbered = []
    for key in keys(rows.prompts, rows.columns):
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered
