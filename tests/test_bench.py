"""`jaxrft bench NAME`: what can be measured again."""

import ast
from pathlib import Path

import pytest

from jaxrft import bench, cli

MODULES = sorted(Path(bench.__path__[0]).glob("[!_]*.py"))


def test_alone_it_lists_a_line_each(capsys):
    assert cli.main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == [path.stem.replace("_", "-") for path in MODULES]
    assert all(30 < len(line) <= 120 and line.endswith(".") for line in lines)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_each_is_a_command(path):
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert [argument.arg for argument in functions["main"].args.args] == ["arguments"]


def test_a_mistake_is_a_sentence(capsys):
    assert cli.main(["bench", "grader"]) == 2
    assert capsys.readouterr().err.startswith("jaxrft: error: no measurement 'grader': it is one of adaptive, ")
