"""The rewards `code`, the fraction of a task's tests that a program passes, and `code_solved`, 1
where it passes all of them.

A program runs in a sandbox and its tests elsewhere, see `sandbox.py` and `inside/judge.py`: inputs
go into its sandbox, outputs come out, and are compared here; `assert` statements run in a second
sandbox, in which no model's program ever runs, and ask the first one for what functions return.
What a program writes, patches, kills or exits with can be a wrong answer, but never a verdict.
"""

import ast
import functools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from jaxrft.errors import InputError, Missing
from jaxrft.rewards import code_tests
from jaxrft.rewards.code_tests import Asserts, Calls, Programs
from jaxrft.rewards.functions import Completion, text_of
from jaxrft.rewards.inside import plain
from jaxrft.rewards.sandbox import (
    Ended,
    Kind,
    Limits,
    Sandbox,
    check,
    check_kind,
    compiler,
    request,
)

logger = logging.getLogger(__name__)

Language = Literal["python", "cpp"]

# words behind a fence, or in a task's column `language`
_LANGUAGES: Mapping[str, Language] = {
    "python": "python",
    "python3": "python",
    "py": "python",
    "cpp": "cpp",
    "c++": "cpp",
    "cc": "cpp",
}
_DEAD = json.dumps({"error": ["TimeoutError", "the program has ended"]}).encode()


class Program(NamedTuple):
    """Holds a program that a model wrote."""

    source: str
    language: Language


