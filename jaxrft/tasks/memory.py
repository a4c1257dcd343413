"""Counts the memory that data take when they are read, and bounds it by what is available.

A file of a few hundred bytes can unpack to terabytes. So sizes are counted before data become
Python objects, and half of the memory that is available is the most that the rows of one file may
take.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jaxrft.errors import InputError

SHARE = 0.5  # of what is available; the other half is for tokens, and for the run
# bytes of a number, a text without its letters or a list without its entries, with what refers to
# it
OBJECT = 64
DICT = 240  # bytes of a dict without its entries
CGROUP = Path("/sys/fs/cgroup")


class Budget:
    """Counts the bytes that the rows of one file take."""

    def __init__(
        self,
        path: object,
        remedy: str = "lower tasks.limit so that fewer rows are read, split the file",
    ):
        """Takes the limit from what is available now; `remedy` is what the user may do."""
        self._path = path
        self._remedy = remedy
        self.limit = int(SHARE * available())
        self._used = 0

    def take(self, size: int) -> None:
        """Counts what stays in memory; raises InputError when all that was taken is more than the
        limit.
        """
        self.hold(self._used + size)
        self._used += size

    def hold(self, size: int) -> None:
        """Raises InputError when what is in memory for a moment is more than the limit."""
        if size > self.limit:
            raise InputError(
                f"{self._path} unpacks to more than {self.limit / 2**30:.2f} GiB, half of the "
                f"memory that is available: {self._remedy}, or use a larger machine"
            )

    def rows(self, size: int) -> int:
        """Returns the number of rows of at most `size` bytes that take at most a quarter of the
        limit, at least 1.
        """
        return max(1, self.limit // (4 * max(size, 1)))


def size_of(value: object) -> int:
    """Estimates the bytes that a value of text, numbers, lists and dicts takes."""
    if isinstance(value, dict):
        return DICT + sum(OBJECT + size_of(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return OBJECT + sum(map(size_of, value))
    return OBJECT + (len(value) if isinstance(value, str | bytes) else 0)


def available() -> int:
    """Returns the bytes that this process can still take, of the machine and of its control
    group.
    """
    return max(0, min([_of_machine(), *_of_groups()]))


def _of_machine() -> int:
    with suppress(OSError, ValueError, TypeError):
        match = re.search(
            r"^MemAvailable:\s*(\d+) "
            r"kB",
            Path("/proc/meminfo").read_text(),
            re.MULTILINE,
        )
        return 1024 * int(match[1])  # pyright: ignore[reportOptionalSubscript]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # where Linux' file is not


def _of_groups() -> Iterator[int]:
    """Yields the bytes that the control groups of this process leave it, of version 2 and 1."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers:
                yield from _available(CGROUP, name, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield from _available(CGROUP / "memory", name, *files)


def _available(root: Path, name: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Yields the bytes below the limit of a group and of those above it; cached files count as
    free.
    """
    group = root / name.strip("/")
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):
            maximum = int((folder / limit).read_text())  # "max" is none
            cached = re.search(
                rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE
            )
            yield maximum - int((folder / usage).read_text()) + (int(cached[1]) if cached else 0)
        if folder == root:
            return
