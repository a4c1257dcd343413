"""The policies of checkpoints: exported as at the end of a run, evaluated as by the run."""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest

from jaxrft import cli
from jaxrft import config as configs
from jaxrft.config import Config, EvalConfig, TasksConfig
from jaxrft.lm import hub
from jaxrft.train import card, export, results
from jaxrft.train.evaluate import Measured, evaluate_policy, evaluation_config
from jaxrft.train.loop import train
from jaxrft.types import InputError


@pytest.fixture(scope="module")
def run(configure, world, tmp_path_factory):
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
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config)
    return config, said.getvalue().splitlines()


@pytest.fixture(scope="module")
def evaluated(run):
    """The config of `run`."""
    return run[0]


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


def test_exported_policies_have_a_model_card_of_their_run(evaluated):
    run = Path(evaluated.output_dir)
    first, _, last = helpers.metrics(run)
    for folder, kind in (("policy", "policy"), ("best", "best")):
        text = (run / folder / "README.md").read_text()
        step = results.exported_step(run / folder)
        config = export.config_of_run(run)
        assert text == card.model_card(config, step, Path(evaluated.model), kind)
    text = (run / "policy/README.md").read_text()
    figures = [f"{x['eval/held_out/avg@2']:.3f}" for x in (first, last)]
    assert f"| `held_out` | 16 | avg@2 | {' | '.join(figures)} |" in text
    assert f"| rollouts | {last['rollouts']:,} |" in text and last["rollouts"] == 64
    assert f"| tokens sampled | {last['num_tokens']:,} |" in text
    assert "| number of tasks | 16 |" in text
    assert "not recorded" not in text and str(run.parent) not in text
    assert not (Path(evaluated.model) / "README.md").exists()


def test_step_chooses_the_checkpoint_and_names_the_folder(evaluated, tmp_path):
    run = shutil.copytree(evaluated.output_dir, tmp_path / "run")
    export.main(export.Options(str(run), step=1))
    exported = (run / "policy-1/model.safetensors").read_bytes()
    assert exported != (run / "policy/model.safetensors").read_bytes()


def test_checkpoint_is_evaluated_to_the_figures_of_the_run(evaluated, capsys):
    own = figures(evaluated)
    assert own[1] != own[2]  # that of step 1 is evaluated below
    assert evaluate_policy(evaluated, "newest") == pytest.approx(own[2])
    shown = capsys.readouterr()
    assert shown.out == ""  # progress is on the standard error
    steps = ["loading the model ...", "reading the tasks ...", "evaluating held_out ..."]
    lines = [line for line in shown.err.splitlines() if line]
    assert [line for line in lines if line in steps] == steps
    assert lines[-1].startswith("completion 48/48")  # of 16 tasks, one greedy and two sampled


def test_evaluation_is_saved_and_equals_the_figures_of_the_run(evaluated, tmp_path, capsys):
    out = tmp_path / "results.json"
    *_, relation, saved = results.run(results.Options(evaluated, 1, str(out)))
    run = evaluated.output_dir
    assert relation == f"the run in {run} measured the same at step 1: the draws are the same"
    assert saved == f"saved in {out}"
    document = json.loads(out.read_text())
    assert document["metrics"] == pytest.approx(figures(evaluated)[1])
    assert document["run"]["metrics"] == figures(evaluated)[1]
    assert (document["checkpoint"], document["step_of_draws"]) == (1, 1)
    samples = np.array(document["tasks"]["held_out"]["samples"])
    assert samples.mean() == pytest.approx(document["metrics"]["eval/held_out/avg@2"])
    low, high = document["intervals"]["eval/held_out/avg@2"]
    assert low <= document["metrics"]["eval/held_out/avg@2"] <= high


def test_exported_policies_are_measured_by_the_draws_of_their_step(evaluated, tmp_path, caplog):
    run = evaluated.output_dir
    assert results.exported_step(Path(run) / "policy") == 2
    assert results.exported_step(Path(evaluated.model)) is None
    final = dataclasses.replace(evaluated, model=run)
    options = results.Options(final, out=str(tmp_path / "results.json"))
    *_, relation, _ = results.run(options)
    assert "not read" not in caplog.text
    assert relation == f"the run in {run} measured the same at step 2: the draws are the same"
    first = results.Options(evaluated, out=str(tmp_path / "results.json"))
    *_, relation, _ = results.run(first)
    assert relation == f"the run in {run} measured the same at step 0: the draws are the same"


