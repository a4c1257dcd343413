"""Runs the experiment of protocol.md: what choosing tasks before the rollout saves.

    python -m benchmarks.experiment --part primary --jobs 2
    python -m benchmarks.experiment --part model --model HuggingFaceTB/SmolLM2-135M-Instruct
    python -m benchmarks.experiment --report

A finished run is a line of results/experiment.jsonl and is not run again: the work can stop
at any time. Seeds are run one after another, each with all arms and families.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr

from benchmarks import _curves, _savings, _script, closed_loop
from benchmarks._savings import Curve
from benchmarks._script import whole_number
from jaxrft.config import Config, ReplayConfig, load
from jaxrft.fields import path_argument
from jaxrft.report import records
from jaxrft.stats import mean_interval
from jaxrft.tasks import builtin
from jaxrft.train import loop

RESULTS = Path(__file__).parent / "results"
LEVEL = 0.05  # of the tests, over all primary claims
MARGIN = 0.02  # by which a final level and pass@8 may be lower
SAMPLES = 8  # of each held-out task, by the tiny policy
MODEL = "smollm2-arithmetic"  # the family of the language model
MODEL_CONFIG = Path(__file__).parents[1] / "configs/smollm2_arithmetic.py"
TUNING_SEED = 7001
RUNS_OF_A_PROCESS = 8  # compiled programs are never unloaded, and a process may map so many only


class Part(NamedTuple):
    """Arms, families and seeds that are run together."""

    arms: tuple[str, ...]
    families: tuple[str, ...]
    seeds: int
    first_seed: int = 6001


PARTS = {
    "primary": Part(
        ("uniform", "bots", "adaptive"),
        ("digits-kinds", "digits-visits", "digits-references", "digits-far", "digits-easy"),
        12,
    ),
    "secondary": Part(
        ("uniform+dynamic", "retire", "dots", "adaptive+replay"),
        ("digits-kinds", "digits-far"),
        6,
    ),
    "model": Part(("uniform", "adaptive"), (MODEL,), 3, first_seed=1),
}


class Run(NamedTuple):
    """A run, identified by its settings."""

    family: str
    arm: str
    seed: int


class Result(NamedTuple):
    """What is kept of a run, an entry an evaluation."""

    curve: Curve
    pass_at_k: list[float]  # of as many samples as an evaluation draws
    greedy: list[float]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    options = parse(arguments)
    if options.tune:
        tune(options)
        return
    if not options.report:
        part = PARTS[options.part]
        seeds = range(part.first_seed, part.first_seed + part.seeds)
        runs = [
            Run(family, arm, seed)
            for seed in seeds
            for family in part.families
            for arm in part.arms
            if arm != "bots" or builtin.FAMILIES[family].references
        ]
        folder = options.runs.absolute()
        train_missing(runs, folder, options.lines, options.jobs, model=options.model)
    report(read_results(options.lines), options.out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, default="primary", help="of the protocol")
    parser.add_argument("--report", action="store_true", help="runs nothing")
    parser.add_argument(
        "--tune", action="store_true", help="compares learning rates of uniform on digits-far"
    )
    parser.add_argument("--model", help="folder or hub id of the policy of the part model")
    parser.add_argument("--jobs", type=whole_number("jobs", 1, 1024), default=1, help="processes")
    parser.add_argument(
        "--runs",
        type=path_argument,
        default=Path("runs/experiment"),
        help="folder of what runs share: compiled programs and the predictors of dots",
    )
    parser.add_argument(
        "--lines", type=path_argument, default=RESULTS / "experiment.jsonl", help="finished runs"
    )
    parser.add_argument(
        "--out", type=path_argument, default=RESULTS / "experiment", help="tables .md, picture .png"
    )
    options = parser.parse_args(arguments)
    trains_model = options.part == "model" and not options.tune and not options.report
    if options.model is not None and not trains_model:
        parser.error(
            f"--model is {options.model}, but only the part model trains one: give --part model, "
            "or leave --model out"
        )
    return options


def train_missing(
    runs: Sequence[Run], folder: Path, lines: Path, jobs: int, *, model: str | None = None
) -> None:
    """Trains the runs that have no line yet, and writes a line as each ends."""
    done = read_results(lines)
    missing = [run for run in runs if run not in done]
    folder.mkdir(parents=True, exist_ok=True)
    for family in sorted({run.family for run in missing if run.arm == "dots"}):
        closed_loop.fit_predictor(family, folder, jobs)
    # a process that starts executes no file of the current directory
    os.environ["PYTHONSAFEPATH"] = "1"
    size = jobs * RUNS_OF_A_PROCESS
    for start in range(0, len(missing), size):
        some = missing[start : start + size]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(train, run, folder, model=model) for run in some]
            for run, future in zip(some, futures, strict=True):
                result = future.result()
                entry = run._asdict() | result._asdict() | {"curve": result.curve._asdict()}
                with lines.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                print(*run, f"{_savings.final(result.curve):.3f}", flush=True)


def train(
    run: Run, folder: Path, *, learning_rate: float | None = None, model: str | None = None
) -> Result:
    """Trains a run in a folder of its own, which is removed, but for the completions of a language
    model.
    """
    closed_loop.share_programs(folder / "compiled")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        home = Path(name)
        if run.family == MODEL:
            config = configure_model(run, model, folder / f"{run.arm}-{run.seed}")
        else:
            config = configure(run, folder, home / "run", learning_rate)
        with (
            (home / "log.txt").open("w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            state = loop.train(config)
        if int(state.step) < config.steps:
            raise KeyboardInterrupt  # a signal stopped it
        entries = records.read(Path(config.output_dir) / "metrics.jsonl").entries
        shutil.rmtree(Path(config.output_dir) / "checkpoints")
    name = f"eval/test/pass@{config.evaluation.num_samples}"
    evaluated = [entry for entry in entries if name in entry]
    return Result(
        closed_loop.read(entries, config),
        pass_at_k=[entry[name] for entry in evaluated],
        greedy=[entry["eval/test/greedy"] for entry in evaluated],
    )


def configure(run: Run, folder: Path, output_dir: Path, learning_rate: float | None) -> Config:
    """Returns the configuration of a run."""
    name = run.arm.partition("+")[0]
    rate = learning_rate or closed_loop.SETTINGS[run.family].learning_rate
    same = closed_loop.Run(run.family, name, rate, run.seed)
    select = closed_loop.select_config(same, folder)
    if name == "dots":  # the paper's reference sets
        select = replace(select, num_references=256, reference_every=2)
    config = closed_loop.configure(same, select, output_dir)
    return replace(
        config,
        evaluation=replace(config.evaluation, num_samples=SAMPLES),
        dynamic_sampling=2 if run.arm == "uniform+dynamic" else 0,
        replay=ReplayConfig(capacity=256 if run.arm.endswith("+replay") else 0),
    )


def configure_model(run: Run, model: str | None, output_dir: Path) -> Config:
    """Returns the configuration of a run of the language model."""
    config = load(str(MODEL_CONFIG))
    return replace(
        config,
        model=model or config.model,
        select=replace(config.select, name=run.arm),
        seed=run.seed,
        output_dir=str(output_dir),
    )


def tune(options: argparse.Namespace) -> None:
    """Prints final levels of `uniform` on digits-far by learning rate."""
    folder = options.runs.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for rate in (1e-4, 2e-4, 4e-4):
        finals = []
        for seed in range(TUNING_SEED, TUNING_SEED + 3):
            run = Run("digits-far", "uniform", seed)
            result = train(run, folder, learning_rate=rate)
            finals.append(_savings.final(result.curve))
        print(f"{rate:g}", *(f"{level:.3f}" for level in finals), flush=True)


def read_results(lines: Path) -> dict[Run, Result]:
    """Reads the finished runs."""
    if not lines.exists():
        return {}
    found = {}
    for line in lines.read_text().splitlines():
        entry = json.loads(line)
        run = Run(entry["family"], entry["arm"], entry["seed"])
        found[run] = Result(Curve(**entry["curve"]), entry["pass_at_k"], entry.get("greedy", []))
    return found


def compare(results: dict[Run, Result], family: str, arm: str) -> dict[str, Any] | None:
    """Compares an arm with `uniform` on the seeds that both have; None with fewer than two."""
    seeds = sorted(
        run.seed
        for run in results
        if run[:2] == (family, arm) and Run(family, "uniform", run.seed) in results
    )
    if len(seeds) < 2:
        return None
    pairs = [
        (results[Run(family, arm, seed)], results[Run(family, "uniform", seed)]) for seed in seeds
    ]
    savings = [_savings.saving(mine.curve, uniform.curve) for mine, uniform in pairs]
    logs = [each.log["rollouts"] for each in savings]
    return {
        "family": family,
        "arm": arm,
        "seeds": len(seeds),
        "reached": sum(each.reached for each in savings),
        "log": {
            name: mean_interval([each.log[name] for each in savings]) for name in _savings.COSTS
        },
        "p": t_test(logs),
        "informative": float(np.mean([mine.curve.informative for mine, _ in pairs])),
        "final": mean_interval([_savings.final(mine.curve) for mine, _ in pairs]),
        "final_difference": mean_interval(
            [_savings.final(mine.curve) - _savings.final(uniform.curve) for mine, uniform in pairs]
        ),
        "pass_difference": mean_interval([last(mine) - last(uniform) for mine, uniform in pairs]),
    }


def t_test(values: Sequence[float]) -> float:
    """Computes the p value of the mean of values [n] against 0, two-sided, by Student's t."""
    deviation = np.std(values, ddof=1) / np.sqrt(len(values))
    if deviation == 0:
        return float(np.mean(values) == 0)
    return float(2 * stdtr(len(values) - 1, -abs(np.mean(values)) / deviation))


