"""Tasks of arithmetic for a small instruction-tuned model, made from nothing but a seed.

Of five kinds and four sizes of numbers, so that their pass rates differ from one to zero: sums,
differences, products, sums of three, and sums told in words. The prompt is a message of the user.
"""

import random
from typing import NamedTuple

TRAINING = 2400
HELD_OUT = 128
KINDS = ("add", "sub", "mul", "add3", "word")
SIZES = (1, 2, 3, 4)  # digits of the larger numbers
INSTRUCTION = "Reply with the number only."


class Problem(NamedTuple):
    """A question and its answer."""

    kind: str
    question: str
    answer: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """Formats the prompt."""
        return [{"role": "user", "content": f"{self.question} {INSTRUCTION}"}]


def problems(*, held_out: bool) -> list[Problem]:
    """Draws the problems of a split, always the same ones, all different."""
    rng = random.Random(0)
    drawn: dict[Problem, None] = {}
    while len(drawn) < TRAINING + HELD_OUT:
        drawn[_draw(rng)] = None
    found = list(drawn)
    return found[TRAINING:] if held_out else found[:TRAINING]


def _draw(rng: random.Random) -> Problem:
    kind = rng.choice(KINDS)
    size = rng.choice(SIZES)

    def number(most: int) -> int:
        digits = min(size, most)
        return rng.randint(1 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)

    if kind == "add":
        a, b = number(4), number(4)
        return Problem(kind, f"What is {a} + {b}?", a + b)
    if kind == "sub":
        b, a = sorted((number(4), number(4)))
        return Problem(kind, f"What is {a} - {b}?", a - b)
    if kind == "mul":
        a, b = number(3), number(1 if size < 3 else 2)
        return Problem(kind, f"What is {a} * {b}?", a * b)
    if kind == "add3":
        a, b, c = number(2), number(2), number(2)
        return Problem(kind, f"What is {a} + {b} + {c}?", a + b + c)
    a, b = number(3), number(3)
    question = f"A farmer has {a} apples and buys {b} more. How many apples does the farmer have?"
    return Problem(kind, question, a + b)
