"""Who has gone, by the signs in a folder, and what a witness makes of the end of its process."""

import io
import threading

import jax
import pytest

from jaxrft import lifesigns, witness
from jaxrft.types import InputError


@pytest.fixture
def signs(tmp_path, monkeypatch):
    """Writes signs by process into a folder; process 0 lives and changes its own all the time."""
    monkeypatch.setattr(witness, "SILENT", 0.3)
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
    write(2, witness.ENDED)
    assert witness.gone(folder, [0, 1, 2, 3]) == [1]
    write(3, witness.GONE)
    assert witness.gone(folder, [0, 1, 2, 3]) == [3]  # at once


@pytest.mark.parametrize(("sign", "found"), [(witness.GONE, [1]), (witness.ENDED, [])])
def test_what_a_witness_writes_meanwhile_counts(signs, sign, found):
    folder, write = signs
    write(1, "7")
    threading.Timer(0.1, write, (1, sign)).start()
    assert witness.gone(folder, [0, 1]) == found


@pytest.mark.parametrize(
    ("said", "sign", "heard"),
    [
        (witness.OVER, "5", ""),
        ("Fatal Python error: Aborted", witness.ENDED, "process 1 of 3 gives no sign of life any more"),
        ("", witness.GONE, "process 1 of 3 gives no sign of life any more"),
    ],
)
def test_a_witness_speaks_of_the_others(signs, monkeypatch, capsys, said, sign, heard):
    folder, write = signs
    write(1, "7")
    write(2, "5")
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    witness.main(str(folder), "2", "3")
    assert (folder / "2").read_text() == sign
    errors = capsys.readouterr().err
    assert heard in errors and bool(heard) == bool(errors)


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])  # both are what JAX makes of a dead peer
@pytest.mark.parametrize(("sign", "named"), [(witness.GONE, True), (witness.ENDED, False)])
def test_an_error_names_the_one_that_has_gone_and_stays_itself_if_none_has(tmp_path, monkeypatch, kind, sign, named):
    monkeypatch.setattr(witness, "SILENT", 0.3)
    monkeypatch.setattr("jax.process_index", lambda: 0)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InputError if named else kind) as caught, lifesigns.watched(tmp_path):
        (tmp_path / ".alive").mkdir(exist_ok=True)
        (tmp_path / ".alive/1").write_text(sign)
        raise kind("connection reset by peer")
    assert ("process 1 of 2 gives no sign of life any more" in str(caught.value)) == named
    assert not (tmp_path / ".alive/0").exists()
