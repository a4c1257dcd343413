"""Reads the tests of a programming task, in the columns of the data sets that there are.

| where | what | tests |
|---|---|---|
| GURU, verl's prime_code, APPS, TACO | `{"inputs", "outputs"}`, with `fn_name` or without | calls or programs |
| GURU | `{"functional": code}`, `extra_info["prefix"]` | asserts |
| DeepCoder, PrimeIntellect, LiveCodeBench, Codeforces | `[{"input", "output", "type"}, ...]` | calls or programs |
| CodeContests | `{"public_tests": {"input", "output"}, "private_tests", "generated_tests"}` | programs |
| HumanEval, LeetCode | `{"test": code, "entry_point"}` | asserts |
| MBPP | `test_list`, `test_setup_code`, or a list of texts alone | asserts |

Each may be a column of that name, an object in the column `answer`, or the JSON text of one.
"""  # noqa: E501

import ast
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PREFIX_LIMIT = 1 << 20
RELATIVE = 1e-6  # tolerance of numbers with a fraction, relative, below 1 absolute
_PARTS = ("input_output", "official_tests", "tests", "test_cases", "ground_truth")
_CONTESTS = ("public_tests", "private_tests", "generated_tests")


class Programs(NamedTuple):
    """Inputs of a program and what it should print."""

    inputs: list[str]
    outputs: list[str]


class Calls(NamedTuple):
    """Arguments of a function and what it should return."""

    function: str
    arguments: list[list[object]]
    outputs: list[object]


class Asserts(NamedTuple):
    """Statements that use what the program defines."""

    statements: str
    prefix: str  # what is defined for the program and for the statements


Tests = Programs | Calls | Asserts


def read(answer: object, row: Mapping[str, object]) -> Tests | None:
    """Returns the tests in a task's `answer` or, if it has none, in its other columns."""
    prefix = _prefix(row)
    for value in (answer, row):
        tests = _read(value, prefix)
        if tests is not None:
            return tests
    return None


def _read(value: object, prefix: str) -> Tests | None:
    if isinstance(value, str):
        parsed = _parsed(value)
        if parsed is None:
            return _asserts(value, prefix)
        value = parsed
    if isinstance(value, Mapping):
        return _read_object(value, prefix)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return _read_list(value, prefix)
    return None


def _parsed(text: str) -> object:
    """Returns the object or list that a JSON text holds, or None."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_object(value: Mapping, prefix: str) -> Tests | None:
    inputs = value.get("inputs", value.get("input"))
    outputs = value.get("outputs", value.get("output"))
    if isinstance(inputs, Sequence) and isinstance(outputs, Sequence):
        if not isinstance(inputs, str):
            return _pairs(inputs, outputs, value.get("fn_name"))
    if isinstance(value.get("functional"), str):
        return _asserts(value["functional"], prefix)
    if isinstance(value.get("test"), str) and isinstance(value.get("entry_point"), str):
        statements = value["test"]
        if "check(" in statements:
            statements = f"{statements}\n\ncheck({value['entry_point'].strip()})"
        return _asserts(statements, prefix)
    if isinstance(value.get("test_list"), Sequence):
        setup = value.get("test_setup_code") or ""
        tests = [*value["test_list"], *(value.get("challenge_test_list") or [])]
        return _asserts("\n".join([str(setup), *map(str, tests)]), prefix)
    parts = [value[name] for name in _CONTESTS if isinstance(value.get(name), Mapping)]
    if parts:
        inputs = [text for part in parts for text in part.get("input", [])]
        outputs = [text for part in parts for text in part.get("output", [])]
        return _pairs(inputs, outputs, None)
    for name in _PARTS:
        tests = _read(value.get(name), prefix)
        if tests is not None:
            return tests
    return None


def _read_list(values: Sequence, prefix: str) -> Tests | None:
    if all(isinstance(value, str) for value in values):
        return _asserts("\n".join(values), prefix)
    if not all(isinstance(value, Mapping) and "input" in value for value in values):
        return None
    first = values[0]
    metadata = first.get("metadata")
    function = first.get("fn_name") or (
        metadata.get("func_name") if isinstance(metadata, Mapping) else None
    )
    inputs = [value["input"] for value in values]
    outputs = [value.get("output") for value in values]
    return _pairs(inputs, outputs, function)


def _pairs(inputs: Sequence, outputs: Sequence, function: object) -> Tests | None:
    if len(inputs) != len(outputs) or not inputs:
        return None
    if isinstance(function, str) and function:
        name = function.removeprefix("Solution().")
        arguments = [_arguments(value) for value in inputs]
        return Calls(name, arguments, [_literal(value) for value in outputs])
    return Programs([_lines(value) for value in inputs], [_lines(value) for value in outputs])


def _lines(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "\n".join(map(str, value))
    return "" if value is None else str(value)


def _arguments(value: object) -> list[object]:
    """Returns a call's arguments: a list, or a text with one literal a line."""
    if isinstance(value, str):
        return [_literal(line) for line in value.split("\n") if line.strip()]
    if isinstance(value, Sequence):
        return list(value)
    return [value]


