"""Output: foreign text reaches no terminal unescaped, and a console that takes nothing ends no
run.
"""

import io
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from jaxrft.dry_run.render import Page
from jaxrft.host import terminal
from jaxrft.report.console import Display, Sample
from jaxrft.rewards import lookup

HOSTILE = {
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",  # clears the screen, sets the title
    "\x9b31mred": r"\x9b31mred",  # C1, the same in one byte
    "over\rwritten\x08\x08": r"over\rwritten\x08\x08",
    "gold\u202e24\u2066": r"gold\u202e24\u2066",  # turns the order around
    "hid\u200bden\ufeff\xad": r"hid\u200bden\ufeff\xad",
    "a\u2028b\x85c\x0bd\x0c": r"a\u2028b\x85c\x0bd\x0c",  # lines to some readers
    "\ud800\x00\x7f": r"\ud800\x00\x7f",
    "tag\U000e0041": r"tag\U000e0041",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items(), ids=map(ascii, HOSTILE))
def test_control_characters_are_escaped(text, shown):
    assert terminal.escaped(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "two\nlines\tand a tab",
        "日本語　空白",
        "naïve café\xa0",
        "👩\u200d🚀",
        "[31m\\x1b",
    ],
)
def test_printable_characters_stay(text):
    assert terminal.escaped(text) == text


def test_characters_outside_the_encoding_are_escaped():
    assert terminal.escaped("é日", encoding="latin-1") == r"é\u65e5"
    assert terminal.escaped("é日", encoding="ascii") == r"\xe9\u65e5"


def test_a_log_line_is_one_line_whatever_it_quotes():
    try:
        raise ValueError("bad \x1b[31m")
    except ValueError:
        error = sys.exc_info()
    record = logging.LogRecord(
        "a", logging.INFO, "f", 1, "row %s", ("x\njaxrft: error: forged\x1b[2J",), None
    )
    formatter = terminal.SentenceFormatter("jaxrft: %(message)s")
    assert formatter.format(record) == r"jaxrft: row x\njaxrft: error: forged\x1b[2J"
    record.exc_info = error
    assert "\x1b" not in formatter.format(record) and "Traceback" in formatter.format(record)


@pytest.mark.parametrize("text", HOSTILE, ids=map(ascii, HOSTILE))
def test_the_console_shows_foreign_text_escaped(text, capsys):
    display = Display(3)
    display.completions(1, [Sample(text, text, 0.5)])
    display.say(text)
    display.evaluation(1, {f"eval/{text}/greedy": 0.5})
    display.histogram({text: 3})
    display.advance(1, text)
    page = Page(Console(file=sys.stdout, width=100))
    page.line(text)
    page.table((text,), [(text,)], numbers=())
    page.pairs([(text, text)])
    shown = capsys.readouterr().out
    assert shown.count(HOSTILE[text]) == 11
    assert set(terminal.escaped(shown)) == set(shown)


class Broken(io.StringIO):
    """Takes nothing, for a while."""

    error: Exception | None = BrokenPipeError(32, "Broken pipe")

    def write(self, text):
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), ValueError("closed")],
)
def test_refused_output_is_dropped_with_one_warning(error, caplog):
    broken = Broken()
    broken.error = error
    stream = terminal.tolerant(broken)
    print("lost", file=stream)
    stream.writelines(["lost", "too"])
    stream.flush()
    broken.error = None
    print("taken again", file=stream)
    assert broken.getvalue() == "taken again\n"
    assert len(caplog.messages) == 1 and "cannot be written to" in caplog.messages[0]


def test_output_and_errors_of_graders_are_escaped():
    stream = io.StringIO()
    print("\x1b[2Ja\n日", file=terminal.tolerant(stream, escape=True))
    assert stream.getvalue() == "\\x1b[2Ja\n日\n"
    assert lookup.sentence(ValueError("no \x1b[2J\nnumber \u202e")) == (
        r"ValueError: no "
        r"\x1b[2J number \u202e"
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_a_console_of_any_encoding_shows_all_characters(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    display = Display(3)
    display.completions(1, [Sample("日本 \U0001f600", "half \ud83d of a pair", 1.0)])
    display.histogram({"é日": 3, "b": 1})
    print("日", file=terminal.tolerant(sys.stdout))
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding)
    assert ("日本" if encoding == "utf-8" else r"\u65e5\u672c") in shown
    assert r"\ud83d of a pair" in shown


SCRIPT = """
import logging, sys
from jaxrft.host import signals, terminal
signals.open_descriptors()
from jaxrft.report.console import Display, Sample
with terminal.guarded_streams():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Display(3) as display:
        for step in range(1, 4):
            display.step(step, {"reward": 0.5})
            display.completions(step, [Sample("p" * 300, "日" * 300, 1.0)] * 40)
            print("x" * 100_000)
            logging.warning("step %d", step)
sys.exit(7)
"""


def run(redirection, **environment):
    """Exit code and errors of the script behind a shell's redirection."""
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirection}', sys.executable, SCRIPT]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">/dev/full", "No space left on device"),
        ("| true", "Broken pipe"),
        ("| head -3 >/dev/null", "Broken pipe"),
        (">&-", ""),
        (">/dev/full 2>&1", None),
        (">&- 2>&- <&-", None),
        ("2>&1 | true", None),
    ],
)
def test_a_process_outlives_its_output(redirection, reason):
    code, _, errors = run(redirection)
    assert code == 7  # not 120, 1 or 141
    if reason is None:
        assert errors == ""
    else:
        assert [line for line in errors.splitlines() if "cannot be written to" not in line] == [
            "step 1",
            "step 2",
            "step 3",
        ]
        assert (
            errors.count("cannot be written to")
            == errors.count(reason) * bool(reason)
            == bool(reason)
        )


def test_a_console_that_is_not_utf8_ends_no_process():
    code, said, errors = run("", PYTHONIOENCODING="cp1252")
    assert (code, errors.splitlines()) == (7, ["step 1", "step 2", "step 3"])
    assert r"\u65e5" in said


@pytest.mark.parametrize(("redirection", "code"), [(">/dev/full", 2), ("| true", 0)])
def test_a_result_that_was_only_printed_is_not_lost_with_exit_code_0(redirection, code):
    """But a reader that wants no more of it is content."""
    command = f"set -o pipefail; {sys.executable} -m jaxrft --help {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr
