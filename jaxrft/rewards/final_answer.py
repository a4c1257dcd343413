r"""Finds the final answer in a completion; the table stands in the docstring of `final_answer`."""

import re
from typing import NamedTuple

from jaxrft.rewards.boxes import joined_boxes, last_box

# characters at the end of a completion in which a box, a frame or a tag is looked for
TAIL = 100_000
PHRASES = 20  # of those that announce an answer, from the end
TEXT = 4_000  # characters at the end of a completion in which anything else is looked for

_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]{1,40})")
_TAGS = re.compile(r"<\s*(/?)\s*(?:final[ _-]?)?answer\s*>", re.IGNORECASE)
_THOUGHT = re.compile(r"</\s*think(?:ing)?\s*>", re.IGNORECASE)
# <<6*7=42>> of GSM8K
_END_TOKENS = re.compile(r"<\|[a-zA-Z_]{1,30}\|>|</?s>|<eos>|<end_of_turn>|<<[^<>\n]{1,200}>>")
_COLON = r"[:：﹕꞉︓]"
_PHRASE = re.compile(
    r"\b(?:answers?|(?:correct|right|best) (?:option|choice)"
    r"|respuesta|resposta|risposta|réponse|antwort|ответ|정답|الجواب|الإجابة)"
    rf"\b[^\n.:：=]{{0,100}}?"
    rf"(?:\b(?:is|are|was|equals|be|es|é|è|est|ist|lautet)\b\s*{_COLON}?|{_COLON}|=|\s[-–—]\s)[*_\s]*"
    rf"|\banswers?\b[*_ ]*(?=\s*(?:\$|\\\(|\\\[|[-−]?[0-9]|\())"
    rf"|^[#*_ ]*(?:the\s+)?(?:final\s+)?answer[#*_ ]*$(?:\n[=-]+$)?"
    rf"|(?:答案|答え|解答|答)\s*(?:是|为|為|は|{_COLON})\s*"
    rf"|####",
    re.IGNORECASE | re.MULTILINE,
)
_MATH = re.compile(
    r"(?P<rows>\\begin\{(?P<name>(?:align|gather|equation)\*?)\}.{1,2000}?\\end\{(?P=name)\})"
    r"|(?<!\\)\$\$(?P<dollars>(?:\\.|[^$\\]){1,2000})\$\$|\\\[(?P<display>(?:[^\\]|\\(?!\])){1,2000})\\\]"
    r"|(?<![\\0-9])\$(?![0-9][0-9,.]*\s+[a-z]{2,}\s)(?P<dollar>(?:\\.|[^$\\\n]){1,1000})\$"
    r"|\\\((?P<inline>(?:[^\\]|\\(?!\))){1,1000})\\\)",
    re.DOTALL,
)
_PARTS = ("rows", "dollars", "display", "dollar", "inline")
_JOINT = re.compile(r"[\s,;&]*(?:and|or|und|et|y|,|;|&)[\s,;&]*", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"(?<![A-Z0-9])(?<!i\.e)(?<!e\.g)(?<!approx)[.!?](?=\s)|(?<=[0-9)\]}*\"”’$%])[.!?]+(?=\s|$)|[。！？]|\n"
)
_POLITE = re.compile(
    r"\W*(?:let me know|please|i hope|hope (?:this|that|it)|feel free|thank|thanks|if you|do "
    r"you|would you|is there"
    r"|don't hesitate|can i|good luck|have a|happy to|glad to|you can|you're|note)\b",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:[\s:：]|(?:approximately|about|around|roughly|exactly|simply|just|only|equal "
    r"to|equals|therefore|thus|so|then"
    r"|option|choice|\\approx|≈|~)(?![a-zA-Z]))+",
    re.IGNORECASE,
)
_QUESTION = re.compile(r"[?？][\s*_`\"'”’»)\]]*$")
# Stands around an answer and does not count.
_WRAPPING = "*_`\"'“”‘’«»「」『』 \t\n\r.,;:!?。！？，、：；#>"
_MARKUP = '*_`"“”‘’«»「」『』 \t\n\r'
_SHORT = 200  # characters of a box that may say that it holds the answer
_STYLES = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))
_TOKENS = re.compile(
    r"(?P<digits>[0-9]+)|(?P<command>\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[a-zA-Z]+|\\.)"
    r"|(?P<product>[abcnxyz]{2,3}(?=\s*[-+*/^=])|(?<=[0-9])[abcnxyz]{2,3}(?![a-zA-Z]))"
    r"|(?P<word>(?:or|and)(?=[A-Z](?![a-z]))|[a-zA-Zà-ÿ'’]{2,})"
    r"|(?P<letter>[a-zA-Z])|(?P<space>[ \t]+)"
    r"|(?P<sign>[-+*/^=(){}\[\]<>|!%,.:;_&×·÷−–√π°≤≥∞½²³‰$€£¥₹])|(?P<other>.)",
    re.DOTALL,
)
_MATH_WORDS = frozenset(
    "sqrt pi sin cos tan ln log exp gcd lcm max min mod plus minus times over divided "
    "multiplied by squared cubed of percent pct choose factorial and or".split()
)
_CURRENCIES = "$€£¥₹"
_IS_THE_ANSWER = re.compile(
    r"\W*(?:is|are)\s+(?:the|our|your|my|an?)?\s*(?:final|correct|required|desired)?\s*(?:answer|solution|result)s?\W*",
    re.IGNORECASE,
)


