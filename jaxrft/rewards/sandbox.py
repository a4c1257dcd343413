"""Sandboxes in which programs run that a model wrote: bubblewrap, limits, and an end for all.

A sandbox has no network, sees the files of Python and of the system's libraries and can write none
but those in a /tmp of its own, and has process ids, a host name and System V objects of its own. It
serves one grading and is killed as a whole, with all that was started in it. `inside/` is what runs
there, and what it answers is a program's output, never a verdict.

Root runs programs as another user, one for each sandbox, so that the kernel counts their processes;
where root cannot, and for everyone else, a sandbox has a user namespace of its own.
"""

import functools
import importlib
import itertools
import marshal
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from jaxrft.errors import InputError, Missing

Kind = Literal["bubblewrap", "none"]

START_SECONDS = 60.0  # for a sandbox to be ready, on a machine that does much else
LINE_BYTES = 1 << 24  # of one answer
_INSIDE = Path(__file__).parent / "inside"
_MAIN = "import sys; sys.path.insert(0, {!r}); from inside import init; init.main({})"
_USERS = 1_000_000_000  # first of the numbers of users that nobody has
_TRUST = (
    'or trust what models write with jaxrft.rewards.code.CodeReward(sandbox="none") or '
    'jaxrft.rewards.gym.GymReward(sandbox="none")'
)
_PROGRAMS = "/usr/local/bin:/usr/bin:/bin"  # folders of programs that a sandbox sees
_ALTERNATIVES = "/etc/alternatives"  # where the linker is a link to on some systems
_counter = itertools.count()


class Limits(NamedTuple):
    """What one run of a program may use."""

    cpu_seconds: int  # of one process
    wall_seconds: float
    memory_bytes: int  # of each process, and of all together
    file_bytes: int  # of each file; all of /tmp has four times as much
    processes: int  # and threads
    output_bytes: int


class Ended(Exception):
    """Reports a sandbox that has ended or did not answer in time."""


