"""The reward `logic`: what it takes for solutions and answers, and that no answer breaks it."""

import json
import time
from itertools import permutations

import pytest

from jaxrft.rewards.answers import LONGEST, last_answer, read_literal
from jaxrft.rewards.expressions import solves
from jaxrft.rewards.inside import plain
from jaxrft.rewards.logic import logic, logic_solved
from tests import attacks

ZEBRA = {
    "header": ["Position", "Nationality", "Job"],
    "rows": [["1", "british", "plumber"], ["2", "polish", "carpenter"]],
}
GRID = [[0, 1, 2], [3, 4, 5]]
ORDER = ["pigeon", "sparrow hawk", "quail"]
COUNTDOWN = {"numbers": [19, 36, 55, 7], "target": 65}
SOLUTIONS = {  # ground truth, data_source, an answer
    "zebra": (ZEBRA, "zebra_puzzle_dataset", json.dumps(ZEBRA)),
    "grid": (GRID, "simulation__arcagi1", json.dumps(GRID)),
    "ordering": (ORDER, "ordering_puzzle_dataset", str(ORDER)),
    "graph": ("fdebme", "graph_logical_dataset", "fdebme"),
    "countdown": (COUNTDOWN, None, "55 + 36 - 7 - 19"),
}


def grade(text, truth, source=None):
    """Grades one answer."""
    completion = f"<think>hm</think> It is <answer>{text}</answer>."
    return logic([""], [completion], answer=[truth], data_source=[source])[0]


@pytest.mark.parametrize("name", SOLUTIONS)
def test_solution_earns_1_and_those_of_others_0(name):
    truth, source, answer = SOLUTIONS[name]
    assert grade(answer, truth, source) == 1.0
    assert grade(f"\n {answer} \n", truth, source) == 1.0
    for other in SOLUTIONS:
        if other != name:
            assert grade(SOLUTIONS[other][2], truth, source) == 0.0
    assert logic([""], [answer], answer=[truth], data_source=[source]) == [0.0]  # no tags


@pytest.mark.parametrize("name", ["zebra", "grid", "ordering", "countdown"])
def test_ground_truth_may_be_json_text(name):
    truth, source, answer = SOLUTIONS[name]
    assert grade(answer, json.dumps(truth), source) == 1.0


@pytest.mark.parametrize("name", ["zebra", "ordering"])
def test_ground_truth_may_be_text_of_python(name):
    truth, source, answer = SOLUTIONS[name]
    assert grade(answer, str(truth), source) == 1.0


def test_zebra_earns_the_fraction_of_right_cells_and_solved_only_all():
    rows = [["1", "Polish", "plumber"], ["2", "british", " CARPENTER "]]
    answer = json.dumps({"header": ZEBRA["header"], "rows": rows})
    assert grade(answer, ZEBRA) == pytest.approx(4 / 6)
    texts = [f"<answer>{text}</answer>" for text in (answer, json.dumps(ZEBRA))]
    assert logic_solved([""] * 3, [*texts, ""], answer=[ZEBRA, ZEBRA, 7]) == [0.0, 1.0, None]
    for shape in ([], rows[:1], [*rows, rows[0]], [row[:2] for row in rows], [[], []], "12", None):
        assert grade(json.dumps({"rows": shape}), ZEBRA) == 0.0
    assert grade("{'header': [], 'rows': [(1, british, plumber), (2, polish, carpenter)]}", ZEBRA)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("[[0, 1, 2],\n [3, 4, 5]]", 1.0),
        ("0 1 2\n3 4 5", 1.0),
        ("```\n[[0,1,2],[3,4,5]]\n```", 1.0),
        ("[[0, 1, 2], [3, 4, 6]]", 0.0),
        ("[[0, 1, 2, 3, 4, 5]]", 0.0),
        ("[0, 1, 2, 3, 4, 5]", 0.0),
        ("[[0, 1, 2], [3, 4, 5]] [[1]]", 0.0),
        ("[[[0, 1, 2], [3, 4, 5]]]", 0.0),
        ("[[0, 1, 2], [3, 4, 5.0]]", 0.0),
        ("[[٠, 1, 2], [3, 4, 5]]", 0.0),
        ("0 1 2 3 4 5", 0.0),
    ],
)
def test_grid_is_a_list_of_lists_or_lines(answer, reward):
    assert grade(answer, GRID) == reward


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("['Pigeon', 'sparrow  hawk', 'quail']", 1.0),
        ("[pigeon, sparrow hawk, quail]", 1.0),
        ('The order is ["pigeon", "sparrow hawk", "quail"].', 1.0),
        ("['pigeon', 'quail', 'sparrow hawk']", 0.0),
        ("['pigeon', 'sparrow hawk']", 0.0),
        ("pigeon, sparrow hawk, quail", 0.0),
        ("[['pigeon'], ['sparrow hawk'], ['quail']]", 0.0),
    ],
)
def test_order_is_a_list_of_names(answer, reward):
    assert grade(answer, ORDER, "ordering_puzzle_dataset") == reward


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("55 + 36 - 7 - 19", True),
        ("(55+36)-(7+19)", True),
        ("-19 + 55 − 7 + 36", True),
        ("55 + 36 - 7", False),
        ("55 + 36 - 7 - 19 + 0", False),
        ("65", False),
        ("55 + 36 - 7 - 19 = 65", False),
        ("55 + 36 - 26", False),
        ("55 + 36 - 7 - 19 - 7 + 7", False),
        ("36 + 55 - 7 - 1 9", False),
        ("55 + 36 - 7 - 19.0", False),
        ("55 + 36 - 7 - 19 /(7-7)", False),
        ("55 36 + 7 - 19 -", False),
        ("()55 + 36 - 7 - 19", False),
        ("55 + 36 - 7 - 19)", False),
        ("(55 + 36 - 7 - 19", False),
        ("55 ++ 36 - 7 - 19", False),
        ("５５ + 36 - 7 - 19", False),
        ("", False),
    ],
)
def test_countdown_uses_each_number_once(expression, right):
    assert solves(expression, [19, 36, 55, 7], 65) == right


