"""Prompts, text or messages, as the tokens that a completion follows."""

from __future__ import annotations

import datetime
import functools
import html
import json
import logging
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrft.lm import panics, templates
from jaxrft.lm.templates import Answer, Request
from jaxrft.types import InputError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | list[dict]  # text, or messages {"role", "content"}

BATCH = 256  # texts tokenized at once
MARK = "83561740922957310648"  # replaces words; filters of templates do not change digits
SHORT = 12  # characters; fewer may stand in the template's own text
SAMPLES = ("a", "1", "?", "word")  # texts of which a tokenizer knows at least one
REQUIRED_ROLES = ("system", "developer", "user")  # roles whose words must be in a prompt
# such as /no_think, which templates of hybrid reasoners take out of the words
SWITCH = re.compile(r"(?<!\S)/\w+")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message


class Options(NamedTuple):
    """The arguments of chat templates next to the messages."""

    # [N] `chat_template_kwargs` of each prompt
    variables: Sequence[dict[str, object]] | None = None
    date: str | None = None  # today's for templates that write the date, in ISO form; None = today
    name: str = "the prompts"  # of the set, for errors


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], options: Options = Options()
) -> Iterator[list[int]]:
    """Yields the tokens that a completion of each prompt follows, in order.

    Messages go through the chat template, up to the header of the answer, or, where the last
    message is the assistant's, up to the end of its words, which the completion continues. Their
    tokens are those of transformers' `apply_chat_template`. Without a template their contents are
    joined by blank lines, as text. Text has before it what the tokenizer puts there, BOS or [CLS],
    unless it spells out the BOS itself, and nothing behind it.

    Raises InputError, which names the row, when the template breaks, exceeds a bound of
    `templates`, refuses the messages or leaves words of the user or the system out, and when the
    tokenizer cannot encode a text.
    """
    texts = _texts(tokenizer, prompts, options)
    begun = str(tokenizer.bos_token or "")
    first = 0
    while batch := list(islice(texts, BATCH)):
        for text, tokens in zip(
            batch, _tokenize(tokenizer, batch, first, options.name), strict=True
        ):
            bare = text.rendered or (begun and text.content.startswith(begun))
            yield tokens if bare else [*_beginning(tokenizer), *tokens]
        first += len(batch)


class _Text(NamedTuple):
    content: str
    rendered: bool  # by a chat template, which writes all special tokens itself


