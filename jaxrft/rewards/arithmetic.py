r"""Finds the arithmetic in an answer that is still to be carried out: `53+43` is a question and
`96` an answer.

The reader below knows operations, numbers and brackets in LaTeX and in plain text, and takes all
other words for units.

    list    = sum {(, | ; | & | = | < | \text{and} | ...) sum}
    sum     = [sign] product {(+ | - | \pm | plus | minus) product}
    product = power {[\cdot | \times | * | / | : | of | times | over | ...] power}
    power   = atom {^ group | ! | \% | ^\circ | squared | \bmod group}
    atom    = number | \frac group group | \sqrt[sum] group | \binom group group | function [_ group] [^ group] power
            | (list) | [list] | \{list\} | |list| | \lfloor list \rfloor | \pi | e | i | word
"""  # noqa: E501

import math
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import sympy

_DEPTH = 40  # nested brackets and signs
_BITS = 200  # of numbers that are worked out here; larger ones are left as they are
_EXPONENT = 64  # largest exponent of a root that is worked out here


def _vulgar(fraction: str) -> str:
    """Returns the LaTeX of a character that is a fraction."""
    value = Fraction(unicodedata.numeric(fraction)).limit_denominator(10)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


# Characters that have a spelling in LaTeX or ASCII.
CHARACTERS = str.maketrans(
    {
        **{digit: str(value) for value, digit in enumerate("０１２３４５６７８９")},
        **{fraction: _vulgar(fraction) for fraction in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        **dict.fromkeys("×·⋅∙∗✕✖", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("−–—‒", "-"),
        "＝": "=",
        "√": r"\sqrt ",
        "π": r"\pi ",
        "°": r"^\circ ",
        "％": "%",
        "，": ",",
        "（": "(",
        "）": ")",
        **{power: f"^{{{digit}}}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    }
)
_STYLES = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname\*?)\s*"
    r"\{([^{}]*)\}"
)
_SPACING = re.compile(
    r"\\(?:[,;:! ]|left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|quad|qquad|small|large|Large)(?![a-zA-Z])"  # noqa: E501
    r"|[$~]"
)
_BEGIN = re.compile(r"\\begin\s*\{[^{}]*\}(?:\s*\{[lcr|]*\})?")
_END = re.compile(r"\\end\s*\{[^{}]*\}")
_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]{1,3}(?:(?:,|\{,\}|\\,|\\ |~| )[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?)"
    r"|(?P<word>\\?[a-zA-Z]+)|\*\*|\\.|\S",
    re.DOTALL,
)
_SPACES_IN_NUMBERS = re.compile(r"(?:,|\{,\}|\\,|\\ |~| )(?=[0-9]{3})")

_SIGNS = {"+": "+", "-": "-", "\\pm": "+", "\\mp": "-", "plus": "+", "minus": "-"}
_TIMES = ("*", "\\cdot", "\\times", "\\ast", "times", "multiplied", "of", "x")
_DIVIDED = ("/", "\\div", ":", "divided", "over")
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac", "\\cfrac")
_BINOMIALS = ("\\binom", "\\dbinom", "\\tbinom")
_EQUALS = ("=", "\\equiv", "equals")
_ABOUT = ("\\approx", "\\simeq", "\\sim", "\\doteq", "≈")
_SEPARATORS = (
    r", ; & < > \\ \& and or \lt \gt \le \ge \leq \geq \ne \neq \in \mid \cup \cap \to \implies "
    r"\Rightarrow \land \lor \setminus"
).split()
_ARGUMENTS = (*_FRACTIONS, *_BINOMIALS)  # take one digit each where there are no braces
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_MEASURES = {
    "|": ("|", "absolute value"),
    "\\|": ("\\|", "norm"),
    "\\lvert": ("\\rvert", "absolute value"),
    "\\vert": ("\\vert", "absolute value"),
    "\\lfloor": ("\\rfloor", "floor"),
    "\\lceil": ("\\rceil", "ceiling"),
}
_CLOSING = {*_BRACKETS.values(), *(closing for closing, _ in _MEASURES.values())}
# What is read in between atoms; "x" is a letter as well.
_BETWEEN = {
    *_SIGNS,
    *_TIMES,
    *_DIVIDED,
    *_SEPARATORS,
    *_EQUALS,
    *_ABOUT,
    *_CLOSING,
    "^",
    "**",
    "!",
    "_",
    "",
} - {"x"}
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
# Of rational numbers these always have a value that is simpler.
_INTEGER_FUNCTIONS = "gcd lcm max min floor ceil abs det sum prod lim int Gamma".split()
_INVERSES = {f"a{name}": f"arc{name}" for name in ("sin", "cos", "tan", "cot")}
_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    **{
        name: getattr(sympy, name)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
    },
    "exp": sympy.exp,
    **{name: getattr(sympy, inverse) for inverse, name in _INVERSES.items()},
    "ln": sympy.log,
    "log": sympy.log,
    "lg": sympy.log,
}
_POWERS = {"squared": 2, "cubed": 3}
_RATIONAL = ("integer", "decimal", "fraction", "ten")


