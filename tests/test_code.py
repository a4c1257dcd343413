"""The reward `code`: what it runs, in which columns it finds tests, and that it refuses to run
without a sandbox.
"""

import json
import os
import time

import pytest

from jaxrft.errors import InputError, Missing
from jaxrft.rewards import Pool, code_tests
from jaxrft.rewards.code import CodeReward, last_program
from jaxrft.rewards.code_tests import Asserts, Calls, Programs
from jaxrft.rewards.inside import judge, plain
from tests import sandboxes
from tests.sandboxes import needs_bubblewrap


@pytest.fixture(scope="module")
def grade():
    """Grades one program with the fraction as its reward."""
    reward = CodeReward(seconds=30.0)
    reward.start_in_worker()

    def graded(program, answer, **columns):
        text = f"It is easy.\n```python\n{program}\n```\n"
        rows = {name: [value] for name, value in columns.items()}
        return reward([""], [text], answer=[answer], **rows)[0]

    yield graded
    reward.close()


ADD = {"functional": "assert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(5, 5) == 10\n"}
DOUBLE = {"inputs": ["1\n", "2\n", "3\n"], "outputs": ["2\n", "4\n", "6\n"]}
TREE = """
from typing import *
class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right
def tree(values):
    return TreeNode(values[0], TreeNode(values[1]), TreeNode(values[2]))
"""


@needs_bubblewrap
def test_program_earns_the_fraction_of_inputs_with_the_right_output(grade):
    assert grade("print(2 * int(input()))", json.dumps(DOUBLE)) == 1.0
    assert grade("print(4)", DOUBLE) == pytest.approx(1 / 3)
    assert grade("import sys\nprint(2 * int(input()))\nsys.exit(0)", DOUBLE) == 1.0
    assert grade("import sys\nprint(2 * int(input()))\nsys.exit(1)", DOUBLE) == 0.0
    assert grade("print(", DOUBLE) == 0.0


@needs_bubblewrap
def test_program_reads_its_input_in_every_way(grade):
    ways = [
        "import sys; print(2 * int(sys.stdin.readline()))",
        "import sys; print(2 * int(sys.stdin.buffer.read()))",
        "print(2 * int(open(0).read()))",
        "import os; os.write(1, b'%d' % (2 * int(os.read(0, 100))))",
        "import fileinput\nfor line in fileinput.input(): print(2 * int(line))",
        "import atexit\nx = int(input())\natexit.register(lambda: print(2 * x))",
    ]
    for way in ways:
        assert grade(way, DOUBLE) == 1.0, way


@needs_bubblewrap
def test_input_may_be_larger_than_a_file_that_a_program_may_write(grade):
    text = "1 " * (10 << 20)
    answer = {"inputs": [text], "outputs": [str(10 << 20)]}
    assert grade("print(len(input().split()))", answer) == 1.0


@needs_bubblewrap
def test_function_earns_the_fraction_of_calls_with_the_right_result(grade):
    answer = {"fn_name": "f", "inputs": [[[3, 1]], [[2]]], "outputs": [[1, 3], [[2]]]}
    assert grade("def f(x): return sorted(x)", answer) == 1.0
    assert grade("class Solution:\n    def f(self, x): return tuple(sorted(x))", answer) == 1.0
    assert grade("def f(x): return x", answer) == 0.5
    assert grade("def g(x): return x", answer) == 0.0


@needs_bubblewrap
def test_asserts_count_one_by_one(grade):
    assert grade("def add(a, b): return a + b", json.dumps(ADD)) == 1.0
    assert grade("def add(a, b): return 4 if a == 2 else 10", ADD) == pytest.approx(2 / 3)
    assert grade("def add(a, b):\n    if a == 2: raise ValueError\n    return a + b", ADD) == (
        pytest.approx(2 / 3)
    )
    assert grade("def other(a, b): return a + b", ADD) == 0.0