_NUMBER = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?[-−]?[0-9.][0-9,.\s]*(?:\s*/\s*[0-9]+)?(?:[a-z]{1,2}[²³])?(?:\\?%|°)?"
    r"|[-−]?\\[dt]?frac\{[0-9]+\}\{[0-9]+\}"
)
_WORD = re.compile(r"[*_(\[\"'“`]*(?:[A-Za-z]|[A-Za-zÀ-ÿ-]{2,40})[*_)\]\"'”`.!]*")
_DASH = re.compile(r"^[-–—−•]\s+")
_CHOICE = re.compile(r"\(?[A-Z]\)?\s*[.:)]")
_EXPLAINED = re.compile(r"\W*([A-Z])\W{1,3}\s?(?:because|since|as|for|not|which)\b")
_CHOSEN = re.compile(
    r"\W*(?:.{0,60}\b(?i:option|choice|answer)\s+)?\(?([A-Z])\)?\W{1,3}is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
)
# I choose option C; not: I would not choose C, or: if I choose C
_PICKED = re.compile(
    r"\W*(?:(?:so|thus|therefore|hence|then|finally)\W{1,3}"
    r"|(?!(?:if|unless|when|were|should)\b)[^\n]{1,80},\s+)?"
    r"I(?:'ll|’ll|'d|’d|\s+(?:will|would|must|have\s+to))?\s+"
    r"(?:choose|pick|select|(?:go|going)\s+with)\s+(?:(?:option|choice|answer|letter)\s+)?"
    r"[*_(\[]*(?-i:([A-Z]))(?:[*_)\].]*$|[*_]*[)\].:]|[*_\W]{1,5}(?:because|since|as|for)\b)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"\b[A-Z][a-z]*\s+[0-9]+$")  # Step 2: 96
_LETTER = re.compile(r"\(?[A-Za-z]\)?")
_NAMED = re.compile(r".{0,80}(?P<by>\bis|\bare|=|[:：])\W{0,3}\s(?=\S)(?P<held>.{1,80})", re.DOTALL)
_BRACKETED = re.compile(r"\([^()\[\]{},;]+\)|\[[^()\[\]{},;]+\]|\{[^()\[\]{},;]+\}")
_AND = re.compile(r",?\s*(?:\b|(?<=[0-9)]))(?:and|or)(?:\b|(?=[A-Z(]))")
_NEXT = re.compile(r"\s*(.)", re.DOTALL)
# What wants a right side, even where words follow, and what does only at the end of a text.
_OPERATOR = re.compile(
    r"(?:[+×·÷^=]|\\(?:times|cdot|div)|\b(?:plus|minus|times|over|(?:divided|multiplied)(?: "
    r"by)?|choose|mod))\s*$",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(r"(?:[-−–/]|\b(?:and|or|of|by))\s*$", re.IGNORECASE)
_LAST_WORD = re.compile(r"\S+\s*$")  # of a truncated text, which may be a part of one
_EDGE_WORDS = re.compile(
    r"^(?:(?:plus|minus|times|over|divided|multiplied|by|of|squared|cubed|choose|mod|and|or)\b\s*)+"
    r"|(?:\s*\b(?:plus|minus|times|over|divided|multiplied|by|of|choose|mod|and|or))+$",
    re.IGNORECASE,
)


def final_answer(completion: str, *, joined: bool = False, truncated: bool = False) -> str | None:
    r"""Returns the final answer of a completion, or None.

    | order | spelling | the answer |
    |---|---|---|
    | 0 | `<think>...</think> text` | that of the text behind the last `</think>`, if it has one |
    | 1 | `\boxed{42}`, `\fbox{42}`, `\framebox{42}`, `\boxed 42` | the last of rows 1 and 2, closed and not empty |
    | 2 | `<answer>42</answer>` in any case, `<final_answer>` | that of the text within, by this table |
    | 3 | `... answer ... is 42`, `Answer: 42`, `#### 42`, a heading "Final answer" | what follows the last of these |
    | 4 | `C`, `C) 42 metres`, `Evelyn` | all of a text that is only a word or a choice |
    | 5 | `**C**`, `\pi`, `It is **even**.`, `Result: B`, `C is correct.`, `I choose C.` | the last sentence or its end, no digit |
    | 6 | `... = 42.`, `... is $42$.`, `There are 42 ways.` | the end of the last sentence with a number or formula |

    Behind the spellings of rows 3 to 6, and around the answer in all rows, do not count: spaces,
    emphasis (`**`, `_`, `` ` ``), quotes, brackets around all of it, a final point, "about" and the
    like, units and other words behind a number, and what follows in further sentences. In row 5
    there is one letter, word or formula as the whole sentence or behind its last "is" or colon; a
    word alone must be emphasized. In rows 5 and 6, questions, and sentences that only talk to the
    reader ("Let me know if you need 3 more."), do not count, and in the middle of a sentence only a
    number counts, never an expression. Of a `truncated` completion, which has no end to take an
    answer from, rows 1 to 3 count alone, without its last word. A number with an operator behind it
    (`92 *`) is a part of an expression, and no answer. With `joined`, several boxes in one sentence
    that commas, "and" or "or" join are one answer, with commas.

    The last TAIL characters are read for rows 1 and 2, the last TEXT for the others, in time linear
    in them.
    """  # noqa: E501
    text = completion[-TAIL:]
    thoughts = list(_THOUGHT.finditer(text)) if "</" in text else []
    behind = text[thoughts[-1].end() :] if thoughts else ""
    if not behind.strip():
        return _answer_in(text, joined, truncated)
    answer = _answer_in(behind, joined, truncated)
    return _marked(text, joined) if answer is None else answer


def _answer_in(text: str, joined: bool, truncated: bool) -> str | None:
    """Returns the answer by rows 1 to 6."""
    marked = _marked(text, joined)
    if marked is not None:
        return marked
    text = _END_TOKENS.sub("\n", text[-TEXT:])
    if truncated:
        return _phrased(_LAST_WORD.sub("", text))
    phrased = _phrased(text)
    return _at_the_end(text) if phrased is None else phrased


def _marked(text: str, joined: bool) -> str | None:
    """Returns the answer by rows 1 and 2."""
    box = last_box(text)
    tag = _last_tag(text)
    if tag is not None and (box is None or box.end < tag[1]):
        return _within_tag(text[tag[0] : tag[1]], joined)
    if box is not None:
        return (joined_boxes(text) if joined else None) or _within_box(text[box.begin : box.end])
    bare = _BARE_BOX.findall(text)
    return bare[-1].strip(_WRAPPING) if bare else None


def _last_tag(text: str) -> tuple[int, int] | None:
    """Returns where the last `<answer>` that is closed and not empty begins and ends."""
    opened = None
    last = None
    for tag in _TAGS.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            if text[opened : tag.start()].strip():
                last = (opened, tag.start())
            opened = None
    return last


def _within_tag(text: str, joined: bool) -> str | None:
    marked = _marked(text, joined)
    if marked is not None:
        return marked
    phrased = _phrased(text[-TEXT:])
    return _leading(text[:TEXT]) if phrased is None else phrased


def _within_box(text: str) -> str:
    """Returns what a box holds without emphasis, quotes and words around it, or what it calls the
    answer.
    """
    bare = text.strip(_MARKUP)
    if len(bare) <= _SHORT and "answer" in bare.lower():
        return _phrased(_STYLES.sub(r"\1", bare)) or bare
    lead = _LEAD.match(bare)
    return bare[lead.end() :] if lead and lead.end() < len(bare) else bare


def _phrased(text: str) -> str | None:
    """Returns the answer by row 3; one in words only where no phrase has a number, a formula or a
    single letter.
    """
    words = None
    end = len(text)
    for phrase in reversed(list(_PHRASE.finditer(text))[-PHRASES:]):
        answer = _leading(text[phrase.end() : end])
        end = phrase.start()
        if answer is None:
            continue
        if len(answer) == 1 or not answer.replace(" ", "").isalpha():
            return answer
        words = words or answer
    return words


def _leading(text: str) -> str | None:
    """Returns the answer that a text begins with, else that of its first sentence, else all of
    that.
    """
    text = _stripped_lead(text)
    if not text:
        return None
    formula = _formulas_at(text)
    if formula is not None:
        return formula
    sentence = text[: _sentence_end(text)].strip()
    run = _runs(sentence)[:1]
    if run and run[0].begin == 0 and (run[0].has_digit or sentence[0] == "\\"):
        if _breaks_off(sentence, run[0].end):
            return None
        return _bare(sentence[: run[0].end]) + _percent(sentence[run[0].end :])
    if explained := _EXPLAINED.match(sentence):
        return explained[1]
    choice = _bare(sentence)
    if not _has_digit(choice):
        return choice or None
    return choice if _CHOICE.match(choice) else _at_the_end(sentence)


def _stripped_lead(text: str) -> str:
    """Returns a text without markup and words like "about" in front of an answer."""
    text = text.lstrip(_MARKUP + ":：#>")
    lead = _LEAD.match(text)
    return text[lead.end() :].lstrip(_MARKUP) if lead else text


def _formulas_at(text: str) -> str | None:
    """Returns the formula that a text begins with, and those that are joined to it."""
    formula = _MATH.match(text)
    if formula is None:
        return None
    parts = [_inside(formula)]
    end = formula.end()
    while (joint := _JOINT.match(text, end)) and (following := _MATH.match(text, joint.end())):
        parts.append(_inside(following))
        end = following.end()
    return ", ".join(parts) + _percent(text[end:])


def _inside(formula: re.Match[str]) -> str:
    return next(formula[part] for part in _PARTS if formula[part] is not None).strip()


def _percent(text: str) -> str:
    """Returns the sign of a percentage where it follows an answer."""
    return "\\%" if re.match(r"\s*(?:\\?%|percent|pct)", text, re.IGNORECASE) else ""


def _at_the_end(text: str) -> str | None:
    """Returns the answer by rows 4 to 6."""
    alone = text.strip()
    if _WORD.fullmatch(alone) or (_CHOICE.match(alone) and "\n" not in alone):
        return _bare(alone)
    sentences = [
        each for each in _sentences(text) if not (_POLITE.match(each) or _QUESTION.search(each))
    ]
    short = _short_answer(sentences[-1]) if sentences else None
    if short is not None:
        return short
    for sentence in reversed(sentences):
        if _has_digit(sentence) or _MATH.search(sentence):
            return _last_of(sentence)
    return None


def _short_answer(sentence: str) -> str | None:
    """Returns the answer of a last sentence by row 5, which is one letter, word or formula, or ends
    in one.

    One with a digit is left to row 6. A word must be emphasized or behind a colon, for "Done." is
    none. A letter behind "is" must be a capital one or emphasized, for "a" is none.
    """
    if chosen := _CHOSEN.match(sentence) or _PICKED.match(sentence):
        return chosen[1]
    named = _NAMED.fullmatch(sentence)
    held = named["held"] if named else sentence
    if _has_digit(held) and "\\begin" not in held:
        return None
    bare = held.strip(_MARKUP + "$.!")
    marked = held.startswith(("*", "_", "`", "$")) or (named is not None and named["by"] in ":：")
    is_letter = _LETTER.fullmatch(bare) is not None
    if is_letter and (named is None or marked or bare.strip("()").isupper()):
        return _bare(held)
    if marked and not is_letter and _WORD.fullmatch(held):
        return _bare(held)
    return _bare(held) if "\\" in held and _is_expression(bare) else None


def _is_expression(text: str) -> bool:
    """Checks whether all of a text is mathematics, without a word."""
    runs = _runs(text)
    return len(runs) == 1 and runs[0].begin == 0 and runs[0].end == len(text)


def _sentences(text: str) -> list[str]:
    """Splits a text at the ends of sentences and lines that are not within a formula."""
    sentences = []
    begin = 0
    formulas = _MATH.finditer(text)
    formula = next(formulas, None)
    for boundary in _SENTENCE_END.finditer(text):
        while formula is not None and formula.end() <= boundary.start():
            formula = next(formulas, None)
        if formula is not None and formula.start() < boundary.start():
            continue
        sentences.append(text[begin : boundary.end()])
        begin = boundary.end()
    return [sentence.strip() for sentence in [*sentences, text[begin:]] if sentence.strip()]


def _sentence_end(text: str) -> int:
    """Returns where the first sentence of a text ends."""
    formula = _MATH.search(text)
    for boundary in _SENTENCE_END.finditer(text):
        if formula is None or not formula.start() < boundary.start() < formula.end():
            return boundary.end()
    return len(text)


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))


