"""The help pages: all flags, in groups, wrapped at the terminal's width."""

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest
import tyro

import jaxrft
from jaxrft import cli, flags
from jaxrft.config import GROUPS, Config, EvalConfig, TasksConfig
from jaxrft.dry_run import Options
from jaxrft.fields import FilePath
from jaxrft.host import terminal
from jaxrft.simulate.command import SimulateConfig

CONFIG = Config("model", TasksConfig("a.jsonl"), "run")
MIXTURE = replace(
    CONFIG,
    tasks=(TasksConfig("a.jsonl"), TasksConfig("b.jsonl")),
    evaluation=EvalConfig((TasksConfig("c.jsonl"),)),
)


def help_of(arguments, capsys, monkeypatch, columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    assert said.err == ""
    return code, said.out


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["one set", "mixture"])
def test_the_page_has_the_flags_of_the_parser(config, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(
            Options,
            default=Options(config),
            args=["--help"],
            config=(tyro.conf.AvoidSubcommands,),
        )
    parsed = re.findall(r"^\W{1,3} (--\w.*)$", capsys.readouterr().out, re.MULTILINE)
    ours = [flag.spelling for flag in flags.flags_of(Options, Options(config))]
    assert {name for text in ours for name in re.findall(r"--[\w.-]+", text)} == {
        name for text in parsed for name in re.findall(r"--[\w.-]+", text)
    }


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_the_page_of_train_is_in_groups_and_as_wide_as_the_terminal(columns, capsys, monkeypatch):
    code, page = help_of(["train", "--help"], capsys, monkeypatch, columns)
    assert code == 0
    titles = re.findall(r"^(\w.*):$", page, re.MULTILINE)
    assert titles == [flags.COMMAND, *GROUPS]
    assert all(len(line) <= columns for line in page.splitlines() if " " in line.strip())
    words = " ".join(page.split())
    assert "config.json, safetensors and tokenizer, or its id on the hub, owner/name" in words
    selection = page[page.index("\nselection:") : page.index("\nupdate:")]
    assert "--select.name TEXT" in selection and "--replay.capacity INT" in selection
    update = page[page.index("\nupdate:") : page.index("\nevaluation:")]
    assert "--learning-rate FLOAT" in update and "{grpo,dapo,dr_grpo,gspo,cispo}" in update


def test_groups_name_fields_of_the_config_once():
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names)) and set(names) <= set(Config.__dataclass_fields__)


def test_spellings_and_explanations_by_hand():
    @dataclass(frozen=True)
    class Sample:
        """Says nothing."""

        out: FilePath
        """Where
        it goes."""
        fast: bool = False
        kind: Literal["a", "b"] = "a"
        sizes: tuple[int, ...] = (1, 2)
        pair: tuple[float, float] = (0.5, 1.0)
        step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
        text: str | None = None

    found = list(flags.flags_of(Sample))
    assert [flag.spelling for flag in found] == [
        "--out PATH",
        "--fast, --no-fast",
        "--kind {a,b}",
        "--sizes INT ...",
        "--pair FLOAT FLOAT",
        "--step N",
        "--text TEXT|None",
    ]
    page = flags.page(Sample, None, "jaxrft sample", None, {})
    assert "usage: jaxrft sample [flags]\n\nSays nothing.\n" in page
    assert "      Where it goes. (required)\n" in page and "      (default: 1 2)\n" in page


def test_a_page_whose_reader_has_left_is_no_trouble(capsys, monkeypatch):
    class Pipe:
        name = "pipe"
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        flush = fileno = write

    stream = terminal.TolerantStream(Pipe())
    monkeypatch.setattr("sys.stdout", stream)
    terminal.print_page("page")
    assert isinstance(stream.trouble, BrokenPipeError) and capsys.readouterr().err == ""


def test_help_into_a_pipe_that_closes_is_silent():
    command = f"set -o pipefail; {sys.executable} -m jaxrft simulate --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "u", "")


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["prepare"], 2), (["--help"], 0), (["prepare", "-h"], 0)]
)
def test_commands_without_arguments_say_what_they_take(arguments, code, capsys, monkeypatch):
    got, page = help_of(arguments, capsys, monkeypatch)
    assert got == code and page.startswith(f"usage: {' '.join(['jaxrft', *arguments[:-1]])}"[:13])
    for kind in ("dataset", "pass-rates", "embeddings", "predictor"):
        assert re.search(rf"^ +{kind} ", page, re.MULTILINE)
    assert all(len(line) <= 80 for line in page.splitlines())


def test_the_version_is_said(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxrft {jaxrft.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "--help"],
        ["export", "--help"],
        ["prepare", "dataset", "--help"],
        ["prepare", "pass-rates", "--help"],
        ["prepare", "predictor", "--responses", "a.npz", "--help"],
    ],
    ids=" ".join,
)
def test_every_command_explains_its_flags(arguments, capsys, monkeypatch):
    code, page = help_of(arguments, capsys, monkeypatch)
    command = [word for word in arguments if word.isalpha() or word == "pass-rates"]
    assert code == 0 and page.startswith(f"usage: jaxrft {' '.join(command)} ")
    assert "\ncommand:\n" in page


def test_an_unknown_selector_fails_before_anything_is_simulated(capsys, monkeypatch):
    monkeypatch.setattr("jaxrft.simulate.command.run", None)
    assert cli.main(["simulate", "--selectors", "uniform", "foo"]) == 2
    assert "no selector 'foo': choose one of uniform" in capsys.readouterr().err
    assert SimulateConfig().selectors[0] == "uniform"
