"""Tasks from files, TFDS, the hub, reasoning_gym or the built-in generator, with the columns of
TRL, verl, GURU and GSM8K.

Rows in messages count from 1.
"""

import difflib
import json
import logging
import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrft.config import TasksConfig, check_variables
from jaxrft.host.files import JSON, UnreadableJSON, parse_json
from jaxrft.lm.prompts import Prompt
from jaxrft.rewards import ground_truth
from jaxrft.rewards.calls import GIVEN
from jaxrft.tasks import files, hub, suite_files, tfds
from jaxrft.tasks.files import Columns, Entries, shown
from jaxrft.types import InputError

logger = logging.getLogger(__name__)

VARIABLES = "chat_template_kwargs"
SYSTEM_PROMPT = "system_prompt"
# verl and GURU; TRL and GSM8K
ANSWERS = ("reward_model.ground_truth", "answer", "solution", "ground_truth")


class Rows(NamedTuple):
    """Tasks as their source has them."""

    prompts: list[Prompt]  # [N] text or messages
    # [N] JSON values each, handed to rewards by name; `answer` is the ground truth
    columns: Columns
    reference_pass_rates: np.ndarray | None = None  # [N, K] float32, NaN = unknown
    domains: list[str] | None = None  # [N] names; None = all tasks are of one domain
    variables: list[dict[str, JSON]] | None = None  # [N] `chat_template_kwargs` of each task


def load(config: TasksConfig) -> Rows:
    """Reads the tasks of `config.source`, and maps its columns to the names of this package.

    | columns | prompt | `answer` |
    |---|---|---|
    | verl, GURU | `prompt` | `reward_model.ground_truth` |
    | TRL | `prompt` | `answer`, `solution` or `ground_truth`, if there is one |
    | GSM8K | `question`, as a user message | the number after ####; the whole text becomes `solution` |

    `prompt_column` and `answer_column` name other columns, taken as they are (`a.b` is the field b
    of column a). A prompt is text or messages; text that is a JSON list of objects with a role and
    a content is messages. A `suite` has its own columns, see `suite_files.read`. A column
    `chat_template_kwargs` of objects, or JSON text of such, goes to the chat template of its row. A
    column `system_prompt` has the system messages of prompts that have none, in place of the
    config's. A column `domain` of names, or the one that `domain_column` names,
    has the tasks' domains. Raises InputError for a source that cannot be read and for the first
    value that cannot be used.
    """  # noqa: E501
    return interpret(*read(config), config)


def read(config: TasksConfig) -> tuple[Columns, np.ndarray | None]:
    """Reads the columns of `config.source`, under its own names, and its reference pass rates.

    Only built-in families have the latter. Raises InputError for a source that cannot be read or
    holds nothing.
    """
    if config.limit is not None and config.limit < 1:
        raise InputError(
            f"tasks.limit is {config.limit}: it must be at least 1, or None for all tasks"
        )
    columns, references = _read(config)
    columns = {name: entries[: config.limit] for name, entries in columns.items()}
    if not any(columns.values()):
        raise InputError(f"{config.source} holds no tasks: give a source with at least one")
    return columns, None if references is None else references[: config.limit]


def interpret(columns: Columns, references: np.ndarray | None, config: TasksConfig) -> Rows:
    """Interprets the columns of a source as tasks, as `load` says.

    The pass rates in `pass_rate_columns`, if any are named, replace `references`.
    """
    if config.suite is not None:
        rows = suite_files.read(columns, config)
        columns = rows.columns
        config = replace(
            config, prompt_column="prompt", answer_column="answer", domain_column=rows.domain
        )
    name, prompts = _prompts(columns, config)
    if config.pass_rate_columns:
        references = _pass_rates(columns, config)
    domains = _domains(columns, config)
    variables = _variables(columns, config.source)
    columns = _with_answer(columns, config)
    other_columns = {
        key: entries for key, entries in columns.items() if key != name or key == "answer"
    }
    return Rows(
        prompts, _json_columns(other_columns, config.source), references, domains, variables
    )