def _last_of(sentence: str) -> str | None:
    """Returns the formula at the end of a sentence, else the last number, which may stand anywhere
    in it.
    """
    formulas = list(_MATH.finditer(sentence))
    runs = [run for run in _runs(sentence) if run.has_digit]
    if formulas and (not runs or runs[-1].begin < formulas[-1].end()):
        last = formulas[-1]
        if _ends(sentence[last.end() :]):
            return _formulas_at(sentence[_first_joined(sentence, formulas) :])
        return _inside(last) if _NUMBER.fullmatch(_inside(last)) else None
    if _breaks_off(sentence, runs[-1].end):
        return None
    run = _bare(_DASH.sub("", _bare(sentence[runs[-1].begin : runs[-1].end])))
    behind = sentence[runs[-1].end :]
    number = _NUMBER.fullmatch(run.rpartition("=")[2].strip())
    return run + _percent(behind) if number or _ends(behind) else None


def _breaks_off(sentence: str, end: int) -> bool:
    """Returns whether mathematics that ends there wants a right side: it is a part of an
    expression, no answer.
    """
    text = sentence[:end].rstrip()
    if text.endswith("*"):
        return not _ends_emphasis(text)
    nothing_follows = not sentence[end:].strip(_WRAPPING)
    return bool(_OPERATOR.search(text)) or (nothing_follows and bool(_CONNECTIVE.search(text)))


