"""Runs what a model wrote: as a program, as one function, or as an object that is asked.

Everything here runs in the process of the program, which can patch all of it. That gains nothing:
what leaves the process is an answer, and what the answer should be is known elsewhere.
"""

from __future__ import annotations

import atexit
import os
import sys

TYPE_CHECKING = False  # what is imported at the start is paid for by every grading
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def run_program(request: dict, text: str) -> None:
    """Runs the program as a script, whose input is provided; exits with its status."""
    sys.argv = ["solution.py"]
    status = 0
    try:
        _execute(request["source"], "__main__")
    except SystemExit as error:
        status = 0 if error.code in (None, 0) else 1
    except BaseException:
        status = 1
    try:
        atexit._run_exitfuncs()  # fast writers of contests write at the exit
        sys.stdout.flush()
    except BaseException:
        status = 1
    os._exit(status)


def run_call(request: dict, text: str) -> None:
    """Calls a function with encoded arguments; writes its result, and nothing that it prints."""
    import json
    from collections.abc import Iterator

    from . import plain

    output = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    try:
        module = _execute(request["source"], "solution")
        arguments = plain.decode(json.loads(text))
        result = _function(module, request["function"])(*arguments)  # type: ignore[misc]
        if isinstance(result, Iterator):
            result = list(result)
        data = json.dumps(plain.encode(result)).encode()
    except BaseException:
        os._exit(1)
    while data:
        data = data[os.write(output, data) :]
    os._exit(0)


def _function(module: ModuleType, name: str) -> Callable[..., object]:
    """Returns a function of the module, or the method of its class `Solution`."""
    function = getattr(module, name, None)
    if function is None:
        function = getattr(module.Solution(), name)
    return function


def provide(text: str) -> None:
    """Makes a text the standard input, as a file in memory; call it before files are limited."""
    file = os.memfd_create("input")
    _write_all(file, text.encode("utf-8", "surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _execute(source: str, name: str) -> ModuleType:
    """Runs a source as the module `name`, which replaces any other of this name."""
    module = type(sys)(name)
    sys.modules[name] = module
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return module


def serve(request: dict) -> None:
    """Runs the source, then answers what the judge asks about it, until the judge ends.

    A question is a list: an operation, the number of an object and the encoded operands. Object 0
    is the module. An answer is {"value": nodes}, with "arguments" where a call changed them, or
    {"error": [type, message]}.
    """
    import json

    questions = os.fdopen(os.dup(0), "rb")
    answers = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    objects: list[object] = [None]
    try:
        objects[0] = _execute(request["source"], "solution")
        status = "loaded"
    except BaseException as error:
        status = type(error).__name__
    _write_all(answers, json.dumps({"status": status}).encode() + b"\n")
    for line in questions:
        try:
            answer = _answer(json.loads(line), objects, request["classes"])
            data = json.dumps(answer).encode()
        except BaseException as error:
            data = json.dumps({"error": [type(error).__name__, _message(error)]}).encode()
        _write_all(answers, data + b"\n")
    os._exit(0)


def _message(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


def _answer(question: list, objects: list[object], names: list[str]) -> dict[str, object]:
    from . import plain

    operation, number, nodes = question
    target = objects[number]
    classes = {name: getattr(objects[0], name, None) for name in names}

    def refer(value: object) -> int:
        objects.append(value)
        return len(objects) - 1

    def encode(value: object) -> list[object]:
        return plain.encode(value, names, refer)

    operands: list = plain.decode(nodes, classes, objects.__getitem__)  # type: ignore[assignment]
    if operation != "call":
        return {"value": encode(_OPERATIONS[operation](target, *operands))}
    arguments, keywords = operands
    result = target(*arguments, **keywords)  # type: ignore[operator]
    answer: dict[str, object] = {"value": encode(result)}
    if any(isinstance(node, list) and node[0] in plain.MUTABLE for node in nodes[3:]):
        after = encode([arguments, keywords])
        if after != nodes:
            answer["arguments"] = after
    return answer


_OPERATIONS: dict[str, Callable[..., object]] = {
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "contains": lambda target, key: key in target,
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
    "bool": bool,
}
