import contextlib
import io
import json
import logging
import math
import os
import re
import sys

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.report import log, metrics, picture, records
from jaxrft.report.console import Display, Sample
from jaxrft.types import Choice, Feedback, InputError, Rollout, Tasks

NAN = math.nan


@pytest.mark.parametrize(
    ("score", "positive", "want"),
    [
        ([0.9, 0.8, 0.1], [1, 1, 0], 1.0),
        ([0.9, 0.8, 0.1], [0, 0, 1], 0.0),
        ([0.3, 0.5, 0.5, 0.1], [1, 1, 0, 0], (0 + 1 + 0.5 + 1) / 4),
        ([0.3, 0.5], [1, 1], NAN),
        ([0.3, 0.5], [0, 0], NAN),
        ([0.3, NAN, 0.1], [1, 0, 0], NAN),
    ],
)
def test_auc_by_hand(score, positive, want):
    padded = (
        jnp.array([*score, 0.6]),
        jnp.array([*positive, 1], bool),
        jnp.arange(len(score) + 1) < len(score),
    )
    np.testing.assert_allclose(metrics.auc(*padded), want)


@pytest.mark.parametrize(
    ("x", "y", "mask", "want"),
    [
        # centered -1, 0, 1 and -1, 1, 0: 1 / sqrt(2 * 2)
        ([1.0, 2.0, 3.0], [0.0, 2.0, 1.0], [1, 1, 1], 0.5),
        ([1.0, 2.0, NAN, 3.0], [6.0, 4.0, 9.0, 2.0], [1, 1, 0, 1], -1.0),
        ([1.0, 1.0], [0.0, 1.0], [1, 1], NAN),
        ([1.0, NAN], [0.0, 1.0], [1, 1], NAN),
    ],
)
def test_pearson_by_hand(x, y, mask, want):
    np.testing.assert_allclose(
        metrics.pearson(jnp.array(x), jnp.array(y), jnp.array(mask, bool)), want, rtol=1e-6
    )


def selection(pass_rate, successes, trials, informative):
    """Of 4 tasks; a row behind those given is padding."""
    ids = jnp.array([*range(len(pass_rate)), 4])
    successes, trials, pass_rate, informative = (
        jnp.array([*x, 0], dtype)
        for x, dtype in (
            (successes, float),
            (trials, float),
            (pass_rate, float),
            (informative, bool),
        )
    )
    feedback, choice = Feedback(ids, successes, trials, jnp.zeros(len(ids))), Choice(ids, pass_rate)
    found = metrics.selection(choice, feedback, informative, jnp.array([-1, 0, 3, 7]))
    return {name.removeprefix("select/"): float(value) for name, value in found.items()}


def test_selection_by_hand():
    """Task 0: 3 of 4 where 0.5 was believed; task 1: 0 of 2 where 0.2 was; task 2 was not
    graded.
    """
    found = selection([0.5, 0.2, 0.9], [3.0, 0.0, 0.0], [4.0, 2.0, 0.0], [1, 0, 0])
    assert found["brier"] == pytest.approx((4 * 0.25 + 2 * 0.04) / 6)
    assert found["pearson"] == pytest.approx(1.0)  # of two points
    assert found["auc"] == 1.0  # 0.25 over 0.16 and 0.09
    assert found["effective_group_ratio"] == pytest.approx(1 / 3)
    assert found["coverage"] == 0.75


def test_a_selector_without_beliefs_has_no_prediction_metrics():
    found = selection([NAN, NAN], [1.0, 4.0], [4.0, 4.0], [1, 0])
    assert all(math.isnan(found[name]) for name in ("brier", "pearson", "auc"))
    assert found["effective_group_ratio"] == 0.5