@needs_bubblewrap
def test_human_eval_and_mbpp_columns_are_graded(grade):
    human = {
        "test": "METADATA = {}\ndef check(candidate):\n    assert candidate([1, 2]) == {1: 2}\n"
        "    assert abs(candidate([1, 0.5])[1] - 0.5) < 1e-6\n",
        "entry_point": "pair",
    }
    assert grade("def pair(x): return {x[0]: x[1]}", human) == 1.0
    mbpp = {"test_list": ["assert sum(10, 15) == 6"], "test_setup_code": ""}
    solution = (
        "from builtins import sum as total\ndef sum(a, b):\n"
        "    return total(i for i in range(1, a) if a % i == b % i == 0)"
    )
    assert grade(solution, mbpp) == 1.0
    assert grade("pass", mbpp) == 0.0
    assert grade("def sum(a, b): return 6", None, **mbpp) == 1.0


@needs_bubblewrap
def test_trees_of_leetcode_pass_between_tests_and_program(grade):
    tests = (
        "def check(candidate):\n    root = candidate(root=tree([1, 2, 3]))\n"
        "    assert (root.left.val, root.right.val) == (3, 2)\ncheck(Solution().invert)"
    )
    program = (
        "class Solution:\n    def invert(self, root: Optional[TreeNode]):\n"
        "        root.left, root.right = root.right, root.left\n        return root"
    )
    columns = {"extra_info": {"prefix": TREE}}
    assert grade(program, {"functional": tests}, **columns) == 1.0
    lazy = program.replace("root.right, root.left\n", "root.left, root.right\n")
    assert grade(lazy, {"functional": tests}, **columns) == 0.0


@needs_bubblewrap
def test_objects_iterators_and_exceptions_of_the_program_are_asked(grade):
    program = (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)\n"
        "def evens(n):\n    for i in range(0, n, 2): yield i\n"
        "def order(x): x.sort()\n"
    )
    tests = (
        "s = Stack()\ns.push(1)\ns.push((2, 'b'))\nassert len(s) == 2\nassert s.pop() == (2, 'b')\n"
        "assert s.items == [1]\nassert list(evens(6)) == [0, 2, 4]\n"
        "values = [3, 1]\norder(values)\nassert values == [1, 3]\n"
        "s.pop()\ntry:\n    s.pop()\n    assert False\nexcept IndexError:\n    assert True\n"
    )
    assert grade(program, tests) == 1.0


@needs_bubblewrap
def test_tasks_without_tests_have_no_reward_and_answers_without_a_program_earn_0(grade):
    for answer in (None, "42", "", "def f(): pass", "{}", {"inputs": [], "outputs": []}, 7):
        assert grade("print(1)", answer) is None
    reward = CodeReward()
    try:
        assert reward([""], ["I do not know."], answer=[DOUBLE]) == [0.0]
    finally:
        reward.close()


@needs_bubblewrap
def test_code_and_code_solved_are_rewards_of_the_pool():
    texts = ["```python\nprint(2 * int(input()))\n```", "```\nprint(4)\n```", "none"]
    answers = [json.dumps(DOUBLE)] * 3
    with Pool([("code", "code"), ("code_solved", "code_solved")], workers=1, timeout=60.0) as pool:
        graded = pool.grade([""] * 3, texts, {"answer": answers})
    assert graded.rewards == [[1.0, pytest.approx(1 / 3), 0.0], [1.0, 0.0, 0.0]]
    assert not graded.lost


@needs_bubblewrap
def test_rewards_of_a_mixture_apply_to_their_own_tasks():
    """A task of mathematics, two of code, a zebra puzzle and one of reasoning_gym."""
    zebra = {"header": ["a"], "rows": [["2"]]}
    gym = {"gym": "chain_sum", "config": {}, "entry": ["2"]}
    answers = ["2", json.dumps(DOUBLE), [{"input": "2", "output": "2"}], zebra, gym]
    names = ("code", "logic", "gsm8k", "number")
    with Pool([(name, name) for name in names], workers=1, timeout=60.0) as pool:
        graded = pool.grade([""] * 5, ["2"] * 5, {"answer": answers})
    assert graded.rewards == [
        [None, 0.0, 0.0, None, None],
        [None, None, None, 0.0, None],
        [1.0, None, None, None, None],
        [1.0, None, None, None, None],
    ]