def last(result: Result) -> float:
    """Computes pass@k of the last evaluations."""
    return float(np.mean(result.pass_at_k[-_savings.WINDOW :]))


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Returns which hypotheses Holm's procedure rejects (Holm 1979): in ascending order, as long as
    p_k <= level / (m - k).
    """
    rejected = [False] * len(p_values)
    for rank, index in enumerate(np.argsort(p_values)):
        if not p_values[index] <= level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def report(results: dict[Run, Result], out: Path) -> None:
    """Writes the tables and the picture of the runs that are there."""
    parts = []
    for name in ("primary", "secondary"):
        part = PARTS[name]
        arms = [arm for arm in part.arms if arm != "uniform"]
        rows = [
            row
            for family in part.families
            for arm in arms
            if (row := compare(results, family, arm)) is not None
        ]
        if rows:
            claims = verdicts(rows) if name == "primary" else None
            parts.append(f"## {name.capitalize()}\n\n{table(rows, claims)}\n")
    levels = {
        family: mean_interval(
            [
                _savings.final(result.curve)
                for run, result in results.items()
                if run[:2] == (family, "uniform")
            ]
        )
        for family in PARTS["primary"].families
        if any(run[:2] == (family, "uniform") for run in results)
    }
    shown = ", ".join(f"{family} {level.mean:.3f}" for family, level in levels.items())
    parts.append(f"Final levels of `uniform`: {shown}.\n")
    of_model = {run: result for run, result in results.items() if run.family == MODEL}
    if of_model:
        parts.append(f"## The language model\n\n{model_table(of_model)}\n")
    out.with_suffix(".md").write_text("\n".join(parts))
    curves: dict[str, dict[str, list[Curve]]] = {}
    for run, result in results.items():
        if run.arm in PARTS["primary"].arms and run.family != MODEL:
            curves.setdefault(run.family, {}).setdefault(run.arm, []).append(result.curve)
    if curves:
        _curves.draw(curves, out.with_suffix(".png"))
    print("\n".join(parts))


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Says of each primary claim whether it stands."""
    found = []
    for row, rejected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        keeps = min(row["final_difference"].low, row["pass_difference"].low) > -MARGIN
        saves = row["log"]["rollouts"].mean > 0
        if rejected and saves:
            found.append("stands" if keeps else "saves, but not within the margin")
        elif rejected:
            found.append("costs more")
        else:
            found.append("not shown")
    return found


