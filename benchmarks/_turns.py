"""Measures processes by turns, so that all run under the same load, and prints medians."""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks import _shape
from benchmarks._script import whole_number
from benchmarks._serve import Measured
from benchmarks._shape import Shape
from benchmarks.compare_commits import git, worktree
from benchmarks.select import machine
from jaxrft.errors import InputError
from jaxrft.fields import path_argument

ROOT = Path(__file__).resolve().parents[1]
OURS, BASE, RATES = "jaxrft", "base", "rates"
PATIENCE = 10.0  # seconds that a process which is not measured any more has to end
PEERS = ("hf_torch", "tunix_jax", "trl_grpo")


class Medians(NamedTuple):
    """What was measured of one subject."""

    seconds: float
    tokens: float
    compile_seconds: float  # what the first run took longer than a median one
    peak_bytes: float
    stages: Measured  # median seconds of each stage; {} = it has none
    runs: tuple[float, ...]  # seconds of each run, in order
    computed: float | None = None  # tokens computed for each token in the loss; None = not known


class Worker:
    """A process that prepares a subject and measures it when it is told to."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], cwd: Path):
        """Starts the process and waits until its first run is over."""
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise InputError(
                f"the process of {self.name} ended with {self.process.wait()}: see its words above"
            )
        return json.loads(line)

    def measure(self) -> Measured:
        """Lets the process run once."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process: asks it to, and kills it when it does not end in PATIENCE seconds."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def parse_arguments(
    name: str, doc: str | None, arguments: list[str]
) -> tuple[argparse.Namespace, Shape]:
    """Returns the options of a script, and the shape that they describe."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _shape.add_flags(parser)
    parser.add_argument(
        "--repeats", type=whole_number("repeats", 1), default=5, help="runs of each (5)"
    )
    parser.add_argument(
        "--against", metavar="COMMIT", help="measures this commit by turns with the tree"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[],
        metavar="NAME=PYTHON",
        help=f"{', '.join(PEERS)}, each with the python of its environment",
    )
    parser.add_argument("--json", type=path_argument, help="file of the figures")
    options = parser.parse_args(arguments)
    for peer in options.peers:
        if peer.partition("=")[0] not in PEERS or "=" not in peer:
            parser.error(f"peers has {peer!r}: give NAME=PYTHON with a name of {', '.join(PEERS)}")
    return options, _shape.from_flags(parser, options)


def environment_of(*paths: Path) -> dict[str, str]:
    """Returns the environment of a process that imports from `paths` first."""
    given = {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    return os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | given


def write_request(path: Path, what: str, shape: Shape, lengths: Sequence[int]) -> str:
    """Writes what a process is to measure; returns the path."""
    entries = {"what": what, "shape": dataclasses.asdict(shape), "lengths": [*lengths]}
    path.write_text(json.dumps(entries))
    return str(path)


@contextmanager
def open_workers(
    what: str, options: argparse.Namespace, shape: Shape
) -> Iterator[dict[str, Worker]]:
    """Starts the processes one after the other: ours first, whose lengths all peers are given."""
    workers = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(
            name: str, *command: str, paths: Sequence[Path], lengths: Sequence[int] = ()
        ) -> None:
            request = write_request(folder / f"{name}.json", what, shape, lengths)
            print(f"{name} prepares and compiles", file=sys.stderr, flush=True)
            worker = Worker(name, [*command, request], environment_of(*paths), folder)
            stack.callback(worker.close)
            workers[name] = worker

        command = (sys.executable, "-P", "-m", f"benchmarks.{what}", "--serve")
        start(OURS, *command, paths=[ROOT])
        lengths = workers[OURS].about["lengths"]
        if options.against:
            commit = git("rev-parse", "--verify", f"{options.against}^{{commit}}")
            stack.enter_context(worktree(commit, folder / "tree"))
            (folder / "scripts").mkdir()
            (folder / "scripts/benchmarks").symlink_to(ROOT / "benchmarks")
            start(BASE, *command, paths=[folder / "scripts", folder / "tree"])
        for peer in options.peers:
            name, _, python = peer.partition("=")
            start(
                name, python, "-P", "-m", f"benchmarks.peers.{name}", paths=[ROOT], lengths=lengths
            )
        start(RATES, sys.executable, "-P", "-m", "benchmarks._rates", paths=[ROOT])
        yield workers


def take_turns(workers: dict[str, Worker], repeats: int) -> dict[str, list[Measured]]:
    """Measures all workers `repeats` times by turns."""
    runs = {name: [] for name in workers}
    for repeat in range(repeats):
        for name, worker in workers.items():
            measured = worker.measure()
            runs[name].append(measured)
            print(f"{repeat + 1} {name} {measured['seconds']:.3f} s", file=sys.stderr, flush=True)
    return runs


def medians(about: dict, runs: list[Measured]) -> Medians:
    """Returns the median of each number over the runs."""
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    seconds = middle.pop("seconds")
    tokens = middle.pop("tokens")
    peak_bytes = middle.pop("peak_bytes")
    computed = middle.pop("computed", None)
    return Medians(
        seconds=seconds,
        tokens=tokens,
        compile_seconds=max(0.0, about["first"]["seconds"] - seconds),
        peak_bytes=peak_bytes,
        computed=computed,
        stages=middle,
        runs=tuple(run["seconds"] for run in runs),
    )


class Need(NamedTuple):
    """What a run cannot do without."""

    flops: int
    bytes: int


def needs(what: str, shape: Shape, lengths: Sequence[int]) -> Need:
    """Counts the operations and bytes of a rollout, an update, or a step of both."""
    rollout = _shape.forward_flops(shape, lengths)
    update = _shape.update_flops(shape, lengths)
    flops = {"rollout": rollout, "learn": update, "step": rollout + update}[what]
    return Need(flops, 0 if what == "learn" else _shape.decode_bytes(shape, lengths))


HEADER = (
    "| | seconds | tokens/s | seconds / first's | of the products' rate | of the copy's "
    "| computed / in loss | compile | peak memory |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def table(subjects: dict[str, Medians], need: Need, rates: Measured) -> str:
    """Formats a line for each subject."""
    first = next(iter(subjects.values())).seconds
    lines = [HEADER]
    for name, each in subjects.items():
        cells = (
            f"{each.seconds:.3f}",
            f"{each.tokens / each.seconds:,.0f}",
            f"{each.seconds / first:.2f}",
            f"{need.flops / each.seconds / rates['flops']:.1%}",
            f"{need.bytes / each.seconds / rates['bytes']:.1%}" if need.bytes else "-",
            "-" if each.computed is None else f"{each.computed:.2f}",
            f"{each.compile_seconds:.1f} s",
            f"{each.peak_bytes / 2**20:,.0f} MiB",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stage_table(subjects: dict[str, Medians]) -> str:
    """Formats the seconds of each stage of a step, and their shares."""
    staged = {name: each for name, each in subjects.items() if each.stages}
    names = next(iter(staged.values())).stages
    lines = [f"| | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for name, each in staged.items():
        total = sum(each.stages.values())
        cells = (f"{x:.3f} s, {x / total:.0%}" for x in each.stages.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(what: str, doc: str | None, arguments: list[str]) -> None:
    """Measures `what` as the flags say, prints the tables, and writes the figures."""
    options, shape = parse_arguments(what, doc, arguments)
    with open_workers(what, options, shape) as workers:
        turns = take_turns(workers, options.repeats)
        about = {name: worker.about for name, worker in workers.items()}
    subjects = {name: medians(about[name], runs) for name, runs in turns.items()}
    rates = subjects.pop(RATES).stages
    lengths = about[OURS]["lengths"]
    need = needs(what, shape, lengths)
    command = f"python -m benchmarks.{what} {' '.join(arguments)}"
    print(f"`{command}`\n\n{machine()}\n")
    print(
        f"{len(lengths)} completions, {sum(lengths):,} tokens; matrix products "
        f"{rates['flops'] / 1e9:,.1f} GFLOP/s, "
        f"copy {rates['bytes'] / 1e9:,.1f} GB/s\n"
    )
    print(table(subjects, need, rates))
    if subjects[OURS].stages:
        print(f"\n{stage_table(subjects)}")
    if options.json:
        figures = {
            "command": command,
            "machine": machine(),
            "shape": dataclasses.asdict(shape),
            "lengths": lengths,
            "need": need._asdict(),
            "rates": rates,
            "medians": {name: each._asdict() for name, each in subjects.items()},
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
