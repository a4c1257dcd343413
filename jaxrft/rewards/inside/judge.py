"""Runs the tests of a task against a program that runs in another sandbox.

The names that the tests use and do not define stand for objects of the program. What is done with
these is asked of the program, and answered with plain values; so `assert f(1) == 2` compares two
integers here, where the program can patch nothing. Two references to objects of the program are
equal only if they are the same object: an `__eq__` of the program is never called.

Each `assert` counts as one test, each time that it is reached, and does not end the others. A
statement at the top level that fails otherwise counts as one failed test.
"""

import ast
import builtins
import importlib
import json
import os
from collections import deque
from types import ModuleType

from . import plain

# Names that tests use without importing them, since solutions usually do.
_MODULES = (
    "bisect cmath collections copy datetime decimal fractions functools heapq itertools json math "
    "operator random re statistics string"
).split()
_NAMES = {
    "typing": "Any Dict FrozenSet Iterable Iterator List Optional Sequence Set Tuple Union",
    "collections": "Counter OrderedDict defaultdict deque",
    "math": "inf nan",
}
# Constants of JSON, as tests of LiveCodeBench spell what a function should return; the program must
# not say what they are.
_CONSTANTS = {"true": True, "false": False, "null": None}
# names of functions in the tests' namespace, called by what `_Recorder` writes
_RECORD = "__record_of_tests__"
_BEGIN = "__begin_of_test__"
_END = "__end_of_test__"


class RemoteError(Exception):
    """Stands for an exception of the program that is no builtin one."""


class Channel:
    """Asks the program, by way of the process that started both sandboxes."""

    def __init__(self, classes: dict[str, type]) -> None:
        """Takes over the standard streams; `classes` are those of the tests."""
        self._answers = os.fdopen(os.dup(0), "rb")
        self._questions = os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        self.classes = classes
        self._depth = 0  # of asserts that are being evaluated

    def begin(self) -> None:
        """Notes that an `assert` is being evaluated."""
        self._depth += 1

    def end(self) -> None:
        """Notes that it has been."""
        self._depth -= 1

    def send(self, message: object) -> None:
        """Writes one line."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._questions, data) :]

    def ask(self, operation: str, number: int, *operands: object) -> object:
        """Returns the answer to a question; raises what the program raised.

        Arguments that a call changed are changed here, except within an `assert`: the program could
        empty `a` in `assert f(a) == sorted(a)`. A StopIteration of a function is a RemoteError, for
        it would end the loop in `assert all(map(test, cases))` as if all cases were done.
        """
        nodes = plain.encode(list(operands), list(self.classes), _number)
        self.send({"ask": [operation, number, nodes]})
        answer = json.loads(self._answers.readline())
        if "error" in answer:
            error = _error(*answer["error"])
            if isinstance(error, StopIteration) and operation != "next":
                error = RemoteError("StopIteration")
            raise error
        value = plain.decode(answer["value"], self.classes, self._remote)
        if "arguments" in answer and not self._depth:
            after = plain.decode(answer["arguments"], self.classes, self._remote)
            _restore(operands, after)
        return value

    def _remote(self, number: int) -> "Remote":
        return Remote(self, number)


class Remote:
    """Refers to an object of the program."""

    __slots__ = ("_channel", "_remote_number")

    def __init__(self, channel: Channel, number: int) -> None:
        """Refers to the object of this number."""
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_remote_number", number)

    def __getattr__(self, name: str) -> object:
        """Returns an attribute of the object."""
        return self._channel.ask("getattr", self._remote_number, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Sets an attribute of the object."""
        self._channel.ask("setattr", self._remote_number, name, value)

    def __call__(self, *arguments: object, **keywords: object) -> object:
        """Calls the object; arguments that it changes are changed here, too."""
        return self._channel.ask("call", self._remote_number, list(arguments), keywords)

    def __getitem__(self, key: object) -> object:
        """Returns an item of the object."""
        return self._channel.ask("getitem", self._remote_number, key)

    def __setitem__(self, key: object, value: object) -> None:
        """Sets an item of the object."""
        self._channel.ask("setitem", self._remote_number, key, value)

    def __contains__(self, key: object) -> bool:
        """Checks whether the object contains something."""
        return self._channel.ask("contains", self._remote_number, key) is True

    def __len__(self) -> int:
        """Returns the length of the object."""
        length = self._channel.ask("len", self._remote_number)
        return length if isinstance(length, int) else -1

    def __bool__(self) -> bool:
        """Returns whether the object counts as true."""
        return self._channel.ask("bool", self._remote_number) is True

    def __iter__(self) -> object:
        """Returns an iterator of the object."""
        return self._channel.ask("iter", self._remote_number)

    def __next__(self) -> object:
        """Returns the next item of an iterator."""
        return self._channel.ask("next", self._remote_number)

    def __str__(self) -> str:
        """Returns the text of the object."""
        return _text(self._channel.ask("str", self._remote_number))

    def __repr__(self) -> str:
        """Returns the representation of the object."""
        return _text(self._channel.ask("repr", self._remote_number))

    def __eq__(self, other: object) -> bool:
        """Compares references, never by a method of the program."""
        return isinstance(other, Remote) and self._remote_number == other._remote_number

    def __hash__(self) -> int:
        """Hashes the reference."""
        return hash(self._remote_number)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> int:
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_remote_number")
    raise plain.Unplain(f"tests give the program a value of type {type(value).__name__}")


