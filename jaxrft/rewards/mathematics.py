"""The reward `math`: is the answer mathematically equal to the gold, by math-verify.

Apart from the other rewards because math-verify brings sympy, which only workers need.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import floor, log10
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from jaxrft.rewards import ground_truth
from jaxrft.rewards.arithmetic import CHARACTERS, unfinished
from jaxrft.rewards.boxes import joined_boxes, last_boxed
from jaxrft.rewards.choice import LONGEST, parse_choice
from jaxrft.rewards.constants import at, differ, values
from jaxrft.rewards.final_answer import final_answer
from jaxrft.rewards.functions import Completion, text_of
from jaxrft.rewards.limits import OutOfTime, processor_time, too_deep, too_large

logger = logging.getLogger(__name__)

# Our limit is the real one: math-verify's own is of the clock, so that a busy machine changes
# rewards, and it warns when it is switched off.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
_NO_LIMIT = 0
# Where it cannot read an answer, math-verify takes the last number in it; a gold must be read
# completely.
_COMPLETE = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]

# of processor time to parse and to compare; the slowest of DeepScaleR's truths take 0.2
SECONDS = 1.0
_PERCENT = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
_SEVERAL = sympy.FiniteSet | sympy.Tuple | sympy.And | sympy.Or
_DECIMALS = 6  # as math-verify compares
_KNOWN_BITS = 10  # of a number; fewer are what rounding leaves of a difference
BOX = LONGEST  # characters of an answer; the longest of DeepScaleR's truths has 145

_FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SIZES = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?)(?=\\?[\[\](){}|])|\\!\s*|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))"
)
_STYLED = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf)?|math(?:rm|bf|it|sf)|mbox|hbox|boldsymbol|bm|pmb|color\{[a-z]+\})\s*\{(?P<held>.*)\}",
    re.DOTALL,
)
_TWO_LETTERS = re.compile(r"(?<![\\a-zA-Z0-9])(?<![0-9] )[a-zA-Z]{2,}")  # but not units
_ROOT = re.compile(r"√\s*(?:\((?P<sum>[^()]*)\)|(?P<atom>[0-9.]+|[a-zA-Z]))")
_PI = re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])")
_NAMES = re.compile(r"\\(?:varnothing|lbrace|rbrace)(?![a-zA-Z])")
_NAMED = {"\\varnothing": "\\emptyset", "\\lbrace": "\\{", "\\rbrace": "\\}"}
_ROWS = re.compile(
    r"\\begin\s*\{(?P<name>align(?:ed)?|gather(?:ed)?|equation|split)\*?\}(?P<rows>.*)\\end\s*\{(?P=name)\*?\}",
    re.DOTALL,
)
_THOUSANDS_IN_LIST = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?=, |\\?[)\]}]|$)")
# A number behind the unit of another one, 3 hours 20 minutes, which math-verify leaves out.
_SECOND_NUMBER = re.compile(r"[0-9][^=]*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}[^0-9^_=]*[0-9]")
_THOUSANDS_AT_END = re.compile(
    r"(?P<sides>.*=\s*[-−]?)(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?)"
)
_WORDS = re.compile(r"[a-zA-Z]{2,}(?:[ '-][a-zA-Z]{2,})*")
_WORD = 4  # letters from which on a word is none of a product of variables
# 1, 234 is a list and 1,234 a number
_SPACES = re.compile(r"(?<![0-9a-zA-Z\\,]) | (?![0-9a-zA-Z])")
_PLAIN_NUMBER = re.compile(r"[-−]?[0-9][0-9,]*(?:\.[0-9]+)?")
_GROUPED = re.compile(r"[-−]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
_MIXED = re.compile(r"([-−]?[0-9]{1,9}) ([0-9]{1,9})/([0-9]{1,9})")
_EXPONENT = re.compile(r"([-−]?[0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,4})")
_UNIT_BEHIND = re.compile(
    r"\s*(?:[$€£¥₹]|\\\$|(?<=[0-9 "
    r"])(?:[mcdk]?m|in|ft|yd|mi|units?|inch(?:es)?|feet|yards?|miles?|\w*met(?:er|re)s?)"
    r"(?:\^\{?[23]\}?|[²³]))\s*"
)
_NO_THOUSANDS = re.compile(r"[-−]?0,[0-9]{3}")
_DECIMAL_COMMA = re.compile(r"[-−]?[0-9]+,(?:[0-9]{1,2}|[0-9]{4,})")
_UNIT = re.compile(
    r"(?P<number>[^a-zA-Z]*[0-9][^a-zA-Z]*?)\s+(?P<words>[a-zA-Z][a-zA-Z' "
    r"/.-]{2,80})"
)
# Words behind a number that change it.
_MULTIPLES = frozenset(
    "hundred thousand million billion trillion dozen percent pct percentage half halves "
    "third thirds quarter quarters fourth fourths fifth fifths sixth sixths squared "
    "cubed factorial over plus minus times divided by multiplied of mod modulo to sqrt "
    "root pi and or choose".split()
)


def math(
    prompts: Sequence,
    completions: Sequence[Completion],
    *,
    answer: Sequence,
    truncated: Sequence[bool] | None = None,
    **columns: object,
) -> list[float | None]:
    r"""Returns 1 where the completion's final answer equals the column `answer` and has been worked
    out, else 0.

    `final_answer.final_answer` has the table of what the final answer is, and of what it is where a
    completion is `truncated`. Where the gold is a number or a list of some, an answer with an
    operation between numbers that evaluates to a simpler number (`arithmetic.unfinished`) is none,
    unless the gold has such an operation, too. Nothing to parse gives 0, and so does an answer that
    cannot be compared within the limits of this module, or writing one would pay.
    `ground_truth.text` has the table of what `answer` may be; its text is LaTeX, bare or in `$` or
    `\boxed{}`, or GSM8K's "... #### 72". One that is missing or cannot be parsed gives None.

    math-verify says what is equal. Deviations: plain numbers that differ are told apart, and texts
    that are the same found equal, before it is asked; numbers are compared relatively; integrals,
    sums, products, limits and derivatives are questions and no answers; a gold is read as a whole
    or compared as text; intervals may be written as inequalities; a choice is its letter, with or
    without its text.
    """
    golds = ground_truth.texts(answer, several=True)
    cut = truncated or [False] * len(completions)
    return [
        None if gold is None else _grade(text_of(completion), gold, is_cut)
        for completion, gold, is_cut in zip(completions, golds, cut, strict=True)
    ]


@lru_cache(maxsize=4096)  # the samples of a task share their gold, and many of them their answer
def _spelled_gold(gold: str) -> str:
    """Returns the answer that a gold holds, as answers are compared."""
    gold = gold.rpartition("####")[2]
    return spelled(plain(joined_boxes(gold) or last_boxed(gold) or gold))


def _grade(completion: str, gold: str, truncated: bool) -> float | None:
    gold = _spelled_gold(gold)
    if not _parse_gold(gold):
        return None
    answer = final_answer(completion, truncated=truncated)
    if answer is None:
        return 0.0
    if _right(gold, answer):
        return 1.0
    joined = (
        final_answer(completion, joined=True, truncated=truncated) if _is_list(gold) else answer
    )
    return float(joined is not None and joined != answer and _right(gold, joined))


def _right(gold: str, answer: str) -> bool:
    """Checks whether an answer, as it is written, is right in one of the ways to read it."""
    return len(answer) <= BOX and _is_right(gold, answer)


@lru_cache(maxsize=4096)
def _is_right(gold: str, answer: str) -> bool:
    answer = spelled(plain(answer))
    if "{" in answer and _SECOND_NUMBER.search(answer) and _is_one_number(gold):
        return False
    if _equal(gold, answer):
        return True
    # 28 is 28% to math-verify, and here 1.5 is 1.5%, too
    if gold.endswith("%") != answer.endswith("%"):
        gold = _without_percent(gold)
        answer = _without_percent(answer)
        return bool(_PLAIN_NUMBER.fullmatch(gold) and _PLAIN_NUMBER.fullmatch(answer)) and _equal(
            gold, answer
        )
    choice = parse_choice(gold)
    chosen = parse_choice(answer)
    if choice is not None:
        return chosen is not None and choice.letter == chosen.letter
    if chosen is not None:
        text = chosen.text
        text = text.removesuffix("}") if text.count("}") > text.count("{") else text
        return text != "" and _equal(gold, spelled(plain(text)))
    return any(_equal(gold, other) for other in _other_readings(gold, answer))


def same_answer(one: str, other: str) -> bool:
    """Checks whether two answers are the same: each is right where the other is the ground
    truth.
    """
    return one == other or (_would_be_right(one, other) and _would_be_right(other, one))


def _would_be_right(answer: str, gold: str) -> bool:
    gold = _spelled_gold(gold)
    return bool(_parse_gold(gold)) and _right(gold, answer)


def _without_percent(answer: str) -> str:
    return answer.removesuffix("%").removesuffix("\\").strip()


def _other_readings(gold: str, answer: str) -> list[str]:
    """Returns what else an answer to a gold that is a number may be: without units, with a decimal
    comma.
    """
    if len(answer) > BOX or not _is_one_number(gold):
        return []
    answer = _UNIT_BEHIND.sub("", answer)
    if _DECIMAL_COMMA.fullmatch(answer):
        return [answer.replace(",", ".")]
    if _PLAIN_NUMBER.fullmatch(answer):
        return [answer]
    unit = _UNIT.fullmatch(answer)
    if unit is None or _MULTIPLES & set(re.findall("[a-z]+", unit["words"].lower())):
        return []
    return [spelled(plain(unit["number"]))]


def plain(answer: str) -> str:
    r"""Returns an answer in plain LaTeX, without what sets it.

    That are sizes of brackets and fractions, `$`, `\[`, spaces, a final point, and a style around
    all of it that holds no words. Of `aligned` rows it is the last. Characters such as `√`, `π`,
    `½` and `－` get their LaTeX.
    """
    if len(answer) > BOX:
        return answer
    if _PLAIN_NUMBER.fullmatch(answer):
        return answer.replace("−", "-")
    answer = (
        answer.strip().removeprefix("\\[").removesuffix("\\]").strip("$ \n\t").removesuffix("\\")
    )
    if rows := _ROWS.fullmatch(answer):
        answer = (
            rows["rows"]
            .strip()
            .removesuffix("\\\\")
            .rpartition("\\\\")[2]
            .replace("&", "")
            .lstrip(" =\n")
        )
    if not _TWO_LETTERS.search(_unstyled(answer)):
        answer = _unstyled(answer)
    answer = _PI.sub(r"\\pi", _ROOT.sub(_root, answer).translate(CHARACTERS))
    answer = _NAMES.sub(lambda name: _NAMED[name[0]], answer)
    answer = _SIZES.sub("", _FRACTIONS.sub(r"\\frac", answer))
    return _SPACES.sub("", " ".join(answer.split())).removesuffix(".")


def _unstyled(answer: str) -> str:
    """Returns what a style around all of an answer holds, else the answer."""
    styled = _STYLED.fullmatch(answer) if answer.startswith("\\") else None
    return styled["held"].strip() if styled and _closes_last(styled["held"]) else answer


def _closes_last(held: str) -> bool:
    """Checks that no brace in `held`, the content of a pair of braces, closes the pair."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", held, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return True


