"""Chat templates are foreign code: they write what they write in transformers, and nothing they do
ends a run.
"""

import datetime
import logging
import os
import subprocess
import sys
import time

import pytest
from test_layers import ROOT, imports
from test_tokenizer import make

from jaxrft.lm import prompts, templates
from jaxrft.lm import tokenizer as lm_tokenizer
from jaxrft.types import InputError

QUESTION = "What is seventeen plus twenty-five? Reply with the number."
USER = [{"role": "user", "content": QUESTION}]
CHAT = [
    {"role": "system", "content": "Add the numbers that you are given."},
    *USER,
    {"role": "assistant", "content": "Let me think.\n"},
    {"role": "user", "content": "Go on,\n  please.  "},
]
PREFILLED = [*CHAT, {"role": "assistant", "content": "Step by step: "}]
ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Written for these tests after what published families do with roles, dates, thinking, tools and
# white space.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'Be helpful.' }}{%- endif %}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""  # noqa: E501
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""  # noqa: E501
TRICKS = """\
{% set ns = namespace(first=true, text='') %}
{% macro turn(m) -%}
    [{{ m.role | upper }}] {{ m | tojson }} {{ m.content | trim | e }}
{%- endmacro %}
{% for m in messages %}
    {% if m.role == 'nobody' %}{% continue %}{% endif %}
    {% if ns.first %}{{ dict(a=1) | tojson(indent=2) }}{% set ns.first = false %}{% endif %}
    {% generation %}{{ turn(m) }}{% endgeneration %}

    {% if loop.index > 50 %}{% break %}{% endif %}
{% endfor %}
{{ eos_token }}{{ "a é <b>" | tojson }}{{ range(3) | list }}{{ "%05.2f" | format(3.14159) }}
"""
PUBLISHED = {"chatml": CHATML, "headers": HEADERS, "tricks": TRICKS, "echo": ECHO}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(template) -> the tokenizer of a folder with that template."""
    loaded = lm_tokenizer.load(make(tmp_path_factory.mktemp("templates")))

    def with_template(template):
        loaded.chat_template = template
        return loaded

    return with_template


@pytest.fixture
def short(monkeypatch):
    """Bounds that tests can wait for."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "MEMORY", 128 << 20)


def encode(tokenizer, *messages, **options):
    return list(prompts.encode(tokenizer, messages, prompts.Options(**options)))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "variables", [{}, {"enable_thinking": False, "tools": [{"name": "add", "a": [1, None]}]}]
)
def test_tokens_are_those_of_transformers(tokenizer, name, variables):
    text = tokenizer(PUBLISHED[name])
    today = datetime.date.today().isoformat()
    found = encode(text, USER, CHAT, variables=[variables] * 2, date=today)
    continued = (
        encode(text, PREFILLED, variables=[variables], date=today) if name != "tricks" else []
    )
    for messages, tokens in zip((USER, CHAT), found, strict=True):
        wanted = text.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **variables
        )
        assert tokens == wanted["input_ids"]
    for tokens in continued:
        wanted = text.apply_chat_template(
            PREFILLED, continue_final_message=True, return_dict=True, **variables
        )
        assert tokens == wanted["input_ids"]


def test_a_prefilled_answer_is_continued(tokenizer):
    text = tokenizer(CHATML)
    (tokens,) = encode(text, PREFILLED)
    assert text.decode(tokens).endswith("<|im_start|>assistant\nStep by step: ")
    (trimmed,) = encode(tokenizer(HEADERS), PREFILLED)
    assert text.decode(trimmed).endswith("assistant<|end_header_id|>\n\nStep by step:")
    (empty,) = encode(tokenizer(CHATML), [*USER, {"role": "assistant", "content": ""}])
    assert text.decode(empty).endswith("<|im_end|>\n<|im_start|>assistant\n")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# Template -> what the sentence says of it.
