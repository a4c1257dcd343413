"""Rows as GURU's own scripts write them (data_preprocess of LLM360/Reasoning360): each is loaded
from a parquet file and graded by the reward of its domain.
"""

import json

import pytest

from jaxrft import tasks
from jaxrft.config import TasksConfig
from jaxrft.rewards.code import CodeReward
from jaxrft.rewards.logic import logic
from tests import writers
from tests.sandboxes import needs_bubblewrap

DEEP_EQUAL = """import math
def _deep_eq(a, b, tol=1e-5):
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=tol, abs_tol=tol)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return False
        return all(_deep_eq(x, y, tol) for x, y in zip(a, b))
    return a == b

for i, o in zip(_inputs, _outputs):
"""
LEETCODE_PREFIX = """import collections
from typing import *
from collections import *
inf = float('inf')
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next
def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head
def is_same_list(a, b):
    while a and b and a.val == b.val:
        a, b = a.next, b.next
    return not a and not b
"""
REVERSE = """class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""
LEETCODE = """def check(candidate):
    assert is_same_list(candidate(head = list_node([1, 2, 3])), list_node([3, 2, 1]))
    assert is_same_list(candidate(head = list_node([1])), list_node([1]))


check(Solution().reverse)"""
LIVECODEBENCH = """def check_isEven():
    assert Solution().isEven(4, [1]) == true
    assert Solution().isEven(5, [1]) == false

check_isEven()
"""
HUMANEVAL = """

METADATA = {'author': 'x'}


def check(candidate):
    assert candidate([1.0, 2.0], 0.5) == False
    assert candidate([1.0, 1.2], 0.5) == True


check(close)"""
PAIR = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
SUM = "print(sum(map(int, input().split())))"

# data_source -> (ground truth, prefix, program that solves the task, one that solves half of it)
CODE = {
    "codegen__leetcode2k": (
        {"functional": LEETCODE},
        LEETCODE_PREFIX,
        REVERSE,
        "class Solution:\n    def reverse(self, head): return head",
    ),
    "codegen__primeintellect": (
        {
            "functional": f"_inputs = [[3, 4], [5, 6]]\n_outputs = [[7], [11]]\n{DEEP_EQUAL}"
            "    assert _deep_eq(add(*i), o[0] if len(o) == 1 else tuple(o))\n"
        },
        None,
        "def add(a, b): return a + b",
        "def add(a, b): return 7",
    ),
    "codegen__taco": (
        {
            "functional": f"_inputs = [[3.0, 2], [5, 1]]\n_outputs = [[1.5], [5]]\n{DEEP_EQUAL}"
            "    assert _deep_eq(divide(*i), o[0])"
        },
        None,
        "def divide(a, b): return a / b",
        "def divide(a, b): return 5.0",
    ),
    "codegen__taco_stdio": (PAIR, None, SUM, "print(3)"),
    "codegen__livecodebench": (
        {"functional": LIVECODEBENCH},
        None,
        "class Solution:\n    def isEven(self, n, x): return n % 2 == 0",
        "class Solution:\n    def isEven(self, n, x): return True",
    ),
    "codegen__humaneval": (
        {"functional": HUMANEVAL},
        None,
        "from typing import List\ndef close(x: List[float], y: float): return x[1] - x[0] < y",
        "def close(x, y): return True",
    ),
    "codegen__mbpp": (
        {"functional": "import math\n\nassert area(1) == math.pi\nassert area(0) == 0\n"},
        None,
        "import math\ndef area(r): return math.pi * r",
        "def area(r): return 0",
    ),
}
ZEBRA = {"header": ["Position", "Job"], "rows": [["1", "plumber"], ["2", "carpenter"]]}
# data_source -> (ground truth, answer that is right, one that is wrong)
LOGIC = {
    "zebra_puzzle_dataset": (ZEBRA, json.dumps(ZEBRA), "{}"),
    "ordering_puzzle_dataset": (["owl", "blue jay"], "['owl', 'blue jay']", "['blue jay', 'owl']"),
    "graph_logical_dataset": ("fdebme", "fdebme", "fdebm"),
    "simulation__arcagi1": ([[0, 1], [2, 3]], "[[0, 1], [2, 3]]", "[[0, 1]]"),
    "simulation__barc": ([[7]], "[[7]]", "[[8]]"),
}


def _load(folder, source, truth, extra_info):
    row = {
        "data_source": source,
        "prompt": [{"role": "user", "content": "Solve it."}],
        "ability": "codegen",
        "apply_chat_template": True,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 0, **extra_info},
    }
    path = writers.write_file(folder / f"{source}.parquet", [row])
    return tasks.load(TasksConfig(source=path)).columns


@needs_bubblewrap
@pytest.mark.parametrize("source", CODE)
def test_code_of_guru_is_graded(source, tmp_path):
    truth, prefix, right, half = CODE[source]
    columns = _load(tmp_path, source, json.dumps(truth), {"prefix": prefix, "reference": right})
    reward = CodeReward(seconds=60.0)
    try:
        for program, expected in ((right, 1.0), (half, 0.5)):
            assert reward([""], [f"```python\n{program}\n```"], **columns) == [expected]
    finally:
        reward.close()


@pytest.mark.parametrize("source", LOGIC)
def test_logic_of_guru_is_graded(source, tmp_path):
    truth, right, wrong = LOGIC[source]
    columns = _load(tmp_path, source, truth, {"id": "0"})
    for answer, expected in ((right, 1.0), (wrong, 0.0)):
        assert logic([""], [f"<answer> {answer} </answer>"], **columns) == [expected]