def table(rows: Sequence[dict[str, Any]], claims: Sequence[str] | None) -> str:
    """Formats comparisons with `uniform` as Markdown.

    Without `claims` there are neither tests nor seconds: runs of another part than uniform's were
    not made side by side with it.
    """
    columns: list[dict[str, str]] = []
    for index, row in enumerate(rows):
        saved = {name: _curves.factor(row["log"][name]) for name in _savings.COSTS}
        tested = claims is not None
        columns.append(
            {
                "family": row["family"],
                "arm": row["arm"],
                "seeds": str(row["seeds"]),
                "informative": f"{row['informative']:.2f}",
                "reached": f"{row['reached']} of {row['seeds']}",
                "rollouts saved, factor": saved["rollouts"],
                "tokens": saved["tokens"],
                **({"seconds": saved["seconds"], "p": f"{row['p']:.4f}"} if tested else {}),
                "final - uniform's": _curves.shown(row["final_difference"], "+"),
                "pass@8 - uniform's": _curves.shown(row["pass_difference"], "+"),
                **({"claim": claims[index]} if tested else {}),
            }
        )
    return _markdown(columns)


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    """Formats rows with the same columns as a Markdown table."""
    lines = [tuple(rows[0]), ("---",) * len(rows[0]), *(tuple(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def model_table(results: dict[Run, Result]) -> str:
    """Formats the runs of the language model as Markdown, a row a run."""
    rows = []
    for run in sorted(results, key=lambda run: (run.seed, run.arm != "uniform")):
        curve = results[run].curve
        greedy = results[run].greedy
        levels = zip(curve.rollouts, curve.held_out, strict=True)
        rows.append(
            {
                "seed": str(run.seed),
                "arm": run.arm,
                "informative": f"{curve.informative:.2f}",
                **{f"accuracy at {at:,} rollouts": f"{level:.3f}" for at, level in levels},
                "greedy, first and last": f"{greedy[0]:.3f} {greedy[-1]:.3f}",
                "tokens": f"{curve.tokens[-1]:,}",
            }
        )
    return _markdown(rows)


if __name__ == "__main__":
    _script.run(main)
