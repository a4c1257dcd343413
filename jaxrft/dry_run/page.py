"""The page that a dry run prints: compact, and plain text where there is no terminal."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, OverflowMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxrft.dry_run import counts, memory
from jaxrft.dry_run.bounds import BOUNDS, Need, at_best
from jaxrft.dry_run.chips import chip_of
from jaxrft.dry_run.found import Pool, Set
from jaxrft.dry_run.graded import Trial, unjudged
from jaxrft.dry_run.programs import Compiled
from jaxrft.host.terminal import escaped
from jaxrft.lm import tokenizer
from jaxrft.tasks import table as tables
from jaxrft.tasks.table import TaskTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDTH = 100  # without a terminal
SHOWN = 900  # characters of a prompt
DOMAINS = 12  # rows of the table of domains
LEVELS = " ▁▂▃▄▅▆▇█"
ASCII_LEVELS = " .:-=+*#%@"


class Page:
    """Prints section after section."""

    def __init__(self, console: Console | None = None):
        """Prints to the standard output if no console is given."""
        self.console = console or Console(highlight=False)
        if console is None and not self.console.is_terminal:
            self.console.width = WIDTH

    def line(self, text: str, style: str = "") -> None:
        """Prints a line without wrapping it."""
        self.console.print(self.text(text, style), soft_wrap=True)

    def text(self, text: str, style: str = "", overflow: OverflowMethod | None = None) -> Text:
        """Returns text of any origin as the console shows it: no markup, no control characters."""
        return Text(escaped(text, encoding=self.console.encoding), style, overflow=overflow)

    def heading(self, text: str) -> None:
        """Begins a section."""
        self.line(f"\n{text}", "bold")

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """Prints pairs of a name and a text in two columns."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(self.text(name), self.text(value))
        self.block(grid)

    def table(
        self, headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int]
    ) -> None:
        """Prints a table without rules; the columns `numbers` are aligned right."""
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for index, heading in enumerate(headings):
            right = index in numbers
            grid.add_column(
                self.text(heading),
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
            )
        for row in rows:
            grid.add_row(*(self.text(cell) for cell in row))
        self.block(grid)

    def block(self, content: RenderableType, indent: int = 2) -> None:
        """Prints content of several lines, without blanks at their ends."""
        with self.console.capture() as capture:
            self.console.print(Padding(content, (0, 0, 0, indent)))
        for line in capture.get().splitlines():
            self.console.file.write(line.rstrip() + "\n")

    def bar(self, heights: np.ndarray) -> str:
        """Draws one character for each height, a full block for the highest.

        Every height that is not 0 is visible.
        """
        levels = LEVELS if (self.console.encoding or "").lower().startswith("utf") else ASCII_LEVELS
        steps = np.ceil(heights / max(heights.max(), 1) * (len(levels) - 1)).astype(int)
        return "".join(levels[step] for step in steps)


def sets(page: Page, pool: Pool, held_out: Sequence[Set]) -> None:
    """Prints the sets, what is left out of each, and the domains."""
    page.heading("Tasks")
    rows = []
    trained_on = [(found, pool.table, "") for found in pool.sets]
    for found, whole, role in (
        *trained_on,
        *((found, found.table, "held out") for found in held_out),
    ):
        title = found.config.title
        if found.table is None or whole is None:
            rows.append((title, "?", role, "not here"))
            continue
        dropped = [drop for drop in whole.dropped if drop.name == title]
        thinned = sum(drop.count for drop in dropped if drop not in found.table.dropped)
        said = "; ".join(f"{drop.count:,} {drop.reason}" for drop in dropped) or "none"
        rows.append((title, f"{len(found.table.lengths) - thinned:,}", role, said))
    page.table(("set", "tasks", "", "left out"), rows, numbers=(1,))
    names = pool.table.domains
    if pool.whole and len(names) > 1:
        sizes = np.bincount(pool.table.domain, minlength=len(names))
        order = np.argsort(-sizes, kind="stable")
        rows = [
            (names[i], f"{sizes[i]:,}", f"{sizes[i] / sizes.sum():.1%}") for i in order[:DOMAINS]
        ]
        if len(order) > DOMAINS:
            rest = sizes[order[DOMAINS:]].sum()
            rows.append(
                (f"{len(order) - DOMAINS} others", f"{rest:,}", f"{rest / sizes.sum():.1%}")
            )
        page.line("")
        page.table(("domain", "tasks", "share"), rows, numbers=(1, 2))


