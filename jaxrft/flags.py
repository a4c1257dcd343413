"""Parses the flags of a command, which are the fields of a dataclass, and explains them.

The parser is tyro. Its help page is one flat list of all fields, and breaks lines where the source
does, so the page is made here: by groups, and wrapped at the width of the terminal.
"""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from types import UnionType
from typing import Annotated, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import tyro

from jaxrft.fields import FilePath
from jaxrft.host import terminal

T = TypeVar("T")
Groups = Mapping[str, Sequence[str]]  # title -> top-level fields

WIDEST = 120  # columns: longer lines are hard to read
COMMAND = "command"  # the title of flags that belong to the command, not to a config
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_WORDS = {str: "TEXT", int: "INT", float: "FLOAT", type(None): "None"}


class Flag(NamedTuple):
    """A flag of a command, or one of its arguments."""

    name: str  # dotted, of the field
    spelling: str  # with its dashes and what it takes
    default: object  # tyro.MISSING if the flag is required
    explanation: str  # one paragraph
    positional: bool = False


def parse(
    kind: type[T],
    arguments: list[str],
    prog: str,
    *,
    default: T | None = None,
    description: str | None = None,
    groups: Groups | None = None,
) -> T:
    """Returns the `kind` that the arguments of a command make of `default`.

    With -h or --help among them it prints the page instead, and raises SystemExit(0). `groups` are
    those of the fields of a config, which may be a field of the options.
    """
    if {"-h", "--help"} & set(arguments):
        terminal.print_page(page(kind, default, prog, description, groups or {}))
        raise SystemExit(0)
    read = partial(
        tyro.cli,
        kind,
        args=arguments,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),  # `tasks` is one set or several, as the default says
    )
    return read() if default is None else read(default=default)


def page(kind: type, default: object, prog: str, description: str | None, groups: Groups) -> str:
    """Returns the help page of a command, at most as wide as the terminal."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    flags = list(flags_of(kind, default))
    arguments = [flag.spelling for flag in flags if flag.positional]
    lines = [f"usage: {' '.join([prog, *arguments])} [flags]", ""]
    text = " ".join((description or inspect.getdoc(kind) or "").split())
    lines += [*textwrap.wrap(text, width), ""]
    for title, members in _grouped(flags, groups).items():
        lines.append(f"{title}:")
        for flag in members:
            lines += _wrapped(flag.spelling, width, "  ")
            lines += _wrapped(_explained(flag), width, "      ")
        lines.append("")
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    """Wraps a text at `width`, every line with the same indent."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,  # of a path, which is to be copied
    )


def _explained(flag: Flag) -> str:
    """Returns the explanation of a flag and its default."""
    if flag.default is tyro.MISSING:
        return f"{flag.explanation} (required)".strip()
    value = flag.default
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"{flag.explanation} (default: {'none' if value == '' else value})".strip()


def _grouped(flags: list[Flag], groups: Groups) -> dict[str, list[Flag]]:
    """Sorts flags by the groups of their top-level fields; groups without flags are left out.

    A field that no group names is in the group of the field before it, and the first ones are those
    of the command.
    """
    title_of = {name: title for title, names in groups.items() for name in names}
    members: dict[str, list[Flag]] = {COMMAND: [], **{title: [] for title in groups}}
    title = COMMAND
    for flag in flags:
        title = title_of.get(flag.name.partition(".")[0], title)
        members[title].append(flag)
    return {title: flags for title, flags in members.items() if flags}


def flags_of(kind: type, default: object = None, prefix: str = "") -> Iterator[Flag]:
    """Yields the flags of a dataclass, in the order of its fields; those of an inner config last.

    Sets of a mixture have numbers in their names, as in --tasks.0.source.
    """
    explanations = _field_docs(kind)
    inner: list[Iterator[Flag]] = []
    for field in dataclasses.fields(kind):
        value = _default_of(field) if default is None else getattr(default, field.name)
        name = f"{prefix}{field.name}"
        marks = _marks(field.type)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            nested = flags_of(type(value), value, prefix if unnamed else f"{name}.")
            if unnamed:
                inner.append(nested)
            else:
                yield from nested
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for number, each in enumerate(value):
                yield from flags_of(type(each), each, f"{name}.{number}.")
        elif not _holds_dataclasses(field.type):
            positional = _POSITIONAL in marks
            spelling = field.name.upper() if positional else _spelling(name, field.type)
            explanation = explanations.get(field.name, "")
            yield Flag(name, spelling, value, explanation, positional)
    for nested in inner:
        yield from nested


def _default_of(field: dataclasses.Field) -> object:
    """Returns the default of a field, tyro.MISSING if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def _marks(kind: object) -> tuple[object, ...]:
    """Returns the marks of an Annotated type."""
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _holds_dataclasses(kind: object) -> bool:
    """Checks whether a type is a tuple of dataclasses, which without any has no flags."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return True
    return any(map(_holds_dataclasses, get_args(kind)))


def _spelling(name: str, kind: object) -> str:
    """Returns a flag as it is written, with what it takes."""
    dashed = name.replace("_", "-")
    if kind is bool:
        section, _, last = dashed.rpartition(".")
        return f"--{dashed}, --{section}{'.' * bool(section)}no-{last}"
    metavars = [getattr(mark, "metavar", None) for mark in _marks(kind)]
    metavar = next(filter(None, metavars), None)
    return f"--{dashed} {metavar or _value(kind)}"


def _value(kind: object) -> str:
    """Returns what a flag takes, such as INT, {a,b} or TEXT ... ."""
    if kind is FilePath or kind == FilePath:
        return "PATH"
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin is Annotated:
        return _value(arguments[0])
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin in (UnionType, Union):
        return "|".join(map(_value, arguments))
    if origin is tuple and arguments[-1] is ...:
        return f"{_value(arguments[0])} ..."
    if origin is tuple:
        return " ".join(map(_value, arguments))
    return _WORDS.get(kind, str(kind)) if isinstance(kind, type) else str(kind)


@cache
def _field_docs(kind: type) -> dict[str, str]:
    """Reads the docstrings below the fields of a dataclass, each as one paragraph."""
    docs: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        for field, doc in zip(definition.body, definition.body[1:], strict=False):
            match field, doc:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs
