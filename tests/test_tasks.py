import json
import logging
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
import writers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pyarrow import parquet
from test_tokenizer import TEMPLATE
from test_tokenizer import make as make_tokenizer

from jaxrft import tasks
from jaxrft.config import TasksConfig
from jaxrft.lm import tokenizer as lm_tokenizer
from jaxrft.tasks import memory
from jaxrft.types import InputError

USER = [{"role": "user", "content": "1 + 2"}]
SYSTEM = {"role": "system", "content": "Add."}
VERL = [
    {
        "data_source": "sums",
        "prompt": prompt,
        "ability": "math",
        "reward_model": {"ground_truth": "3", "style": "rule"},
        "extra_info": {"index": index, "level": [1, 2]},
        "qwen2.5_7b_pass_rate": rate,
        "qwen3_30b_pass_rate": 0.75,
    }
    for index, (prompt, rate) in enumerate(
        [(USER, 0.25), ([SYSTEM, *USER], None), (USER, float("nan"))]
    )
]
TRL = [{"prompt": "1 + 2 =", "solution": "3", "level": 1}, {"prompt": USER, "solution": "3"}]
GSM8K = [
    {"question": "How many?", "answer": "Half of <<2500*2=5000>>5,000.\n#### 2,500"},
    {"question": "How cold?", "answer": "#### -7"},
]


def load(path, rows, **options):
    return tasks.load(TasksConfig(source=writers.write_file(path, rows), **options))


SOURCES = {
    "verl.parquet": VERL,
    "verl.jsonl": VERL,
    "text.parquet": TRL[:1],
    "trl.jsonl": TRL,
    "trl.json": TRL,
    "gsm8k.jsonl": GSM8K,
    "gsm8k.parquet": GSM8K,
    "hub:verl": VERL,
    "hub:text": TRL[:1],
    "hub:gsm8k": GSM8K,
    "tfds:verl": VERL,
    "tfds:text": TRL[:1],
    "tfds:gsm8k": GSM8K,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_prompts_answers_and_json_columns(tmp_path, monkeypatch, name):
    kind, _, dataset = name.rpartition(":")
    if kind == "hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        writers.write_hub(
            tmp_path, f"someone/{dataset}", {"data/train-00000-of-00001.parquet": SOURCES[name]}
        )
        rows = tasks.load(TasksConfig(source=f"hub:someone/{dataset}"))
    elif kind == "tfds":
        writers.write_tfds(tmp_path, dataset, SOURCES[name])
        rows = tasks.load(TasksConfig(source=name, data_dir=str(tmp_path)))
    else:
        rows = load(tmp_path / name, SOURCES[name])
    count = len(SOURCES[name])
    assert len(rows.prompts) == count and rows.reference_pass_rates is None
    assert all(
        isinstance(prompt, str) or {"role", "content"} == set(prompt[-1]) for prompt in rows.prompts
    )
    assert all(len(entries) == count for entries in rows.columns.values())
    assert all(isinstance(answer, str) for answer in rows.columns["answer"])
    assert "prompt" not in rows.columns and "question" not in rows.columns
    json.dumps(rows.columns)


@pytest.mark.parametrize("name", ["verl.parquet", "verl.jsonl"])
def test_verl_columns_become_python_and_pass_rates_float32_with_nan_for_unknown(tmp_path, name):
    columns = ("qwen2.5_7b_pass_rate", "qwen3_30b_pass_rate")
    rows = load(tmp_path / name, VERL, pass_rate_columns=columns)
    assert rows.prompts == [row["prompt"] for row in VERL]
    assert rows.columns["answer"] == ["3", "3", "3"]
    assert rows.columns["data_source"] == ["sums"] * 3
    assert rows.columns["extra_info"][2] == {"index": 2, "level": [1, 2]}
    assert rows.reference_pass_rates is not None and rows.reference_pass_rates.dtype == np.float32
    np.testing.assert_array_equal(
        rows.reference_pass_rates, [[0.25, 0.75], [np.nan, 0.75], [np.nan, 0.75]]
    )


def test_trl_columns_are_handed_on_with_none_where_a_row_has_none(tmp_path):
    rows = load(tmp_path / "trl.jsonl", TRL)
    assert rows.prompts == ["1 + 2 =", USER]
    assert rows.columns == {"solution": ["3", "3"], "level": [1, None], "answer": ["3", "3"]}


def test_gsm8k_gives_user_messages_the_bare_number_and_the_whole_solution(tmp_path):
    rows = load(tmp_path / "gsm8k.jsonl", GSM8K)
    assert rows.prompts == [[{"role": "user", "content": row["question"]}] for row in GSM8K]
    assert rows.columns == {"answer": ["2500", "-7"], "solution": [row["answer"] for row in GSM8K]}


def test_questions_with_plain_answers_keep_them(tmp_path):
    rows = load(tmp_path / "qa.jsonl", [{"question": "1 + 2", "answer": 3}])
    assert rows == tasks.Rows([USER], {"answer": [3]}, None)


def test_named_columns_are_taken_as_they_are(tmp_path):
    row = {"question": "?", "problem": "1 + 2", "answer": "#### 9", "extra_info": {"gold": "3"}}
    rows = load(
        tmp_path / "a.jsonl", [row], prompt_column="problem", answer_column="extra_info.gold"
    )
    assert rows.prompts == ["1 + 2"] and rows.columns["answer"] == ["3"]
    assert rows.columns["question"] == ["?"]


def test_a_system_prompt_is_put_before_prompts_without_one(tmp_path):
    rows = load(
        tmp_path / "a.jsonl", [*TRL, {"prompt": [SYSTEM, *USER]}], system_prompt="Be brief."
    )
    ours = {"role": "system", "content": "Be brief."}
    assert rows.prompts == [
        [ours, {"role": "user", "content": "1 + 2 ="}],
        [ours, *USER],
        [SYSTEM, *USER],
    ]


def test_system_prompts_may_differ_by_row(tmp_path):
    """Its own message, that of its column, that of the config, and by empty text none."""
    rows = [
        {"prompt": [SYSTEM, *USER], "system_prompt": "Never seen."},
        {"prompt": USER, "system_prompt": "Be long."},
        {"prompt": "1 + 2", "system_prompt": "Be long."},
        {"prompt": USER, "system_prompt": None},
        {"prompt": "1 + 2", "system_prompt": ""},
    ]
    own, brief = ({"role": "system", "content": f"Be {word}."} for word in ("long", "brief"))
    text = {"role": "user", "content": "1 + 2"}
    got = load(tmp_path / "a.jsonl", rows, system_prompt="Be brief.")
    assert got.prompts == [[SYSTEM, *USER], [own, *USER], [own, text], [brief, *USER], "1 + 2"]
    assert got.columns["system_prompt"][1] == "Be long."  # rewards are given it, as all columns
    without = load(tmp_path / "b.jsonl", rows)
    assert without.prompts == [[SYSTEM, *USER], [own, *USER], [own, text], USER, "1 + 2"]


def test_a_system_prompt_that_is_no_text_is_refused(tmp_path):
    rows = [{"prompt": USER, "system_prompt": "Add."}, {"prompt": USER, "system_prompt": ["Add."]}]
    with pytest.raises(InputError, match=r"row 2, column system_prompt is \['Add.'\]: a system pr"):
        load(tmp_path / "a.jsonl", rows)


