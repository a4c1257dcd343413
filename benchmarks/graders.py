"""Measures the speed and the accuracy of the reward `math`.

Speed: gradings a second of rollouts made up here, in a pool of `workers` processes, the median of
`repeats`. Then, with `--truths` (a parquet in verl's columns) or `--gsm8k` (GSM8K's .jsonl): every
truth against itself, boxed, and against the next row's that is another one; with `--alone` also
which of these rewards differ from math-verify's own.
"""

import json
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import tyro
from math_verify import parse, verify

from benchmarks import _script
from jaxrft.errors import InputError
from jaxrft.fields import Checked, FilePath
from jaxrft.rewards import Pool

# How often a task's truth is of a kind, in per cent; DeepScaleR's: 62 integers, 18 fractions, 15
# radicals and pi.
KINDS = {
    "integer": 45,
    "decimal": 5,
    "fraction": 20,
    "radical": 16,
    "expression": 6,
    "interval": 4,
    "function": 4,
}
THINKING = (
    "We set up the equations \\(\\frac{x}{2} = \\sqrt{y}\\), solve them step by step and check "
    "the result. " * 40
)  # 3,600 characters


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.graders")
    measure(**vars(options))


@dataclass(frozen=True)
class Options(Checked):
    """Measures the reward `math`, prints, and writes what it printed as JSON to `output`."""

    tasks: int = 256
    """Tasks of a batch."""
    samples: int = 16
    """Completions a task."""
    workers: int = 2
    """Grading processes."""
    repeats: int = 5
    """Batches whose median counts."""
    truths: FilePath | None = None
    """Parquet file whose ground truths are compared, in verl's columns."""
    gsm8k: FilePath | None = None
    """GSM8K's jsonl file, likewise."""
    alone: bool = False
    """Compare with math-verify alone, too."""
    output: FilePath | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        """Raises InputError for numbers out of range, too."""
        super().__post_init__()
        for name, least in {"tasks": 1, "samples": 2, "workers": 1, "repeats": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least {least}")


def measure(
    tasks: int = 256,
    samples: int = 16,
    workers: int = 2,
    repeats: int = 5,
    truths: str | Path | None = None,
    gsm8k: str | Path | None = None,
    alone: bool = False,
    output: str | Path | None = None,
) -> None:
    """Measures, prints, and writes what it printed as JSON to `output`."""
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}"
    }
    with Pool([("math", "math")], workers=workers) as pool:
        figures["speed"] = speed(pool, tasks, samples, repeats) | {"workers": workers}
        if truths:
            rows = pyarrow.parquet.read_table(truths, columns=["reward_model"])[
                "reward_model"
            ].to_pylist()
            figures[Path(truths).name] = agreement(
                pool, [row["ground_truth"] for row in rows], alone
            )
        if gsm8k:
            rows = [json.loads(line) for line in Path(gsm8k).read_text().splitlines()]
            figures[Path(gsm8k).name] = agreement(
                pool, [row["answer"].rpartition("#### ")[2] for row in rows], alone
            )
    text = json.dumps(figures, indent=2)
    print(text)
    if output:
        Path(output).write_text(text + "\n")


def speed(pool: Pool, tasks: int, samples: int, repeats: int) -> dict[str, Any]:
    """Measures gradings a second of new rollouts, which no cache holds, and describes them."""
    rates, loads = [], []
    completions, answers = rollout(repeats, tasks, samples)
    graded = pool.grade(
        [""] * len(answers), completions, {"answer": answers}
    )  # loads what sympy and its parser load once
    for seed in range(repeats):
        completions, answers = rollout(seed, tasks, samples)
        loads.append(round(os.getloadavg()[0], 1))
        start = time.perf_counter()
        graded = pool.grade([""] * len(answers), completions, {"answer": answers})
        rates.append(round(len(answers) / (time.perf_counter() - start)))
    return {
        "gradings_per_second": round(statistics.median(rates)),
        "repeats": rates,
        "load_of_the_machine": loads,  # other programs share its cores
        "gradings_a_repeat": len(answers),
        "truths_per_cent": KINDS,
        "samples_a_task": samples,
        "characters_a_completion": round(statistics.mean(map(len, completions))),
        "distinct_share": round(len(set(zip(completions, answers, strict=True))) / len(answers), 3),
        "correct_share": round(graded.rewards[0].count(1.0) / len(answers), 3),
    }


