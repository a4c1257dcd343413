"""Shows a run on the console: what it does now, its progress, a few metrics, some completions."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import NamedTuple, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxrft.host.terminal import escaped, tolerant

SHOWN = (  # metric, its name on the console; the most important first
    ("reward", "reward"),
    ("select/effective_group_ratio", "informative"),
    ("completions/mean_length", "length"),
    ("entropy", "entropy"),
    ("step_time", "s/step"),
)
INTERVAL = 5.0  # seconds between two lines of progress where there is no terminal
RECENT = 50  # steps whose mean time predicts the time left
BAR = 24  # columns at most
GAP = "  "
BLANK = " \n"
LABEL = 10  # columns of the names next to what a sample or a header has
PROMPT = 300  # characters of a prompt's end
COMPLETION = 400  # characters of a completion, half of them its end


class Status(Protocol):
    """Tells what a process does now."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Tells that it does `what`, of which `done` of `total` is done; "" = nothing special."""
        ...


def no_status(what: str, done: int = 0, total: int = 0) -> None:
    """Tells nobody."""


class Sample(NamedTuple):
    """A completion to show."""

    prompt: str
    completion: str
    reward: float | None  # None = no reward
    answer: str | None = None  # the ground truth, of tasks that have one


class Display:
    """A progress display; a context manager. Only one process shows it.

    On a terminal a line at the bottom has the progress, the time left, what happens now and the
    metrics; the last ones are dropped where the line is too narrow. Elsewhere, as in a file, a line
    is printed for the first and the last step, at most every INTERVAL seconds in between, and for
    each thing that happens now.
    Showing never raises: output that the stream refuses is dropped.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        visible: bool = True,
        unit: str = "step",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Sets up the display of `total` units, of which `start` are done.

        `unit` is what is counted. It shows on `stream`, the standard output by default.
        """
        file = tolerant(sys.stdout if stream is None else stream)
        # In a notebook rich shows each line as HTML of its own, and not in `file`.
        self.console = Console(file=file, quiet=not visible, highlight=False, force_jupyter=False)
        self.unit = unit
        self.total = total
        self.done = start
        # Notebooks and build logs force colors, but no line moves in what they keep.
        self.moves = (
            visible
            and self.console.is_terminal
            and not self.console.is_dumb_terminal
            and self.console.file.isatty()
        )
        self._clock = clock
        self._begin = clock()
        self._stamps: deque[tuple[float, int]] = deque(maxlen=RECENT)  # (time, units done)
        self._numbers: Sequence[str] = ()
        self._status = ""
        self._detail = ""  # of the status: how far it is
        self._program = ""  # that is being compiled
        self._printed: float | None = None  # time of the last line of progress
        self._counted = False  # whether one had the progress
        self._pending = False  # whether the last progress was not printed
        self._stack = ExitStack()

    def __enter__(self) -> "Display":
        """Starts the display."""
        if self.moves:
            errors = sys.stderr
            live = Live(
                get_renderable=self.line,
                console=self.console,
                redirect_stdout=self.console.file is sys.stdout,
                redirect_stderr=errors.isatty(),
            )
            self._stack.enter_context(live)
            self._stack.enter_context(_logging_above(errors))
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the display; where there is no terminal, prints the last progress."""
        self._status = self._detail = self._program = ""
        if self._pending:
            self._print()
        self._stack.close()

    def begin(self, done: int) -> None:
        """Sets the units that were done before."""
        self.done = done

    def step(self, step: int, metrics: Mapping[str, object]) -> None:
        """Shows the numbers of a finished step."""
        numbers = [
            f"{name} {metrics[key]:.3g}" for key, name in SHOWN if metrics.get(key) is not None
        ]
        self.advance(step, *numbers)

    def advance(self, done: int, *numbers: str) -> None:
        """Shows that `done` units are done, and `numbers`, the most important first."""
        self.done = done
        self._numbers = numbers
        self._stamps.append((self._clock(), done))
        self._pending = not self.moves
        if self._pending and (done == self.total or not self._counted or self._due()):
            self._print()

    def status(self, what: str, done: int = 0, total: int = 0) -> None:
        """Shows what happens now, of which `done` of `total` is done; "" = nothing special."""
        begins = what != self._status
        self._status = what
        self._detail = f" {done:,}/{total:,}" if total else ""
        self._program = ""
        if self.moves or not what:
            return
        if begins or self._due():
            self._printed = self._clock()
            self.say(f"{what} ..." if begins else f"{what}{self._detail}")

    def count(self, what: str, done: int = 0, total: int = 0) -> None:
        """Shows what happens now, and counts on the bar how much of it is done."""
        self.total = total
        self.status(what)
        if done:
            self.advance(done)

    def compiling(self, program: str) -> None:
        """Shows that a program is being compiled."""
        self._program = program

    def compiled(self, program: str, seconds: float) -> None:
        """Shows that a program was compiled; without a terminal, if it took long."""
        self._program = ""
        if not self.moves and seconds >= INTERVAL:
            self.say(f"compiled {program} in {seconds:.0f} s")

    def say(self, message: str) -> None:
        """Prints a line above the progress."""
        self.console.print(self._text(message), soft_wrap=True)

    def header(self, rows: Mapping[str, str]) -> None:
        """Prints names and what they stand for, a line each."""
        for name, value in rows.items():
            self.say(f"{name:<{LABEL}}{GAP}{value}")

    def evaluation(self, step: int, metrics: Mapping[str, object]) -> None:
        """Shows the results of an evaluation."""
        numbers = GAP.join(
            f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items()
        )
        self.say(f"evaluation at step {step}:  {numbers}")

    def histogram(self, counts: dict[str, int]) -> None:
        """Shows a bar a label, the longest of them of 40 characters."""
        most = max(1, *counts.values())
        block = "█" if self.console.encoding.startswith("utf") else "#"
        table = Table(box=None, show_header=False)
        for label, count in counts.items():
            table.add_row(self._text(label), str(count), block * -(-40 * count // most))
        table.columns[1].justify = "right"
        self.console.print(table)

    def completions(self, step: int, samples: Sequence[Sample]) -> None:
        """Shows samples of a step, a block each: the prompt's end, completion, answer, reward."""
        for number, sample in enumerate(samples, 1):
            self.say(f"\nstep {step}, sample {number} of {len(samples)}")
            self._print_row("prompt", _end(sample.prompt.strip(BLANK), PROMPT))
            self._print_row("completion", _ends(sample.completion.strip(BLANK), COMPLETION))
            if sample.answer is not None:
                self._print_row("answer", _end(sample.answer, PROMPT))
            shown = "none" if sample.reward is None else f"{sample.reward:.3g}"
            self._print_row("reward", shown)

    def _print_row(self, name: str, value: str) -> None:
        """Prints a name, and a text next to it that wraps in its column."""
        width = max(20, self.console.width - LABEL - len(GAP))
        for line in self._text(value).wrap(self.console, width, overflow="fold"):
            row = Text(f"{name:<{LABEL}}{GAP}").append(line)
            row.rstrip()
            self.console.print(row, soft_wrap=True)
            name = ""

    def _print(self) -> None:
        """Prints a line of progress, where there is no terminal."""
        self._pending = False
        self._counted = True
        self._printed = self._clock()
        left = self._left()
        times = [] if left is None or self.done >= self.total else [f"left {_duration(left)}"]
        self.say(GAP.join([self._count(), *times, *self._numbers]))

    def line(self) -> RenderableType:
        """Returns the line at the bottom of a terminal."""
        bar = min(BAR, self.console.width // 5)
        head = self._text(self._count() if self.total else self.unit)
        room = max(0, self.console.width - head.cell_len - bar - len(GAP))
        table = Table.grid(padding=(0, 1))
        for _ in range(3):
            table.add_column(no_wrap=True)
        progress = ProgressBar(total=max(1, self.total), completed=self.done, width=bar)
        table.add_row(head, progress, fit([self._text(part) for part in self._parts(room)], room))
        return table

    def _parts(self, room: int) -> Iterable[str]:
        """Yields what stands next to the bar, the most important first.

        What happens now is cut so that it fits into `room` columns.
        """
        left = None if self.done >= self.total else self._left()
        elapsed = _duration(self._clock() - self._begin)
        times = elapsed if left is None else f"left {_duration(left)}"
        yield times
        happens = f"{self._status}{self._detail}"
        if self._program:
            happens = ": ".join(filter(None, (self._status, f"compiling {self._program}")))
        free = room - len(times) - len(GAP)
        if happens:
            yield happens if len(happens) <= free else f"{happens[: max(0, free - 3)]}..."
        yield from self._numbers
        if left is not None:
            yield f"after {elapsed}"

    def _due(self) -> bool:
        """Checks whether a line of progress is due, where there is no terminal."""
        return self._printed is None or self._clock() - self._printed >= INTERVAL

    def _count(self) -> str:
        return f"{self.unit} {self.done:,}/{self.total:,}"

    def _left(self) -> float | None:
        """Predicts the seconds left by the mean time of recent units; None = not known yet.

        The first units are not counted, since their time includes compilation.
        """
        if len(self._stamps) < 2:
            return None
        (first, before), (last, done) = self._stamps[0], self._stamps[-1]
        if done <= before:
            return None
        seconds = (last - first) / (done - before)
        return max(0.0, seconds * (self.total - done) - (self._clock() - last))

    def _text(self, text: str) -> Text:
        """Returns text of any origin as the console shows it: no markup, no control characters."""
        return Text(escaped(text, encoding=self.console.encoding))


def fit(parts: Sequence[Text], width: int) -> Text:
    """Joins as many of the parts as fit into `width` columns; the others are dropped."""
    line = Text()
    for part in parts:
        longer = Text(GAP).join([line, part]) if line else part
        if longer.cell_len > width:
            break
        line = longer
    return line


@contextmanager
def _logging_above(errors: TextIO):
    """Has log messages that go to the stream `errors` printed above the line, in its place.

    A handler keeps the stream that it was made with, while the display replaces `sys.stderr`.
    """
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is errors
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(errors)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _end(text: str, size: int) -> str:
    """Returns the last `size` characters of a text."""
    return text if len(text) <= size else f"... {text[-size:]}"


def _ends(text: str, size: int) -> str:
    """Cuts the middle out of a text of more than `size` characters."""
    return text if len(text) <= size else f"{text[: size // 2]} ... {text[-(size // 2) :]}"
