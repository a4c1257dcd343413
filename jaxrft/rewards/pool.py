"""Grades completions in worker processes that can be killed: a hang or a crash costs one reward,
never the run.
"""

import json
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Literal, NamedTuple

from jaxrft.errors import InputError, Missing
from jaxrft.host import launch
from jaxrft.rewards.calls import GIVEN, Signature
from jaxrft.rewards.lookup import Reward, folders, locate, remedy
from jaxrft.rewards.subreaper import END
from jaxrft.rewards.wire import Answer, Garbled, Wire, parse_answer, parse_greeting

logger = logging.getLogger(__name__)

KINDS = ("timeout", "crash", "wrong_length", "error", "invalid")
CHUNK = 16  # completions sent at once: a worker idles for a round trip between two chunks
# A worker is replaced between two chunks after this number of gradings, or when it holds this many
# more bytes of memory than at its start: sympy caches its results.
RECYCLE_GRADINGS = 50_000
RECYCLE_BYTES = 1 << 30
STOP_SECONDS = 10.0  # for the subreaper to kill every process that a worker has started
STARTUP_SECONDS = 120.0  # importing a user's module may be slow, but not endless
_IS_WORKER = "JAXRFT_REWARD_WORKER"


class Graded(NamedTuple):
    """The rewards of a batch of n completions."""

    # [rewards][n], of those asked for, in their order; None = does not apply, or lost
    rewards: list[list[float | None]]
    failures: dict[str, int]  # a kind of KINDS -> the number of rewards lost to it
    lost: set[tuple[int, int]]  # (reward, completion) lost to failures
    causes: dict[str, str]  # reward -> its first failure, a sentence

    @property
    def failed(self) -> set[int]:
        """Collects the numbers of the completions that lost a reward."""
        return {completion for _, completion in self.lost}


class _Question(NamedTuple):
    """One reward of a few completions."""

    reward: int
    numbers: Sequence[int]  # of the completions, among those begun with them
    first: int  # number of the first of those, among all since the last `finish`
    arguments: Mapping[str, Sequence[object]]
    state: Mapping[str, int] | None


def _load_error(names: Sequence[str], failure: str, end: str) -> InputError:
    """Returns what to raise where a worker could not load the rewards, as it says itself."""
    kind, _, message = failure.partition(": ")
    is_missing = kind in ("ImportError", "ModuleNotFoundError", Missing.__name__)
    if kind in (InputError.__name__, Missing.__name__):
        failure = message
    error = Missing if is_missing else InputError
    return error(f"rewards {', '.join(names)} do not load: {failure}{end}")


