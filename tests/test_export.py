"""The policies of checkpoints: exported as at the end of a run, evaluated as by the run."""

import json
import shutil

import helpers
import pytest

from jaxrft import cli
from jaxrft import config as configs
from jaxrft.config import EvalConfig, TasksConfig
from jaxrft.lm import hub
from jaxrft.train import export
from jaxrft.train.evaluate import evaluate_policy
from jaxrft.train.loop import train
from jaxrft.types import InputError


@pytest.fixture(scope="module")
def evaluated(configure, world, tmp_path_factory):
    """(config, what was said) of two steps, each with an evaluation and a checkpoint; leave the
    folder as it is.
    """
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    held_out = TasksConfig(str(world / "tasks.jsonl"), name="held_out")
    config = configure(
        folder,
        steps=2,
        eval_steps=1,
        save_steps=1,
        evaluation=EvalConfig((held_out,), num_samples=2),
        keep_best="held_out/avg@2",
    )
    train(config)
    return config


def figures(config):
    """The figures of the run's own evaluations, by step."""
    return [
        {name: value for name, value in line.items() if name.startswith("eval/")}
        for line in helpers.metrics(config.output_dir)
    ]


def test_exported_checkpoint_is_the_folder_that_the_end_of_the_run_writes(
    evaluated, tmp_path, capsys
):
    assert cli.main(["export", evaluated.output_dir, "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"the policy of step 2 is in {tmp_path / 'new'}\n"
    files = {path.name: data for path, data in helpers.contents(tmp_path / "new").items()}
    policy = f"{evaluated.output_dir}/policy"
    assert files == {path.name: data for path, data in helpers.contents(policy).items()}


def test_step_chooses_the_checkpoint_and_names_the_folder(evaluated, tmp_path):
    run = shutil.copytree(evaluated.output_dir, tmp_path / "run")
    export.main(export.Options(str(run), step=1))
    exported = (run / "policy-1/model.safetensors").read_bytes()
    assert exported != (run / "policy/model.safetensors").read_bytes()


def test_checkpoint_is_evaluated_to_the_figures_of_the_run(evaluated, capsys):
    own = figures(evaluated)
    assert own[1] != own[2]
    assert evaluate_policy(evaluated, 1) == pytest.approx(own[1])
    shown = capsys.readouterr()
    assert shown.out == ""  # progress is on the standard error
    steps = ["loading the model ...", "reading the tasks ...", "evaluating held_out ..."]
    lines = [line for line in shown.err.splitlines() if line]
    assert [line for line in lines if line in steps] == steps
    assert lines[-1].startswith("task ")
    assert evaluate_policy(evaluated, "newest") == pytest.approx(own[2])


def test_a_damaged_newest_checkpoint_is_passed_over(evaluated, tmp_path, caplog):
    run = shutil.copytree(evaluated.output_dir, tmp_path / "run")
    (run / "checkpoints/2/SHA256SUMS").unlink()
    assert export.main(export.Options(str(run))).startswith("the policy of step 1 is in")
    assert "skipping the checkpoint of step 2" in caplog.text
    with pytest.raises(InputError, match="of step 2 in .* is damaged .it has no SHA256SUMS.: "):
        export.main(export.Options(str(run), step=2))


def test_mistakes_of_an_export_name_the_remedy(evaluated, tmp_path):
    with pytest.raises(InputError, match="no checkpoint of step 40 in .*: it has 1, 2"):
        export.main(export.Options(evaluated.output_dir, step=40))
    with pytest.raises(InputError, match="is no folder of a run: .*config.json.*give the output_d"):
        export.main(export.Options(str(tmp_path)))
    run = shutil.copytree(evaluated.output_dir, tmp_path / "run")
    with pytest.raises(InputError, match="exists and is not a checkpoint"):
        export.main(export.Options(str(run), out=str(run)))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="there is no checkpoint in"):
        export.main(export.Options(str(run)))


def test_checkpoint_of_another_model_is_refused(evaluated, tmp_path):
    other = helpers.write_policy(tmp_path / "other", helpers.SHAPE._replace(num_layers=1))
    with pytest.raises(InputError, match="model's num_layers is 2 there, and 1 here"):
        export.main(export.Options(evaluated.output_dir, model=other))


def test_a_runs_folder_as_model_is_its_policy(evaluated, tmp_path):
    assert hub.find(evaluated.output_dir).name == "policy"
    run = shutil.copytree(evaluated.output_dir, tmp_path / "run")
    shutil.rmtree(run / "policy")
    with pytest.raises(InputError, match=f"has no policy/ yet: run `jaxrft export {run}`"):
        hub.find(str(run))


def test_checkpoint_without_a_number_is_the_newest():
    assert cli.with_newest(["a.py", "--checkpoint"]) == ["a.py", "--checkpoint", "newest"]
    assert cli.with_newest(["a.py", "--checkpoint", "--seed", "1"])[2] == "newest"
    assert cli.with_newest(["a.py", "--checkpoint", "40"]) == ["a.py", "--checkpoint", "40"]


def test_best_policy_is_announced_when_written_and_at_the_end(configure, world, tmp_path, capsys):
    held_out = EvalConfig(
        (TasksConfig(str(world / "tasks.jsonl"), name="held_out"),), num_samples=0
    )
    config = configure(
        tmp_path / "run",
        steps=1,
        eval_steps=1,
        evaluation=held_out,
        keep_best="held_out/greedy",
    )
    train(config)
    value = figures(config)[1]["eval/held_out/greedy"]
    said = capsys.readouterr().out.splitlines()
    sentence = f"of held_out/greedy, {value:.3f} at step 1, is in {tmp_path / 'run/best'}"
    assert f"the best so far {sentence}" in said
    assert said[-1] == f"the best {sentence}"
    train(config)  # which is done
    assert capsys.readouterr().out.splitlines()[-1] == f"the best {sentence}"


def test_config_json_of_a_run_is_its_config(evaluated):
    tree = json.loads(configs.to_json(evaluated))
    assert configs.from_json(tree, "config.json") == evaluated
    with pytest.raises(InputError, match="config.json is no config: .*stepz.*did you mean steps"):
        configs.from_json(tree | {"stepz": 1}, "config.json")
    with pytest.raises(InputError, match="config.json is no config: steps is 'x'"):
        configs.from_json(tree | {"steps": "x"}, "config.json")
