r"""Finds `\boxed{}`, `\fbox{}` and `\framebox{}` in a text, in time linear in it."""

import re
from typing import NamedTuple

BETWEEN = 60  # characters between two boxes of one answer

_NAMES = ("\\boxed", "\\fbox", "\\framebox")
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_FRAMES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{$|^\}")
_STYLES = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\(?:quad|qquad|[()\[\],;: ])|[$~{}]")
_SENTENCE_END = re.compile(r"[.!?。！？]|\n\s*\n")
_JOINER = re.compile(r"[,;&，、]|\b(?:and|or|und|et|y)\b", re.IGNORECASE)


class Box(NamedTuple):
    """Where the content of a closed box begins and ends."""

    begin: int
    end: int


def last_boxed(text: str) -> str | None:
    r"""Returns what the last box that is closed holds, or None.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}, or \fbox{3"), last_boxed(r"\boxed{}")
    ('\\frac{1}{2}', '')
    """
    box = last_box(text, empty=True)
    return None if box is None else text[box.begin : box.end]


def last_box(text: str, *, empty: bool = False) -> Box | None:
    """Returns the last box that is closed, and holds something unless it may be `empty`."""
    begin = max(text.rfind(name) for name in _NAMES)
    if begin < 0:
        return None
    boxes = _boxes(text, begin, empty=empty) or _boxes(text, 0, empty=empty)
    return boxes[-1] if boxes else None


def joined_boxes(text: str) -> str | None:
    r"""Returns what the last box and those that are joined to it hold, with commas; None for a
    single one.

    Boxes are joined where no more than BETWEEN characters stand between them: none, or some with a
    comma, a semicolon, "and" or "or", but no end of a sentence.

    >>> joined_boxes(r"\boxed{1}. So \boxed{2} apples and \boxed{3} pears"), joined_boxes(r"\boxed{1} + \boxed{2}")
    ('2, 3', None)
    """  # noqa: E501
    if max(text.rfind(name) for name in _NAMES) < 0:
        return None
    boxes = _boxes(text, 0, empty=False)
    first = len(boxes) - 1
    while first > 0 and _joins(text[boxes[first - 1].end : boxes[first].begin]):
        first -= 1
    joined = boxes[max(first, 0) :]
    return (
        ", ".join(text[box.begin : box.end].strip() for box in joined) if len(joined) > 1 else None
    )


def _boxes(text: str, begin: int, *, empty: bool) -> list[Box]:
    """Returns the closed boxes behind `begin`, of nested ones the innermost, in order."""
    boxes: list[Box] = []
    open_braces: list[int] = []  # where the content of a box begins, -1 for another brace
    for brace in _BRACES.finditer(text, begin):
        if brace[0] == "{":
            open_braces.append(-1)
        elif len(brace[0]) > 2:
            open_braces.append(brace.end())
        elif brace[0] == "}" and open_braces:
            start = open_braces.pop()
            innermost = start >= 0 and (not boxes or start > boxes[-1].begin)
            if innermost and (empty or text[start : brace.start()].strip()):
                boxes.append(Box(start, brace.start()))
    return boxes


def _joins(between: str) -> bool:
    """Checks whether the text between the contents of two boxes makes them one answer."""
    if len(between) > BETWEEN + len("}\\framebox{"):
        return False
    words = _SPACING.sub(" ", _STYLES.sub(r" \1 ", _FRAMES.sub("", between)))
    if _SENTENCE_END.search(words):
        return False
    return not words.strip() or _JOINER.search(words) is not None
