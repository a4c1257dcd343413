"""Tasks made from nothing but a seed: lists of digits to be rewritten by one of six operations.

`turn 3141=` has the ground truth `1413`. Half of the training pool can never be solved, as in pools scraped from the
web: there the ground truths have slipped by a row. The held-out split holds no such task and none of the pool.
"""

import difflib
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrft.tasks.sources import Rows
from jaxrft.types import InputError

Digits = tuple[int, ...]

OPERATIONS: dict[str, Callable[[Digits], Digits]] = {
    "next": lambda digits: tuple((d + 1) % 10 for d in digits),
    "half": lambda digits: tuple(d // 2 for d in digits),
    "flip": lambda digits: tuple(9 - d for d in digits),
    "left": lambda digits: digits[1:] + digits[:1],
    "turn": lambda digits: digits[::-1],
    "twice": lambda digits: tuple(2 * d % 10 for d in digits),
}
LENGTHS = range(2, 9)  # digits in a list, drawn uniformly
SIZES = {"digits": 2048, "digits-test": 128}  # tasks in each split
UNSOLVABLE = 0.5  # share of the training pool whose ground truths are wrong

PASS_RATES = Path(__file__).parents[1] / "assets" / "pass_rates.npz"  # written by jaxrft.assets.make_quickstart


class Task(NamedTuple):
    """An operation and the list that it rewrites."""

    operation: str
    digits: Digits

    @property
    def prompt(self) -> str:
        """What the policy reads."""
        return f"{self.operation} {text(self.digits)}="

    @property
    def answer(self) -> str:
        """What it ought to write."""
        return text(OPERATIONS[self.operation](self.digits))


def text(digits: Digits) -> str:
    """The digits in a row."""
    return "".join(map(str, digits))


def draw(rng: random.Random) -> Task:
    """A random task."""
    operation = rng.choice(list(OPERATIONS))
    return Task(operation, tuple(rng.randrange(10) for _ in range(rng.choice(LENGTHS))))


def split(name: str, *, seed: int = 0) -> tuple[list[Task], list[str]]:
    """The tasks of a split and their ground truths; all tasks of all splits are distinct and change their list.

    Raises InputError when there is no such split.
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SIZES)}"
        raise InputError(f"no built-in tasks {name!r}: {hint}")
    rng = random.Random(seed)
    distinct: dict[Task, None] = {}
    while len(distinct) < sum(SIZES.values()):
        task = draw(rng)
        if task.answer != text(task.digits):
            distinct[task] = None
    tasks = list(distinct)
    pool, held_out = tasks[: SIZES["digits"]], tasks[SIZES["digits"] :]
    if name == "digits-test":
        return held_out, [task.answer for task in held_out]
    return pool, _slipped([task.answer for task in pool], rng)


def _slipped(answers: list[str], rng: random.Random) -> list[str]:
    """The answers, a share of them, drawn at random, replaced by that of another task."""
    wrong = rng.sample(range(len(answers)), round(UNSOLVABLE * len(answers)))
    slipped = list(answers)
    for row, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        slipped[row] = answers[other]
    return slipped


def load(name: str) -> Rows:
    """The tasks of a split with the columns `answer` and `operation`; `digits` with two reference pass rates.

    Those are measured by rolling out two other policies, a weak and a strong one (jaxrft.assets.make_quickstart).
    Raises InputError when there is no such split.
    """
    tasks, answers = split(name)
    rates = None
    if name == "digits":
        with np.load(PASS_RATES) as file:
            rates = (file["successes"] / np.float32(file["trials"])).astype(np.float32)
    columns = {"answer": answers, "operation": [task.operation for task in tasks]}
    return Rows([task.prompt for task in tasks], columns, rates)
