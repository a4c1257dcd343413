"""The reward `code` against programs that attack it: none earns a reward, gets out, costs another
grading more than its limit, or leaves a process behind.
"""

import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxrft.rewards import sandbox
from jaxrft.rewards.code import CodeReward
from tests import attacks, sandboxes
from tests.sandboxes import needs_bubblewrap, needs_compiler

pytestmark = [needs_bubblewrap, pytest.mark.slow]
SECONDS = 3.0  # of an attack
IDLE_SECONDS = 1.0  # of one that waits, or computes, until it is ended
PATIENCE = 30.0  # for a machine that does much else
DOUBLE = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
HONEST = "print(2 * int(input()))"
ADD = "assert add(1, 2) == 3\nassert add(2, 2) == 4"
LANGUAGES = ("python",) if sandbox.compiler("bubblewrap") is None else ("python", "cpp")
USER = pytest.param(False, id="user")
FLAVORS = [pytest.param(True, id="root"), USER] if os.geteuid() == 0 else [USER]


@pytest.fixture(scope="module", params=FLAVORS)
def grader(request):
    """A reward with short limits, and the namespaces of its sandboxes, as root and as a user."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        flavor = sandbox._flavor()
        if request.param and not flavor.separate_user:
            pytest.skip("root cannot run programs as another user here")
        flavor = flavor._replace(separate_user=request.param)
        monkeypatch.setattr(sandbox, "_flavor", lambda: flavor)
        namespaces = sandboxes.record_namespaces(monkeypatch)
        reward = CodeReward(
            seconds=SECONDS, test_seconds=1, memory_bytes=1 << 29, languages=LANGUAGES
        )
        reward.start_in_worker()
        yield reward, namespaces
        reward.close()
        assert sandboxes.wait_until_empty(namespaces) == []


def _grade(reward, program, answer, language="python"):
    return reward([""], [f"```{language}\n{program}\n```"], answer=[answer])[0]


@contextmanager
def _limited(reward, seconds):
    """Lets gradings, and each of their tests, take so many seconds."""
    kept = reward._seconds, reward._limits
    reward._seconds = seconds
    reward._limits = reward._limits._replace(wall_seconds=seconds)
    yield
    reward._seconds, reward._limits = kept


def _check_attack(grader, program, answer, language="python", seconds=SECONDS):
    """Grades an attack, which earns nothing, ends in time and leaves nothing, and an honest one."""
    reward, namespaces = grader
    namespaces.clear()
    start = time.monotonic()
    with _limited(reward, seconds):
        assert _grade(reward, program, answer, language) == 0.0
    assert time.monotonic() - start < seconds + PATIENCE
    used = namespaces[:1]  # the second may be the judge's, which is kept
    assert used and sandboxes.wait_until_empty(used) == []
    _check_honest(reward)


def _check_honest(reward):
    with _limited(reward, PATIENCE):
        assert _grade(reward, HONEST, DOUBLE) == 1.0
        assert _grade(reward, "from operator import add", ADD) == 1.0


@pytest.mark.parametrize("name", attacks.PROGRAMS)
def test_attacking_program_earns_nothing(grader, name):
    answer = {"inputs": ["3\n"], "outputs": [attacks.SECRET]}
    with _Listeners() as port:
        program = attacks.PROGRAMS[name].replace("PORT", str(port))
        _check_attack(grader, program, answer)


@pytest.mark.parametrize("name", attacks.SLOW_PROGRAMS)
def test_program_that_does_not_end_earns_nothing(grader, name):
    answer = {"inputs": ["3\n"], "outputs": [attacks.SECRET]}
    _check_attack(grader, attacks.SLOW_PROGRAMS[name], answer, seconds=IDLE_SECONDS)


@needs_compiler
@pytest.mark.parametrize("name", attacks.CPP_PROGRAMS)
def test_attacking_program_in_cpp_earns_nothing(grader, name, tmp_path):
    answer = {"inputs": ["3\n"], "outputs": [attacks.SECRET]}
    with _Listeners() as port:
        program = attacks.cpp_program(name, tmp_path, port)
        _check_attack(grader, program, answer, "cpp")
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize("name", attacks.FUNCTIONS)
def test_attacking_function_passes_no_assert(grader, name):
    _check_attack(grader, attacks.FUNCTIONS[name], attacks.TESTS)


@pytest.mark.parametrize("name", attacks.FUNCTIONS)
def test_attacking_function_passes_no_call(grader, name):
    answer = {"fn_name": "f", "inputs": [[3]], "outputs": [int(attacks.SECRET)]}
    _check_attack(grader, attacks.FUNCTIONS[name], answer)


@pytest.mark.parametrize("name", attacks.SLOW_FUNCTIONS)
def test_function_that_does_not_end_passes_nothing(grader, name):
    program = attacks.SLOW_FUNCTIONS[name]
    answer = {"fn_name": "f", "inputs": [[3]], "outputs": [int(attacks.SECRET)]}
    _check_attack(grader, program, attacks.TESTS, seconds=IDLE_SECONDS)
    _check_attack(grader, program, answer, seconds=IDLE_SECONDS)


@pytest.mark.parametrize("name", attacks.FORGERIES)
def test_tests_cannot_be_forged(grader, name):
    program, tests = attacks.FORGERIES[name]
    _check_attack(grader, program, tests)


def test_program_writes_nothing_outside_of_its_tmp(grader, tmp_path):
    reward, _ = grader
    marker = f"jaxrft-{os.getpid()}"
    program = (
        f"import os\nfor folder in ({str(tmp_path)!r}, '/tmp', '/', '/dev/shm', os.getcwd()):\n"
        f"    try:\n        os.makedirs(folder, exist_ok=True)\n"
        f"        open(folder + '/{marker}', 'w').write('x')\n    except OSError: pass\n"
        f"print(open('/tmp/{marker}').read())"
    )
    assert _grade(reward, program, {"inputs": [""], "outputs": ["x"]}) == 1.0
    for folder in (tmp_path, Path("/tmp"), Path("/"), Path("/dev/shm"), Path.cwd()):
        assert not (folder / marker).exists()
    read = f"import os\nprint(os.listdir('/tmp'), os.path.exists({str(tmp_path)!r}))"
    assert _grade(reward, read, {"inputs": [""], "outputs": ["[] False"]}) == 1.0


def test_tests_of_one_grading_do_not_reach_each_other(grader):
    reward, _ = grader
    program = (
        "import os, time\nprint(len(os.listdir('/proc/self/task')), sum(n.isdigit() for n in "
        "os.listdir('/proc')))\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)"
    )
    answer = {"inputs": ["", "", ""], "outputs": ["1 2"] * 3}
    assert _grade(reward, program, answer) == 1.0


@pytest.mark.parametrize("name", ["fork bomb", "thread bomb", "disk bomb", "endless output"])
def test_attack_costs_another_grading_at_most_its_limit(grader, name):
    reward, _ = grader
    program = (attacks.SLOW_PROGRAMS | attacks.PROGRAMS)[name]
    results = []
    other = CodeReward(seconds=PATIENCE)
    other.start_in_worker()
    answer = {"inputs": ["3\n"], "outputs": [attacks.SECRET]}
    attack = threading.Thread(target=lambda: results.append(_grade(other, program, answer)))
    other._seconds = SECONDS
    attack.start()
    start = time.monotonic()
    _check_honest(reward)
    assert time.monotonic() - start < SECONDS + PATIENCE
    attack.join()
    other.close()
    assert results == [0.0]


class _Listeners:
    """Sockets on this machine that hand out what is expected to whoever connects."""

    def __enter__(self):
        self._server = socket.create_server(("127.0.0.1", 0))
        port = self._server.getsockname()[1]
        self._local = socket.socket(socket.AF_UNIX)
        self._local.bind(f"\0jaxrft-attack-{port}")
        self._local.listen()
        for server in (self._server, self._local):
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        return port

    def __exit__(self, *exception):
        for server in (self._server, self._local):
            server.shutdown(socket.SHUT_RDWR)
            server.close()

    def _serve(self, server):
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(attacks.SECRET.encode())


def test_there_are_at_least_fifty_attacks():
    tables = (attacks.PROGRAMS, attacks.SLOW_PROGRAMS, attacks.FUNCTIONS, attacks.FORGERIES)
    assert sum(map(len, tables)) >= 50
