r"""Evaluates plain LaTeX as a number without computer algebra, since most wrong answers are wrong
numbers.

    list    = [( | [ | \{] element {, element} [) | ] | \}]
    element = sum | \infty | -\infty
    sum     = [-] product {(+ | -) product}
    product = power {(\cdot | \times | *) power | / power | \sqrt, \pi, letter or bracket right after}
    power   = atom [^ digit | ^ letter | ^ {sum}]
    atom    = number | letter | \pi | (sum) | \frac{sum}{sum} | \frac<digit><digit> | \sqrt[sum]{sum} | \sqrt<digit>

A letter stands for a fixed number, so that two expressions in x that differ there are different
functions. Whatever math-verify could read in another way (mixed numbers, units, functions, lists)
has no value here.
"""  # noqa: E501

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_TOKEN = re.compile(
    r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\\[a-zA-Z]+|\\[{}]|[-+*/^(){}\[\],a-zA-Z]))\s*"
)
_LETTERS = "xyzaknpquv"  # others are units to math-verify at the end of an answer, or d, e and i
_DEPTH = 30
_ROUNDING = 2e-6  # what six decimals may differ by
_CANCELLED = 1e-6  # of the largest term: a sum that is smaller has lost too many digits
_PRODUCTS = ("\\cdot", "\\times", "*")


class _NoValue(Exception):
    """The text is not in the grammar."""


@lru_cache(maxsize=4096)
def values(text: str) -> tuple[float, ...] | None:
    r"""Evaluates `text` as a number, or as a list of numbers in any brackets.

    Returns None for what is not in the grammar. The numbers are accurate to about 1e-12 of the
    largest intermediate one.

    >>> values(r"\frac{\sqrt{3}}{2}") == (3**0.5 / 2,), values("1,080"), values(r"(-\infty, 2]"), values(r"2\frac12")
    (True, (1080.0,), (-inf, 2.0), None)
    """  # noqa: E501
    if _THOUSANDS.fullmatch(text):
        return (float(text.replace(",", "")),)
    if _THOUSANDS.search(text):  # or a list?
        return None
    try:
        reader = _Reader(text)
        return tuple(reader.list())
    # the last of math.sqrt, for complex numbers
    except (_NoValue, ArithmeticError, ValueError, TypeError):
        return None


def differ(some: Sequence[float] | None, others: Sequence[float] | None) -> bool:
    """Checks whether two lists, in any order, hold numbers that differ by more than rounding.

    Returns False if one of them is None. Rounding is six digits of a number below 1, and six
    decimals of others, as math-verify compares them: 0 is only 0. A list of equal numbers is one
    number to math-verify.
    """
    if some is None or others is None:
        return False
    ones = sorted(set(some))
    others = sorted(set(others))
    return len(ones) != len(others) or not all(map(_close, ones, others))


def _close(one: float, other: float) -> bool:
    """Checks whether two numbers are equal up to rounding."""
    if math.isclose(one, other, rel_tol=1e-9):
        return True
    return math.isclose(one, other, rel_tol=_ROUNDING) and math.isclose(
        one, other, rel_tol=0.0, abs_tol=_ROUNDING
    )


def at(symbol: str) -> float:
    """Maps a symbol to the fixed number in [0.5, 1.5) that it stands for."""
    return 0.5 + zlib.crc32(symbol.encode(errors="replace")) / (1 << 32)


