"""The reward `math` against answers that are made to cost: each is worth 0, and the others keep
their rewards.
"""

import subprocess
import sys
import time

import pytest

from jaxrft.rewards import Pool, mathematics
from jaxrft.rewards.mathematics import last_boxed, math, plain

HOSTILE = {
    "factorial": r"10^9!",
    "factorials": r"((9!)!)!",
    "binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "evaluated while parsed": r"\gcd(10^{10^8}, 7)",
    "tower": r"9^{9^{9^9}}",
    "tower in x": r"x^{9^{9^9}}",
    "small tower": r"2^{-10^9}",
    "huge root": r"\sqrt{10^{10^7} + 1}",
    "huge difference": r"\frac{1}{3^{10^7}} - \frac{1}{7^{10^7}}",
    "modulus": r"7^{10^9} \mod 13",
    "floor": r"\lfloor \pi \cdot 10^{10^7} \rfloor",
    "expansion": r"(x + y + z + w)^{200}",
    "sum": r"\sum_{i=1}^{10^9} \frac{1}{i^i}",
    "product": r"\prod_{i=1}^{10^6} (x + i)",
    "integral": r"\int_0^1 \sin(x^x) e^{x^2} \ln(\cos x) dx",
    "limit": r"\lim_{x \to 0} \frac{\sin(\tan x) - \tan(\sin x)}{x^{77}}",
    "derivative": r"\frac{d^{100}}{dx^{100}} \tan(\tan(x))",
    "determinant": r"\det\begin{pmatrix}"
    + r"\\".join("&".join(f"x_{{{i * 6 + j}}}" for j in range(6)) for i in range(6))
    + r"\end{pmatrix}",
    "power of a matrix": r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{10^9}",
    "hidden in a matrix": r"\begin{pmatrix}10^9!\end{pmatrix}",
    "brackets": "(" * 30 + "1" + ")" * 30,
    "many brackets": "(" * 100_000,
    "braces": "{" * 400 + "1" + "}" * 400,
    "fractions": r"\frac{1}{1+" * 60 + "x" + "}" * 60,
    "terms": "+".join(f"x^{{{i}}}" for i in range(150)),
    "unions": r"(1,2)\cup" * 90 + "(3,4)",
    "letters": "abcdefghijklm" * 60,
    "digits": "1" * 1_000_000,
    "commas": "1," * 500_000,
    "code": "__import__('os')._exit(1)",
    "not UTF-8": "\ud800\udfff\x00\ufffd" * 100,
}
TEXTS = {
    "10 MB without a box": "The answer is 7. " * 600_000,
    "10 MB of open boxes": "\\boxed{" * 1_500_000,
    "10 MB of braces": "{" * 10_000_000,
    "10 MB, then a box": "{\\frac" * 1_600_000 + "\\boxed{3}",
    "dollars": "$ " * 50_000,
    "answers": "answer: " * 10_000,
    "lists": "$a$ and " * 2_000,
    "bytes that were no UTF-8": b"\xff\xfe\x80 \\boxed{\xff}".decode(errors="surrogateescape"),
}


