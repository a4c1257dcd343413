"""Compares the numbers of a base commit with those of the current tree, on one machine.

    python -m benchmarks.compare_commits BASE [--rows NAME,...] [--cache FOLDER] [--out FILE]

Runs every row of ROWS, configs/quickstart.py with other flags, once in a git worktree of BASE and
once in the current tree, and prints one line a row: at how many steps all metrics are equal bit for
bit, the largest relative difference at step 1 and at any step, and the metric that it belongs to.
Metrics of time are left out. A second reward, which never applies, records the tasks that each step
rolled out; of the exported policy a digest is compared.

A metric or flag that has a new name since BASE belongs in RENAMED_METRICS or RENAMED_FLAGS.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
RECORD = "COMPARE_COMMITS_RECORD"  # environment variable: the file that `record_tasks` writes
TIMES = ("timing/", "select/seconds", "step_time")
SMALLEST = 1e-6  # relative differences of smaller numbers are relative to this

REFERENCE_METRICS = ("trained", "brier", "pearson", "auc", "effective_group_ratio")
RENAMED_METRICS: dict[str, str] = {  # name in BASE -> current name
    "dynamic_sampling/refills": "dynamic_sampling/resamples",
    "select/probes": "select/references",
    **{f"select/probes/{name}": f"select/references/{name}" for name in REFERENCE_METRICS},
}
RENAMED_FLAGS: dict[str, str] = {}  # flag in BASE -> current flag

Value = float | str | None
Metrics = dict[str, Value]


class Row(NamedTuple):
    """One run: the flags that are added to configs/quickstart.py, and the number of virtual
    devices.
    """

    flags: tuple[str, ...] = ()
    devices: int = 1


ADAPTIVE = ("--select.name", "adaptive")
DOTS = (
    *("--select.name", "dots", "--select.num-references", "32"),
    *("--tasks.embeddings", "{inputs}/embeddings.safetensors"),
    *("--select.predictor", "{inputs}/predictor.safetensors"),
)
REPLAY = ("--replay.capacity", "32")
RESAMPLE = ("--dynamic-sampling", "2")
MICRO = ("--mini-batch-size", "8", "--micro-batch-size", "32", "--num-iterations", "2")
KL = ("--kl-coef", "0.05")
LORA = ("--lora.rank", "4", "--learning-rate", "1e-3")
SHARDED = ("--mesh.fsdp", "2", "--mesh.model", "2")
ROWS = {
    "uniform": Row(("--select.name", "uniform")),
    "uniform-replacement": Row(("--select.name", "uniform", "--select.order", "replacement")),
    "easy_to_hard": Row(("--select.name", "easy_to_hard")),
    "mopps": Row(("--select.name", "mopps")),
    "greso": Row(("--select.name", "greso")),
    "retire": Row(("--select.name", "retire")),
    "bots": Row(),
    "bots-balance": Row(("--tasks.domain-column", "operation", "--select.balance", "equal")),
    "bots-per-domain": Row(("--tasks.domain-column", "operation", "--select.per-domain")),
    "adaptive": Row(ADAPTIVE),
    "adaptive-policy-embeddings": Row((*ADAPTIVE, "--select.embeddings", "policy")),
    "dots": Row(DOTS),
    "replay": Row(REPLAY),
    "dynamic-sampling": Row(RESAMPLE),
    "dots-replay-dynamic-sampling": Row((*DOTS, *REPLAY, *RESAMPLE)),
    "micro-batches": Row(MICRO),
    "kl": Row(KL),
    "lora": Row(LORA),
    "lora-kl": Row((*LORA, *KL)),
    "bots-8-devices": Row(SHARDED, devices=8),
    "adaptive-8-devices": Row((*ADAPTIVE, "--mesh.fsdp", "4"), devices=8),
    "dots-8-devices": Row((*DOTS, *SHARDED), devices=8),
}


class Run(NamedTuple):
    """The numbers of one run."""

    metrics: dict[str, Metrics]  # by step
    tasks: dict[str, str]  # by step: a digest of the prompts that were rolled out, in sorted order
    policy: str  # digest of the exported policy


class Difference(NamedTuple):
    """The difference between two runs."""

    steps: int
    equal_steps: int  # at which all metrics are equal bit for bit
    equal_tasks: int  # steps at which the same tasks were rolled out
    equal_policy: bool
    at_step_1: float  # largest relative difference of a metric at step 1
    metric_at_step_1: str
    at_any_step: float
    metric_at_any_step: str
    only_in_base: tuple[str, ...]  # metrics, under their current names
    only_in_current: tuple[str, ...]


def record_tasks(
    prompts: list, completions: list, *, trainer_state: object = None, **columns: object
) -> list[None]:
    """Appends (step, prompt) to the file RECORD; a reward that never applies."""
    # an evaluation counts to the step after it
    step = getattr(trainer_state, "global_step", -1) + 1
    lines = [json.dumps([step, prompt]) + "\n" for prompt in prompts]
    descriptor = os.open(os.environ[RECORD], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # one write, so that lines of several workers do not mix
    os.write(descriptor, "".join(lines).encode())
    os.close(descriptor)
    return [None] * len(completions)


def jaxrft(
    tree: Path, inputs: Path, *arguments: str, devices: int = 1, record: Path | None = None
) -> None:
    """Runs the command line of a tree; raises RuntimeError with its last words when it fails."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(inputs), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        RECORD: str(record),
    }
    if devices > 1:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {EIGHT_DEVICES}".strip()
        # Otherwise a collective of virtual devices may wait for one of another program, on a busy
        # machine.
        environment["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
    command = [sys.executable, "-P", "-m", "jaxrft.cli", *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)} in {tree} exits with {done.returncode}: {done.stderr[-2000:]}"
        )


