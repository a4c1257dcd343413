"""A run from end to end: what it writes and says, and that trouble costs rewards, not the run."""

import contextlib
import datetime
import io
import json
import math
import re
from collections import Counter

import graders
import helpers
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrft import config as configs
from jaxrft.config import EvalConfig, SelectConfig, TasksConfig
from jaxrft.lm import weights
from jaxrft.lm.policy import open_model
from jaxrft.rewards.grading import Rewards, drop_failed_rows, open_rewards
from jaxrft.train.devices import computing_on
from jaxrft.train.evaluate import compile_evaluation, evaluate_policy, open_held_out
from jaxrft.train.loop import train
from jaxrft.types import InputError

NAMES = """
reward reward_std frac_reward_zero_std rewards/graders:starts/mean rewards/graders:starts/std entropy policy_loss
clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean completions/mean_length completions/min_length
completions/max_length completions/clipped_ratio sampling/importance_sampling_ratio/min
sampling/importance_sampling_ratio/mean sampling/importance_sampling_ratio/max num_tokens step_time grad_norm
learning_rate select/effective_group_ratio select/brier select/pearson select/auc select/coverage select/seconds
timing/select timing/rollout timing/reward timing/learn timing/report
rollout/utilization rollout/segments timing/tokens_per_second
""".split()  # noqa: E501


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_logs_one_line_under_trl_names(whole):
    folder, _ = whole
    found = lines(folder)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for line in found:
        assert set(NAMES) <= line.keys()
        assert all(value is None or math.isfinite(value) for value in line.values())
    rows = 8 * 4
    spent = np.cumsum([rows * line["completions/mean_length"] for line in found])
    assert [line["num_tokens"] for line in found] == spent.tolist()
    assert found[0]["select/coverage"] == 0.5 and found[0]["learning_rate"] == pytest.approx(1e-2)
    assert (
        found[0]["sampling/importance_sampling_ratio/min"]
        == found[0]["sampling/importance_sampling_ratio/max"]
        == 1
    )


def test_a_run_without_reference_pass_rates_starts_with_the_default_selector(
    configure, world, tmp_path, capsys
):
    bare = TasksConfig(str(world / "tasks.jsonl"))
    config = configure(tmp_path, tasks=bare, select=SelectConfig(), steps=1)
    assert config.select.name == "uniform"
    train(config)
    said = capsys.readouterr().out
    assert said.count("select.name is uniform") == 1
    assert "adaptive" in said and "bots" in said and "docs/selectors.md" in said


def test_posterior_counts_the_rollouts(whole):
    folder, state = whole
    assert int(state.step) == 6 and np.asarray(state.counters.last_seen).max() == 6
    believed = state.selector.posterior
    assert (np.asarray(believed.alpha) > 0).all() and (np.asarray(believed.beta) > 0).all()


def test_the_run_keeps_its_config_versions_checkpoints_and_policy(whole, configure):
    folder, state = whole
    kept = json.loads((folder / "config.json").read_text())
    assert configs.differences(configure(folder), kept).keys() == {"chat_template_date"}
    assert datetime.date.fromisoformat(kept["chat_template_date"])  # of the run's first day
    assert {"jax", "jaxrft", "devices"} <= json.loads((folder / "versions.json").read_text()).keys()
    assert helpers.checkpoints(folder) == [3, 6]
    helpers.assert_same_bits(weights.load(folder / "policy", helpers.SHAPE), state.params)
    assert (folder / "policy/tokenizer.json").is_file()


@pytest.fixture(scope="module")
def unrewarded(configure, tmp_path_factory):
    """(folder, final state, output) of three steps in which every completion has the reward 0."""
    folder, output = tmp_path_factory.mktemp("unrewarded"), io.StringIO()
    with contextlib.redirect_stdout(output):
        state = train(configure(folder, steps=3), reward={"graders:starts": graders.zero})
    return folder, state, output.getvalue()


def test_equal_rewards_leave_the_parameters_unchanged(unrewarded, world):
    folder, state, said = unrewarded
    helpers.assert_same_bits(state.params, weights.load(world / "policy", helpers.SHAPE))
    assert [line["grad_norm"] for line in lines(folder)] == [0, 0, 0]
    assert (
        said.count("the rewards of every group are all equal, so that its gradient is exactly zero")
        == 1
    )


def test_a_run_says_what_it_opens_and_names_model_tasks_devices_and_folder(unrewarded, world):
    folder, _, said = unrewarded
    assert said.startswith("loading the model ...\nreading the tasks ...\n")
    assert f"model       {world / 'policy'}, " in said and " parameters, computing in " in said
    assert re.search(rf"^tasks       \d+ from {re.escape(str(world))}/tasks.jsonl$", said, re.M)
    assert re.search(r"^devices     \d+ \w+, mesh data \d+ x fsdp \d+ x model \d+$", said, re.M)
    assert f"folder      {folder}\n" in said and "\nfirst step ...\n" in said
    assert "\nstep 1/3  reward 0  " in said and "\nstep 3/3  reward 0  " in said


