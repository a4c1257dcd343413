"""A run that was stopped, in whatever way, ends bit for bit as one that was not."""

import os
import signal

import helpers
import pytest

from jaxrft.config import EvalConfig, MeshConfig, TasksConfig
from jaxrft.host.stopping import stop_signals
from jaxrft.train import loop
from jaxrft.train.loop import save_checkpoint, train
from jaxrft.types import InputError

HARD = {  # every random stream, a reference policy, several updates a step
    "mini_batch_size": 4,
    "micro_batch_size": 8,
    "num_iterations": 2,
    "kl_coef": 0.05,
    "top_k": 9,
    "warmup_steps": 5,
    "learning_rate_schedule": "cosine",
    "min_learning_rate_ratio": 0.1,
    "eval_steps": 2,
    # half of the prompts wait, and rows move while others are decoded
    "batch_size": 16,
    "max_completion_length": 80,
    "max_concurrent_rows": 32,
}


def stop(config, folder, **environment):
    path = helpers.write_config(folder / "config.py", config)
    return helpers.jaxrft("train", path, LOG=f"{config.output_dir}/metrics.jsonl", **environment)


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(configure, world, tmp_path):
    held_out = TasksConfig(str(world / "tasks.jsonl"), name="held_out", limit=8)
    hard = HARD | {
        "evaluation": EvalConfig((held_out,), num_samples=0),
        "keep_best": "held_out/greedy",
    }
    whole, killed = configure(tmp_path / "whole", **hard), configure(tmp_path / "killed", **hard)
    state = train(whole)
    # evaluation and four steps: it is in step 6
    code, _, errors = stop(killed, tmp_path, SEND="SIGKILL", LINES=5)
    assert code == -9, errors
    assert helpers.checkpoints(killed.output_dir) == [3]
    assert [line["step"] for line in helpers.metrics(killed.output_dir)] == [0, 1, 2, 3, 4]
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # as a kill in the middle of a write leaves it
    helpers.assert_same_bits(train(killed), state)
    assert helpers.metrics(killed.output_dir) == helpers.metrics(whole.output_dir)
    lines = helpers.metrics(killed.output_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert ["eval/held_out/greedy" in line for line in lines] == [True, False] * 3 + [True]
    assert (tmp_path / "killed/policy/model.safetensors").is_file()
    best, kept, last = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("whole/best", "killed/best", "whole/policy")
    )
    scores = [line["eval/held_out/greedy"] for line in lines if "eval/held_out/greedy" in line]
    # of equal ones the first is kept
    assert best == kept and (best == last) == (scores[-1] > max(scores[1:-1]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines", "step"), [("SIGTERM", 2, 3), ("SIGHUP", 6, 6)])
def test_signal_saves_after_the_step_and_the_run_resumes(
    configure, world, whole, tmp_path, name, lines, step
):
    """Evaluation and one step are written: it is in step 3; five steps are: it is in the evaluation
    after the last.
    """
    folder, state = whole
    # two batches
    held_out = EvalConfig(
        (TasksConfig(str(world / "tasks.jsonl"), name="held_out"),), num_samples=0
    )
    config = configure(tmp_path / "run", save_steps=100, eval_steps=3, evaluation=held_out)
    code, said, errors = stop(config, tmp_path, SEND=name, LINES=lines)
    assert code == 143, errors
    assert (
        f"stopped by a signal after step {step}; checkpoint {step} is saved. Run" in said
        and not (tmp_path / "run/policy").exists()
    )
    assert helpers.checkpoints(config.output_dir) == [step]
    evaluated = [
        line["step"]
        for line in helpers.metrics(config.output_dir)
        if "eval/held_out/greedy" in line
    ]
    # the one due after the step would have kept the process from leaving
    assert evaluated == [0, 3][: step // 3]
    helpers.assert_same_bits(train(config), state)
    assert (tmp_path / "run/policy").exists()
    first, *rest = helpers.metrics(config.output_dir)
    evaluated = [
        line["step"] for line in rest if line.pop("eval/held_out/greedy", None) is not None
    ]
    assert [first["step"], *evaluated] == [0, 3, 6]
    assert rest == helpers.metrics(folder)


@pytest.mark.slow
def test_checkpoints_and_policy_do_not_depend_on_the_metrics(
    configure, whole, tmp_path, monkeypatch
):
    run, save = tmp_path / "run", save_checkpoint

    def disturbed(*arguments, **options):
        if not (run / "metrics.jsonl").is_dir():
            (run / "metrics.jsonl").rename(run / "moved")
            (run / "metrics.jsonl").mkdir()
        save(*arguments, **options)

    monkeypatch.setattr(loop, "save_checkpoint", disturbed)
    with pytest.raises(
        InputError,
        match="the metrics of steps 3 to 6 are lost, since they could not be written: .*",
    ):
        train(configure(run))
    assert helpers.checkpoints(run) == [3, 6]
    policies = [(folder / "policy/model.safetensors").read_bytes() for folder in (run, whole[0])]
    assert policies[0] == policies[1]


@pytest.mark.slow
def test_run_survives_broken_output_streams(configure, whole, tmp_path):
    """Its own output, that of its rewards, and whatever a console of another encoding lacks."""
    config = configure(tmp_path / "run", rewards=("graders:chatty",), log_completions_steps=1)
    path = helpers.write_config(tmp_path / "config.py", config)
    with open("/dev/full", "w") as full:
        where = {"stdout": full, "stderr": full, "PYTHONIOENCODING": "latin-1"}
        process = helpers.start("-m", "jaxrft", "train", path, **where)
        assert process.wait(timeout=helpers.TIMEOUT) == 0
    lines, wanted = helpers.metrics(config.output_dir), helpers.metrics(whole[0])
    assert [line["reward"] for line in lines] == [line["reward"] for line in wanted]


def test_nohup_ignores_sighup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopped()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_finished_run_does_nothing(configure, whole, capsys):
    folder, state = whole
    before = helpers.contents(folder / "checkpoints") | {0: (folder / "metrics.jsonl").read_bytes()}
    helpers.assert_same_bits(train(configure(folder)), state)
    assert (
        helpers.contents(folder / "checkpoints") | {0: (folder / "metrics.jsonl").read_bytes()}
        == before
    )
    assert "resuming after step 6" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=4, model=2)]
)
def test_checkpoint_loads_on_another_mesh(configure, whole, mesh):
    folder, state = whole
    restored = train(configure(folder, mesh=mesh))
    helpers.assert_same_bits(restored, state)
    assert restored.params["gate"].sharding.mesh.shape == {
        "data": mesh.data,
        "fsdp": mesh.fsdp,
        "model": mesh.model,
    }
