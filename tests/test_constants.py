"""Numbers read without computer algebra: by hand, and as math-verify reads them."""

import itertools
import random
from math import inf, pi, sqrt

import pytest
from latex2sympy2_extended.math_normalization import units
from math_verify import parse, verify

from jaxrft.rewards import constants
from jaxrft.rewards.constants import at, differ, values
from jaxrft.rewards.mathematics import _equal, _numbers, plain

TRUTHS = r"""
6; -2; 0; 2400; 1,080; 3.25; 0.5; .5; 222.20; 44\%; 61.11\%; 40 \%; 1/2; -1/2; 73 / 9; 2/15
\frac{1}{2}; \dfrac{9}{14}; \tfrac{13}{204}; \frac12; \frac1{216}; -\frac{29}{9}; - \frac {5}{12}; \frac{10246}{32768}
75\frac{1}{5}; -2\frac{1}{2}; \sqrt{6}; 4 \sqrt{10}; 2\sqrt2; \sqrt{3 + \sqrt{6}}; \sqrt[3]{5}; \frac{\sqrt{3}}{2}
\frac{2 \sqrt{2}}{3 \sqrt{3}}; \frac{3 - \sqrt{3}}{2}; -\frac{5+12\sqrt{3}}{26}; \sqrt{\frac{2133.33}{\pi}}; 9\pi
8\pi - 16; \frac{3\pi^2}{2}; \frac{5}{4} - \frac{3\pi}{8}; 2002^5; 2^{10}; 3^{\frac{1}{3}} \times 8^{\frac{1}{8}}
12^{1/7}; 4 \cdot 7!; \binom{99}{9}; x^4-16; 3x^3-5x^2+8x-35; (x-2)(x+3); \frac{n^2+2n-1}{2}; 2^{k}
\frac{a^2 - b^2}{2a}; e^{e}-1; \ln 2 - \frac{1}{2}; (1, 2); (1,2]; [-2, 3); (2, 1)
(-\infty, 2]; (-\infty, -1) \cup (2, \infty); \{1, 2\}; 1, 2; (1, 200); (3, 4, 5)
3 : 4; 05:54; 171_8; x = 5; x \geq 7; 7\sqrt{2}.; 90^\circ; 5 \text{ cm}; 20 seconds; \text{(A)}; c
\begin{pmatrix} 7 \\ -13 \end{pmatrix}
"""  # noqa: E501
TRUTHS = [truth.strip() for line in TRUTHS.strip().splitlines() for truth in line.split(";")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", [72]),
        ("-1,080.5", [-1080.5]),
        (r"-\frac{5+12\sqrt{3}}{26}", [-(5 + 12 * sqrt(3)) / 26]),
        (r"\frac12 + 2\sqrt2", [0.5 + 2 * sqrt(2)]),
        (r"3\pi^2/4", [3 * pi**2 / 4]),
        (r"-2^{10}", [-1024]),
        (r"\sqrt[3]{8}", [2]),
        (r"2(\pi + 1)", [2 * pi + 2]),
        ("x^2 - 2x + 1", [(at("x") - 1) ** 2]),
        (r"(-\infty, 2]", [-inf, 2]),
        (r"\{1, 2\}", [1, 2]),
    ],
)
def test_values(text, expected):
    assert values(text) == pytest.approx(tuple(expected), rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        r"2\frac12",
        "2(3)",
        "2 3",
        "1,234, 5",
        "(1,234)",
        "171_8",
        r"44\%",
        "5!",
        "1/0",
        r"\sqrt{-1}",
        "(-8)^{1/3}",
        r"\sqrt{(-1)^{0.5}}",
        "3m",
        "e",
        "2i",
    ]
    + [
        "x(2)",
        r"1/2\pi",
        r"\frac123",
        "2^10",
        "2^3^4",
        "9^{9^{9^9}}",
        "10^{400}",
        "(1, 2",
        "1)",
        "",
        ",",
        "x = 5",
        "1:2",
        "{3}",
    ]
    + ["(" * 40 + "1" + ")" * 40, "\ud800", "٣"],
)
def test_ambiguous_text_has_no_value(text):
    assert values(text) is None


def test_no_unit_is_made_of_our_letters():
    assert not [unit for unit in units if set(unit) <= set(constants._LETTERS)]


def test_differ():
    assert differ([1, 2], [1, 3]) and differ([1], [1, 2]) and differ([inf], [-inf])
    assert (
        not differ([1, 2], [2, 1])
        and not differ([2, 2], [2])
        and not differ([1], None)
        and not differ([inf], [inf])
    )
    assert not differ([0.333333], [1 / 3]) and differ([0.33333], [1 / 3])  # six places
    assert (
        differ([8e-7], [1.2e-6])
        and differ([0], [1e-300])
        and not differ([1e-300], [1e-300])
        and not differ([0], [0])
    )


@pytest.mark.parametrize(
    "text", [r"1 - \frac13 - \frac23", "(x+1)^2 - x^2 - 2x - 1", "10^{20} + 1 - 10^{20}"]
)
def test_sum_whose_terms_cancel_has_no_value(text):
    assert values(text) is None


@pytest.mark.parametrize("truth", TRUTHS)
def test_math_verify_reads_the_same(truth):
    """A value is that of math-verify's own expression, so that two that differ can never be equal
    to it.
    """
    ours, theirs = values(plain(truth)), _numbers(parse(f"\\boxed{{{truth}}}")[0])
    if ours is not None and theirs is not None:
        assert not differ(ours, theirs)


@pytest.mark.slow
def test_verdicts_are_those_of_math_verify():
    """On equal truths, on pairs of them, and on near misses."""
    pairs = random.Random(0).sample(list(itertools.permutations(TRUTHS, 2)), 300)
    pairs += [(truth, truth) for truth in TRUTHS]
    pairs += [
        ("1/2", "0.5"),
        ("0.5", r"\frac12"),
        (r"\frac{1}{3}", "0.333333"),
        ("40", r"40 \%"),
        ("0.4", r"40 \%"),
    ]
    parsed = {text: parse(f"\\boxed{{{text}}}") for text in itertools.chain(*pairs)}
    ours = {pair: _equal(plain(pair[0]), plain(pair[1])) for pair in pairs}
    theirs = {pair: verify(parsed[pair[0]], parsed[pair[1]]) for pair in pairs}
    assert [pair for pair in pairs if ours[pair] != theirs[pair]] == []
