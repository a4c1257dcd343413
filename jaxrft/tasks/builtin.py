"""Tasks made from nothing but a seed: lists of digits to be rewritten by one of several operations,
and `arithmetic` for a small instruction-tuned model (`jaxrft.tasks.arithmetic`).

`turn 3141=` has the ground truth `1413`. In pools scraped from the web most tasks give a
policy no training signal. Each family here has a share of such tasks, and one property, or none, by
which a selector can recognize them:

| family | tasks without signal | recognized by |
|---|---|---|
| `digits` | wrong ground truths, and at first long lists | everything below, a little: the quickstart |
| `digits-kinds` | operations that no policy was taught, lists too long | the prompt: its kind and length |
| `digits-visits` | wrong ground truths | rolling a task out, in a pool small enough to come back to |
| `digits-references` | wrong ground truths | pass rates of references; the pool is too large to come back to |
| `digits-far` | four of five, which the policy solves less than once in twenty times | the prompt, and a few visits |
| `digits-easy` | almost none | not needed: uniform selection does well |

The held-out split of a family, `<family>-test`, holds solvable tasks only, of the kinds that can be
learned, and none of the pool. All of this holds for the tiny policy in jaxrft.assets, which
benchmarks/closed_loop.py trains on these families.
"""  # noqa: E501

import difflib
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrft.tasks import arithmetic
from jaxrft.tasks.sources import Rows
from jaxrft.types import InputError

Digits = tuple[int, ...]
Operations = dict[str, Callable[[Digits], Digits]]

OPERATIONS: Operations = {
    "next": lambda digits: tuple((d + 1) % 10 for d in digits),
    "half": lambda digits: tuple(d // 2 for d in digits),
    "flip": lambda digits: tuple(9 - d for d in digits),
    "left": lambda digits: digits[1:] + digits[:1],
    "turn": lambda digits: digits[::-1],
    "twice": lambda digits: tuple(2 * d % 10 for d in digits),
}
UNTAUGHT: Operations = {  # which no policy of this package has seen before it is finetuned
    "sum": lambda digits: tuple(total % 10 for total in accumulate(digits)),
    "order": lambda digits: tuple(sorted(digits)),
    "gaps": lambda digits: tuple(
        (d - before) % 10 for before, d in zip((0, *digits), digits, strict=False)
    ),
    "cube": lambda digits: tuple(d**3 % 10 for d in digits),
}
LENGTHS = range(2, 9)  # digits in a list
# which the tiny policy gets wrong more often than not
HARD = ("half", "flip", "left", "turn", "twice")

ASSETS = Path(__file__).parents[1] / "assets"


class Kind(NamedTuple):
    """Tasks of some operations on lists of some lengths, both drawn uniformly."""

    operations: tuple[str, ...] = tuple(OPERATIONS)
    lengths: range = LENGTHS
    share: float = 1.0  # of the pool
    held_out: bool = True  # whether the held-out split has such tasks, too


ANY = Kind()


class References(NamedTuple):
    """Pass rates of a weak and a strong policy, written by benchmarks.make_quickstart."""

    file: str  # in jaxrft/assets
    samples: int  # rollouts a task and policy


class Family(NamedTuple):
    """A pool, and the tasks in it that give no training signal."""

    size: int  # tasks in the pool
    unsolvable: float = 0.0  # share of the pool whose ground truths are those of other tasks
    kinds: tuple[Kind, ...] = (ANY,)
    references: References | None = None


ARITHMETIC = "arithmetic"
HELD_OUT = 128  # tasks in the held-out split of a family
FAMILIES = {
    "digits": Family(2048, unsolvable=0.5, references=References("pass_rates.npz", samples=32)),
    "digits-kinds": Family(
        8000,
        kinds=(
            Kind(HARD, range(2, 5), 0.1),
            Kind(HARD, range(7, 9), 0.4, held_out=False),
            Kind(tuple(UNTAUGHT), range(2, 9), 0.5, held_out=False),
        ),
        references=References("pass_rates_kinds.npz", samples=8),
    ),
    "digits-visits": Family(512, unsolvable=0.85, kinds=(Kind(HARD, range(2, 5)),)),
    "digits-references": Family(
        4096,
        unsolvable=0.8,
        # there are no more lists of two digits
        kinds=(Kind(HARD, range(2, 3), 0.1), Kind(HARD, range(3, 5), 0.9)),
        references=References("pass_rates_references.npz", samples=8),
    ),
    "digits-far": Family(
        4000,
        kinds=(
            Kind(HARD, range(2, 5), 0.2),
            Kind(HARD, range(8, 9), 0.4, held_out=False),
            Kind(tuple(UNTAUGHT), range(6, 9), 0.4, held_out=False),
        ),
        references=References("pass_rates_far.npz", samples=8),
    ),
    "digits-easy": Family(
        1024,
        kinds=(Kind(HARD, range(2, 5)),),
        references=References("pass_rates_easy.npz", samples=8),
    ),
}


class Task(NamedTuple):
    """An operation and the list that it rewrites."""

    operation: str
    digits: Digits

    @property
    def prompt(self) -> str:
        """Formats what the policy reads, such as `turn 3141=`."""
        return f"{self.operation} {text(self.digits)}="

    @property
    def answer(self) -> str:
        """Applies the operation to the list: what the policy should write."""
        return text((OPERATIONS | UNTAUGHT)[self.operation](self.digits))


def text(digits: Digits) -> str:
    """Joins digits into text."""
    return "".join(map(str, digits))


def draw(rng: random.Random, kind: Kind = ANY) -> Task:
    """Draws an operation, a length and the digits of a task, each uniformly."""
    operation = rng.choice(kind.operations)
    return Task(operation, tuple(rng.randrange(10) for _ in range(rng.choice(kind.lengths))))


def find(name: str) -> tuple[Family, bool]:
    """Looks up the family of a split, and whether the split is the held-out one.

    Raises InputError when there is no such split.
    """
    family = name.removesuffix("-test")
    held_out = name.endswith("-test")
    if family in FAMILIES:
        return FAMILIES[family], held_out
    names = (*FAMILIES, ARITHMETIC)
    near = difflib.get_close_matches(
        name, [split for family in names for split in (family, f"{family}-test")], n=1
    )
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"choose one of {', '.join(names)}, with -test for the held-out split"
    )
    raise InputError(f"no built-in tasks {name!r}: {hint}")


