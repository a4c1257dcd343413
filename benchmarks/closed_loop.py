"""Measures what choosing tasks saves in training: rollouts, tokens, seconds to uniform's level.

    python -m benchmarks.closed_loop --runs runs/closed_loop --jobs 2

The tiny policy is trained on families of built-in tasks (jaxrft.tasks.builtin), by every
selector with the same seeds, and evaluated often on held-out tasks. What the oracle saves is the
headroom of a family. The expected winners:

* digits-kinds: selectors that use the prompt. A group is informative about all tasks of its kind
  and length, so that `adaptive` and `dots`, which have the tiny policy's embeddings, should come
  near the oracle. The references are informative too, but about other policies; the weak and the
  strong one disagree most about lists that are too long for this policy.
* digits-visits: selectors with a memory. The prompt is uninformative and there are no references,
  so that `bots` cannot run, but every task is visited again: `adaptive`. `dots` pays for reference
  sets that predict nothing.
* digits-references: `bots`. Tasks with wrong truths have reference pass rates of 0, and the prompt
  is uninformative; without references, each solvable task is found among four that are not.
* digits-far: four of five tasks are out of reach at first, and the prompt tells which; references
  too. It is measured by `benchmarks.experiment` only.
* digits-easy: no selector by much. Three of four groups are informative with uniform already.

A level is reached at the first of the evaluations whose mean with the two before is at least
uniform's final level, the mean of its last three, with the same seed. A run that ends below is
counted as not reached, and enters with its full cost, an underestimate. Reference sets and
uninformative groups count as rollouts; those behind reference pass rates are counted separately, as
if they had been made for one run. The share of the headroom is the ratio of mean log savings in
rollouts, the selector's over the oracle's. Intervals are 95 %: Student's t over seeds, for that
share a paired bootstrap. `dots` has 32 references every 16 steps, a quarter of its rollouts as in
its paper; its predictor is fitted on the pass rates of the tiny policy and of six that uniform
selection trained, with other seeds and three learning rates. `NAME+replay` is a selector with half
of each batch from a replay of the last 256 informative groups, in as many steps. Every run has a
folder; one that is finished is not run again. Results are in results/closed_loop.md, their
discussion in results/closed_loop_notes.md; those with replay in results/replay.md.
"""

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _curves, _savings, _script, _similarity
from benchmarks._oracle import known_pass_rates
from benchmarks._savings import Curve
from benchmarks._script import whole_number
from jaxrft.assets import TINY
from jaxrft.config import Config, EvalConfig, ReplayConfig, SelectConfig, TasksConfig
from jaxrft.fields import path_argument
from jaxrft.host.files import UnreadableJSON, read_json, replace_file
from jaxrft.report import records
from jaxrft.tasks import builtin
from jaxrft.train import loop

RESULTS = Path(__file__).parent / "results"
SELECTORS = ("uniform", "bots", "dots", "adaptive", "oracle")
REPLAY = "+replay"
REPLAYED = tuple(name + REPLAY for name in SELECTORS)
# behind the predictor of `dots`: their seeds and learning rates
POLICIES = ((100, 101), (1e-4, 2e-4, 4e-4))
MEASURE_EVERY = 8  # steps from one measurement of the oracle to the next
SLOWEST = 5  # medians that a step is taken to last at most: those that compile last longer


class Setting(NamedTuple):
    """How a family is trained on; of the learning rates in the results' notes, the one that is best
    for uniform; on digits-easy the largest at which none of its seeds fails."""

    learning_rate: float
    steps: int = 240
    batch_size: int = 8
    num_generations: int = 8
    eval_steps: int = 12


SETTINGS = {
    "digits-kinds": Setting(2e-4),
    "digits-visits": Setting(2e-4),
    "digits-references": Setting(2e-4),
    "digits-far": Setting(4e-4),
    "digits-easy": Setting(2e-4, steps=100, batch_size=4, num_generations=16, eval_steps=5),
}