def prompts(page: Page, pool: Pool, duplicates: int) -> None:
    """Prints the lengths of the prompts and the widths that programs are compiled for.

    It also prints the columns that rewards get in addition to the prompts.
    """
    found = pool.table
    columns = ", ".join(pool.table.columns) or "none"
    twice = f", {duplicates:,} with the prompt and answer of another one" if duplicates else ""
    said = [("tasks in the pool", f"{len(found.lengths):,}{twice}")]
    if pool.tokenized:
        p5, p50, p95 = np.percentile(found.lengths, (5, 50, 95), method="nearest")
        widths = " ".join(str(width) for width in tables.buckets(found.lengths))
        said.append(("prompt tokens", f"p5 {p5}  p50 {p50}  p95 {p95}  max {found.lengths.max()}"))
        said.append(("compiled for widths", widths))
    else:
        said.append(("prompt tokens", "not known without the tokenizer: none is dropped here yet"))
    page.line("")
    page.pairs([*said, ("columns for rewards", columns)])


def pass_rates(page: Page, table: TaskTable, names: Sequence[str]) -> None:
    """Prints the distribution of the pass rates of each reference policy; `names` are theirs."""
    rates = table.reference_pass_rates
    if rates is None:
        return
    page.heading("Reference pass rates")
    rows = []
    for name, column in zip(names, rates.T, strict=True):
        known = column[np.isfinite(column)]
        if not len(known):
            rows.append((name, "", "", "", "", "100.0%"))
            continue
        shares = [f"{np.mean(known == edge):.1%}" for edge in (0, 1)]
        row = (name, f"0 {page.bar(counts.histogram(column))} 1", f"{known.mean():.3f}", *shares)
        rows.append((*row, f"{1 - len(known) / len(column):.1%}"))
    headings = ("policy", "tasks by tenth", "mean", "at 0", "at 1", "unknown")
    page.table(headings, rows, numbers=(2, 3, 4, 5))


def embeddings(table: TaskTable) -> list[tuple[str, str]]:
    """Describes the embeddings as pairs (what, how wide and from what), if there are to be any."""
    if table.embeddings is None:
        return []
    width = f"width {table.embeddings.shape[1]:,}"
    by = table.embedded_by
    said = (
        ("not here yet, taken to be as wide as the policy")
        if by is None
        else f"{by['pooling']} of {by['model']}"
    )
    return [("embeddings", f"{width}, {said}")]


def examples(
    page: Page, table: TaskTable, text: "PreTrainedTokenizerBase", ids: Sequence[int]
) -> None:
    """Prints the prompts of the tasks `ids`, decoded from the tokens that the policy reads."""
    page.heading("Prompts as the policy reads them")
    for i in ids:
        length = int(table.lengths[i])
        said = tokenizer.decode(text, table.tokens[i, :length])
        answer = table.columns.get("answer", {i: None})[i]
        truth = "" if answer is None else f", ground truth {shortened(str(answer), 60)}"
        page.line(
            f"  task {i:,} of {table.domains[table.domain[i]]}, {length} tokens{truth}", "dim"
        )
        page.block(page.text(shortened(said, SHOWN).rstrip("\n") + "\n", overflow="fold"), indent=4)


