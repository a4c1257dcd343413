"""Majority votes over the samples of a task, maj@k; workers count them, as they grade.

A function here is called as a reward is, but a completion is the list of all samples of a task. It
extracts answers as the reward of its name does.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from jaxrft.rewards import functions
from jaxrft.rewards.choice import chosen_letter

T = TypeVar("T", bound=Hashable)

# of processor time to compare the answers of a task; it leaves the last comparison its own limits
# within the default reward_timeout
SECONDS = 4.0

Groups = Sequence[Sequence[functions.Completion]]  # [n] tasks of k samples each


def majority(
    answers: Sequence[T | None],
    successes: Sequence[float],
    same: Callable[[T, T], bool] = lambda one, other: one == other,
) -> float:
    """Computes the expected success of the answer that most of k samples give.

    Samples with the same answer form a class; a sample without an answer (None) does not vote. With
    C_1, ..., C_m the largest classes, all of one size,

      maj@k = 1/m sum_j mean of success_i over i in C_j,

    which is the expectation when a tie is broken uniformly at random; 0 without any answer. An
    answer joins the first class whose first answer is the `same`. After SECONDS of processor time
    only equal answers are.

    Source: Wang et al., Self-Consistency Improves Chain of Thought Reasoning, 2022, section 2,
    which does not say how ties are broken.
    """
    classes = _classes(answers, same)
    if not classes:
        return 0.0
    largest = max(map(len, classes))
    winners = [members for members in classes if len(members) == largest]
    means = [sum(successes[i] for i in members) / largest for members in winners]
    return sum(means) / len(means)


def _classes(answers: Sequence[T | None], same: Callable[[T, T], bool]) -> list[list[int]]:
    """Groups the numbers of samples by their answers."""
    deadline = time.process_time() + SECONDS
    number_of: dict[T, int] = {}  # answer -> its class
    firsts: list[T] = []  # the first answer of each class
    classes: list[list[int]] = []
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in number_of:
            matches = (
                number
                for number, first in enumerate(firsts)
                if time.process_time() < deadline and same(first, answer)
            )
            number_of[answer] = next(matches, len(firsts))
            if number_of[answer] == len(firsts):
                firsts.append(answer)
                classes.append([])
        classes[number_of[answer]].append(i)
    return classes


def exact(
    prompts: Sequence, completions: Groups, *, successes: Sequence, **columns: object
) -> list[float]:
    """Votes by the whole text of a completion, white space around it aside."""

    def answer(text: str) -> str | None:
        return text.strip() or None

    return [
        majority([answer(functions.text_of(each)) for each in group], values)
        for group, values in zip(completions, successes, strict=True)
    ]


def gsm8k(
    prompts: Sequence, completions: Groups, *, successes: Sequence, **columns: object
) -> list[float]:
    """Votes by the final number."""
    return [
        majority([functions.final_number(functions.text_of(each)) for each in group], values)
        for group, values in zip(completions, successes, strict=True)
    ]


def number(
    prompts: Sequence, completions: Groups, *, successes: Sequence, **columns: object
) -> list[float]:
    """Votes by the only number."""
    return [
        majority([functions.only_number(functions.text_of(each)) for each in group], values)
        for group, values in zip(completions, successes, strict=True)
    ]


def choice(
    prompts: Sequence,
    completions: Groups,
    *,
    successes: Sequence,
    truncated: Sequence[Sequence[bool]],
    **columns: object,
) -> list[float]:
    """Votes by the letter."""
    return [
        majority(list(map(_letter, group, cut)), values)
        for group, values, cut in zip(completions, successes, truncated, strict=True)
    ]


def _letter(completion: functions.Completion, truncated: bool) -> str | None:
    return chosen_letter(functions.text_of(completion), truncated=truncated)


def math(
    prompts: Sequence,
    completions: Groups,
    *,
    successes: Sequence,
    truncated: Sequence[Sequence[bool]],
    **columns: object,
) -> list[float]:
    """Votes by the final answer; two are the same where each is right with the other as ground
    truth.
    """
    from jaxrft.rewards.final_answer import final_answer
    from jaxrft.rewards.mathematics import same_answer  # which brings sympy

    def answer(completion: functions.Completion, cut: bool) -> str | None:
        return final_answer(functions.text_of(completion), truncated=cut)

    return [
        majority(list(map(answer, group, cut)), values, same_answer)
        for group, values, cut in zip(completions, successes, truncated, strict=True)
    ]
