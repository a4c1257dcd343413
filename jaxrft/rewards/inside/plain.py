"""Writes plain Python values as JSON and reads them back: builtin types, and what refers to them.

A value is a list of nodes, the first of which is the value itself. A node is a scalar, or a tag
with its parts; parts that are values are numbers of nodes. Lists of lists of any depth, shared
parts and cycles are therefore flat. What is read has builtin types alone, so that no method of
another process' class is ever called.
"""

from __future__ import annotations

import math
from collections import deque

TYPE_CHECKING = False  # what is imported at the start is paid for by every grading
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_NODES = 1_000_000
_SEQUENCES = {"list": list, "set": set, "deque": deque, "tuple": tuple, "frozenset": frozenset}
_FROZEN = ("tuple", "frozenset")
MAX_DEPTH = 200  # of tuples in tuples, for their hash is computed by recursion in C
MUTABLE = ("list", "set", "deque", "dict", "object", "bytearray")
_SAFE_INT = 1 << 53  # larger ones are written in hexadecimal digits, which have no limit


class Unplain(ValueError):
    """Reports a value that cannot be written, or nodes that are none."""


def encode(
    value: object,
    classes: Sequence[str] = (),
    refer: Callable[[object], int] | None = None,
) -> list[object]:
    """Returns the nodes of a value.

    Objects whose class has a name of `classes` are written by their attributes. Any other object
    is written as the number that `refer` gives it; without `refer` it raises Unplain.
    """
    nodes: list[object] = []
    numbers: dict[int, int] = {}  # id of a container -> number of its node
    values: list[object] = []

    def number_of(part: object) -> int:
        known = numbers.get(id(part))
        if known is not None:
            return known
        numbers[id(part)] = len(values)
        values.append(part)
        if len(values) > MAX_NODES:
            raise Unplain(f"a value has more than {MAX_NODES} parts")
        return len(values) - 1

    number_of(value)
    while len(nodes) < len(values):
        nodes.append(_node(values[len(nodes)], number_of, classes, refer))
    return nodes


def _node(
    value: object,
    number_of: Callable[[object], int],
    classes: Sequence[str],
    refer: Callable[[object], int] | None,
) -> object:
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()  # type: ignore[attr-defined]  # a scalar
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if abs(value) < _SAFE_INT else ["int", hex(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else ["float", str(float(value))]
    if isinstance(value, dict):
        return ["dict", [number_of(part) for pair in list(value.items()) for part in pair]]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            parts = list(value)  # pyright: ignore[reportArgumentType]
            return [tag, [number_of(part) for part in parts]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", str(value.real), str(value.imag)]
    if isinstance(value, range):
        return ["range", hex(value.start), hex(value.stop), hex(value.step)]
    if type(value).__module__ in ("fractions", "decimal"):
        return [type(value).__name__, str(value)]
    if type(value).__name__ in classes and hasattr(value, "__dict__"):
        attributes = [number_of(part) for pair in vars(value).items() for part in pair]
        return ["object", type(value).__name__, attributes]
    if refer is None:
        raise Unplain(f"a value of type {type(value).__name__} is no plain value")
    return ["reference", refer(value)]


def decode(
    nodes: object,
    classes: Mapping[str, type] | None = None,
    resolve: Callable[[int], object] | None = None,
) -> object:
    """Returns the value of nodes; raises Unplain for anything that `encode` does not write."""
    if not isinstance(nodes, list) or not 0 < len(nodes) <= MAX_NODES:
        raise Unplain("there are no nodes")
    values: list[object] = [None] * len(nodes)
    try:
        frozen = []
        for number, node in enumerate(nodes):
            if isinstance(node, list) and node[0] in _FROZEN:
                frozen.append(number)
            else:
                values[number] = _empty(node, classes or {}, resolve)
        _freeze(frozen, nodes, values)
        for number, node in enumerate(nodes):
            if isinstance(node, list):
                _fill(values, number, node)
    except (TypeError, ValueError, IndexError, KeyError, ArithmeticError) as error:
        raise Unplain(f"nodes cannot be read: {type(error).__name__}") from None
    return values[0]


def _empty(
    node: object, classes: Mapping[str, type], resolve: Callable[[int], object] | None
) -> object:
    """Returns a scalar, or a container without its parts."""
    match node:
        case None | bool() | str() | int() | float():
            return node
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["float", str(digits)]:
            return float(digits)
        case ["dict", list()]:
            return {}
        case [str(tag), list()] if tag in _SEQUENCES:
            return _SEQUENCES[tag]()
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["bytearray", str(digits)]:
            return bytearray.fromhex(digits)
        case ["complex", str(real), str(imaginary)]:
            return complex(float(real), float(imaginary))
        case ["range", str(start), str(stop), str(step)]:
            return range(int(start, 16), int(stop, 16), int(step, 16))
        case ["Fraction", str(digits)]:
            from fractions import Fraction

            numerator, _, denominator = digits[:1000].partition("/")
            return Fraction(int(numerator), int(denominator or "1"))
        case ["Decimal", str(digits)]:
            from decimal import Decimal

            return Decimal(digits[:1000])
        case ["object", str(name), list()]:
            return object.__new__(classes[name])
        case ["reference", int(number)] if resolve is not None:
            return resolve(number)
    raise Unplain("a node is unknown")


def _freeze(frozen: list[int], nodes: list, values: list[object]) -> None:
    """Builds tuples and frozen sets, those first that others contain."""
    waiting = set(frozen)
    depths: dict[int, int] = {}
    open_ones: set[int] = set()
    for first in frozen:
        stack = [first]
        while stack:
            number = stack[-1]
            if number not in waiting:
                stack.pop()
                continue
            parts = nodes[number][1]
            missing = [part for part in parts if part in waiting]
            if missing and number in open_ones:
                raise Unplain("a tuple contains itself")
            if missing:
                open_ones.add(number)
                stack.extend(missing)
                continue
            depths[number] = 1 + max((depths.get(part, 0) for part in parts), default=0)
            if depths[number] > MAX_DEPTH:
                raise Unplain(f"tuples are nested more than {MAX_DEPTH} deep")
            kind = _SEQUENCES[nodes[number][0]]
            values[number] = kind(values[part] for part in parts)
            waiting.discard(number)
            stack.pop()


def _fill(values: list[object], number: int, node: list) -> None:
    """Puts the parts into a container."""
    value = values[number]
    if node[0] == "dict" and isinstance(value, dict):
        value.update(_pairs(values, node[1]))
    elif node[0] == "object":
        vars(value).update({str(name): part for name, part in _pairs(values, node[2])})
    elif isinstance(value, list | deque) and node[0] in ("list", "deque"):
        value.extend(values[part] for part in node[1])
    elif isinstance(value, set):
        value.update(values[part] for part in node[1])


def _pairs(values: list[object], parts: list[int]) -> list[tuple[object, object]]:
    return [(values[k], values[v]) for k, v in zip(parts[::2], parts[1::2], strict=True)]