def rollout(seed: int, tasks: int, samples: int) -> tuple[list[str], list[str]]:
    """Draws completions and truths of `tasks` groups of `samples`, with a pass rate a task.

    Wrong answers are of the truth's kind.
    """
    draw = random.Random(seed)
    completions, answers = [], []
    for kind in draw.choices(list(KINDS), list(KINDS.values()), k=tasks):
        truth, rate = _answer(draw, kind), draw.random()
        # mistakes are made more than once
        slips = [_answer(draw, kind) for _ in range(samples // 2)]
        for _ in range(samples):
            said = _written_otherwise(draw, truth) if draw.random() < rate else draw.choice(slips)
            completions.append(f"{THINKING}The answer is $\\boxed{{{said}}}$.")
            answers.append(truth)
    return completions, answers


def _answer(draw: random.Random, kind: str) -> str:
    a, b, c = draw.randint(2, 99), draw.randint(2, 99), draw.randint(2, 30)
    sign = draw.choice("+-")
    made: dict[str, list[str]] = {
        "integer": [f"{a * b}", f"-{a}", f"{a}"],
        "decimal": [f"{a}.{b}", f"0.{a}"],
        "fraction": [f"\\frac{{{a}}}{{{b}}}", f"-\\frac{{{a}}}{{{b}}}", f"{a}/{b}"],
        "radical": [
            f"{a}\\sqrt{{{b}}}",
            f"\\frac{{{a} {sign} \\sqrt{{{b}}}}}{{{c}}}",
            f"{a}\\pi",
            f"{a} {sign} {b}\\sqrt{{{c}}}",
        ],
        "expression": [
            f"x^2 {sign} {a}x + {b}",
            f"(x {sign} {a})(x + {b})",
            f"\\frac{{{a}x}}{{x + {b}}}",
        ],
        "interval": [
            f"({a}, {a + b})",
            f"[-{a}, {b})",
            f"({a}, {b}, {c})",
            f"(-\\infty, {a}] \\cup [{a + b}, \\infty)",
        ],
        "function": [
            f"\\ln {a} {sign} \\frac{{1}}{{{b}}}",
            f"e^{{{a}}} {sign} {b}",
            f"{a}\\sin {b}",
            f"\\binom{{{a + 9}}}{{5}}",
        ],
    }
    return draw.choice(made[kind])


def _written_otherwise(draw: random.Random, truth: str) -> str:
    """Returns the truth, one time in four in another form of the same value."""
    forms = {"\\frac": "\\dfrac", " + ": "+", "(": "\\left(", "\\sqrt{": "\\sqrt {"}
    old, new = draw.choice(list(forms.items()))
    if draw.random() < 0.75:
        return truth
    return (
        truth.replace(old, new).replace(")", "\\right)") if old == "(" else truth.replace(old, new)
    )


def agreement(pool: Pool, truths: list[str], alone: bool) -> dict[str, Any]:
    """Computes the shares of truths that are right against themselves and wrong against the next
    different one; lists the others.
    """
    others = [
        next(other for other in [*truths[i + 1 :], *truths] if other != truth)
        for i, truth in enumerate(truths)
    ]
    figures: dict[str, Any] = {"truths": len(truths), "distinct": len(set(truths))}
    for name, given, wanted in (("self_correct", truths, 1.0), ("other_wrong", others, 0.0)):
        graded = pool.grade(
            [""] * len(truths), [f"\\boxed{{{text}}}" for text in given], {"answer": truths}
        )
        gradings = list(zip(truths, given, graded.rewards[0], strict=True))
        figures[name] = sum(reward == wanted for *_, reward in gradings) / len(truths)
        figures[f"not_{name}"] = sorted(
            {grading for grading in gradings if grading[2] != wanted}, key=str
        )
        if alone:
            figures[f"not_math_verify_{name}"] = [
                grading for grading in sorted(set(gradings)) if grading[2] != _math_verify(grading)
            ]
    return figures


def _math_verify(grading: tuple[str, str, float | None]) -> float:
    """Computes the reward of math-verify alone for a (truth, answer, reward)."""
    truth, answer, _ = grading
    return float(verify(parse(f"\\boxed{{{truth}}}"), parse(f"\\boxed{{{answer}}}")))


if __name__ == "__main__":
    _script.run(main)