SPELLED = {
    "messages": (json.dumps([SYSTEM, *USER]), [SYSTEM, *USER]),
    "white space": (" \n" + json.dumps(USER, indent=2), USER),
    "further fields": (
        '[{"content": "1", "role": "user", "name": null}]',
        [{"role": "user", "content": "1"}],
    ),
    "an object": (json.dumps(USER[0]), None),
    "numbers": ("[1, 2]", None),
    "nothing": ("[]", None),
    "no content": ('[{"role": "user"}]', None),
    "one of two": ('[{"role": "user", "content": "1"}, {"role": "user"}]', None),
    "Python": (str(USER), None),
    "not JSON": ('[{"role": "user", "content": "1"}', None),
    "more behind it": (json.dumps(USER) + " What is this?", None),
    "nested deeply": ("[" * 1000, None),
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("column", ["prompt", "problem"])
def test_text_that_is_a_json_list_of_messages_is_messages(tmp_path, name, column):
    text, messages = SPELLED[name]
    rows = load(tmp_path / "a.jsonl", [{column: text}], prompt_column=column)
    assert rows.prompts == [text if messages is None else messages]
    if messages is not None:
        assert [*rows.prompts[0][0]][:2] == ["role", "content"]


def test_messages_in_text_are_checked_like_others(tmp_path):
    with pytest.raises(
        InputError,
        match="row 2, column prompt has the message .*: a message has a role and a content",
    ):
        load(
            tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": '[{"role": "user", "content": 5}]'}]
        )
    rows = load(tmp_path / "b.jsonl", [{"prompt": json.dumps(USER)}], system_prompt="Be brief.")
    assert [message["role"] for message in rows.prompts[0]] == ["system", "user"]


def test_a_question_that_is_a_json_list_of_messages_is_messages(tmp_path):
    entries = [
        {"question": json.dumps([SYSTEM, *USER])},
        {"question": USER},
        {"question": "[1, 2]"},
    ]
    rows = load(tmp_path / "a.jsonl", entries)
    assert rows.prompts == [[SYSTEM, *USER], USER, [{"role": "user", "content": "[1, 2]"}]]


VARIABLES = [{"enable_thinking": False, "level": None}, None, '{"level": "high"}']


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_column_gives_variables_to_the_template_of_its_row(tmp_path, ending):
    entries = [
        {"prompt": USER, "chat_template_kwargs": entry}
        for entry in VARIABLES[: 3 if ending == "jsonl" else 2]
    ]
    rows = load(tmp_path / f"a.{ending}", entries)
    assert rows.variables == [{"enable_thinking": False}, {}, {"level": "high"}][: len(entries)]
    assert load(tmp_path / f"b.{ending}", [{"prompt": USER}]).variables is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (5, "must be an object such as"),
        ([{"a": 1}], "must be an object such as"),
        ("thinking", "must be a JSON object such as .* but it is not JSON"),
        ("[]", "but it holds a list"),
        ({"messages": []}, "messages is set by jaxrft"),
        ({"add_generation_prompt": False}, "add_generation_prompt is set by jaxrft"),
        ({"tools": ["add"]}, "tools must be a list of objects"),
    ],
)
def test_variables_that_cannot_be_are_named(tmp_path, value, said):
    with pytest.raises(InputError, match=f"a.jsonl row 2, column chat_template_kwargs is .*{said}"):
        load(
            tmp_path / "a.jsonl",
            [{"prompt": USER}, {"prompt": USER, "chat_template_kwargs": value}],
        )


def test_limit_keeps_the_first_tasks_and_looks_no_further(tmp_path):
    rows = load(tmp_path / "a.jsonl", [*GSM8K, {"question": 5}], limit=2)
    assert len(rows.prompts) == len(rows.columns["answer"]) == 2


def test_blank_lines_are_skipped_and_absent_message_fields_of_parquet_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert tasks.load(TasksConfig(source=str(tmp_path / "a.jsonl"))).prompts == ["a", "b"]
    named = [{"role": "user", "content": "1 + 2", "name": "Ann"}]
    rows = load(tmp_path / "a.parquet", [{"prompt": named}, {"prompt": USER}])
    assert rows.prompts == [named, USER]


def test_columns_that_are_not_json_are_left_out_and_it_is_said(tmp_path, caplog):
    rows = load(
        tmp_path / "a.parquet", [{"prompt": "What is it?", "answer": "a cat", "image": b"\x89PNG"}]
    )
    assert rows.columns == {"answer": ["a cat"]}
    assert "column image is left out" in caplog.text