def _ends_emphasis(text: str) -> bool:
    """Returns whether the stars that end a text close an emphasis, as Markdown has it, and multiply
    nothing.
    """
    number = text.rstrip("*")
    stars = text[len(number) :]
    return not number[-1:].isspace() or number.startswith(stars)


def _ends(behind: str) -> bool:
    """Checks whether an answer ends its sentence.

    A percent sign, or words that say that it is the answer, may stand behind it.
    """
    rest = behind.strip(_WRAPPING + ")]}")
    return not rest or _percent(behind) != "" or _IS_THE_ANSWER.fullmatch(rest) is not None


def _first_joined(sentence: str, formulas: list[re.Match[str]]) -> int:
    """Returns where the formulas begin that are joined to the last one."""
    first = len(formulas) - 1
    while first > 0 and _JOINT.fullmatch(
        sentence, formulas[first - 1].end(), formulas[first].start()
    ):
        first -= 1
    return formulas[first].start()


class _Run(NamedTuple):
    """Mathematics in a sentence without a word that is none."""

    begin: int
    end: int
    has_digit: bool


def _runs(sentence: str) -> list[_Run]:
    """Returns the runs of mathematics in a sentence, in order."""
    runs: list[_Run] = []
    begin = -1
    end = -1
    has_digit = False
    before = " "  # the last character that is no space
    for token in _TOKENS.finditer(sentence):
        if token["space"]:
            continue
        if _is_mathematics(token, before, sentence):
            begin = token.start() if begin < 0 else begin
            end = token.end()
            has_digit = has_digit or token["digits"] is not None
        elif begin >= 0:
            runs.append(_Run(begin, end, has_digit))
            begin = -1
            has_digit = False
        before = token[0][-1]
    return [*runs, _Run(begin, end, has_digit)] if begin >= 0 else runs