HOSTILE = {
    "endless loop": (ENDLESS, "it takes more than 0.5 s of processor time for 256 prompts"),
    "endless arithmetic": (
        "{{ 7 ** (7 ** 77) }}",
        "it takes more than 0.5 s of processor time for 256 prompts",
    ),
    "endless in a filter": ("{{ range(99999) | sum }}" * 9999, "it takes "),
    "memory": ("{{ 'x' * 10 ** 10 }}", "it takes too much memory"),
    "memory in steps": (
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ "
        "ns.x %}{% endfor %}",
        "it takes too much memory",
    ),
    "output": (
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "it writes more than [0-9,]+ characters",
    ),
    "output at once": (
        "{{ 'x' * 10 ** 8 }}",
        "it (writes more than [0-9,]+ characters|takes too much memory)",
    ),
    "attributes": (
        "\n{{ messages.__class__.mro }}",
        "SecurityError: access to attribute '__class__' .*in its line 2",
    ),
    "attributes by filter": ("{{ (messages | attr('__class__')).mro() }}", "SecurityError"),
    "attributes by format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"),
    "attributes of functions": ("{{ raise_exception.__globals__.os }}", "SecurityError"),
    "attributes by namespace": ("{% set ns = namespace(__class__=1) %}{{ ns }}", "SecurityError"),
    "changes": ("{{ messages.append(1) }}", "SecurityError"),
    "range": ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
    "undefined": (
        "\n\n{{ nothing.at.all }}",
        "UndefinedError: 'nothing' is undefined, in its line 3",
    ),
    "undefined function": ("{{ launch('rockets') }}", "UndefinedError: 'launch' is undefined"),
    "no such field": ("{{ messages[0].content.parts.first }}", "UndefinedError"),
    "no such message": ("{{ messages[7].content }}", "UndefinedError"),
    "division": ("{{ 1 // (messages | length - 1) }}", "ZeroDivisionError: .*in its line 1"),
    "types": ("{{ messages + 1 }}", "TypeError: can only concatenate list"),
    "syntax": ("{% for m in messages %}\n{{ m.content }", "TemplateSyntaxError: .*in its line 2"),
    "no end": ("{% if true %}", "TemplateSyntaxError: "),
    "unknown tag": ("{% launch %}", "TemplateSyntaxError: Encountered unknown tag 'launch'"),
    "unknown filter": ("{{ 1 | launch }}", "TemplateAssertionError: No filter named 'launch'"),
    "other files": ("{% include '/etc/passwd' %}", "TypeError: no loader"),
    "recursion": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "it is nested too deeply, or calls itself",
    ),
    "recursion in loops": (
        "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
        "it is nested too deeply, or calls itself|RecursionError|TypeError",
    ),
    "nested expression": (
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "it is nested too deeply|SyntaxError|Memory",
    ),
    "long chain": (
        "{{ 1" + " + 1" * 20000 + " }}",
        "it is nested too deeply|RecursionError|it takes",
    ),
    "long number": ("{{ 10 ** 5000 }}", "ValueError: Exceeds the limit"),
    "surrogates": ("{{ '\\ud83d' }}" + ECHO, "half a character"),
    "control characters": ("{{ raise_exception('a\\x1b[31m\\nb\\u2028c') }}", r"\(a \[31m b c\)"),
    "long message": (
        "{{ raise_exception('no ' * 10 ** 6) }}",
        r"refuses messages of the roles "
        r"user \(no no",
    ),
    "message of another type": (
        "{{ raise_exception(messages) }}",
        r"refuses messages "
        r".*'role': 'user'",
    ),
    "bad date format": ("{{ strftime_now(5) }}", "TypeError"),
    "empty": ("", "leaves out words of the user message of row 1"),
    "not text": (5, "is 5: a template is text"),
    "not text, named": ({"default": ["a"]}, "a template is text"),
    "none called default": (
        {"rag": ECHO, "tool_use": ECHO},
        "called rag, tool_use, but none called default",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_template_is_one_sentence(tokenizer, short, capfd, name):
    template, said = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(InputError, match=said) as raised:
        encode(tokenizer(template), USER)
    sentence = str(raised.value)
    assert "\n" not in sentence and sentence.isprintable() and len(sentence) < 900
    assert tokenizer(template).name_or_path in sentence or "row 1" in sentence
    assert time.monotonic() - start < 20
    assert capfd.readouterr().err == ""


def test_the_row_that_a_template_breaks_at_is_named(tokenizer):
    template = "{% if messages | length > 1 %}{{ 1 // 0 }}{% endif %}" + ECHO
    with pytest.raises(
        InputError,
        match=r"row 3 of sums: correct the template, or give it "
        r"what it looks for",
    ):
        encode(tokenizer(template), USER, "text", CHAT, name="sums")


def test_named_templates_are_chosen_by_tools(tokenizer):
    text = tokenizer({"default": "plain " + ECHO, "tool_use": "tools " + ECHO})
    found = encode(text, USER, USER, variables=[{}, {"tools": [{"name": "add"}]}])
    assert [text.decode(tokens).partition(" ")[0] for tokens in found] == ["plain", "tools"]


def test_no_process_is_left(tokenizer, short):
    with pytest.raises(InputError):
        encode(tokenizer(ENDLESS), USER)
    unfinished = prompts.encode(tokenizer(ECHO), [USER] * 2000)
    next(unfinished)
    unfinished.close()
    children = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
    ).stdout
    assert "template_worker" not in children


def test_the_process_sees_neither_the_current_directory_nor_the_environment(
    tokenizer, tmp_path, monkeypatch
):
    for name in ("json", "random", "jinja2", "sitecustomize", "datetime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    assert len(encode(tokenizer(ECHO), USER)) == 1
    names = {name.partition(".")[0] for name in imports(ROOT / "lm/template_worker.py")}
    assert names <= {"jinja2", *sys.stdlib_module_names}


def test_processes_are_few(tokenizer, monkeypatch):
    started = []
    popen = subprocess.Popen

    def noted(*arguments, **options):
        started.append(arguments)
        return popen(*arguments, **options)

    monkeypatch.setattr(templates.subprocess, "Popen", noted)
    found = encode(tokenizer(CHATML), *[USER, CHAT, "text"] * 500)
    assert len(found) == 1500 and len(started) == 1
    assert encode(tokenizer(CHATML), "text") and len(started) == 1


def test_random_filters_of_templates_are_reproducible(tokenizer):
    text = tokenizer(
        "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }}{{ range(10 ** 4) | random }} " + ECHO
    )
    first, second = encode(text, USER, USER)
    assert first == second == encode(text, USER)[0]


def test_the_clock_shows_the_date_that_is_given(tokenizer):
    text = tokenizer(HEADERS)
    (tokens,) = encode(text, USER, date="2031-02-03")
    assert "Today Date: 03 Feb 2031" in text.decode(tokens)
    (tokens,) = encode(tokenizer("{{ strftime_now('%H:%M:%S') }} " + ECHO), USER, date="2031-02-03")
    assert text.decode(tokens).startswith("00:00:00 ")
    (tokens,) = encode(
        tokenizer(HEADERS), USER, variables=[{"date_string": "never"}], date="2031-02-03"
    )
    assert "Today Date: never" in text.decode(tokens)


def test_variables_that_no_template_looks_at_are_said(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        encode(tokenizer(CHATML), USER, variables=[{"enable_thinking": False}])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        encode(tokenizer(CHATML), USER, CHAT, variables=[{"enable_thinkin": False}, {}])
    assert (
        len(caplog.records) == 1
        and ("enable_thinkin of chat_template_kwargs changes nothing") in caplog.text
    )


SYSTEM = [{"role": "system", "content": "Answer in the language of the question."}, *USER]
SHORT_ONE = [{"role": "user", "content": "user"}]
DROPS = {
    "contents": ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}", USER, "user"),
    "another field": ("{% for m in messages %}{{ m.text }}{% endfor %}", USER, "user"),
    "the user's role": (
        "{% for m in messages if m.role == 'human' %}{{ m.content }}{% endfor %}",
        USER,
        "user",
    ),
    "the end": ("{% for m in messages %}{{ m.content[:20] }}{% endfor %}", USER, "user"),
    "the beginning": ("{% for m in messages %}{{ m.content[20:] }}{% endfor %}", USER, "user"),
    "a part": (
        "{% for m in messages %}{{ m.content.replace('plus', '') }}{% endfor %}",
        USER,
        "user",
    ),
    "the case": ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", USER, "user"),
    "the system's": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        SYSTEM,
        "system",
    ),
    "all but the last": ("{{ messages[-1].content }}", SYSTEM, "system"),
    "the last": ("{{ messages[0].content }}", CHAT, "user"),
    "a word of its own": ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}", SHORT_ONE, "user"),
    "a digit of its own": ("Answer within 10 words.", [{"role": "user", "content": "1"}], "user"),
    "the prefilled": (
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
        PREFILLED,
        "assistant",
    ),
    "before the end of thinking": (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
        [*USER, {"role": "assistant", "content": "<think>First, add.</think>It"}],
        "assistant",
    ),
}


