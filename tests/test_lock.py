"""One process at a time: the holder of a lock is named, and a dead holder does not block others."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxrft.host import lock
from jaxrft.types import InputError

HOLD = """
import sys, time
from pathlib import Path
from jaxrft.host import lock
with lock.held(Path(sys.argv[1]), "the folder", "wait"):
    print("held", flush=True)
    time.sleep(100)
"""


@contextlib.contextmanager
def holder(path):
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def held(path):
    with lock.held(path, "the folder", "wait for its end"):
        yield


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENT", 0.5)


def test_the_sentence_names_host_and_process(tmp_path):
    with holder(tmp_path / ".lock") as other:
        wanted = (
            f"^the folder is in use by process {other.pid} on host {socket.gethostname()} "
            "since 20.*: wait for"
        )
        with pytest.raises(InputError, match=wanted), held(tmp_path / ".lock"):
            pass
    with held(tmp_path / ".lock"):  # by the kernel, as the other was killed
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_lock_of_a_dead_holder_is_free(number, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_beats", lambda path: pytest.fail("on one host the kernel knows"))
    with holder(tmp_path / ".lock") as other:
        other.send_signal(number)
        other.wait()
        assert (tmp_path / ".lock").exists()
        with held(tmp_path / ".lock"):
            pass


def test_a_process_cannot_lock_twice(tmp_path):
    with (
        held(tmp_path / ".lock"),
        pytest.raises(InputError, match="in use by process"),
        held(tmp_path / ".lock"),
    ):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"null", b"[1]", b"{}", b"[" * 100_000, b'{"kernel": 5}']
)
def test_any_content_of_a_lock_file_is_survived(content, tmp_path, quick):
    path = tmp_path / ".lock"
    path.write_bytes(content)
    with held(path):
        path.write_bytes(content)
        with pytest.raises(InputError, match="in use by another process: wait"), held(path):
            pass


def elsewhere(path, monkeypatch):
    """A lock file as another host has written it."""
    path.write_text(json.dumps({"host": "b", "process": 7, "kernel": "another", "since": "today"}))


def test_the_holder_on_another_host_is_alive_while_it_gives_signs(tmp_path, quick, monkeypatch):
    path = tmp_path / ".lock"
    elsewhere(path, monkeypatch)
    over = threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(InputError, match="in use by process 7 on host b since today"), held(path):
        pass
    over.set()
    heart.join()
    with held(path):  # after it has been silent
        pass


def test_one_that_has_been_silent_for_long_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    elsewhere(path, monkeypatch)
    os.utime(path, (time.time() - 60,) * 2)
    began = time.monotonic()
    with held(path):
        assert time.monotonic() - began < 1


def test_a_holder_gives_signs(tmp_path, quick):
    with held(tmp_path / ".lock"):
        first = (tmp_path / ".lock").stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / ".lock").stat().st_mtime_ns > first


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_no_hindrance(number, tmp_path, quick, monkeypatch, caplog):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / ".lock"):
        assert len(caplog.messages) == 1 and "no locks on the file system" in caplog.messages[0]
        with pytest.raises(InputError, match="in use by process"), held(tmp_path / ".lock"):
            pass
    (tmp_path / ".lock").write_text('{"host": "a"}')  # of a holder that was killed
    with held(tmp_path / ".lock"):
        pass


def test_a_lock_that_is_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, path = fcntl.flock, tmp_path / ".lock"

    def late(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # the holder ends between open and flock
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(path), pytest.raises(InputError, match="in use"), held(path):
        pass


def test_only_regular_files_are_locked(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / ".lock").symlink_to(precious)
    with held(tmp_path / ".lock"):
        assert precious.read_text() == "kept"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError), held(tmp_path / name):
            pass
