"""The process of a command: how it ends on signals that come early, and on errors that nobody
foresaw.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import helpers
import pytest

from jaxrft import cli
from jaxrft.errors import InputError
from jaxrft.host import crash, libtpu
from jaxrft.train import loop

SENTENCE = "jaxrft: stopped by SIG{} with nothing to save; run the same command again\n"
# Sends a signal to its own process when a module is about to be imported; then runs the program.
IMPORTING = """
import os, signal, sys
_, number, module, *sys.argv[1:] = sys.argv

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), getattr(signal, number))

from jaxrft.__main__ import main
sys.meta_path.insert(0, Interrupt())
sys.exit(main())
"""
# As a long compilation does: C++ that gives up the interpreter's lock, and returns to it much
# later.
COMPILING = """
import hashlib, os, signal, sys, threading
from jaxrft.host import signals
signals.leave_early()
if sys.argv[2] == "saving":  # as `runtime.stop_signals`
    signal.signal(signal.SIGINT, lambda *_: None)
for seconds in (0.2, 0.7):
    threading.Timer(seconds, os.kill, (os.getpid(), getattr(signal, sys.argv[1]))).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1 if sys.argv[2] != "waiting" else 1)
"""


def run(code, *arguments):
    """Exit code, stdout and stderr of a Python process."""
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=helpers.TIMEOUT,
        cwd=Path(__file__).parents[1],
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("INT", "jaxrft.cli", ("train", "configs/quickstart.py")),
        ("INT", "jax", ("train", "configs/quickstart.py")),
        ("TERM", "jax._src.core", ("eval", "configs/quickstart.py")),
        ("HUP", "tyro", ("prepare", "dataset")),
        ("INT", "scipy", ("simulate", "--steps", "2")),
        ("INT", "jaxrft.prepare.predictor", ("prepare", "predictor", "--responses", "x.npz")),
    ],
)
def test_a_signal_while_modules_are_imported_is_one_sentence(name, module, command):
    code, _, said = run(IMPORTING, f"SIG{name}", module, *command)
    assert (code, said) == (128 + getattr(signal, f"SIG{name}"), SENTENCE.format(name))


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_signal_ends_a_process_that_compiles(name):
    code, _, said = run(COMPILING, f"SIG{name}", "compiling")
    assert (code, said) == (128 + getattr(signal, f"SIG{name}"), SENTENCE.format(name))


def test_a_second_ctrl_c_ends_a_process_that_compiles_and_would_save():
    code, _, said = run(COMPILING, "SIGINT", "saving")
    first, second = said.splitlines()
    assert code == 130 and first.startswith(
        "jaxrft: stopping after the current step; a second Ctrl-C ends"
    )
    assert second.startswith("jaxrft: stopped by SIGINT for the second time, without saving")


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_second_ctrl_c_unwinds_nothing(pause):
    """What is unwound might wait for, or be destroyed under, a program that runs."""
    code = (
        "import os, signal, sys, time\nfrom jaxrft.host import signals\n"
        "from jaxrft.host.stopping import stop_signals\nsignals.leave_early()\n"
        "try:\n    with stop_signals():\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(float(sys.argv[1]))\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(20)\n"
        "finally:\n    print('unwound')\n"
    )
    code, printed, said = run(code, str(pause))
    assert (code, printed) == (130, "")
    assert "stopped by SIGINT for the second time" in said


def test_a_terminal_has_its_cursor_again_and_no_line_of_progress_before_the_sentence():
    code = (
        "import os, signal\nfrom jaxrft.host import signals\nsignals.leave_early()\n"
        "os.write(1, b'\\x1b[?25lstep 1/9')\nos.kill(os.getpid(), signal.SIGTERM)\nsignal.pause()"
    )
    master, slave = os.openpty()
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=slave, stderr=slave, cwd=root, timeout=60)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end, as Linux has it
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    sentence = SENTENCE.format("TERM").strip().encode()
    assert done.returncode == 143
    assert shown == b"\x1b[?25lstep 1/9\x1b[?25h\r\x1b[2K" + sentence + b"\r\n"


@pytest.mark.skipif(
    any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="CUDA is installed",
)
def test_a_platform_without_its_plugin_is_one_sentence():
    code = "import os; os.environ['JAX_PLATFORMS'] = 'cuda'\nfrom jaxrft import cli\n"
    config = Path(__file__).parents[1] / "configs/quickstart.py"
    done = run(code + f"cli.main(['eval', {str(config)!r}])")
    (said,) = done[2].splitlines()
    assert said.startswith("jaxrft: error: JAX_PLATFORMS is cuda, but JAX finds no such device: ")
    assert "[cuda]" in said


LIBTPU = """\
Failed to find host bounds for accelerator type: WARNING: could not determine TPU accelerator type
WARNING: Logging before InitGoogle() is written to STDERR
E0000 00:00:1795934297.463424    5816 common_lib.cc:554] INVALID_ARGUMENT: Error: unexpected worker
=== Source Location Trace: ===
learning/45eac/tfrc/runtime/libtpu_init_utils.cc:327
"""


def test_only_the_messages_of_libtpu_without_a_tpu_are_dropped(monkeypatch, capfd):
    for name in libtpu.ASKED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(libtpu, "DEVICES", ())
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/somewhere/libtpu.so")
    other = "E0000 00:00:1795934297.463424    5816 cuda_platform.cc:52] failed call to cuInit\n"

    def printed():
        with libtpu.quiet():
            os.write(2, (LIBTPU + other).encode())
        return capfd.readouterr().err

    assert printed() == other
    monkeypatch.setattr(libtpu, "DEVICES", ("null",))  # a TPU is attached
    assert printed() == LIBTPU + other
    monkeypatch.setattr(libtpu, "DEVICES", ())
    monkeypatch.setenv("TPU_MIN_LOG_LEVEL", "0")  # the user asks for it
    assert printed() == LIBTPU + other


@pytest.mark.parametrize("name", ["HUP", "INT"])
def test_a_signal_that_is_ignored_stays_ignored(name):
    """As nohup and shells without job control have it."""
    code = f"import signal; signal.signal(signal.SIG{name}, signal.SIG_IGN)\n{COMPILING}"
    assert run(code, f"SIG{name}", "waiting") == (0, "", "")


def test_a_run_saves_on_signals_that_are_not_ignored():
    code = (
        "import signal\nfrom jaxrft.host import signals\nprint(*map(int, signals.to_save()))\n"
        "for number in signals.numbers(): signal.signal(number, "
        "signal.SIG_IGN)\nprint(*map(int, signals.to_save()))"
    )
    # SIGTERM is how schedulers ask, whatever shells trap
    assert run(code)[1].split() == ["2", "15", "1", "15"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "<&-"])
def test_no_file_takes_the_number_of_a_closed_standard_stream(closed):
    code = (
        "import os; from jaxrft.host import signals; signals.open_descriptors(); "
        "os._exit(os.dup(2))"
    )
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, code],
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode > 2


def test_a_forked_child_sends_no_signals_to_its_parent():
    code = (
        "import os, signal, time\nfrom jaxrft.host import "
        "signals\nsignals.leave_early()\nchild = os.fork()\n"
        "if child == 0:\n    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n    "
        "time.sleep(60)\n"
        "time.sleep(0.3)\nos.kill(child, "
        "signal.SIGTERM)\nprint(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "time.sleep(0.3)"
    )
    assert run(code)[:2] == (0, "7\n")


def test_sigterm_ends_a_process_that_has_joined_others():
    """JAX has a handler of its own for it, to which nothing here listens."""
    code = (
        "import os, signal, sys, time\nfrom jaxrft.host import signals\nsignals.leave_early()\n"
        "os.environ |= dict(JAX_COORDINATOR_ADDRESS=sys.argv[1], JAX_NUM_PROCESSES='1', "
        "JAX_PROCESS_ID='0')\n"
        "from jaxrft.host import multihost\nmultihost.join_processes()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)"
    )
    code, _, said = run(code, f"localhost:{helpers.free_port()}")
    assert (code, said.splitlines()[-1:]) == (143, [SENTENCE.format("TERM").strip()])


def test_all_is_the_kernels_when_the_command_has_ended():
    code = (
        "import os, signal, sys\nfrom jaxrft.__main__ import main\nsys.argv = ['jaxrft', "
        "'--help']\n"
        "assert main() == 0\nos.kill(os.getpid(), signal.SIGINT)"
    )
    code, _, said = run(code)
    assert (code, said) == (-signal.SIGINT, "")


BUGS = [
    (RuntimeError("a\nb"), "RuntimeError: a"),
    (KeyError("x"), "KeyError: 'x'"),
    (AssertionError(), "AssertionError"),
    (
        RecursionError("maximum recursion depth exceeded"),
        "RecursionError: maximum recursion depth exceeded",
    ),
    (
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        "UnicodeEncodeError: 'utf-8' codec",
    ),
    (ValueError("x" * 1000), f"ValueError: {'x' * 200}..."),
]


@pytest.mark.parametrize(("error", "said"), BUGS, ids=lambda value: type(value).__name__)
def test_an_unexpected_error_is_one_sentence_with_a_trace_file(
    error, said, monkeypatch, tmp_path, configure, capsys
):
    def fail(_):
        raise error

    monkeypatch.setattr(loop, "advance", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "run").mkdir()
    path = helpers.write_config(tmp_path / "config.py", configure(tmp_path / "run"))
    assert cli.main(["train", path]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (trace,) = (tmp_path / "run").iterdir()
    wanted = f": this is a bug of jaxrft; please report it with the stack trace in {trace}"
    assert line.startswith(f"jaxrft: error: {said}") and line.endswith(wanted)
    assert "in fail" in trace.read_text() and "Traceback" in trace.read_text()
    assert not list((tmp_path / "temporary").iterdir())


def test_without_a_run_the_trace_goes_to_the_temporary_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for folder in (None, tmp_path / "nowhere", Path("/proc/1")):
        with pytest.raises(
            crash.Crash, match=f"ZeroDivisionError: .* in {re.escape(str(tmp_path))}/jaxrft-error-"
        ):
            with crash.reported(folder):
                1 / 0  # noqa: B018
        (trace,) = tmp_path.iterdir()
        assert "1 / 0" in trace.read_text() and f"Python {sys.version}" in trace.read_text()
        trace.unlink()


def test_a_trace_that_no_folder_takes_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(crash.Crash, match="(?s)cannot be written:\nTraceback.*ZeroDivisionError"):
        with crash.reported(tmp_path / "neither"):
            1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            MemoryError(),
            r"out of memory \(MemoryError\): set remat to full, lower "
            r"micro_batch_size",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes."),
            "out of memory .*17 bytes.*--dry-run",
        ),
        (
            RuntimeError("Unable to initialize backend 'tpu': x"),
            "JAX finds no device .*'tpu'.*: set JAX_PLATFORMS",
        ),
        (
            ModuleNotFoundError("No module named 'optax'", name="optax"),
            "the package optax cannot be imported",
        ),
        (InputError("steps is 0"), "^steps is 0$"),
    ],
)
def test_errors_of_the_machine_are_no_bugs(error, wanted):
    with pytest.raises(InputError, match=wanted):
        with crash.reported():
            raise error


def test_a_device_out_of_memory_is_no_bug():
    code = (
        "import jax, jax.numpy as jnp\nfrom jaxrft.host import crash\n"
        "with crash.reported():\n    jax.block_until_ready(jnp.zeros((2**46,), jnp.float32) + 1)"
    )
    assert "InputError: out of memory (" in run(code)[2]


def test_help_and_mistakes_import_no_jax():
    code = (
        "import sys\nfrom jaxrft import cli\nprint(cli.main(['--help']), cli.main(['no']), "
        "'jax' in sys.modules)"
    )
    assert run(code)[1].endswith("\n0 2 False\n")