class Run(NamedTuple):
    """A run, identified by its settings."""

    family: str
    selector: str  # with or without REPLAY behind it
    learning_rate: float
    seed: int


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    options = parse(arguments)
    runs = [
        Run(family, selector, rate, seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for family in options.families
        for selector in options.selectors
        if selector.removesuffix(REPLAY) != "bots" or builtin.FAMILIES[family].references
        for rate in options.learning_rates or [SETTINGS[family].learning_rate]
    ]
    folder = options.runs.absolute()
    if options.finished:
        runs = [run for run in runs if (home_of(run, folder) / "curve.json").exists()]
    for family in {run.family for run in runs if run.selector.startswith("dots")}:
        fit_predictor(family, folder, options.jobs)
    curves = dict(zip(runs, train_all(runs, folder, options.jobs), strict=True))
    if options.learning_rates:
        print(tuned(curves))
    elif {"uniform", "oracle"} <= set(options.selectors):
        write(curves, options.out)
    else:
        print(
            "no tables without uniform and oracle among the --selectors: all of them compare "
            "with both"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closed_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, usual, others in (
        ("families", tuple(SETTINGS), ()),
        ("selectors", SELECTORS, REPLAYED),
    ):
        text = f"{', '.join(usual)}; default: all"
        if others:
            text += f"; with {REPLAY} after the name: with replay"
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=usual,
            choices=(*usual, *others),
            metavar="NAME",
            help=text,
        )
    parser.add_argument(
        "--seeds", type=whole_number("seeds", 1, 1_000_000), default=8, help="how many, paired"
    )
    parser.add_argument("--first-seed", type=whole_number("first-seed", 0), default=0)
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        help="compares final levels, in order to choose one",
    )
    parser.add_argument(
        "--finished", action="store_true", help="trains nothing, reports the runs that are finished"
    )
    parser.add_argument("--jobs", type=whole_number("jobs", 1, 1024), default=1, help="processes")
    parser.add_argument(
        "--runs", type=path_argument, default=Path("runs/closed_loop"), help="folder of the runs"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default=RESULTS / "closed_loop",
        help="results: .json, .md and .png",
    )
    return parser.parse_args(arguments)


def train_all(runs: Sequence[Run], folder: Path, jobs: int) -> list[Curve]:
    """Trains all runs and returns their curves, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        return [train(run, folder) for run in runs]
    # a process that starts executes no file of the current directory
    os.environ["PYTHONSAFEPATH"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(train, runs, [folder] * len(runs)))


def train(run: Run, folder: Path) -> Curve:
    """Returns the curve of a run, which is trained unless its folder has one."""
    home = home_of(run, folder)
    finished = home / "curve.json"
    # one that is damaged is made anew
    with contextlib.suppress(OSError, TypeError, UnreadableJSON):
        return Curve(**read_json(finished, dict))
    share_programs(folder / "compiled")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    config = configure(run, select_config(run, folder), home / "run")
    with (
        (home / "log.txt").open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        with known_pass_rates(measure_every=MEASURE_EVERY):
            state = loop.train(config)
    if int(state.step) < config.steps:
        raise KeyboardInterrupt  # a signal stopped it
    curve = read(records.read(home / "run/metrics.jsonl").entries, config)
    shutil.rmtree(home / "run/checkpoints")
    replace_file(finished, json.dumps(curve._asdict()))
    print(*run, f"{curve.held_out[0]:.3f} -> {_savings.final(curve):.3f}", flush=True)
    return curve


def share_programs(folder: Path) -> None:
    """Caches compiled programs in a folder, which all runs share."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()  # jax decides once whether it uses one


def select_config(run: Run, folder: Path) -> SelectConfig:
    """Returns the selector's configuration of a run."""
    options: dict[str, dict[str, Any]] = {
        "adaptive": {"embeddings": "policy"},
        "dots": {
            "embeddings": "policy",
            "predictor": str(predictor_of(run.family, folder)),
            "num_references": _similarity.REFERENCES,
            "reference_every": 16,
        },
    }
    name = run.selector.removesuffix(REPLAY)
    return SelectConfig(name, **options.get(name, {}))


def predictor_of(family: str, folder: Path) -> Path:
    """Returns the file of the predictor for a family."""
    return folder / f"{family}.safetensors"


def fit_predictor(family: str, folder: Path, jobs: int) -> None:
    """Makes the predictor for a family, and the policies behind it, unless its file exists."""
    if not predictor_of(family, folder).exists():
        others = [
            Run(family, "uniform", rate, seed) for seed in POLICIES[0] for rate in POLICIES[1]
        ]
        train_all(others, folder, jobs)
        homes = [home_of(other, folder) / "run/policy" for other in others]
        _similarity.write(family, homes, predictor_of(family, folder))


def home_of(run: Run, folder: Path) -> Path:
    """Returns the folder of a run."""
    return folder / "-".join(map(str, run))