class _Value(NamedTuple):
    """The value of a part of an answer, and how it is written."""

    number: sympy.Expr | None = None  # None: not known, or no number
    form: str = (
        # "" a unit, "integer", "decimal", "fraction", "ten" a power of it, "sum", "quotient",
        # "number" any other
        ""
    )
    coefficient: int = 1  # the integers that it is written to be multiplied with

    @property
    def rational(self) -> bool:
        """Checks whether the value is known to be rational.

        The number itself may be too long to be known.
        """
        return self.form in _RATIONAL if self.number is None else bool(self.number.is_Rational)


_UNIT = _Value()


@lru_cache(maxsize=4096)
def unfinished(text: str) -> frozenset[str]:
    r"""Names the operations between numbers in `text` that evaluate to a simpler number.

    An operation evaluates if its value is rational and it is not how rational numbers are written
    (integer, decimal, percentage, fraction in lowest terms, mixed number, m \times 10^n with 1 <=
    |m| < 10), or if sympy evaluates it by itself to fewer terms or factors or without the function.
    Lists and matrices are no numbers, their elements are. Roots of integers that are no perfect
    powers are numbers, also where a factor could be taken out. Of equations the final side counts,
    for it is what the others come to, and a side that is only a name counts for nothing; of
    approximations what is approximated.

    >>> sorted(unfinished(r"2(3 + 4)")), unfinished(r"x = 3 + 4 = 7"), unfinished(r"\frac{1+3\sqrt{2}}{2}, 10^{-3}")
    (['product', 'sum'], frozenset(), frozenset())
    """  # noqa: E501
    if _PLAIN.fullmatch(text):
        return frozenset()
    reader = _Reader(text)
    try:
        reader.elements("")
    except RecursionError:
        reader.kinds.add("nesting")
    return frozenset(reader.kinds)


_PLAIN = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?")