def test_domains_by_hand():
    """Of tasks 3, 0 and 1, and padding; domain z has none in the batch."""
    tasks = Tasks(domain=jnp.array([0, 1, 2, 0], jnp.int32))
    choice = Choice(jnp.array([3, 0, 1, 4]), jnp.zeros(4))
    trials = jnp.array([4.0, 2.0, 4.0, 0.0])
    feedback = Feedback(choice.ids, jnp.array([1.0, 2.0, 3.0, 0.0]), trials, jnp.zeros(4))
    informative = jnp.array([True, False, True, False])
    found = metrics.by_domain(feedback, informative, choice, tasks, ("x", "y", "z"))
    for name, x, y in (("select/effective_group_ratio", 0.5, 1.0), ("success", 0.5, 0.75)):
        values = [float(found[f"{name}/{domain}"]) for domain in ("x", "y", "z")]
        assert values[:2] == [x, y] and math.isnan(values[2])
    assert metrics.by_domain(feedback, informative, choice, tasks, ("x",)) == {}


def test_rewards_by_hand():
    """Two tasks of two samples; the second reward is missing once, and with it that sample's
    sum.
    """
    values, valid = map(
        jnp.array, helpers.masked_rewards([[[1.0, 0.5], [0.0, 0.1]], [[1.0, None], [1.0, 0.3]]])
    )
    sums = values.sum(axis=-1), valid.all(axis=-1)
    found = metrics.rewards(values, valid, ("right", "style"), *sums, jnp.array([True, False]))
    want = {
        "reward": (1.5 + 0.1 + 1.3) / 3,
        "reward_std": (1.4 / math.sqrt(2) + 0.0) / 2,  # a sample alone has no spread
        "frac_reward_zero_std": 0.5,
        "rewards/right/mean": 0.75,
        "rewards/right/std": 0.5,
        "rewards/style/mean": 0.3,
        "rewards/style/std": 0.2,
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(want)


def test_completions_by_hand():
    """Lengths 2 and 1; what stands beyond them is not looked at."""
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    drawn_from = jnp.log(jnp.array([[0.5, 0.5, 0.01], [0.8, 0.01, 0.01]]))
    logprobs = jnp.log(jnp.array([[0.25, 0.5, 0.9], [0.2, 0.9, 0.9]]))
    cut = jnp.array([True, False])
    tokens = jnp.zeros((2, 3), jnp.int32)
    rollout = Rollout(tokens, jnp.array([2, 1]), mask, logprobs, drawn_from, ~cut)
    found = metrics.completions(rollout)
    want = {"mean_length": 1.5, "min_length": 1.0, "max_length": 2.0, "clipped_ratio": 0.5}
    want = {f"completions/{name}": value for name, value in want.items()}
    ratios = {"mean": (0.5 + 1.0 + 0.25) / 3, "min": 0.25, "max": 1.0}
    want |= {f"sampling/importance_sampling_ratio/{name}": value for name, value in ratios.items()}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(want)


def test_json_has_null_for_nan_and_infinity():
    values = [
        1,
        2.5,
        "x",
        NAN,
        math.inf,
        jnp.float32(-jnp.inf),
        jnp.float32(0.5),
        jnp.int32(3),
        np.float64(NAN),
    ]
    assert [log.plain(value) for value in values] == [1, 2.5, "x", None, None, None, 0.5, 3, None]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reporter(tmp_path, *, write=True, visible=False, start=-1):
    return log.Reporter(
        tmp_path / "metrics.jsonl", Display(9, visible=visible), start=start, write=write
    )


def step(reward, zero_std=0.0):
    return {
        "reward": jnp.float32(reward),
        "frac_reward_zero_std": jnp.float32(zero_std),
        "grad_norm": jnp.float32(1.0 - zero_std),
    }


@pytest.mark.parametrize("torn", ["", '{"step": 4, "rew', "{"])
@pytest.mark.parametrize(("start", "kept"), [(2, [0, 1, 2]), (-1, [])])
def test_a_resumed_log_is_cut_back_with_its_first_write(tmp_path, torn, start, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 3)) + torn)
    before = path.read_text()
    report = reporter(tmp_path, start=start)
    report.flush()
    assert path.read_text() == before  # a mistake found before the first step changes nothing
    report.add(start + 1, step(0.5))
    report.add(start + 2, step(0.5))
    report.flush()
    assert [line["step"] for line in lines(path)] == [*kept, start + 1, start + 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


DAMAGES = {
    "bytes": b"\xff\xfe\x00",
    "a number": b"7",
    "null": b"null",
    "nothing": b"",
    "a list": b'[{"step": 1}]',
    "no step": b'{"reward": 0.5}',
    "a step that is none": b'{"step": "1"}',
    "a step between two": b'{"step": 1.5}',
    "true": b'{"step": true}',
    "a negative step": b'{"step": -1}',
    "an infinite value": b'{"step": 1, "reward": 1e999}',
    "NaN": b'{"step": 1, "reward": NaN}',
    "a huge value": b'{"step": 1, "reward": 1' + b"0" * 400 + b"}",
    "a nested value": b'{"step": 1, "reward": [0.5]}',
    "too deep": b'{"step": 1, "reward": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a line that is cut": b'{"step": 1, "rew',
    "too long": b"x" * (2 * records.MAX_LINE),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_lines_are_skipped_and_moved_to_another_file(damage, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = [
        b'{"step": 0, "eval/a/greedy": 0.5}',
        b'{"step": 1, "eval/a/greedy": 0.75}',
        b'{"step": 2, "reward": 1.0}',
    ]
    path.write_bytes(b"\n".join([good[0], damage, good[1], damage, good[2], damage]) + b"\n")
    before = path.read_bytes()
    report = reporter(tmp_path, start=2)
    assert (
        report.best("eval/a/greedy") == (0.75, 1)
        and report.evaluated(1)
        and not report.evaluated(2)
    )
    count = before.count(b"\n") - 3 if damage else 3
    assert (
        len(caplog.messages) == 1
        and (f" lines of {path} are no records: the next write moves them to") in caplog.text
    )
    assert path.read_bytes() == before  # a mistake found before the first step changes nothing
    report.add(3, step(0.5))
    report.flush()
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 3]
    kept = (tmp_path / "metrics.jsonl.damaged").read_bytes()
    assert kept.replace(b"\n", b"") == damage * 3 and kept.count(b"\n") >= count
    caplog.clear()
    assert reporter(tmp_path, start=3).damaged == [] and not caplog.messages


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "steps 1 to 4 any more"),
        ("", "steps 1 to 4 any more"),
        ('{"step": 1}\n{"step": 2}\n{"step": 3, "rew', "steps 3 to 4 any more"),
        ('{"step": 0}\n{"step": 2}\n{"step": 4}\n', "steps 1, 3 any more"),
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\nnull\n', "step 4 any more"),
    ],
)
def test_a_resumed_run_says_which_records_are_gone(content, wanted, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    report = reporter(tmp_path, start=4)
    (said,) = (message for message in caplog.messages if "has no record of" in message)
    assert wanted in said
    report.add(5, step(0.5))
    report.flush()
    assert lines(path)[-1]["step"] == 5


def test_steps_are_said_in_spans():
    assert records.spans([1, 2, 3, 5, 7, 8]) == "steps 1 to 3, 5, 7 to 8"
    assert records.spans(list(range(0, 100, 2))) == "steps 0, 2, 4, 6, 8, and others up to 98"


def test_a_fresh_run_reports_no_missing_steps(tmp_path, caplog):
    reporter(tmp_path, start=-1)
    reporter(tmp_path, start=0)
    assert not caplog.messages


def at_work(tmp_path):
    """A reporter that has written step 1, and the path of its file."""
    report = reporter(tmp_path)
    report.add(1, step(0.5))
    report.flush()
    return report, tmp_path / "metrics.jsonl"


def goes_on(report, *steps):
    for number in steps:
        report.add(number, step(0.5))
        report.flush()


REMOVALS = {
    "moved": (lambda path: path.rename(path.with_name("moved")), []),
    "removed": (lambda path: path.unlink(), []),
    "emptied": (lambda path: path.write_text(""), []),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:20]), []),
}


