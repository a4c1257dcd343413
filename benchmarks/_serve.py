"""A measured process: prepares once, then runs and answers for every line that it reads.

It imports the standard library alone, as peers have environments of their own.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from benchmarks._shape import Shape

Measured = dict[str, float]  # "seconds", and what else was measured


class Request(NamedTuple):
    """What a process is to measure."""

    what: str  # rollout, learn or step
    shape: Shape
    lengths: tuple[int, ...]  # [R] of the completions; () = to be drawn by the sampler


class Subject(NamedTuple):
    """What is measured, ready to run."""

    run: Callable[[], Measured]
    lengths: Callable[[], list[int]]  # [R] of the completions of the latest run
    device_memory: Callable[[], int] = lambda: 0  # peak bytes on the device; 0 = it is the host's


class Peer(Protocol):
    """Another implementation of what is measured."""

    def rollout(self) -> None:
        """Samples completions of the forced lengths."""
        ...

    def learn(self) -> None:
        """Updates the policy on completions of the forced lengths."""
        ...

    def step(self) -> None:
        """Samples and learns."""
        ...


def time_peer(peer: Peer, request: Request) -> Subject:
    """Returns the subject that times what the request asks of a peer; its lengths are those of the
    request.
    """
    calls = {"rollout": peer.rollout, "learn": peer.learn, "step": peer.step}
    call = calls[request.what]

    def run() -> Measured:
        start = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - start}

    return Subject(run, lambda: [*request.lengths])


def read_request(path: Path) -> Request:
    """Reads the request that `_turns.py` wrote."""
    entries = json.loads(path.read_text())
    return Request(entries["what"], Shape(**entries["shape"]), tuple(entries["lengths"]))


def serve(open_subject: Callable[[Request], AbstractContextManager[Subject]]) -> None:
    """Measures what the file `sys.argv[-1]` asks for, once at first and then for each line of
    stdin.

    Each answer is one line of JSON. Whatever else is printed goes to stderr. The first run
    compiles.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = read_request(Path(sys.argv[-1]))
    limit_threads(request.shape.threads)
    start = time.perf_counter()
    with open_subject(request) as subject:
        prepared = time.perf_counter() - start
        first = subject.run()
        about = {"prepare": prepared, "first": first, "lengths": subject.lengths()}
        print(json.dumps(about), file=answers, flush=True)
        for _ in sys.stdin:
            measured = subject.run()
            measured["tokens"] = sum(subject.lengths())
            measured["peak_bytes"] = subject.device_memory() or peak_bytes()
            print(json.dumps(measured), file=answers, flush=True)


def limit_threads(number: int) -> None:
    """Lets this process and its children use the first `number` of its cores."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:number])


def peak_bytes() -> int:
    """Returns the largest resident memory that the process had, in bytes; Linux counts KiB."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
