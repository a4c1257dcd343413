r"""The table of final answers, row by row, what does not count around an answer, and texts that are made to cost."""

import time

import pytest

from jaxrft.rewards.final_answer import final_answer
from jaxrft.rewards.mathematics import math

TABLE = [
    # 0: behind the thoughts
    (r"<think>\boxed{3}</think> The answer is 4.", "4"),
    (r"<think>\boxed{3}</think>", "3"),
    (r"<think>\boxed{3}</think> That is all.", "3"),
    ("<think>The answer is 3.</think><answer>4</answer>", "4"),
    # 1: boxes and frames
    (r"so \fbox{42}", "42"),
    (r"\boxed{1}, no, \fbox{42}", "42"),
    (r"\fbox{1}, no, \boxed{42}", "42"),
    (r"\boxed{42}. The answer is 3.", "42"),
    (r"\boxed 42", "42"),
    (r"\boxed{42} and nothing in \boxed{}", "42"),
    # 2: answer tags
    ("<answer>42</answer>", "42"),
    ("<answer> 42 </answer>", "42"),
    ("<ANSWER>\n42\n</ANSWER>", "42"),
    ("<final_answer>42</final_answer>", "42"),
    (r"<answer>\boxed{42}</answer>", "42"),
    (r"\boxed{41} <answer>42</answer>", "42"),
    (r"<answer>41</answer> \boxed{42}", "42"),
    ("<answer>The result is 42.</answer>", "42"),
    (r"<answer>\frac{1}{2}</answer>", r"\frac{1}{2}"),
    # 3: what is called the answer
    ("The answer is 42.", "42"),
    ("The final answer is: $42$. I hope it is correct.", "42"),
    ("answer:42", "42"),
    ("ANSWER: 42", "42"),
    ("Answer：42", "42"),
    ("答案：42", "42"),
    ("Answer = 42", "42"),
    ("My answer to the question is 42, for 7 times 6 is that.", "42"),
    ("**Answer: 42**\n\nLet me know if you need 3 more.", "42"),
    ("**Final Answer**\n\n$42$", "42"),
    ("### Answer\n\n42", "42"),
    ("#### 42", "42"),
    (r"The answer is \(x = 42\).", "x = 42"),
    ("The answer is $5$ and $6$.", "5, 6"),
    ("The answer is 5 or 6.", "5, 6"),
    ("The answer is (C).", "C"),
    ("The answer is option C.", "C"),
    ("The answer is Evelyn.", "Evelyn"),
    ("The correct choice is (C).", "C"),
    ("Answer - 42", "42"),
    ("The answer is forty-two, i.e. 42.", "42"),
    ("The answer is 42. I hope my answer is correct.", "42"),
    # 4: the end of the text
    ("so 6 * 7 = 42.", "6 * 7 = 42"),
    ("There are 42 ways to do it.", "42"),
    ("It costs $42.", "42"),
    ("That makes 42. Let me know if you need 3 more.", "42"),
    ("That makes 42.\n\nI hope these 2 steps help!", "42"),
    ("Therefore $x = 42$.", "x = 42"),
    (r"\[ x = 42 \]", "x = 42"),
    ("$x = 42$ is the solution.", "x = 42"),
    ("x = 5 or x = 6", "x = 5, x = 6"),
    ("To expand $(x+1)^2 - 2x$, we", None),
    ("To calculate 53 + 43 with just numeric values, here's a", None),
    ("- 42", "42"),
    ("no number", None),
    # 5: a text that is only a word or a choice
    ("**C**", "C"),
    ("(C) 12 metres", "(C) 12 metres"),
    ("Evelyn.", "Evelyn"),
    ("", None),
]
AROUND = [
    "**42**",
    "*42*",
    "`42`",
    '"42"',
    "“42”",
    "«42»",
    "_42_",
    "(42)",
    "[42]",
    "42.",
    "42!",
    " 42 ",
    "about 42",
    "$42$",
]
AROUND += ["exactly 42", "42 apples", "42 because 6 times 7 is 42", "42, not 43", "**$42$**.", "(**42**)", "\n42\n"]


@pytest.mark.parametrize(("completion", "answer"), TABLE)
def test_table_of_final_answers(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("before", ["The answer is ", "Answer:", "#### "])
def test_right_answer_keeps_its_reward_in_any_wrapping(before, around):
    assert math([""] * 2, [before + around] * 2, answer=["42", "41"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "held",
    [
        "**42**",
        "`42`",
        "(42)",
        "42.",
        "Answer: 42",
        r"\text{The answer is } 42",
        "about 42",
        "42°",
        "42 cm^2",
        "x = 42",
    ],
)
def test_right_answer_keeps_its_reward_in_a_box(held):
    assert math([""] * 2, [f"\\boxed{{{held}}}"] * 2, answer=["42", "41"]) == [1.0, 0.0]


@pytest.mark.parametrize("around", AROUND)
def test_right_answer_keeps_its_reward_in_tags(around):
    assert math([""], [f"<answer>{around}</answer>"], answer=["42"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        (r"\boxed{C: 12 metres}", "C", 1.0),
        (r"\boxed{\textbf{(C) } 5}", "C", 1.0),
        ("The answer is C) 12.", "C", 1.0),
        ("Answer: C. 12 metres", r"\text{(C)}", 1.0),
        (r"\boxed{C}", "(C) 12 metres", 1.0),
        (r"\boxed{D}", "(C) 12 metres", 0.0),
        (r"\boxed{D: 12 metres}", "C", 0.0),
        (r"\boxed{A. B. C.}", "A", 0.0),
        (r"\boxed{A or C}", "A", 0.0),
    ],
)
def test_choice_is_its_letter_with_or_without_its_text(completion, gold, expected):
    assert math([""], [completion], answer=[gold]) == [expected]


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("5 dollars", "5", 1.0),
        ("96 apples", "96", 1.0),
        ("1 000", "1000", 1.0),
        ("1.5e3", "1500", 1.0),
        ("2 1/2", "2.5", 1.0),
        ("2,74", "2.74", 1.0),
        ("1,000.99€", "1000.99", 1.0),
        ("5 million", "5", 0.0),
        ("5 squared", "5", 0.0),
        ("5 over", "5", 0.0),
        ("4  2", "42", 0.0),
        ("4 2", "42", 0.0),
        ("1 2 3", "123", 0.0),
        ("5x", "5", 0.0),
    ],
)
def test_units_behind_a_number_do_not_count(answer, gold, expected):
    assert math([""], [f"\\boxed{{{answer}}}"], answer=[gold]) == [expected]


def test_joined_boxes_answer_lists_and_the_last_one_answers_numbers():
    completion = r"so \boxed{1}, \boxed{2} and \boxed{3}."
    golds = ["1, 2, 3", r"\{3, 2, 1\}", "3", "1", "2, 3"]
    assert math([""] * 5, [completion] * 5, answer=golds) == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "piece",
    ["answer: ", "answer is ", "#### ", "$ ", "$$ ", r"\[ ", r"\( ", "<answer>", "</think>", "a.", "1 ", "1, ", "x "],
)
def test_long_completion_costs_little(piece):
    start = time.process_time()
    final_answer(piece * (5_000_000 // len(piece)))
    assert time.process_time() - start < 1.0
