"""Worker processes against graders that hang, crash, lie and print: the run goes on and knows what
it lost.
"""

import asyncio
import ctypes
import functools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import forgers
import pytest

from jaxrft.errors import InputError
from jaxrft.host import launch
from jaxrft.rewards import Pool, verl
from jaxrft.rewards import pool as pools
from jaxrft.rewards.functions import text_of


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
    returned = {
        "none": [None],
        "long": [1.0, 1.0],
        "short": [],
        "nan": [float("nan")],
        "inf": [float("inf")],
    }
    returned["huge"] = [-1e39]
    return (returned | {"text": ["1"], "scalar": 1.0, "string": "1", "true": [True]}).get(
        word, [float(len(word))]
    )


def length(prompts, completions, *, weight, **columns):
    return [
        w * len(p) + len(text_of(c)) / 100
        for p, c, w in zip(prompts, completions, weight, strict=True)
    ]


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
        Path(os.environ["STARTED"]).write_text(
            str(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)
        )
        time.sleep(1000)
    return [1.0]


def environment(prompts, completions, **columns):
    assert "jax" not in sys.modules or os.environ["JAX_PLATFORMS"] == "cpu"
    return [
        float(os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == "")
    ]


def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str == ground_truth)


scored = verl(compute_score)


def unique_characters(completions, **kwargs):
    return [float(len(set(text_of(completion)))) for completion in completions]


def number_of_ids(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def progress(trainer_state, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps] * len(kwargs["prompts"])


def epoch(trainer_state, **kwargs):
    return [trainer_state.epoch]


def logs(log_extra, log_metric, **kwargs):
    log_extra("length", [1])
    log_metric("mean", 0.5)
    return [
        float(
            {"prompts", "completions", "completion_ids", "answer", "trainer_state"} <= set(kwargs)
        )
    ]


def cut(completions, truncated):
    return [float(flag) for flag in truncated]


def names_all_it_takes(answer, completions):
    return [
        float(text_of(completion) == truth)
        for completion, truth in zip(completions, answer, strict=True)
    ]


async def judge(completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(text_of(completion))) for completion in completions]


class Judge:
    """A callable object, whose call is a coroutine."""

    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [0.5] * len(completions)