@pytest.mark.slow
def test_failing_graders_lose_their_rewards_only(configure, tmp_path):
    config = configure(tmp_path, steps=3, reward_timeout=0.5, reward_workers=2)
    state = train(config, reward={"graders:starts": graders.troubles})
    assert int(state.step) == 3
    for kind in ("timeout", "crash", "error", "wrong_length"):
        assert sum(line[f"rewards/{kind}"] for line in lines(tmp_path)) > 0, kind
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    seen = np.asarray(state.selector.posterior.alpha + state.selector.posterior.beta)
    assert np.isfinite(seen).all()


@pytest.mark.slow
def test_a_reward_that_never_applies_changes_nothing(configure, whole, tmp_path):
    folder, state = whole
    rewards = {"rewards": ("graders:starts", "graders:never"), "reward_weights": (1.0, 5.0)}
    other = train(configure(tmp_path, **rewards))
    helpers.assert_same_bits((other.params, other.selector), (state.params, state.selector))
    assert [line["reward"] for line in lines(tmp_path)] == [
        line["reward"] for line in lines(folder)
    ]


def test_failed_grader_invalidates_its_row_and_none_does_not():
    lost = np.array([[False, False], [False, False], [False, True]])
    rewards = Rewards(
        *helpers.masked_rewards([[1.0, 0.5], [1.0, None], [1.0, None]]), lost, {"invalid": 0}, []
    )
    learned = drop_failed_rows(rewards)
    assert learned.valid.tolist() == [[True, True], [True, False], [False, False]]
    assert learned.rewards.tolist() == [[1.0, 0.5], [1.0, 0.0], [0.0, 0.0]]


@pytest.mark.slow
def test_all_parts_of_the_objective_at_once(configure, tmp_path):
    """Completions have up to 4 tokens, so that with a buffer of 4 a quarter of the penalty is paid
    for each.
    """
    clips = {"loss_type": "gspo", "epsilon": 1e-3, "delta": 1.5, "num_iterations": 2}
    sampling = {"top_p": 0.8, "importance_sampling_correction": "sequence", "entropy_coef": 0.01}
    lengths = {"overlong_buffer": 4, "overlong_penalty": 0.8, "mask_truncated_completions": True}
    state = train(configure(tmp_path, steps=1, **clips, **sampling, **lengths))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    for line in lines(tmp_path):
        penalty = line["completions/overlong_penalty"]
        assert penalty == pytest.approx(-0.2 * line["completions/mean_length"])
        assert line["reward"] == pytest.approx(line["rewards/graders:starts/mean"] + penalty)
        assert (
            0
            < line["sampling/importance_sampling_ratio/min"]
            < line["sampling/importance_sampling_ratio/max"]
            <= 1.01
        )
        assert line["clip_ratio/region_mean"] > 0 and line["clip_ratio/delta_mean"] >= 0


