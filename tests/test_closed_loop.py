"""The measurement of what choosing tasks saves: its arithmetic by hand, one run of two steps."""

import json
from math import log
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import _savings, _similarity, closed_loop
from benchmarks._savings import Curve
from jaxrft import assets
from jaxrft.select.dots.predictor import Origin, load_predictor


def curve(*held_out, rollouts=10, tokens=100, seconds=1.0):
    """A run that spends so much from one evaluation to the next."""
    steps = range(len(held_out))
    spent = ([number * i for i in steps] for number in (rollouts, tokens, seconds))
    return Curve(list(held_out), *spent, informative=0.5)


UNIFORM = curve(0.0, 0.0, 0.3, 0.3, 0.6, 0.6, 0.6)


def test_a_level_is_reached_by_the_mean_of_three():
    assert _savings.final(UNIFORM) == pytest.approx(0.6)
    assert _savings.reached(UNIFORM.held_out, 0.6) == 6
    assert _savings.reached([0.0, 0.9, 0.0, 0.0, 0.3, 0.3, 0.3], 0.3) == 2  # (0 + 0.9 + 0) / 3
    assert _savings.reached([0.3, 0.1, 0.1, 0.1], 0.3) is None


def test_savings_by_hand():
    # a mean of 0.6 after 3 of 6
    fast = curve(0.0, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, tokens=200, seconds=0.5)
    found = _savings.saving(fast, UNIFORM, references=90)
    assert found.reached and found.rollouts == 30
    assert found.log == pytest.approx({"rollouts": log(2), "tokens": 0, "seconds": log(4)})
    assert found.with_references == pytest.approx(log(60 / (30 + 90)))
    assert set(_savings.saving(UNIFORM, UNIFORM).log.values()) == {0.0}


def test_run_below_the_level_counts_with_its_full_cost():
    found = _savings.saving(curve(*[0.1] * 7, rollouts=12), UNIFORM)
    assert not found.reached and found.rollouts == 72
    assert found.log["rollouts"] == pytest.approx(log(60 / 72))


def test_results_are_of_paired_runs(tmp_path, capsys):
    fast = curve(0.0, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8)
    runs = {"uniform": UNIFORM, "bots": curve(*[0.1] * 7), "oracle": fast}
    curves = {
        closed_loop.Run("digits-easy", name, 0.1, seed): found
        for seed in (0, 1)
        for name, found in runs.items()
    }
    closed_loop.write(curves, tmp_path / "found")
    rows = {
        row["selector"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]
    }
    assert (
        rows["oracle"]["share"]["rollouts"] == [1.0, 1.0, 1.0]
        and rows["uniform"]["share"]["rollouts"][0] == 0.0
    )
    assert rows["oracle"]["log_saving"]["rollouts"] == pytest.approx([log(2)] * 3)
    assert (rows["bots"]["not_reached"], rows["bots"]["seeds"]) == (2, 2)
    assert rows["bots"]["reference_rollouts"] == 2 * 8 * 1024
    text = (tmp_path / "found.md").read_text()
    assert (
        "| bots | 0.50 | 60 | 2 of 2 | 1.00 (1.00 to 1.00) |" in text
        and ("uniform ends at 0.600") in text
    )
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert "| digits-easy | oracle | 0.1 | 0.800, 0.800 |" in closed_loop.tuned(curves)


@pytest.mark.slow
def test_dots_gets_a_predictor_for_the_embeddings_of_the_tiny_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(_similarity, "TASKS", 128)
    _similarity.write(
        "digits-easy", [Path(assets.TINY)], closed_loop.predictor_of("digits-easy", tmp_path)
    )
    found = load_predictor(tmp_path / "digits-easy.safetensors")
    assert found.embeddings == Origin(assets.TINY, 64)
    assert closed_loop.reference_rollouts("digits-easy", "dots") == 7 * 8 * 128
    select = closed_loop.select_config(closed_loop.Run("digits-easy", "dots", 0.1, 0), tmp_path)
    assert (
        select.num_references
        / (select.reference_every * closed_loop.SETTINGS["digits-kinds"].batch_size)
        == 0.25
    )


def test_replay_is_a_variant_of_a_selector(tmp_path):
    run = closed_loop.Run("digits-references", "bots+replay", 0.1, 0)
    config = closed_loop.configure(run, closed_loop.select_config(run, tmp_path), tmp_path)
    assert (config.select.name, config.replay.capacity, config.fresh_batch_size) == ("bots", 256, 4)
    for selector in ("bots", "bots+replay"):
        assert closed_loop.reference_rollouts(run.family, selector) > 0
    assert closed_loop.parse(["--selectors", "uniform", "bots+replay"]).selectors == [
        "uniform",
        "bots+replay",
    ]


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(world, tmp_path, monkeypatch, capsys):
    setting = closed_loop.Setting(1e-4, steps=2, eval_steps=1)
    monkeypatch.setitem(closed_loop.SETTINGS, "digits-easy", setting)
    run = closed_loop.Run("digits-easy", "uniform", 1e-4, 0)
    (tmp_path / "-".join(map(str, run)) / "run").mkdir(parents=True)  # one that was interrupted is
    found = closed_loop.train(run, tmp_path)
    assert (
        len(found.held_out) == 3
        and found.rollouts == [0, 64, 128]
        and found.tokens[0] == 0 < found.tokens[1]
    )
    monkeypatch.setattr(
        closed_loop.loop, "train", lambda config: SimpleNamespace(step=config.steps - 1)
    )
    assert closed_loop.train_all([run], tmp_path, 1) == [found]
    closed_loop.main(
        [
            "--runs",
            str(tmp_path),
            "--finished",
            "--families",
            "digits-easy",
            "--selectors",
            "uniform",
        ]
    )
    assert "no tables without uniform and oracle" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):  # by a signal, after a step
        closed_loop.train(run._replace(seed=1), tmp_path)
    assert not list(tmp_path.glob("*-1/curve.json"))
