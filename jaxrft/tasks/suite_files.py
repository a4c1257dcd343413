"""Reads the files of evaluation suites, in the columns in which the benchmarks are published."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from jaxrft.config import TasksConfig
from jaxrft.rewards import ground_truth
from jaxrft.rewards.boxes import last_boxed
from jaxrft.suites import SUITES, Suite
from jaxrft.tasks.files import Columns, Entries, shown
from jaxrft.types import InputError

LETTERS = "ABCD"  # of the options, as the prompt names them


class SuiteRows(NamedTuple):
    """The columns of a suite's file, with its prompts and ground truths among them."""

    columns: Columns  # `prompt` and `answer` are the suite's
    domain: str | None  # the column of domains, if there is one


class _Column(NamedTuple):
    """A column of a suite's file."""

    name: str
    entries: Entries  # [N]
    where: str  # "FILE, suite NAME"

    def mistake(self, row: int, expected: str) -> InputError:
        """Returns the error for the entry of a row, from 0."""
        return InputError(
            f"{self.where}: row {row + 1}, column {self.name} is {shown(self.entries[row])}, but "
            f"must be {expected}: correct the row or leave it out"
        )


def read(columns: Columns, config: TasksConfig) -> SuiteRows:
    """Makes the prompts and ground truths of a suite from the columns of its file.

    A column that `prompt_column`, `answer_column` or `domain_column` names replaces that of the
    suite. Options are in a random order that depends on the question only. Raises InputError for a
    column that is missing, and for the first value that the suite cannot have.
    """
    suite = SUITES[config.suite or ""]
    where = f"{config.source}, suite {config.suite}"
    questions = _questions(columns, suite, config.prompt_column, where)
    if suite.options and config.answer_column is None:
        given = [_texts(_column(columns, (name,), where, suite)) for name in suite.options]
        orders = [_order(question, len(given)) for question in questions]
        answers: Entries = [LETTERS[order.index(0)] for order in orders]
        options = [
            "\n".join(
                f"{letter}) {given[number][row]}"
                for letter, number in zip(LETTERS, order, strict=True)
            )
            for row, order in enumerate(orders)
        ]
    else:
        answers = _answers(columns, suite, config.answer_column, where)
        options = [""] * len(questions)
    prompts = [
        [{"role": "user", "content": _prompt(suite, *texts)}]
        for texts in zip(questions, options, strict=True)
    ]
    domain = config.domain_column or next(filter(columns.__contains__, suite.domain), None)
    return SuiteRows({**columns, "prompt": prompts, "answer": answers}, domain)


def _prompt(suite: Suite, question: str, options: str) -> str:
    before, _, behind = suite.prompt.partition("{question}")
    return before + question + behind.replace("{options}", options)


def _column(columns: Columns, names: Sequence[str], where: str, suite: Suite) -> _Column:
    """Returns the first of the columns that there is."""
    name = next(filter(columns.__contains__, names), None)
    if name is None:
        raise InputError(
            f"{where}: there is no column {' or '.join(names)}, only {', '.join(columns)}: give a "
            f"file with the columns of hub:{suite.hub}, or name the column with prompt_column or "
            "answer_column"
        )
    return _Column(name, columns[name], where)


def _questions(columns: Columns, suite: Suite, name: str | None, where: str) -> list[str]:
    """Reads the questions; raises InputError for a row with an image."""
    for row, kind in enumerate(columns.get("modality", ())):
        if kind == "Multimodal":
            column = _Column("modality", columns["modality"], where)
            raise column.mistake(row, "Text-only, as policies read no images")
    names = suite.question if name is None else (name,)
    return _texts(_column(columns, names, where, suite))


def _texts(column: _Column) -> list[str]:
    """Reads texts, and numbers as texts, without white space around them."""
    texts = []
    for row, entry in enumerate(column.entries):
        text = str(entry) if isinstance(entry, int | float) else entry
        if not isinstance(text, str) or not text.strip():
            raise column.mistake(row, "a text")
        texts.append(text.strip())
    return texts


def _answers(columns: Columns, suite: Suite, name: str | None, where: str) -> Entries:
    """Reads the ground truths: those of the column of answers, else the last box of each solution.

    Of GSM8K it is the number after ####.
    """
    names = suite.answer if name is None else (name,)
    if not any(map(columns.__contains__, names)) and suite.solution:
        column = _column(columns, suite.solution, where, suite)
        boxes = [last_boxed(text) for text in _texts(column)]
        if None in boxes:
            raise column.mistake(boxes.index(None), r"a text with its answer in \boxed{}")
        return list(boxes)
    column = _column(columns, names, where, suite)
    answers = [_answer(entry) for entry in column.entries]
    for row, answer in enumerate(answers):
        if answer is None or answer == "" or answer == []:
            ending = " that ends in #### and a number" if "####" in suite.prompt else ""
            raise column.mistake(row, f"an answer{ending}")
    return answers


def _answer(entry: object) -> object:
    """Returns a ground truth without the `$` around it."""
    if isinstance(entry, list):
        return [_answer(each) for each in entry]
    if isinstance(entry, str) and "####" in entry:
        return ground_truth.gsm8k_number(entry)
    return entry.strip().strip("$").strip() if isinstance(entry, str) else entry


def _order(question: str, count: int) -> list[int]:
    """Draws an order of options, by their question."""
    return random.Random(question).sample(range(count), count)
