"""The journal of a long job: what is in it is not lost, and what is not its own is left alone."""

import os

import pytest

from jaxrft.prepare.journal import Journal
from jaxrft.types import InputError


def begin(path, *, pieces=3, **identity):
    with Journal(path, identity) as journal:
        for number in range(pieces):
            journal.add(number, [number])
    return path


def test_one_command_at_a_time(tmp_path):
    path = tmp_path / "e.safetensors.partial"
    with Journal(path, {}) as journal:
        wanted = (
            f"partial is in use by process {os.getpid()} on host .*: wait for the end of "
            "that command, or"
        )
        with pytest.raises(InputError, match=wanted):
            Journal(path, {})
        journal.add(0, 1)
    with Journal(path, {}) as journal:
        assert journal.done == {0: 1}
    assert list(tmp_path.iterdir()) == [path]


DAMAGES = {
    "bytes": b"\xff\xfe\x00",
    "a number": b"7",
    "null": b"null",
    "nothing": b"",
    "an object": b'{"0": [1]}',
    "a list of another length": b"[1, 2, 3]",
    "a number that is none": b'["1", [1]]',
    "true": b"[true, [1]]",
    "a piece that is cut": b"[1, [",
    "too deep": b"[1," + b"[" * 100_000 + b"]" * 100_000 + b"]",
    "NaN": b"[1, [NaN]]",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_lines_are_passed_over_and_left(damage, tmp_path, caplog):
    path = begin(tmp_path / "a.partial", model="m")
    identity, zero, _, two = path.read_bytes().splitlines(keepends=True)
    damaged = identity + zero + damage + b"\n" + two
    path.write_bytes(damaged)
    with Journal(path, {"model": "m"}) as journal:
        assert journal.done == {0: [0], 2: [2]}
        journal.add(1, [1])
    assert caplog.messages == [f"skipping 1 damaged lines of {path}: their pieces are done anew"]
    assert path.read_bytes() == damaged + b"[1, [1]]\n"
    with Journal(path, {"model": "m"}) as journal:
        assert journal.done == {0: [0], 1: [1], 2: [2]}


def test_results_that_do_not_fit_are_done_anew(tmp_path, caplog):
    path = begin(tmp_path / "a.partial")
    with Journal(path, {}, lambda number, result: number < 2) as journal:
        assert journal.done == {0: [0], 1: [1]}
    assert "skipping 1 damaged lines" in caplog.text


@pytest.mark.parametrize("torn", [b"[3, [", b"\x00\x00\x00", b"[3, [3]]"])
def test_a_line_torn_by_a_kill_is_cut_off_without_a_word(torn, tmp_path, caplog):
    path = begin(tmp_path / "a.partial")
    path.write_bytes(path.read_bytes() + torn)
    with Journal(path, {}) as journal:
        assert sorted(journal.done) == [0, 1, 2]
        journal.add(3, "b")
    with Journal(path, {}) as journal:
        assert journal.done[3] == "b" and not caplog.messages


@pytest.mark.parametrize(
    "content", [b"\xff\n[0, 1]\n", b"null\n[0, 1]\n", b'{"a": 1}\n{"a": 2}\n', b"text", b"[0, 1]"]
)
def test_a_file_of_something_else_is_left_alone(content, tmp_path):
    path = tmp_path / "a.partial"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not the journal of a command: move it away"):
        Journal(path, {})
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.partial", ".a.partial.lock"])
def test_links_are_not_followed(name, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text('{}\n[0, "precious"]\n')
    (tmp_path / name).symlink_to(precious)
    if name == "a.partial":
        with pytest.raises(InputError, match="it is a link"):
            Journal(tmp_path / "a.partial", {})
    else:
        begin(tmp_path / "a.partial")
    assert precious.read_text() == '{}\n[0, "precious"]\n'


def test_pipes_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.partial")
    (tmp_path / "b.partial").mkdir()
    for name in "ab":
        with pytest.raises(InputError, match="cannot write .*partial"):
            Journal(tmp_path / f"{name}.partial", {})
