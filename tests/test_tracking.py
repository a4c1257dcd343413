"""Tracking: what trackers get, and that no tracker ends or delays a run."""

import json
import logging
import sys
import threading
import types

import pytest

from jaxrft.report import tracking
from jaxrft.report.console import Display
from jaxrft.report.log import Reporter
from jaxrft.report.tracking import Tracking
from jaxrft.train.loop import train
from jaxrft.types import InputError


class Recorder:
    """Keeps what it is told; one for each tracked run."""

    runs = {}

    def __init__(self, folder, config, run_id, start=-1):
        self.rows = self.runs.setdefault(run_id, [])

    def log(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self, step, error):
        self.rows.append((step, error))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(tracking, "PACKAGES", dict.fromkeys(tracking.PACKAGES, "json"))
    monkeypatch.setattr(Recorder, "runs", {})
    monkeypatch.setattr(tracking, "Trackio", Recorder)
    return Recorder


def report(tracked, folder, start, entries):
    """Reports entries to a metrics.jsonl and to trackers, as a run does."""
    tracked.open(start)
    display = Display(9, visible=False)
    reporter = Reporter(folder / "metrics.jsonl", display, start=start, track=tracked.log)
    for step, entry in entries:
        reporter.add(step, entry)
    reporter.flush()


def tracked_run(configure, folder, start=-1, entries=(), **changes):
    folder.mkdir(exist_ok=True)
    with Tracking(configure(folder, **{"report_to": ("trackio",)} | changes), folder) as tracked:
        report(tracked, folder, start, entries)


def test_trackers_get_the_numbers_of_metrics_jsonl_under_its_names(recorder, configure, tmp_path):
    entry = {"eval/digits/avg@8": 0.5, "select/auc": float("nan"), "rollouts": 32, "note": "text"}
    tracked_run(configure, tmp_path, entries=[(1, entry)])
    ((step, numbers), end) = next(iter(recorder.runs.values()))
    assert (step, numbers) == (1, {"eval/digits/avg@8": 0.5, "rollouts": 32})
    assert end == (1, "")


class FakeTrackio(types.ModuleType):
    """Keeps rows by the name of a run, as trackio does."""

    def __init__(self):
        super().__init__("trackio")
        self.rows = {}

    def init(self, *, name, resume, **_):
        assert resume == "allow"
        rows = self.rows.setdefault(name, [])
        return types.SimpleNamespace(
            log=lambda metrics, step: rows.append(step),
            finish=lambda: None,
            _next_step=max(rows, default=-1) + 1,
        )


def test_a_resumed_run_continues_the_tracked_run_without_repeated_steps(
    configure, tmp_path, monkeypatch
):
    trackio = FakeTrackio()
    monkeypatch.setattr(tracking, "PACKAGES", dict.fromkeys(tracking.PACKAGES, "json"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    steps = [(step, {"x": float(step)}) for step in range(1, 7)]
    tracked_run(configure, tmp_path / "run", entries=steps[:5])
    tracked_run(configure, tmp_path / "run", start=3, entries=steps[2:])  # 3 is evaluated again
    ids = json.loads((tmp_path / "run/tracking.json").read_text())
    assert trackio.rows == {f"run-{ids['trackio']}": [1, 2, 3, 4, 5, 3, 6]}


def test_a_run_that_starts_anew_is_another_tracked_run(recorder, configure, tmp_path):
    tracked_run(configure, tmp_path, entries=[(1, {"x": 1.0})])
    tracked_run(configure, tmp_path, entries=[(1, {"x": 2.0})])
    assert [rows[0][1]["x"] for rows in recorder.runs.values()] == [1.0, 2.0]


@pytest.mark.parametrize("error", [InputError("no room: make some"), ZeroDivisionError("by 0")])
def test_the_sentence_of_a_failed_run_reaches_the_tracker(recorder, configure, tmp_path, error):
    with (
        pytest.raises(type(error)),
        Tracking(configure(tmp_path, report_to=("trackio",)), tmp_path) as tracked,
    ):
        report(tracked, tmp_path, -1, [(1, {"x": 1.0})])
        raise error
    (rows,) = recorder.runs.values()
    assert rows[-1] == (1, {InputError: str(error)}.get(type(error), "ZeroDivisionError: by 0"))


def test_a_failing_tracker_warns_once_and_others_get_everything(
    recorder, configure, tmp_path, caplog, monkeypatch
):
    class Broken(Recorder):
        def log(self, step, metrics):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "Wandb", Broken)
    entries = [(step, {"x": float(step)}) for step in (1, 2, 3)]
    tracked_run(configure, tmp_path, entries=entries, report_to=("wandb", "trackio"))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "wandb does not get all metrics, and the run goes on: OSError: [Errno 28] No space left on "
        "device"
    ]
    assert [[step for step, _ in rows] for rows in recorder.runs.values()] == [[3], [1, 2, 3, 3]]


def test_a_tracker_that_hangs_does_not_delay_the_run(
    recorder, configure, tmp_path, caplog, monkeypatch
):
    released = threading.Event()
    monkeypatch.setattr(tracking, "WAITING", 2)
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    monkeypatch.setattr(tracking, "Trackio", lambda *_: released.wait())
    tracked_run(configure, tmp_path, entries=[(step, {"x": 0.0}) for step in range(1, 9)])
    released.set()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "trackio does not get all metrics, and the run goes on: it is 2 entries behind"
    ]


def test_a_missing_package_is_one_sentence_before_the_run(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "PACKAGES", {"wandb": "wandb_is_missing"})
    wanted = r"^report_to names wandb, .*: pip install .*\[wandb\].*, or leave it out"
    with pytest.raises(InputError, match=wanted):
        train(configure(tmp_path / "run", report_to=("wandb",)))
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_tracks(recorder, configure, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "jax", types.SimpleNamespace(process_index=lambda: 1))
    tracked_run(configure, tmp_path, entries=[(1, {"x": 1.0})])
    assert recorder.runs == {} and not (tmp_path / "tracking.json").exists()


def test_a_run_without_trackers_leaves_no_file(configure, tmp_path):
    tracked_run(configure, tmp_path, report_to=())
    assert not (tmp_path / "tracking.json").exists()


def test_tensorboard_has_each_step_once_under_its_name(configure, tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(tmp_path / "tensorboard"))
    name = "eval/digits/avg@8"
    steps = [(step, {name: float(step)}) for step in range(1, 7)]
    tracked_run(configure, tmp_path, entries=steps[:5], report_to=("tensorboard",))
    tracked_run(configure, tmp_path, start=3, entries=steps[3:], report_to=("tensorboard",))
    accumulator.Reload()
    assert [(x.step, x.value) for x in accumulator.Scalars(name)] == [
        (step, float(step)) for step in range(1, 7)
    ]
