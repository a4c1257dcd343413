"""The reward `code` on programs in C++: which are compiled, what they earn, and what is said where
there is no compiler.
"""

import glob
import logging

import pytest

from jaxrft.errors import InputError, Missing
from jaxrft.rewards import code
from jaxrft.rewards.code import CodeReward, Program, last_program
from tests import attacks
from tests.sandboxes import needs_bubblewrap, needs_compiler

DOUBLE = {"inputs": ["1\n", "2\n", "3\n"], "outputs": ["2\n", "4\n", "6\n"]}
RIGHT = '#include <cstdio>\nint main() { int x; scanf("%d", &x); printf("%d\\n", 2 * x); }'


def _grade(reward, program, answer, fence="cpp", **columns):
    rows = {name: [value] for name, value in columns.items()}
    return reward([""], [f"```{fence}\n{program}\n```"], answer=[answer], **rows)[0]


@pytest.fixture(scope="module")
def grade():
    """Grades one program in C++ with the fraction as its reward."""
    reward = CodeReward(seconds=60.0, test_seconds=1, languages=("cpp",))
    reward.start_in_worker()
    yield lambda *arguments, **options: _grade(reward, *arguments, **options)
    reward.close()


@needs_bubblewrap
@needs_compiler
def test_program_earns_the_fraction_of_inputs_with_the_right_output(grade):
    assert grade(RIGHT, DOUBLE) == 1.0
    assert grade(RIGHT.replace("2 * x", "4"), DOUBLE, fence="c++") == pytest.approx(1 / 3)
    assert grade(RIGHT.replace("; }", "; return x == 3; }"), DOUBLE) == pytest.approx(2 / 3)


@needs_bubblewrap
@needs_compiler
def test_program_that_does_not_compile_earns_0(grade):
    assert grade(RIGHT + "}", DOUBLE) == 0.0
    assert grade("", DOUBLE) == 0.0
    assert grade("int f() { return 0; }", DOUBLE) == 0.0


@needs_bubblewrap
@needs_compiler
def test_memory_is_limited_and_deep_recursion_is_not(grade):
    memory = "#include <vector>\nint main() { std::vector<char> x(1ll << 31); }"
    assert grade(memory, {"inputs": [""], "outputs": [""]}) == 0.0
    assert grade(memory.replace("1ll << 31", "1 << 28"), {"inputs": [""], "outputs": [""]}) == 1.0
    deep = (
        "#include <cstdio>\nint f(int n) { volatile int x = n; return x ? f(x - 1) + 1 : 0; }\n"
        'int main() { volatile int n = 1000000; printf("%d", f(n)); }'
    )
    assert grade(deep, {"inputs": [""], "outputs": ["1000000"]}) == 1.0


@needs_bubblewrap
@needs_compiler
@pytest.mark.slow
def test_time_of_a_test_is_limited(grade):
    program = RIGHT.replace("printf", "for (volatile int y = x; y == 2;); printf")
    assert grade(program, DOUBLE) == pytest.approx(2 / 3)


@needs_compiler
def test_program_without_a_sandbox_leaves_no_file():
    reward = CodeReward(sandbox="none", seconds=60.0, languages=("cpp",))
    reward.start_in_worker()
    try:
        assert _grade(reward, RIGHT, DOUBLE) == 1.0
    finally:
        reward.close()
    assert glob.glob("/tmp/jaxrft-program-*") == []


@needs_compiler
@pytest.mark.parametrize("name", ["included file", "assembled file"])
def test_attack_that_reads_a_file_earns_where_there_is_no_sandbox(name, tmp_path):
    """Shows that these attacks, which earn nothing in a sandbox, would earn outside of one."""
    reward = CodeReward(sandbox="none", seconds=60.0, languages=("cpp",))
    program = attacks.cpp_program(name, tmp_path, 0)
    try:
        assert _grade(reward, program, {"inputs": [""], "outputs": [attacks.SECRET]}) == 1.0
    finally:
        reward.close()


def test_without_a_compiler_tasks_of_cpp_have_no_reward_and_one_sentence_says_why(
    monkeypatch, caplog
):
    monkeypatch.setattr(code, "compiler", lambda kind: None)
    code._warn_without_compiler.cache_clear()
    with caplog.at_level(logging.WARNING):
        rewards = [_grade(CodeReward(), RIGHT, DOUBLE, language="cpp") for _ in range(2)]
    assert rewards == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "tasks of C++ have no reward: g++ is not installed, so install it (apt-get install g++)"
    ]
    assert _grade(CodeReward(), RIGHT, DOUBLE) == 0.0  # a task of Python


@needs_bubblewrap
def test_a_reward_for_cpp_does_not_start_without_a_compiler(monkeypatch):
    monkeypatch.setattr(code, "compiler", lambda kind: None)
    with pytest.raises(Missing, match="need g.., which is not installed: install it"):
        CodeReward(languages=("python", "cpp")).start_in_worker()


@pytest.mark.parametrize("languages", [(), ("java",), ("python", "c++")])
def test_an_unknown_language_is_one_sentence(languages):
    with pytest.raises(InputError, match=r"languages is .*: give \(\"python\",\), "):
        CodeReward(languages=languages)


@needs_bubblewrap
@needs_compiler
def test_language_of_a_task_goes_before_those_of_the_reward():
    reward = CodeReward(seconds=60.0)
    reward.start_in_worker()
    try:
        assert _grade(reward, RIGHT, DOUBLE, language="C++") == 1.0
        assert _grade(reward, RIGHT, DOUBLE, language="en") == 0.0
    finally:
        reward.close()


def test_task_that_takes_no_cpp_gives_0_for_it():
    reward = CodeReward(languages=("python", "cpp"))
    assert _grade(reward, RIGHT, "assert f(1) == 2") == 0.0
    assert _grade(reward, RIGHT, {"fn_name": "f", "inputs": [[1]], "outputs": [2]}) == 0.0
    assert _grade(reward, RIGHT, DOUBLE, language="python") == 0.0
    assert _grade(CodeReward(), RIGHT, DOUBLE) == 0.0


@pytest.mark.parametrize(
    ("languages", "program"),
    [
        (("python",), Program("a", "python")),
        (("cpp",), Program("b", "cpp")),
        (("python", "cpp"), Program("b", "cpp")),
        (("cpp", "python"), Program("b", "cpp")),
    ],
)
def test_last_block_of_the_languages_is_the_program(languages, program):
    text = "```py\na\n```\n```CC\nb\n```\nprints\n```\n7\n```\n```java\nc\n```"
    assert last_program(text, languages) == program
    assert last_program("```\nd\n```", languages) == Program("d", languages[0])