class Pool:
    """Worker processes that grade; a context manager, for one thread, with which they end.

    `rewards` are (name, function | name of REWARDS | "package.module:function" |
    "folder/file.py:function"). A completion whose grading takes more than `timeout` seconds loses
    its reward and its worker is replaced; so does one whose worker dies. Workers that are old or
    large are replaced between chunks, and what graders start ends with their worker. Functions run
    in fresh processes, so they must be at the top level of a module or script. Raises InputError
    for rewards that do not load. `workers` is the number of cores, at most 8, by default. Where a
    prompt is a list of messages its completion is handed over as TRL does, as a list with the
    assistant's message, or as text if `completions_as` says so.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, str | Reward]],
        *,
        workers: int | None = None,
        timeout: float = 10.0,
        completions_as: Literal["trl", "text"] = "trl",
        path: Sequence[str] = (),
    ) -> None:
        """Starts the workers, all at once, and waits until each has loaded the rewards."""
        if os.environ.get(_IS_WORKER):
            raise InputError(
                "a script that trains with its own reward needs `if __name__ == "
                "'__main__':` around it"
            )
        self._names = [name for name, _ in rewards]
        self._timeout = timeout
        self._completions_as = completions_as
        self._signatures: list[Signature] = []
        self._queue = deque[_Question]()
        self._answers: list[tuple[int, int, Answer]] = []  # (reward, completion, answer)
        self._begun = 0  # completions since the last `finish`
        self._asked = tuple(self._names)  # rewards of these completions
        sources = [locate(reward, path) for _, reward in rewards]
        foreign = any(not f"{source.module}.".startswith("jaxrft.") for source in sources)
        self._greeting: dict[str, object] = {
            "sys_path": _search_path([*path, *folders(sources)], with_current_directory=foreign),
            "sources": sources,
        }
        self._count = workers or min(8, os.cpu_count() or 1)
        # reward -> range of its first values, kept by callers
        self.first_ranges: dict[str, tuple[float, float]] = {}
        self._workers: list[_Worker] = []
        try:
            self._fill()
            while starting := [worker for worker in self._workers if worker.starting]:
                _wait_for(starting)
                for worker in starting:
                    _, failure = worker.receive()
                    if failure:
                        raise _load_error(self._names, failure, remedy(failure, sources))
            self._signatures = self._workers[0].signatures
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        """Returns the pool itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops the workers."""
        self.close()

    def close(self) -> None:
        """Kills all workers, and what they started."""
        for worker in self._workers:
            worker.process.send_signal(END)  # all at once, before the first is waited for
        while self._workers:
            self._workers.pop().stop()

    def grade(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        columns: Mapping[str, Sequence[object]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        truncated: Sequence[object] | None = None,
        trainer_state: Mapping[str, int] | None = None,
        *,
        rewards: Sequence[str] | None = None,
    ) -> Graded:
        """Computes the rewards of n completions; failures are logged, once a kind, and counted.

        Args:
          prompts: n texts or lists of messages.
          completions: n texts.
          columns: lists of n JSON values, of the tasks, by name.
          completion_ids: the sampled tokens of each completion.
          truncated: whether each completion was cut at the longest length.
          trainer_state: fields of the object `trainer_state`, numbers.
          rewards: the names of those to compute, None for all.

        A reward is given, by keyword, all of these that it takes. Raises InputError for values that
        JSON has not, for columns of another length or with a name of `calls.GIVEN`, and for a
        reward that needs more than it is given.
        """
        self.begin(
            prompts,
            completions,
            columns,
            completion_ids,
            truncated,
            trainer_state,
            rewards=rewards,
        )
        return self.finish()

    def begin(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        columns: Mapping[str, Sequence[object]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        truncated: Sequence[object] | None = None,
        trainer_state: Mapping[str, int] | None = None,
        *,
        rewards: Sequence[str] | None = None,
    ) -> None:
        """Puts completions behind those that are being graded, by the same rewards; see `grade`."""
        asked = tuple(self._names if rewards is None else rewards)
        if self._begun and asked != self._asked:
            raise ValueError("finish what was begun by other rewards first")
        self._asked = asked
        if reserved := [name for name in GIVEN if name in columns]:
            raise InputError(
                f"column {reserved[0]} has the name of another argument of rewards: rename it"
            )
        if self._completions_as == "trl":
            completions = [_as_in_trl(*pair) for pair in zip(prompts, completions, strict=True)]
        given: dict[str, Sequence[object]] = {"prompts": prompts, "completions": completions}
        if completion_ids is not None:
            given["completion_ids"] = completion_ids
        if truncated is not None:
            given["truncated"] = truncated
        given |= columns
        _check(given)
        numbers_of_rewards = [self._names.index(name) for name in asked]
        self._check_signatures(given, trainer_state, numbers_of_rewards)
        n = len(completions)
        size = max(1, min(CHUNK, n // (2 * self._count)))
        first = self._begun
        self._begun += n
        for reward in numbers_of_rewards:
            arguments = self._signatures[reward].accepted(given)
            for start in range(0, n, size):
                numbers = range(n)[start : start + size]
                question = _Question(reward, numbers, first, arguments, trainer_state)
                self._queue.append(question)

    def work(self, seconds: float) -> bool:
        """Grades for so many seconds, or until nothing is left; returns whether anything is."""
        end = time.monotonic() + seconds
        while self._is_grading and time.monotonic() < end:
            self._round(end)
        return self._is_grading

    def finish(self) -> Graded:
        """Grades what is left; returns all rewards since the last call, in the order begun."""
        while self._is_grading:
            self._round()
        n = self._begun
        rewards: list[list[float | None]] = [[None] * n for _ in self._asked]
        failures = []
        lost = set()
        for number, i, (value, *failure) in self._answers:
            reward = self._asked.index(self._names[number])
            rewards[reward][i] = value
            if failure:
                failures.append((failure[0], self._names[number], failure[1]))
                lost.add((reward, i))
        self._begun = 0
        self._answers = []
        counts = Counter(kind for kind, _, _ in failures)
        for kind in counts:
            _, name, detail = next(failure for failure in failures if failure[0] == kind)
            logger.warning(
                "%d rewards lost to %s; the first: %s, %s", counts[kind], kind, name, detail
            )
        causes = {name: f"{kind}, {detail}" for kind, name, detail in reversed(failures)}
        return Graded(rewards, {kind: counts[kind] for kind in KINDS}, lost, causes)

    def _check_signatures(
        self,
        given: Mapping[str, object],
        trainer_state: Mapping[str, int] | None,
        numbers: Sequence[int],
    ) -> None:
        """Raises InputError for one of the rewards with a parameter that nothing is given for."""
        names = [*given, "log_extra", "log_metric"]
        if trainer_state is not None:
            names.append("trainer_state")
        for number in numbers:
            required = self._signatures[number].required
            if missing := [name for name in required if name not in names]:
                raise InputError(
                    f"the reward {self._names[number]} needs {missing[0]}, but the tasks have no "
                    f"such column and rewards get only {', '.join(names)}: add the column, or give "
                    "the parameter a default"
                )

    @property
    def _is_grading(self) -> bool:
        return bool(self._queue) or any(worker.pending for worker in self._workers)

    def _round(self, end: float = math.inf) -> None:
        """Sends questions to idle workers, waits for an answer, at most until `end`, and receives
        those that have come.
        """
        try:
            self._ask_and_receive(end)
        # a worker that still owes answers must not give them to the next batch
        except BaseException:
            self.close()
            self._queue.clear()
            self._answers = []
            self._begun = 0
            raise

    def _ask_and_receive(self, end: float) -> None:
        if self._queue:
            self._fill()
        for worker in self._workers:
            if self._queue and worker.idle:
                worker.send(self._queue.popleft())
        if not self._workers:
            for question in self._queue:
                for i in question.numbers:
                    answer = (None, "crash", "no worker could be started")
                    self._answers.append((question.reward, question.first + i, answer))
            self._queue.clear()
            return
        busy = [worker for worker in self._workers if not worker.idle]
        _wait_for(busy, end)
        for worker in busy:
            answers, failure = worker.receive()
            self._answers.extend(answers)
            if failure:
                self._replace(worker, failure)
            # one at a time
            elif worker.should_recycle and not any(other.starting for other in self._workers):
                self._stop(worker)
                self._fill()

    def _replace(self, worker: "_Worker", failure: str) -> None:
        """Replaces a worker that failed: the completion it was grading loses its reward, and the
        rest of its chunk goes back to the queue.
        """
        self._stop(worker)
        # it loaded before: run with fewer workers until the next batch, and do not retry for ever
        if worker.starting:
            logger.error("a reward worker does not start again: %s", failure)
            return
        self._fill()
        if worker.pending:  # otherwise it sent an answer to no question
            i, *rest = [number for number, _ in worker.pending]
            question = worker.question
            if rest:
                self._queue.appendleft(question._replace(numbers=rest))
            number = question.first + i
            answer = (None, failure, f"completion {number} of the batch")
            self._answers.append((question.reward, number, answer))

    def _fill(self) -> None:
        """Replaces workers that died while idle, and starts those that are missing."""
        for worker in [
            worker for worker in self._workers if worker.idle and wait([worker.wire.fileno()], 0)
        ]:
            self._stop(worker)
        try:
            while len(self._workers) < self._count:
                self._workers.append(_Worker(self._greeting, self._timeout))
        except OSError as error:
            logger.error("a reward worker cannot be started: %s", error)

    def _stop(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        worker.stop()


class _Worker:
    """A process, the wire to it, the completions it has not answered yet, and its deadline."""

    def __init__(self, greeting: dict[str, object], timeout: float) -> None:
        self.wire = Wire(timeout)
        self.timeout = timeout
        self.starting = True
        self.deadline = time.monotonic() + STARTUP_SECONDS
        self.question = _Question(0, (), 0, {}, None)
        self.pending = deque[tuple[int, str]]()  # (completion, the token of its question)
        self.signatures: list[Signature] = []
        self.pid = 0  # known when it has loaded
        self.resident = 0  # bytes of memory at that time
        self.graded = 0  # completions since that time
        # No accelerator for graders; and the same string hashes, hence sympy's orders, in every
        # run. A session of its own: Ctrl-C does not reach it. What it prints goes to our stderr.
        # The process is the worker's subreaper.
        environment = {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONHASHSEED": "0",
            _IS_WORKER: "1",
        }
        with self.wire.worker_end as worker_end:
            self.process = subprocess.Popen(
                launch.command("jaxrft.rewards.worker", str(worker_end.fileno()), str(os.getpid())),
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=os.environ | environment,
                start_new_session=True,
            )
        self.token = secrets.token_hex(16)
        self._send(greeting | {"token": self.token})

    @property
    def idle(self) -> bool:
        """Checks whether the worker has loaded the rewards and owes no answer."""
        return not (self.starting or self.pending)

    @property
    def should_recycle(self) -> bool:
        """Checks whether the worker is idle, and so old or so large that it should be replaced."""
        return self.idle and (
            self.graded >= RECYCLE_GRADINGS or _resident(self.pid) > self.resident + RECYCLE_BYTES
        )

    def send(self, question: _Question) -> None:
        """Asks for one reward of a few completions."""
        self.question = question
        numbers = question.numbers
        self.pending = deque((i, secrets.token_hex(16)) for i in numbers)
        self.deadline = time.monotonic() + self.timeout
        state = question.state
        arguments = question.arguments.items()
        self._send(
            {
                "reward": question.reward,
                "tokens": list(self.pending),
                "trainer_state": None if state is None else dict(state),
                "keywords": {name: [values[i] for i in numbers] for name, values in arguments},
            }
        )

    def _send(self, message: dict[str, object]) -> None:
        with suppress(OSError):  # a dead or stopped worker shows when it does not answer
            self.wire.send(message)

    def receive(self) -> tuple[list[tuple[int, int, Answer]], str | None]:
        """Receives the answers that have come, as (reward, completion, answer), and any failure.

        The failure is "timeout" or "crash" of a grading worker, a sentence of a starting one. Only
        an answer moves the deadline: other lines of a worker, however frequent, do not.
        """
        answers: list[tuple[int, int, Answer]] = []
        try:
            for line in self.wire.receive() if wait([self.wire.fileno()], 0) else ():
                if self.starting:
                    if failure := self._receive_greeting(parse_greeting(line, self.token)):
                        return [], failure
                else:
                    number, answer = self._answer(line)
                    question = self.question
                    answers.append((question.reward, question.first + number, answer))
        except EOFError:
            return answers, "the worker process died" if self.starting else "crash"
        except Garbled:  # a grader wrote on the wire
            return answers, (
                "something else than the worker wrote on its socket"
            ) if self.starting else "crash"
        if not self.idle and time.monotonic() > self.deadline:
            return answers, (
                f"it takes more than {STARTUP_SECONDS:g} s"
            ) if self.starting else "timeout"
        return answers, None

    def _answer(self, line: bytes) -> tuple[int, Answer]:
        """Parses the number of the completion and the answer in a line.

        Raises Garbled when the line does not answer the oldest question.
        """
        if not self.pending:
            raise Garbled
        number, token = self.pending[0]
        answer = parse_answer(line, number, token)
        self.pending.popleft()
        self.graded += 1
        self.deadline = time.monotonic() + self.timeout
        return number, answer

    def _receive_greeting(self, message: dict[str, object]) -> str | None:
        """Records what a worker sends before and after it loads the rewards.

        Returns the error if it cannot load them.
        """
        match message:
            case {"pid": int(pid)}:
                self.pid = pid
            case {"error": str(error)}:
                return error
            case {"signatures": list(signatures)}:
                self.signatures = [Signature(*signature) for signature in signatures]
                self.resident = _resident(self.pid)
                self.starting = False
            case _:
                raise Garbled
        return None

    def stop(self) -> None:
        """Has the subreaper kill the worker and every process that it started."""
        self.process.send_signal(END)
        deadline = time.monotonic() + STOP_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            self.process.send_signal(signal.SIGCONT)  # a grader may have stopped it
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
        if self.process.returncode is None:
            logger.error("processes that a reward started cannot be killed")
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.wire.close()


def _resident(pid: int) -> int:
    """Reads the bytes of memory that a process holds; 0 where there is no /proc."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _wait_for(workers: Sequence[_Worker], end: float = math.inf) -> None:
    """Waits until one of the workers has answered, died, or is out of time, at most until `end`."""
    end = min([end, *(worker.deadline for worker in workers)])
    wait([worker.wire.fileno() for worker in workers], max(0.0, end - time.monotonic()))