def repeat(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def made(value):
    return lambda completions, **kwargs: [value] * len(completions)


judging = Judge()
wrapped = repeat(names_all_it_takes)
produced = made(0.75)


def score_of_two(solution_str, ground_truth, method="strict"):
    return {"score": float(solution_str == ground_truth), "method": method}


async def score_later(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(0)
    return {"score": float(solution_str == ground_truth) + extra_info["bonus"]}


@repeat
def score_of_four(data_source, solution_str, ground_truth, extra_info):
    return float(
        data_source == "sums" and extra_info == {"bonus": 0.5} and solution_str == ground_truth
    )


def needs_solution(completions, solution, **kwargs):
    return [1.0]


def by_position(prompts, completions, /):
    return [1.0]


def score_of_five(data_source, solution_str, ground_truth, router):
    return 1.0


NO_FAILURES = {"timeout": 0, "crash": 0, "wrong_length": 0, "error": 0, "invalid": 0}


@pytest.fixture(scope="module")
def pool():
    with Pool([("hostile", hostile), ("length", length)], workers=2, timeout=2.0) as pool:
        yield pool


def grade(pool, completions):
    n = len(completions)
    graded = pool.grade(["q"] * n, completions, {"weight": [1.0] * n})
    # the other reward never suffers
    assert [r is not None for r in graded.rewards[1]] == [True] * n
    assert len(graded.failed) == sum(graded.failures.values())
    assert all(graded.rewards[0][i] is None for i in graded.failed)
    return graded.rewards[0], {kind: count for kind, count in graded.failures.items() if count}


def test_order(pool):
    """500 completions, 2 rewards, 2 workers: every reward in its place; prompts may be messages,
    columns any JSON.
    """
    completions = ["x" * (i % 50) for i in range(500)]
    prompts = [[{"role": "user", "content": "\ud800 ü"}]] * 500
    graded = pool.grade(
        prompts,
        completions,
        {"weight": [float(i) for i in range(500)], "extra": [{"a": [1]}] * 500},
    )
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
    + [(word, "invalid") for word in ("nan", "inf", "huge", "text", "scalar", "string")],
)
def test_a_failure_costs_only_itself(pool, caplog, word, kind):
    """The rest of its chunk is graded; twice the same failure is one line in the log."""
    completions = ["a", "bb", word, "ccc", word, *["dddd"] * 40]
    with caplog.at_level(logging.WARNING, logger="jaxrft"):
        rewards, failures = grade(pool, completions)
    assert rewards == [1.0, 2.0, None, 3.0, None, *[4.0] * 40]
    assert failures == {kind: 2}
    assert (
        len(caplog.records) == 1
        and (f"2 rewards lost to {kind}; the first: hostile") in caplog.text
    )


def test_valid_results_are_no_failures(pool):
    """None is a reward function's right, booleans are numbers, and prints and forks do not reach
    the wire.

    Nor does a SIGTERM to the whole job end those that grade what the trainer has yet to save.
    """
    assert grade(pool, ["none", "true", "print", "fork", "term", "a"]) == (
        [None, 1.0, 5.0, 4.0, 4.0, 1.0],
        {},
    )


@pytest.mark.slow
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
    with Pool(
        [("exact", "exact"), ("scored", scored), ("e", environment), ("pid", pid)], workers=1
    ) as pool:
        first, again = (pool.grade(["q", "q"], ["a", "b"], columns).rewards for _ in range(2))
        assert first == again  # the same process
        assert first[:3] == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
        os.kill(int(first[3][0]), signal.SIGKILL)
        time.sleep(0.2)
        after = pool.grade(["q", "q"], ["a", "b"], columns)
        # idle, it cost nothing
        assert after.rewards[0] == [1.0, 0.0] and after.failures == NO_FAILURES


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("maths", "did you mean math"),
        ("no_such_module:f", "No module named 'no_such_module'; put the file next to the config"),
        ("lacking_scores:f", "No module named 'no_such_dependency'$"),
        ("test_pool:hostle", "did you mean hostile"),
        (lambda prompts, completions: [1.0], "top level of a module"),
        ("broken_scores:f", "NameError"),
        ("dying_scores:f", "the worker process died"),
    ],
)
def test_rewards_that_do_not_load(reward, said, tmp_path, monkeypatch):
    (tmp_path / "broken_scores.py").write_text("undefined_name\n")
    (tmp_path / "lacking_scores.py").write_text("import no_such_dependency\n")
    (tmp_path / "dying_scores.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        Pool([("mine", reward)], workers=1)


# reward -> its values for the completions "a" and "aab" of the answers "a" and "b", and texts of 1
# and 3 ids
CALLS = {
    unique_characters: [1.0, 2.0],
    number_of_ids: [1.0, 3.0],
    progress: [0.25, 0.25],
    logs: [1.0, 1.0],
    cut: [0.0, 1.0],
    names_all_it_takes: [1.0, 0.0],
    judge: [1.0, 3.0],
    judging: [0.5, 0.5],
    wrapped: [1.0, 0.0],
    produced: [0.75, 0.75],
    compute_score: [1.0, 0.0],
    score_of_two: [1.0, 0.0],
    score_later: [1.5, 0.5],
    score_of_four: [1.0, 0.0],
}


@pytest.mark.parametrize("completions_as", ["trl", "text"])
@pytest.mark.parametrize(
    "prompt", ["q", [{"role": "user", "content": "q"}]], ids=["text", "messages"]
)
def test_rewards_get_the_keywords_of_trl_and_verl(prompt, completions_as):
    rewards = [(str(number), function) for number, function in enumerate(CALLS)]
    with Pool(rewards, workers=1, completions_as=completions_as) as pool:
        graded = pool.grade(
            [prompt] * 2,
            ["a", "aab"],
            {"answer": ["a", "b"], "data_source": ["sums"] * 2, "extra_info": [{"bonus": 0.5}] * 2},
            completion_ids=[[5], [5, 6, 7]],
            truncated=[False, True],
            trainer_state={"global_step": 5, "max_steps": 20},
        )
    assert dict(zip(CALLS, graded.rewards, strict=True)) == CALLS


def kind_of_completion(prompts, completions, **kwargs):
    (completion,) = completions
    return [float(completion == [{"role": "assistant", "content": "a"}]) - float(completion == "a")]


@pytest.mark.parametrize(("completions_as", "of_messages"), [("trl", 1.0), ("text", -1.0)])
def test_the_completion_of_a_conversation_is_a_message_or_text(completions_as, of_messages):
    """Decided for each prompt by itself: tasks of several sets come in one batch."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    with Pool(
        [("kind", kind_of_completion), ("exact", "exact")], workers=1, completions_as=completions_as
    ) as pool:
        graded = pool.grade([messages, "q", []], ["a"] * 3, {"answer": ["a", "a", "b"]})
    assert graded.rewards == [[of_messages, -1.0, -1.0], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("reward", "columns", "said"),
    [
        (needs_solution, {}, "the reward mine needs solution, but the tasks have no such column"),
        (number_of_ids, {}, "the reward mine needs completion_ids"),
        (progress, {}, "the reward mine needs trainer_state"),
        (
            "gsm8k",
            {"question": ["q"]},
            "the reward mine needs answer, but .* only prompts, completions, question, log",
        ),
        (score_of_two, {}, "the reward mine needs answer"),
        (
            unique_characters,
            {"trainer_state": [1]},
            "column trainer_state has the name of another argument of rewards",
        ),
        (
            unique_characters,
            {"completion_ids": [[1]]},
            "column completion_ids has the name of another argument of rewards",
        ),
    ],
)
def test_a_missing_argument_is_named_before_grading(reward, columns, said):
    with Pool([("mine", reward)], workers=1) as pool, pytest.raises(InputError, match=said):
        pool.grade(["q"], ["a"], columns)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (by_position, "it takes prompts by position only, and rewards are called by keyword"),
        (score_of_five, "verl's compute_score is not given router: give it a default"),
    ],
)
def test_a_reward_with_positional_parameters_does_not_load(reward, said):
    with pytest.raises(InputError, match=said):
        Pool([("mine", reward)], workers=1)


def test_a_field_that_the_trainer_state_lacks_is_named(caplog):
    with Pool([("epoch", epoch)], workers=1) as pool:
        graded = pool.grade(["q"], ["a"], {}, trainer_state={"global_step": 5, "max_steps": 20})
    assert graded.causes == {
        "epoch": "error, AttributeError: trainer_state has only global_step and max_steps "
        "here, not epoch"
    }


RUNNER = """
from jaxrft.rewards import Pool

if __name__ == "__main__":
    with Pool([("mine", "my_module:my_reward"), ("math", "math")], workers=1) as pool:
        print(pool.grade(["q"] * 2, ["1", "2"], {"answer": ["1", "1"]}).rewards)
"""


@pytest.fixture
def hostile_folder(tmp_path):
    """A current directory whose files have the names of modules, and note that they were
    executed.
    """
    folder = tmp_path / "here"
    folder.mkdir()
    modules = (
        "json",
        "random",
        "sympy",
        "socket",
        "runpy",
        "encodings",
        "math_verify",
        "importlib",
        "sitecustomize",
    )
    for name in ("jaxrft", *modules):
        (folder / name).mkdir()
        note = f"open({str(folder / 'executed')!r}, 'a').write({name!r} + chr(10))\n"
        (folder / name / "__init__.py").write_text(note)
        (folder / f"{name}.py").write_text(note)
    reward = (
        "import json, random\n\ndef my_reward(completions, **kwargs):\n    return "
        "[float(json.loads(completions[0]))]\n"
    )
    (folder / "my_module.py").write_text(reward)
    (tmp_path / "run.py").write_text(RUNNER)
    return folder


def test_workers_execute_no_file_of_the_current_directory_but_the_reward(hostile_folder):
    command = [sys.executable, "../run.py"]
    done = subprocess.run(command, cwd=hostile_folder, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[[1.0, 2.0], [1.0, 0.0]]\n", done.stderr
    assert not (hostile_folder / "executed").exists()


@pytest.mark.parametrize("module", ["jaxrft.host.heartbeat", "jaxrft.rewards.worker"])
def test_a_module_is_launched_from_where_this_package_is(hostile_folder, module):
    """Even where its folder is on no search path, as of a checkout that the trainer found in its
    current directory.
    """
    command = launch.command(module)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {
        "cwd": hostile_folder,
        "env": environment,
        "capture_output": True,
        "text": True,
        "timeout": 60,
    }
    done = subprocess.run(command, **settings)
    # it wants arguments: it is ours
    assert "main() missing" in done.stderr or "IndexError" in done.stderr
    assert not (hostile_folder / "executed").exists()


def test_a_function_is_loaded_from_its_file_where_its_name_leads_elsewhere(tmp_path):
    """Such as scores.py in the folder of the script, and another one that is installed."""
    installed, here = tmp_path / "installed", tmp_path / "here"
    for folder, value in ((installed, 0.0), (here, 1.0)):
        folder.mkdir()
        (folder / "scores.py").write_text(
            f"def score(completions, **kwargs):\n    return [{value}]\n"
        )
    (here / "run.py").write_text(
        "import scores\nimport sys\nfrom jaxrft.rewards import Pool\n"
        "if __name__ == '__main__':\n"
        "    with Pool([('scores', scores.score)], workers=1) as pool:\n"
        "        print(pool.grade(['q'], ['1'], {}).rewards)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[[1.0]]\n", done.stderr


@pytest.fixture(scope="module")
def attacked():
    with Pool([("attacked", forgers.attacked)], workers=1, timeout=20.0) as pool:
        yield pool


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere the kernel names no sender"
)
@pytest.mark.parametrize("attack", forgers.ATTACKS)
def test_a_child_of_a_grader_cannot_answer(attacked, attack):
    """The attacker has its own reward, and so have all that come after it in its chunk and in the
    next.
    """
    completions = ["10", "11", attack, *map(str, range(13, 40))]
    graded = attacked.grade(["q"] * 30, completions, {})
    assert graded.rewards == [[0.1, 0.11, 0.25, *(i / 100 for i in range(13, 40))]]
    assert graded.failures == NO_FAILURES


NO_ANSWERS = [
    *(
        "5\n",
        "[]\n",
        '["x"]\n',
        "[NaN]\n",
        '{"pid": 1}\n',
        "null\n",
        "\n",
        "{\n",
        "[1.0]\n",
        "\0\n",
        "[1e999]\n",
    ),
    *(
        '[2, "0123456789abcdef", 1.0]\n',
        '[2, "\\ud800", 1.0]\n',
        "[2, null, 1.0]\n",
        "[" * 1000 + "\n",
    ),
    *(
        '[2, "x", null, "forged", "y"]\n',
        '{"error": "x"}\n',
        '{"signatures": []}\n',
        "[0.5",
        "x" * 70_000,
    ),
]


@pytest.fixture(scope="module")
def written():
    with Pool([("writes", forgers.writes)], workers=1, timeout=20.0) as pool:
        yield pool


@pytest.mark.parametrize(
    "bytes_", [*NO_ANSWERS, "without end"], ids=lambda text: text[:30].strip() or "blank"
)
def test_bytes_that_are_no_answer_are_a_failed_grader(written, bytes_):
    """Of the one completion whose grader wrote them; the others have their rewards."""
    graded = written.grade(["q"] * 6, ["10", "11", bytes_, "13", "14", "15"], {})
    assert graded.rewards == [[0.1, 0.11, None, 0.13, 0.14, 0.15]]
    assert graded.failures == NO_FAILURES | {"crash": 1}


class Mute(Exception):
    def __str__(self):
        raise ValueError("no message")


def ends_its_child(prompts, completions, **columns):
    """Returns the signal that ended a forked child which was told to end."""
    if completions == ["mute"]:
        raise Mute
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]


def test_built_in_rewards_import_nothing_from_the_current_directory(tmp_path, monkeypatch):
    for name in ("gmpy2", "flint"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(tmp_path)
    with Pool([("math", "math")], workers=1) as pool:
        assert pool.grade(["q"], ["The answer is 1/2."], {"answer": ["0.5"]}).rewards == [[1.0]]
    assert not Path("executed").exists()


def test_forked_children_of_a_grader_end_on_signals():
    """As those of multiprocessing are, however soon after their start."""
    with Pool([("ends", ends_its_child)], workers=1, timeout=20.0) as pool:
        graded = pool.grade(["q"] * 21, ["a"] * 20 + ["mute"], {})
    assert graded.rewards == [[-15.0] * 20 + [None]]
    assert graded.causes == {"ends": "error, Mute: its message cannot be read"}


def test_a_line_without_end_of_line_is_waited_for_no_longer_than_the_timeout():
    with Pool([("writes", forgers.writes)], workers=1, timeout=1.0) as pool:
        graded = pool.grade(["q"] * 3, ["10", "[0.5 and waits", "12"], {})
    assert graded.rewards == [[0.1, None, 0.12]] and graded.failures["timeout"] == 1


@pytest.mark.parametrize(
    "text",
    ["5\n", '{"pid": 1}\n', "x" * 70_000, '{"token": "x", "signatures": [[[], [], true]]}\n'],
)
def test_bytes_written_while_a_reward_loads_are_one_sentence(tmp_path, monkeypatch, text):
    program = (
        f"import os\nfor d in range(3, 64):\n    try: os.write(d, {text.encode()!r})\n   "
        " except OSError: pass\n"
    )
    (tmp_path / "loud_scores.py").write_text(
        program + "def f(completions, **columns):\n    return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="something else than the worker wrote"):
        Pool([("loud", "loud_scores:f")], workers=1)


def ended(reader):
    """Whether no process has the other end open."""
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere orphans of another session are lost"
)
@pytest.mark.parametrize("end", ["close", "timeout", "worker"])
def test_a_fork_bomb_that_leaves_its_session_ends_with_the_pool(tmp_path, end):
    """However the worker ends; the file that all of its processes hold open is closed by the last
    of them.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with Pool(
        [("bomb", forgers.bomb), ("pid", pid)], workers=1, timeout=1.0 if end == "timeout" else 60.0
    ) as pool:
        rewards = pool.grade([str(fifo)], ["start"], {}).rewards
        assert rewards[0] == [1.0]
        assert not ended(reader)
        start = time.monotonic()
        if end == "timeout":
            assert pool.grade([str(fifo)], ["wait"], {}).failures["timeout"] == 1
        if end == "worker":
            os.kill(int(rewards[1][0]), signal.SIGKILL)
            wait_until(lambda: ended(reader))
    assert ended(reader)
    assert time.monotonic() - start < pools.STOP_SECONDS


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
"""  # noqa: E501
GUARDED = SCRIPT + "\nif __name__ == '__main__':\n    main()\n"


def run_script(folder, text, *completions):
    (folder / "script.py").write_text(textwrap.dedent(text))
    command = [sys.executable, "script.py", *completions]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def alive(pid):
    """Whether the process runs, zombies aside."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 120  # of a loaded machine
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


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's death"
)
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


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere orphans of another session are lost"
)
@pytest.mark.parametrize("end", ["close", "leave", signal.SIGKILL, signal.SIGTERM])
def test_processes_of_graders_end_with_the_pool(tmp_path, end):
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


@pytest.mark.slow
def test_processes_of_a_killed_grader_end_with_it(tmp_path, monkeypatch):
    """A timeout kills the grader's processes; the next worker has its own."""
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    with Pool([("hangs", hangs)], workers=1, timeout=1.0) as pool:
        graded = pool.grade(["q"] * 2, ["hang", "a"], {})
        assert graded.rewards == [[None, 1.0]] and graded.failures["timeout"] == 1
        wait_until(lambda: not alive(int((tmp_path / "started").read_text())))