class _Reader:
    """A recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.tokens = []
        self.at = 0
        self.depth = 0
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None:
                raise _NoValue
            self.tokens.append(token[1] or token[2])
            position = token.end()
        self.commas = self.tokens.count(",")
        self.tokens.append("")  # the end

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *wanted: str) -> str:
        """Consumes and returns the next token if it is one of `wanted`, else returns ''."""
        if self.next in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def expect(self, wanted: str) -> None:
        if self.next != wanted:
            raise _NoValue
        self.at += 1

    def list(self) -> Iterator[float]:
        """Yields the value of every element; brackets around a single one belong to it."""
        bracketed = self.commas and self.take("(", "[", "\\{")
        yield self.element()
        for _ in range(self.commas):
            self.expect(",")
            yield self.element()
        if bracketed and not self.take(")", "]", "\\}"):
            raise _NoValue
        self.expect("")

    def element(self) -> float:
        minus = self.next == "-" and self.tokens[self.at + 1] == "\\infty"
        self.at += minus
        if self.take("\\infty"):
            return -math.inf if minus else math.inf
        value = self.sum()
        if not (isinstance(value, float) and math.isfinite(value)):
            raise _NoValue
        return value

    def sum(self) -> float:
        self.depth += 1
        if self.depth > _DEPTH:
            raise _NoValue
        total = -self.product() if self.take("-") else self.product()
        largest = abs(total)
        while sign := self.take("+", "-"):
            term = self.product()
            total += term if sign == "+" else -term
            largest = max(largest, abs(term))
        self.depth -= 1
        if abs(total) < _CANCELLED * largest:
            raise _NoValue
        return total

    def product(self) -> float:
        total = self.power()
        divided = False
        while True:
            if self.take(*_PRODUCTS):
                total *= self.power()
                divided = False
            elif self.take("/"):
                total /= self.power()
                divided = True
            elif not self._starts_a_factor():
                return total
            elif divided:  # 1/2\pi
                raise _NoValue
            else:
                total *= self.power()

    def _starts_a_factor(self) -> bool:
        """Checks whether the next token begins a factor without a sign of multiplication.

        Raises _NoValue where it may belong to a mixed number.
        """
        if self.next in ("\\sqrt", "\\pi") or _is_letter(self.next):
            return True
        # x(2) could be a function
        if self.next == "(" and not _is_letter(self.tokens[self.at - 1]):
            inside = self.tokens[self.at : self._closing()]
            # 2(3) is a mixed number
            if any(token in ("\\sqrt", "\\pi") or _is_letter(token) for token in inside):
                return True
        if self.next in ("", "+", "-", ")", "}", "]", "\\}", ","):
            return False
        raise _NoValue

    def _closing(self) -> int:
        """Finds the index of the token that closes the next bracket."""
        depth = 0
        for i in range(self.at, len(self.tokens)):
            depth += {"(": 1, ")": -1}.get(self.tokens[i], 0)
            if depth == 0:
                return i
        raise _NoValue

    def power(self) -> float:
        base = self.atom()
        if not self.take("^"):
            return base
        exponent = self.argument()
        if self.next == "^":
            raise _NoValue
        return base**exponent

    def atom(self) -> float:
        token = self.next
        if token == "(":
            return self.enclosed("(", ")")
        self.at += 1
        match token:
            case "\\pi":
                return math.pi
            case "\\frac":
                return self.fraction()
            case "\\sqrt":
                return self.root()
        if _is_letter(token):
            return at(token)
        if token[:1].isdigit() or token[:1] == ".":
            return float(token)
        raise _NoValue

    def fraction(self) -> float:
        if self.next == "{":
            return self.enclosed("{", "}") / self.enclosed("{", "}")
        digits = self.next
        if not (digits.isdigit() and len(digits) == 2):
            raise _NoValue
        self.at += 1
        return float(digits[0]) / float(digits[1])

    def root(self) -> float:
        degree = self.enclosed("[", "]") if self.next == "[" else 2.0
        inside = self.argument()
        return math.sqrt(inside) if degree == 2.0 else inside ** (1.0 / degree)

    def argument(self) -> float:
        """Reads an argument of TeX: what is in braces, else one digit or letter."""
        if self.next == "{":
            return self.enclosed("{", "}")
        if len(self.next) != 1 or not (self.next.isdigit() or _is_letter(self.next)):
            raise _NoValue
        return self.atom()

    def enclosed(self, opening: str, closing: str) -> float:
        self.expect(opening)
        total = self.sum()
        self.expect(closing)
        return total


def _is_letter(token: str) -> bool:
    return token != "" and token in _LETTERS