def _root(root: re.Match[str]) -> str:
    return f"\\sqrt{{{root['sum'] or root['atom'] or ''}}}"


def spelled(answer: str) -> str:
    r"""Returns a plain answer as math-verify reads it.

    That are single numbers `1 000`, `2 1/2`, `1.5e3`, `0,125`, and thousands behind `=` and in
    lists with spaces, as in `1,000, 2`.
    """
    if len(answer) > BOX:
        return answer
    if _GROUPED.fullmatch(answer):
        return answer.replace(" ", "")
    if _NO_THOUSANDS.fullmatch(answer):
        return answer.replace(",", ".")
    if mixed := _MIXED.fullmatch(answer):
        return f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if scientific := _EXPONENT.fullmatch(answer):
        return f"{scientific[1]}\\times10^{{{int(scientific[2])}}}"
    if last_side := _THOUSANDS_AT_END.fullmatch(answer):
        return last_side["sides"] + last_side["number"].replace(",", "")
    if ", " in answer:
        return _THOUSANDS_IN_LIST.sub(lambda number: number[0].replace(",", ""), answer)
    return answer


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list:
    return _parse(f"\\boxed{{{gold}}}", extraction_config=_COMPLETE) if len(gold) <= BOX else []


@lru_cache(maxsize=4096)
def _equal(gold: str, answer: str) -> bool:
    if gold == answer:
        return True
    if len(answer) > BOX:
        return False
    if _WORDS.fullmatch(gold) and max(map(len, re.split("[ '-]", gold))) >= _WORD:
        return gold.casefold() == _unstyled(answer).casefold()
    if differ(values(gold), values(answer)):
        return False
    return _verify(gold, f"\\boxed{{{answer}}}") and _is_finished(gold, answer)


