"""The experiment of benchmarks/protocol.md: its tests by hand, and its lines."""

import json
from dataclasses import replace
from math import log

import pytest

from benchmarks import experiment
from benchmarks._savings import Curve
from benchmarks.experiment import Result, Run
from jaxrft.config import load


def result(*held_out, step=10, pass_at_8=0.5):
    """A run that spends so many rollouts from one evaluation to the next."""
    rollouts = [step * i for i in range(len(held_out))]
    curve = Curve(list(held_out), rollouts, rollouts, [float(x) for x in rollouts], 0.5)
    return Result(curve, [pass_at_8] * len(held_out), list(held_out))


@pytest.mark.parametrize(
    ("p_values", "rejected"),
    [
        # 0.05 over 3, 2, 1: 0.0167, 0.025, 0.05
        ([0.04, 0.01, 0.02], [True, True, True]),
        ([0.04, 0.01, 0.03], [False, True, False]),  # 0.03 is above 0.025, and ends it
        ([0.02, 0.02, 0.02], [False, False, False]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, rejected):
    assert experiment.holm(p_values) == rejected


def test_a_t_test_by_hand():
    # mean 2, standard error 1 / sqrt(3), t = 3.464 with 2 degrees of freedom
    assert experiment.t_test([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)
    assert experiment.t_test([-1.0, -2.0, -3.0]) == experiment.t_test([1.0, 2.0, 3.0])
    assert experiment.t_test([1.0, 1.0]) == 0 and experiment.t_test([0.0, 0.0]) == 1


def test_an_arm_is_compared_with_uniform_of_the_same_seed():
    slow = [0.0, 0.0, 0.3, 0.3, 0.6, 0.6, 0.6]
    fast = [0.0, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8]
    results = {}
    for seed, step in ((1, 10), (2, 20), (3, 30)):
        results[Run("digits-easy", "uniform", seed)] = result(*slow)
        results[Run("digits-easy", "bots", seed)] = result(*fast, step=step, pass_at_8=0.4)
    del results[Run("digits-easy", "uniform", 3)]  # without a partner
    row = experiment.compare(results, "digits-easy", "bots")
    assert row is not None and row["seeds"] == row["reached"] == 2
    # 60 rollouts of uniform, 30 and 60 of bots
    assert row["log"]["rollouts"].mean == pytest.approx(log(2) / 2)
    assert row["final_difference"].mean == pytest.approx(0.2)
    assert row["pass_difference"].mean == pytest.approx(-0.1)
    assert experiment.compare(results, "digits-easy", "adaptive") is None


@pytest.mark.parametrize(
    ("p", "saving", "final", "claim"),
    [
        (0.01, 0.5, 0.0, "stands"),
        (0.01, 0.5, -0.03, "saves, but not within the margin"),
        (0.01, -0.5, 0.0, "costs more"),
        (0.2, 0.5, 0.0, "not shown"),
    ],
)
def test_verdicts(p, saving, final, claim):
    def interval(mean):
        return experiment.mean_interval([mean, mean])

    row = {
        "p": p,
        "log": {"rollouts": interval(saving)},
        "final_difference": interval(final),
        "pass_difference": interval(0.0),
    }
    assert experiment.verdicts([row]) == [claim]


def test_the_table_of_the_language_model_has_a_row_a_run():
    results = {
        Run(experiment.MODEL, "uniform", 2): result(0.1, 0.25, step=640),
        Run(experiment.MODEL, "adaptive", 1): result(0.1, 0.5, step=640),
    }
    assert experiment.model_table(results).splitlines() == [
        "| seed | arm | informative | accuracy at 0 rollouts | accuracy at 640 rollouts "
        "| greedy, first and last | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | adaptive | 0.50 | 0.100 | 0.500 | 0.100 0.500 | 640 |",
        "| 2 | uniform | 0.50 | 0.100 | 0.250 | 0.100 0.250 | 640 |",
    ]


def test_the_run_of_a_language_model_differs_from_its_config_in_arm_seed_and_place(tmp_path):
    given = load(str(experiment.MODEL_CONFIG))
    config = experiment.configure_model(Run(experiment.MODEL, "uniform", 3), "here", tmp_path)
    assert (config.model, config.seed, config.select.name) == ("here", 3, "uniform")
    assert config.output_dir == str(tmp_path)
    assert (config.steps, config.rewards) == (given.steps, given.rewards)


@pytest.mark.parametrize("flags", [[], ["--part", "secondary"], ["--part", "model", "--tune"]])
def test_only_the_part_model_takes_a_model(flags, capsys):
    with pytest.raises(SystemExit):
        experiment.parse([*flags, "--model", "policy"])
    assert "--model is policy, but only the part model trains one" in capsys.readouterr().err
    assert experiment.parse(["--part", "model", "--model", "policy"]).model == "policy"


def test_variants_of_an_arm_differ_in_what_their_name_says(tmp_path):
    uniform, dynamic, replay = (
        experiment.configure(Run("digits-far", arm, 7), tmp_path, tmp_path / "run", None)
        for arm in ("uniform", "uniform+dynamic", "adaptive+replay")
    )
    assert replace(dynamic, dynamic_sampling=0) == uniform and dynamic.dynamic_sampling == 2
    assert replay.replay.capacity == 256 and uniform.replay.capacity == 0
    assert (replay.select.name, uniform.select.name) == ("adaptive", "uniform")


@pytest.mark.slow
def test_a_run_that_has_a_line_is_not_run_again(tmp_path, monkeypatch, capsys):
    short = {name: value._replace(steps=6, eval_steps=2) for name, value in SETTINGS.items()}
    monkeypatch.setattr(experiment.closed_loop, "SETTINGS", short)
    run = Run("digits-far", "uniform", 7)
    lines = tmp_path / "lines.jsonl"
    found = experiment.train(run, tmp_path)
    entry = run._asdict() | found._asdict() | {"curve": found.curve._asdict()}
    lines.write_text(json.dumps(entry) + "\n")
    assert experiment.read_results(lines) == {run: found}
    assert len(found.curve.held_out) == len(found.pass_at_k) == 4
    assert found.curve.rollouts[-1] == 6 * 64
    before = lines.read_text()
    experiment.train_missing([run], tmp_path, lines, 1)
    assert lines.read_text() == before
    experiment.report(experiment.read_results(lines), tmp_path / "found")
    assert "Final levels of `uniform`: digits-far" in capsys.readouterr().out


SETTINGS = dict(experiment.closed_loop.SETTINGS)
