r"""The table of final answers, row by row, what does not count around an answer, and texts that are
made to cost.
"""

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
    ("Final Answer: The final answer is $even$. I hope it is correct.", "even"),
    ("Answer\n======\nB", "B"),
    ("The answer is [0, 1).", "[0, 1)"),
    ("The answer is 2xy + 3.", "2xy + 3"),
    ("The answer is ab + 1.", "ab + 1"),
    ("The answer is B because A is wrong.", "B"),
    ("The answer is B, not C.", "B"),
    (r"The answer is \begin{pmatrix}1\\2\end{pmatrix}.", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("La respuesta es B.", "B"),
    ("Die Antwort lautet: even", "even"),
    ("Ответ: B", "B"),
    # 6: the end of the text
    ("so 6 * 7 = 42.", "6 * 7 = 42"),
    ("There are 42 ways to do it.", "42"),
    ("It costs $42.", "42"),
    ("It costs $5 more than both, so that is 37 + 5 = $42.", "37 + 5 = $42"),
    ("It is $5 cm$.", "5 cm"),
    ("The ratio is 2: 3.", "2: 3"),
    ("That makes 42. Let me know if you need 3 more.", "42"),
    ("That makes 42. Shall we try 3 more?", "42"),
    ("by multiplying the units: in 42 *", None),
    ("we start with 42 \\times", None),
    ("the product of 42 and", None),
    ("The answer is 42 plus", None),
    ("x = 42 -", None),
    ("so 42 + the rest", None),
    ("it is *42*", "42"),
    ("**5 * 8 is 42**", "42"),
    ("How many apples are there if he buys 504 more?", None),
    ("**What is 4 times 7?**", None),
    ("Is it 7? It is 42.", "42"),
    ("That makes 42.\n\nI hope these 2 steps help!", "42"),
    ("Therefore $x = 42$.", "x = 42"),
    (r"\[ x = 42 \]", "x = 42"),
    ("$x = 42$ is the solution.", "x = 42"),
    ("x = 5 or x = 6", "x = 5, x = 6"),
    ("To expand $(x+1)^2 - 2x$, we", None),
    ("To calculate 53 + 43 with just numeric values, here's a", None),
    ("- 42", "42"),
    ("no number", None),
    (r"[0, 1)", "[0, 1)"),
    (r"It is (-\infty, 2].", r"(-\infty, 2]"),
    ("Step 1: 3 + 4\nStep 2: 7", "7"),
    ("- **42**", "42"),
    ("It is 5°C.", "5°"),
    ("6 * 7 = <<6*7=42>>42", "42"),
    # 4 and 5: a text that is only a word or a choice, a last sentence that is a letter, a word or a
    # formula
    ("**C**", "C"),
    ("(C) 12 metres", "(C) 12 metres"),
    ("Evelyn.", "Evelyn"),
    (r"\pi", r"\pi"),
    (r"**\pi**", r"\pi"),
    ("By steps 1 and 2.\n\n**B**", "B"),
    ("By steps 1 and 2.\n\nB", "B"),
    ("By steps 1 and 2.\n\n**even**", "even"),
    ("It makes 42.\n\nDone.", "42"),
    ("To find it with words, here is a", None),
    ("The value is **B**.", "B"),
    ("The value is B.", "B"),
    ("The value is **B**.\n\nLet me know if you need 3 more.", "B"),
    ("That makes 42.\n\nNote: rounded", "42"),
    ("The value is **even**.", "even"),
    (r"Result: \pi", r"\pi"),
    ("Result: even", "even"),
    ("So option B is correct.", "B"),
    ("**C** is the right answer.", "C"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
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
AROUND += [
    "exactly 42",
    "42 apples",
    "42 because 6 times 7 is 42",
    "42, not 43",
    "**$42$**.",
    "(**42**)",
    "\n42\n",
]


@pytest.mark.parametrize(("completion", "answer"), TABLE)
def test_table_of_final_answers(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("5 * 8 = 40", None),
        ("There are 42 of them.\n\nNo additional", None),
        ("The answer is 4", None),
        ("The answer is 42. I", "42"),
        ("so \\boxed{42} because", "42"),
        ("<answer>42</answer> as", "42"),
        ("#### 42\n\nLet me", "42"),
        ("**42**", None),
    ],
)
def test_truncated_completion_has_only_an_answer_that_is_announced(completion, answer):
    assert final_answer(completion, truncated=True) == answer


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
        r"\text{42}",
        r"\text{42 cm}",
        r"\boldsymbol{42}",
        r"\color{red}{42}",
        "４２",
        "(B) 42",
        r"\begin{aligned}x &= 6\cdot 7 \\ &= 42\end{aligned}",
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
        (r"\boxed{\text{(C) } \frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\text{(C) } \frac{1}{2}}", "2", 0.0),
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


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("3√2", r"3\sqrt{2}", 1.0),
        ("√12", r"2\sqrt{3}", 1.0),
        ("√(x+1)", r"\sqrt{x+1}", 1.0),
        ("2*pi/3", r"\frac{2\pi}{3}", 1.0),
        ("2½", "2.5", 1.0),
        ("–7", "-7", 1.0),
        ("(−∞, 2]", r"(-\infty, 2]", 1.0),
        ("x²+1", "x^2+1", 1.0),
        (r"\bigl(0,1\bigr]", "(0,1]", 1.0),
        (r"\lbrace 1,2\rbrace", r"\{1,2\}", 1.0),
        (r"\varnothing", r"\emptyset", 1.0),
        ("1,000, 2", "1000, 2", 1.0),
        ("2, 1000", "1,000, 2", 1.0),
        ("1,000, 2", "1, 2", 0.0),
        ("h = 8,000", "8000", 1.0),
        ("h = 8,000", "8", 0.0),
        (r"1.5\%", "1.5", 1.0),
        ("1.5", r"1.5\%", 1.0),
        ("1.4", r"1.5\%", 0.0),
        ("Even", "even", 1.0),
        (r"\text{even}", "even", 1.0),
        (r"\textbf{No solution}", "no solution", 1.0),
        ("neve", "even", 0.0),  # the same product of letters
        ("Alice", r"\text{Celia}", 0.0),
        (r"3\text{ hours }20\text{ minutes}", "3", 0.0),
        (r"9.8 \text{ m}/\text{s}^2", "9.8", 1.0),
    ],
)
def test_spelling_of_an_answer_does_not_count(answer, gold, expected):
    assert math([""], [f"\\boxed{{{answer}}}"], answer=[gold]) == [expected]


def test_joined_boxes_answer_lists_and_the_last_one_answers_numbers():
    completion = r"so \boxed{1}, \boxed{2} and \boxed{3}."
    golds = ["1, 2, 3", r"\{3, 2, 1\}", "3", "1", "2, 3"]
    assert math([""] * 5, [completion] * 5, answer=golds) == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "piece",
    [
        "answer: ",
        "answer is ",
        "#### ",
        "$ ",
        "$$ ",
        r"\[ ",
        r"\( ",
        "<answer>",
        "</think>",
        "a.",
        "1 ",
        "1, ",
        "x ",
    ],
)
def test_long_completion_costs_little(piece):
    start = time.process_time()
    final_answer(piece * (5_000_000 // len(piece)))
    assert time.process_time() - start < 1.0
