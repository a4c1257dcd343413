"""The reward `choice` compares the letter that a completion answers with the ground truth."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxrft.rewards import ground_truth
from jaxrft.rewards.final_answer import TEXT, final_answer
from jaxrft.rewards.functions import Completion, text_of

LONGEST = 1_000  # characters of a choice with its text

_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{\s*)*[(\[]?\s*(?P<letter>[A-Z])"
    r"(?:\s*[)\].:}]+|$)(?P<text>.*)",
    re.DOTALL,
)
_CHOICES = re.compile(r"(?:^|[\s({])[(\[]?[A-Z][)\].:]")
_NAMED = re.compile(r"(?:option|choice|answer)\s+", re.IGNORECASE)
_SMALL = re.compile(r"[(\[]?[a-z][)\]]?")
_EMPHASIS = re.compile(r"[*`]|__")
_BULLET = re.compile(r"^[-•]\s+")
# B (copper), B - copper; a single letter behind it is a second choice
_EXPLAINED = re.compile(
    r"(?P<letter>[A-Z])\s+(?:[(\[]|[-–—]\s)(?P<text>(?!\W*[A-Z]\W*$).*)", re.DOTALL
)


class Choice(NamedTuple):
    """A choice as it is written."""

    letter: str
    text: str  # what stands behind the letter; "" for the letter alone


def parse_choice(text: str) -> Choice | None:
    r"""Parses a capital letter with or without the text of its option; None for several letters,
    and for what is no choice.

    >>> parse_choice("(C) 12 metres"), parse_choice(r"\text{B}"), parse_choice("A. B. C.")
    (Choice(letter='C', text=' 12 metres'), Choice(letter='B', text=''), None)
    """
    choice = _CHOICE.fullmatch(text) if len(text) <= LONGEST else None
    if choice is None or _CHOICES.search(choice["text"]):
        return None
    return Choice(choice["letter"], choice["text"])


def choice(
    prompts: Sequence,
    completions: Sequence[Completion],
    *,
    answer: Sequence,
    truncated: Sequence[bool] | None = None,
    **columns: object,
) -> list[float | None]:
    r"""Returns 1 where the completion chooses the letter of the column `answer`, else 0.

    The choice is the final answer, for which `final_answer.final_answer` has the table: a letter,
    `(B)`, `\boxed{B}`, `Answer: B`, `The answer is B) 12 metres`, `B (copper)`, `option B`. A small
    letter counts where it is all of the final answer. Several letters (`A or B`, `A, B, C, D`) are
    none, and so is a line of a list of options. `answer` is a letter, with or without the text of
    its option; another one gives None.
    """
    golds = [None if gold is None else _letter(gold.strip()) for gold in ground_truth.texts(answer)]
    cut = truncated or [False] * len(completions)
    return [
        None
        if gold is None
        else float(chosen_letter(text_of(completion), truncated=is_cut) == gold)
        for completion, gold, is_cut in zip(completions, golds, cut, strict=True)
    ]


def chosen_letter(completion: str, *, truncated: bool = False) -> str | None:
    """Returns the capital letter of the choice that a completion ends in, or None."""
    answer = final_answer(completion, truncated=truncated)
    if answer is None or _is_listed(answer, completion[-TEXT:]):
        return None
    return _letter(answer)


def _letter(answer: str) -> str | None:
    """Returns the capital letter of an answer that is a choice, or None."""
    answer = _EMPHASIS.sub("", answer).strip()
    answer = _NAMED.sub("", answer, count=1) if _NAMED.match(answer) else answer
    choice = parse_choice(answer)
    if choice is not None:
        return choice.letter
    explained = _EXPLAINED.fullmatch(answer) if len(answer) <= LONGEST else None
    if explained is not None and not _CHOICES.search(explained["text"]):
        return explained["letter"]
    return answer.strip("()[]").upper() if _SMALL.fullmatch(answer) else None


def _is_listed(answer: str, text: str) -> bool:
    """Checks whether an answer is a line next to one with another option: both letters alone, or
    both with their texts.
    """
    lines = [_line(line) for line in text.splitlines()]
    lines = [line for line in lines if line]
    choices = [parse_choice(line) for line in lines]
    for one, other, first, second in zip(lines, lines[1:], choices, choices[1:], strict=False):
        if first is None or second is None or first.letter == second.letter:
            continue
        alike = bool(first.text.strip()) == bool(second.text.strip())
        if alike and answer.rstrip(".") in (one.rstrip("."), other.rstrip(".")):
            return True
    return False


def _line(line: str) -> str:
    """Returns a line without emphasis, and the mark of a list in front of it."""
    return _BULLET.sub("", _EMPHASIS.sub("", line).strip())
