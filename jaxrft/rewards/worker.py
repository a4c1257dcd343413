"""The process that grades, started by `pool.py`; it imports neither jax nor what does.

The wire is one inherited socket with a JSON document a line.
In: a greeting {"sys_path", "sources"}, then chunks {"reward", "prompts", "completions", "columns"}.
Out: {"pid"} or {"error": sentence} to the greeting; then for each completion, in order, [reward] or
[null, kind, detail].
"""

import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, SupportsFloat

from jaxrft.rewards.lookup import Reward, Source, load, sentence
from jaxrft.rewards.warden import guard
from jaxrft.terminal import guard_streams

MEMORY = 4 << 30  # bytes of address space that grading may take beyond what loading the rewards took


def main(descriptor: int, trainer: int) -> None:
    """Answers chunks, in a child with a warden, until the trainer closes the wire or dies."""
    guard(trainer, descriptor)
    guard_streams()  # a reward that prints is not lost with the reader of what it prints
    wire = socket.socket(fileno=descriptor)
    lines = wire.makefile("rb")
    greeting = json.loads(next(lines))
    sys.path[:] = greeting["sys_path"]
    try:
        rewards = [load(Source(*source)) for source in greeting["sources"]]
    except BaseException as error:  # a user's module may do anything, sys.exit() included
        return _send(wire, {"error": sentence(error)})
    _limit_memory()
    _send(wire, {"pid": os.getpid()})
    for line in lines:
        chunk = json.loads(line)
        for answer in _answers(rewards[chunk["reward"]], chunk):
            _send(wire, answer)


def _send(wire: socket.socket, message: Any) -> None:
    wire.sendall(json.dumps(message).encode() + b"\n")


def _answers(reward: Reward, chunk: dict[str, Any]) -> Iterator[list]:
    """One call a completion, so that a failure costs one completion and the parent knows which."""
    for i, (prompt, completion) in enumerate(zip(chunk["prompts"], chunk["completions"], strict=True)):
        columns = {name: [values[i]] for name, values in chunk["columns"].items()}
        yield _grade_one(reward, prompt, completion, columns)


def _grade_one(reward: Reward, prompt: Any, completion: Any, columns: dict[str, list]) -> list:
    """[reward] or [None, kind, detail] of one completion; columns are lists of length 1."""
    process = os.getpid()
    try:
        result = reward([prompt], [completion], **columns)
    except BaseException as error:  # math-verify's timeout and sys.exit() are no Exceptions
        result = error
    if os.getpid() != process:  # a grader's forked child came back here: it must not speak on the wire
        os._exit(1)
    if isinstance(result, BaseException):
        return [None, "error", sentence(result)]
    return _checked(result)


def _checked(result: Any) -> list:
    if isinstance(result, str | dict) or not hasattr(result, "__len__"):
        return [None, "invalid", f"returned {type(result).__name__}, not a list with a number for each completion"]
    if len(result) != 1:
        return [None, "wrong_length", f"returned {len(result)} rewards for 1 completion"]
    try:
        (value,) = result
        number = float(value) if isinstance(value, SupportsFloat) else value
    except Exception as error:
        return [None, "invalid", sentence(error)]
    if number is None or (isinstance(number, float) and math.isfinite(number)):
        return [number]
    return [None, "invalid", f"returned {value!r:.100}, not a finite number"]


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + MEMORY
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no core file


if __name__ == "__main__":
    with suppress(BrokenPipeError, ConnectionResetError):
        main(int(sys.argv[1]), int(sys.argv[2]))