class _Reader:
    """A tolerant recursive descent over the tokens of one answer, which collects the `kinds` of
    open operations.
    """

    def __init__(self, text: str) -> None:
        text = _END.sub(")", _BEGIN.sub("(", text.translate(CHARACTERS)))
        text = _STYLES.sub(r" \1 ", _STYLES.sub(r" \1 ", text))
        self.numbers: list[bool] = []
        self.tokens: list[str] = []
        for token in _TOKEN.finditer(_SPACING.sub(_space_unless_grouping, text)):
            self.numbers.append(token["number"] is not None)
            self.tokens.append(token[0])
        self.numbers.append(False)
        self.tokens.append("")  # the end
        self.at = 0
        self.depth = 0
        self.kinds: set[str] = set()

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *wanted: str) -> str:
        """Returns the next token if it is one of `wanted`, else ''."""
        token = self.next
        if token and token in wanted:
            self.at += 1
            return token
        return ""

    def elements(self, closing: str) -> _Value:
        """Reads sums up to `closing`, or to any bracket that closes; returns the last one, or a
        list as a unit.
        """
        self.depth += 1
        if self.depth > _DEPTH:
            raise RecursionError
        count = 0
        value = _UNIT
        outer = self.kinds
        self.kinds = set()
        while (
            self.next
            and self.next not in _CLOSING - {"|", "\\|", "\\vert"}
            and self.next != closing
        ):
            before = self.at
            side = self.sum()
            if self.at == before:  # a token that says nothing here
                self.at += 1
            value = value if side.form == "" else side
            if self.next in _EQUALS and not self._names_follow():
                self.at += 1
                self.kinds = set()
            elif self.take(*_ABOUT) and value.form:  # what only approximates is left out
                kinds = set(self.kinds)
                self.sum()
                self.kinds = kinds
            elif self.take(*_SEPARATORS):
                count += 1
                outer |= self.kinds
                self.kinds = set()
        self.kinds |= outer
        if closing and not self.take(closing):
            self.take(*_CLOSING)
        self.depth -= 1
        return _UNIT if count else value

    def _names_follow(self) -> bool:
        """Checks whether the side behind the next token holds no number.

        Then the side in front of that token counts.
        """
        side = self.at + 1
        while self.tokens[side] and self.tokens[side] not in (
            *_EQUALS,
            *_ABOUT,
            *_SEPARATORS,
            *_CLOSING,
        ):
            name = self.tokens[side].lstrip("\\")
            if (
                self.numbers[side]
                or name in _CONSTANTS
                or name in _FUNCTIONS
                or name in _INTEGER_FUNCTIONS
            ):
                return False
            side += 1
        return True

    def sum(self) -> _Value:
        terms = []
        while True:
            sign = self._sign()
            before = self.at
            term = self.product()
            if self.at > before and term.form:
                if (
                    sign == "-"
                    and term.number is not None
                    and bool(term.number.is_negative)
                    and term.rational
                ):
                    self.kinds.add("sum")
                terms.append(_negated(term) if sign == "-" else term)
            if self.next not in _SIGNS:
                break
        if len(terms) < 2:
            return terms[0] if terms else _UNIT
        numbers = [term.number for term in terms if term.number is not None]
        total = _bounded(sympy.Add(*numbers)) if len(numbers) == len(terms) else None
        num_terms = sum(len(sympy.Add.make_args(number)) for number in numbers)
        evaluates = sum(term.rational for term in terms) > 1 or (
            total is not None and (total.is_Rational or len(sympy.Add.make_args(total)) < num_terms)
        )
        return self._operation("sum", total, evaluates, form="sum")

    def _sign(self) -> str:
        """Takes the signs in front of a term; more than one are an operation."""
        sign = "+"
        count = 0
        while token := self.take(*_SIGNS):
            sign = "-" if (_SIGNS[token] == "-") != (sign == "-") else "+"
            count += token != "+"
        if count > 1:
            self.kinds.add("sum")
        return sign

    def _signed(self, read: Callable[[], _Value]) -> _Value:
        """Reads a value with the signs in front of it, if there are any."""
        sign = self._sign()
        value = read()
        return _negated(value) if sign == "-" else value

    def product(self) -> _Value:
        factors: list[tuple[str, _Value]] = []
        operation = "*"
        while True:
            before = self.at
            factor = self.power() if not factors else self._signed_power()
            if self.at == before:
                break
            factors.append((operation, factor))
            if self.take(*_TIMES):
                operation = "*"
            elif self.take(*_DIVIDED):
                operation = "/"
            else:
                operation = ""
                if self.next in _SIGNS:
                    break
                continue
            self.take("by")
        return self._multiplied(_numbers(*factors))

    def _signed_power(self) -> _Value:
        """Reads a factor, which may have a sign behind a sign of multiplication: 7 * -4."""
        if self.next not in _SIGNS or self.tokens[self.at - 1] not in (*_TIMES, *_DIVIDED):
            return self.power()
        return self._signed(self.power)

    def _multiplied(self, factors: list[tuple[str, _Value]]) -> _Value:
        """Returns the product of factors, each with "*", "/", or "" for a number right behind
        another one.
        """
        if len(factors) < 2:
            return factors[0][1] if factors and factors[0][0] != "/" else _UNIT
        operations = [operation for operation, _ in factors]
        values = [value for _, value in factors]
        forms = [value.form for value in values]
        number = _product_of(factors)
        if forms in (["integer", "integer"], ["decimal", "integer"]) and operations[1] == "/":
            return self._operation(
                "quotient", number, not _in_lowest_terms(values[0], values[1]), form="fraction"
            )
        if forms == ["integer", "fraction"] and operations[1] == "" and _is_proper(values[1]):
            return _Value(_sum(values[0], values[1]), "decimal")
        if (
            forms == ["integer"] * 3
            and operations[1:] == ["", "/"]
            and _in_lowest_terms(values[1], values[2])
        ):
            return _Value(None, "decimal")  # 2 1/2
        if forms[1:] == ["ten"] and operations[1] == "*" and _is_mantissa(values[0]):
            return _Value(number, "decimal")
        rational = [value for value in values if value.rational]
        sums = sum(value.form == "sum" for value in values)
        name = "quotient" if "/" in operations[1:] else "product"
        if len(rational) > 1:
            reduced = len(rational) == 2 and len(values) > 2 and _reduced(factors)
            return self._operation(name, number, not reduced)
        sums -= values[-1].form == "sum" and operations[-1] == "/"
        evaluates = (
            sums > 1
            or _simpler(values, number)
            or _cancels(factors)
            or _multiplies_fractions(factors)
        )
        if name == "quotient":
            return self._operation(name, number, evaluates, form="quotient")
        product = self._operation(name, number, evaluates)
        return product._replace(coefficient=_coefficient(values))

    def _operation(
        self, kind: str, number: sympy.Expr | None, evaluates: bool, form: str = "number"
    ) -> _Value:
        """Returns the value of an operation, and records its kind if it evaluates."""
        if evaluates:
            self.kinds.add(kind)
        return _Value(number, form)

    def _unevaluated(self, kind: str) -> _Value:
        """Returns the value of an operation on integers, which always evaluates and is not worked
        out here.
        """
        return self._operation(kind, None, evaluates=True, form="integer")

    def power(self) -> _Value:
        value = self.atom()
        while True:
            if self.take("^", "**"):
                value = self._raised(value, self._exponent())
            elif self.next == "!" and value.form:
                self.at += 1
                value = self._unevaluated("factorial")
            elif self.take("\\%", "%", "percent", "pct", "percentage"):
                value = _scaled(value)
            elif self.next in _POWERS and value.form:
                value = self._raised(
                    value, _Value(sympy.Integer(_POWERS[self.take(self.next)]), "integer")
                )
            elif self.take("factorial"):
                value = self._unevaluated("factorial")
            elif self.take("\\choose", "choose"):
                self._group()
                value = self._unevaluated("binomial")
            elif self.take("\\bmod", "\\pmod", "\\mod", "mod", "modulo") and value.form:
                self._group()
                value = self._unevaluated("remainder")
            elif self.take("_"):
                self._group()
            else:
                return value

    def _exponent(self) -> _Value:
        """Reads an exponent; one that is no number, such as that of degrees or of a unit, is a
        unit.
        """
        return self._signed(self._group)

    def _raised(self, base: _Value, exponent: _Value) -> _Value:
        if not base.form:
            return _UNIT
        if not exponent.form:
            return base
        number = base.number
        power = exponent.number
        if number is None or power is None:
            return _Value(None, "number")
        is_integer = bool(power.is_Integer)
        if number == 10 and base.form == "integer" and is_integer:
            return _Value(number**power if abs(power) < _EXPONENT else None, "ten")
        if (number.is_Rational or number in (sympy.I,)) and is_integer:
            return self._operation("power", None if base.form else number, evaluates=True)
        result = _power(number, power)
        expands = (
            is_integer and abs(power) > 1 and (number.is_Add or number.is_Mul or number.is_Pow)
        )
        return self._operation(
            "power", result, expands or (result is not None and bool(result.is_Rational))
        )

    def atom(self) -> _Value:
        token = self.next
        if self.numbers[self.at]:
            self.at += 1
            return _number(token)
        if token in _BRACKETS:
            self.at += 1
            return self.elements(_BRACKETS[token])
        if token in _MEASURES:
            return self._measure(token)
        if token in _FRACTIONS:
            self.at += 1
            return self._multiplied(_numbers(("*", self._group()), ("/", self._group())))
        if token in _BINOMIALS:
            self.at += 1
            values = (self._group(), self._group())
            return self._operation(
                "binomial", None, evaluates=all(value.form for value in values), form="integer"
            )
        name = token.removeprefix("\\")
        if name in ("sqrt", "root", "cbrt"):
            return self._root(name)
        if name in _FUNCTIONS or name in _INTEGER_FUNCTIONS:
            return self._function(name)
        if name in _CONSTANTS:
            self.at += 1
            return _Value(_CONSTANTS[name], "number")
        if token not in _BETWEEN:
            self.at += 1
        return _UNIT

    def _group(self) -> _Value:
        """Reads an argument: what is in braces, else one atom, and of a longer number its first
        digit.
        """
        if self.next in _SIGNS:
            return self._signed(self.atom)
        if not (
            self.numbers[self.at] and self.tokens[self.at - 1] in _ARGUMENTS and len(self.next) > 1
        ):
            return self.atom()
        digits = self.next
        self.tokens[self.at] = digits[1:]
        return _number(digits[0])

    def _root(self, name: str) -> _Value:
        self.at += 1
        degree = _Value(sympy.Integer(3 if name == "cbrt" else 2), "integer")
        if self.take("["):
            degree = self.elements("]")
        inside = self._group()
        if not inside.form:
            return _UNIT
        if (
            inside.number is None
            or degree.number is None
            or not degree.number.is_Integer
            or degree.number <= 0
        ):
            return _Value(None, "number")
        result = _power(inside.number, 1 / degree.number)
        return self._operation("root", result, result is not None and bool(result.is_Rational))

    def _function(self, name: str) -> _Value:
        r"""Reads a function, its base or degree, the power it is raised to, and what it is taken
        of.
        """
        self.at += 1
        base = power = None
        while token := self.take("_", "^"):
            group = self._exponent()
            base, power = (group, power) if token == "_" else (base, group)
        bracketed = self.next in _BRACKETS
        argument = self.power() if bracketed else self._argument()
        if name in _INTEGER_FUNCTIONS:
            return self._unevaluated(name)
        if not argument.form:
            return _UNIT
        if argument.number is None or (base is not None and base.number is None):
            return _Value(None, "number")
        if power is not None and power.number == -1 and "a" + name in _INVERSES:
            name = _INVERSES["a" + name]
            power = None
        function = _FUNCTIONS[name]
        if base is None and name == "lg":
            base = _Value(sympy.Integer(10), "integer")
        degrees = self.tokens[self.at - 1] in ("\\circ", "degrees")
        angle = argument.number * sympy.pi / 180 if degrees else argument.number
        result = (
            function(angle)
            if base is None or base.number is None
            else _logarithm(angle, base.number)
        )
        common = (
            name == "log"
            and base is None
            and argument.rational
            and sympy.log(argument.number, 10).is_Rational
        )
        evaluates = common or not result.has(function) or bool(result.is_Rational)
        value = self._operation(name, _bounded(result), evaluates)
        return value if power is None else self._raised(value, power)

    def _argument(self) -> _Value:
        """Reads what a function without brackets is taken of: factors without a sign between
        them.
        """
        factors = []
        while (
            self.next not in (*_SIGNS, *_TIMES) and self.next.removeprefix("\\") not in _FUNCTIONS
        ):
            before = self.at
            factor = self.power()
            if self.at == before:
                break
            factors.append(("*", factor))
            if self.take("/"):
                factors.append(("/", self.power()))
        return self._multiplied(_numbers(*factors))

    def _measure(self, opening: str) -> _Value:
        """Reads what stands in bars or in the brackets of floor and ceiling."""
        self.at += 1
        closing, name = _MEASURES[opening]
        if closing not in self.tokens[self.at :]:
            return _UNIT
        value = self.elements(closing)
        return self._operation(name, None, evaluates=True) if value.form else _UNIT


