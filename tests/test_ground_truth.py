"""Ground truths of all types: what they mean to rewards, and what is refused when tasks are
opened.
"""

import datetime
import decimal
import fractions
import logging

import numpy as np
import pytest

from jaxrft.config import TasksConfig
from jaxrft.errors import InputError
from jaxrft.rewards import exact, ground_truth, gsm8k
from jaxrft.rewards.mathematics import math
from jaxrft.tasks import sources


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ("x = 5", "x = 5"),
        (72, "72"),
        (-3, "-3"),
        (1e16, "10000000000000000"),
        (1e-05, "0.00001"),
        (5.0, "5"),
        (-0.5, "-0.5"),
        (-0.0, "0"),
        (decimal.Decimal("-0"), "0"),
        (np.float32(0.1), "0.1"),
        (np.int64(3), "3"),
        (np.array([1, 2]), "1, 2"),
        (decimal.Decimal("1E+3"), "1000"),
        ([2, 3], "2, 3"),
        ([0.5], "0.5"),
        (["x = 2", "x = 3"], "x = 2, x = 3"),
        ('{"a": 1', '{"a": 1'),
        ("{1, 2}", "{1, 2}"),
        ("[1, 2]", "[1, 2]"),
        (None, None),
        (float("nan"), None),
        (decimal.Decimal("NaN"), None),
        (np.float64("nan"), None),
        (np.datetime64("NaT"), None),
    ],
)
def test_meaning_is_that_of_the_type(truth, text):
    assert ground_truth.text(truth) == text


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (True, "True is of type bool: write what an answer must say as text"),
        (np.bool_(False), "of type bool"),
        (fractions.Fraction(1, 3), "of type Fraction: write what an answer must say as text"),
        ({"target": "5"}, r"name one of its fields \(target\) with tasks.answer_column"),
        ('{"inputs": ["1"], "outputs": ["2"]}', r"its fields \(inputs, outputs\)"),
        (' [{"input": "1", "output": "2"}]', r"its fields \(input, output\)"),
        (datetime.date(2020, 1, 2), "of type date"),
        (b"5", "of type bytes"),
        ({1, 2}, "of type set"),
        ([], "an empty list"),
        ([[1, 2]], "holds another list"),
        ([1, None], "holds nothing"),
        (float("inf"), "no number of at most 1,000 digits"),
        (10**2000, "no number of at most 1,000 digits"),
    ],
)
def test_meaningless_ground_truth_is_refused_in_one_sentence(truth, said):
    with pytest.raises(InputError, match=said) as error:
        ground_truth.text(truth)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    for reward in (math, gsm8k, exact):
        assert reward([""], ["5"], answer=[truth]) == [None]


def test_integer_of_more_digits_than_python_prints_is_refused():
    with pytest.raises(InputError, match="no number of at most 1,000 digits"):
        ground_truth.text(10**5000)


def test_rewards_share_the_table():
    assert math(
        [""] * 4, [rf"\boxed{{{a}}}" for a in ("2, 3", "3, 2", "[2, 3]", "2")], answer=[[2, 3]] * 4
    ) == [
        1,
        1,
        0,
        0,
    ]
    assert gsm8k(
        [""] * 3, ["#### 10000000000000000", "#### 16", "3"], answer=[1e16, 1e16, [2, 3]]
    ) == [1.0, 0.0, None]
    assert gsm8k(
        [""] * 4, ["0.00001", "5", "1500", "3"], answer=[1e-05, 1e-05, "1.5e3", "1.5e3"]
    ) == [
        1.0,
        0.0,
        1.0,
        0.0,
    ]
    assert exact(
        [""] * 4, ["5", "1", "10000000000000000", "x"], answer=[5.0, True, 1e16, float("nan")]
    ) == [
        1,
        None,
        1,
        None,
    ]


def test_tasks_are_refused_when_they_are_opened(caplog):
    rows = [4, 7]
    for truths, several, said in (
        [["5", True], True, "row 8: the ground truth True"],
        [["5", [1, 2]], False, "row 8.*2 answers"],
    ):
        with pytest.raises(InputError, match=said):
            ground_truth.check(truths, rows, "tasks.jsonl", several=several, only=True)
    ground_truth.check(["5", [1, 2]], rows, "tasks.jsonl", several=True, only=True)
    with caplog.at_level(logging.WARNING):
        ground_truth.check([None, {"tests": []}], rows, "tasks.jsonl", several=True, only=False)
    assert "2 of 2 tasks of tasks.jsonl have no ground truth" in caplog.text


def test_parquet_types_reach_rewards_or_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    def load(truths):
        path = tmp_path / "tasks.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": truths}), path)
        return sources.load(TasksConfig(source=str(path))).columns["answer"]

    assert load([decimal.Decimal("1.50")]) == ["1.5"]
    with pytest.raises(
        InputError,
        match=r"row 1: the ground truth datetime.date\(2020, 1, 2\) "
        r"is of type date",
    ):
        load([datetime.date(2020, 1, 2)])


@pytest.mark.parametrize("piece", ["1", "1,", "1.1", "#### ", "-", "1e", "$"])
def test_gsm8k_reads_ten_megabytes_at_once(piece):
    assert gsm8k([""], [piece * (10_000_000 // len(piece))], answer=["72"]) == [0.0]