def test_without_bubblewrap_the_run_does_not_start_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match="bubblewrap, which is not installed: install it") as error:
        Pool([("code", "code")], workers=1)
    assert str(error.value).startswith("rewards code do not load: the rewards code and gym run")
    assert "\n" not in str(error.value)
    assert 'CodeReward(sandbox="none")' in str(error.value)


def test_bubblewrap_that_may_not_work_is_named_with_its_error(tmp_path, monkeypatch):
    program = tmp_path / "bwrap"
    program.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    message = "No permissions to create new namespace.: allow user"
    with pytest.raises(Missing, match=message) as error:
        Pool([("code", "code")], workers=1)
    assert str(error.value).endswith('GymReward(sandbox="none")')


def test_no_sandbox_is_used_only_if_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    reward = CodeReward(sandbox="none")
    try:
        reward.start_in_worker()
        text = "```python\nprint(2 * int(input()))\n```"
        assert reward([""], [text], answer=[DOUBLE]) == [1.0]
    finally:
        reward.close()
    with pytest.raises(InputError, match='it must be "bubblewrap" or "none"'):
        CodeReward(sandbox="docker")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a"),
        ("```python\na\n```\ntext\n```py\nb\nc\n```", "b\nc"),
        ("```python\na\n```\nprints\n```\n7\n```", "a"),
        ("```\na\n```", "a"),
        ("```cpp\na\n```", None),
        ("```python\na\n```\n```cpp\nb\n```", "a"),
        ("<think>```python\na\n```</think>\n```python\nb\n```", "b"),
        ("<think>```python\na\n```</think> done", None),
        ("```python\na", None),
        ("print(1)", None),
        ("  ```python\n  a\n  ```", "  a"),
        ("~~~python\n```\n~~~", "```"),
    ],
)
def test_last_fenced_block_of_python_is_the_program(completion, program):
    found = last_program(completion)
    assert (found and found.source) == program


def test_fences_are_read_in_linear_time():
    start = time.monotonic()
    last_program("```python x\n" * 100_000)
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        (DOUBLE, Programs(DOUBLE["inputs"], DOUBLE["outputs"])),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, Programs(["1\n2"], ["3"])),
        (
            {"fn_name": "f", "inputs": ["[1]\n2"], "outputs": ["3"]},
            Calls("f", [[[1], 2]], [3]),
        ),
        ([{"input": "1", "output": "2", "type": "stdin_stdout"}], Programs(["1"], ["2"])),
        (
            [{"input": [1], "output": [2], "type": "function_call", "fn_name": "f"}],
            Calls("f", [[1]], [[2]]),
        ),
        (
            [{"input": "1", "output": "2", "metadata": {"func_name": "f"}}],
            Calls("f", [[1]], [2]),
        ),
        (
            {
                "public_tests": {"input": ["1"], "output": ["2"]},
                "private_tests": {"input": ["3"], "output": ["4"]},
            },
            Programs(["1", "3"], ["2", "4"]),
        ),
        ({"input_output": json.dumps(DOUBLE)}, Programs(DOUBLE["inputs"], DOUBLE["outputs"])),
        ({"functional": "assert f(1)"}, Asserts("assert f(1)", "")),
        (["assert f(1)", "assert f(2)"], Asserts("assert f(1)\nassert f(2)", "")),
        (
            {"test": "def check(c):\n    assert c(1)", "entry_point": "f"},
            Asserts("def check(c):\n    assert c(1)\n\ncheck(f)", ""),
        ),
        ({"functional": "self.assertEqual(1, 1)"}, None),
        ({"functional": "import numpy as np\nassert f(1)"}, None),
        ({"functional": "def g():\n    from scipy.stats import norm\nassert f(1)"}, None),
    ],
)
def test_tests_are_found_in_the_columns_of_data_sets(answer, tests):
    assert code_tests.read(answer, {}) == tests
    assert code_tests.read(json.dumps(answer), {}) == tests


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n\n3", "1 2\n3\n", True),
        ("1 2 3", "1 2\n3", False),
        ("0.3333333", "0.33333333", True),
        ("0.3334", "0.3333", False),
        ("3", "3.0", True),
        ("3.0", "3", False),
        ("", "1", False),
        ("nan", "nan", True),
        ("Yes 3\nno", "YES 3\nNO", True),
        ("Yes", "NO", False),
        ("alice", "Alice", False),
        ("nan", "1.0", False),
        ("1" * 5000, "1.5", False),
    ],
)
def test_outputs_are_compared_word_by_word(output, expected, same):
    assert code_tests.same_output(output, expected) == same