def test_expressions_are_exact_fractions_with_the_usual_precedence():
    assert solves("6/(1-3/4)", [1, 3, 4, 6], 24)
    assert solves("8 ÷ 2 ÷ 2 × 12", [8, 2, 2, 12], 24)
    assert solves("2 - 3 - 4 * -7", [2, 3, 4, 7], 27)
    assert solves("(10000000000000001 - 10000000000000000) * 3", [10**16 + 1, 10**16, 3], 3)
    assert not solves("1/3*3", [1, 3], 1)
    assert not solves("1/0", [1, 0], 1)
    assert not solves("1" * 40, [int("1" * 40)], int("1" * 40))


def test_countdown_of_reasoning_gym_is_read_from_its_entry():
    metadata = {"numbers": [8, 5, 10, 6], "difficulty": {"value": (1, 10)}}
    truth = {"gym": "puzzle24", "entry": plain.encode({"metadata": metadata})}
    assert grade("10*(8 - 5) - 6", truth) == 1.0
    assert grade("6*4+1-1", truth) == 0.0
    assert grade("10", truth | {"gym": "chain_sum"}) is None


@pytest.mark.parametrize(
    ("truth", "source"),
    [
        (None, None),
        ("42", "math__x"),
        (42, None),
        ("word", None),
        (ORDER, None),
        (["assert f(1) == 2"], "codegen__mbpp"),
        ({"inputs": ["1"], "outputs": ["2"]}, "codegen__taco"),
        ({"functional": "assert f(1)"}, None),
        ([{"input": "1", "output": "2"}], None),
        ([["a", "b"]], None),
        ([[]], None),
        ([], None),
        ({"numbers": ["a"], "target": 1}, None),
        ({"numbers": [1, 2], "target": float("inf")}, None),
        ({"numbers": [1, 2.5], "target": 3}, None),
        ({"header": [], "rows": []}, None),
        ("[" * 100_000, None),
    ],
)
def test_other_ground_truths_have_no_reward(truth, source):
    assert grade("1", truth, source) is None


@pytest.mark.parametrize("attack", attacks.ANSWERS)
def test_attacking_answer_earns_nothing(attack):
    start = time.process_time()
    for truth, source, _ in SOLUTIONS.values():
        assert grade(attacks.ANSWERS[attack], truth, source) == 0.0
    assert time.process_time() - start < 5.0


def test_every_answer_at_once_earns_nothing():
    orders = " or ".join(str(list(names)) for names in permutations(ORDER))
    assert grade(orders, ORDER, "ordering") == 0.0
    listed = [list(names) for names in permutations(ORDER)]
    assert grade(json.dumps(listed), ORDER, "ordering") == 0.0
    tags = "</answer><answer>".join(["fdebme", "abcdef"])
    assert grade(tags, "fdebme", "graph") == 0.0
    assert grade("fdebme abcdef", "fdebme", "graph") == 0.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer> 1 </answer>", "1"),
        ("<ANSWER>1</Answer>", "1"),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<think><answer>1</answer></think> 2", None),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer></answer>", ""),
        ("1</answer>", None),
        (f"<answer>{'1' * (LONGEST + 1)}</answer>", None),
    ],
)
def test_answer_is_what_the_last_closed_tags_hold(completion, answer):
    assert last_answer(completion) == answer


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("[1, 'a', \"b\", c d,]", ["1", "a", "b", "c d"]),
        ("x [[], (1, {2: 3})] y", [[], ["1", {"2": "3"}]]),
        (r"['it\'s', 'a\nb']", ["it's", "a\nb"]),
        ("['a' 'b']", None),
        ("[a] [b]", None),
        ("[1 2", None),
        ("[1, , 2]", None),
        ("[,]", None),
        ("[}]", None),
        ("[{a}]", None),
        ("[{a: }]", None),
        ("[{a: 1 b: 2}]", None),
        ("[a: 1]", None),
        ("]1[", None),
        ("", None),
    ],
)
def test_literals_are_lists_objects_and_text(text, literal):
    assert read_literal(text, "[") == literal


def test_literals_are_read_in_linear_time():
    start = time.process_time()
    read_literal("[" * 30_000 + "]" * 30_000, "[")
    read_literal("[" + "'" * 60_000 + "]", "[")
    read_literal("[" + "\\" * 60_000 + "]", "[")
    assert time.process_time() - start < 5.0
