"""Renders the page of a dry run: compact, and plain text where there is no terminal."""

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
from jaxrft.dry_run.programs import Compiled
from jaxrft.dry_run.resolve import TaskPool, TaskSet
from jaxrft.dry_run.reward_check import RewardCheck, any_without_reward
from jaxrft.host.terminal import escaped
from jaxrft.lm.tokenizer import decode
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


def sets(page: Page, pool: TaskPool, held_out: Sequence[TaskSet]) -> None:
    """Prints the sets, the number of tasks left out of each and why, and the domains."""
    page.heading("Tasks")
    rows = [_set_row(task_set, pool.table, "") for task_set in pool.sets]
    rows += [_set_row(task_set, task_set.table, "held out") for task_set in held_out]
    page.table(("set", "tasks", "", "left out"), rows, numbers=(1,))
    names = pool.table.domains
    if pool.complete and len(names) > 1:
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


def _set_row(task_set: TaskSet, used: TaskTable | None, role: str) -> tuple[str, str, str, str]:
    """Formats the row of a set: its title, number of tasks, role, and the tasks left out.

    `used` is the table that its tasks end up in, which may leave out more of them.
    """
    title = task_set.config.title
    if task_set.table is None or used is None:
        return title, "?", role, "missing"
    dropped = [drop for drop in used.dropped if drop.name == title]
    thinned = sum(drop.count for drop in dropped if drop not in task_set.table.dropped)
    reasons = "; ".join(f"{drop.count:,} {drop.reason}" for drop in dropped) or "none"
    return title, f"{len(task_set.table.lengths) - thinned:,}", role, reasons


def prompts(page: Page, pool: TaskPool, duplicates: int) -> None:
    """Prints the lengths of the prompts and the widths that programs are compiled for.

    It also prints the columns that rewards get in addition to the prompts.
    """
    lengths = pool.table.lengths
    columns = ", ".join(pool.table.columns) or "none"
    repeated = f", {duplicates:,} with the prompt and answer of another one" if duplicates else ""
    pairs = [("tasks in the pool", f"{len(lengths):,}{repeated}")]
    if pool.tokenized:
        p5, p50, p95 = np.percentile(lengths, (5, 50, 95), method="nearest")
        widths = " ".join(str(width) for width in tables.buckets(lengths))
        pairs.append(("prompt tokens", f"p5 {p5}  p50 {p50}  p95 {p95}  max {lengths.max()}"))
        pairs.append(("compiled for widths", widths))
    else:
        pairs.append(("prompt tokens", "not known without the tokenizer: none is dropped here yet"))
    page.line("")
    page.pairs([*pairs, ("columns for rewards", columns)])


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
        extremes = [f"{np.mean(known == edge):.1%}" for edge in (0, 1)]
        row = (name, f"0 {page.bar(counts.histogram(column))} 1", f"{known.mean():.3f}", *extremes)
        rows.append((*row, f"{1 - len(known) / len(column):.1%}"))
    headings = ("policy", "tasks by tenth", "mean", "at 0", "at 1", "unknown")
    page.table(headings, rows, numbers=(2, 3, 4, 5))


def embeddings(table: TaskTable) -> list[tuple[str, str]]:
    """Describes the embeddings as pairs (what, their width and source); empty without any."""
    if table.embeddings is None:
        return []
    width = f"width {table.embeddings.shape[1]:,}"
    source = table.embedded_by
    said = (
        "missing, taken to be as wide as the policy"
        if source is None
        else f"{source['pooling']} of {source['model']}"
    )
    return [("embeddings", f"{width}, {said}")]


def examples(
    page: Page, table: TaskTable, tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]
) -> None:
    """Prints the prompts of the tasks `ids`, decoded from the tokens that the policy reads."""
    page.heading("Prompts as the policy reads them")
    for i in ids:
        length = int(table.lengths[i])
        prompt = decode(tokenizer, table.tokens[i, :length])
        answer = tables.reference(table, i)
        truth = "" if answer is None else f", ground truth {shortened(answer, 60)}"
        page.line(
            f"  task {i:,} of {table.domains[table.domain[i]]}, {length} tokens{truth}", "dim"
        )
        page.block(
            page.text(shortened(prompt, SHOWN).rstrip("\n") + "\n", overflow="fold"), indent=4
        )