def _is_finished(gold: str, answer: str) -> bool:
    """Checks whether an answer that equals the gold has been worked out as far as the gold."""
    if not _all_numbers(_parse_gold(gold)[0]):
        return True
    try:
        with processor_time(SECONDS):
            return unfinished(answer) <= unfinished(gold)
    except OutOfTime:
        return False


def _all_numbers(parsed: object) -> bool:
    """Checks whether a gold is a number, or a list, set, matrix or interval of numbers.

    `x = 5` counts as a number.
    """
    if isinstance(parsed, sympy.Eq) and parsed.lhs.is_Symbol:
        return _all_numbers(parsed.rhs)
    if isinstance(parsed, _SEVERAL) and parsed.args:
        return all(map(_all_numbers, parsed.args))
    return isinstance(parsed, sympy.Basic | sympy.MatrixBase) and not parsed.free_symbols


@lru_cache(maxsize=4096)
def _is_one_number(gold: str) -> bool:
    parsed = _parse_gold(gold)[0]
    parsed = parsed.rhs if isinstance(parsed, sympy.Eq) and parsed.lhs.is_Symbol else parsed
    return isinstance(parsed, sympy.Expr) and not parsed.free_symbols


@lru_cache(maxsize=4096)
def _is_list(gold: str) -> bool:
    """Checks whether a gold is a list or set of several answers."""
    parsed = _parse_gold(gold)[0]
    return isinstance(parsed, _SEVERAL | sympy.Union) and len(parsed.args) > 1


