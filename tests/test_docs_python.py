"""The pages for readers who import jaxrft: names exist, signatures are the code's, examples run."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxrft.lm import attention
from jaxrft.select import selectors

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "python.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
IMPORTS = re.findall(r"from (jaxrft[\w.]*) import ([\w, ]+)", PAGE)
DEFAULTS = {"jnp": jnp, "attention": attention}  # what defaults on the page are made of
COMPILES_A_MODEL = ("The policy: jaxrft.lm", "A run: jaxrft.train")


class Checker(doctest.OutputChecker):
    """Lets an example whose output is not on the page print what it likes, as a run does."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


def look_up(name):
    """The object of a dotted name; `selector` is any selector."""
    first, *rest = name.split(".")
    found = selectors.adaptive(4) if first == "selector" else importlib.import_module(first)
    for depth, part in enumerate(rest, 2):
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(".".join(name.split(".")[:depth]))
        found = getattr(found, part)
    return found


def printed_signatures():
    """(name, text of its parameters) of each signature on the page, which ends at its bracket."""
    for kind, block in BLOCKS:
        if kind != "text":
            continue
        text = re.sub(r"\s{2,}#.*|\)    #.*", lambda m: ")" * (m[0][0] == ")"), block)
        starts = [m.start() for m in re.finditer(r"^(?:jaxrft|selector)\.", text, re.M)]
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            name, _, parameters = text[start:end].strip().partition("(")
            yield name, parameters.removesuffix(")").strip()


def parameters_of(function, *, bound):
    """(name, kind, default) of each parameter, the first one aside if a method is not `bound`."""
    found = list(inspect.signature(function).parameters.values())
    return [(p.name, p.kind, p.default) for p in found[0 if bound else 1 :]]


SIGNATURES = list(printed_signatures())
SECTIONS = [
    (name, section.partition("\n")[0], section)
    for name in ("python.md", "performance.md")
    for section in re.split(r"^## ", (DOCS / name).read_text(), flags=re.M)
    if ">>> " in section
]


def test_page_has_signatures_and_examples():
    assert len(SIGNATURES) > 60
    assert len(SECTIONS) > 6
    assert set(COMPILES_A_MODEL) <= {heading for _, heading, _ in SECTIONS}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bjaxrft(?:\.\w+)+", PAGE))))
def test_name_on_page_imports(name):
    look_up(name)


@pytest.mark.parametrize(("module", "names"), sorted(set(IMPORTS)))
def test_import_in_example_works(module, names):
    for name in names.split(","):
        look_up(f"{module}.{name.strip()}")


@pytest.mark.parametrize(
    ("name", "parameters"), SIGNATURES, ids=[name.removeprefix("jaxrft.") for name, _ in SIGNATURES]
)
def test_printed_signature_is_that_of_the_code(name, parameters):
    ast.parse(source := f"def printed({parameters}): ...")
    namespace = dict(DEFAULTS)
    exec(source, namespace)
    parent = look_up(name.rpartition(".")[0])
    bound = not (inspect.isclass(parent) and inspect.isfunction(look_up(name)))
    assert parameters_of(namespace["printed"], bound=True) == parameters_of(
        look_up(name), bound=bound
    )


@pytest.mark.parametrize(
    ("page", "section"),
    [
        pytest.param(
            page,
            section,
            id=f"{page}: {heading}",
            marks=[pytest.mark.slow] if heading in COMPILES_A_MODEL else [],
        )
        for page, heading, section in SECTIONS
    ],
)
def test_example_runs(page, section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S))
    test = doctest.DocTestParser().get_doctest(examples, {}, page, page, 0)
    assert test.examples
    output = []
    result = doctest.DocTestRunner(Checker(), verbose=False).run(test, out=output.append)
    assert result.failed == 0, "".join(output)
