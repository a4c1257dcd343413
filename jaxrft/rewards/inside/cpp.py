"""Compiles a C++ program and runs it: each is what a process becomes, within a program's limits.

The compiler reads what a model wrote, so it is no more trusted than the program: `#include` and
`.incbin` read files, and templates compute.
"""

from __future__ import annotations

import os
import resource
import signal

from .init import FIRST_KEPT

_PROGRAM = FIRST_KEPT  # descriptor of the compiled program
# the source is the standard input
_FLAGS = "-std=gnu++17 -O2 -DONLINE_JUDGE -w -fmax-errors=1 -pipe -x c++ -".split()


def run_compiler(request: dict, text: str) -> None:
    """Replaces this process by the compiler, which reads the source and writes to a folder."""
    folder = request["folder"]
    os.umask(0o022)
    _replace(
        request["compiler"],
        [request["compiler"], *_FLAGS, "-o", _path(folder)],
        {"PATH": "/usr/local/bin:/usr/bin:/bin", "TMPDIR": folder},
    )


def keep_program(folder: str) -> None:
    """Keeps the compiled program open for `run_program`, whatever becomes of the folder."""
    file = os.open(_path(folder), os.O_RDONLY)
    os.dup2(file, _PROGRAM, inheritable=False)
    os.close(file)


def run_program(request: dict, text: str) -> None:
    """Replaces this process by the compiled program, whose stack holds a deep recursion."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    stack = request["limits"]["memory_bytes"] // 4
    if hard != resource.RLIM_INFINITY:
        stack = min(stack, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))
    _replace(_PROGRAM, ["solution"], dict(os.environ))


def _path(folder: str) -> str:
    return f"{folder}/program"


def _replace(program: str | int, arguments: list[str], environment: dict[str, str]) -> None:
    """Executes a program, with the signals that Python ignores as they are by default."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execve(program, arguments, environment)
    except OSError:
        os._exit(1)