def _texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], options: Options
) -> Iterator[_Text]:
    """Yields the texts of all prompts."""
    rows = [row for row, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if rows and tokenizer.chat_template is None:
        _warn_no_template(tokenizer.name_or_path)
        rows = []
    if not rows:
        if names := {name for variables in options.variables or () for name in variables}:
            _warn_unread(tokenizer.name_or_path, ", ".join(sorted(names)))
        for prompt in prompts:
            text = (
                prompt
                if isinstance(prompt, str)
                else "\n\n".join(each["content"] for each in prompt)
            )
            yield _Text(text, rendered=False)
        return
    with closing(_rendered(tokenizer, prompts, rows, options)) as rendered:
        for prompt in prompts:
            yield _Text(prompt, False) if isinstance(prompt, str) else _Text(next(rendered), True)
        for _ in rendered:  # trials are behind the texts
            pass


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    options: Options,
) -> Generator[str]:
    """Yields the texts of the messages in `rows`, then checks by trials that short words are not
    left out.
    """
    sources = _templates(tokenizer)
    requests: list[Request] = []
    trials: dict[str, tuple[int, Request]] = {}
    for row in rows:
        messages: Any = prompts[row]
        arguments = options.variables[row] if options.variables is not None else {}
        tools = arguments.get("tools") is not None
        variables = {**tokenizer.special_tokens_map, **arguments}
        requests.append(_request(int(tools), messages, variables))
        if (trial := _trial(messages)) is not None:
            pattern = json.dumps([[each["role"] for each in messages], arguments], default=str)
            trials.setdefault(pattern, (row, _request(int(tools), trial, variables)))
    date = options.date or datetime.date.today().isoformat()
    reads: set[str] = set()
    all_requests = [*requests, *(request for _, request in trials.values())]
    _check_json(all_requests, rows, options.name)
    with closing(templates.render(all_requests, sources, date)) as answers:
        for row, request in zip(rows, requests, strict=True):
            answer = next(answers)
            reads.update(answer.reads or ())
            yield _checked(
                answer,
                request,
                prompts[row],
                tokenizer.name_or_path,
                f"row {row + 1} of {options.name}",
            )
        names = {name for variables in options.variables or () for name in variables}
        if unread := names - reads:
            _warn_unread(tokenizer.name_or_path, ", ".join(sorted(unread)))
        for row, request in trials.values():
            answer = next(answers, Answer(failure="an earlier trial ended the process"))
            if answer.text and (lost := _lost(request.messages, answer.text, every=False)):
                raise _leaves_out(
                    tokenizer.name_or_path, lost["role"], f"row {row + 1} of {options.name}"
                )


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the template of messages, and the one of messages with tools, which often is the
    same.
    """
    given: Any = tokenizer.chat_template
    named = given if isinstance(given, dict) else {"default": given}
    if not all(isinstance(text, str) for text in named.values()):
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} is {given!r:.100}: a template is text; "
            "correct chat_template in tokenizer_config.json"
        )
    if "default" not in named:
        raise InputError(
            f"{tokenizer.name_or_path} has chat templates called {', '.join(map(str, named))}, but "
            "none called default: give one of them that name in tokenizer_config.json"
        )
    return [named["default"], named.get("tool_use", named["default"])]


def _request(template: int, messages: list[dict], variables: dict[str, object]) -> Request:
    """Returns the request for a prompt; the end of the words that a completion continues is
    marked.
    """
    messages = [_with_reasoning(message) for message in messages]
    continued = messages[-1]["role"] == "assistant"
    if continued:  # a template that trims the words takes the blank away
        messages[-1] = messages[-1] | {"content": f"{messages[-1]['content']}{MARK} "}
    return Request(template, messages, variables, not continued)


def _with_reasoning(message: dict) -> dict:
    """Returns the message with its reasoning under the names that templates know, as transformers 5
    gives it.
    """
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return (
        message
        if reasoning is None
        else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


def _trial(messages: list[dict]) -> list[dict] | None:
    """Returns the messages with a mark in place of short words, None where no words are short."""
    short = [
        each["role"] in REQUIRED_ROLES and 0 < len(_squeezed(each["content"])) < SHORT
        for each in messages
    ]
    if not any(short):
        return None
    return [
        message | {"content": f"{i}{MARK}"} if replaced else message
        for i, (message, replaced) in enumerate(zip(messages, short, strict=True))
    ]


def _check_json(requests: Sequence[Request], rows: Sequence[int], name: str) -> None:
    """Raises InputError for messages with fields that JSON has not."""
    for row, request in zip(rows, requests, strict=False):
        plain = all(
            type(value) is str for message in request.messages for value in message.values()
        )
        if plain:
            continue
        try:
            json.dumps(request.messages)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"row {row + 1} of {name} has a message that no chat template can be given "
                f"({error}): use plain values"
            ) from error


def _checked(answer: Answer, request: Request, messages: Any, folder: str, where: str) -> str:
    """Returns the text of an answer, cut where a completion continues it."""
    roles = ", ".join(message["role"] for message in messages)
    if answer.refusal:
        raise InputError(
            f"the chat template of {folder} refuses messages of the roles {roles} "
            f"({answer.refusal}), {where}: give it messages that it takes, or change the template"
        )
    if answer.failure:
        raise InputError(
            f"the chat template of {folder} fails at messages of the roles {roles} "
            f"({answer.failure}), {where}: correct the template, or give it what it looks for in "
            "the messages or with chat_template_kwargs"
        )
    text = answer.text
    if not request.generate:
        text = _cut(text, folder, where)
    if lost := _lost(messages, text, every=not request.generate):
        raise _leaves_out(folder, lost["role"], where)
    return text


def _cut(text: str, folder: str, where: str) -> str:
    """Returns the text before the mark; white space before a mark that was trimmed is the
    template's own.
    """
    before, mark, behind = text.rpartition(MARK)
    if not mark:
        raise _leaves_out(folder, "assistant", where)
    return before if behind.startswith(" ") else before.rstrip()


def _leaves_out(folder: str, role: str, where: str) -> InputError:
    remedy = "change the template"
    if role != "user":
        remedy += f", or give it no {role} message"
    return InputError(
        f"the chat template of {folder} leaves out words of the {role} message of {where}, so that "
        f"the policy would not read them: {remedy}"
    )


def _lost(messages: list[dict], text: str, *, every: bool) -> dict | None:
    """Returns the first message whose words are not in a text, of the user, the system or, if
    `every`, the last one.

    White space and switches do not count; words may be spelled as in JSON, HTML or Python.
    """
    for i, message in enumerate(messages):
        required = message["role"] in REQUIRED_ROLES or (every and i == len(messages) - 1)
        words = message["content"]
        if not required or words.strip() in text or _spelled(words, text):
            continue
        if not SWITCH.search(words) or not _spelled(SWITCH.sub("", words), SWITCH.sub("", text)):
            return message
    return None


def _spelled(words: str, text: str) -> bool:
    """Checks whether `words` are in `text`, white space aside.

    The words may be written as they are or as in JSON or Python, and the text may be HTML.
    """
    spellings = (
        words,
        json.dumps(words)[1:-1],
        json.dumps(words, ensure_ascii=False)[1:-1],
        repr(words)[1:-1],
    )
    texts = {_squeezed(text), _squeezed(html.unescape(text))}
    return any(_squeezed(spelling) in each for spelling in spellings for each in texts)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[_Text], first: int, name: str
) -> list[list[int]]:
    """Returns the tokens of texts, without special tokens other than their own; `first` is the row
    of the first.
    """
    contents = [text.content for text in texts]
    try:
        return _tokens(tokenizer, contents)
    # tokenizers raises every kind, of files that it took as well as of texts
    except Exception as error:
        for row, content in enumerate(contents, first + 1):
            try:
                content.encode()
                _tokens(tokenizer, [content])
            except UnicodeEncodeError as lone:
                raise InputError(
                    f"row {row} of {name} holds half a character, an unpaired surrogate "
                    f"({lone.reason}): write the prompt in UTF-8"
                ) from lone
            except Exception as row_error:
                raise _cannot_encode(tokenizer, row_error, f"row {row} of {name}") from row_error
        raise _cannot_encode(tokenizer, error, name) from error


def _cannot_encode(tokenizer: PreTrainedTokenizerBase, error: Exception, what: str) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(
        f"the tokenizer of {tokenizer.name_or_path} cannot encode {what} ({reason}): correct its "
        "tokenizer.json or tokenizer_config.json, or leave that prompt out"
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = False
) -> list[list[int]]:
    with panics.caught():
        encoded: Any = tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # prompts that are too long are counted elsewhere
        )
    return encoded["input_ids"]


@functools.lru_cache(maxsize=8)
def _beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the special tokens, such as BOS, that the tokenizer puts before a text.

    Warns, once, of those that it would put behind. Both are what surrounds the tokens of a sample
    text when it is encoded with special tokens.
    """
    for sample in SAMPLES:
        try:
            (bare,) = _tokens(tokenizer, [sample])
            (framed,) = _tokens(tokenizer, [sample], special=True)
        except Exception as error:
            raise _cannot_encode(tokenizer, error, repr(sample)) from error
        starts = [i for i in range(len(framed)) if bare and framed[i : i + len(bare)] == bare]
        if len(starts) == 1:
            break
    else:  # no sample can be told from special tokens, such as those for unknown words
        starts = [len(framed) - len(bare)]
    start = max(0, starts[0])
    behind = framed[start + len(bare) :]
    if behind:
        logger.warning(
            "the tokenizer of %s puts %s behind every text: prompts are without them, since "
            "completions follow",
            tokenizer.name_or_path,
            " ".join(tokenizer.convert_ids_to_tokens(behind)),
        )
    return tuple(framed[:start])


@functools.cache
def _warn_no_template(folder: str) -> None:
    logger.warning(
        "the tokenizer of %s has no chat template: messages are joined by blank lines", folder
    )


@functools.cache
def _warn_unread(folder: str, names: str) -> None:
    logger.warning(
        "%s of chat_template_kwargs changes nothing: no chat template of %s looks at it",
        names,
        folder,
    )