def split(name: str) -> tuple[list[Task], list[str]]:
    """Draws the tasks of a split, always the same ones, and their ground truths.

    All tasks of both splits are distinct, and each operation changes its list. In a pool, the share
    `unsolvable` of the ground truths are those of other tasks. Raises InputError when there is no
    such split.
    """
    family, held_out = find(name)
    rng = random.Random(0)
    drawn = {}
    pool = [
        task
        for kind in family.kinds
        for task in _draw_distinct(rng, kind, round(kind.share * family.size), drawn)
    ]
    kinds = [kind for kind in family.kinds if kind.held_out]
    test = [
        task for kind in kinds for task in _draw_distinct(rng, kind, HELD_OUT // len(kinds), drawn)
    ]
    if held_out:
        return test, [task.answer for task in test]
    if len(family.kinds) > 1:
        rng.shuffle(pool)
    return pool, _with_wrong_answers([task.answer for task in pool], rng, family.unsolvable)


def _draw_distinct(
    rng: random.Random, kind: Kind, count: int, drawn: dict[Task, None]
) -> list[Task]:
    """Draws `count` tasks that are not in `drawn`, and adds them to it.

    Their operations change their lists.
    """
    before = len(drawn)
    while len(drawn) < before + count:
        task = draw(rng, kind)
        if task.answer != text(task.digits):
            drawn[task] = None
    return list(drawn)[before:]


def _with_wrong_answers(answers: list[str], rng: random.Random, share: float) -> list[str]:
    """Replaces a random share of the answers by those of other tasks."""
    wrong = rng.sample(range(len(answers)), round(share * len(answers)))
    result = list(answers)
    for row, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        result[row] = answers[other]
    return result


def load(name: str) -> Rows:
    """Draws the tasks of a split, with the columns `answer` and `operation`.

    `arithmetic` has the columns `answer` and `kind`, which is the domain. A pool may also have
    reference pass rates. They were measured by rolling out two other policies, a weak and a strong
    one (benchmarks.make_quickstart). Raises InputError when there is no such split.
    """
    if name.removesuffix("-test") == ARITHMETIC:
        return _load_arithmetic(held_out=name.endswith("-test"))
    family, held_out = find(name)
    tasks, answers = split(name)
    rates = None
    if family.references and not held_out:
        with np.load(ASSETS / family.references.file) as file:
            rates = (file["successes"] / np.float32(file["trials"])).astype(np.float32)
    columns = {"answer": answers, "operation": [task.operation for task in tasks]}
    return Rows([task.prompt for task in tasks], columns, rates)


def _load_arithmetic(*, held_out: bool) -> Rows:
    problems = arithmetic.problems(held_out=held_out)
    kinds = [problem.kind for problem in problems]
    columns = {"answer": [str(problem.answer) for problem in problems], "kind": kinds}
    return Rows([problem.messages for problem in problems], columns, domains=kinds)