def _read(config: TasksConfig) -> tuple[Columns, np.ndarray | None]:
    """Reads a source by its kind: its columns and, of a built-in family, reference pass rates."""
    kind, _, name = config.source.partition(":")
    if kind == "builtin":
        from jaxrft.tasks import builtin

        rows = builtin.load(name)
        return {"prompt": rows.prompts, **rows.columns}, rows.reference_pass_rates
    if kind == "gym":
        from jaxrft.tasks import gym

        return gym.load(name), None
    if kind == "tfds":
        return tfds.read(
            name, split=config.split, data_dir=config.data_dir, limit=config.limit
        ), None
    if kind == "hub":
        return hub.read(name, split=config.split, subset=config.subset, limit=config.limit), None
    if Path(config.source).suffix not in (*files.ENDINGS, files.CSV):
        kinds = (
            "a .parquet, .jsonl, .json or .csv file, builtin:NAME, gym:NAME, tfds:NAME or "
            "hub:OWNER/NAME"
        )
        raise InputError(f"tasks.source is {config.source!r}: give {kinds}")
    return files.read(Path(config.source), config.limit), None


def _find(columns: Columns, name: str) -> Entries | None:
    """Finds the column `name`, or, for `a.b`, the field b of column a.

    Returns None if there is neither.
    """
    if name in columns:  # first, because names such as qwen2.5_7b_pass_rate have dots of their own
        return columns[name]
    column, _, field = name.partition(".")
    entries = [
        entry.get(field) if isinstance(entry, dict) else None for entry in columns.get(column, ())
    ]
    return entries if any(entry is not None for entry in entries) else None


def _need(columns: Columns, name: str, option: str, source: str) -> Entries:
    entries = _find(columns, name)
    if entries is None:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f"did you mean {near[0]}?" if near else f"set tasks.{option} to one of them"
        raise InputError(f"{source} has no column {name}, only {', '.join(columns)}: {hint}")
    return entries


def _prompts(columns: Columns, config: TasksConfig) -> tuple[str, list[Prompt]]:
    """Finds the prompt column, and returns its name and its prompts.

    A system message of the row, or else of the config, is put before prompts that have none.
    """
    if config.prompt_column is None and "prompt" not in columns and "question" in columns:
        name = "question"
        entries = [_as_messages(question) for question in columns["question"]]
    else:
        name = config.prompt_column or "prompt"
        entries = _need(columns, name, "prompt_column", config.source)
    prompts = [
        _prompt(entry, f"{config.source} row {row}, column {name}")
        for row, entry in enumerate(entries, 1)
    ]
    system_prompts = _system_prompts(columns, config)
    if system_prompts is not None:
        prompts = list(map(_with_system, prompts, system_prompts))
    return name, prompts


def _system_prompts(columns: Columns, config: TasksConfig) -> Entries | None:
    """Returns the system message of each task, empty for none; None if no task has one.

    An entry of the column `system_prompt` goes before that of the config.
    """
    default = config.system_prompt
    if SYSTEM_PROMPT not in columns:
        return None if default is None else [default] * len(next(iter(columns.values())))
    entries = columns[SYSTEM_PROMPT]
    for row, entry in enumerate(entries, 1):
        if not isinstance(entry, str | None):
            raise InputError(
                f"{config.source} row {row}, column {SYSTEM_PROMPT} is {shown(entry)}: a system "
                "prompt is text, or null for that of tasks.system_prompt"
            )
    return [(default or "") if entry is None else entry for entry in entries]


def _as_messages(text: JSON) -> JSON:
    """Wraps text as a user's message; messages, also those spelled as JSON, stay as they are."""
    if not isinstance(text, str):
        return text
    return _messages_in(text) or [{"role": "user", "content": text}]


def _prompt(entry: object, where: str) -> Prompt:
    """Checks one prompt, and normalizes its messages.

    In a message the role comes first. Fields that are None, as parquet has them for absent ones,
    are removed.
    """
    if isinstance(entry, str):
        messages = _messages_in(entry)
        if messages is None:
            return entry
        entry = messages
    if not isinstance(entry, list) or not entry:
        raise InputError(f"{where} is {shown(entry)}: a prompt is text or a list of messages")
    for message in entry:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(field), str) for field in ("role", "content")):
            raise InputError(
                f"{where} has the message {shown(message)}: a message has a role "
                "and a content, as text"
            )
    first = dict.fromkeys(("role", "content"))
    return [
        first | {field: value for field, value in message.items() if value is not None}
        for message in entry
    ]


