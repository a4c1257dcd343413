"""Worker processes against graders that hang, crash, lie and print: the run goes on and knows what it lost."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from jaxrft.rewards import Pool, verl
from jaxrft.rewards import pool as pools
from jaxrft.rewards.functions import text_of
from jaxrft.types import InputError


def hostile(prompts, completions, **columns):
    """A reward that does what its completion says."""
    word = text_of(completions[0])
    match word:
        case "hang":
            while True:
                time.sleep(1)
        case "exit":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
        case "quit":
            sys.exit(0)
        case "raise":
            raise KeyError("no\nsuch key")
        case "bomb":
            return [float(len(bytearray(64 << 30)))]
        case "fork":
            if os.fork() == 0:
                raise KeyError("in the child")
            os.wait()
        case "garble":
            for descriptor in range(3, 64):
                with suppress(OSError):
                    os.write(descriptor, b"[0.5\n")
        case "term":
            for process in (os.getpid(), os.getppid()):
                os.kill(process, signal.SIGTERM)
        case "print":
            print("[1.0]\n" * 10_000, flush=True)
            os.write(1, b'[null, "error", "forged"]\n')
    returned = {"none": [None], "long": [1.0, 1.0], "short": [], "nan": [float("nan")], "inf": [float("inf")]}
    return (returned | {"text": ["1"], "scalar": 1.0, "string": "1", "true": [True]}).get(word, [float(len(word))])


def length(prompts, completions, *, weight, **columns):
    return [w * len(p) + len(text_of(c)) / 100 for p, c, w in zip(prompts, completions, weight, strict=True)]


def pid(prompts, completions, **columns):
    return [float(os.getpid())]


kept = []


def keep(prompts, completions, *, bytes, **columns):
    """A grader that leaks."""
    if not kept:
        kept.append(bytearray(b"x") * bytes[0])
    return [1.0]


def hangs(prompts, completions, **columns):
    if completions == ["hang"]:
        Path(os.environ["STARTED"]).write_text(str(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid))
        time.sleep(1000)
    return [1.0]


def environment(prompts, completions, **columns):
    assert "jax" not in sys.modules or os.environ["JAX_PLATFORMS"] == "cpu"
    return [float(os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == "")]


def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str == ground_truth)


scored = verl(compute_score)

NO_FAILURES = {"timeout": 0, "crash": 0, "wrong_length": 0, "error": 0, "invalid": 0}


@pytest.fixture(scope="module")
def pool():
    with Pool([("hostile", hostile), ("length", length)], workers=2, timeout=2.0) as pool:
        yield pool


def grade(pool, completions):
    n = len(completions)
    graded = pool.grade(["q"] * n, completions, {"weight": [1.0] * n})
    assert [r is not None for r in graded.rewards[1]] == [True] * n  # the other reward never suffers
    assert len(graded.failed) == sum(graded.failures.values())
    assert all(graded.rewards[0][i] is None for i in graded.failed)
    return graded.rewards[0], {kind: count for kind, count in graded.failures.items() if count}


def test_order(pool):
    """500 completions, 2 rewards, 2 workers: every reward in its place; prompts may be messages, columns any JSON."""
    completions = ["x" * (i % 50) for i in range(500)]
    prompts = [[{"role": "user", "content": "\ud800 ü"}]] * 500
    graded = pool.grade(prompts, completions, {"weight": [float(i) for i in range(500)], "extra": [{"a": [1]}] * 500})
    assert graded.rewards[0] == [float(i % 50) for i in range(500)]
    assert graded.rewards[1] == [i + (i % 50) / 100 for i in range(500)]
    assert graded.failures == NO_FAILURES


def test_empty(pool):
    assert pool.grade([], [], {"weight": []}) == ([[], []], NO_FAILURES, set(), {})


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("hang", "timeout"),
        ("exit", "crash"),
        ("segfault", "crash"),
        ("garble", "crash"),
        ("quit", "error"),
        ("raise", "error"),
    ]
    + [("bomb", "error"), ("long", "wrong_length"), ("short", "wrong_length")]
    + [(word, "invalid") for word in ("nan", "inf", "text", "scalar", "string")],
)
def test_a_failure_costs_only_itself(pool, caplog, word, kind):
    """The rest of its chunk is graded; twice the same failure is one line in the log."""
    completions = ["a", "bb", word, "ccc", word, *["dddd"] * 40]
    with caplog.at_level(logging.WARNING, logger="jaxrft"):
        rewards, failures = grade(pool, completions)
    assert rewards == [1.0, 2.0, None, 3.0, None, *[4.0] * 40]
    assert failures == {kind: 2}
    assert len(caplog.records) == 1 and f"2 rewards lost to {kind}; the first: hostile" in caplog.text


def test_what_is_no_failure(pool):
    """None is a reward function's right, booleans are numbers, and prints and forks do not reach the wire.

    Nor does a SIGTERM to the whole job end those that grade what the trainer has yet to save.
    """
    assert grade(pool, ["none", "true", "print", "fork", "term", "a"]) == ([None, 1.0, 5.0, 4.0, 4.0, 1.0], {})


@pytest.mark.parametrize("reason", ["gradings", "bytes"])
def test_workers_are_recycled(monkeypatch, reason):
    """Between two chunks, without losing a reward; other workers go on meanwhile."""
    monkeypatch.setattr(pools, "RECYCLE_GRADINGS", 40 if reason == "gradings" else 10**9)
    with Pool([("pid", pid), ("keep", keep)], workers=2) as pool:
        keeping = 200 << 20 if reason == "bytes" else 0
        monkeypatch.setattr(pools, "RECYCLE_BYTES", 100 << 20)
        pids = set()

        def replaced():
            graded = pool.grade(["q"] * 64, ["a"] * 64, {"bytes": [keeping] * 64})
            assert graded.rewards[1] == [1.0] * 64 and graded.failures == NO_FAILURES
            pids.update(map(int, graded.rewards[0]))
            return len(pids) >= 4

        wait_until(replaced)
        wait_until(lambda: sum(map(alive, pids)) <= 2)


def test_functions_by_path_and_adapted():
    columns = {"answer": ["a", "a"]}
    with Pool([("exact", "exact"), ("scored", scored), ("e", environment), ("pid", pid)], workers=1) as pool:
        first, again = (pool.grade(["q", "q"], ["a", "b"], columns).rewards for _ in range(2))
        assert first == again  # the same process
        assert first[:3] == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
        os.kill(int(first[3][0]), signal.SIGKILL)
        time.sleep(0.2)
        after = pool.grade(["q", "q"], ["a", "b"], columns)
        assert after.rewards[0] == [1.0, 0.0] and after.failures == NO_FAILURES  # idle, it cost nothing


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("maths", "did you mean math"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("test_pool:hostle", "did you mean hostile"),
        (lambda prompts, completions: [1.0], "top level of a module"),
        ("broken_scores:f", "NameError"),
        ("dying_scores:f", "the worker process died"),
    ],
)
def test_rewards_that_do_not_load(reward, said, tmp_path, monkeypatch):
    (tmp_path / "broken_scores.py").write_text("undefined_name\n")
    (tmp_path / "dying_scores.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        Pool([("mine", reward)], workers=1)


def test_columns_that_cannot_be_sent(pool):
    with pytest.raises(InputError, match="column weight has 1 values for 2 completions"):
        pool.grade(["q", "q"], ["a", "b"], {"weight": [1.0]})
    with pytest.raises(InputError, match="column weight cannot be sent"):
        pool.grade(["q"], ["a"], {"weight": [{1.0}]})


SCRIPT = """
import glob, os, subprocess, sys, time
from jaxrft.rewards import Pool

