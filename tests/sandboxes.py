"""What tests of sandboxes share: whether there are any here, and what is left of them."""

import os
import time
from contextlib import suppress

import pytest

from jaxrft.errors import Missing
from jaxrft.rewards import code, gym, sandbox


def _reason_without():
    try:
        sandbox._flavor()
    except Missing as error:
        return str(error)
    return ""


REASON = _reason_without()
needs_bubblewrap = pytest.mark.skipif(bool(REASON), reason=REASON)
needs_compiler = pytest.mark.skipif(
    sandbox.compiler("bubblewrap") is None, reason="C++ needs g++, which is not installed"
)


def record_namespaces(monkeypatch):
    """Returns a list to which each sandbox of `code` and `gym` adds its namespace of processes."""
    namespaces = []

    class Recorded(sandbox.Sandbox):
        def wait_until_ready(self):
            was_ready = self._is_ready
            super().wait_until_ready()
            if not was_ready:
                (child,) = _children(self._process.pid)
                namespaces.append(os.readlink(f"/proc/{child}/ns/pid"))

    monkeypatch.setattr(code, "Sandbox", Recorded)
    monkeypatch.setattr(gym, "Sandbox", Recorded)
    return namespaces


def wait_until_empty(namespaces, seconds=5.0):
    """Returns the processes that are left in any of the namespaces after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := _processes_in(namespaces)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _children(process):
    with open(f"/proc/{process}/task/{process}/children") as file:
        return [int(word) for word in file.read().split()]


def _processes_in(namespaces):
    """Returns the processes that have not ended; some inits wait seconds before they reap one."""
    processes = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{name}/ns/pid") in namespaces and not _is_zombie(name):
                processes.append(int(name))
    return processes


def _is_zombie(name):
    with open(f"/proc/{name}/stat") as file:
        return file.read().rpartition(") ")[2].startswith("Z")
