"""The reward `math`: is the answer mathematically equal to the gold, judged by math-verify.

Apart from the other rewards because math-verify brings sympy, which only workers need.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

# The pool's limit is the real one. math-verify's own rests on signals, cannot stop code that holds the interpreter,
# and warns when it is switched off.
logging.getLogger("math_verify").setLevel(logging.ERROR)
_NO_LIMIT = 0

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def math(prompts: Sequence, completions: Sequence[str], *, answer: Sequence, **columns: Any) -> list[float | None]:
    r"""1 where math-verify finds the completion equal to the column `answer`, which is parsed first.

    The completion's answer is its last closed `\boxed{}`, else what math-verify extracts from the text; nothing to
    parse there gives 0. `answer` is LaTeX, bare or in `$` or `\boxed{}`, or GSM8K's "... #### 72"; one without anything
    to parse gives None. Deviation: several boxes are not joined to a set.
    """
    return [
        None if gold is None else _grade(completion, str(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _grade(completion: str, gold: str) -> float | None:
    gold = gold.rpartition("####")[2]
    gold = (last_boxed(gold) or gold).strip()
    if not _parse_gold(gold):
        return None
    boxed = last_boxed(completion)
    return float(_equal(gold, completion) if boxed is None else _equal_boxed(gold, boxed.strip()))


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` that is closed holds, or None."""
    opening = len(text)
    while (opening := text.rfind("\\boxed{", 0, opening)) >= 0:
        start, depth = opening + len("\\boxed{"), 1
        for brace in _BRACES.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[start : brace.start()]
    return None


@lru_cache(maxsize=4096)  # the samples of a task share their gold, and many of them their answer
def _parse_gold(gold: str) -> list:
    return parse(f"\\boxed{{{gold}}}", parsing_timeout=_NO_LIMIT)


@lru_cache(maxsize=4096)
def _equal_boxed(gold: str, answer: str) -> bool:
    if gold == answer:
        return True
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    return _equal(gold, f"\\boxed{{{answer}}}")


def _equal(gold: str, text: str) -> bool:
    return verify(_parse_gold(gold), parse(text, parsing_timeout=_NO_LIMIT), timeout_seconds=_NO_LIMIT)