def mine(prompts, completions, **columns):
    if completions[0] == "hang":
        open(f"grading.{os.getpid()}", "w").close()
        sum(iter(int, 1))  # endless, in C
    return [float(os.getpid())]

def starts(prompts, completions, **columns):
    # what graders start: a child, one of another session whose parent has left, a fork that shares our files
    sleeper = "import os, sys, time; open(f'started.{os.getpid()}', 'w').close(); time.sleep(1000)"
    subprocess.Popen([sys.executable, "-c", sleeper])
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", orphan], check=True)
    if os.fork() == 0:
        open(f"started.{os.getpid()}", "w").close()
        os.setsid()
        time.sleep(1000)
    return [1.0]

def main():
    if sys.argv[1] == "start":
        pool = Pool([("starts", starts)], workers=2, timeout=60)
        rewards = pool.grade(["q"] * 2, ["a"] * 2, {}).rewards
        while len(glob.glob("started.*")) < 6:
            time.sleep(0.05)
        print(rewards, flush=True)
        while sys.argv[2] == "stay":
            time.sleep(0.1)
        if sys.argv[2] == "close":
            pool.close()
        return
    with Pool([("mine", mine)], workers=2, timeout=60) as pool:
        print(*map(int, pool.grade(["q"] * 4, sys.argv[1:], {}).rewards[0]), flush=True)
