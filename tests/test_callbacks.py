"""Ends of a run before its last step: callbacks after each step, and evaluations that stagnate."""

import helpers
import jax
import pytest

from jaxrft import config as configs
from jaxrft.config import EvalConfig, TasksConfig
from jaxrft.train import StopTraining, loop, train
from jaxrft.types import InputError


def held_out(world, **changes):
    tasks = TasksConfig(str(world / "tasks.jsonl"), name="held_out", limit=8)
    evaluation = EvalConfig((tasks,), num_samples=0)
    return {"evaluation": evaluation, "eval_steps": 1} | changes


def test_callback_gets_each_step_with_its_line_of_metrics(configure, world, tmp_path):
    calls = []

    def on_step(step, metrics):
        assert helpers.metrics(tmp_path / "run")[-1]["step"] == step
        assert not list((tmp_path / "run").glob("checkpoints/*"))
        calls.append((step, metrics))

    config = configure(tmp_path / "run", steps=2, **held_out(world, eval_steps=2))
    train(config, on_step=on_step)
    _, *lines = helpers.metrics(tmp_path / "run")
    assert [step for step, _ in calls] == [1, 2]
    for (step, metrics), line in zip(calls, lines, strict=True):
        assert {"step": step} | {name: metrics[name] for name in line if name != "step"} == line
    assert "eval/held_out/greedy" in calls[1][1] and "eval/held_out/greedy" not in calls[0][1]


@pytest.mark.slow
def test_error_of_a_callback_is_raised_after_the_state_is_saved_and_the_run_resumes(
    configure, whole, tmp_path, capsys
):
    def fails(step, _):
        if step == 2:
            raise ZeroDivisionError("mine")

    config = configure(tmp_path / "run", save_steps=100)
    with pytest.raises(ZeroDivisionError, match="mine"):
        train(config, on_step=fails)
    said = capsys.readouterr().out
    assert "stopped by on_step (ZeroDivisionError('mine')) after step 2; checkpoint 2 is s" in said
    assert helpers.checkpoints(tmp_path / "run") == [2]
    assert not (tmp_path / "run/policy").exists()
    folder, state = whole
    helpers.assert_same_bits(train(config), state)
    assert helpers.metrics(tmp_path / "run") == helpers.metrics(folder)


def test_callback_ends_the_run_as_its_last_step_does(configure, tmp_path, capsys):
    def enough(step, metrics):
        if step == 2:
            raise StopTraining("enough")

    state = train(configure(tmp_path / "run"), on_step=enough)
    assert int(state.step) == 2 and helpers.checkpoints(tmp_path / "run") == [2]
    assert (tmp_path / "run/policy/model.safetensors").is_file()
    assert "on_step ends the run after step 2: enough" in capsys.readouterr().out


@pytest.fixture
def stagnating(monkeypatch):
    """Evaluations that improve at step 1 only."""

    def compile_evaluation(*_, **__):
        def evaluate(params, step, *_):
            jax.block_until_ready(params)
            return {"eval/held_out/greedy": 0.5 if step == 1 else 0.25}

        return evaluate

    monkeypatch.setattr(loop, "compile_evaluation", compile_evaluation)


@pytest.mark.slow
def test_run_ends_when_its_evaluations_stagnate(configure, world, tmp_path, capsys, stagnating):
    changes = held_out(world, keep_best="held_out/greedy", early_stopping_patience=2)
    config = configure(tmp_path / "run", **changes)
    assert int(train(config).step) == 3
    sentence = (
        "held_out/greedy has not improved in 2 evaluations since step 1: the run ends after step 3"
    )
    assert sentence in capsys.readouterr().out.splitlines()
    assert (tmp_path / "run/policy").is_dir() and helpers.checkpoints(tmp_path / "run") == [3]
    # the same command finds it complete, and more patience resumes it
    assert int(train(config).step) == 3
    assert sentence in capsys.readouterr().out.splitlines()
    patient = configure(tmp_path / "run", **changes | {"early_stopping_patience": 4})
    assert int(train(patient).step) == 5


def test_patience_without_a_metric_is_refused():
    with pytest.raises(InputError, match="patience is 3: it must be 0 while keep_best is None"):
        configs.Config("m", TasksConfig(), "r", early_stopping_patience=3)
