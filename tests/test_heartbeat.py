"""Who has gone, by the signs in a folder, and what a monitor makes of the end of its process."""

import io
import threading

import jax
import pytest

from jaxrft.host import heartbeat
from jaxrft.types import InputError


@pytest.fixture
def signs(tmp_path, monkeypatch):
    """Writes signs by process into a folder; process 0 lives and changes its own all the time."""
    monkeypatch.setattr(heartbeat, "SILENT", 0.3)
    over = threading.Event()

    def write(index, sign):
        (tmp_path / f"{index}").write_text(sign)

    def beat():
        number = 0
        while not over.wait(0.01):
            number += 1
            write(0, str(number))

    write(0, "0")
    thread = threading.Thread(target=beat)
    thread.start()
    yield tmp_path, write
    over.set()
    thread.join()


def test_the_silent_and_the_killed_have_gone_not_those_that_jax_or_they_themselves_ended(signs):
    folder, write = signs
    write(1, "7")
    write(2, heartbeat.ABORTED)
    assert heartbeat.dead_processes(folder, [0, 1, 2, 3]) == [1]
    write(3, heartbeat.KILLED)
    assert heartbeat.dead_processes(folder, [0, 1, 2, 3]) == [3]  # at once


@pytest.mark.parametrize(("sign", "found"), [(heartbeat.KILLED, [1]), (heartbeat.ABORTED, [])])
def test_a_monitor_that_reports_meanwhile_is_heard(signs, sign, found):
    folder, write = signs
    write(1, "7")
    threading.Timer(0.1, write, (1, sign)).start()
    assert heartbeat.dead_processes(folder, [0, 1]) == found


@pytest.mark.parametrize(
    ("said", "sign", "heard"),
    [
        (heartbeat.OVER, "5", ""),
        (
            "Fatal Python error: Aborted",
            heartbeat.ABORTED,
            "process 1 of 3 gives no sign of life any more",
        ),
        ("", heartbeat.KILLED, "process 1 of 3 gives no sign of life any more"),
    ],
)
def test_a_monitor_speaks_of_the_others(signs, monkeypatch, capsys, said, sign, heard):
    folder, write = signs
    write(1, "7")
    write(2, "5")
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    heartbeat.main(str(folder), "2", "3", "alone")
    assert (folder / "2").read_text() == sign
    errors = capsys.readouterr().err
    assert heard in errors and bool(heard) == bool(errors)


# both are what JAX makes of a dead peer
@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
@pytest.mark.parametrize(("sign", "named"), [(heartbeat.KILLED, True), (heartbeat.ABORTED, False)])
def test_an_error_names_the_one_that_has_gone_and_stays_itself_if_none_has(
    tmp_path, monkeypatch, kind, sign, named
):
    monkeypatch.setattr(heartbeat, "SILENT", 0.3)
    monkeypatch.setattr("jax.process_index", lambda: 0)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InputError if named else kind) as caught, heartbeat.watched(tmp_path):
        (tmp_path / ".alive").mkdir(exist_ok=True)
        (tmp_path / ".alive/1").write_text(sign)
        raise kind("connection reset by peer")
    assert ("process 1 of 2 gives no sign of life any more" in str(caught.value)) == named
    assert not (tmp_path / ".alive/0").exists()


TRACEBACK = "Fatal Python error: Segmentation fault"


@pytest.mark.parametrize(
    ("when", "another", "heard"), [("alone", False, 1), ("alone", True, 0), ("always", True, 1)]
)
def test_a_native_traceback_is_printed_unless_another_process_has_died(
    signs, monkeypatch, capsys, when, another, heard
):
    """If another has, it is printed where the user asked for native tracebacks."""
    folder, write = signs
    if another:
        write(1, "7")
    monkeypatch.setattr("sys.stdin", io.StringIO(TRACEBACK))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    heartbeat.main(str(folder), "2", "3", when)
    errors = capsys.readouterr().err
    assert errors.count(TRACEBACK) == heard
    assert errors.count("process 1 of 3 gives no sign of life any more") == another
