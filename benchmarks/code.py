"""Measures the speed of the reward `code`: gradings a second of short programs in a pool.

Half of the programs are right, a quarter is wrong and a quarter raises; a task has three tests.
With `--verl PYTHON`, of an environment as in `peers/verl_code.txt`, verl's prime_code takes turns
with ours on the same completions. It has no sandbox and knows no asserts.
"""

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import _script
from benchmarks._turns import ROOT, Worker, environment_of
from jaxrft.errors import InputError
from jaxrft.fields import Checked, FilePath
from jaxrft.rewards import Pool

PROGRAMS = {
    "right": "a, b = map(int, input().split())\nprint(a + b)",
    "slow right": "a, b = map(int, input().split())\nfor _ in range(b): a += 1\nprint(a)",
    "wrong": "a, b = map(int, input().split())\nprint(a - b)",
    "error": "a, b = map(int, input().split())\nprint(a / 0)",
}
FUNCTIONS = {
    "right": "def add(a, b):\n    return a + b",
    "slow right": "def add(a, b):\n    for _ in range(b): a += 1\n    return a",
    "wrong": "def add(a, b):\n    return a - b",
    "error": "def add(a, b):\n    return a / 0",
}
TESTS = 3  # of a task


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.code")
    measure(**vars(options))


@dataclass(frozen=True)
class Options(Checked):
    """Measures the reward `code`, prints, and writes what it printed as JSON to `output`."""

    gradings: int = 400
    """Completions of a batch."""
    workers: int = 2
    """Grading processes."""
    repeats: int = 3
    """Batches whose median counts."""
    verl: FilePath | None = None
    """Python that has verl's prime_code, which then takes turns."""
    output: FilePath | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        """Raises InputError for numbers out of range, too."""
        super().__post_init__()
        for name in ("gradings", "workers", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")


def measure(
    gradings: int = 400,
    workers: int = 2,
    repeats: int = 3,
    verl: str | Path | None = None,
    output: str | Path | None = None,
) -> dict[str, object]:
    """Measures, prints, and writes what it printed as JSON to `output`."""
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "tests_a_grading": TESTS,
        "workers": workers,
    }
    for kind in ("programs", "calls", "asserts"):
        peer = None if kind == "asserts" else verl
        figures[kind] = speed(kind, gradings, workers, repeats, peer)
    text = json.dumps(figures, indent=2)
    print(text)
    if output:
        Path(output).write_text(text + "\n")
    return figures


def speed(
    kind: str, gradings: int, workers: int, repeats: int, verl: str | Path | None = None
) -> dict[str, object]:
    """Measures gradings a second of one kind of tests, by turns with verl's if it is given."""
    completions, answers = tasks(kind, gradings)
    prompts = [""] * gradings
    rates: list[float] = []
    verl_rates: list[float] = []
    loads: list[float] = []
    verl_solved = 0.0
    verl_processor: list[float] = []
    with ExitStack() as stack:
        before = _processor_seconds()
        pool = stack.enter_context(Pool([("code", "code")], workers=workers, timeout=60.0))
        graded = pool.grade(prompts[:8], completions[:8], {"answer": answers[:8]})
        peer = None
        if verl is not None:
            peer = stack.enter_context(_open_verl(verl, completions, answers, workers))
        for _ in range(repeats):
            loads.append(round(os.getloadavg()[0], 1))
            start = time.perf_counter()
            graded = pool.grade(prompts, completions, {"answer": answers})
            rates.append(round(gradings / (time.perf_counter() - start), 1))
            if peer is not None:
                measured = peer.measure()
                verl_rates.append(round(gradings / measured["seconds"], 1))
                verl_processor.append(measured["processor_seconds"])
                verl_solved = measured["solved_share"]
        pool.close()
        used = _processor_seconds() - before
    figures: dict[str, object] = {
        "gradings_per_second": statistics.median(rates),
        "repeats": rates,
        "load_of_the_machine": loads,  # other programs share its cores
        "processor_ms_a_grading": round(1000 * used / (8 + repeats * gradings), 1),
        "solved_share": round(graded.rewards[0].count(1.0) / gradings, 3),
        "failed": len(graded.lost),
    }
    if verl_rates:
        ratios = [ours / theirs for ours, theirs in zip(rates, verl_rates, strict=True)]
        figures["verl"] = {
            "gradings_per_second": statistics.median(verl_rates),
            "repeats": verl_rates,
            "processor_ms_a_grading": round(1000 * statistics.mean(verl_processor) / gradings, 1),
            "solved_share": round(verl_solved, 3),
        }
        figures["ratio_to_verl"] = round(statistics.median(ratios), 2)
    return figures


@contextmanager
def _open_verl(
    python: str | Path, completions: list[str], answers: list[str], workers: int
) -> Iterator[Worker]:
    """Starts a process that grades the same with verl's prime_code."""
    request = {"workers": workers, "completions": completions, "answers": answers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request))
        command = [str(python), "-P", "-m", "benchmarks.peers.verl_code", str(path)]
        worker = Worker("verl", command, environment_of(ROOT), Path(folder))
        try:
            yield worker
        finally:
            worker.close()


def tasks(kind: str, gradings: int) -> tuple[list[str], list[str]]:
    """Returns completions and tests in turn, half of which are right."""
    pairs = [(3, 4), (10, 20), (500, 700)]
    answer: dict[str, object] = {}
    if kind == "asserts":
        answer["functional"] = "\n".join(f"assert add({a}, {b}) == {a + b}" for a, b in pairs)
    elif kind == "calls":
        answer["fn_name"] = "add"
        answer["inputs"] = [f"{a}\n{b}" for a, b in pairs]
        answer["outputs"] = [str(a + b) for a, b in pairs]
    else:
        answer["inputs"] = [f"{a} {b}\n" for a, b in pairs]
        answer["outputs"] = [f"{a + b}\n" for a, b in pairs]
    sources = list((PROGRAMS if kind == "programs" else FUNCTIONS).values())
    blocks = [f"Like this:\n```python\n{source}\n```\n" for source in sources]
    return [blocks[i % len(blocks)] for i in range(gradings)], [json.dumps(answer)] * gradings


def _processor_seconds() -> float:
    """Returns the processor time of what this process has waited for: workers and sandboxes.

    A sandbox that is killed is waited for by its worker's subreaper, and that by this process.
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    _script.run(main)
