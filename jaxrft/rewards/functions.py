"""Rewards without dependencies: `exact`, `gsm8k`, `number`, and the adapter for verl's
`compute_score`.

A reward is any function that TRL's trainer can call: by keyword, with lists of one length n, a
column of the tasks a keyword, and it returns n numbers, None for "does not apply". The pool calls
it with n = 1.
"""

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from jaxrft.rewards import ground_truth
from jaxrft.rewards.calls import signature_of
from jaxrft.rewards.lookup import Reward

# A completion as TRL has it: text, or where the prompt is a list of messages a list with the
# assistant's message.
Completion = str | Sequence[Mapping[str, object]]

TAIL = 100_000  # characters at the end of a completion in which `gsm8k` looks for a number

# A minus counts only where it cannot be a difference or a range: "10-5" ends in 5, "= -5" and "$-5"
# in -5.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−])?\$?(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,4}(?![0-9a-zA-Z]))?"
)


def text_of(completion: Completion) -> str:
    """Returns a completion as text: itself, or what its messages say."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message["content"]) for message in completion)


def exact(
    prompts: Sequence, completions: Sequence[Completion], *, answer: Sequence, **columns: object
) -> list[float | None]:
    """Returns 1 where the completion equals the column `answer`, white space around both aside,
    else 0.

    `ground_truth.text` has the table of what `answer` may be; one that is missing gives None.
    """
    golds = ground_truth.texts(answer)
    return [
        None if gold is None else float(text_of(completion).strip() == gold.strip())
        for completion, gold in zip(completions, golds, strict=True)
    ]


def gsm8k(
    prompts: Sequence, completions: Sequence[Completion], *, answer: Sequence, **columns: object
) -> list[float | None]:
    """Returns 1 where the final number of the completion equals that of the column `answer`, else
    0.

    The final number follows the last `####`, else it is the last of the text [GSM8K, arXiv
    2110.14168, which reads only after `####`]; commas, `$` and a trailing point do not count, and
    `1.5e3` is 1500. Only the last TAIL characters are read, and a number of more than
    `ground_truth.DIGITS` digits is none. `answer` is a number, GSM8K's "... #### 72", or what else
    `ground_truth.text` says; one without a number gives None.
    """
    golds = [None if gold is None else final_number(gold) for gold in ground_truth.texts(answer)]
    return [
        None if gold is None else float(final_number(text_of(completion)) == gold)
        for completion, gold in zip(completions, golds, strict=True)
    ]


def number(
    prompts: Sequence, completions: Sequence[Completion], *, answer: Sequence, **columns: object
) -> list[float | None]:
    """Returns 1 where the completion has one number alone, and it equals that of the column
    `answer`, else 0.

    So neither a question that is told again is paid for, nor a list of guesses. Words around the
    number do not count. Numbers are read as `gsm8k` reads them.
    """
    golds = [None if gold is None else final_number(gold) for gold in ground_truth.texts(answer)]
    return [
        None if gold is None else float(only_number(text_of(completion)) == gold)
        for completion, gold in zip(completions, golds, strict=True)
    ]


def only_number(text: str) -> Decimal | None:
    """Parses the number of a text; None if it has none, several, or is longer than TAIL."""
    if len(text) > TAIL or sum(1 for _ in _NUMBER.finditer(text)) != 1:
        return None
    return final_number(text)


def final_number(text: str) -> Decimal | None:
    """Parses the first number after the last `####`, else the last number, of the last TAIL
    characters.
    """
    text = text[-TAIL:]
    _, marker, tail = text.rpartition("####")
    number = _NUMBER.search(tail) if marker else None
    if number is None:
        number = max(_NUMBER.finditer(text), key=re.Match.end, default=None)
    if number is None or len(number["digits"]) > ground_truth.DIGITS:
        return None
    sign = "-" if number["sign"] else ""
    return Decimal(sign + number["digits"].replace(",", "") + (number["exponent"] or ""))


def as_reward(function: Reward) -> Reward:
    """Returns a function that TRL's trainer can call: verl's `compute_score` adapted, any other as
    it is.

    A function is verl's if it has parameters called `solution_str` and `ground_truth` and none
    called `completions`. Raises TypeError for parameters that neither TRL nor verl can give.
    """
    names = signature_of(function).names
    is_of_verl = {"solution_str", "ground_truth"} <= set(names) and "completions" not in names
    return verl(function) if is_of_verl else function


def verl(compute_score: Callable[..., Any]) -> Reward:
    """Returns a reward that calls verl's `compute_score(data_source, solution_str, ground_truth,
    extra_info)`.

    Of these four it is given, by keyword, those that it takes. `ground_truth` is the column
    `answer`; a score in a dict is its "score". The adapter is applied by itself to a function that
    the config names, see `as_reward`. Raises TypeError for a function with further parameters that
    have no default.
    """
    signature = signature_of(compute_score)
    unknown = set(signature.required) - {
        "data_source",
        "solution_str",
        "ground_truth",
        "extra_info",
    }
    if unknown:
        raise TypeError(
            f"verl's compute_score is not given {', '.join(sorted(unknown))}: give it a default"
        )

    @functools.wraps(compute_score)
    def reward(
        prompts: Sequence,
        completions: Sequence[Completion],
        *,
        answer: Sequence,
        data_source: Sequence | None = None,
        extra_info: Sequence | None = None,
        **columns: object,
    ) -> Any:
        absent = [None] * len(completions)
        scores = []
        for source, completion, truth, extra in zip(
            data_source or absent, completions, answer, extra_info or absent, strict=True
        ):
            given = {
                "data_source": source,
                "solution_str": text_of(completion),
                "ground_truth": truth,
                "extra_info": extra,
            }
            scores.append(compute_score(**signature.accepted(given)))
        if any(map(inspect.isawaitable, scores)):
            return _wait_for_scores(scores)
        return [_score(score) for score in scores]

    return reward


async def _wait_for_scores(scores: list[Awaitable[object]]) -> list[object]:
    return [_score(await score) for score in scores]


def _score(score: object) -> object:
    return score["score"] if isinstance(score, dict) else score