def _space_unless_grouping(spacing: re.Match[str]) -> str:
    r"""Replaces spacing by a space, and `\!` by nothing, unless it may group the digits of a
    number.
    """
    return spacing[0] if spacing[0] in ("\\,", "\\ ", "~") else ("" if spacing[0] == "\\!" else " ")


def _numbers(*factors: tuple[str, _Value]) -> list[tuple[str, _Value]]:
    """Returns the factors that are no units."""
    return [factor for factor in factors if factor[1].form]


def _number(digits: str) -> _Value:
    """Returns the value of a number as it is written, unknown where it is very long."""
    digits = _SPACES_IN_NUMBERS.sub("", digits).replace(",", "")
    form = "integer" if digits.isdigit() else "decimal"
    if len(digits) >= _BITS // 4:
        return _Value(None, form)
    number = sympy.Rational(Fraction(digits))
    return _Value(number, form, int(number) if form == "integer" else 1)


def _negated(value: _Value) -> _Value:
    return value._replace(number=None if value.number is None else -value.number)


def _scaled(value: _Value) -> _Value:
    """Returns the value of a percentage."""
    return _Value(
        None if value.number is None else value.number / 100, "decimal" if value.form else ""
    )


def _sum(one: _Value, other: _Value) -> sympy.Expr | None:
    return None if one.number is None or other.number is None else one.number + other.number


