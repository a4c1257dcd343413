"""Reads ground truths of any type as text; `text` holds the table of types, which all built-in
rewards share.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Integral
from typing import Any

from jaxrft.errors import InputError

logger = logging.getLogger(__name__)

DIGITS = 1_000  # of a number; longer ones are no ground truths
_SCALES = 400  # decimal exponents up to which a number is written out
_OBJECT = re.compile(r"\s*(?:\{\s*\"|\[\s*\{)")  # how a JSON object, or a list of some, begins


def text(truth: object) -> str | None:
    r"""Returns a ground truth as the text that answers are compared with, or None where there is
    none.

    | type | meaning |
    |---|---|
    | str | itself; the JSON text of an object, or of a list of objects, is an object |
    | int; numpy's, too | its digits |
    | float, Decimal; numpy's, too | its shortest decimal digits, without exponent and without a fraction of zero |
    | None, NaN, NaT | no ground truth: the reward is None |
    | list or tuple, array of one dimension | all of its elements together, in any order: `[2, 3]` is `2, 3` |
    | bool, infinity, dict, bytes, date, time, nested or empty list, set, any other | nothing |

    A list of one element is that element. Raises InputError with one sentence for what has no
    meaning. It is raised when tasks are opened; where there are other rewards too, this one takes
    such a ground truth for none.

    >>> text(1e16), text(1e-05), text(5.0), text(float("nan")), text([2, 0.5])
    ('10000000000000000', '0.00001', '5', None, '2, 0.5')
    """  # noqa: E501
    truth = _parsed(_plain(truth))
    if truth is None or isinstance(truth, str):
        return truth
    if isinstance(truth, list | tuple):
        return _together(truth)
    if isinstance(truth, Integral | float | Decimal) and not isinstance(truth, bool):
        return _digits(truth)
    raise InputError(
        f"the ground truth {_shown(truth)} is of type {type(truth).__name__}: {_remedy(truth)}"
    )


def one_text(truth: object) -> str | None:
    """Returns what `text` does for a reward that compares one answer; raises InputError for a list
    of several.
    """
    truth = _parsed(_plain(truth))
    if isinstance(truth, list | tuple) and len(truth) > 1:
        raise InputError(
            f"the ground truth {_shown(truth)} is a list of {len(truth)} answers, but this "
            "reward compares one: "
            "use the reward math, or name a column of single answers with tasks.answer_column"
        )
    return text(truth)


def texts(truths: Sequence[object], *, several: bool = False) -> list[str | None]:
    """Returns ground truths as texts, and None for those without a meaning here, which other
    rewards may use.
    """
    read = text if several else one_text
    return [_or_none(read, truth) for truth in truths]


def _or_none(read: Callable[[object], str | None], truth: object) -> str | None:
    try:
        return read(truth)
    except InputError:
        return None


def check(
    truths: Sequence[object],
    rows: Sequence[int],
    source: str,
    *,
    several: bool,
    only: bool,
    may_lack_all: bool = False,
) -> None:
    """Raises InputError for the first ground truth that has no meaning to built-in rewards, if
    there are `only` those.

    `rows` are those of the source, from 0; `several` says whether a list of answers has a meaning.
    Logs the number of tasks without a reward, unless it is all of a set that `may_lack_all`, since
    other rewards read its ground truths.
    """
    read = text if several else one_text
    missing = 0
    for row, truth in zip(rows, truths, strict=True):
        try:
            missing += read(truth) is None
        except InputError as error:
            if only:
                raise InputError(f"{source} row {row + 1}: {error}") from error
            missing += 1
    if missing and not (may_lack_all and missing == len(rows)):
        logger.warning(
            "%d of %d tasks of %s have no ground truth that built-in rewards can use",
            missing,
            len(rows),
            source,
        )


def sendable(truth: object) -> object:
    """Returns a ground truth as a value that JSON has, if it has a meaning; raises InputError
    else.
    """
    if isinstance(truth, str | int | float | list | dict | None):
        return truth
    return text(truth)


def gsm8k_number(answer: object) -> str | None:
    """Extracts the number after #### at the end of an answer; None if there is none.

    Commas between thousands are removed.
    """
    match = re.search(r"####\s*\$?(-?[\d,.]*\d)\s*$", answer) if isinstance(answer, str) else None
    return match[1].replace(",", "") if match else None


def _plain(truth: object) -> object:
    """Returns a value of numpy's as Python's own, and None for those that stand for no value."""
    if type(truth).__module__.split(".")[0] == "numpy":
        truth = _from_numpy(truth)
    if isinstance(truth, float | Decimal) and math.isnan(truth):
        return None
    return None if type(truth).__name__ in ("NaTType", "NAType") else truth


def _parsed(truth: object) -> object:
    """Returns the objects that a JSON text holds, such as the tests of a program, else itself."""
    if not isinstance(truth, str) or not _OBJECT.match(truth):
        return truth
    try:
        return json.loads(truth)
    except (ValueError, RecursionError):
        return truth


def _from_numpy(truth: Any) -> object:
    """Returns a scalar as Python's own, with the digits that it prints, and an array as a list of
    scalars.
    """
    if truth.ndim:
        return list(truth)
    return float(str(truth)) if truth.dtype.kind == "f" else truth.item()


def _together(truths: Sequence[object]) -> str:
    """Returns the elements of a list as one answer."""
    if not truths:
        raise InputError(
            "the ground truth [] is an empty list: give at least one answer, or "
            "null where there is none"
        )
    elements = [_plain(truth) for truth in truths]
    for element in elements:
        if element is None or isinstance(element, list | tuple):
            kind = "nothing" if element is None else "another list"
            raise InputError(
                f"the ground truth {_shown(truths)} holds {kind}: "
                "give texts and numbers, and an interval or a tuple as text"
            )
    return ", ".join(answer for element in elements if (answer := text(element)) is not None)


def _digits(number: Integral | float | Decimal) -> str:
    """Returns the shortest decimal digits of a number, without exponent."""
    try:
        exact = Decimal(int(number)) if isinstance(number, Integral) else Decimal(str(number))
    except (ValueError, ArithmeticError):
        exact = None
    if exact is None or not exact.is_finite() or abs(exact.adjusted()) > max(_SCALES, DIGITS):
        raise InputError(
            f"the ground truth {_shown(number)} is no number of at most {DIGITS:,} digits: "
            "write it as text, as in \\infty"
        )
    digits = f"{exact if exact else abs(exact):f}"  # there is no -0
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _remedy(truth: object) -> str:
    """Returns what to do about a ground truth of a type that has no meaning."""
    if isinstance(truth, dict):
        fields = ", ".join(map(str, list(truth)[:5])) or "none"
        return (
            f"name one of its fields ({fields}) with tasks.answer_column, as in "
            "reward_model.ground_truth"
        )
    if isinstance(truth, bool):
        return 'write what an answer must say as text, such as "yes" or "True"'
    return "write what an answer must say as text or as a number"


def _shown(truth: object) -> str:
    try:
        shown = repr(truth)
    except ValueError:  # an integer of more digits than Python prints
        return f"of type {type(truth).__name__}"
    return shown if len(shown) <= 60 else shown[:57] + "..."