@pytest.mark.parametrize(
    ("result", "expected", "same"),
    [
        ((1, [2]), [1, [2]], True),
        ({1: 2}, {"1": 2}, True),
        (True, 1, False),
        (1, True, False),
        (0.1 + 0.2, 0.3, True),
        (3, [3], True),
        ("3", 3, False),
        (10**400, 0.5, False),
        (float("nan"), 1.0, False),
        ({1: 2, "1": 3}, {"1": 3}, False),
    ],
)
def test_results_are_compared_as_json_spells_them(result, expected, same):
    assert code_tests.same_result(result, expected) == same


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, -2.5, "é\ud800", True, 10**50],
        {"a": [(1, {2}), frozenset({(3,)})], (1, 2): b"x"},
        [complex(1, -2), range(1, 9, 2), bytearray(b"ab"), float("inf")],
    ],
)
def test_plain_values_survive_the_way_between_processes(value):
    assert plain.decode(json.loads(json.dumps(plain.encode(value)))) == value


def test_cycles_and_deep_nesting_survive():
    cycle: list = [1]
    cycle.append(cycle)
    back = plain.decode(plain.encode(cycle))
    assert isinstance(back, list) and back[1] is back
    deep: list = []
    for _ in range(20_000):
        deep = [deep]
    assert len(plain.encode(deep)) == 20_001
    plain.decode(plain.encode(deep))


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        7,
        [["list", [5]]],
        [["tuple", [0]]],
        [["tuple", [1]], ["tuple", [0]]],
        [["dict", [0]]],
        [["object", "os.system", []]],
        [["reference", 0]],
        [["unknown", 1]],
        [["Fraction", "1e999999999"]],
        [["set", [1]], ["list", []]],
        [["tuple"]],
        [[]],
        [["tuple", [n + 1]] for n in range(5000)] + [1],
    ],
)
def test_nodes_that_are_no_plain_value_are_refused(nodes):
    with pytest.raises(plain.Unplain):
        plain.decode(nodes)


def test_tested_names_are_those_that_tests_do_not_define():
    def names(tests, defined=()):
        return judge.tested_names(judge.ast.parse(tests), set(defined))

    assert names("import math\nassert math.isclose(f(1), abs(x))") == ["f", "x"]
    assert names("assert Counter(f(1)) == Counter([1])") == ["f"]
    assert names("assert math.sqrt(4) == f(4)") == ["f"]
    assert names("assert copy([1]) == [1]") == ["copy"]
    assert names("def check(candidate):\n    assert candidate(1)\ncheck(f)") == ["f"]
    assert names("assert sum(1, 2) == 3") == ["sum"]
    assert names("assert g(f(1))", ["g"]) == ["f"]


@needs_bubblewrap
def test_closed_reward_leaves_no_process(monkeypatch):
    namespaces = sandboxes.record_namespaces(monkeypatch)
    reward = CodeReward(seconds=1.0)
    reward.start_in_worker()
    try:
        assert reward([""], ["```python\nwhile True: pass\n```"], answer=[DOUBLE]) == [0.0]
        assert reward([""], ["```python\nadd = max\n```"], answer=[ADD]) == [0.0]
    finally:
        reward.close()
    assert len(namespaces) == 3  # two programs and one judge
    assert sandboxes.wait_until_empty(namespaces) == []