@pytest.mark.parametrize(("remove", "kept"), REMOVALS.values(), ids=REMOVALS)
def test_a_file_that_is_taken_away_is_begun_anew_and_it_is_said_once(
    remove, kept, tmp_path, caplog
):
    report, path = at_work(tmp_path)
    remove(path)
    goes_on(report, 2, 3)
    assert [entry["step"] for entry in records.read(path).entries] == [2, 3]
    assert len(caplog.messages) == 1 and "from outside" in caplog.messages[0]
    report.check_written()


PLACES = {
    "a folder": lambda path, _: path.mkdir(),
    "a dangling link": lambda path, other: path.symlink_to(other / "nowhere/file"),
    "a link": lambda path, other: path.symlink_to(other),
    "a link to itself": lambda path, _: path.symlink_to(path),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a full device": lambda path, _: path.symlink_to("/dev/full"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_metrics_wait_while_something_else_has_the_name_of_the_file(place, tmp_path, caplog):
    report, path = at_work(tmp_path)
    path.unlink()
    (tmp_path / "other").write_text("kept")
    place(path, tmp_path / "other")
    goes_on(report, 2, 3)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "the metrics of step 2 wait in memory, and the run continues: cannot write to"
    )
    with pytest.raises(
        InputError, match="the metrics of steps 2 to 3 are lost, since they could not be written"
    ):
        report.check_written()
    assert (tmp_path / "other").read_text() == "kept"
    path.rmdir() if path.is_dir() else path.unlink()
    goes_on(report, 4)
    report.check_written()
    assert [line["step"] for line in lines(path)] == [2, 3, 4]


