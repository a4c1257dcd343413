"""Grades completions in worker processes that can be killed: a hang or a crash costs one reward, never the run."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from jaxrft.rewards.lookup import Reward, locate
from jaxrft.rewards.warden import END

logger = logging.getLogger(__name__)

KINDS = ("timeout", "crash", "wrong_length", "error", "invalid")
CHUNK = 16  # completions sent at once: a worker idles for a round trip between two chunks
RECYCLE_GRADINGS = 50_000  # a worker is replaced between two chunks after so many gradings,
RECYCLE_BYTES = 1 << 30  # or when it holds so much more memory than at its start: sympy keeps what it computes
STOP_SECONDS = 10.0  # for a warden to kill all that a worker has started
STARTUP_SECONDS = 120.0  # importing a user's module may be slow, but not endless
_IS_WORKER = "JAXRFT_REWARD_WORKER"


class Graded(NamedTuple):
    """The rewards of a batch of n completions."""

    rewards: list[list[float | None]]  # [rewards][n], in the order given; None = does not apply, or lost
    failures: dict[str, int]  # a kind of KINDS -> how many rewards it cost
    failed: set[int]  # the completions that lost a reward


class Pool:
    """Worker processes that grade; a context manager, for one thread, with which they end.

    `rewards` are (name, function | name of REWARDS | "package.module:function"). A completion whose grading takes more
    than `timeout` seconds loses its reward and its worker is replaced; so does one whose worker dies. Workers that are
    old or large are replaced between chunks, and what graders start ends with their worker. Functions run in fresh
    processes, so they must be at the top level of a module or script. Raises InputError for rewards that do not load.
    `workers` is the number of cores, at most 8, by default.
    """

    def __init__(
        self, rewards: Sequence[tuple[str, str | Reward]], *, workers: int | None = None, timeout: float = 10.0
    ) -> None:
        """Starts the workers, all at once, and waits until each has loaded the rewards."""
        from jaxrft.types import InputError, Missing

        if os.environ.get(_IS_WORKER):
            raise InputError("a script that trains with its own reward needs `if __name__ == '__main__':` around it")
        self._names = [name for name, _ in rewards]
        self._timeout = timeout
        self._greeting = {
            "sys_path": list(dict.fromkeys([os.path.abspath(path) for path in [*sys.path, ""]])),
            "sources": [locate(reward) for _, reward in rewards],
        }
        self._count = workers or min(8, os.cpu_count() or 1)
        self._workers: list[_Worker] = []
        try:
            self._fill()
            while starting := [worker for worker in self._workers if worker.starting]:
                _wait_for(starting)
                for worker in starting:
                    _, failure = worker.receive()
                    if failure:
                        absent = failure.startswith(("ImportError", "ModuleNotFoundError"))
                        kind = Missing if absent else InputError
                        raise kind(f"rewards {', '.join(self._names)} do not load: {failure}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        """The pool itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops the workers."""
        self.close()

    def close(self) -> None:
        """Kills all workers, and what they started."""
        while self._workers:
            self._workers.pop().stop()

    def grade(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> Graded:
        """Rewards of n completions; columns hold n JSON values each. Failures are logged, once a kind, and counted."""
        batch = {"prompts": prompts, "completions": completions, **columns}
        _check(batch)
        rewards: list[list[float | None]] = [[None] * len(completions) for _ in self._names]
        failures, failed = [], set()
        try:
            for reward, i, (value, *failure) in self._answers(prompts, completions, columns):
                rewards[reward][i] = value
                if failure:
                    failures.append((failure[0], self._names[reward], failure[1]))
                    failed.add(i)
        except BaseException:  # a worker that still owes answers must not give them to the next batch
            self.close()
            raise
        counts = Counter(kind for kind, _, _ in failures)
        for kind in counts:
            _, name, detail = next(failure for failure in failures if failure[0] == kind)
            logger.warning("%d rewards lost to %s; the first: %s, %s", counts[kind], kind, name, detail)
        return Graded(rewards, {kind: counts[kind] for kind in KINDS}, failed)

    def _answers(self, prompts: Sequence, completions: Sequence, columns: Mapping) -> Iterator[tuple[int, int, list]]:
        """(reward, completion, [value] or [None, kind, detail]) as they come."""
        n = len(completions)
        size = max(1, min(CHUNK, n // (2 * self._count)))
        queue = deque((k, range(n)[i : i + size]) for k in range(len(self._names)) for i in range(0, n, size))
        if queue:
            self._fill()
        while queue or any(worker.pending for worker in self._workers):
            for worker in self._workers:
                if queue and worker.idle:
                    worker.send(*queue.popleft(), prompts, completions, columns)
            if not self._workers:
                yield from ((k, i, [None, "crash", "no worker could be started"]) for k, ids in queue for i in ids)
                return
            busy = [worker for worker in self._workers if not worker.idle]
            _wait_for(busy)
            for worker in busy:
                answers, failure = worker.receive()
                yield from answers
                if failure:
                    yield from self._replace(worker, failure, queue)
                elif worker.tired and not any(other.starting for other in self._workers):  # one at a time
                    self._dismiss(worker)
                    self._fill()

    def _replace(self, worker: "_Worker", failure: str, queue: deque) -> Iterator[tuple[int, int, list]]:
        """Kills a worker, gives up the completion it was at, and puts the rest of its chunk back in the queue."""
        self._dismiss(worker)
        if worker.starting:  # it loaded before: leave the place empty until the next batch rather than try for ever
            logger.error("a reward worker does not start again: %s", failure)
            return
        self._fill()
        if worker.pending:  # otherwise it said more than it was asked
            i, *rest = worker.pending
            if rest:
                queue.appendleft((worker.reward, rest))
            yield worker.reward, i, [None, failure, f"completion {i} of the batch"]

    def _fill(self) -> None:
        """Replaces workers that died while idle, and starts those that are missing."""
        for worker in [worker for worker in self._workers if worker.idle and wait([worker.wire], 0)]:
            self._dismiss(worker)
        try:
            while len(self._workers) < self._count:
                self._workers.append(_Worker(self._greeting, self._timeout))
        except OSError as error:
            logger.error("a reward worker cannot be started: %s", error)

    def _dismiss(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        worker.stop()


class _Worker:
    """A process, the wire to it, the completions it still owes and until when it may take."""

    def __init__(self, greeting: dict[str, Any], timeout: float) -> None:
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(timeout)
        self.timeout = timeout
        self.starting = True
        self.deadline = time.monotonic() + STARTUP_SECONDS
        self.reward, self.pending = 0, deque[int]()
        self.pid, self.resident, self.graded = 0, 0, 0  # known when it has loaded; bytes then; completions since
        self.rest = b""  # the beginning of a line
        # No accelerator for graders; and the same string hashes, hence sympy's orders, in every run. A session of its
        # own: Ctrl-C does not reach it. What it prints goes to our stderr. The process is the worker's warden.
        alone = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0", _IS_WORKER: "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxrft.rewards.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=os.environ | alone,
                start_new_session=True,
            )
        self._write(greeting)

    @property
    def idle(self) -> bool:
        """Loaded, and owing no answer."""
        return not (self.starting or self.pending)

    @property
    def tired(self) -> bool:
        """Idle, and so old or so large that a fresh one should take its place."""
        return self.idle and (self.graded >= RECYCLE_GRADINGS or _resident(self.pid) > self.resident + RECYCLE_BYTES)

    def send(self, reward: int, ids: Sequence[int], prompts: Sequence, completions: Sequence, columns: Mapping) -> None:
        """Asks for one reward of the completions `ids`."""
        self.reward, self.pending = reward, deque(ids)
        self.deadline = time.monotonic() + self.timeout
        self._write(
            {
                "reward": reward,
                "prompts": [prompts[i] for i in ids],
                "completions": [completions[i] for i in ids],
                "columns": {name: [values[i] for i in ids] for name, values in columns.items()},
            }
        )

    def _write(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # a dead or stopped worker shows when it does not answer
            self.wire.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[tuple[int, int, list]], str | None]:
        """The answers that have come, as (reward, completion, answer), and how it failed, if it did.

        The failure is "timeout" or "crash" of a grading worker, a sentence of a starting one.
        """
        if not wait([self.wire], 0):
            late = time.monotonic() > self.deadline
            slow = f"it takes more than {STARTUP_SECONDS:g} s" if self.starting else "timeout"
            return [], slow if late else None
        try:
            data = self.wire.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return [], "the worker process died" if self.starting else "crash"
        *lines, self.rest = (self.rest + data).split(b"\n")
        if lines:
            self.deadline = time.monotonic() + self.timeout
        if self.starting:
            return [], self._hear(json.loads(lines[0])) if lines else None
        self.graded += len(lines)
        answers = []
        for line in lines:
            try:
                message = json.loads(line)
                answers.append((self.reward, self.pending.popleft(), message))
            except (ValueError, IndexError):  # a grader wrote on the wire
                return answers, "crash"
        return answers, None

    def _hear(self, greeting: dict[str, Any]) -> str | None:
        """Takes down what a worker says when it has loaded the rewards; returns why it has not."""
        self.starting = False
        self.pid = greeting.get("pid", 0)
        self.resident = _resident(self.pid)
        return greeting.get("error")

    def stop(self) -> None:
        """Has the warden kill the worker and all that it started."""
        self.process.send_signal(END)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("processes that a reward started cannot be killed")
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.wire.close()


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds, 0 where there is no /proc."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _wait_for(workers: Sequence[_Worker]) -> None:
    """Returns when one of the workers has spoken, died, or is out of time."""
    wait([worker.wire for worker in workers], max(0.0, min(worker.deadline for worker in workers) - time.monotonic()))


def _check(batch: Mapping[str, Sequence[Any]]) -> None:
    """Raises InputError for columns of unequal length or with values that JSON has not."""
    from jaxrft.types import InputError

    n = len(batch["completions"])
    for name, values in batch.items():
        if len(values) != n:
            raise InputError(f"column {name} has {len(values)} values for {n} completions: give one for each")
        try:
            json.dumps(list(values))
        except (TypeError, ValueError) as error:
            raise InputError(f"column {name} cannot be sent to reward workers: {error}; use plain values") from error