def _bounded(number: sympy.Expr) -> sympy.Expr | None:
    """Returns a number if it is small enough to compute with."""
    if number.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return None
    parts = number.atoms(sympy.Rational)
    return number if all(max(abs(part.p), part.q).bit_length() <= _BITS for part in parts) else None


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr | None:
    """Returns a power that sympy need not work hard for."""
    if base == 0:
        return None
    if base == sympy.E:
        return _bounded(sympy.exp(exponent)) if _is_small(exponent) else None
    if isinstance(exponent, sympy.Rational) and max(abs(exponent.p), exponent.q) > _EXPONENT:
        return None
    if (
        isinstance(base, sympy.Rational)
        and isinstance(exponent, sympy.Rational)
        and not _is_short(base)
    ):
        exact = _exact_root(base, exponent.q)
        return None if exact is None else _bounded(exact**exponent.p)
    return _bounded(sympy.Pow(base, exponent))


def _is_small(exponent: sympy.Expr) -> bool:
    r"""Checks that e to this power is no large integer power, such as e^{10^9 \ln 2}."""
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(exponent))]
    coefficients = [coefficient for coefficient, rest in terms if rest.has(sympy.log)]
    return all(abs(coefficient) <= _EXPONENT for coefficient in coefficients)


def _is_short(number: sympy.Rational) -> bool:
    """Checks whether a rational number is short enough for sympy to factor it at once."""
    return max(abs(number.p), number.q).bit_length() <= 40