@pytest.mark.slow
def test_a_program_is_compiled_once_for_each_width_of_prompts(configure, tmp_path):
    rows = helpers.task_rows()
    rows[6]["prompt"] *= 4
    tasks = TasksConfig(
        helpers.write_rows(tmp_path / "tasks.jsonl", rows), pass_rate_columns=("weak", "strong")
    )
    compiled = Counter()

    def note(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        train(configure(tmp_path / "run", tasks=tasks))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled["jit(select_tasks)"] == 1
    # Prompts of up to 8 and 24 tokens.
    assert {
        name: compiled[f"jit({name})"] for name in ("start", "decode", "update_policy")
    } == dict.fromkeys(("start", "decode", "update_policy"), 2)


def test_the_first_step_says_what_was_compiled(unrewarded):
    *_, said = unrewarded
    (line,) = (line for line in said.splitlines() if line.startswith("compiled"))
    assert re.fullmatch(
        r"compiled until the end of the first step: \d+ programs in \d+\.\d "
        r"s(, \d+ of them .*)?",
        line,
    )


@pytest.mark.slow
def test_diverging_run_stops_saves_its_batch_and_no_checkpoint(configure, tmp_path):
    wanted = (
        "the last 3 updates in a row, up to step 4, were skipped, .*: the newest checkpoint is of "
        "step 1; lower .* the batch of the last step in "
    )
    with pytest.raises(InputError, match=wanted):
        train(configure(tmp_path / "run", learning_rate=1e30, save_steps=1, max_skipped_updates=3))
    assert helpers.checkpoints(tmp_path / "run") == [1] and not (tmp_path / "run/policy").exists()
    assert [line["skipped_updates"] for line in lines(tmp_path / "run")] == [0, 1, 1, 1]
    batch = load_file(tmp_path / "run/not-finite-4.safetensors")
    assert (
        batch["tokens"].shape == (8, 4, 4)
        and batch["task"].shape == (8,)
        and set(batch["step"]) == {3}
    )


@pytest.mark.slow
def test_a_late_success_outside_its_range_costs_that_reward_only(configure, tmp_path):
    train(configure(tmp_path / "run", rewards=("graders:late",), steps=2))
    first, second = lines(tmp_path / "run")
    assert first["rewards/invalid"] == 0 and second["rewards/invalid"] == 8  # every fourth of 32
    assert second["rewards/graders:late/mean"] == pytest.approx(16 / 24)


@pytest.mark.slow
def test_graders_that_fail_at_a_later_evaluation_do_not_end_the_run(configure, world, tmp_path):
    held_out = EvalConfig(
        (TasksConfig(str(world / "tasks.jsonl"), name="held_out"),), num_samples=0
    )
    grader = {"rewards": ("graders:later",), "evaluation": held_out, "eval_steps": 1, "steps": 1}
    train(configure(tmp_path / "run", **grader))
    first, second = lines(tmp_path / "run")
    assert first["eval/held_out/greedy"] > second["eval/held_out/greedy"] == 0.0


@pytest.mark.slow
def test_eval_in_bfloat16_scores_the_float32_parameters_without_having_them(
    configure, world, mesh, tmp_path, monkeypatch
):
    held_out = EvalConfig(
        (TasksConfig(str(world / "tasks.jsonl"), name="held_out"),), num_samples=0
    )
    config = configure(tmp_path / "run", dtype="bfloat16", evaluation=held_out)
    with open_rewards(config) as pool, computing_on(mesh, config):
        lm = open_model(config, mesh)
        assert lm.params["gate"].dtype == np.float32
        sets = open_held_out(config, lm)
        scores = compile_evaluation(config, lm, mesh, pool, sets=sets, held=lm.params)(lm.params, 0)
    load, dtypes = weights.load, []
    monkeypatch.setattr(
        weights,
        "load",
        lambda *args, **options: dtypes.append(options["dtype"]) or load(*args, **options),
    )
    assert evaluate_policy(config) == scores and scores["eval/held_out/greedy"] > 0
    assert dtypes == [jax.numpy.bfloat16]


def test_evaluation_refuses_what_it_cannot_grade(configure, tmp_path):
    """Instead of a score of 0."""
    helpers.write_rows(tmp_path / "bare.jsonl", [{"prompt": "1"}] * 8)
    held_out = EvalConfig((TasksConfig(str(tmp_path / "bare.jsonl")),), num_samples=0)
    with pytest.raises(
        InputError, match="exact needs ground truths but .*bare.jsonl has prompts only"
    ):
        evaluate_policy(configure(tmp_path / "run", rewards=("exact",), evaluation=held_out))
    with pytest.raises(
        InputError,
        match=r"no completion of the first batch got a reward \(8 "
        r"error\)",
    ):
        evaluate_policy(
            configure(tmp_path / "run", rewards=("graders:broken",), evaluation=held_out)
        )
    with pytest.raises(InputError, match="graders:three gave 3, but a success must lie in"):
        evaluate_policy(
            configure(tmp_path / "run", rewards=("graders:three",), evaluation=held_out)
        )


@pytest.mark.slow
def test_a_run_whose_prompts_wait_makes_the_steps_of_one_whose_do_not(configure, tmp_path):
    changes = {
        "steps": 2,
        "batch_size": 16,
        "max_completion_length": 80,
    }
    states = []
    lines = []
    for name, rows in (("all", 0), ("waiting", 32)):
        config = configure(tmp_path / name, max_concurrent_rows=rows, **changes)
        states.append(train(config))
        lines.append(helpers.metrics(tmp_path / name))
    helpers.assert_close(*states, atol=1e-4)
    for at_once, waiting in zip(*lines, strict=True):
        for name in at_once.keys() - {"rollout/segments", "rollout/utilization"}:
            assert waiting[name] == pytest.approx(at_once[name], abs=1e-4), name
        assert waiting["rollout/segments"] > at_once["rollout/segments"]


@pytest.mark.parametrize("rows", [31, 1])
def test_rows_that_are_fewer_than_two_groups_a_shard_are_refused(configure, tmp_path, rows):
    with pytest.raises(InputError, match=f"max_concurrent_rows is {rows}: .* at least 32, two"):
        train(configure(tmp_path, max_concurrent_rows=rows))