@pytest.mark.parametrize("name", DROPS)
def test_a_template_that_drops_words_is_refused(tokenizer, name):
    template, messages, role = DROPS[name]
    with pytest.raises(
        InputError, match=f"leaves out words of the {role} message of row 1 of sums"
    ):
        encode(tokenizer(template), messages, name="sums")


SPELLINGS = {
    "trim": "{{ m.content | trim }}",
    "tojson": "{{ m | tojson }}",
    "tojson in ASCII": "{{ m | tojson(ensure_ascii=true) }}",
    "escape": "{{ m.content | e }}",
    "indent": "{{ m.content | indent(4) }}",
    "wordwrap": "{{ m.content | wordwrap(20) }}",
    "Python": "{{ m }}",
    "split lines": "{{ m.content.split('\n') | join(' ') }}",
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(
    "content", ['Is "é" <b>\n\\frac{1}{2}</b> & it\'s 1 > 0?\n', "1\n", "&lt;", " ", ""]
)
def test_words_may_be_spelled_in_other_ways(tokenizer, name, content):
    template = "{% for m in messages %}" + SPELLINGS[name] + "{% endfor %}"
    assert encode(tokenizer(template), [{"role": "user", "content": content}, *CHAT])


# As published hybrid reasoners do: what the words ask of the template is taken out of them.
SWITCHES = {
    "taken out": "{{ m.content.replace('/no_think', '').replace('/think', '') }}",
    "taken out and trimmed": "{{ m.content.replace('/no_think', '').replace('/think', '') | "
    "trim }}",
    "cut off": "{{ m.content.split('/system_override')[0].rstrip().removesuffix('/think').removesuffix('/no_think') }}",  # noqa: E501
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(
    "content",
    ["/no_think", "Add the two numbers. /no_think", "Add the numbers of\na/b and c.\n/think\n"],
)
def test_switches_of_the_template_may_be_taken_out_of_the_words(tokenizer, name, content):
    template = "{% for m in messages %}{{ m.role }}: " + SWITCHES[name] + "\n{% endfor %}"
    system = {"role": "system", "content": content}
    tokens = encode(
        tokenizer(template), [system, *USER], [*CHAT[1:3], {"role": "user", "content": content}]
    )
    assert all(tokens)


def test_words_next_to_switches_must_be_in_the_prompt(tokenizer):
    template = "{% for m in messages %}{{ m.content.split('/think')[0] }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out words of the user message"):
        encode(
            tokenizer(template),
            [{"role": "user", "content": "Please /think about 12 + 7 and about 5."}],
        )


def test_messages_that_json_cannot_hold_are_named(tokenizer):
    odd = [{"role": "user", "content": "1 + 2", "at": datetime.date(2024, 1, 1)}]
    with pytest.raises(
        InputError, match="row 2 of sums has a message that no chat template can be given"
    ):
        encode(tokenizer(ECHO), USER, odd, name="sums")


@pytest.mark.parametrize("messages", ["a \ud83d b", [{"role": "user", "content": "a \ud83d b"}]])
def test_unpaired_surrogate_is_an_error_that_names_the_row(tokenizer, messages):
    with pytest.raises(InputError, match="row 2 of sums holds half a character"):
        encode(tokenizer(ECHO), "text", messages, name="sums")
