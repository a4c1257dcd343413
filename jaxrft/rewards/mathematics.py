"""The reward `math`: is the answer mathematically equal to the gold, judged by math-verify.

Apart from the other rewards because math-verify brings sympy, which only workers need.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from jaxrft.rewards.constants import at, differ, values
from jaxrft.rewards.functions import Completion, text_of
from jaxrft.rewards.limits import OutOfTime, processor_time, too_deep, too_large

# Our limit is the real one: math-verify's own is of the clock, so that a busy machine changes rewards, and it warns
# when it is switched off.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
_NO_LIMIT = 0
# Where it cannot read an answer, math-verify takes the last number in it; a gold must be read as a whole.
_WHOLE = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]

SECONDS = 1.0  # of processor time to parse and to compare; the slowest of DeepScaleR's truths take 0.2
BOX = 1_000  # characters of an answer; the longest of DeepScaleR's truths has 145
TEXT = 4_000  # characters at the end of a completion without a box in which an answer is looked for
TAIL = 100_000  # characters at the end of a completion in which a box is looked for

_BRACES = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
_FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SIZES = re.compile(r"\\(?:left|right)(?=\\?[\[\](){}|])|\\!|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")
_SPACES = re.compile(r"(?<![0-9a-zA-Z\\,])\s+|\s+(?![0-9a-zA-Z])")  # 1, 234 is a list and 1,234 a number


def math(
    prompts: Sequence, completions: Sequence[Completion], *, answer: Sequence, **columns: Any
) -> list[float | None]:
    r"""1 where math-verify finds the completion equal to the column `answer`, which is parsed first.

    The completion's answer is its last closed `\boxed{}`, else what math-verify extracts from the end of the text;
    nothing to parse there gives 0, and so does an answer that cannot be judged within the limits of this module, for
    else it would pay to write one. `answer` is LaTeX, bare or in `$` or `\boxed{}`, or GSM8K's "... #### 72"; one that
    cannot be judged itself gives None. Deviation: several boxes are not joined to a set; plain numbers that differ are
    told apart, and texts that are the same found equal, before math-verify is asked; integrals, sums, products, limits
    and derivatives are questions and no answers; a gold is read as a whole or compared as text; intervals may be
    written as inequalities.
    """
    return [
        None if gold is None else _grade(text_of(completion), str(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _grade(completion: str, gold: str) -> float | None:
    gold = gold.rpartition("####")[2]
    gold = plain(last_boxed(gold) or gold)
    if not _parse_gold(gold):
        return None
    boxed = last_boxed(completion[-TAIL:])
    return float(_judge(gold, completion[-TEXT:]) if boxed is None else _equal(gold, plain(boxed)))


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` that is closed holds, or None; in time linear in the text."""
    last = text.rfind("\\boxed{")
    if last < 0:
        return None
    found = _last_boxed(text, last)
    return _last_boxed(text, 0) if found is None else found


def _last_boxed(text: str, begin: int) -> str | None:
    found, start, open_braces = None, -1, []
    for brace in _BRACES.finditer(text, begin):
        if brace[0] in ("{", "\\boxed{"):
            open_braces.append(brace.end() if brace[0] != "{" else -1)
        elif brace[0] == "}" and open_braces and (opened := open_braces.pop()) > start:
            found, start = text[opened : brace.start()], opened
    return found


def plain(answer: str) -> str:
    r"""An answer without what only sets it: sizes of brackets and fractions, `$`, `\[`, spaces, a final point."""
    if len(answer) > BOX:
        return answer
    answer = answer.strip().removeprefix("\\[").removesuffix("\\]").strip("$ \n\t")
    answer = _SIZES.sub("", _FRACTIONS.sub(r"\\frac", answer))
    return _SPACES.sub("", answer).removesuffix(".")


@lru_cache(maxsize=4096)  # the samples of a task share their gold, and many of them their answer
def _parse_gold(gold: str) -> list:
    return _parse(f"\\boxed{{{gold}}}", extraction_config=_WHOLE) if len(gold) <= BOX else []


@lru_cache(maxsize=4096)
def _equal(gold: str, answer: str) -> bool:
    if gold == answer:
        return True
    if len(answer) > BOX:
        return False
    if differ(values(gold), values(answer)):
        return False
    return _judge(gold, f"\\boxed{{{answer}}}")


def _judge(gold: str, text: str) -> bool:
    """math-verify's verdict, or False where it takes too much."""
    golds, answers = _parse_gold(gold), _parse(text)
    try:
        with processor_time(SECONDS):
            return not _apart(golds, answers) and verify(
                golds, answers, allow_set_relation_comp=True, timeout_seconds=_NO_LIMIT
            )
    except OutOfTime:
        return False


def _parse(text: str, **options: Any) -> list:
    """What math-verify reads in a text: expressions and a string, or nothing."""
    if too_deep(text):
        return []
    try:
        with processor_time(SECONDS):
            parsed = parse(text, parsing_timeout=_NO_LIMIT, **options)
    except OutOfTime:
        return []
    return [] if too_large(parsed) else parsed


def _apart(golds: list, answers: list) -> bool:
    """Whether other numbers were parsed, so that math-verify need not try to simplify their difference to zero.

    Order and kind of brackets do not count here, and of what is neither number nor list of numbers nothing is said.
    """
    return bool(golds and answers) and differ(_numbers(golds[0]), _numbers(answers[0]))


def _numbers(parsed: Any) -> list[float] | None:
    """The one number, the elements of a set or list or the ends of an interval; symbols stand for numbers."""
    match parsed:
        case sympy.Interval():
            elements = parsed.args[:2]
        case sympy.FiniteSet() | sympy.Tuple():
            elements = parsed.args
        case _:
            elements = (parsed,)
    try:
        return [_number(element) for element in elements]
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _number(expression: Any) -> float:
    """Raises TypeError for what is not a real number; so are words, and percentages, which math-verify reads twice."""
    if expression.is_Symbol or expression.has(sympy.UnevaluatedExpr):
        raise TypeError
    return float(expression.evalf(15, subs={symbol: at(symbol.name) for symbol in expression.free_symbols}))