LINES = '{"prompt": "a", "answer": "b", "rate": 0.5}\n'
ERRORS = {
    "unknown ending": (
        "",
        {"source": "tasks.jsonI"},
        r"tasks.source is .*jsonI': give a .parquet, .jsonl, .json or .csv file",
    ),
    "no such file": (
        "",
        {"source": "task.jsonl"},
        r"no file .*task.jsonl: did you mean "
        r"tasks.jsonl there",
    ),
    "no folder": ("", {"source": "nowhere/t.jsonl"}, r"no file .*nowhere/t.jsonl: give the path"),
    "extension": (
        "",
        {"source": "tasks.tsv"},
        r"give a .parquet, .jsonl, .json or .csv file, "
        r"builtin:NAME, gym:NAME, tfds:",
    ),
    "not parquet": (
        "PAR1",
        {"source": "tasks.parquet"},
        r"tasks.parquet cannot be read as "
        r"parquet \(.*: write",
    ),
    "not JSON": (
        LINES + "{'prompt': 1}\n",
        {},
        r"tasks.jsonl line 2 is not JSON \(.*\): write "
        r"one object a line",
    ),
    "not UTF-8": (
        LINES.encode() + b'{"prompt": "\xff"}',
        {},
        r"tasks.jsonl line 2 is not JSON "
        r"\(not UTF-8 text\)",
    ),
    "half a character": (
        LINES + '{"prompt": "\\ud83d"}\n',
        {},
        r"tasks.jsonl line 2 is not "
        r"JSON \(not UTF-8 text\)",
    ),
    "too long a number": (
        "9" * 5000,
        {},
        r"tasks.jsonl line 1 is not JSON \(Exceeds the limit "
        r".*\): write one object",
    ),
    "too deep": (
        "[" * 100_000,
        {},
        r"tasks.jsonl line 1 is not JSON \(nested more than 100 "
        r"deep\): write one object",
    ),
    "not an object": (
        LINES + "[1]\n",
        {},
        r"tasks.jsonl line 2 is \[1\]: write one JSON "
        r"object a line",
    ),
    "empty": ("\n", {}, r"tasks.jsonl holds no tasks"),
    "limit": (LINES, {"limit": 0}, r"tasks.limit is 0: it must be at least 1"),
    "no prompt": (
        '{"text": "a"}\n',
        {},
        r"no column prompt, only text: set "
        r"tasks.prompt_column to one of them",
    ),
    "prompt column": (
        LINES,
        {"prompt_column": "promt"},
        r"no column promt, only prompt, "
        r"answer, rate: did you mean p",
    ),
    "answer column": (
        LINES,
        {"answer_column": "answers"},
        r"no column answers, .*: did you "
        r"mean answer\?",
    ),
    "domain column": (
        LINES,
        {"domain_column": "rates"},
        r"no column rates, .*: did you mean "
        r"rate\?",
    ),
    "domain type": (
        '{"prompt": "a", "topic": ["b"]}\n',
        {"domain_column": "topic"},
        r"row 1, column topic is \['b'\]: a domain is a name or a number",
    ),
    "domain of truth values": (
        '{"prompt": "a", "topic": true}\n',
        {"domain_column": "topic"},
        r"row 1, column topic is True: a domain is a name or a number",
    ),
    "deep inside": (
        LINES + '{"prompt": ' + "[" * 200 + "]" * 200 + "}\n",
        {},
        r"line 2 is not "
        r"JSON .nested "
        r"more than",
    ),
    "pass rate column": (
        LINES,
        {"pass_rate_columns": ("zz",)},
        r"no column zz, .*: set "
        r"tasks.pass_rate_columns to",
    ),
    "prompt type": (
        LINES + '{"prompt": 7}\n',
        {},
        r"row 2, column prompt is 7: a prompt is text or a list of",
    ),
    "prompt absent": (
        LINES + '{"answer": 7}\n',
        {},
        r"row 2, column prompt is None: a prompt "
        r"is text or",
    ),
    "no messages": ('{"prompt": []}\n', {}, r"row 1, column prompt is \[\]: a prompt is text or"),
    "question type": ('{"question": 7}\n', {}, r"row 1, column question is 7: a prompt is text or"),
    "no role": (
        '{"prompt": [{"content": "a"}]}\n',
        {},
        r"row 1, .* has the message "
        r"{'content': 'a'}: a message has a",
    ),
    "no content": (
        '{"prompt": [{"role": "user"}]}\n',
        {},
        r"row 1, .*: a message has a role "
        r"and a content, as text",
    ),
    "a string in a list": (
        '{"prompt": ["hello"]}\n',
        {},
        r"row 1, .* has the message 'hello': "
        r"a message has",
    ),
    "gsm8k": (
        '{"question": "a", "answer": "#### 1"}\n{"question": "a", "answer": "one"}\n',
        {},
        r"row 2 has the answer 'one': an answer of GSM8K ends in #### and a number",
    ),
    "reserved": (
        '{"prompt": "a", "completions": 1}\n',
        {},
        r"has a column completions, .*: "
        r"rename the column",
    ),
}
RATES = {
    "1.2": "row 2, column rate is 1.2: a pass rate lies in",
    "1" + 400 * "0": "row 2, column rate is 1000.*: a pass rate lies in",
    "-1" + 400 * "0": "row 2, column rate is -1000.*: a pass rate lies in",
    "1e400": "row 2, column rate is inf: a pass rate lies in",
    "[0.5]": r"row 2, column rate is \[0.5\]: a pass rate is a number",
    '{"a": 1}': "row 2, column rate is {'a': 1}: a pass rate is a number",
    "-0.1": "row 2, column rate is -0.1: a pass rate lies in",
    "Infinity": "row 2, column rate is inf: a pass rate lies in",
    '"0.5"': "row 2, column rate is '0.5': a pass rate is a number",
    "true": "row 2, column rate is True: a pass rate is a number",
}
for value, message in RATES.items():
    broken = LINES + LINES.replace("0.5", value)
    ERRORS[f"rate {value}"] = (broken, {"pass_rate_columns": ("rate",)}, message)


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_sentence_that_names_it(tmp_path, case):
    content, options, message = ERRORS[case]
    source = tmp_path / options.get("source", "tasks.jsonl")
    written = source if source.suffix == ".parquet" else tmp_path / "tasks.jsonl"
    written.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as raised:
        tasks.load(TasksConfig(**{**options, "source": str(source)}))
    assert "\n" not in str(raised.value)