def _exact_root(base: sympy.Rational, degree: int) -> sympy.Expr | None:
    """Returns a root that is rational, or None."""
    numerator, exact = sympy.integer_nthroot(abs(base.p), degree)
    denominator, exact_too = sympy.integer_nthroot(base.q, degree)
    return (
        sympy.Integer(numerator) / denominator if exact and exact_too and base.is_positive else None
    )


def _product_of(factors: list[tuple[str, _Value]]) -> sympy.Expr | None:
    """Returns the product of all factors, or None where one is not known."""
    product = sympy.Integer(1)
    for operation, value in factors:
        if value.number is None or (operation == "/" and value.number == 0):
            return None
        product = product / value.number if operation == "/" else product * value.number
        if _bounded(product) is None:
            return None
    return product


def _in_lowest_terms(numerator: _Value, denominator: _Value) -> bool:
    over = numerator.number
    under = denominator.number
    if over is None or under is None:
        return over is not under  # two that are too long to tell
    if not (over.is_Integer and under.is_Integer):
        return False
    if over < 0 and under < 0:
        return False
    return abs(under) > 1 and math.gcd(int(over), int(under)) == 1


def _is_proper(fraction: _Value) -> bool:
    """Checks whether a fraction can stand behind the whole part of a mixed number."""
    return fraction.number is None or 0 < fraction.number < 1