def test_waiting_metrics_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "WAITING", 3)
    report, path = at_work(tmp_path)
    path.unlink()
    path.mkdir()
    goes_on(report, *range(2, 10))
    assert [entry["step"] for entry in report.unwritten] == [7, 8, 9]
    path.rmdir()
    with pytest.raises(
        InputError, match="the metrics of steps 2 to 6 are lost, since .*Is a directory"
    ):
        report.check_written()
    assert [line["step"] for line in lines(path)] == [7, 8, 9]


@pytest.mark.parametrize(
    "place", [PLACES["a folder"], PLACES["a pipe"], PLACES["a link to itself"]]
)
def test_a_path_that_is_no_file_is_reported_in_one_sentence(place, tmp_path):
    place(tmp_path / "metrics.jsonl", tmp_path)
    with pytest.raises(InputError, match="cannot read .*metrics.jsonl .*: move it away"):
        reporter(tmp_path)


def test_damaged_lines_are_written_to_no_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "metrics.jsonl.damaged").symlink_to(tmp_path / "precious")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnull\n')
    report = reporter(tmp_path, start=1)
    goes_on(report, 2)
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\nnull\n'  # nothing is dropped
    with pytest.raises(InputError, match="step 2 are lost.*it is a link"):
        report.check_written()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_picture_skips_damaged_lines(damage, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "eval/a/greedy": 0.5}\n' + damage + b"\n"
    )
    assert picture.series(picture.read(tmp_path), "eval/", "/greedy") == ([1], [0.5])
    domains = [{"step": 2, "eval/a/B/greedy": 0.25, "eval/a/greedy": 0.75}]
    assert picture.series(domains, "eval/", "/greedy") == ([2], [0.75])
    assert "that are no records" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes(damage + b"\n")
    with pytest.raises(InputError, match="holds no records of steps"):
        picture.read(tmp_path)


def test_an_evaluation_that_a_stop_left_out_joins_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "eval/held/greedy": 0.5}\n{"step": 2, "reward": 0.25}\n')
    assert reporter(tmp_path, start=1).evaluated(1)
    report = reporter(tmp_path, start=2)
    assert not report.evaluated(2)
    report.add(2, {"eval/held/greedy": 0.75})
    report.add(3, step(1.0))
    report.flush()
    assert path.read_text().splitlines()[1] == (
        '{"step": 2, "eval/held/greedy": 0.75, "reward": 0.25}'
    )
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_a_step_is_written_when_the_next_is_under_way(tmp_path):
    """In the order of steps; what is said of a step later joins its line."""
    report, path = reporter(tmp_path), tmp_path / "metrics.jsonl"
    report.flush()
    report.add(0, {"eval/held/greedy": 0.25})
    assert not path.exists()
    report.add(1, step(0.5))
    assert lines(path) == [{"step": 0, "eval/held/greedy": 0.25}]
    report.add(1, {"eval/held/greedy": NAN})
    report.flush()
    report.flush()
    report.add(2, step(1.0))
    report.flush()
    assert lines(path)[1:] == [
        {
            "step": 1,
            "eval/held/greedy": None,
            "frac_reward_zero_std": 0.0,
            "grad_norm": 1.0,
            "reward": 0.5,
        },
        {"step": 2, "frac_reward_zero_std": 0.0, "grad_norm": 1.0, "reward": 1.0},
    ]