class Sandbox:
    """Runs programs in a sandboxed process that is starting or ready; one thread uses it."""

    def __init__(self, kind: Kind, limits: Limits, packages: Sequence[str] = ()) -> None:
        """Starts a sandbox and does not wait for it.

        `packages` are folders of Python packages that it may read; `path` says where they are.
        """
        command = (
            _command(*_flavor(), limits, packages) if kind == "bubblewrap" else _bare_command()
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={} if kind == "none" else None,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin.fileno()
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        self._rest = bytearray()
        self._is_ready = False

    def wait_until_ready(self) -> None:
        """Waits until programs can run; raises RuntimeError if that fails."""
        if self._is_ready:
            return
        try:
            self.receive(time.monotonic() + START_SECONDS)
        except Ended:
            raise RuntimeError("a sandbox did not start: is the machine out of memory?") from None
        self._is_ready = True

    def send(self, line: bytes, end: float) -> None:
        """Writes a line; raises Ended if it is not read before the time `end`."""
        rest = memoryview(line + b"\n")
        while rest:
            _, ready, _ = select.select([], [self._input], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise Ended
            try:
                rest = rest[os.write(self._input, rest) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Ended from None

    def receive(self, end: float, most: int = LINE_BYTES) -> bytes:
        """Returns the next line; raises Ended at the end, at the time `end`, or after `most` bytes
        without an end of the line.
        """
        searched = 0
        while True:
            line, newline, rest = self._rest[searched:].partition(b"\n")
            if newline:
                line = bytes(self._rest[:searched] + line)
                self._rest = rest
                return line
            searched = len(self._rest)
            ready, _, _ = select.select([self._output], [], [], max(0.0, end - time.monotonic()))
            if not ready or searched > most:
                raise Ended
            try:
                data = os.read(self._output, 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                raise Ended
            self._rest += data

    def close(self) -> None:
        """Kills the sandbox and everything in it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def check_kind(kind: str) -> None:
    """Raises InputError for a kind of sandbox that there is not."""
    if kind not in get_args(Kind):
        raise InputError(f'sandbox is {kind!r}: it must be "bubblewrap" or "none"')


def check(kind: Kind, limits: Limits) -> None:
    """Raises Missing, with the remedy, where no sandbox can be had."""
    for module in ("init", "candidate", "cpp", "judge", "gym"):  # writes bytecode for sandboxes
        importlib.import_module(f"jaxrft.rewards.inside.{module}")
    if kind == "bubblewrap":
        _flavor()
    sandbox = Sandbox(kind, limits)
    try:
        sandbox.wait_until_ready()
    finally:
        sandbox.close()


class _Flavor(NamedTuple):
    """How bubblewrap is called on this machine."""

    program: str
    separate_user: bool  # root's, who runs programs as another user


@functools.cache
def _flavor() -> _Flavor:
    """Finds a way to call bubblewrap that works on this machine; raises Missing without one."""
    program = shutil.which("bwrap")
    if program is None:
        raise Missing(
            "the rewards code and gym run what a model wrote in bubblewrap, which is not "
            f"installed: install it (apt-get install bubblewrap), {_TRUST}"
        )
    flavors = [_Flavor(program, True)] if os.geteuid() == 0 else []
    flavors.append(_Flavor(program, False))
    errors = []
    limits = Limits(1, 1.0, 1 << 28, 1 << 20, 8, 1 << 10)
    for flavor in flavors:
        command = _command(*flavor, limits)
        tried = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_SECONDS
        )
        if tried.returncode == 0:
            return flavor
        errors.append(tried.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    raise Missing(
        f"bubblewrap does not work here ({errors[-1]:.200}): allow user namespaces (sysctl "
        "kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; in "
        f"docker --security-opt seccomp=unconfined), {_TRUST}"
    )


def path(kind: Kind, packages: Sequence[str]) -> list[str]:
    """Returns where a sandbox finds each folder of packages that it was started with."""
    if kind == "none":
        return list(packages)
    return [f"/packages/{number}" for number in range(len(packages))]


@functools.cache
def compiler(kind: Kind) -> str | None:
    """Returns the path of a C++ compiler that a sandbox can run, None where there is none."""
    return shutil.which("g++", path=_PROGRAMS if kind == "bubblewrap" else None)


def _command(
    program: str, separate_user: bool, limits: Limits, packages: Sequence[str] = ()
) -> list[str]:
    """Returns the command line of a sandbox."""
    user = _free_user() if separate_user else -1
    rights: list[str] = []
    if separate_user:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            rights += ["--cap-add", capability]
    else:
        rights = ["--unshare-user"]
    return [
        program,
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"),
        *("--cap-drop", "ALL"),
        *rights,
        *_mounts(),
        *_package_mounts(packages),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--size", str(4 * limits.file_bytes), "--tmpfs", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        *("--chdir", "/tmp", "--hostname", "sandbox", "--clearenv"),
        *_settings(),
        *_python("/inside", user),
    ]


def _free_user() -> int:
    """Returns the number of a user that no process on this machine should have."""
    return _USERS + (os.getpid() << 6) % 1_000_000_000 + next(_counter) % 64


@functools.cache
def _mounts() -> tuple[str, ...]:
    """Returns what a sandbox sees: Python, the system's libraries, and the folder `inside`."""
    mounts: list[str] = ["--ro-bind", "/usr", "/usr"]
    for path in ("/lib", "/lib32", "/lib64", "/bin"):
        if os.path.islink(path):
            mounts += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            mounts += ["--ro-bind", path, path]
    for path in (*_homes(), _ALTERNATIVES):
        if os.path.isdir(path) and not path.startswith("/usr/"):
            mounts += [*_folders_above(path), "--ro-bind", path, path]
    return (*mounts, "--ro-bind", str(_INSIDE), "/inside/inside")


def _package_mounts(packages: Sequence[str]) -> list[str]:
    """Returns what shows the folders of packages, below a folder that is open to all users."""
    places = zip(packages, path("bubblewrap", packages), strict=True)
    mounts = [word for folder, place in places for word in ("--ro-bind", folder, place)]
    return ["--perms", "0755", "--dir", "/packages", *mounts] if mounts else []


def _folders_above(path: str) -> list[str]:
    """Returns what makes the folders above a path; bubblewrap alone would close them to others."""
    parents = [*Path(path).parents][-2::-1]
    return [word for parent in parents for word in ("--perms", "0755", "--dir", str(parent))]


def _homes() -> Sequence[str]:
    """Returns the folders of this Python's own files, those of a virtual environment aside."""
    paths = [sys.base_prefix, sys.base_exec_prefix, os.path.realpath(sys.base_prefix)]
    return [path for path in dict.fromkeys(paths) if path not in ("/", "/usr")]


def _settings() -> list[str]:
    settings = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    return [word for pair in settings.items() for word in ("--setenv", *pair)]


def _python(folder: str, user: int) -> list[str]:
    options = ["-P", "-S", "-s", "-B", "-X", "utf8"]
    return [os.path.realpath(sys.executable), *options, "-c", _MAIN.format(folder, user)]


def _bare_command() -> list[str]:
    return _python(str(_INSIDE.parent), -1)


def request(**fields: object) -> bytes:
    """Returns a request to `inside.init` as one line."""
    return marshal.dumps(fields).hex().encode()