def run_row(tree: Path, inputs: Path, row: Row, steps: int, renamed: Mapping[str, str]) -> Run:
    """Returns the numbers of one run in a tree, whose flags have the names `renamed`."""
    flags = [renamed.get(flag, flag).format(inputs=inputs) for flag in row.flags]
    limits = ("--steps", str(steps), "--eval-steps", str(steps))
    rewards = ("--rewards", "exact", "compare_commits:record_tasks")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        record = Path(folder) / "record"
        arguments = (
            "configs/quickstart.py",
            "--output-dir",
            str(output),
            *limits,
            *rewards,
            *flags,
        )
        jaxrft(tree, inputs, "train", *arguments, devices=row.devices, record=record)
        metrics = read_metrics(output / "metrics.jsonl")
        tasks = read_tasks(record)
        weights = sorted((output / "policy").glob("*.safetensors"))
        policy = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    return Run(metrics, tasks, policy)


def read_metrics(path: Path) -> dict[str, Metrics]:
    """Returns step -> metric -> value, without times."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {str(entry.pop("step")): _without_times(entry) for entry in entries}


def _without_times(entry: Metrics) -> Metrics:
    return {name: value for name, value in entry.items() if not name.startswith(TIMES)}


def read_tasks(path: Path) -> dict[str, str]:
    """Returns step -> digest of the prompts that `record_tasks` wrote, whose order depends on the
    workers.
    """
    prompts = defaultdict(list)
    for line in path.read_text().splitlines():
        step, prompt = json.loads(line)
        prompts[str(step)].append(json.dumps(prompt))
    return {
        step: hashlib.sha256("\n".join(sorted(of_step)).encode()).hexdigest()
        for step, of_step in prompts.items()
    }


def compare(base: Run, current: Run) -> Difference:
    """Returns how two runs differ; a metric that is null equals null only."""
    renamed = {step: _renamed(entry) for step, entry in base.metrics.items()}
    before = {name for entry in renamed.values() for name in entry}
    after = {name for entry in current.metrics.values() for name in entry}
    at_step_1 = _differences(renamed.get("1", {}), current.metrics.get("1", {}))
    steps = sorted(renamed.keys() | current.metrics.keys())
    each = [_differences(renamed.get(step, {}), current.metrics.get(step, {})) for step in steps]
    first, first_metric = max(at_step_1, default=(math.inf, "no metrics"))
    largest, metric = max(
        (pair for pairs in each for pair in pairs), default=(math.inf, "no metrics")
    )
    tasks = base.tasks.keys() | current.tasks.keys()
    return Difference(
        steps=len(steps),
        equal_steps=sum(all(difference == 0 for difference, _ in pairs) for pairs in each),
        equal_tasks=sum(base.tasks.get(step) == current.tasks.get(step) for step in tasks),
        equal_policy=base.policy == current.policy,
        at_step_1=first,
        metric_at_step_1=first_metric if first else "",
        at_any_step=largest,
        metric_at_any_step=metric if largest else "",
        only_in_base=tuple(sorted(before - after)),
        only_in_current=tuple(sorted(after - before)),
    )


def _renamed(entry: Metrics) -> Metrics:
    return {RENAMED_METRICS.get(name, name): value for name, value in entry.items()}


def _differences(base: Metrics, current: Metrics) -> list[tuple[float, str]]:
    """Returns (relative difference, name) of the metrics that both have."""
    return [(_difference(base[name], current[name]), name) for name in base.keys() & current.keys()]


def _difference(base: Value, current: Value) -> float:
    if base == current:
        return 0.0
    if isinstance(base, int | float) and isinstance(current, int | float):
        return abs(current - base) / max(abs(base), abs(current), SMALLEST)
    return math.inf


class Base:
    """The base commit: a worktree that is made when it is needed, and a cache of its runs."""

    def __init__(self, commit: str, cache: Path, folder: Path):
        """Resolves the commit, keeps its runs in `cache` and its worktree in `folder`."""
        self.commit = git("rev-parse", "--verify", f"{commit}^{{commit}}")
        self.cache = cache / self.commit[:12]
        self.tree = folder / "base"
        self.inputs = self.cache / "inputs"

    def run(self, name: str, steps: int) -> Run:
        """Returns a row's numbers, from the cache if it has them."""
        row = ROWS[name]
        key = hashlib.sha256(json.dumps([row, steps]).encode()).hexdigest()[:12]
        path = self.cache / f"{name}-{steps}-{key}.json"
        if path.exists():
            return Run(**json.loads(path.read_text()))
        result = run_row(self.tree, self.inputs, row, steps, {})
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result._asdict()) + "\n")
        unfinished.replace(path)
        return result

    def prepare(self) -> None:
        """Makes the embeddings and the predictor that both trees use, once."""
        self.inputs.mkdir(parents=True, exist_ok=True)
        # where workers find `record_tasks`
        shutil.copy(__file__, self.inputs / "compare_commits.py")
        embeddings = self.inputs / "embeddings.safetensors"
        predictor = self.inputs / "predictor.safetensors"
        config = "configs/quickstart.py"
        if not embeddings.exists():
            jaxrft(
                self.tree, self.inputs, "prepare", "embeddings", config, "--out", str(embeddings)
            )
        if not predictor.exists():
            given = ("--tasks.embeddings", str(embeddings), "--out", str(predictor))
            jaxrft(self.tree, self.inputs, "prepare", "predictor", config, *given)


