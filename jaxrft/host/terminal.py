"""Keeps a run alive over its output: foreign text is escaped, writes never raise. Imports nothing
of jaxrft.
"""

import logging
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

logger = logging.getLogger(__name__)

# Categories of Unicode that a terminal obeys, hides or turns around: control, format and surrogate
# characters, and the separators of lines and paragraphs.
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # without which emoji, Persian and Indic words fall apart


def escaped(text: str, *, keep: str = "\n\t", encoding: str = "utf-8") -> str:
    """Replaces the characters that a terminal obeys, and those that `encoding` has not, by their
    escapes.

    Obeyed are control, format and surrogate characters and line separators, but for those in `keep`
    and joiners.

    >>> escaped("clear" + chr(27) + "[2J")
    'clear\\\\x1b[2J'
    """
    if not (text.isascii() and text.isprintable()):
        allowed = keep + _JOINERS
        text = "".join(
            c if c in allowed or unicodedata.category(c) not in _OBEYED else _escape(c)
            for c in text
        )
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class SentenceFormatter(logging.Formatter):
    """Formats a record as one line, whatever the data that it quotes."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line, its control characters and newlines escaped."""
        return escaped(super().formatMessage(record), keep="")

    def formatException(self, ei: Any) -> str:
        """Returns the lines of a stack trace, likewise but for newlines."""
        return escaped(super().formatException(ei))


class TolerantStream:
    """Wraps a text stream so that writing to it never raises.

    Characters that the stream's encoding has not are written as escapes. What the stream does not
    take, such as on a full disk or without a reader, is dropped; a warning says so once, and the
    next write is tried again. All other attributes are the stream's.
    """

    def __init__(self, stream: TextIO, *, escape: bool = False):
        """Wraps `stream`; with `escape` all that is written is foreign text, and escaped."""
        self._stream = stream
        self._escape = escape
        self.trouble: OSError | ValueError | None = None  # of the first write that was not taken
        self.reader_may_leave = False  # a pipe that its reader closes is then no reason to warn

    def __getattr__(self, name: str) -> Any:
        """Returns the stream's attribute."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text`, or drops it."""
        try:
            self._stream.write(escaped(text) if self._escape else text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # a closed stream raises ValueError
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each of the `lines`, or drops it."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def settle(self) -> None:
        """Empties the buffer for good, since Python ends with exit code 120 when it cannot do so
        itself.
        """
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def _drop(self, error: OSError | ValueError) -> None:
        if self.trouble is None:
            self.trouble = error  # first, since the warning may come back here
            if self.reader_may_leave and isinstance(error, BrokenPipeError):
                return
            name = getattr(self._stream, "name", "output")
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                "%s cannot be written to (%s): output is dropped until it can", name, reason
            )


def tolerant(stream: TextIO | None, *, escape: bool = False) -> TextIO:
    """Returns `stream` wrapped in a TolerantStream, once; a stream that drops everything for
    None.
    """
    if isinstance(stream, TolerantStream):
        return cast(TextIO, stream)
    return cast(
        TextIO, TolerantStream(open(os.devnull, "w") if stream is None else stream, escape=escape)
    )


def print_page(text: str) -> None:
    """Prints a page to the standard output, of which `head` or a pager may read the first lines
    only.
    """
    if isinstance(sys.stdout, TolerantStream):
        sys.stdout.reader_may_leave = True
    print(text)


def guard_streams(*, escape: bool = False) -> None:
    """Makes sys.stdout and sys.stderr tolerant; `escape` is for a process whose prints are of
    foreign origin.
    """
    sys.stdout = tolerant(sys.stdout, escape=escape)
    sys.stderr = tolerant(sys.stderr, escape=escape)


@contextmanager
def guarded_streams() -> Iterator[TolerantStream]:
    """Guards the standard streams within the block; yields the standard output."""
    before = sys.stdout, sys.stderr
    guard_streams()
    guarded = cast(TolerantStream, sys.stdout), cast(TolerantStream, sys.stderr)
    try:
        yield guarded[0]
    finally:
        for stream in guarded:
            stream.settle()
        sys.stdout, sys.stderr = before
