"""The rewards `gym`, the score that reasoning_gym gives an answer, and `gym_solved`, 1 where that
is 1.

Scorers of reasoning_gym evaluate answers: they run in a sandbox, see `sandbox.py` and
`inside/gym.py`. It is kept for as long as it answers, since importing reasoning_gym takes longer
than most scorings; each scoring has a process of its own.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrft.errors import Missing
from jaxrft.host.installation import install_command
from jaxrft.rewards import sandbox as sandboxes
from jaxrft.rewards.answers import last_answer
from jaxrft.rewards.functions import Completion, text_of
from jaxrft.rewards.sandbox import (
    START_SECONDS,
    Ended,
    Kind,
    Limits,
    Sandbox,
    check,
    check_kind,
    request,
)


class GymReward:
    """Scores answers to tasks of `gym:NAME`; a reward as TRL's trainer calls it.

    `seconds` bound a scoring, and should stay 2 below the config's `reward_timeout`; `cpu_seconds`
    bound its processor time. `sandbox="none"` scores as this user, with its files and its network.
    `all_or_nothing` gives 1 where the score is 1, else 0.
    """

    def __init__(
        self,
        *,
        sandbox: Kind = "bubblewrap",
        seconds: float = 6.0,
        cpu_seconds: int = 4,
        memory_bytes: int = 1 << 30,
        all_or_nothing: bool = False,
    ) -> None:
        """Starts nothing yet."""
        check_kind(sandbox)
        self._kind: Kind = sandbox
        self._limits = Limits(
            cpu_seconds=cpu_seconds,
            wall_seconds=seconds,
            memory_bytes=memory_bytes,
            file_bytes=1 << 20,
            processes=8,
            output_bytes=1000,
        )
        self._all_or_nothing = all_or_nothing
        self._packages: list[str] = []
        self._sandbox: Sandbox | None = None

    def start_in_worker(self) -> None:
        """Raises Missing, with the remedy, where reasoning_gym or a sandbox cannot be had."""
        check(self._kind, self._limits)
        self._packages = package_folders()
        self._sandbox = self._open()

    def close(self) -> None:
        """Ends the sandbox."""
        if self._sandbox is not None:
            self._sandbox.close()
        self._sandbox = None

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence[Completion],
        *,
        answer: Sequence,
        **columns: Any,
    ) -> list[float | None]:
        """Returns the score of the text in the last `<answer>` of each completion, 0 without one.

        It is None where `answer` is no task of the source `gym:NAME`.
        """
        return [
            self._grade(text_of(completion), truth)
            for completion, truth in zip(completions, answer, strict=True)
        ]

    def _grade(self, completion: str, truth: object) -> float | None:
        if not isinstance(truth, Mapping) or not isinstance(truth.get("gym"), str):
            return None
        text = last_answer(completion)
        if text is None:
            return 0.0
        score = self._score(text, truth)
        return float(score == 1) if self._all_or_nothing else score

    def _score(self, text: str, truth: Mapping) -> float:
        """Returns what the scorer says, and 0 where it breaks a limit."""
        sandbox = self._sandbox or self._open()
        self._sandbox = None  # unless it ends well
        try:
            self._prepare(sandbox, self._request(truth, [text]))
            line = sandbox.receive(time.monotonic() + 2 * self._limits.wall_seconds)
        except Ended:
            sandbox.close()
            return 0.0
        except BaseException:
            sandbox.close()
            raise
        self._sandbox = sandbox
        return _number(line)

    def _open(self) -> Sandbox:
        """Starts a sandbox and waits until it has imported reasoning_gym."""
        if not self._packages:
            self._packages = package_folders()
        sandbox = Sandbox(self._kind, self._limits, self._packages)
        try:
            sandbox.wait_until_ready()
            self._prepare(sandbox, self._request({}, []))
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def _request(self, truth: Mapping, inputs: list[str]) -> bytes:
        return request(
            mode="gym",
            path=sandboxes.path(self._kind, self._packages),
            dataset=truth.get("gym"),
            config=truth.get("config"),
            entry=truth.get("entry"),
            inputs=inputs,
            limits=self._limits._asdict(),
        )

    @staticmethod
    def _prepare(sandbox: Sandbox, line: bytes) -> None:
        """Sends a request and waits for its data set; raises RuntimeError with what failed."""
        end = time.monotonic() + START_SECONDS
        try:
            sandbox.send(line, end)
            line = sandbox.receive(end)
        except Ended:
            raise RuntimeError("a sandbox ended before it scored: is memory short?") from None
        if line != b"ready":
            failure = bytes.fromhex(line.decode()).decode(errors="replace")
            raise RuntimeError(f"reasoning_gym fails: {failure}")


def package_folders() -> list[str]:
    """Returns the folders with reasoning_gym and what it imports; raises Missing without it."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise Missing(
            f"the reward gym needs the package reasoning-gym: {install_command('gym')}, or leave "
            "gym out of the rewards"
        )
    own = os.path.dirname(os.path.realpath(spec.submodule_search_locations[0]))
    installed = [
        os.path.realpath(folder)
        for folder in sys.path
        if os.path.basename(folder) in ("site-packages", "dist-packages") and os.path.isdir(folder)
    ]
    return list(dict.fromkeys([own, *installed]))


def _number(line: bytes) -> float:
    """Returns the score in a line of a sandbox, 0 where it has none."""
    try:
        score = float(bytes.fromhex(line.decode()).decode())
    except ValueError:
        return 0.0
    return score if 0 <= score <= 1 else 0.0


gym = GymReward()
gym_solved = GymReward(all_or_nothing=True)
