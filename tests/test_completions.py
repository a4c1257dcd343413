"""Completions and choices in a run's folder, and that a resumed run has each once."""

import json
import logging
import math
import shutil

import graders
import helpers
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxrft.report import completions, metrics, selection
from jaxrft.report.completions import CompletionsLog, Rows
from jaxrft.report.selection import Chosen, SelectionLog
from jaxrft.train.loop import train


def rows(text="1", prompt="0+0="):
    """Two samples of one task: the second reward does not apply to the second."""
    return Rows(
        prompts=[prompt] * 2,
        completions=[text, "2"],
        task_ids=[3, 3],
        domains=["sums"] * 2,
        rewards=np.array([[1, 0.5], [0, 0]], np.float32),
        valid=np.array([[True, True], [True, False]]),
        success=np.array([1, np.nan], np.float32),
        advantages=np.array([1, -1], np.float32),
    )


def test_a_file_has_prompts_rewards_by_name_advantages_step_and_task(tmp_path):
    CompletionsLog(tmp_path).write(10, [rows()], ("exact", "style"))
    (path,) = completions.saved(tmp_path)
    assert path.name == "step-00000010.0.parquet" and completions.step_of(path) == 10
    assert pq.read_table(path).to_pylist() == [
        {"step": 10, "task_id": 3, "domain": "sums", "prompt": "0+0=", "completion": "1"}
        | {"success": 1.0, "advantage": 1.0, "rewards/exact": 1.0, "rewards/style": 0.5},
        {"step": 10, "task_id": 3, "domain": "sums", "prompt": "0+0=", "completion": "2"}
        | {"success": None, "advantage": -1.0, "rewards/exact": 0.0, "rewards/style": None},
    ]


def test_messages_and_halves_of_characters_are_text(tmp_path):
    prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "0+0="}]
    CompletionsLog(tmp_path).write(1, [rows(text="\ud83d", prompt=prompt)], ("exact", "style"))
    (first, _) = pq.read_table(completions.saved(tmp_path)[0]).to_pylist()
    assert (first["prompt"], first["completion"]) == ("system: Add.\n\nuser: 0+0=", "?")


def test_a_repeated_step_replaces_its_file_and_later_ones_are_removed(tmp_path):
    log = CompletionsLog(tmp_path)
    for step in (2, 4, 6):
        log.write(step, [rows(), rows()], ("exact", "style"))
    (tmp_path / "completions" / "notes.txt").write_text("mine")
    log.remove_after(3)
    log.write(4, [rows()], ("exact", "style"))
    steps = [pq.read_table(path)["step"].to_pylist() for path in completions.saved(tmp_path)]
    assert steps == [[2] * 4, [4] * 2]
    assert (tmp_path / "completions" / "notes.txt").exists()


def test_completions_that_cannot_be_written_warn_once(tmp_path, caplog):
    (tmp_path / "completions").write_text("in the way")
    log = CompletionsLog(tmp_path)
    for step in (1, 2):
        log.write(step, [rows()], ("exact", "style"))
    (message,) = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert message.startswith("the completions of step 1 are not saved, and the run goes on: ")


def test_choices_without_beliefs_are_counted_as_unknown():
    """As those of `uniform` are."""
    unknown = np.full(3, np.nan, np.float32)
    counts = np.ones(3, np.float32)
    entry = selection.record(1, Chosen(unknown, counts, counts, np.zeros(3, np.int32)), ("sums",))
    assert entry["unknown"] == 3 and sum(entry["groups"]) == 0


def test_the_choices_of_a_step_by_hand():
    """Beliefs 0.52 and 0.54 share the bin from 0.5 to 0.55, 1 is in the last one."""
    chosen = Chosen(
        pass_rate=np.array([0.52, 0.54, 1.0, np.nan], np.float32),
        successes=np.array([1, 3, 4, 2], np.float32),
        trials=np.array([4, 4, 4, 4], np.float32),
        domain=np.array([0, 1, 1, 1], np.int32),
    )
    entry = selection.record(7, chosen, ("sums", "products"))
    assert [entry["groups"][10], entry["groups"][19], sum(entry["groups"])] == [2, 1, 3]
    assert entry["believed"][10] == pytest.approx(4 * 0.52 + 4 * 0.54)
    assert (entry["successes"][10], entry["trials"][10], sum(entry["trials"])) == (4, 8, 12)
    assert (entry["unknown"], entry["domains"]) == (1, {"sums": 1, "products": 3})


def test_beliefs_are_counted_in_bins_by_hand():
    """0.05 begins the second bin, 1 is in the last one, and an unknown one is not counted."""
    counts = metrics.histogram(jnp.array([0.0, 0.049, 0.05, 0.5, 1.0, math.nan]))
    assert {bin: int(n) for bin, n in enumerate(counts) if n} == {0: 2, 1: 1, 10: 1, 19: 1}


def entry_of(step):
    return selection.record(step, Chosen(*np.zeros((4, 1))), ("sums",)) | {"belief": [0] * 20}


def test_choices_are_cut_back_to_the_step_a_run_resumes_from(tmp_path):
    first = SelectionLog(tmp_path, 0)
    for step in range(1, 6):
        first.write(entry_of(step))
    with (tmp_path / selection.FILE).open("a") as file:
        file.write('{"step": 2}\nnonsense\n')
    second = SelectionLog(tmp_path, 3)
    second.write(entry_of(4))
    assert [each["step"] for each in selection.read(tmp_path / selection.FILE)] == [1, 2, 3, 4]
    assert selection.read(tmp_path / "none") == []


def test_choices_that_cannot_be_written_warn_once(tmp_path, caplog):
    (tmp_path / selection.FILE).mkdir()
    log = SelectionLog(tmp_path, 0)
    log.write(entry_of(1))
    log.write(entry_of(2))
    (message,) = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert message.startswith("step 1 is missing in ")


@pytest.mark.parametrize(("steps", "drawn"), [(3, 3), (200, 200), (1000, 201)])
def test_the_belief_over_the_table_is_kept_in_a_limited_number_of_steps(steps, drawn):
    assert sum(selection.is_drawn(step, steps) for step in range(1, steps + 1)) == drawn


@pytest.mark.slow
def test_a_resumed_run_has_each_completion_and_choice_once(configure, tmp_path):
    config = configure(tmp_path, steps=3, save_steps=2, log_completions_steps=1)
    train(config, reward={"graders:starts": graders.starts})
    whole = helpers.contents(tmp_path / "completions")
    choices = (tmp_path / selection.FILE).read_bytes()
    stop_after(tmp_path, 2)
    train(config, reward={"graders:starts": graders.starts})
    assert helpers.contents(tmp_path / "completions") == whole
    assert (tmp_path / selection.FILE).read_bytes() == choices
    lines = [json.loads(line) for line in choices.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(sum(line["groups"]) == 8 and sum(line["belief"]) == 16 for line in lines)
    (table,) = [pq.read_table(path) for path in completions.saved(tmp_path)[1:2]]
    samples = table.to_pylist()
    assert len(samples) == 8 * 4
    reward = math.fsum(row["rewards/graders:starts"] for row in samples) / len(samples)
    assert reward == pytest.approx(helpers.metrics(tmp_path)[1]["reward"])
    assert math.fsum(row["advantage"] for row in samples) == pytest.approx(0, abs=1e-4)
    assert all(row["success"] == row["rewards/graders:starts"] for row in samples)


def stop_after(folder, step):
    """Makes a run look as if it had been killed after `step`, whose checkpoint it has."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "policy")
