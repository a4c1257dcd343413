"""Tasks of reasoning_gym, and the reward `gym` that scores them in a sandbox."""

import importlib.util
import json
import time

import pytest

from benchmarks.gym import make, measure
from jaxrft import tasks
from jaxrft.config import TasksConfig
from jaxrft.errors import InputError
from jaxrft.rewards import Pool
from jaxrft.rewards.gym import GymReward, package_folders
from jaxrft.rewards.inside import gym as inside
from jaxrft.rewards.logic import logic_solved
from jaxrft.tasks import gym as source
from tests import attacks, sandboxes
from tests.sandboxes import needs_bubblewrap

SECONDS = 3.0  # of an attack
PATIENCE = 30.0  # for a machine that does much else
DEFAULTS = {
    "num_people": 4,
    "min_words": 2,
    "max_words": 5,
    "operators": ["+", "-"],
    "shuffle": True,
    "text": "a",
    "share": 0.5,
    "size": 500,
    "seed": None,
}


def configurations(query):
    return source.configurations(source.parse(f"family?{query}"), DEFAULTS)


def test_options_are_fields_of_the_family_and_ranges_difficulties():
    assert configurations("") == [{}]
    assert configurations("num_people=5&shuffle=false&text=1") == [
        {"num_people": 5, "shuffle": False, "text": "1"}
    ]
    assert configurations("words=3-4&share=1") == [{"min_words": 3, "max_words": 4, "share": 1.0}]
    assert configurations("words=3&operators=*,/") == [
        {"min_words": 3, "max_words": 3, "operators": ["*", "/"]}
    ]
    assert configurations("num_people=3-5") == [{"num_people": n} for n in (3, 4, 5)]
    assert source.parse("a?size=7&seed=2&x=1") == source.Source("a", 7, 2, {"x": "1"})


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("size", "the option size has no value: give options as in gym:zebra_puzzles"),
        ("x=1&x=2", "the option x is there twice"),
        ("size=0", "the option size is '0': give an integer from 1 to"),
        ("size=many", "the option size is 'many'"),
        ("seed=4096", "the option seed is '4096': give an integer from 0 to 4095"),
        ("num_peple=4", "family has no option num_peple: did you mean num_people"),
        ("z=4", "family has no option z: it has size, seed, num_people, .*, words"),
        ("num_people=four", "the option num_people is 'four': its default is 4, give int"),
        ("num_people=5-4", "the option num_people of family is 5-4: give a range of 1 to"),
        ("num_people=1-1000", "give a range of 1 to"),
        ("shuffle=1", "its default is true, give true or false"),
    ],
)
def test_wrong_options_are_named(query, said):
    with pytest.raises(InputError, match=said) as error:
        configurations(query)
    assert "\n" not in str(error.value)


