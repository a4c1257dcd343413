"""Rewards without dependencies: `exact`, `gsm8k`, and the adapter for verl's `compute_score`.

A reward is any function `reward(prompts, completions, **columns) -> list[float | None]`, TRL's signature: lists of one
length n, a column of the tasks a keyword, None for "does not apply". The pool calls it with n = 1.
"""

import functools
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

# A minus counts only where it cannot be a difference or a range: "10-5" ends in 5, "= -5" and "$-5" in -5.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−])?\$?(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)"
)


def exact(prompts: Sequence, completions: Sequence[str], *, answer: Sequence, **columns: Any) -> list[float | None]:
    """1 where the completion equals the column `answer`, white space around both aside; None where `answer` is None."""
    return [
        None if gold is None else float(completion.strip() == str(gold).strip())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def gsm8k(prompts: Sequence, completions: Sequence[str], *, answer: Sequence, **columns: Any) -> list[float | None]:
    """1 where the final number of the completion equals that of the column `answer`; None where `answer` has none.

    The final number follows the last `####`, else it is the last of the text [GSM8K, arXiv 2110.14168, which reads only
    after `####`]; commas, `$` and a trailing point do not count. `answer` is a number or GSM8K's "... #### 72".
    """
    golds = [_final_number(str(gold)) for gold in answer]
    return [
        None if gold is None else float(_final_number(completion) == gold)
        for completion, gold in zip(completions, golds, strict=True)
    ]


def _final_number(text: str) -> Decimal | None:
    """The first number after the last `####`, else the last number of the text."""
    _, marker, tail = text.rpartition("####")
    first = _NUMBER.search(tail) if marker else None
    numbers = [first] if first else list(_NUMBER.finditer(text))
    if not numbers:
        return None
    return Decimal(("-" if numbers[-1]["sign"] else "") + numbers[-1]["digits"].replace(",", ""))


def verl(compute_score: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """Our signature for verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`.

    `ground_truth` is the column `answer`; a score in a dict is its "score". Hold the result in a module:
    `reward = verl(compute_score)` in scores.py is the reward `scores:reward`.
    """

    @functools.wraps(compute_score)
    def reward(
        prompts: Sequence,
        completions: Sequence[str],
        *,
        answer: Sequence,
        data_source: Sequence | None = None,
        extra_info: Sequence | None = None,
        **columns: Any,
    ) -> list[float | None]:
        nothing = [None] * len(completions)
        scores = [
            compute_score(data_source=source, solution_str=completion, ground_truth=truth, extra_info=extra)
            for source, completion, truth, extra in zip(
                data_source or nothing, completions, answer, extra_info or nothing, strict=True
            )
        ]
        return [score["score"] if isinstance(score, dict) else score for score in scores]

    return reward