def test_numbers_of_every_kind_are_pass_rates(tmp_path):
    rows = '{"prompt": "a", "rate": %s}\n'
    source = tmp_path / "tasks.jsonl"
    source.write_text("".join(rows % rate for rate in ("-0.0", "1", "0", "NaN", "null", "1e-400")))
    rates = tasks.load(
        TasksConfig(source=str(source), pass_rate_columns=("rate",))
    ).reference_pass_rates[:, 0]
    np.testing.assert_array_equal(rates, [0, 1, 0, np.nan, np.nan, 0])
    assert not np.signbit(rates[0])
    table = pa.table({"prompt": ["a"], "rate": pa.array([Decimal("0.25")])})
    parquet.write_table(table, tmp_path / "tasks.parquet")
    source = str(tmp_path / "tasks.parquet")
    assert (
        tasks.load(TasksConfig(source=source, pass_rate_columns=("rate",))).reference_pass_rates
        == 0.25
    )


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for encoding, ending in (("utf-8-sig", "jsonl"), ("utf-8-sig", "json"), ("utf-16", "json")):
        source = tmp_path / f"tasks.{ending}"
        source.write_text('{"prompt": "π"}\n', encoding=encoding)
        assert tasks.load(TasksConfig(source=str(source))).prompts == ["π"]


def small_machine(monkeypatch, size):
    monkeypatch.setattr("jaxrft.tasks.memory.available", lambda: size)