def _error(name: object, message: object) -> Exception:
    """Returns a builtin exception of that name, or RemoteError; never one that ends a process."""
    kind = getattr(builtins, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        kind = RemoteError
    try:
        return kind(str(message))
    except TypeError:
        return RemoteError(str(message))


def _restore(operands: tuple[object, ...], after: object) -> None:
    """Changes the arguments of a call as the program has changed its copies."""
    (old, old_keywords), (new, new_keywords) = operands, after  # type: ignore[misc]
    pairs = [*zip(old, new, strict=True)]  # type: ignore[arg-type]
    pairs += [(old_keywords[name], new_keywords[name]) for name in old_keywords]  # type: ignore
    for before, changed in pairs:
        if type(before) is not type(changed) or isinstance(before, Remote):
            continue
        if isinstance(before, list | bytearray):
            before[:] = changed
        elif isinstance(before, dict | set):
            before.clear()
            before.update(changed)
        elif isinstance(before, deque):
            before.clear()
            before.extend(changed)
        elif hasattr(before, "__dict__"):
            vars(before).clear()
            vars(before).update(vars(changed))


def run(request: dict) -> None:
    """Runs the tests; writes {"ask"} for each question and {"verdict": [passed, all]} at the end.

    `prefix` is run first: what a task defines for both, such as the class of a tree's nodes.
    """
    module = ModuleType("tests")
    exec(compile(request["prefix"], "prefix.py", "exec"), module.__dict__)
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == "tests"
    }
    channel = Channel(classes)
    tree = ast.parse(request["tests"])
    for name in tested_names(tree, set(vars(module))):
        try:
            module.__dict__[name] = channel.ask("getattr", 0, name)
        except Exception:
            module.__dict__.pop(name, None)
            if hasattr(builtins, name):
                module.__dict__[name] = None  # not the builtin, which is right
    results: list[bool] = []
    module.__dict__[_RECORD] = results.append
    module.__dict__[_BEGIN] = channel.begin
    module.__dict__[_END] = channel.end
    _provide_common_names(module)
    for statement in tree.body:
        body = ast.Module([_Recorder().visit(statement)], [])
        try:
            exec(compile(ast.fix_missing_locations(body), "tests.py", "exec"), module.__dict__)
        except Exception:
            results.append(False)
    channel.send({"verdict": [sum(results), len(results)]})


class _Recorder(ast.NodeTransformer):
    """Replaces each `assert` by statements that record whether it holds."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:  # noqa: N802
        """Returns `try: record(not not test)`, where an exception records False."""
        holds = ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), node.test))
        failed = ast.ExceptHandler(None, None, [_call(_RECORD, ast.Constant(False))])
        body = [_call(_BEGIN), _call(_RECORD, holds)]
        return ast.copy_location(ast.Try(body, [failed], [], [_call(_END)]), node)


def _call(name: str, *arguments: ast.expr) -> ast.stmt:
    return ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))


def tested_names(tree: ast.Module, defined: set[str]) -> list[str]:
    """Returns the names that the program has to define: those that tests use and do not define.

    Builtin functions are not taken from the program, which could replace `abs` or `len`. Where
    tests use nothing else, the first function that they call is the one to be tested, such as a
    `sum` that a task asks for.
    """
    used: dict[str, bool] = {}  # name -> whether it is used otherwise than as `name.attribute`
    bound = set(defined)
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(name, ast.Load()):
                used[name] = used.get(name, False) or id(node) not in owners
            case ast.Name(name):
                bound.add(name)
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.AsyncFunctionDef(name):
                bound.add(name)
            case ast.arg(name):
                bound.add(name)
            case ast.ExceptHandler(_, str(name)):
                bound.add(name)
            case ast.alias(name, other):
                bound.add(other or name.partition(".")[0])
    common = {name for names in _NAMES.values() for name in names.split()}
    common |= {name for name in _MODULES if not used.get(name, True)}
    common |= set(_CONSTANTS)
    free = [name for name in used if name not in bound and name not in common]
    remote = [name for name in free if not hasattr(builtins, name)]
    if remote:
        return remote
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [node.id for node in calls if isinstance(node, ast.Name) and node.id in free]
    return names[:1]


def import_common() -> None:
    """Imports what `_provide_common_names` defines, before a fork that would do so each time."""
    for name in (*_MODULES, *_NAMES):
        importlib.import_module(name)


def _provide_common_names(module: ModuleType) -> None:
    """Defines what tests commonly leave to the program to import."""
    for owner, names in _NAMES.items():
        for name in names.split():
            module.__dict__.setdefault(name, getattr(importlib.import_module(owner), name))
    for name in _MODULES:
        module.__dict__.setdefault(name, importlib.import_module(name))
    for name, value in _CONSTANTS.items():
        module.__dict__.setdefault(name, value)
