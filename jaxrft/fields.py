"""Rules of every field of a config and of a command's options, which are checked at once.

| field | rule |
|---|---|
| a whole number | an int32, as counters on devices are; a `Seed` has the 32 bits that JAX's keys take |
| another number | finite, and a normal number or 0 as float32, as all arithmetic on devices is |
| a text | Unicode without NUL |
| a `FilePath` | `expand_path`, of an `os.PathLike` too |

A number of numpy, an enum and the like become Python's own numbers and texts.
"""  # noqa: E501

import argparse
import dataclasses
import math
import numbers
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jaxrft.errors import InputError

_PATH = "path"
_SEED = "seed"
FilePath = Annotated[str, _PATH]  # of a file or a folder
Seed = Annotated[int, _SEED]

INT32 = 2**31 - 1
UINT32 = 2**32 - 1
FLOAT32 = 3.4028234e38, 1.1754944e-38  # the largest and the smallest normal number
NAME_MAX = 255  # bytes of a name, of all file systems in use
# bytes of a path, on Linux; the rest is for the names of the files in a folder
PATH_MAX = 4096 - 256
SHOWN = 200  # characters of a value in a message

_SCHEME = re.compile("[a-z]{2,}:")
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\}?)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class _Expanded(str):
    """A path that `expand_path` has returned: what it leads through may have a $ in its name."""


def expand_path(text: str, name: str = "the path") -> str:
    """Returns the path that `text` stands for, with home folders and environment variables in their
    places.

    As in a shell, a leading ~ or ~USER is a home folder, and $NAME and ${NAME} are environment
    variables, which have to be set. $$ is a dollar sign, and ./~ a folder that is called ~. A text
    that begins with a word and a colon, such as hub: or gs://, is no path and stays as it is; so
    does what this function has returned. Raises InputError, with the `name` of the field, for what
    cannot be expanded, is empty, or is longer than file systems allow.

    >>> os.environ["RUNS"] = "/data/runs"
    >>> expand_path("$RUNS/a"), expand_path("hub:openai/gsm8k")
    ('/data/runs/a', 'hub:openai/gsm8k')
    """
    check_text(text, name)
    if not text:
        raise InputError(f"{name} is '': give the path of a file or folder")
    if isinstance(text, _Expanded) or _SCHEME.match(text):
        return text
    home, slash, rest = text.partition("/") if text.startswith("~") else ("", "", text)
    if home and os.path.expanduser(home).startswith("~"):
        raise InputError(
            f"{name} is {shown(text)}: {home} is no user's home folder; write ./{home} for a "
            "folder's name"
        )

    def value(match: re.Match[str]) -> str:
        variable = match[2] or match[3]
        if match[1]:
            return "$"
        if not _NAME.fullmatch(variable or "") or (
            match[3] is not None and not match[0].endswith("}")
        ):
            raise InputError(
                f"{name} is {shown(text)}: write variables as $NAME or ${{NAME}}, and $$ for a "
                "dollar sign"
            )
        if not os.environ.get(variable):
            raise InputError(
                f"{name} is {shown(text)}: set the environment variable "
                f"{variable}, or write $$ for a $"
            )
        return os.environ[variable]

    path = os.path.expanduser(home) + slash + _VARIABLE.sub(value, rest)
    check_text(path, name)
    if max(len(os.fsencode(part)) for part in path.split("/")) > NAME_MAX:
        raise InputError(
            f"{name} is {shown(path)}: a name in a path has at most {NAME_MAX} bytes, shorten it"
        )
    if len(os.fsencode(os.path.abspath(path))) > PATH_MAX:
        raise InputError(
            f"{name} is {shown(path)}: a path has at most {PATH_MAX} bytes, shorten it"
        )
    return _Expanded(path)


def path_argument(text: str) -> Path:
    """Returns the path that an argument of argparse stands for: the `type` of all that are
    paths.
    """
    try:
        return Path(expand_path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_text(text: str, name: str) -> None:
    """Raises InputError for a text that no file, tokenizer or file system takes."""
    if "\0" in text:
        raise InputError(f"{name} is {shown(text)}: take the NUL character out")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(
            f"{name} is {shown(text)}: it is not Unicode text, take the lone surrogate out"
        )


def check_number(number: float, name: str) -> None:
    """Raises InputError for an int that is none of 32 bits, or a float that is not finite or none
    as float32.
    """
    if isinstance(number, int):
        if abs(number) > INT32:
            raise InputError(f"{name} is {shown(number)}: it must be at most {INT32:,} in size")
        return
    most, least = FLOAT32
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}: it must be a finite number")
    if abs(number) > most or 0 < abs(number) < least:
        raise InputError(
            f"{name} is {number}: it must be 0, or from {least:.2g} to {most:.2g} "
            "in size, as float32 is"
        )


