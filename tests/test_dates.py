"""The date that chat templates write is the same on every day of a run, and of a command that makes
files.
"""

import datetime
import json
import os
import shutil
import signal
import types

import helpers
import pytest

from jaxrft.config import TasksConfig
from jaxrft.dry_run import show
from jaxrft.prepare import embeddings, pass_rates
from jaxrft.prepare.journal import Journal
from jaxrft.train import resume
from jaxrft.train.loop import train
from jaxrft.train.resume import template_date_of_run, with_template_date
from jaxrft.types import InputError

CLOCK = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def day(monkeypatch):
    """(ISO date) makes it that day."""

    def make(text):
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(text)

        monkeypatch.setattr(resume, "datetime", types.SimpleNamespace(date=Day))

    return make


@pytest.fixture
def configured(world, configure, tmp_path):
    """(**changes) -> the config of a run whose template writes the date."""
    shutil.copytree(world / "policy", tmp_path / "policy")
    (tmp_path / "policy/chat_template.jinja").write_text(CLOCK)
    rows = [
        row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
        for row in helpers.task_rows()
    ]
    source = TasksConfig(
        helpers.write_rows(tmp_path / "tasks.jsonl", rows), pass_rate_columns=("weak", "strong")
    )
    settings = {"model": str(tmp_path / "policy"), "tasks": source, "reward_completions": "text"}
    return lambda **changes: configure(**{"output_dir": tmp_path / "run"} | settings | changes)


def begun_run(folder, records):
    """A run's folder with a checkpoint of step 3."""
    (folder / "checkpoints/3").mkdir(parents=True)
    (folder / "config.json").write_text(records)
    return folder


def test_the_date_is_that_of_the_config_the_work_in_hand_the_run_or_today(configure, day, tmp_path):
    day("2031-02-05")
    fresh = configure(tmp_path / "fresh")
    run = configure(begun_run(tmp_path / "run", '{"chat_template_date": "2031-02-03"}'))
    assert with_template_date(fresh).chat_template_date == "2031-02-05"
    assert with_template_date(run).chat_template_date == "2031-02-03"
    assert with_template_date(run, lambda: "2031-02-01").chat_template_date == "2031-02-01"
    named = configure(tmp_path / "run", chat_template_date="2030-01-01")
    assert with_template_date(named, lambda: "2031-02-01") == named


@pytest.mark.parametrize(
    "records", ["", "null", "[1]", '{"chat_template_date": 5}', '{"chat_template_date": "soon"}']
)
def test_a_run_whose_records_are_damaged_gets_todays_date_and_it_is_said(
    configure, day, tmp_path, caplog, records
):
    day("2031-02-05")
    assert template_date_of_run(begun_run(tmp_path / "run", records)) == "2031-02-05"
    assert "the first day of the run" in caplog.text and "set chat_template_date" in caplog.text


def test_records_of_a_run_before_there_were_dates_are_no_fault(day, tmp_path, caplog):
    day("2031-02-05")
    assert (
        template_date_of_run(begun_run(tmp_path / "run", "{}")) == "2031-02-05" and not caplog.text
    )


@pytest.mark.slow
def test_a_run_goes_on_a_day_later_with_the_prompts_of_its_first_day(
    configured, day, tmp_path, capsys
):
    day("2031-02-03")
    train(configured(steps=1, save_steps=1))
    day("2031-02-04")
    state = train(configured(steps=2, save_steps=1))
    assert int(state.step) == 2
    assert (
        json.loads((tmp_path / "run/config.json").read_text())["chat_template_date"] == "2031-02-03"
    )
    capsys.readouterr()
    show(configured(steps=2))
    assert "\n    030+0=\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="of another run: its digest of the tasks"):
        train(configured(steps=3, chat_template_date="2031-02-04"))


def test_a_command_that_makes_a_file_goes_on_a_day_later(configured, day, monkeypatch, tmp_path):
    out, add = tmp_path / "e.safetensors", Journal.add

    def add_and_stop(self, number, result):
        add(self, number, result)
        os.kill(os.getpid(), signal.SIGTERM)

    config = configured(output_dir=str(tmp_path / "none"), batch_size=4)
    day("2031-02-03")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        assert not embeddings.run(embeddings.Options(config, str(out)))
    day("2031-02-04")
    assert pass_rates.date_of_journals([tmp_path / "other", out]) == "2031-02-03"
    dated = configured(
        output_dir=str(tmp_path / "none"), batch_size=4, chat_template_date="2031-02-04"
    )
    with pytest.raises(
        InputError,
        match="its chat_template_date is '2031-02-03', that of this command is '2031-02-04'",
    ):
        embeddings.run(embeddings.Options(dated, str(out)))
    assert embeddings.run(embeddings.Options(config, str(out)))
