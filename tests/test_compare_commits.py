"""The comparison of two commits, without running any."""

import json

import pytest

from benchmarks import compare_commits
from benchmarks.compare_commits import Run, compare


def run(metrics, tasks=None, policy="a"):
    return Run(metrics, tasks or {}, policy)


def test_equal_runs_have_no_difference():
    entry = {"reward": 0.5, "select/auc": None, "kept": "text"}
    found = compare(run({"1": entry, "2": entry}), run({"1": dict(entry), "2": dict(entry)}))
    assert (found.steps, found.equal_steps, found.equal_policy) == (2, 2, True)
    assert (found.at_step_1, found.at_any_step, found.metric_at_any_step) == (0.0, 0.0, "")


def test_largest_relative_difference_is_named():
    base = run(
        {"1": {"reward": 1.0, "kl": 0.0}, "2": {"reward": 1.0, "kl": 4e-7}}, {"1": "x", "2": "y"}
    )
    current = run(
        {"1": {"reward": 0.9, "kl": 5e-8}, "2": {"reward": 1.0, "kl": 0.0}},
        {"1": "x", "2": "z"},
        "b",
    )
    found = compare(base, current)
    # |0.9 - 1| / 1 = 0.1 at step 1; |0 - 4e-7| / 1e-6 = 0.4 at step 2, numbers below 1e-6 being
    # relative to it.
    assert (found.at_step_1, found.metric_at_step_1) == (pytest.approx(0.1), "reward")
    assert (found.at_any_step, found.metric_at_any_step) == (pytest.approx(0.4), "kl")
    assert (found.equal_steps, found.equal_tasks, found.equal_policy) == (0, 1, False)


def test_a_number_in_place_of_null_is_an_infinite_difference():
    found = compare(run({"1": {"select/auc": None}}), run({"1": {"select/auc": 0.5}}))
    assert (found.at_step_1, found.metric_at_step_1) == (float("inf"), "select/auc")


def test_renamed_metrics_are_compared_and_others_are_listed(monkeypatch):
    monkeypatch.setitem(compare_commits.RENAMED_METRICS, "old", "new")
    found = compare(run({"1": {"old": 1.0, "gone": 1.0}}), run({"1": {"new": 1.0, "added": 1.0}}))
    assert (found.at_any_step, found.only_in_base, found.only_in_current) == (
        0.0,
        ("gone",),
        ("added",),
    )


def test_recorded_tasks_do_not_depend_on_the_order_of_workers(tmp_path, monkeypatch):
    digests = []
    for prompts in (["a", "b"], ["b", "a"], ["a", "a"]):
        path = tmp_path / prompts[0] / prompts[1]
        path.parent.mkdir(exist_ok=True)
        monkeypatch.setenv(compare_commits.RECORD, str(path))
        for prompt in prompts:
            assert compare_commits.record_tasks([prompt], ["text"]) == [None]
        digests.append(compare_commits.read_tasks(path)["0"])
    assert digests[0] == digests[1] != digests[2]


def test_times_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entry = {
        "step": 1,
        "reward": 0.5,
        "timing/select": 1.0,
        "select/seconds": 1.0,
        "step_time": 2.0,
    }
    path.write_text(json.dumps(entry) + "\n")
    assert compare_commits.read_metrics(path) == {"1": {"reward": 0.5}}
