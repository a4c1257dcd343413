import os

import pytest

from jaxrft.host import files


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("", dict, "it is empty"),
        (" \n", dict, "it is empty"),
        ("null", dict, "it holds null, not an object"),
        ("[1]", dict, "it holds a list, not an object"),
        ("true", int, "it holds true or false, not a number"),
        ('{"a": NaN}', dict, "NaN is no JSON number"),
        ('{"a": -Infinity}', dict, "-Infinity is no JSON number"),
        (b'{"a": "\xff"}', dict, "it is not UTF-8 text"),
        ("[" * 100_000, list, "nested more than 100 deep"),
        ('{"a":' * 500 + "1" + "}" * 500, dict, "nested more than 100 deep"),
        ('{"step": 1', dict, "it is not JSON"),
        ("1" * 5000, int, "it is not JSON"),
        ('["' + "x" * 100 + '"]', list, "more than 50"),
    ],
)
def test_json_that_was_not_expected_is_refused_with_its_reason(text, kind, reason):
    limit = 50 if reason == "more than 50" else files.MAX_JSON_BYTES
    with pytest.raises(files.UnreadableJSON, match=reason):
        files.parse_json(text, kind, max_bytes=limit)


def test_brackets_in_strings_do_not_count_as_nesting():
    text = '{"a": "' + "[" * 500 + '\\"' + "{" * 500 + '"}'
    assert files.parse_json(text, dict)["a"].count("[") == 500


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/../../b", "C:\\a", "..\\a", "", "a\0b", "."]
)
def test_names_outside_of_the_folder_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="is not the name of a file in"):
        files.inside(tmp_path, name)


def test_names_inside_of_the_folder_are_joined(tmp_path):
    assert files.inside(tmp_path, "a/b.safetensors") == tmp_path / "a/b.safetensors"


def test_replacing_a_file_follows_no_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / ".metrics.jsonl.tmp").symlink_to(precious)
    (tmp_path / "metrics.tmp").symlink_to(precious)
    files.replace_file(tmp_path / "metrics.jsonl", "new")
    assert precious.read_text() == "kept"
    assert (tmp_path / "metrics.jsonl").read_text() == "new"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.replace_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
