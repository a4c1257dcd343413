"""Renders chat templates in a process of its own, which `templates.py` starts as a script.

It imports the standard library and jinja2. The wire is standard input and output with a JSON
document a line. In: a greeting {"path", "date", "seconds", "memory", "batch", "templates"}; then
for each prompt {"template", "messages", "variables", "generate"}. Out, for each prompt: {"text"},
{"refused": message} or {"failed": message}; the first answer about a template also has "reads", the
names of all variables that the template looks at.
"""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # jinja2 is imported when its path is known
    from jinja2 import Environment, Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser

MESSAGE = 300  # characters of an error that are passed on
# The characters that a template may write: BASE, and PER_BYTE for each byte of its prompt on the
# wire.
BASE = 64 << 10
PER_BYTE = 4


def main() -> None:
    """Answers prompts until standard input ends; SIGPROF ends the process when a batch takes too
    much time.
    """
    wire = sys.stdin.buffer
    greeting = json.loads(wire.readline())
    sys.path += greeting["path"]
    environment = make_environment(date.fromisoformat(greeting["date"]))
    limit_memory(greeting["memory"])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the parent may ignore it
    compiled: dict[int, Template] = {}
    for number, line in enumerate(wire):
        if number % greeting["batch"] == 0:
            signal.setitimer(signal.ITIMER_PROF, greeting["seconds"])
        answer = answer_to(line, environment, greeting["templates"], compiled)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def answer_to(
    line: bytes, environment: Environment, templates: list[str], compiled: dict[int, Template]
) -> dict[str, object]:
    """Renders one prompt; what a template raises, MemoryError and RecursionError included, becomes
    a message.
    """
    from jinja2 import TemplateError, meta

    reads: dict[str, object] = {}
    try:
        request = json.loads(line)
        index = request["template"]
        if index not in compiled:
            source = templates[index]
            compiled[index] = environment.from_string(source)
            reads = {"reads": sorted(meta.find_undeclared_variables(environment.parse(source)))}
        text = render(compiled[index], request, BASE + PER_BYTE * len(line))
        return {"text": text} | reads
    except TemplateError as error:
        if type(error) is TemplateError:  # of raise_exception; those of jinja2 are its subclasses
            return {"refused": phrase(str(error))} | reads
        return {"failed": describe(error)} | reads
    except BaseException as error:
        return {"failed": describe(error)} | reads


def render(template: Template, request: dict[str, Any], most: int) -> str:
    """Returns the text of a template; raises OverflowError for more than `most` characters.

    The variables are those that transformers gives; `random` filters draw the same numbers for each
    prompt.
    """
    random.seed(0)
    variables = {"tools": None, "documents": None} | request["variables"]
    variables |= {"messages": request["messages"], "add_generation_prompt": request["generate"]}
    pieces: list[str] = []
    size = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise OverflowError(f"it writes more than {most:,} characters")
    return "".join(pieces)


class _Dictionaries:
    """Makes dictionaries, and has nothing else of the type."""

    def __call__(self, *args: Any, **entries: object) -> dict:
        return dict(*args, **entries)

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict:
        return dict.fromkeys(keys, value)


def _to_json(
    value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def make_environment(today: date) -> Environment:
    """Returns the sandbox that transformers renders in, with `today` for the date of the clock."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Gives the body of {% generation %}, a mark for masks of training data, as it is."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Node:
            number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("passed"), [], [], body).set_lineno(number)

        def passed(self, caller: Callable[[], str]) -> str:
            return caller()

    class PublicNamespace(Namespace):
        """Has no names that begin with an underscore, which would lead to Python's own
        attributes.
        """

        def __init__(*args: Any, **names: object) -> None:
            this, *positional = args  # `self` may be among the names
            values = dict(*positional, **names)
            check_public(values)
            Namespace.__init__(this, values)

        def __setitem__(self, name: str, value: object) -> None:
            check_public((name,))
            super().__setitem__(name, value)

    def check_public(names: Iterable[object]) -> None:
        if hidden := [name for name in names if isinstance(name, str) and name.startswith("_")]:
            raise jinja2.exceptions.SecurityError(
                f"a namespace cannot hold {hidden[0]!r}, which begins with _"
            )

    def strftime_now(pattern: str) -> str:
        return datetime.combine(today, time()).strftime(pattern)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= {"dict": _Dictionaries(), "namespace": PublicNamespace}
    return environment


def describe(error: BaseException) -> str:
    """Returns what went wrong, and in which line of the template, as one printable phrase of
    bounded length.
    """
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    kind = type(error).__name__
    said = phrase(str(getattr(error, "message", None) or error))
    if kind != "OverflowError" or not said.startswith("it "):
        said = f"{kind}: {said}" if said else kind
    line = line_of(error)
    return f"{said}, in its line {line}" if line else said


def phrase(text: str) -> str:
    """Returns text on one printable line of bounded length."""
    shown = "".join(each if each.isprintable() else " " for each in text[: 10 * MESSAGE])
    return " ".join(shown.split())[:MESSAGE]


def line_of(error: BaseException) -> int | None:
    """Returns the last line of the template that an error went through."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def limit_memory(more: int) -> None:
    """Allows `more` bytes of address space from here on, no files to be written and no core
    files.
    """
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