class CodeReward:
    """Runs programs against tests; a reward as TRL's trainer calls it.

    `seconds` bound a completion, and should stay 2 below the config's `reward_timeout`, since what
    is lost there is no reward of 0; `test_seconds` bound the processor time of one test.
    `sandbox="none"` runs what a model wrote as this user, with its files and its network.
    `all_or_nothing` gives 1 where all tests are passed, else 0. `languages` are those of programs
    for tasks whose column `language` names none. Raises InputError for others.
    """

    def __init__(
        self,
        *,
        sandbox: Kind = "bubblewrap",
        seconds: float = 8.0,
        test_seconds: int = 4,
        memory_bytes: int = 1 << 30,
        file_bytes: int = 16 << 20,
        processes: int = 32,
        all_or_nothing: bool = False,
        languages: Sequence[Language] = ("python",),
    ) -> None:
        """Starts nothing yet."""
        check_kind(sandbox)
        if not languages or not set(languages) <= set(get_args(Language)):
            raise InputError(
                f'languages is {languages!r}: give ("python",), ("cpp",) or ("python", "cpp")'
            )
        self._kind: Kind = sandbox
        self._seconds = seconds
        self._limits = Limits(
            cpu_seconds=test_seconds,
            wall_seconds=seconds,
            memory_bytes=memory_bytes,
            file_bytes=file_bytes,
            processes=processes,
            output_bytes=0,
        )
        self._all_or_nothing = all_or_nothing
        self._languages = tuple(languages)
        self._spare: Sandbox | None = None  # one that starts while another is used
        self._judge: Sandbox | None = None  # kept, for no model's program runs in it

    def start_in_worker(self) -> None:
        """Raises Missing, with the remedy, where no sandbox or no compiler can be had."""
        check(self._kind, self._limits)
        if "cpp" in self._languages and compiler(self._kind) is None:
            raise Missing(
                "programs in C++ need g++, which is not installed: install it (apt-get install "
                'g++), or leave "cpp" out of the languages of CodeReward'
            )
        self._spare = Sandbox(self._kind, self._limits)

    def close(self) -> None:
        """Closes the sandboxes that are kept for later programs."""
        for sandbox in (self._spare, self._judge):
            if sandbox is not None:
                sandbox.close()
        self._spare = None
        self._judge = None

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence[Completion],
        *,
        answer: Sequence | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Returns the fraction of tests that the last program of each completion passes.

        It is None where a task has no tests, see `code_tests.read`, or is one of C++ and there is
        no compiler; it is 0 without a program.
        """
        rewards = []
        for i, completion in enumerate(completions):
            row = {name: values[i] for name, values in columns.items() if _is_column(values)}
            gold = None if answer is None else answer[i]
            rewards.append(self._grade(text_of(completion), gold, row))
        return rewards

    def _grade(self, completion: str, answer: object, row: Mapping[str, object]) -> float | None:
        tests = code_tests.read(answer, row)
        if tests is None:
            return None
        languages = self._languages_of(tests, row)
        if "cpp" in languages and compiler(self._kind) is None:
            _warn_without_compiler()
            return None
        program = last_program(completion, languages)
        if program is None:
            return 0.0
        sandbox = self._take()
        try:
            end = time.monotonic() + self._seconds
            match tests:
                case Programs():
                    passed, total = self._run_programs(sandbox, program, tests, end)
                case Calls():
                    passed, total = self._run_calls(sandbox, program.source, tests, end)
                case Asserts():
                    passed, total = self._run_asserts(sandbox, program.source, tests, end)
        finally:
            sandbox.close()
        if self._all_or_nothing:
            return float(0 < total == passed)
        return passed / total if total else 0.0

    def _languages_of(
        self, tests: code_tests.Tests, row: Mapping[str, object]
    ) -> tuple[Language, ...]:
        """Returns the languages in which a task takes programs, that of blocks without one first.

        C++ can be run on inputs alone.
        """
        if not isinstance(tests, Programs):
            return ("python",)
        language = _LANGUAGES.get(str(row.get("language")).lower())
        return self._languages if language is None else (language,)

    def _take(self) -> Sandbox:
        """Returns a sandbox that is ready, and starts the next one."""
        sandbox = self._spare or Sandbox(self._kind, self._limits)
        self._spare = None
        try:
            sandbox.wait_until_ready()
            self._spare = Sandbox(self._kind, self._limits)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def _run_programs(
        self, sandbox: Sandbox, program: Program, tests: Programs, end: float
    ) -> tuple[int, int]:
        longest = max(len(output.encode(errors="replace")) for output in tests.outputs)
        fields: dict[str, Any] = {"mode": "programs"}
        if program.language == "cpp":
            compile_limits = self._limits._replace(cpu_seconds=math.ceil(self._seconds))
            fields = {
                "mode": "cpp",
                "compiler": compiler(self._kind),
                "compile_limits": compile_limits._asdict(),
            }
        outputs = self._outputs(
            sandbox, end, longest, source=program.source, inputs=tests.inputs, **fields
        )
        pairs = zip(outputs, tests.outputs, strict=False)
        passed = sum(
            output is not None and code_tests.same_output(output, expected)
            for output, expected in pairs
        )
        return passed, len(tests.outputs)

    def _run_calls(
        self, sandbox: Sandbox, program: str, tests: Calls, end: float
    ) -> tuple[int, int]:
        longest = max(len(json.dumps(output)) for output in tests.outputs)
        outputs = self._outputs(
            sandbox,
            end,
            8 * longest,
            mode="calls",
            source=program,
            function=tests.function,
            inputs=[json.dumps(plain.encode(arguments)) for arguments in tests.arguments],
        )
        pairs = zip(outputs, tests.outputs, strict=False)
        passed = sum(_is_result(output, expected) for output, expected in pairs)
        return passed, len(tests.outputs)

    def _outputs(
        self, sandbox: Sandbox, end: float, longest: int, **fields: Any
    ) -> list[str | None]:
        """Returns the outputs of all inputs that were run in time."""
        limits = self._limits._replace(output_bytes=2 * longest + (1 << 16))
        outputs: list[str | None] = []
        try:
            sandbox.send(request(limits=limits._asdict(), **fields), end)
            while len(outputs) < len(fields["inputs"]):
                line = sandbox.receive(end, 2 * limits.output_bytes + 1000)
                outputs.append(_output(line))
        except Ended:
            pass
        return outputs

    def _run_asserts(
        self, sandbox: Sandbox, program: str, tests: Asserts, end: float
    ) -> tuple[int, int]:
        """Runs the tests in the judge's sandbox, whose questions the program's sandbox answers."""
        judge = self._judge or Sandbox(self._kind, self._limits)
        self._judge = None  # unless it ends well
        judge.wait_until_ready()
        limits = self._limits._replace(cpu_seconds=math.ceil(self._seconds))._asdict()
        source = f"{tests.prefix}\n{program}"
        is_alive = True
        try:
            try:
                sandbox.send(
                    request(
                        mode="serve", source=source, classes=_classes(tests.prefix), limits=limits
                    ),
                    end,
                )
                sandbox.receive(end)
            except Ended:
                is_alive = False
            judge.send(
                request(mode="judge", prefix=tests.prefix, tests=tests.statements, limits=limits),
                end,
            )
            while True:
                message = json.loads(judge.receive(end))
                if "verdict" in message:
                    break
                answer = _DEAD
                if is_alive:
                    try:
                        sandbox.send(json.dumps(message["ask"]).encode(), end)
                        answer = sandbox.receive(min(end, time.monotonic() + self._seconds / 2))
                    except Ended:
                        is_alive = False
                judge.send(answer, end)
            passed, total = message["verdict"]
            judge.receive(end)  # it has ended what it ran
        except (Ended, ValueError, KeyError):
            judge.close()
            return 0, 1
        except BaseException:
            judge.close()
            raise
        self._judge = judge
        return passed, total


def _is_column(values: object) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)


def _output(line: bytes) -> str | None:
    """Returns the output in an answer of a sandbox, which a program may have written itself."""
    try:
        return bytes.fromhex(line.decode()).decode("utf-8", "surrogateescape")
    except ValueError:
        return None


def _is_result(output: str | None, expected: object) -> bool:
    if output is None:
        return False
    try:
        return code_tests.same_result(plain.decode(json.loads(output)), expected)
    except (ValueError, RecursionError):
        return False


def _classes(prefix: str) -> list[str]:
    """Returns the names of the classes that a prefix defines at its top level."""
    try:
        body = ast.parse(prefix).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [node.name for node in body if isinstance(node, ast.ClassDef)]


@functools.cache
def _warn_without_compiler() -> None:
    """Says once why tasks of C++ have no reward."""
    logger.warning(
        "tasks of C++ have no reward: g++ is not installed, so install it (apt-get install g++)"
    )


def last_program(completion: str, languages: Sequence[Language] = ("python",)) -> Program | None:
    """Returns the last closed block between fences of one of these languages, not of thoughts.

    A block of no language counts, as one of the first, where no other does.
    """
    text = completion.rpartition("</think>")[2]
    programs: dict[bool, Program] = {}
    fence = ""
    word = ""
    block: list[str] = []
    for line in text.split("\n"):
        stripped = line.strip()
        marks = _marks(stripped)
        if not fence and marks:
            fence = marks
            words = stripped[len(marks) :].split()
            word = words[0].lower() if words else ""
            block = []
        elif fence and marks and stripped == marks and marks.startswith(fence):
            language = _LANGUAGES.get(word) if word else languages[0]
            if language is not None and language in languages:
                programs[word != ""] = Program("\n".join(block), language)
            fence = ""
        elif fence:
            block.append(line)
    return programs.get(True, programs.get(False))


def _marks(line: str) -> str:
    """Returns the fence that a line begins with, three or more of one mark."""
    for mark in "`~":
        count = len(line) - len(line.lstrip(mark))
        if count >= 3:
            return mark * count
    return ""


code = CodeReward()
code_solved = CodeReward(all_or_nothing=True)
