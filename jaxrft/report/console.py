"""Shows a run on the console: progress, a few metrics, and now and then some completions."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from jaxrft.host.terminal import escaped, tolerant

SHOWN = (  # metric, its name on the console
    ("reward", "reward"),
    ("select/effective_group_ratio", "informative"),
    ("completions/mean_length", "length"),
    ("entropy", "entropy"),
    ("step_time", "s/step"),
)


class Display:
    """A progress display; a context manager. Only one process shows it.

    Showing never raises: output that the standard output refuses is dropped.
    """

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        every: int = 10,
        visible: bool = True,
        unit: str = "step",
    ):
        """Sets up the display of a run of `steps`, from `start` on.

        Without a terminal it prints a line every `every` steps instead of a bar. `unit` is what the
        bar counts.
        """
        self.console = Console(file=tolerant(sys.stdout), quiet=not visible, highlight=False)
        self.every = every
        self.progress = Progress(
            TextColumn(
                escaped(unit).replace("{", "{{").replace("}", "}}"), style="bold", markup=False
            ),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self.console,
            # Notebooks and build logs force colors, but no bar moves in what they keep.
            disable=not (visible and self.console.is_terminal and self.console.file.isatty()),
        )
        self.task = self.progress.add_task("train", total=steps, completed=start, numbers="")

    def __enter__(self) -> "Display":
        """Starts the display."""
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the display."""
        self.progress.stop()

    def step(self, step: int, metrics: Mapping[str, object]) -> None:
        """Shows the numbers of a finished step."""
        numbers = "  ".join(
            f"{name} {metrics[key]:.3g}" for key, name in SHOWN if metrics.get(key) is not None
        )
        line = (
            (f"step {step}  {numbers}")
            if self.every and (step % self.every == 0 or step == 1)
            else ""
        )
        self.advance(step, numbers, line)

    def advance(self, done: int, numbers: str, line: str = "") -> None:
        """Moves the bar to `done` with `numbers` next to it; without a terminal prints the `line`,
        if there is one.
        """
        self.progress.update(self.task, completed=done, numbers=numbers)
        if self.progress.disable and line:
            self.say(line)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self.console.print(self._text(message), soft_wrap=True)

    def evaluation(self, step: int, metrics: Mapping[str, object]) -> None:
        """Shows the results of an evaluation."""
        numbers = "  ".join(
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

    def completions(self, step: int, rows: list[tuple[str, str, float | None]]) -> None:
        """Shows (prompt, completion, reward) of a few samples; None = no reward."""
        table = Table(title=f"samples of step {step}", title_justify="left", expand=False)
        for heading in ("prompt", "completion", "reward"):
            table.add_column(heading, overflow="fold", max_width=60)
        for prompt, completion, reward in rows:
            shown = "none" if reward is None else f"{reward:.3g}"
            table.add_row(self._text(_short(prompt)), self._text(_short(completion)), shown)
        self.console.print(table)

    def _text(self, text: str) -> Text:
        """Returns text of any origin as the console shows it: no markup, no control characters."""
        return Text(escaped(text, encoding=self.console.encoding))


def _short(text: str) -> str:
    """Cuts the middle out of a text of more than 300 characters."""
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