def test_only_the_process_in_charge_writes(tmp_path):
    report = reporter(tmp_path, write=False)
    report.add(1, step(0.5))
    report.flush()
    assert not list(tmp_path.iterdir())


def test_steps_without_signal_are_said_now_and_then(tmp_path, capsys):
    report = reporter(tmp_path, visible=True)
    silent = [2, 3, *range(5, 17)]
    for number in range(1, 18):
        report.add(number, step(0.5, float(number in silent)))
    report.flush()
    said = [line for line in capsys.readouterr().out.splitlines() if "exactly zero" in line]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 5", "step 15"]
    assert "11 such steps in a row" in said[-1]


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self):
        return self.now


def printed(capsys):
    return [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_without_a_terminal_the_console_says_a_line_now_and_then(capsys):
    clock = Clock()
    with Display(30, clock=clock) as display:
        for number, clock.now in ((1, 1.0), (2, 3.0), (3, 5.9), (4, 6.0), (10, 11.0), (11, 12.0)):
            display.step(number, {"reward": 0.123456, "entropy": None, "step_time": 2.0})
        display.evaluation(10, {"eval/held/greedy": 0.5})
    assert printed(capsys) == [
        "step 1/30  reward 0.123  s/step 2",
        "step 4/30  left 0:00:43  reward 0.123  s/step 2",  # 26 steps of 5/3 seconds
        "step 10/30  left 0:00:22  reward 0.123  s/step 2",
        "evaluation at step 10:  held/greedy 0.500",
        "step 11/30  left 0:00:21  reward 0.123  s/step 2",
    ]


def test_in_a_notebook_the_console_prints_plain_lines(monkeypatch):
    """Not HTML, of which rich shows a block a line, past the stream that it was given."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    stream = io.StringIO()
    with Display(1, stream=stream) as display:
        display.say("a sentence")
    assert stream.getvalue() == "a sentence\n"


def test_without_a_terminal_the_console_says_what_happens_and_what_took_long_to_compile(capsys):
    clock = Clock()
    with Display(30, clock=clock) as display:
        display.status("loading the model")
        for done, clock.now in ((0, 1.0), (10, 2.0), (20, 8.0), (30, 9.0)):
            display.status("embedding", done, 30)
        display.compiling("decode")
        display.compiled("decode", 4.0)
        display.compiled("update_policy", 61.2)
        display.status("")
    assert printed(capsys) == [
        "loading the model ...",
        "embedding ...",
        "embedding 20/30",
        "compiled update_policy in 61 s",
    ]


METRICS = {
    "reward": 0.123456,
    "select/effective_group_ratio": 0.5625,
    "completions/mean_length": 212.3,
    "entropy": 0.412,
    "step_time": 61.5,
}


def line_of(display, width):
    display.console.width = width
    with display.console.capture() as capture:
        display.console.print(display.line())
    (line,) = capture.get().splitlines()
    assert len(line) <= width
    return line.rstrip()


def test_a_narrow_line_keeps_step_bar_and_time_left_and_drops_the_last_metrics():
    clock = Clock()
    display = Display(160, stream=io.StringIO(), clock=clock)
    for number, clock.now in ((1, 70.0), (2, 132.0), (120, 7448.0)):
        display.step(number, METRICS)
    clock.now += 20.0  # since then, of the 62 seconds of a step
    assert line_of(display, 80) == (
        f"step 120/160 {'━' * 12:16} left 0:41:00  reward 0.123  informative 0.562"
    )
    assert line_of(display, 40) == f"step 120/160 {'━' * 6:8} left 0:41:00"
    assert line_of(display, 200).endswith(
        "reward 0.123  informative 0.562  length 212  entropy 0.412  s/step 61.5  after 2:04:28"
    )


def test_status_comes_before_the_metrics_and_is_cut_to_the_width():
    clock = Clock()
    display = Display(160, stream=io.StringIO(), clock=clock)
    clock.now = 12.0
    display.status("evaluating held-out tasks", 128, 1024)
    assert line_of(display, 80).endswith(" 0:00:12  evaluating held-out tasks 128/1,024")
    display.compiling("decode")
    assert line_of(display, 80).endswith(" 0:00:12  evaluating held-out tasks: compiling decode")
    assert line_of(display, 76).endswith(" 0:00:12  evaluating held-out tasks: compiling ...")
    display.compiled("decode", 30.0)
    display.status("")
    display.step(1, METRICS)
    assert line_of(display, 70).endswith(" 0:00:12  reward 0.123  informative 0.562")


@pytest.fixture
def terminal(monkeypatch):
    """(stream of a terminal of 80 columns, function that closes it and reads what it was given)."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    master, slave = os.openpty()
    stream = open(slave, "w", encoding="utf-8")

    def read():
        stream.close()
        parts = []
        with contextlib.suppress(OSError):  # the end, as Linux has it
            while part := os.read(master, 4096):
                parts.append(part)
        return b"".join(parts).decode()

    yield stream, read
    stream.close()
    os.close(master)


def test_on_a_terminal_messages_and_warnings_stand_above_the_line(terminal, monkeypatch):
    stream, read = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with Display(30, stream=stream) as display:
            display.step(1, METRICS)
            display.say("above")
            logging.getLogger().warning("also above")
        assert handler.stream is stream
    finally:
        logging.getLogger().removeHandler(handler)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read()).replace("\r", "\n").split("\n")
    shown = [line.rstrip() for line in shown if line.strip()]
    assert "above" in shown and "also above" in shown
    assert shown[-1].startswith("step 1/30 ╸━") and shown[-1].endswith("length 212")