"""
GUARDED = SCRIPT + "\nif __name__ == '__main__':\n    main()\n"


def run_script(folder, text, *completions):
    (folder / "script.py").write_text(textwrap.dedent(text))
    command = [sys.executable, "script.py", *completions]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alive(pid):
    """Whether the process runs, zombies aside."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_function_of_a_script(tmp_path):
    """A reward of the user's own `__main__` is graded elsewhere, and no worker is left behind."""
    script = run_script(tmp_path, GUARDED, "a", "b", "c", "d")
    output, errors = script.communicate(timeout=60)
    pids = {int(word) for word in output.split()}
    assert pids and script.pid not in pids, errors
    assert not any(alive(pid) for pid in pids)


def test_a_script_without_guard_says_so(tmp_path):
    script = run_script(tmp_path, SCRIPT + "\nmain()\n", "a", "b", "c", "d")
    assert "__name__ == '__main__'" in script.communicate(timeout=60)[1] and script.returncode != 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_the_trainer(tmp_path, death):
    """Even while their graders hang and hold the interpreter."""
    script = run_script(tmp_path, GUARDED, "hang", "hang", "hang", "hang")
    wait_until(lambda: len(list(tmp_path.glob("grading.*"))) == 2)
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("grading.*")]
    assert all(alive(pid) for pid in pids)
    script.send_signal(death)
    script.communicate(timeout=60)
    wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere orphans of another session are lost")
@pytest.mark.parametrize("end", ["close", "leave", signal.SIGKILL, signal.SIGTERM])
def test_what_graders_started_ends_too(tmp_path, end):
    """Also what is in a session of its own, whose parent has long left; with or without close()."""
    script = run_script(tmp_path, GUARDED, "start", end if isinstance(end, str) else "stay")
    assert script.stdout.readline() == "[[1.0, 1.0]]\n", script.stderr.read()
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("started.*")]
    if not isinstance(end, str):
        assert all(alive(pid) for pid in pids)
        script.send_signal(end)
    script.communicate(timeout=60)  # returns when all who share its output are gone
    assert len(pids) == 6
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_what_a_killed_grader_started_ends_with_it(tmp_path, monkeypatch):
    """A timeout kills the grader's processes; the next worker has its own."""
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    with Pool([("hangs", hangs)], workers=1, timeout=1.0) as pool:
        graded = pool.grade(["q"] * 2, ["hang", "a"], {})
        assert graded.rewards == [[None, 1.0]] and graded.failures["timeout"] == 1
        wait_until(lambda: not alive(int((tmp_path / "started").read_text())))
