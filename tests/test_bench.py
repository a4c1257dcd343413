"""Every script in benchmarks/ is a program that README.md of that folder lists."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _script
from jaxrft import cli
from jaxrft.errors import InputError

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_is_listed_and_has_a_main(path):
    assert f"`python -m benchmarks.{path.stem}" in (ROOT / "benchmarks/README.md").read_text()
    tree = ast.parse(path.read_text())
    first_line = (ast.get_docstring(tree) or "").partition("\n")[0]
    assert 17 < len(first_line) <= 97 and first_line.endswith(".")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert [argument.arg for argument in functions["main"].args.args] == ["arguments"]


def test_a_script_explains_its_flags():
    command = [sys.executable, "-m", "benchmarks.graders", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: python -m benchmarks.graders" in done.stdout


def test_a_mistake_ends_a_script_with_one_sentence(capsys):
    def main(arguments):
        raise InputError("no tasks")

    with pytest.raises(SystemExit) as end:
        _script.run(main)
    assert (end.value.code, capsys.readouterr().err) == (2, "error: no tasks\n")


@pytest.mark.parametrize("arguments", [[], ["graders", "--tasks", "8"]])
def test_the_former_command_says_what_to_run_instead(arguments, capsys):
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxrft: error: ") and "python -m benchmarks.NAME --help" in said
    assert len(said.splitlines()) == 1