def shown(value: Any) -> str:
    """Returns `repr(value)`, cut when it is long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = f"an int of {value.bit_length()} bits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _spelled(example: tuple) -> str:
    """Spells a tuple out, or only the type of its first element where it is long."""
    text = shown(example)
    return text if len(text) <= SHOWN else f"({type(example[0]).__name__}(...),)"


class Checked:
    """The root of a config, or of a command's options: a frozen dataclass, and dataclasses in its
    fields.

    Its paths are expanded when it is made, and InputError is raised for the first value that breaks
    a rule.
    """

    def __post_init__(self) -> None:
        """Expands the paths and checks all values."""
        for name, value in _normalized_fields("", self).items():
            object.__setattr__(self, name, value)


def _normalized_fields(prefix: str, options: Any) -> dict[str, object]:
    """Returns the normalized values of the fields that are not at their defaults."""
    return {
        field.name: _normalized(
            f"{prefix}{field.name}", getattr(options, field.name), set(leaf_types(field.type))
        )
        for field in dataclasses.fields(options)
        if getattr(options, field.name) is not field.default
    }


def _normalized(name: str, value: object, kinds: set[object]) -> object:
    """Returns the normalized value of a field; `kinds` are the types of its leaves, and the
    marks on them.
    """
    if isinstance(value, Checked):
        return value  # a root, which is normalized already
    classes = tuple(kind for kind in kinds if isinstance(kind, type))
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and isinstance(value, classes)
    ):
        return dataclasses.replace(value, **_normalized_fields(f"{name}.", value))
    if isinstance(value, tuple):
        return tuple(_normalized(f"{name}[{i}]", item, kinds) for i, item in enumerate(value))
    value = _plain(value, kinds)
    if isinstance(value, str) and _PATH in kinds:
        return expand_path(value, name)
    if isinstance(value, str):
        check_text(value, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if _SEED in kinds and not 0 <= value <= UINT32:  # of more bits JAX would silently drop some
            raise InputError(
                f"{name} is {shown(value)}: it must be 0 or more, and at most {UINT32:,}"
            )
        if _SEED not in kinds:
            check_number(_as_float(value) if float in kinds else value, name)
    return value


def _plain(value: object, kinds: set[object]) -> object:
    """Returns the number or text of Python that `value` stands for, where a field of `kinds` takes
    one.
    """
    if isinstance(value, os.PathLike) and _PATH in kinds:
        return os.fspath(value)
    if isinstance(value, str) and not isinstance(value, _Expanded):
        return str.__str__(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral) and kinds & {int, float}:
        return int(value)
    if isinstance(value, numbers.Real) and float in kinds:
        return _as_float(value)
    return value


def _as_float(number: float | numbers.Real) -> float:
    """Returns a number as a float, infinite where an int is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def leaf_types(kind: object) -> Iterator[object]:
    """Yields the plain types, and the marks of Annotated, in a type."""
    if not get_args(kind) or get_origin(kind) is Literal:
        yield kind
        return
    for argument in get_args(kind):
        yield from leaf_types(argument)


def is_path(kind: object) -> bool:
    """Checks whether the values of a field of the type `kind` are paths."""
    return _PATH in set(leaf_types(kind))


def bare(kind: object) -> Any:
    """Returns a type without the marks of FilePath and Seed, which types of fields are compared
    without.
    """
    if get_origin(kind) is Annotated:
        return bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        first, *others = map(bare, get_args(kind))
        for other in others:
            first = first | other
        return first
    if get_origin(kind) is tuple:
        return tuple[tuple(map(bare, get_args(kind)))]
    return kind


def type_mismatches(name: str, value: object, kind: Any) -> Iterator[tuple[str, object, str]]:
    """Yields (dotted field, value, what it must be) for all in `value`, called `name`, that is not
    of the type `kind`.

    `kind` is what configs are annotated with: plain types, dataclasses, tuples and unions of these,
    and Literal.
    """
    kind = bare(kind)
    inner = get_args(kind)
    origin = get_origin(kind)
    expected = f"of type {kind.__name__ if isinstance(kind, type) else re.sub(r'jaxrft[.][a-z]+[.]', '', str(kind))}"  # noqa: E501
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind):
        for field in dataclasses.fields(kind):
            yield from type_mismatches(
                f"{name}.{field.name}".lstrip("."), getattr(value, field.name), field.type
            )
    elif origin is UnionType:
        nested = isinstance(value, tuple) or dataclasses.is_dataclass(value)
        matching = [
            choice for choice in inner if nested and isinstance(value, get_origin(choice) or choice)
        ]
        if matching:  # a mistake is inside of it
            yield from type_mismatches(name, value, matching[0])
        elif all(any(type_mismatches(name, value, choice)) for choice in inner):
            yield name, value, expected
    elif origin is Literal:
        if value not in inner:
            yield name, value, f"one of {', '.join(inner)}"
    elif (
        origin is tuple
        and isinstance(value, tuple)
        and (inner[-1] is ... or len(inner) == len(value))
    ):
        for i, item in enumerate(value):
            yield from type_mismatches(
                f"{name}[{i}]", item, inner[0] if inner[-1] is ... else inner[i]
            )
    elif origin is tuple:
        example = tuple(value) if isinstance(value, list | set) else (value,)
        fits = not isinstance(value, tuple) and not any(type_mismatches(name, example, kind))
        yield name, value, f"{expected}, such as {_spelled(example)}" if fits else expected
    elif not isinstance(value, int | float if kind is float else kind) or isinstance(
        value, bool
    ) != (kind is bool):
        yield name, value, expected  # Python takes a bool for an int
