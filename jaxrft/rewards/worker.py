"""The process that grades, started by `pool.py`; it imports neither jax nor what does.

The wire, a socket that the process inherits, carries a JSON document a line. In: a greeting
{"token", "sys_path", "sources"}, then chunks {"reward", "tokens", "trainer_state", "keywords"}:
numbers and tokens of n questions, and by name what the reward is called with, lists of n values
each. Out: {"token", "pid"} to the greeting before anything foreign is loaded; {"token",
"signatures"} or {"token", "error"} when the rewards are loaded; then for each completion, in order,
[number, token, reward] or [number, token, null, kind, detail].
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, SupportsFloat

from jaxrft.host.files import JSON
from jaxrft.host.terminal import guard_streams
from jaxrft.rewards import calls
from jaxrft.rewards.functions import as_reward
from jaxrft.rewards.lookup import Reward, Source, load, sentence
from jaxrft.rewards.subreaper import guard
from jaxrft.rewards.wire import is_reward, keep_from_children

# bytes of address space that grading may take beyond what loading the rewards took
MEMORY = 4 << 30


def main(descriptor: int, trainer: int) -> None:
    """Answers chunks, in the child of a subreaper, until the trainer closes the wire or dies."""
    guard(trainer, descriptor)
    keep_from_children(descriptor)
    # a reward that prints, often completions, is not lost with the reader of that
    guard_streams(escape=True)
    wire = socket.socket(fileno=descriptor)
    lines = wire.makefile("rb")
    greeting = json.loads(next(lines))
    token = greeting["token"]
    _send(wire, {"token": token, "pid": os.getpid()})
    sys.path[:] = greeting["sys_path"]
    try:
        rewards = [as_reward(load(Source(*source))) for source in greeting["sources"]]
        signatures = [calls.signature_of(reward) for reward in rewards]
        for reward in rewards:
            getattr(reward, "start_in_worker", _nothing)()
    except BaseException as error:  # a user's module may do anything, sys.exit() included
        return _send(wire, {"token": token, "error": sentence(error)})
    _limit_memory()
    _send(wire, {"token": token, "signatures": signatures})
    for line in lines:
        chunk = json.loads(line)
        k = chunk["reward"]
        for answer in _answers(rewards[k], signatures[k], chunk):
            _send(wire, answer)


def _nothing() -> None:
    """Stands for the start of a reward that needs none."""


def _send(wire: socket.socket, message: object) -> None:
    wire.sendall(json.dumps(message).encode() + b"\n")


def _answers(reward: Reward, signature: calls.Signature, chunk: dict[str, JSON]) -> Iterator[list]:
    """Calls the reward once for each completion, and yields the answers.

    A failure then costs one completion, and the parent knows which.
    """
    for i, (number, token) in enumerate(chunk["tokens"]):
        keywords = calls.keywords(chunk["keywords"], i, chunk["trainer_state"], signature)
        yield [number, token, *_grade_one(reward, keywords)]


def _grade_one(reward: Reward, keywords: dict[str, object]) -> list:
    """Grades one completion; returns [reward] or [None, kind, detail].

    The keywords are lists of length 1, except for TRL's extras.
    """
    process = os.getpid()
    try:
        result = calls.awaited(reward(**keywords))
    except BaseException as error:  # math-verify's timeout and sys.exit() are no Exceptions
        result = error
    if os.getpid() != process:  # a child that the grader forked returned here
        os._exit(1)
    if isinstance(result, BaseException):
        return [None, "error", sentence(result)]
    return _checked(result)


def _checked(result: Any) -> list:
    if isinstance(result, str | dict) or not hasattr(result, "__len__"):
        return [
            None,
            "invalid",
            f"returned {type(result).__name__}, not a list with a number for each completion",
        ]
    if len(result) != 1:
        return [None, "wrong_length", f"returned {len(result)} rewards for 1 completion"]
    try:
        (value,) = result
        number = float(value) if isinstance(value, SupportsFloat) else value
    except Exception as error:
        return [None, "invalid", sentence(error)]
    if is_reward(number):
        return [number]
    return [None, "invalid", f"returned {value!r:.100}, not a finite float32 number"]


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + MEMORY
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no core file


if __name__ == "__main__":
    with suppress(BrokenPipeError, ConnectionResetError):
        main(int(sys.argv[1]), int(sys.argv[2]))
