"""The first process of a sandbox: forks a process for each program, bounds and ends it.

It answers requests on its standard input and output, each a line that is the hexadecimal form of a
marshalled object; JSON takes longer to import than most programs to run:

* {"mode": "programs", "source", "inputs", "limits"} runs the program once an input and answers
  with a line each, its output in hexadecimal digits, or "-" where it failed;
* {"mode": "cpp", "source", "compiler", "compile_limits", "inputs", "limits"} does so with a
  program in C++, which is compiled first; where that fails, every answer is "-";
* {"mode": "calls", "source", "function", "inputs", "limits"} calls a function once an input, which
  is the encoded list of its arguments; the output is the encoded result;
* {"mode": "serve", ...} and {"mode": "judge", ...} hand the standard streams to a child, which
  speaks the protocol of `candidate.serve` or `judge.run`;
* {"mode": "gym", "path", "dataset", "config", "entry", "inputs", "limits"} scores answers by
  reasoning_gym, whose data set is made first: "ready" or what failed in hexadecimal digits, then a
  line each, a score in hexadecimal digits or "-".

Of programs nothing here decides whether a test is passed: what should come out never enters a
sandbox in which a model's program runs.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False  # what is imported at the start is paid for by every grading
if TYPE_CHECKING:
    from collections.abc import Callable

POLL_SECONDS = 0.02  # between two counts of the processes
FIRST_KEPT = 64  # descriptors from here on stay open in programs
_KILL = 9
# modules that are imported once, before a program is run on several inputs, if it names them
_COMMON = (
    "bisect collections copy functools heapq io itertools math operator random re string typing"
).split()


def main(user: int) -> None:
    """Answers requests until the input ends; `user` is whom programs run as, -1 for the same."""
    if user >= 0:
        os.chmod("/tmp", 0o1777)
    _write(b"ready\n")
    while line := _read_line():
        request = marshal.loads(bytes.fromhex(line.decode()))
        if request["mode"] == "judge":
            from . import judge

            judge.import_common()  # once: this sandbox is kept
            _hand_over(request, user, judge.run)
            continue
        if request["mode"] == "cpp":
            _run_cpp(request, user)
            continue
        if request["mode"] == "gym":
            from . import gym

            failure = gym.prepare(request)
            _write(
                failure.encode("utf-8", "replace").hex().encode() + b"\n" if failure else b"ready\n"
            )
            if not failure:
                _run_inputs(request, user, gym.run_score)
            continue
        from . import candidate

        _import_what_is_used(request)
        if request["mode"] == "programs":
            _run_inputs(request, user, candidate.run_program)
        elif request["mode"] == "calls":
            _run_inputs(request, user, candidate.run_call)
        else:
            _hand_over(request, user, candidate.serve)


def _import_what_is_used(request: dict) -> None:
    """Imports once, before any program, what its forks share."""
    if request["mode"] != "programs":
        import json  # noqa: F401

        from . import plain  # noqa: F401
    for name in _COMMON:
        if name in request["source"]:
            __import__(name)


def _read_line() -> bytes:
    """Reads one line and nothing behind it, which may be for a child."""
    parts = []
    while True:
        part = os.read(0, 1 << 20)
        parts.append(part)
        if not part or part.endswith(b"\n"):
            return b"".join(parts)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _run_inputs(request: dict, user: int, run: Callable[[dict, str], None]) -> None:
    """Runs the program once for each input, each time in a process of its own."""
    for text in request["inputs"]:
        output = _run_one(request, text, user, run)
        line = "-" if output is None else output.hex()
        _write(line.encode() + b"\n")


def _run_cpp(request: dict, user: int) -> None:
    """Compiles the program once and runs it for each input, when its file is gone already."""
    import tempfile

    from . import cpp

    with tempfile.TemporaryDirectory(
        prefix="jaxrft-program-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        os.chmod(folder, 0o777)  # the compiler runs as the user of programs
        compilation = {**request, "folder": folder, "limits": request["compile_limits"]}
        failed = _run_one(compilation, request["source"], user, cpp.run_compiler) is None
        if not failed:
            cpp.keep_program(folder)
    if failed:
        _write(b"-\n" * len(request["inputs"]))
    else:
        _run_inputs(request, user, cpp.run_program)


def _run_one(request: dict, text: str, user: int, run: Callable[[dict, str], None]) -> bytes | None:
    """Returns what the program wrote for one input, or None where it failed or broke a limit."""
    limits = request["limits"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        from . import candidate

        candidate.provide(text)
        _become(limits, user)
        os.dup2(writing, 1)
        os.closerange(3, FIRST_KEPT)
        run(request, text)
        os._exit(1)
    os.close(writing)
    try:
        output = _collect(child, reading, limits)
    finally:
        os.close(reading)
        _end_others(child)
    return output


def _collect(child: int, reading: int, limits: dict) -> bytes | None:
    """Reads what a child writes until it exits; returns None unless that is with status 0."""
    end = time.monotonic() + limits["wall_seconds"]
    os.set_blocking(reading, False)
    output = bytearray()
    pause = 0.0005
    is_open = True
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        closed = _drain(reading, output)
        is_open = is_open and not closed
        if len(output) > limits["output_bytes"]:
            return None
        if process:
            return bytes(output) if status == 0 else None
        if time.monotonic() > end or _breaks_limits(limits):
            return None
        if is_open:
            select.select([reading], [], [], pause)
        else:
            time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)


def _drain(reading: int, output: bytearray) -> bool:
    """Appends what a pipe holds, at most 1 MB, to `output`; returns whether it is closed."""
    for _ in range(16):
        try:
            data = os.read(reading, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            return True
        output += data
    return False


def _breaks_limits(limits: dict) -> bool:
    """Checks the number of all processes of this sandbox and the memory that they hold together.

    Limits of the kernel count one process at a time, or all of a user, or do not hold for root.
    """
    if os.getpid() != 1:
        return False
    pages = 0
    processes = [name for name in os.listdir("/proc") if name.isdigit()]
    for name in processes:
        try:
            with open(f"/proc/{name}/statm", "rb") as file:
                _, resident, shared, *_ = file.read().split()
            pages += int(resident) - int(shared)
        except (OSError, ValueError):
            continue
    if len(processes) > limits["processes"] + 1:
        return True
    return pages * resource.getpagesize() > limits["memory_bytes"]


def _end_others(child: int) -> None:
    """Kills the child and everything that it started, and waits until they are gone."""
    while True:
        _kill_others(child)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.0005)


def _kill_others(child: int) -> None:
    try:
        if os.getpid() == 1:
            os.kill(-1, _KILL)  # all processes of the sandbox but this one
        else:
            os.killpg(child, _KILL)
    except ProcessLookupError:
        pass


def _hand_over(request: dict, user: int, run: Callable[[dict], None]) -> None:
    """Has a child speak on the standard streams; returns when it has ended."""
    limits = request["limits"]
    child = os.fork()
    if child == 0:
        _become(limits, user)
        run(request)
        os._exit(0)
    end = time.monotonic() + limits["wall_seconds"]
    pause = 0.0005
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end or _breaks_limits(limits):
            os._exit(1)  # ends all of the sandbox
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
    _end_others(child)
    _write(b"ended\n")


def _become(limits: dict, user: int) -> None:
    """Makes this process one in which a program may run: a session, a user and limits of its own.

    Limits that are set by the first user hold for the second, too.
    """
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits["cpu_seconds"])
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, FIRST_KEPT)
    _limit(resource.RLIMIT_MSGQUEUE, 0)
    _limit(resource.RLIMIT_AS, limits["memory_bytes"] + _address_space())
    if user >= 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)  # gives up all capabilities, too
    if os.getppid() == 1:  # outside of a sandbox all processes of the user would count
        _limit(resource.RLIMIT_NPROC, limits["processes"])
    os.chdir("/tmp")


def _address_space() -> int:
    """Returns the bytes of address space that this process has before a program runs in it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return max(64 << 20, int(file.read().split()[0]) * resource.getpagesize())
    except OSError:
        return 64 << 20


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main(int(sys.argv[1]))