@lru_cache(maxsize=1)
def _load() -> None:
    """Calls math-verify and sympy once, so that what they load at first does not count as the time
    of an answer.
    """
    answers = parse(r"$\sin^2 x + \cos^2 x$", parsing_timeout=_NO_LIMIT)
    verify(parse("$1$", parsing_timeout=_NO_LIMIT), answers, timeout_seconds=_NO_LIMIT)


def _verify(gold: str, text: str) -> bool:
    """Checks by math-verify whether an answer equals the gold.

    Returns False where math-verify exceeds the limits of this module or fails.
    """
    golds = _parse_gold(gold)
    answers = _parse(text)
    try:
        with processor_time(SECONDS):
            return not _differ(golds, answers) and verify(
                golds,
                answers,
                float_rounding=_decimals(gold),
                allow_set_relation_comp=True,
                timeout_seconds=_NO_LIMIT,
            )
    except OutOfTime:
        return False
    except Exception as error:  # whatever math-verify and sympy fail with
        logger.warning(
            "math cannot compare %.99r with the ground truth %.99r: it counts as wrong (%r)",
            text,
            gold,
            error,
        )
        return False


def _parse(text: str, **options: Any) -> list:
    """Returns what math-verify reads in a text, expressions and a string, or an empty list
    where it cannot be parsed within the limits.
    """
    if too_deep(text):
        return []
    _load()
    try:
        with processor_time(SECONDS):
            parsed = parse(text, parsing_timeout=_NO_LIMIT, **options)
            if too_large(parsed):
                return []
            return (
                [_without_matrix_operations(each) for each in parsed]
                if "\\begin" in text
                else parsed
            )
    except OutOfTime:
        return []
    except Exception as error:
        logger.warning("math cannot read %.100r: %r", text, error)
        return []