def git(*arguments: str) -> str:
    """Returns what a git command in this repository prints."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


@contextmanager
def worktree(commit: str, tree: Path) -> Iterator[None]:
    """Checks a commit out into the folder `tree`, which is removed at the end."""
    try:
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        yield
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        git("worktree", "prune")


@contextmanager
def open_base(commit: str, cache: Path | None) -> Iterator[Base]:
    """Checks the commit out into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        base = Base(commit, (cache or Path(folder) / "cache").resolve(), Path(folder))
        with worktree(base.commit, base.tree):
            base.prepare()
            yield base


def run_base(base: Base, steps: int, name: str) -> Run:
    """Runs one row at the base, unless the cache has it."""
    return base.run(name, steps)


def compare_row(base: Base, steps: int, name: str) -> Difference:
    """Runs one row in both trees."""
    before = base.run(name, steps)
    after = run_row(ROOT, base.inputs, ROWS[name], steps, RENAMED_FLAGS)
    return compare(before, after)


HEADER = (
    "| run | steps equal bit for bit | same tasks | same policy | step 1 | metric | any step | "
    "metric | only in one |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def table_row(name: str, d: Difference) -> str:
    """Returns the line of the table."""
    missing = [f"-{metric}" for metric in d.only_in_base] + [
        f"+{metric}" for metric in d.only_in_current
    ]
    cells = (
        *(
            name,
            f"{d.equal_steps} of {d.steps}",
            f"{d.equal_tasks} steps",
            "yes" if d.equal_policy else "no",
        ),
        *(f"{d.at_step_1:.1e}", d.metric_at_step_1, f"{d.at_any_step:.1e}", d.metric_at_any_step),
        " ".join(missing),
    )
    return f"| {' | '.join(cells)} |"


def parse_rows(text: str) -> list[str]:
    """Returns the names of rows in a list with commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no row {', '.join(unknown)}: choose of {', '.join(ROWS)}"
        )
    return names


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_commits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", help="commit that the current tree is compared with")
    parser.add_argument(
        "--rows", type=parse_rows, default=list(ROWS), metavar="NAME,...", help="only some rows"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1, help="rows that run at the same time")
    parser.add_argument("--cache", type=Path, help="folder that keeps the runs of BASE")
    parser.add_argument("--base-only", action="store_true", help="run BASE only, to fill the cache")
    parser.add_argument("--out", type=Path, help="write <out>.json and <out>.md")
    options = parser.parse_args(arguments)
    if options.base_only and not options.cache:
        parser.error("--base-only fills a cache: name its folder with --cache")
    return options


def write_results(
    path: Path, commits: dict[str, str], steps: int, results: dict[str, Difference]
) -> None:
    """Writes the table, once as JSON and once as Markdown."""
    rows = {name: difference._asdict() for name, difference in results.items()}
    record = json.dumps({**commits, "steps": steps, "rows": rows}, indent=2)
    path.with_suffix(".json").write_text(record + "\n")
    title = f"{steps} steps of the quickstart at {commits['base']} and at {commits['current']}."
    lines = [
        title,
        "",
        HEADER,
        *(table_row(name, difference) for name, difference in results.items()),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> None:
    """Runs the command; exits with 1 if a row failed."""
    options = parse_arguments(arguments)
    job = run_base if options.base_only else compare_row
    results = {}
    failed = []
    with open_base(options.base, options.cache) as base, ThreadPoolExecutor(options.jobs) as pool:
        print("" if options.base_only else HEADER)
        running = {name: pool.submit(job, base, options.steps, name) for name in options.rows}
        for name, future in running.items():
            try:
                result = future.result()
            except RuntimeError as error:
                failed.append(name)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            results[name] = result
            print(table_row(name, result) if isinstance(result, Difference) else name, flush=True)
        commits = {
            "base": base.commit,
            "current": git("describe", "--always", "--dirty", "--abbrev=40"),
        }
    if options.out and not options.base_only:
        write_results(options.out, commits, options.steps, results)
    if failed:
        sys.exit(f"these rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    from benchmarks import _script  # not of a grading worker, which imports `record_tasks` alone

    _script.run(main)