@pytest.mark.slow
def test_every_hostile_answer_costs_only_itself():
    """Among thirty ordinary completions each; together they take seconds, where one of them alone
    would take hours.
    """
    hostile = [f"\\boxed{{{answer}}}" for answer in HOSTILE.values()] + list(TEXTS.values())
    completions, expected = [], []
    for i, text in enumerate(hostile):
        completions += [f"\\boxed{{{j % 3 + i}}}" for j in range(30)] + [text]
        expected += [float(j % 3 == 0) for j in range(30)] + [0.0]
    answers = [str(i) for i in range(len(hostile)) for _ in range(31)]
    start = time.monotonic()
    with Pool([("math", "math")], workers=2, timeout=10.0) as pool:
        graded = pool.grade([""] * len(answers), completions, {"answer": answers})
    names = [*HOSTILE, *TEXTS]
    wrong = {
        names[i // 31]: (i % 31, r)
        for i, r in enumerate(graded.rewards[0])
        if r not in (expected[i], None)
    }
    lost = {names[i // 31] for i, r in enumerate(graded.rewards[0]) if r is None}
    assert not wrong and not lost and not any(graded.failures.values())
    assert time.monotonic() - start < 10.0 * len(hostile) / 2


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_in_x(name):
    """A gold with symbols is compared in another way than a number."""
    start = time.process_time()
    assert math([""], [f"\\boxed{{{HOSTILE[name]}}}"], answer=["x^2 + 1"]) == [0.0]
    assert time.process_time() - start < 2 * mathematics.SECONDS + 1.0


@pytest.mark.parametrize(
    "gold",
    [
        "10^9!",
        r"\int_0^1 x^x "
        r"dx",
        "(" * 60 + "1" + ")" * 60,
        "1" * 2_000,
    ],
)
def test_a_hostile_gold_gives_no_reward(gold):
    assert math([""] * 2, [r"\boxed{1}", "2"], answer=[gold] * 2) == [None, None]


@pytest.mark.parametrize(
    "answer",
    ["2002^5", "4 \\cdot 7!", "\\frac{2009! + 1}{2009!}", "x^{100} - 1", "2^{2^{10}}", "e^{100}"],
)
def test_large_and_still_an_answer(answer):
    written = answer.replace("\\frac", "\\dfrac ").replace("x", " x ").replace("4 ", "2 \\cdot 2")
    assert math([""] * 2, [f"\\boxed{{{written}}}", "\\boxed{7}"], answer=[answer] * 2) == [
        1.0,
        0.0,
    ]


LOADED = r"""
import sys
from contextlib import contextmanager
from jaxrft.rewards import mathematics

@contextmanager
def watched(seconds):
    before = set(sys.modules)
    yield
    print("loaded", *sorted(set(sys.modules) - before))

mathematics.processor_time = watched
print(mathematics.math([""], [r"\boxed{\sin^2 x + \cos^2 x}"], answer=["1"]))
"""


def test_first_imports_of_a_library_do_not_count_as_time():
    """On a slow machine the first answer of a process, which was right, was out of time."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    *loaded, graded = done.stdout.splitlines()
    assert len(loaded) >= 3 and set(loaded) == {"loaded"} and graded == "[1.0]"


def test_a_timeout_leaves_no_state(monkeypatch):
    """The same answers are judged as before, by the same process."""
    answers = [r"\boxed{\sin^2 x + \cos^2 x}"] * 2
    before = math([""] * 2, answers, answer=["1", "2"])
    usual = mathematics.SECONDS
    monkeypatch.setattr(mathematics, "SECONDS", 0.05)
    start = time.process_time()
    assert math([""], [f"\\boxed{{{HOSTILE['determinant']}}}"], answer=["5"]) == [0.0]
    assert time.process_time() - start < 2 * usual  # to parse and to compare
    monkeypatch.undo()
    mathematics._equal.cache_clear()
    assert math([""] * 2, answers, answer=["1", "2"]) == before == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"}} \boxed{\frac{1}{2}} {", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{{2}", "1"),
        (r"\boxed 3", None),
    ],
)
def test_last_boxed(text, held):
    assert last_boxed(text) == held


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        (r"\left( \dfrac {1}{2} , 3 \right]", r"(\frac{1}{2}, 3]"),
        (r"$7\sqrt{2}.$", r"7\sqrt{2}"),
        (r"\[ 195 \]", "195"),
        (r"1,\!000", "1,000"),
        (r"1\,000", "1000"),
        (r"2\,x", r"2\,x"),
        (r"1, 234", "1, 234"),
        (r"1 234", "1 234"),
        (r"\pi x", r"\pi x"),
        (r"\left\{ 1 \right\}", r"\{1\}"),
        (r"\leftarrow", r"\leftarrow"),
    ],
)
def test_plain(answer, bare):
    assert plain(answer) == bare
