"""Reads expressions of whole numbers and + - * /, and computes them as exact fractions."""

import re
from fractions import Fraction

_TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+(?![0-9.]))|(?P<mark>[-+*/()×÷−–·]))\s*")
_SPELLINGS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}
_DIGITS = 30  # of a number


def solves(expression: str, numbers: list[int], target: int) -> bool:
    """Decides whether an expression has the value `target` and each of the `numbers` exactly once.

    >>> solves("(6 - 2) * 6", [2, 6, 6], 24), solves("24", [2, 6, 6], 24), solves("6/(1-3/4)", [1, 3, 4, 6], 24)
    (True, False, True)
    """  # noqa: E501
    tokens = _tokens(expression, most=4 * len(numbers) + 100)
    if tokens is None:
        return False
    used = [int(token) for token in tokens if token.isdigit()]
    return sorted(used) == sorted(numbers) and _value(tokens) == target


def _tokens(expression: str, *, most: int) -> list[str] | None:
    """Splits an expression; None where it has anything else, or more than `most` tokens."""
    tokens = []
    at = 0
    while at < len(expression):
        token = _TOKEN.match(expression, at)
        if token is None or len(tokens) == most or len(token[0]) > _DIGITS + 100:
            return None
        number = token["number"]
        if number is not None and len(number) > _DIGITS:
            return None
        tokens.append(number or _SPELLINGS.get(token["mark"], token["mark"]))
        at = token.end()
    return tokens


def _value(tokens: list[str]) -> Fraction | None:
    """Computes an expression by two stacks; None where it is none, or divides by 0."""
    values: list[Fraction] = []
    operators: list[str] = []
    after_value = False
    try:
        for token in tokens:
            if token.isdigit() or token == "(":
                if after_value:
                    return None
                if token == "(":
                    operators.append(token)
                else:
                    values.append(Fraction(int(token)))
                    after_value = True
            elif token == ")":
                if not after_value:
                    return None
                while operators[-1] != "(":
                    _apply(operators.pop(), values)
                operators.pop()
            elif not after_value:
                if token != "-":
                    return None
                operators.append("negative")
            else:
                while operators and _PRECEDENCE.get(operators[-1], 0) >= _PRECEDENCE[token]:
                    _apply(operators.pop(), values)
                operators.append(token)
                after_value = False
        while operators:
            _apply(operators.pop(), values)
    except (IndexError, KeyError, ZeroDivisionError):
        return None
    return values[0] if after_value and len(values) == 1 else None


def _apply(operator: str, values: list[Fraction]) -> None:
    """Replaces the last values by the result of an operator; raises KeyError for a bracket."""
    right = values.pop()
    if operator == "negative":
        values.append(-right)
        return
    left = values.pop()
    if operator == "+":
        values.append(left + right)
    elif operator == "-":
        values.append(left - right)
    elif operator == "*":
        values.append(left * right)
    elif operator == "/":
        values.append(left / right)
    else:
        raise KeyError(operator)