def configure(run: Run, select: SelectConfig, output_dir: Path) -> Config:
    """Returns the configuration of a run."""
    setting: dict[str, Any] = SETTINGS[run.family]._asdict() | {"learning_rate": run.learning_rate}
    held_out = TasksConfig(f"builtin:{run.family}-test", name="test")
    return Config(
        model=TINY,
        tasks=TasksConfig(f"builtin:{run.family}"),
        evaluation=EvalConfig((held_out,), num_samples=4, batch_size=128),
        select=select,
        replay=ReplayConfig(capacity=256 if run.selector.endswith(REPLAY) else 0),
        output_dir=str(output_dir),
        seed=run.seed,
        max_prompt_length=16,
        max_completion_length=9,
        rewards=("exact",),
        reward_workers=1,
        # of Adam's first steps, after few informative groups, some policies never recover
        warmup_steps=20,
        max_grad_norm=0.1,
        save_steps=setting["steps"],
        log_completions_steps=0,
        **setting,
    )


def read(lines: list[dict[str, Any]], config: Config) -> Curve:
    """Reads the curve from the lines of metrics.jsonl, the first of which is of step 0."""
    accuracy = f"eval/test/avg@{config.evaluation.num_samples}"
    rollouts_a_step = config.batch_size * config.num_generations
    steps, evaluated = lines[1:], [line for line in lines if accuracy in line]
    times = np.array([line["step_time"] for line in steps])
    seconds = np.cumsum([0.0, *np.minimum(times, SLOWEST * np.median(times))])
    return Curve(
        held_out=[line[accuracy] for line in evaluated],
        rollouts=[line.get("rollouts", line["step"] * rollouts_a_step) for line in evaluated],
        tokens=[line.get("num_tokens", 0) for line in evaluated],
        seconds=[float(seconds[line["step"]]) for line in evaluated],
        informative=float(np.mean([line["select/effective_group_ratio"] for line in steps])),
    )


def reference_rollouts(family: str, selector: str) -> int:
    """Counts the rollouts of other policies that a selector needs before the first step."""
    pool, selector = builtin.FAMILIES[family], selector.removesuffix(REPLAY)
    if selector == "dots":
        return _similarity.rollouts(family, 1 + len(POLICIES[0]) * len(POLICIES[1]))
    return 2 * pool.size * pool.references.samples if selector == "bots" and pool.references else 0


def write(curves: dict[Run, Curve], out: Path) -> None:
    """Writes the results: numbers, tables, picture."""
    runs: dict[str, dict[str, dict[int, Curve]]] = {}
    for run, curve in curves.items():
        runs.setdefault(run.family, {}).setdefault(run.selector, {})[run.seed] = curve
    rows = []
    for family, by_selector in runs.items():
        for selector, by_seed in by_selector.items():
            baselines = by_selector["uniform"].keys() & by_selector["oracle"].keys()
            seeds = sorted(by_seed.keys() & baselines)
            paired = (
                [by_selector[name][seed] for seed in seeds]
                for name in (selector, "uniform", "oracle")
            )
            figures = _savings.row(*paired, references=reference_rollouts(family, selector))
            rows.append({"family": family, "selector": selector} | figures)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {family: SETTINGS[family]._asdict() for family in runs}
    out.with_suffix(".json").write_text(
        json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n"
    )
    out.with_suffix(".md").write_text("\n\n".join([*map(section, runs, [rows] * len(runs))]) + "\n")
    drawn = {
        family: {selector: list(by_seed.values()) for selector, by_seed in by_selector.items()}
        for family, by_selector in runs.items()
    }
    _curves.draw(drawn, out.with_suffix(".png"))


def section(family: str, rows: list[dict[str, Any]]) -> str:
    """Formats a family's results as Markdown."""
    setting = SETTINGS[family]
    family_rows = [row for row in rows if row["family"] == family]
    level = next(row["final"].mean for row in family_rows if row["selector"] == "uniform")
    summary = (
        f"{setting.steps} steps of {setting.batch_size} tasks x {setting.num_generations} "
        f"rollouts, learning rate {setting.learning_rate:g}; uniform ends at {level:.3f}, a mean "
        "over seeds."
    )
    return f"## {family}\n\n{summary}\n\n{_curves.markdown(family_rows)}"


def tuned(curves: dict[Run, Curve]) -> str:
    """Formats final levels by learning rate as Markdown."""
    levels: dict[Any, list[str]] = {}
    for run, curve in curves.items():
        levels.setdefault(run[:3], []).append(f"{_savings.final(curve):.3f}")
    lines = [
        "| family | selector | learning rate | final level with each seed |",
        "|---|---|---|---|",
    ]
    return "\n".join(
        lines
        + [
            f"| {' | '.join(map(str, key))} | {', '.join(finals)} |"
            for key, finals in levels.items()
        ]
    )


if __name__ == "__main__":
    _script.run(main)
