"""The rewards `logic` and `logic_solved`, which compare answers to puzzles with their solutions.

| puzzle | ground truth | answer |
|---|---|---|
| zebra | `{"header", "rows"}` | an object with these fields; the fraction of right cells |
| grid of ARC | a list of lists of whole numbers | the list, or lines of numbers |
| ordering | a list of names, `data_source` with "ordering" | the list |
| graph | a word, `data_source` with "graph" | the word |
| Countdown | `{"numbers", "target"}` | an expression with every number once |

A ground truth may be the JSON text of one, or a task of the source `gym:countdown` or
`gym:puzzle24`. Answers are read by `answers` and `expressions`; nothing of them is evaluated.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrft.rewards.answers import last_answer, read_literal
from jaxrft.rewards.expressions import solves
from jaxrft.rewards.functions import Completion, text_of
from jaxrft.rewards.inside import plain

_TWENTY_FOUR = 24


class Table(NamedTuple):
    """A table of a zebra puzzle, its cells folded."""

    rows: list[list[str]]


class Grid(NamedTuple):
    """A grid of whole numbers, as texts."""

    rows: list[list[str]]


class Order(NamedTuple):
    """Names in order, folded."""

    names: list[str]


class Word(NamedTuple):
    """A word, folded."""

    word: str


class Countdown(NamedTuple):
    """Numbers of which an expression should make another."""

    numbers: list[int]
    target: int


Solution = Table | Grid | Order | Word | Countdown


def logic(
    prompts: Sequence,
    completions: Sequence[Completion],
    *,
    answer: Sequence,
    data_source: Sequence | None = None,
    **columns: object,
) -> list[float | None]:
    """Returns 1 for the solution of a puzzle, of a zebra table the fraction of right cells, else 0.

    The answer stands in the last `<answer>` of the completion. The reward is None where `answer` is
    no solution of a puzzle that this module knows.
    """
    sources = data_source or [None] * len(completions)
    rewards: list[float | None] = []
    for completion, truth, source in zip(completions, answer, sources, strict=True):
        solution = read(truth, source)
        if solution is None:
            rewards.append(None)
            continue
        text = last_answer(text_of(completion))
        rewards.append(0.0 if text is None else score(text, solution))
    return rewards


def logic_solved(
    prompts: Sequence,
    completions: Sequence[Completion],
    *,
    answer: Sequence,
    data_source: Sequence | None = None,
    **columns: object,
) -> list[float | None]:
    """Returns 1 where `logic` does, else 0; None where it does."""
    rewards = logic(prompts, completions, answer=answer, data_source=data_source)
    return [None if reward is None else float(reward == 1) for reward in rewards]


def read(truth: object, source: object = None) -> Solution | None:
    """Returns the solution in a task's `answer`, given its `data_source`; None if it is none."""
    source = source if isinstance(source, str) else ""
    if isinstance(truth, str):
        if "graph" in source and truth.strip().isalpha():
            return Word(_folded(truth))
        truth = _parsed(truth)
    if isinstance(truth, Mapping):
        return _read_object(truth)
    if not isinstance(truth, Sequence) or isinstance(truth, str) or not truth:
        return None
    if all(isinstance(row, Sequence) and not isinstance(row, str) for row in truth):
        return _read_grid(truth)
    if "ordering" in source and all(isinstance(name, str) for name in truth):
        return Order([_folded(name) for name in truth])
    return None


def _parsed(text: str) -> object:
    """Returns the list or object that a text is, as JSON or as Python spells it, or None."""
    opening = text.lstrip()[:1]
    if opening not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return read_literal(text, opening)


def _read_object(truth: Mapping) -> Solution | None:
    if truth.get("gym") in ("countdown", "puzzle24"):
        entry = plain.decode(truth.get("entry"))
        metadata = entry.get("metadata") if isinstance(entry, dict) else None
        if not isinstance(metadata, dict):
            return None
        truth = {"target": _TWENTY_FOUR} | metadata
    numbers = truth.get("numbers")
    if isinstance(numbers, Sequence) and not isinstance(numbers, str):
        return _read_countdown(numbers, truth.get("target"))
    rows = truth.get("rows")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows or "header" not in truth:
        return None
    if not all(isinstance(row, Sequence) and not isinstance(row, str) and row for row in rows):
        return None
    return Table([[_folded(str(cell)) for cell in row] for row in rows])


def _read_countdown(numbers: Sequence, target: object) -> Countdown | None:
    values = [*numbers, target]
    for value in values:
        if not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            return None
    *whole, goal = map(int, values)
    return Countdown(whole, goal)


def _read_grid(rows: Sequence) -> Grid | None:
    cells = [cell for row in rows for cell in row]
    if not cells or not all(isinstance(cell, int) for cell in cells):
        return None
    return Grid([[str(cell) for cell in row] for row in rows])


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def score(text: str, solution: Solution) -> float:
    """Returns what an answer is worth, in [0, 1]."""
    match solution:
        case Table(rows):
            return _right_cells(text, rows)
        case Grid(rows):
            answer = read_literal(text, "[") if "[" in text else _lines(text)
            return float(answer == rows)
        case Order(names):
            answer = read_literal(text, "[")
            is_list = isinstance(answer, list)
            return float(is_list and [_cell(name) for name in answer] == names)
        case Word(word):
            return float(_folded(text) == word)
        case Countdown(numbers, target):
            return float(solves(text, numbers, target))


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.split("\n") if line.strip()]


def _right_cells(text: str, rows: list[list[str]]) -> float:
    """Returns the fraction of the cells that a table of the same shape has right, else 0."""
    answer = read_literal(text, "{")
    given = answer.get("rows") if isinstance(answer, dict) else None
    if not isinstance(given, list) or len(given) != len(rows):
        return 0.0
    right = 0
    for row, expected in zip(given, rows, strict=True):
        if not isinstance(row, list) or len(row) != len(expected):
            return 0.0
        right += sum(_cell(cell) == other for cell, other in zip(row, expected, strict=True))
    return right / sum(map(len, rows))


def _cell(value: object) -> str | None:
    return _folded(value) if isinstance(value, str) else None