def _search_path(added: Sequence[str], *, with_current_directory: bool) -> list[str]:
    """Returns the module search path of workers: that of this process, the folders `added`, and the
    current directory last or not at all.

    Last, so that no file of the current directory takes the place of a module that is installed.
    Built-in rewards need nothing of it, and what they import looks for modules that may be absent,
    such as gmpy2.
    """
    current = os.getcwd()
    paths = dict.fromkeys(os.path.abspath(path) for path in sys.path)
    others = [path for path in paths if os.path.realpath(path) != current]
    return [*others, *added, current] if with_current_directory else [*others, *added]


def _as_in_trl(prompt: object, completion: object) -> object:
    """Returns the assistant's message with the completion if the prompt is a list of messages, else
    the completion.
    """
    is_conversation = isinstance(prompt, list) and len(prompt) > 0 and isinstance(prompt[0], dict)
    if not is_conversation or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def _check(given: Mapping[str, Sequence[object]]) -> None:
    """Raises InputError for lists of unequal length or with values that JSON has not."""
    n = len(given["completions"])
    for name, values in given.items():
        if len(values) != n:
            raise InputError(
                f"column {name} has {len(values)} values for {n} completions: give one for each"
            )
        try:
            json.dumps(list(values))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"column {name} cannot be sent to reward workers: {error}; use plain values"
            ) from error