def test_evaluation_says_which_settings_are_not_those_of_the_run(evaluated):
    config = dataclasses.replace(
        evaluated,
        seed=1,
        steps=9,
        evaluation=dataclasses.replace(evaluated.evaluation, temperature=0.5),
    )
    folder = Path(evaluated.output_dir)
    measured = Measured(config, folder / "policy", 1, 1, {}, {})
    own = results.own_figures(config, measured)
    assert own.differences == {"seed": (1, 0), "evaluation.temperature": (0.5, None)}
    (said,) = results.comparison(own, {})
    assert said.startswith(f"not comparable with the figures of the run in {folder}: ")
    assert "seed is 1, there it was 0" in said


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        (lambda tasks: (dataclasses.replace(tasks, num_samples=3),), "differs in num_samples"),
        (lambda tasks: (tasks, dataclasses.replace(tasks, name="b")), "differs"),
    ],
    ids=["another number of samples", "another number of sets"],
)
def test_evaluation_says_in_what_held_out_sets_differ_from_those_of_the_run(
    evaluated, sets, wanted
):
    changed = dataclasses.replace(evaluated.evaluation, tasks=sets(evaluated.evaluation.tasks[0]))
    config = dataclasses.replace(evaluated, evaluation=changed, keep_best=None)
    measured = Measured(config, Path(evaluated.output_dir) / "policy", 1, 1, {}, {})
    (said,) = results.comparison(results.own_figures(config, measured), {})
    assert said.endswith(f": evaluation.tasks {wanted}")


def test_results_have_a_place_of_their_own(evaluated):
    assert results.default_path(evaluated, Measured(evaluated, Path("x"), 40, 40, {}, {})) == Path(
        evaluated.output_dir, "evaluations/step-40.json"
    )
    hub_model = dataclasses.replace(evaluated, model="Qwen/Qwen3-0.6B")
    measured = Measured(hub_model, Path("cache"), None, 0, {}, {})
    assert results.default_path(hub_model, measured).name == "Qwen-Qwen3-0.6B.json"


def test_evaluation_samples_as_it_says(evaluated):
    """Of one likeliest token all samples are greedy, whatever training samples."""
    likeliest = dataclasses.replace(evaluated.evaluation, top_k=1, max_completion_length=2)
    config = dataclasses.replace(evaluated, evaluation=likeliest, overlong_buffer=3)
    metrics = evaluate_policy(config, 2)
    assert metrics["eval/held_out/avg@2"] == metrics["eval/held_out/greedy"]
    assert metrics["eval/held_out/mean_length"] <= 2
    sampling = evaluation_config(config)
    assert (sampling.top_k, sampling.max_completion_length, sampling.temperature) == (1, 2, 1.0)


def test_evaluation_may_have_each_setting_of_sampling_for_itself():
    """Those of training otherwise; no stop strings are a setting, too."""
    training = Config("m", TasksConfig("a.jsonl"), "run", stop=("Q:",), min_p=0.1, top_k=5)
    assert evaluation_config(training) is training
    settings = {"min_p": 0.0, "repetition_penalty": 1.2, "stop": (), "temperature": 0.5}
    own = dataclasses.replace(training, evaluation=EvalConfig(**settings))
    sampling = evaluation_config(own)
    assert {name: getattr(sampling, name) for name in settings} == settings
    assert sampling.top_k == 5


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
    model = shutil.copytree(evaluated.model, tmp_path / "model")
    (model / "checkpoints").mkdir()  # whatever is in it
    assert hub.find(str(model)) == model
    run = shutil.copytree(evaluated.output_dir, tmp_path / "run")
    shutil.rmtree(run / "policy")
    with pytest.raises(InputError, match=f"has no policy/ yet: run `jaxrft export {run}`"):
        hub.find(str(run))


def test_checkpoint_without_a_number_is_the_newest():
    assert cli.with_newest(["a.py", "--checkpoint"]) == ["a.py", "--checkpoint", "newest"]
    assert cli.with_newest(["a.py", "--checkpoint", "--seed", "1"])[2] == "newest"
    assert cli.with_newest(["a.py", "--checkpoint", "40"]) == ["a.py", "--checkpoint", "40"]


def test_best_policy_is_announced_when_written_and_at_the_end(run, capsys):
    config, said = run
    first, second = (line["eval/held_out/avg@2"] for line in figures(config)[1:])
    sentence = f"of held_out/avg@2, {{:.3f}} at step {{}}, is in {Path(config.output_dir) / 'best'}"
    assert f"the best so far {sentence.format(first, 1)}" in said
    assert (f"the best so far {sentence.format(second, 2)}" in said) == (second > first)
    best = sentence.format(*((second, 2) if second > first else (first, 1)))
    assert said[-1] == f"the best {best}"
    train(config)  # which is done
    assert capsys.readouterr().out.splitlines()[-1] == f"the best {best}"


def test_config_json_of_a_run_is_its_config(evaluated):
    tree = json.loads(configs.to_json(evaluated))
    assert configs.from_json(tree, "config.json") == evaluated
    with pytest.raises(InputError, match="config.json is no config: .*stepz.*did you mean steps"):
        configs.from_json(tree | {"stepz": 1}, "config.json")
    with pytest.raises(InputError, match="config.json is no config: steps is 'x'"):
        configs.from_json(tree | {"steps": "x"}, "config.json")