def test_without_reasoning_gym_the_source_and_the_reward_say_how_to_install_it(
    tmp_path, monkeypatch
):
    (tmp_path / "reasoning_gym.py").write_text("raise ModuleNotFoundError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with pytest.raises(InputError, match=r"needs the package reasoning-gym .*: pip install .*gym"):
        source.load("chain_sum?size=1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"the reward gym needs the package .*: pip install .*gym"):
        package_folders()


def test_without_bubblewrap_gym_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="bubblewrap, which is not installed: install it") as error:
        Pool([("gym", "gym")], workers=1)
    assert "\n" not in str(error.value) and 'GymReward(sandbox="none")' in str(error.value)


def test_other_tasks_have_no_reward_and_completions_without_an_answer_earn_0():
    reward = GymReward()
    truths = [None, "42", {"inputs": [], "outputs": []}, [[1]], {"gym": None}]
    assert reward([""] * 5, ["<answer>1</answer>"] * 5, answer=truths) == [None] * 5
    assert reward([""], ["1"], answer=[{"gym": "chain_sum"}]) == [0.0]


@pytest.mark.parametrize(
    "text",
    ["[1, 'a']", "-(2 + 3) ** 2", "{1: (2.5, 1j)}", "1 << 3", "[[1, 2], [3]]", "b'a'", "None"],
)
def test_literals_and_arithmetic_are_admitted(text):
    inside.check(text, has_names=False)


@pytest.mark.parametrize(
    "text", ["Symbol ('x')**Integer (2)", "sin(Symbol('x'))/Float ('2.5')", "pi*E + sqrt(2)"]
)
def test_what_the_parser_of_sympy_writes_is_admitted(text):
    inside.check(text, has_names=True)


@pytest.mark.parametrize(
    "text",
    [
        "x.y",
        "f(1)",
        "Symbol('x').name",
        "Symbol('x')(1)",
        "sqrt('2')",
        "Symbol('x') + sqrt(2, '2')",
        "Symbol(name='x')",
        "sqrt(*[1])",
        "[1][0]",
        "lambda: 1",
        "[x for x in y]",
        "f'{x}'",
        "(x := 1)",
        "x if y else z",
        "x and y",
        "x < y",
        "__import__('os')",
        "sympify('1')",
    ],
)
def test_names_attributes_and_calls_are_refused(text):
    for has_names in (False, True):
        with pytest.raises(inside.Refused):
            inside.check(text, has_names)
    for text in ("1 + 'a'", "'a'", compile("1", "", "eval")):
        with pytest.raises(inside.Refused):
            inside.check(text, has_names=True)


# What needs the extra `gym`.


@pytest.fixture(scope="module")
def scorer():
    """The reward, in a sandbox with some patience."""
    reward = GymReward(seconds=30.0)
    reward.start_in_worker()
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def maker():
    """The process that makes tasks."""
    with source.Maker("") as maker:
        yield maker


@pytest.fixture(scope="module")
def grade(scorer):
    """Scores one answer to a task."""

    def graded(text, truth):
        return scorer([""], [f"<answer>{text}</answer>"], answer=[truth])[0]

    return graded


# those whose scorers evaluate, compare tuples, have a configuration, or no answer of their own
FAMILIES = (
    "simple_integration polynomial_multiplication countdown string_insertion spiral_matrix "
    "n_queens bitwise_arithmetic rearc decimal_arithmetic graph_color sudoku"
).split()


@pytest.mark.parity
@needs_bubblewrap
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_the_family_earn_1_and_those_of_other_tasks_less(scorer, maker, family):
    scores = measure(family, 2, scorer, maker)
    assert scores is not None and scores.own == 1.0
    assert scores.different and scores.others_solved == 0 and scores.other < 1.0


@pytest.mark.parity
def test_source_gives_the_same_tasks_to_every_host(monkeypatch):
    name = "gym:ransom_note?size=4&note_length=2-6"  # whose tasks depend on the hash seed
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    rows = tasks.load(TasksConfig(source=name))
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    assert rows == tasks.load(TasksConfig(source=name))
    assert rows.domains == ["ransom_note"] * 4
    last = [prompt[0]["content"].rpartition("\n")[2] for prompt in rows.prompts]
    assert last == [source.INSTRUCTION] * 4
    assert set(rows.columns) == {"answer", "reference", "domain", "difficulty"}
    assert rows.columns["difficulty"][0]["note_length"] == [2, 6]
    json.dumps(rows.columns)
    assert TasksConfig(source=name).title == "ransom_note"


@pytest.mark.parity
def test_range_of_one_number_gives_each_value_in_turn_and_seeds_share_no_task():
    name = "gym:knights_knaves?size=5&seed=2&n_people=2-3"
    rows = tasks.load(TasksConfig(source=name, limit=3))
    assert [each["n_people"] for each in rows.columns["difficulty"]] == [2, 3, 2]
    assert [truth["config"]["n_people"] for truth in rows.columns["answer"]] == [2, 3, 2]
    # reasoning_gym adds the number of a task to the seed
    assert [truth["config"]["seed"] for truth in rows.columns["answer"]] == [2 << 20] * 3


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zebra_puzzle", "has no family 'zebra_puzzle': did you mean zebra_puzzles"),
        ("zebra_puzzles?num_people=1", "refuses gym:zebra_puzzles.num_people=1: "),
    ],
)
def test_family_that_cannot_be_made_is_named(name, said):
    with pytest.raises(InputError, match=said) as error:
        source.load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parity
@needs_bubblewrap
def test_gym_and_gym_solved_are_rewards_of_the_pool(maker):
    truths, answers = make("sudoku", 2, maker)
    texts = [f"<answer>{answer}</answer>" for answer in (answers[0], answers[0], "1")]
    with Pool([("gym", "gym"), ("gym_solved", "gym_solved")], workers=1, timeout=60.0) as pool:
        graded = pool.grade([""] * 3, texts, {"answer": [truths[0], truths[1], "1"]})
    assert graded.rewards[0][0] == 1.0 and 0 < graded.rewards[0][1] < 1
    assert graded.rewards[1] == [1.0, 0.0, None] and graded.rewards[0][2] is None
    assert not graded.lost


@pytest.mark.parity
@needs_bubblewrap
def test_task_that_reasoning_gym_does_not_know_loses_its_reward(grade, maker):
    truths, answers = make("chain_sum", 1, maker)
    for broken in ({"gym": "chain_sums"}, {"config": {"size": 1, "old_option": 2}}):
        with pytest.raises(RuntimeError, match="reasoning_gym fails: "):
            grade(answers[0], truths[0] | broken)
    assert grade(answers[0], truths[0]) == 1.0


@pytest.mark.parity
@needs_bubblewrap
def test_attacking_answers_earn_nothing_and_leave_nothing(maker, monkeypatch):
    namespaces = sandboxes.record_namespaces(monkeypatch)
    reward = GymReward(seconds=SECONDS, cpu_seconds=1, all_or_nothing=True)
    reward.start_in_worker()
    try:
        for family in ("string_insertion", "simple_integration"):
            truths, answers = make(family, 1, maker)
            for name, text in attacks.ANSWERS.items():
                start = time.monotonic()
                graded = reward([""], [f"<answer>{text}</answer>"], answer=truths)
                assert graded == [0.0], (family, name)
                assert time.monotonic() - start < SECONDS + PATIENCE
            assert reward([""], [f"<answer>{answers[0]}</answer>"], answer=truths) == [1.0]
    finally:
        reward.close()
    assert namespaces and sandboxes.wait_until_empty(namespaces) == []


@pytest.mark.parity
@needs_bubblewrap
def test_numbers_that_were_not_given_solve_puzzle24_for_gym_and_not_for_logic(grade, maker):
    """reasoning_gym asks for four numbers between 1 and 10, whichever they are."""
    truths, answers = make("puzzle24", 1, maker)
    assert grade("6*4+1-1", truths[0]) == 1.0
    texts = ["<answer>6*4+1-1</answer>", f"<answer>{answers[0]}</answer>"]
    assert logic_solved([""] * 2, texts, answer=truths * 2) == [0.0, 1.0]
