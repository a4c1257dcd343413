"""Rewards whose child processes try to answer in their place; workers import this file, so it
imports nothing heavy.
"""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

DESCRIPTORS = range(3, 64)
LINES = b"[1.0]\n"


def write_to_all(lines=LINES):
    """Writes to every descriptor that could be the wire."""
    for descriptor in DESCRIPTORS:
        with suppress(OSError):
            os.write(descriptor, lines)


def run_forked(body):
    """Runs a function in a fork, which ends without returning to the worker."""
    child = os.fork()
    if child == 0:
        body()
        os._exit(0)
    os.waitpid(child, 0)


def with_fork():
    run_forked(write_to_all)


def with_fork_that_returns():
    if os.fork() == 0:
        write_to_all()
    else:
        os.wait()


def with_fork_that_stays():
    """The child goes on writing while later completions are graded."""
    if os.fork() == 0:
        for _ in range(200):
            write_to_all()
            time.sleep(0.005)
        os._exit(0)


def with_fork_of_a_fork():
    run_forked(with_fork)


def with_fork_of_c():
    """No hook of Python runs in it: it has the wire and the memory of the worker."""
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        write_to_all()
        os._exit(0)
    os.waitpid(child, 0)


def with_fork_of_c_that_stays():
    if ctypes.PyDLL(None).fork() == 0:
        for _ in range(200):
            write_to_all()
            time.sleep(0.005)
        os._exit(0)


def with_fork_of_c_that_floods():
    if ctypes.PyDLL(None).fork() == 0:
        for _ in range(200):
            write_to_all(b"x" * 100_000)
        os._exit(0)


def with_fork_of_c_that_replays():
    """It answers with the tokens that it finds in its memory."""
    frame = sys._getframe()
    while "chunk" not in frame.f_locals:
        frame = frame.f_back
    tokens = frame.f_locals["chunk"]["tokens"]
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        write_to_all(
            b"".join(b'[%d, "%s", 1.0]\n' % (number, token.encode()) for number, token in tokens)
        )
        os._exit(0)
    os.waitpid(child, 0)


def with_thread():
    thread = threading.Thread(target=with_fork)
    thread.start()
    thread.join()


def with_system():
    os.system("for i in $(seq 3 63); do eval \"echo '[1.0]' >&$i\" 2>/dev/null; done")


def with_program():
    subprocess.run([sys.executable, "-c", PROGRAM], close_fds=False, check=True)


PROGRAM = (
    f"import os\nfor d in range(3, 64):\n    try: os.write(d, {LINES!r})\n    except OSError: pass"
)


def with_program_that_is_given_the_descriptors():
    """Not an oversight but intent: the worker makes its descriptors inheritable."""
    present = [
        descriptor for descriptor in DESCRIPTORS if os.path.exists(f"/proc/self/fd/{descriptor}")
    ]
    subprocess.run([sys.executable, "-c", PROGRAM], pass_fds=present, check=True)


def with_spawned_program():
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", PROGRAM], os.environ)
    os.waitpid(child, 0)


def run_multiprocessing(method):
    process = multiprocessing.get_context(method).Process(target=write_to_all)
    process.start()
    process.join()


def with_multiprocessing_fork():
    run_multiprocessing("fork")


def with_multiprocessing_spawn():
    run_multiprocessing("spawn")


def with_multiprocessing_forkserver():
    run_multiprocessing("forkserver")


ATTACKS = {name: attack for name, attack in globals().items() if name.startswith("with_")}


def attacked(prompts, completions, **columns):
    """A number of two digits is its own reward / 100; a name is an attack, worth 0.25."""
    (word,) = completions
    if word in ATTACKS:
        ATTACKS[word]()
        return [0.25]
    time.sleep(0.002)
    return [int(word) / 100]


def writes(prompts, completions, **columns):
    """As `attacked`, but a word that is no number is written to the wire, by the worker itself."""
    (word,) = completions
    if word.isdigit():
        return [int(word) / 100]
    if word == "without end":
        while True:
            write_to_all(b"x" * 10_000)
    write_to_all(word.encode())
    if word.endswith("and waits"):
        time.sleep(1000)
    return [0.25]


def bomb(prompts, completions, **columns):
    """Starts processes that leave the session, start others and end, until they are killed; all
    hold the file FIFO.
    """
    if completions == ["wait"]:
        time.sleep(1000)
    holder = os.open(prompts[0], os.O_WRONLY)
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            os.set_inheritable(holder, True)
            _run_away(holder)
    if os.fork() == 0:
        _multiply(6)
    os.close(holder)
    return [1.0]


def _run_away(holder):
    """One process at a time, each with another number and in a session of its own; for a minute at
    most.
    """
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if os.fork():
            os._exit(0)
        os.setsid()
    os._exit(0)


def _multiply(generations):
    """Doubles so often, then each of the processes starts a child again and again that soon
    ends.
    """
    os.setsid()
    for _ in range(generations):
        if os.fork() == 0:
            os.setsid()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        child = os.fork()
        if child == 0:
            time.sleep(0.01)
            os._exit(0)
        os.waitpid(child, 0)
    os._exit(0)