def rewards(page: Page, checks: Sequence[RewardCheck], reason: str) -> None:
    """Prints the rewards of ground truths, or the reason why none was graded."""
    page.heading("Rewards")
    if reason:
        page.line(f"  not tried: {reason}")
        return
    rows = [(c.name, _values(c.right), c.spelling, _values(c.empty)) for c in checks]
    page.table(
        ("reward", "of the ground truths", "written", "of an empty answer"), rows, numbers=()
    )
    for check in checks:
        if check.failure:
            page.line(f"  {check.name} fails: {check.failure}", "yellow")
        elif check.fails:
            page.line(
                f"  {check.name} gives no ground truth more than an empty answer: check the "
                "answer_column and the format that the reward expects",
                "yellow",
            )
    if any_without_reward(checks):
        page.line(
            "  no reward applies to some of these tasks, all are None or fail: such tasks give "
            "no training signal",
            "yellow",
        )


def memory_use(page: Page, parts: Sequence[memory.Part]) -> None:
    """Prints the memory that each device needs, by part and phase."""
    page.heading("Memory a device")
    phases = (memory.ROLLOUT, memory.LEARN)
    rows = []
    for part in parts:
        size = ("" if part.exact else "~") + counts.size(part.bytes)
        cells = (size if part.phase in (memory.ALWAYS, phase) else "" for phase in phases)
        rows.append((part.name, *cells))
    totals = [counts.size(memory.peak(list(parts), phase)) for phase in phases]
    page.table(
        ("", "rollout", "learning"),
        [*rows, ("together", *(f"~{total}" for total in totals))],
        numbers=(1, 2),
    )
    page.line(
        "  ~ estimated; what a compiler adds is not counted: --topology compiles and counts it",
        "dim",
    )


def bounds(page: Page, needs: Sequence[tuple[str, Need]], topology: str) -> None:
    """Prints the least seconds of each stage of a step on a topology, and what bounds them."""
    page.heading(f"At best on {topology}, seconds a step")
    rows = []
    for name, need in needs:
        least = at_best(need, chip_of(topology))
        rows.append((name, counts.seconds(least.seconds), least.bound, *map(counts.seconds, least)))
    page.table(("", "at best", "bound by", *BOUNDS), rows, numbers=(1, 3, 4, 5))
    page.line(
        "  lower bounds: peak rates, all parts of a chip at once, every completion as long as it "
        "may be; a token reads all weights and the written cache once; an update repeats its "
        "forward pass with remat full; norms and softmax cost nothing",
        "dim",
    )


def programs(page: Page, compiled: Iterable[Compiled], topology: str) -> bool:
    """Prints a line for each program as soon as it is compiled: its memory and arithmetic.

    Returns whether all of them fit.
    """
    gib = chip_of(topology).gib
    all_fit = True
    page.heading(f"Compiled for {topology}, chips of {gib} GiB")
    for program in compiled:
        took = f"compiled in {program.seconds:.0f} s"
        if program.failure:
            all_fit = False
            page.line(f"  {program.name:<15} does not fit: {program.failure} ({took})", "red")
            continue
        enough = program.peak < gib * 2**30
        all_fit = all_fit and enough
        fits = "fits" if enough else "does not fit"
        page.line(
            f"  {program.name:<15} {fits}: {counts.size(program.peak)} with the state that "
            f"stays on the chip, {counts.size(program.temporaries)} of it temporary; "
            f"{counts.short(program.flops, 'FLOP')} ({took})"
        )
    page.line("  FLOP a chip, as the compiler counts: the bodies of loops once", "dim")
    return all_fit


def missing(page: Page, sentences: Sequence[str], *, fits: bool = True) -> None:
    """Prints the missing inputs, a sentence each, or that the run is ready.

    `fits` tells whether all programs fit into the memory of the chips.
    """
    if not sentences and fits:
        page.line("\nready", "bold green")
        return
    if not sentences:
        page.line("\nnot all programs fit", "bold red")
        return
    page.heading("Missing")
    distinct = list(dict.fromkeys(sentences))
    for number, sentence in enumerate(distinct, 1):
        page.line(f"  {number}. {sentence}")
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