def write_bomb(path, text, count, encoding=None):
    """A small file in which one text comes many times."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))
    options = {}
    if encoding:
        values, options = (
            values.cast(pa.string()),
            {"use_dictionary": False, "column_encoding": encoding},
        )
    parquet.write_table(
        pa.table({"prompt": values}), path, compression="zstd", store_schema=False, **options
    )


@pytest.mark.parametrize("encoding", [None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_parquet_that_unpacks_to_more_than_memory_is_refused_before_it_does(
    tmp_path, monkeypatch, encoding
):
    source = tmp_path / "bomb.parquet"
    write_bomb(source, "x" * 10_000, 5000, encoding)
    assert source.stat().st_size < 20_000
    assert len(tasks.load(TasksConfig(source=str(source))).prompts) == 5000
    small_machine(monkeypatch, 80_000_000)  # of which half may be used, and 50 MB would be
    with pytest.raises(
        InputError,
        match=r"bomb.parquet unpacks to more than 0.04 GiB, half of "
        r".*: lower tasks.limit",
    ):
        tasks.load(TasksConfig(source=str(source)))
    assert len(tasks.load(TasksConfig(source=str(source), limit=2000)).prompts) == 2000


def nested_bomb(path):
    texts = pa.DictionaryArray.from_arrays(
        pa.array([0] * 2000, pa.int32()), pa.array(["x" * 10_000])
    )
    messages = pa.StructArray.from_arrays([texts, texts], ["role", "content"])
    column = pa.ListArray.from_arrays(pa.array([0, 2000], pa.int32()), messages)
    parquet.write_table(pa.table({"prompt": column}), path)


MANY = {
    "messages.parquet": nested_bomb,
    "nulls.parquet": lambda path: parquet.write_table(pa.table({"x": pa.nulls(1_000_000)}), path),
    "numbers.parquet": lambda path: parquet.write_table(pa.table({"x": [[0] * 1_000_000]}), path),
    "brackets.json": lambda path: path.write_text("[" + "[]," * 200_000 + "[]]"),
    "brackets.jsonl": lambda path: path.write_text('{"prompt": [' + "{}," * 200_000 + "{}]}"),
    "lines.jsonl": lambda path: path.write_text('{"prompt": "a"}\n' * 200_000),
    "one line.jsonl": lambda path: path.write_text("x" * 30_000_000),
}


@pytest.mark.parametrize("name", MANY)
def test_files_that_take_more_than_half_of_the_memory_are_refused(tmp_path, monkeypatch, name):
    MANY[name](tmp_path / name)
    small_machine(monkeypatch, 40_000_000)
    with pytest.raises(InputError, match=f"{name} unpacks to more than 0.02 GiB") as raised:
        tasks.load(TasksConfig(source=str(tmp_path / name)))
    assert "\n" not in str(raised.value)


def test_the_memory_of_this_machine_is_known():
    assert 2**20 < memory.available() < 2**50


def test_parquet_that_is_damaged_empty_or_ambiguous_is_one_sentence(tmp_path):
    source = tmp_path / "tasks.parquet"

    def problem():
        with pytest.raises(InputError) as raised:
            tasks.load(TasksConfig(source=str(source)))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    parquet.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), source)
    assert "has several columns called 'prompt': rename all but one" in problem()
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), source)
    assert "holds no tasks" in problem()
    parquet.write_table(pa.table({}), source)
    assert "holds no tasks" in problem()
    texts = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    parquet.write_table(pa.table({"prompt": texts}), source)
    assert "cannot be read as parquet ('utf-8' codec" in problem()
    parquet.write_table(pa.table({"prompt": ["a" * n for n in range(200)]}), source)
    whole = source.read_bytes()
    # whatever is damaged, it is a sentence or data, and never a stack trace
    for place in range(4, len(whole), 97):
        source.write_bytes(whole[:place] + b"\xff\x00\xff" + whole[place + 3 :])
        try:
            tasks.load(TasksConfig(source=str(source)))
        except InputError as error:
            assert "\n" not in str(error)


def test_comma_separated_texts_are_read_with_their_quotes(tmp_path):
    source = tmp_path / "tasks.csv"
    source.write_text('\ufeffprompt,answer\n"one, or\n""1""?",1\n\ntwo?,2\n', encoding="utf-8")
    rows = tasks.load(TasksConfig(source=str(source)))
    assert rows.prompts == ['one, or\n"1"?', "two?"]
    assert rows.columns == {"answer": ["1", "2"]}
    assert tasks.load(TasksConfig(source=str(source), limit=1)).columns == {"answer": ["1"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt,answer\na,b\na,b,c\n", "row 2 has 3 entries for 2 columns: quote texts"),
        (b"prompt,prompt\na,b\n", "has several columns of one name: rename all but one"),
        (b"prompt,answer\n\xff,b\n", "cannot be read as CSV .not UTF-8 text.: write"),
        (b'prompt,answer\n"a,b\n', "cannot be read as CSV .unexpected end of data."),
        (b"prompt,answer\n", "holds no tasks"),
        (b"", "holds no tasks"),
    ],
)
def test_mistakes_of_comma_separated_texts(content, said, tmp_path):
    (tmp_path / "tasks.csv").write_bytes(content)
    with pytest.raises(InputError, match=said):
        tasks.load(TasksConfig(source=str(tmp_path / "tasks.csv")))


def test_no_source_and_an_unknown_family_are_errors():
    with pytest.raises(
        InputError,
        match="tasks.source is '': give a .parquet, .jsonl, .json or .csv file, builtin:NAME",
    ):
        tasks.load(TasksConfig())
    pytest.importorskip("jaxrft.tasks.builtin")
    with pytest.raises(InputError, match="no-such-family"):
        tasks.load(TasksConfig(source="builtin:no-such-family"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return lm_tokenizer.load(
        make_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=TEMPLATE)
    )


def test_prepare_drops_long_prompts_from_every_field_and_says_so(tokenizer, caplog):
    rates = np.array([[0.1], [0.2], [0.3], [0.4]], np.float32)
    rows = tasks.Rows(
        ["Z", "Z" * 50, USER, "Z"], {"answer": ["a", "b", "c", "d"]}, rates, ["x", "y", "z", "x"]
    )
    with caplog.at_level(logging.WARNING):
        table = tasks.prepare(rows, tokenizer, 40, name="sums")
    (dropped,) = table.dropped
    assert "1 of 4 tasks of sums dropped: prompts over 40 tokens, up to 5" in caplog.text
    assert dropped[:2] == ("sums", 1) and dropped.reason.startswith("over 40 tokens, up to 5")
    assert table.prompts == ["Z", USER, "Z"] and table.columns == {"answer": ["a", "c", "d"]}
    assert table.domains == ("x", "y", "z") and table.domain.tolist() == [0, 2, 0]
    np.testing.assert_array_equal(table.reference_pass_rates, rates[[0, 2, 3]])
    assert table.tokens.dtype == table.lengths.dtype == np.int32
    for i, prompt in enumerate(table.prompts):
        length = table.lengths[i]
        assert table.tokens[i, :length].tolist() == lm_tokenizer.render(tokenizer, prompt)
        assert not table.tokens[i, length:].any()


def test_variables_of_a_row_go_before_those_of_the_config(tmp_path):
    template = "{{ mode }} {{ level }} {{ strftime_now('%Y') }} " + TEMPLATE
    text = lm_tokenizer.load(make_tokenizer(tmp_path, template=template))
    rows = tasks.Rows([USER, USER, "Z"], {}, variables=[{}, {"mode": "slow"}, {}])
    table = tasks.prepare(rows, text, 99, variables={"mode": "fast", "level": 3}, date="2031-02-03")
    shown = [text.decode(table.tokens[i, : table.lengths[i]]).partition("<")[0] for i in range(3)]
    assert shown == ["fast 3 2031 ", "slow 3 2031 ", ""]


def test_error_of_an_unencodable_prompt_names_its_row_of_the_source(tokenizer):
    rows = tasks.Rows(["Z", "Z" * 99, [{"role": "tool", "content": "3"}]], {})
    with pytest.raises(InputError, match="refuses messages of the roles tool .* row 3 of sums"):
        tasks.prepare(rows, tokenizer, 40, name="sums")


def test_a_prompt_of_just_the_limit_stays(tokenizer):
    length = len(lm_tokenizer.render(tokenizer, "Z" * 9))
    table = tasks.prepare(tasks.Rows(["Z" * 9], {}), tokenizer, length)
    assert table.lengths.tolist() == [length] and table.dropped == ()
    with pytest.raises(
        InputError,
        match=rf"the shortest has {length} tokens, raise max_prompt_length \(now "
        rf"{length - 1}",
    ):
        tasks.prepare(tasks.Rows(["Z" * 9, "Z" * 12], {}), tokenizer, length - 1)


def test_a_prompt_without_tokens_is_dropped(tmp_path):
    bare = lm_tokenizer.load(make_tokenizer(tmp_path, bos=False))
    table = tasks.prepare(tasks.Rows(["a", ""], {}), bare, 8)
    assert table.prompts == ["a"] and table.dropped == (("tasks", 1, "without any token"),)
    with pytest.raises(InputError, match="no prompt of empty has any token"):
        tasks.prepare(tasks.Rows([""], {}), bare, 8, name="empty")


def test_domains_are_the_column_of_that_name_or_the_one_that_is_named(tmp_path):
    rows = [{"prompt": "a", "domain": "x", "level": 3}, {"prompt": "b", "domain": None, "level": 4}]
    assert load(tmp_path / "both.jsonl", rows).domains == ["x", "both"]
    assert load(tmp_path / "both.jsonl", rows, name="set").domains == ["x", "set"]
    assert load(tmp_path / "both.jsonl", rows, domain_column="level").domains == ["3", "4"]
    assert load(tmp_path / "verl.jsonl", VERL, domain_column="data_source").domains == ["sums"] * 3
    assert load(tmp_path / "other.jsonl", [{"prompt": "a", "domain": ["x", "y"]}]).domains is None
    assert load(tmp_path / "none.jsonl", [{"prompt": "a"}]).domains is None


@pytest.mark.parametrize(
    ("lengths", "widths"),
    [
        ([3, 800], (104, 200, 400, 800)),
        ([1, 65], (16, 24, 40, 72)),
        ([5], (8,)),
        ([150, 800], (200, 400, 800)),
    ],
)
def test_buckets_by_hand(lengths, widths):
    assert tasks.buckets(np.array(lengths, np.int32)) == widths


@given(arrays.arrays(np.int32, st.integers(1, 20), elements=st.integers(1, 5000)))
def test_buckets_are_few_and_the_smallest_that_fits_is_found(lengths):
    widths = tasks.buckets(lengths)
    assert 1 <= len(widths) <= 4 and widths == tuple(sorted(set(widths)))
    assert lengths.max() <= widths[-1] < lengths.max() + 8
    width = tasks.bucket_of(lengths[:1], widths)
    assert width in widths and width >= lengths[0]
    assert all(smaller < lengths[0] for smaller in widths[: widths.index(width)])


def test_a_batch_is_the_rows_of_the_table_in_the_width_asked_for(tokenizer):
    table = tasks.prepare(tasks.Rows(["Z", "Z" * 30, "ZZ"], {}), tokenizer, 64)
    ids = np.array([2, 0], np.int32)
    width = tasks.bucket_of(table.lengths[ids], tasks.buckets(table.lengths))
    tokens, lengths = tasks.batch(table, ids, width)
    assert tokens.shape == (2, 8) and lengths.tolist() == table.lengths[[2, 0]].tolist()
    np.testing.assert_array_equal(tokens, table.tokens[[2, 0], :8])
    with pytest.raises(ValueError, match="width 8 cuts a prompt"):
        tasks.batch(table, np.array([1], np.int32), 8)
