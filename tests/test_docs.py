"""The documentation names what exists: selectors, options, defaults, files and headings."""

import ast
import re
import tomllib
from operator import attrgetter
from pathlib import Path

import pytest

from jaxrft.config import Config, SelectConfig
from jaxrft.select import registry

REPOSITORY = Path(__file__).parents[1]
SELECTORS = REPOSITORY / "docs" / "selectors.md"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+?) *#* *$", re.MULTILINE)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")


def prose(path):
    """Returns the text of a page without its blocks of code and equations."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path):
    """Returns the anchors that GitHub gives the headings of a page."""
    found = []
    for heading in HEADING.findall(prose(path)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each) is not None for each in found)
        found.append(f"{slug}-{again}" if again else slug)
    return set(found)


def sections():
    """Returns the text below each second-level heading of the page about selectors."""
    parts = re.split(r"^## +(.+?) *$", prose(SELECTORS), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options(text):
    """Returns {dotted option: default} of the tables whose first column is called option."""
    found = {}
    in_table = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            in_table = False
        elif cells[0] == "option":
            assert cells[1] == "default"
            in_table = True
        elif in_table and not set(cells[0]) <= set("-:"):
            found[cells[0].strip("`")] = value(cells[1].strip("`"))
    return found


def value(text):
    """Reads a default: a literal of Python, else a word."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@pytest.mark.parametrize("name", registry.SELECTORS)
def test_a_selector_has_a_section_with_all_of_its_options(name):
    section = sections()[name]
    configured = vars(SelectConfig)
    expected = {f"select.{field}" for field in registry.fields(name) if field in configured}
    if name in registry.USE_EMBEDDINGS:
        expected.add("select.embeddings")
    assert options(section).keys() == expected - {"select.balance"}
    assert "**Source.**" in section
    assert "**Limits" in section


def test_options_have_the_defaults_that_the_tables_name():
    tables = options(prose(SELECTORS))
    assert {"select.balance", "replay.capacity", "dynamic_sampling"} <= tables.keys()
    defaults = {name: attrgetter(name)(Config) for name in tables}
    assert {name: (type(x), x) for name, x in tables.items()} == {
        name: (type(x), x) for name, x in defaults.items()
    }


def test_options_that_two_selectors_share_have_one_default():
    tables = [options(section) for section in sections().values()]
    pairs = {(name, default) for table in tables for name, default in table.items()}
    assert len(pairs) == len({name for name, _ in pairs})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(REPOSITORY), link
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# `a_b`: What's *new*?\n\n```\n# no heading\n```\n\n## Same\n\n## Same\n")
    assert anchors(page) == {"a_b-whats-new", "same", "same-1"}


def test_the_citation_names_the_version_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {project['version']}\n" in citation
    assert f"license: {project['license']}\n" in citation