def test_no_bar_moves_where_colors_are_forced(capsys, monkeypatch):
    """As in the cells of a notebook."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(30) as display:
        display.step(1, {"reward": 0.5})
    assert capsys.readouterr().out.splitlines() == ["step 1/30  reward 0.5"]


def test_completions_are_shown_as_they_are(capsys):
    """Brackets are no markup, and long ones lose their middle."""
    display = Display(3)
    long = "a" * 200 + "middle" + "z" * 200
    display.completions(1, [Sample("say [bold]hi[/bold]", long, 0.5)])
    shown = capsys.readouterr().out
    assert "[bold]hi[/bold]" in shown and "0.5" in shown
    assert "middle" not in shown and "..." in shown


def test_a_sample_is_a_block_with_the_end_of_its_prompt_its_answer_and_its_reward(capsys):
    prompt = "Natalia sold clips. " * 40 + "How many in all?"
    completion = "48 / 2 = 24.\n48 + 24 = 72.\n#### 72"
    Display(3).completions(10, [Sample(prompt, completion, 1.0, "72"), Sample("b", "c", None)])
    shown = printed(capsys)
    assert max(map(len, shown)) <= 80
    first, second = shown.index("step 10, sample 1 of 2"), shown.index("step 10, sample 2 of 2")
    block = shown[first + 1 : second]
    assert block[0].startswith("prompt      ... ")
    assert [line[:12].strip() for line in block if line[:12].strip()] == [
        "prompt",
        "completion",
        "answer",
        "reward",
    ]
    assert " ".join(line[12:] for line in block).count("Natalia") < 16
    assert block[-6].endswith("How many in all?")
    assert block[-5:] == [
        "completion  48 / 2 = 24.",
        "            48 + 24 = 72.",
        "            #### 72",
        "answer      72",
        "reward      1",
    ]
    assert shown[second + 1 :] == ["prompt      b", "completion  c", "reward      none"]


def test_an_invisible_display_prints_nothing(capsys):
    with Display(3, visible=False) as display:
        display.say("hello")
        display.step(1, {"reward": 1.0})
        display.completions(1, [Sample("a", "b", 1.0)])
    assert capsys.readouterr().out == ""