def _without_matrix_operations(parsed: object) -> object:
    """Returns the matrix that a sum, product or power of matrices is; `evalf` would recur without
    end.
    """
    if isinstance(parsed, sympy.MatrixExpr) or (
        isinstance(parsed, sympy.Expr) and _has_matrix(parsed)
    ):
        done = parsed.doit()
        return done.as_explicit() if isinstance(done, sympy.MatrixExpr) else done
    return parsed


def _has_matrix(expression: sympy.Basic | sympy.MatrixBase) -> bool:
    return any(
        isinstance(part, sympy.MatrixBase | sympy.MatrixExpr)
        for part in sympy.preorder_traversal(expression)
    )


def _differ(golds: list, answers: list) -> bool:
    """Checks whether gold and answer were parsed as different numbers.

    Then math-verify need not try to simplify their difference to zero. math-verify compares
    absolutely, so that all small numbers are equal to it. Here numbers are compared relatively. The
    order of a list and the kind of its brackets do not count. Returns False for what is neither a
    number nor a list of numbers.
    """
    if not (golds and answers):
        return False
    return all(differ(one, other) for one in _readings(golds[0]) for other in _readings(answers[0]))


@lru_cache(maxsize=4096)
def _decimals(gold: str) -> int:
    """Returns how many decimals are compared: six from the first digit of the gold's smallest
    number on.
    """
    sizes = [abs(number) for reading in _readings(_parse_gold(gold)[0]) for number in reading or ()]
    smallest = min((size for size in sizes if 0 < size < 1), default=1.0)
    return _DECIMALS + max(0, -floor(log10(smallest)) - 1)


def _readings(parsed: object) -> list[list[float] | None]:
    """Returns the numbers of an expression in each way to read it: 28% is 0.28 and 28 to
    math-verify.
    """
    if not (isinstance(parsed, sympy.Expr) and parsed.has(_PERCENT)):
        return [_numbers(parsed)]
    return [_numbers(parsed.xreplace({_PERCENT: sympy.Rational(1, scale)})) for scale in (1, 100)]


def _numbers(parsed: object) -> list[float] | None:
    """Returns a number, or those in a set, list, matrix or interval, with numbers for symbols; None
    for others.
    """
    try:
        return [_number(element) for element in _elements(parsed)]
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        return None


def _elements(parsed: object) -> Iterator[object]:
    match parsed:
        case sympy.Interval():
            yield from parsed.args[:2]
        case sympy.FiniteSet() | sympy.Tuple():
            for element in parsed.args:
                yield from _elements(element)
        case sympy.MatrixBase():
            yield from parsed.flat()
        case sympy.Eq() if parsed.lhs.is_Symbol:
            yield parsed.rhs
        case _:
            yield parsed


def _number(expression: Any) -> float:
    """Raises an error for what is not a real number, and where the terms of a sum cancel, so that
    no digit is known.
    """
    if expression.is_Symbol or expression.has(sympy.UnevaluatedExpr):
        raise TypeError
    number = expression.evalf(
        15, subs={symbol: at(symbol.name) for symbol in expression.free_symbols}
    )
    if number.is_Float and number._prec < _KNOWN_BITS:
        raise ValueError
    return float(number)
