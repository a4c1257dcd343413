"""Reads YAML as the plain values that its author meant: 1e-6 is a number, 2025-01-31 and `on` are
texts, and a key stands once.

PyYAML reads YAML 1.1, in which 1e-6 is a text, `no` is false and 010 is 8. The rules here are those
of YAML 1.2's core schema.
"""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from jaxrft.host.files import JSON, UnreadableJSON
from jaxrft.host.terminal import escaped

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"""[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
|[-+]?[0-9]+[eE][-+]?[0-9]+
|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"""
_KINDS = (  # kind, how it is written, its first characters
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("float", _FLOAT, "-+.0123456789"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's core schema; refuses a key that stands twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Builds a mapping; raises ConstructorError if a key stands twice in it."""
        keys: set[Hashable] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                keys.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes a value that occurs twice a second time."""
        return True


_Dumper.add_multi_representer(str, yaml.SafeDumper.represent_str)  # of classes derived from it
for _kind, _pattern, _first in _KINDS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _kind, re.compile(f"^(?:{_pattern})$", re.VERBOSE), list(_first)
        )


def format_yaml(tree: Mapping[str, JSON]) -> str:
    """Formats a mapping as YAML that `parse_yaml` reads back, in the order of its keys.

    Characters that a terminal obeys are written as escapes.
    """
    options = {"Dumper": _Dumper, "sort_keys": False, "width": 100}
    text = yaml.dump(dict(tree), allow_unicode=True, **options)
    return text if escaped(text) == text else yaml.dump(dict(tree), **options)


def parse_yaml(text: bytes) -> dict[str, JSON]:
    """Parses a YAML document whose outermost value is a mapping.

    Raises UnreadableJSON for anything else; the message completes "FILE cannot be read: ...".
    """
    try:
        value: object = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise UnreadableJSON(f"it is not YAML ({where}{error.problem})") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise UnreadableJSON(f"it is not YAML ({reason})") from error
    if not isinstance(value, dict):
        raise UnreadableJSON("it is no mapping of fields to values, such as `steps: 100`")
    return value