def _is_mantissa(value: _Value) -> bool:
    return (
        value.form in ("integer", "decimal")
        and value.number is not None
        and 1 <= abs(value.number) < 10
    )


def _reduced(factors: list[tuple[str, _Value]]) -> bool:
    r"""Checks whether the two rational factors are a quotient in lowest terms, as in 2\pi/3."""
    (_, over), (operation, under) = [factor for factor in factors if factor[1].rational]
    return (
        operation == "/" and over.form == under.form == "integer" and _in_lowest_terms(over, under)
    )


def _coefficient(values: list[_Value]) -> int:
    """Returns the integers that a product is written with, multiplied."""
    return math.prod(value.coefficient for value in values if value.form != "sum")


def _cancels(factors: list[tuple[str, _Value]]) -> bool:
    r"""Checks whether the integers of a quotient have a common divisor, as in \frac{6\sqrt{2}}{2}.

    Returns False for a quotient with a sum, a decimal or a fraction.
    """
    if factors[-1][0] != "/" or any(
        value.form in ("sum", "decimal", "fraction") for _, value in factors
    ):
        return False
    over = _coefficient([value for operation, value in factors if operation != "/"])
    under = _coefficient([value for operation, value in factors if operation == "/"])
    return math.gcd(over, under) > 1


def _multiplies_fractions(factors: list[tuple[str, _Value]]) -> bool:
    r"""Checks whether a product has two fractions, or a fraction and an integer that reduces it.

    An example is 2 \cdot \frac{\pi}{6}.
    """
    values = [value for _, value in factors]
    if any(
        operation == "/" or value.number is None or value.form == "sum"
        for operation, value in factors
    ):
        return False
    if not any(value.rational for value in values):
        return False
    fractions = [value.number for value in values if value.form in ("quotient", "fraction")]
    under = [_denominator(number) for number in fractions if number is not None]
    over = math.prod(
        int(value.number)
        for value in values
        if value.number is not None and value.number.is_Integer
    )
    return sum(each > 1 for each in under) > 1 or any(math.gcd(over, each) > 1 for each in under)


def _logarithm(number: sympy.Expr, base: sympy.Expr) -> sympy.Expr:
    """Returns a logarithm, as a rational number where it is one: that of 2 to the base 4 is 1/2."""
    result = sympy.log(number, base)
    if not (isinstance(number, sympy.Rational) and isinstance(base, sympy.Rational)):
        return result
    if number <= 0 or base <= 0 or base == 1:
        return result
    ratio = Fraction(math.log(number) / math.log(base)).limit_denominator(_EXPONENT)
    if max(abs(ratio.numerator), ratio.denominator) > _EXPONENT or not (
        _is_short(number) and _is_short(base)
    ):
        return result
    exact = number**ratio.denominator == base**ratio.numerator
    return sympy.Rational(ratio) if exact else result


def _simpler(values: list[_Value], product: sympy.Expr | None) -> bool:
    r"""Checks whether a product of irrational numbers evaluates to a simpler one.

    That is a rational number, or one with fewer factors and no larger a denominator.
    """
    if product is None:
        return False
    if product.is_Rational:
        return True
    numbers = [value.number for value in values if value.number is not None]
    before = max(_denominator(number) for number in numbers)
    parts = sum(
        len(sympy.Mul.make_args(number.as_coeff_Mul()[1]))
        for number in numbers
        if not number.is_Rational
    )
    fewer = len(sympy.Mul.make_args(product.as_coeff_Mul()[1])) < parts
    return fewer and _denominator(product) <= before


def _denominator(number: sympy.Expr) -> int:
    """Returns the denominator of a number's rational factor."""
    coefficient = number.as_coeff_Mul()[0]
    return coefficient.q if isinstance(coefficient, sympy.Rational) else 1