def _is_mathematics(token: re.Match[str], before: str, sentence: str) -> bool:
    """Checks whether a token is mathematics.

    A letter is mathematics where it touches a digit or stands next to a sign.
    """
    if token["product"]:
        return True
    if token[0] == ":":
        return _HEADING.search(sentence, max(0, token.start() - 30), token.start()) is None
    if token["word"]:
        return token["word"].lower() in _MATH_WORDS
    if token["letter"]:
        behind = _NEXT.match(sentence, token.end())
        attached = token.start() > 0 and sentence[token.start() - 1].isdigit()
        return (
            attached or before in "=+-*/^({[" or (behind is not None and behind[1] in "=+-*/^(_)]")
        )
    return token["other"] is None


def _bare(text: str) -> str:
    """Returns an answer without what stands around it, with commas for "and" and "or"."""
    text = _stripped(text)
    text = _stripped(_EDGE_WORDS.sub("", text)).strip(_CURRENCIES + "= ").removesuffix("/")
    text = _AND.sub(",", text)
    unclosed = sum(text.count(opening) - text.count(closing) for opening, closing in _PAIRS)
    for opening, closing in _PAIRS if unclosed else ():  # of [0, 1) each bracket has another one
        if text.count(opening) < text.count(closing):
            text = _stripped(text.removesuffix(closing))
        if text.count(opening) > text.count(closing):
            text = _stripped(text.removeprefix(opening).removesuffix(opening))
    return _stripped(text[1:-1]) if _BRACKETED.fullmatch(text) else text


def _stripped(text: str) -> str:
    """Returns a text without emphasis, quotes and points around it; a point in front of a digit
    belongs to a number.
    """
    behind = text.rstrip(_WRAPPING)
    bare = behind.lstrip(_WRAPPING)
    start = len(behind) - len(bare)
    return (
        behind[start - 1 :] if start and behind[start - 1] == "." and bare[:1].isdigit() else bare
    )
