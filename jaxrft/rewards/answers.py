"""Finds the answer between `<answer>` tags, and reads lists and objects in it."""

import re

DEEPEST = 20  # lists in lists
LONGEST = 1 << 16  # characters of an answer; a longer one is none
_THOUGHT_END = "</think>"
_TAGS = re.compile(r"<(/?)answer>", re.IGNORECASE)
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_ESCAPES = {"n": "\n", "t": "\t"}

Literal = str | list["Literal"] | dict[str, "Literal"]


def last_answer(completion: str) -> str | None:
    """Returns the text of the last closed `<answer>`, thoughts aside; None if it is longer than
    LONGEST, or there is none.

    >>> last_answer("<answer>1</answer> no, <Answer> 2 </answer> or <answer>3")
    '2'
    """
    text = completion.rpartition(_THOUGHT_END)[2]
    opened = None
    last = None
    for tag in _TAGS.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            last = (opened, tag.start())
            opened = None
    if last is None or last[1] - last[0] > LONGEST:
        return None
    return text[slice(*last)].strip()


def read_literal(text: str, opening: str) -> Literal | None:
    """Reads the one list (`[`) or object (`{`) in an answer; None if it has none, or several, or
    one nested more than DEEPEST deep.

    It is spelled as in JSON or in Python; words need no quotes. Every number, word and quoted text
    becomes text, so that `1`, `"1"` and `'1'` are the same. Text around it does not count.

    >>> read_literal("so ['a', b, 1]", "["), read_literal('{"x": (1, [2])}', "{")
    (['a', 'b', '1'], {'x': ['1', ['2']]})
    """
    begin = text.find(opening)
    end = text.rfind(_CLOSING[opening])
    if begin < 0 or end < begin:
        return None
    return _Reader(text[begin : end + 1]).read()


class _Reader:
    """Reads a literal without recursion, in time linear in it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> Literal | None:
        """Returns the literal, or None unless the text is one."""
        root: list[Literal] = []
        # (container, what closes it, the key that waits for its value)
        stack: list[tuple[list[Literal] | dict[str, Literal], str, str | None]] = [(root, "", None)]
        needs_comma = False
        while (token := self._token()) is not None:
            container, closing, key = stack[-1]
            kind, word = token
            if kind == closing:
                if key is not None:
                    return None
                stack.pop()
                needs_comma = True
            elif kind == ",":
                if not needs_comma or len(stack) == 1:
                    return None
                needs_comma = False
            elif needs_comma:
                return None
            elif isinstance(container, dict) and key is None:
                if kind != "text" or self._token() != (":", ":"):
                    return None
                stack[-1] = (container, closing, word)
            else:
                value: Literal = word
                if kind in _CLOSING:
                    value = {} if kind == "{" else []
                elif kind != "text":
                    return None
                if len(stack) > DEEPEST:
                    return None
                if isinstance(container, list):
                    container.append(value)
                else:
                    container[str(key)] = value
                    stack[-1] = (container, closing, None)
                needs_comma = kind == "text"
                if not isinstance(value, str):
                    stack.append((value, _CLOSING[kind], None))
        return root[0] if len(root) == 1 and len(stack) == 1 and self._ended() else None

    def _ended(self) -> bool:
        return not self._text[self._at :].strip()

    def _token(self) -> tuple[str, str] | None:
        """Returns the next (kind, word): a bracket, a comma, a colon or a text; None where there is
        none.
        """
        text = self._text
        while self._at < len(text) and text[self._at].isspace():
            self._at += 1
        if self._at == len(text):
            return None
        mark = text[self._at]
        if mark in "[](){},:":
            self._at += 1
            return mark, mark
        if mark in "\"'":
            return self._quoted(mark)
        start = self._at
        while self._at < len(text) and text[self._at] not in "[](){},:\"'\n":
            self._at += 1
        return "text", text[start : self._at].strip()

    def _quoted(self, quote: str) -> tuple[str, str] | None:
        parts = []
        at = self._at + 1
        while at < len(self._text) and self._text[at] != quote:
            if self._text[at] == "\\":
                at += 1
                mark = self._text[at : at + 1]
                parts.append(_ESCAPES.get(mark, mark))
            else:
                parts.append(self._text[at])
            at += 1
        if at >= len(self._text):
            return None
        self._at = at + 1
        return "text", "".join(parts)