def rewards(page: Page, trials: Sequence[Trial], reason: str) -> None:
    """Prints what the rewards gave to ground truths, or the reason why they were not tried."""
    page.heading("Rewards")
    if reason:
        page.line(f"  not tried: {reason}")
        return
    rows = [(t.name, _values(t.right), t.spelling, _values(t.empty)) for t in trials]
    page.table(("reward", "of the ground truths", "written", "of nothing"), rows, numbers=())
    for trial in trials:
        if trial.failure:
            page.line(f"  {trial.name} fails: {trial.failure}", "yellow")
        elif trial.fails:
            page.line(
                f"  {trial.name} gives no ground truth more than an empty answer: check the "
                "answer_column and what "
                "the reward looks for",
                "yellow",
            )
    if unjudged(trials):
        page.line(
            "  no reward applies to some of these tasks, all are None or fail: nothing is "
            "learned from such tasks",
            "yellow",
        )


def memories(page: Page, parts: Sequence[memory.Part]) -> None:
    """Prints the memory that each device needs, by part and phase."""
    page.heading("Memory a device")
    phases = (memory.ROLLOUT, memory.LEARN)
    rows = []
    for part in parts:
        here = [part.phase in (memory.ALWAYS, phase) for phase in phases]
        said = ("" if part.exact else "~") + counts.size(part.bytes)
        rows.append((part.name, *(said if there else "" for there in here)))
    totals = [counts.size(memory.peak(list(parts), phase)) for phase in phases]
    page.table(
        ("", "rollout", "learning"),
        [*rows, ("together", *(f"~{total}" for total in totals))],
        numbers=(1, 2),
    )
    page.line("  ~ estimated; what a compiler adds is not counted, --topology asks one", "dim")


def bounds(page: Page, needs: Sequence[tuple[str, Need]], topology: str) -> None:
    """Prints the least seconds of each stage of a step on a topology, and what bounds them."""
    page.heading(f"At best on {topology}, seconds a step")
    rows = []
    for name, need in needs:
        least = at_best(need, chip_of(topology))
        rows.append((name, counts.seconds(least.seconds), least.bound, *map(counts.seconds, least)))
    page.table(("", "at best", "bound by", *BOUNDS), rows, numbers=(1, 3, 4, 5))
    page.line(
        "  lower bounds: peak rates, all parts of a chip at once, every completion as long as "
        "it may be; a token reads "
        "all weights and the written cache once; an update repeats its forward pass with remat "
        "full; norms and softmax "
        "cost nothing",
        "dim",
    )


def programs(page: Page, found: Iterable[Compiled], topology: str) -> None:
    """Prints a line for each program as soon as it is compiled: what the compiler says of it."""
    gib = chip_of(topology).gib
    page.heading(f"Compiled for {topology}, chips of {gib} GiB")
    for program in found:
        took = f"compiled in {program.seconds:.0f} s"
        if program.failure:
            page.line(f"  {program.name:<10} does not fit: {program.failure} ({took})", "red")
            continue
        fits = "fits" if program.peak < gib * 2**30 else "does not fit"
        page.line(
            f"  {program.name:<10} {fits}: {counts.size(program.peak)} with all that stays on "
            "the chip, "
            f"{counts.size(program.temporaries)} of it temporary; "
            f"{counts.short(program.flops)}FLOP ({took})"
        )
    page.line("  FLOP a chip, as the compiler counts: the bodies of loops once", "dim")


def ending(page: Page, missing: Sequence[str]) -> None:
    """Prints what is not here yet, or that nothing is missing."""
    if not missing:
        page.line("\nready", "bold green")
        return
    page.heading("Not here yet")
    distinct = list(dict.fromkeys(missing))
    for number, each in enumerate(distinct, 1):
        page.line(f"  {number}. {each}")
    page.line(
        f"\n{len(distinct)} {'thing is' if len(distinct) == 1 else 'things are'} missing",
        "bold yellow",
    )


def shortened(text: str, limit: int) -> str:
    """Cuts the middle out of a text that is longer than `limit` characters."""
    half = limit // 2
    return (
        text
        if len(text) <= limit
        else (f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}")
    )


def _values(rewards: Sequence[float | None]) -> str:
    return "  ".join("none" if value is None else f"{value:g}" for value in rewards)