def _messages_in(text: str) -> list[dict] | None:
    """Returns the messages of text that is a JSON list of objects with a role and a content, else
    None.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        entries = parse_json(text, list)
    except UnreadableJSON:
        return None
    spelled = entries and all(
        isinstance(each, dict) and {"role", "content"} <= each.keys() for each in entries
    )
    return entries if spelled else None


def _variables(columns: Columns, source: str) -> list[dict[str, JSON]] | None:
    """Checks the entries of the column `chat_template_kwargs`; returns None without that column.

    Variables that are None, as parquet has them for absent ones, are removed.
    """
    if VARIABLES not in columns:
        return None
    variables = []
    for row, entry in enumerate(columns[VARIABLES], 1):
        try:
            given = check_variables({} if entry is None else entry)
        except ValueError as error:
            raise InputError(
                f"{source} row {row}, column {VARIABLES} is {shown(entry)}: {error}"
            ) from error
        variables.append({name: value for name, value in given.items() if value is not None})
    return variables


def _with_system(prompt: Prompt, system_prompt: str) -> Prompt:
    """Puts a system message, unless it is empty, before a prompt that has none."""
    if not system_prompt:
        return prompt
    messages: list[dict] = _as_messages(prompt)
    if any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _with_answer(columns: Columns, config: TasksConfig) -> Columns:
    """Adds the column `answer` if the source has a ground truth under any of its names.

    Of answers in the layout of GSM8K it is the number behind ####, and `solution` the whole.
    """
    name = config.answer_column or next(
        (name for name in ANSWERS if _find(columns, name) is not None), None
    )
    if name is None:
        return columns
    answers = _need(columns, name, "answer_column", config.source)
    verbatim = config.answer_column is not None or "prompt" in columns or "question" not in columns
    if verbatim or not any("####" in str(answer) for answer in answers):
        return {**columns, "answer": answers}
    numbers = [ground_truth.gsm8k_number(answer) for answer in answers]
    if None in numbers:
        row = numbers.index(None)
        where = f"{config.source} row {row + 1} has the answer {shown(answers[row])}"
        raise InputError(f"{where}: an answer of GSM8K ends in #### and a number")
    return {"solution": answers, **columns, "answer": numbers}


def _pass_rates(columns: Columns, config: TasksConfig) -> np.ndarray:
    """Reads the pass rates [N, K] float32, one column for each reference policy."""
    rates = [
        [
            _pass_rate(value, f"{config.source} row {row}, column {name}")
            for row, value in enumerate(_need(columns, name, "pass_rate_columns", config.source), 1)
        ]
        for name in config.pass_rate_columns
    ]
    return np.array(rates, np.float32).T


def _pass_rate(value: object, where: str) -> float:
    """Checks that a pass rate is in [0, 1]; None and NaN become NaN, which is unknown."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float | Decimal) or isinstance(value, bool):
        raise InputError(
            f"{where} is {shown(value)}: a pass rate is a number in [0, 1], or "
            "empty if it is not known"
        )
    if value != value:
        return math.nan
    if not 0 <= value <= 1:  # before it becomes a float, which an int may be too large for
        raise InputError(
            f"{where} is {shown(value)}: a pass rate lies in [0, 1] and is not in percent"
        )
    return abs(float(value))  # -0.0 is 0


def _domains(columns: Columns, config: TasksConfig) -> list[str] | None:
    """Reads the domain of every task; returns None without a column of domains.

    Tasks that have none in it get the title of their set.
    """
    name = config.domain_column or "domain"
    if config.domain_column is None and not all(
        isinstance(entry, str | None) for entry in columns.get(name, (0,))
    ):
        return None  # no column, or one that is about something else
    entries = _need(columns, name, "domain_column", config.source)
    for row, entry in enumerate(entries, 1):
        if not isinstance(entry, str | int | None) or isinstance(entry, bool):
            where = f"{config.source} row {row}, column {name}"
            raise InputError(f"{where} is {shown(entry)}: a domain is a name or a number")
    return [config.title if entry is None else str(entry) for entry in entries]


def _json_columns(columns: Columns, source: str) -> Columns:
    """Selects the columns that JSON can carry to the processes that grade.

    Others (images, dates) are left out, with a warning. Raises InputError for a column whose name a
    reward needs for its own arguments.
    """
    sendable = {}
    for name, entries in columns.items():
        if name in GIVEN:
            raise InputError(
                f"{source} has a column {name}, which rewards get from this "
                "package: rename the column"
            )
        if name == "answer":
            entries = _ground_truths(entries, source)
        try:
            for entry in entries:
                json.dumps(entry)
            sendable[name] = entries
        except (TypeError, ValueError) as error:
            logger.warning(
                "%s: column %s is left out, rewards do not get it (%s)", source, name, error
            )
    return sendable


def _ground_truths(entries: Entries, source: str) -> Entries:
    """Converts ground truths to values that JSON has.

    Raises InputError for those that have none, such as dates.
    """
    truths = []
    for row, entry in enumerate(entries, 1):
        try:
            truths.append(ground_truth.sendable(entry))
        except InputError as error:
            raise InputError(f"{source} row {row}: {error}") from error
    return truths