def _literal(value: object) -> object:
    """Returns what a text spells in JSON or in Python, or the text itself."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return value


def _asserts(statements: str, prefix: str) -> Asserts | None:
    """Returns statements as tests if they are Python, can fail, and import what a sandbox has."""
    if "assert" not in statements:
        return None
    try:
        tree = ast.parse(statements)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = [*ast.walk(tree)]
    can_fail = any(isinstance(node, ast.Assert) for node in nodes)
    can_run = all(_imported(node) <= sys.stdlib_module_names for node in nodes)
    return Asserts(statements, prefix) if can_fail and can_run else None


def _imported(node: ast.AST) -> set[str]:
    """Returns the packages that a statement imports."""
    match node:
        case ast.Import(names):
            return {alias.name.partition(".")[0] for alias in names}
        case ast.ImportFrom(str(module)):
            return {module.partition(".")[0]}
    return set()


def _prefix(row: Mapping[str, object]) -> str:
    extra = row.get("extra_info")
    if isinstance(extra, str):
        extra = _parsed(extra)
    prefix = extra.get("prefix") if isinstance(extra, Mapping) else None
    return prefix if isinstance(prefix, str) and len(prefix) < PREFIX_LIMIT else ""


def same_output(output: str, expected: str) -> bool:
    """Compares what a program printed: its words, line by line, without empty lines.

    Where a number with a fraction is expected, another one may differ by RELATIVE. Yes and no may
    be in any case, as in GURU's comparison and in many tasks of Codeforces.
    """
    lines = _words(output)
    expected_lines = _words(expected)
    if lines == expected_lines:
        return True
    if [len(words) for words in lines] != [len(words) for words in expected_lines]:
        return False
    pairs = zip(lines, expected_lines, strict=True)
    return all(
        word == other or _same_number(word, other) or _same_choice(word, other)
        for words, others in pairs
        for word, other in zip(words, others, strict=True)
    )


def _words(text: str) -> list[list[str]]:
    return [words for line in text.split("\n") if (words := line.split())]


def _same_choice(word: str, expected: str) -> bool:
    return expected.lower() in ("yes", "no") and word.lower() == expected.lower()


def _same_number(word: str, expected: str) -> bool:
    if not any(mark in expected for mark in ".eE") or max(len(word), len(expected)) > 400:
        return False
    try:
        return _close(float(word), float(expected))
    except ValueError:
        return False


def _close(number: float, expected: float) -> bool:
    return math.isclose(number, expected, rel_tol=RELATIVE, abs_tol=RELATIVE)


def same_result(result: object, expected: object) -> bool:
    """Compares what a function returned, a plain value, with what it should have.

    Lists and tuples are the same, and the keys of objects are texts, since JSON has no others. Data
    sets that put each result into a list of its own are understood.
    """
    if _same(result, expected):
        return True
    return isinstance(expected, list) and len(expected) == 1 and _same(result, expected[0])


def _same(result: object, expected: object) -> bool:
    """Compares without recursion, since a result may be nested deeply or contain itself."""
    pairs = [(result, expected)]
    while pairs:
        left, right = pairs.pop()
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            if len(left) != len(right):
                return False
            pairs += zip(left, right, strict=True)
        elif isinstance(left, dict) and isinstance(right, dict):
            keyed = {str(key): value for key, value in left.items()}
            wanted = {str(key): value for key, value in right.items()}
            if keyed.keys() != wanted.keys() or len(keyed) != len(left):
                return False
            pairs += [(keyed[key], wanted[key]) for key in wanted]
        elif isinstance(left, bool) or isinstance(right, bool):
            if left is not right:
                return False
        elif isinstance(left, int | float) and isinstance(right, int | float):
            if left != right and not _close_numbers(left, right):
                return False
        elif type(left) is not type(right) or left != right:
            return False
    return True


def _close_numbers(left: float, right: float) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return False
    try:
        return _close(left, right)
    except OverflowError:
        return False
