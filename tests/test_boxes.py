r"""Boxes and frames in a text, and which of them are one answer."""

import pytest

from jaxrft.rewards.boxes import joined_boxes, last_boxed


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{1}, then \fbox{2}", "2"),
        (r"\fbox{1}, then \boxed{2}", "2"),
        (r"\framebox {3}", "3"),
        (r"\boxed{1} \fbox{2", "1"),
        (r"\fbox{\boxed{3}}", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("none", None),
    ],
)
def test_last_closed_box_or_frame_counts(text, held):
    assert last_boxed(text) == held


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
        (r"$\boxed{1} \quad \text{or} \quad \boxed{2}$", "1, 2"),
        (r"\boxed{1}\boxed{2}", "1, 2"),
        (r"\boxed{1} cats and \boxed{2} dogs", "1, 2"),
        (r"\boxed{0}. So \boxed{1}; \boxed{2}", "1, 2"),
        (r"\boxed{1}. And \boxed{2}", None),
        (r"\boxed{1}+\boxed{2}", None),
        (r"\boxed{1} no, it is \boxed{2}", "1, 2"),
        (r"\boxed{1} and" + " a long way" * 10 + r" \boxed{2}", None),
        (r"\boxed{1}", None),
        ("none", None),
    ],
)
def test_boxes_of_one_sentence_are_joined(text, held):
    assert joined_boxes(text) == held
