"""The dry run: its counts, its description of the run, and its list of missing inputs."""

import importlib.util
import re
from dataclasses import replace

import helpers
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxrft import cli, dry_run
from jaxrft import mesh as meshes
from jaxrft.config import Config, EvalConfig, LoRAConfig, MeshConfig, SelectConfig, TasksConfig
from jaxrft.dry_run import counts, memory, programs, render, resolve, reward_check
from jaxrft.dry_run.chips import chip_of
from jaxrft.dry_run.render import Page
from jaxrft.host.installation import install_command
from jaxrft.rewards.grading import open_rewards
from jaxrft.train.devices import open_mesh
from jaxrft.train.loop import train
from jaxrft.train.setup import describe_run, open_run
from jaxrft.types import InputError, Missing

SIZES = (2, 2, 2)


def describe(config, mesh):
    inputs = resolve.resolve_inputs(config, mesh)
    return inputs, describe_run(config, mesh, inputs.lm, inputs.pool.table, inputs.predictor)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="whole"),
        pytest.param(
            {"lora": LoRAConfig(rank=2), "kl_coef": 0.1}, id="lora", marks=pytest.mark.slow
        ),
    ],
)
def test_a_described_run_has_the_shapes_and_shardings_of_the_real_one(changes, configure, tmp_path):
    config = configure(tmp_path / "run", **changes)
    mesh = open_mesh(config)
    _, run = describe(config, meshes.abstract(*SIZES))
    real = open_run(config, mesh)
    for planned, actual in ((run.state, real.state), (run.constants, real.constants)):
        assert jax.tree.structure(planned) == jax.tree.structure(actual)
        for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(actual), strict=True):
            assert (a.shape, a.dtype, a.sharding.spec) == (b.shape, b.dtype, b.sharding.spec)
    assert memory.on_device(run.state) == sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(real.state)
        if leaf is not None
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "of_the_rollout"),
    [
        ({}, ["prefill", "decode"]),
        (
            {
                "max_concurrent_rows": 32,
                "batch_size": 16,
                "stop": ("+ 1",),
                "repetition_penalty": 1.1,
            },
            ["lay out weights", "prefill", "enter", "decode"],
        ),
    ],
    ids=["all at once", "some wait"],
)
def test_dry_run_compiles_the_programs_of_training(configure, tmp_path, changes, of_the_rollout):
    """They come out of the cache that a run has filled."""
    config = configure(tmp_path, steps=1, **changes)
    train(config)
    inputs, run = describe(config, open_mesh(config))
    events = []

    def note(event, **_):
        events.append(event)

    jax.monitoring.register_event_listener(note)
    try:
        compiled = list(programs.compiled(run, 8))
    finally:
        jax.monitoring.unregister_event_listener(note)
    names = ["select", *of_the_rollout, "update selector", "learn"]
    assert [each.name for each in compiled] == names
    assert not any(each.failure for each in compiled) and compiled[-1].temporaries > 0
    assert all(each.peak > memory.on_device(run.state) for each in compiled)
    moves = {"lay out weights", "enter"}  # which compute nothing
    assert all(each.flops > 0 for each in compiled if each.name not in moves)
    assert inputs.pool.table.tokens.shape[1] == 8
    assert (
        "/jax/compilation_cache/cache_hits" in events
        and "/jax/compilation_cache/cache_misses" not in events
    )


def test_memory_by_hand(configure, tmp_path):
    """Width 16, mlp 32, 2 layers, 4 heads of 4, 2 key-value heads, tied; 8 tasks x 4 of 4 tokens on
    2 x 2 x 2.
    """
    config = configure(tmp_path, kl_coef=0.1)
    _, run = describe(config, meshes.abstract(*SIZES))
    parts = {part.name: part.bytes for part in memory.parts(run, 8)}
    # q and o, k and v, the three of the mlp: split over fsdp and model
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
    split = 2 * layer + 16 * 16  # and the embedding
    over_fsdp = 5 * 16  # norms
    over_model = 2 * (16 + 2 * 8)  # biases
    held = 4 * (split // 4 + over_fsdp // 2 + over_model // 2)
    assert parts["parameters that are trained"] == parts["KL reference"] == held
    # two moments; counts of two transformations, and of skips
    assert parts["optimizer"] == 2 * held + 3 * 4
    assert parts["policy for the rollout"] == 4 * (split // 2 + over_fsdp + over_model // 2)
    slot = 2 * (2 * 2 * 4 // 2 * 4)  # layers x (keys and values of 2 heads of 4 over model)
    assert parts["prompts' keys and values"] == 8 // 4 * 8 * slot
    assert parts["completions' keys and values"] == 32 // 4 * 4 * slot
    assert parts["logits of a token"] == 4 * 4 * (32 // 4) * (16 // 2)
    assert parts["gradients"] == 2 * held
    assert "parameters that are not trained" not in parts


def test_leftovers_of_a_killed_save_count_as_no_checkpoint(tmp_path):
    for name in ("2", "11", "12.orbax-checkpoint-tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    config = Config(
        model="m", tasks=TasksConfig("a.jsonl"), output_dir=str(tmp_path / "run"), steps=60
    )
    assert dict(counts.checkpoints(config, 0, 0))["folder"].endswith("run, resumes after step 11")


def test_a_step_is_counted_by_hand():
    settings = {"model": "m", "tasks": TasksConfig("a.jsonl"), "output_dir": "nowhere/run"}
    config = Config(
        **settings,
        steps=60,
        batch_size=512,
        num_generations=8,
        mini_batch_size=64,
        micro_batch_size=128,
    )
    said = dict(counts.run(config, 10240))
    assert said["steps"] == "60, each of 512 tasks x 8 = 4,096 rollouts"
    assert said["rollouts"] == "245,760, 3 times the tasks of the pool"
    assert said["tokens"] == "at most 4,194,304 sampled a step, 252 M in all"
    assert said["updates"] == "8 a step, each of 64 tasks"
    assert dict(counts.run(config, None))["rollouts"] == "245,760" and "resampling" not in said
    said = dict(counts.run(replace(config, dynamic_sampling=2), 10240))
    assert said["resampling"] == "at most 2 rounds a step, of 8,192 more rollouts, 491,520 in all"
    assert said["tokens"] == "at most 12,582,912 sampled a step, 755 M in all"
    held_out = EvalConfig((TasksConfig("held.jsonl"), TasksConfig("few.jsonl", num_samples=2)))
    config = Config(
        **settings, evaluation=held_out, steps=60, eval_steps=25, save_steps=25, keep_checkpoints=2
    )
    # 0, 25, 50 and 60
    assert counts.evaluations(config, [100, 50])[0][1].startswith("4, with 9 or 3 completions")
    assert counts.evaluations(config, [100, 50])[0][1].endswith(": 4,200 rollouts")
    assert counts.evaluations(config, [100, None])[0][1].endswith(": some sets are missing")
    assert counts.evaluations(config, []) == [("evaluations", "none")]
    written, folder = counts.checkpoints(config, 3 * 2**30, 2**20)
    assert written[1] == "3 of 3.00 GiB before compression, 2 kept; the policy at the end, 1.00 MiB"
    assert folder[1] == "nowhere/run, new"


def test_the_histogram_by_hand():
    rates = np.array([0, 0.05, 0.1, 0.3, 0.7, 0.95, 1, np.nan], np.float32)
    assert counts.histogram(rates).tolist() == [2, 1, 0, 1, 0, 0, 0, 1, 0, 2]
    assert render.Page().bar(np.array([0, 1, 80, 40])) in (" ▁█▄", " .@=")


@pytest.mark.parametrize(
    ("value", "text", "with_unit"),
    [
        (12, "12", "12 FLOP"),
        (1500, "1.5 k", "1.5 kFLOP"),
        (494e6, "494 M", "494 MFLOP"),
        (1.27e13, "12.7 T", "12.7 TFLOP"),
    ],
)
def test_large_numbers_are_short(value, text, with_unit):
    assert counts.short(value) == text
    assert counts.short(value, "FLOP") == with_unit


def test_rewards_grade_ground_truths(configure, tmp_path):
    config = configure(tmp_path, rewards=("exact", "math", "graders:zero"), reward_workers=2)
    rows = [{"prompt": "1+1=", "answer": answer} for answer in (r"\frac{1}{2}", "2", "3")]
    tasks = TasksConfig(helpers.write_rows(tmp_path / "tasks.jsonl", rows))
    table = resolve.open_set(tasks, config, None).table
    assert table is not None
    with open_rewards(config) as pool:
        exact, math, zero = reward_check.check_rewards(config.rewards, pool, table, [0, 1, 2])
    assert (exact.spelling, exact.right, exact.empty, exact.fails) == (
        "as it is",
        [1, 1, 1],
        [0, 0, 0],
        False,
    )
    assert math.right == [1, 1, 1] and math.empty == [0, 0, 0] and not math.fails
    assert zero.fails


def test_a_reward_of_none_neither_applies_nor_fails():
    """Of two tasks, one reward is of the first only, and the other of none."""
    partly = reward_check.RewardCheck("partly", "as it is", [1.0, None], [None, 0.0], "")
    never = reward_check.RewardCheck("never", "as it is", [None, None], [None, None], "")
    assert partly.applies and not partly.fails and not never.applies and not never.fails
    assert partly._replace(right=[None, 0.0]).fails  # nothing is better than no reward
    assert reward_check.any_without_reward([partly, never]) and not reward_check.any_without_reward(
        [partly, partly._replace(right=[None, 0.0])]
    )
    assert not reward_check.any_without_reward([])


@pytest.fixture
def dry(configure, tmp_path, capsys):
    """Exit code and what `jaxrft train CONFIG --dry-run` says on changes of a config that works."""

    def run(*flags, **changes):
        path = helpers.write_config(tmp_path / "config.py", configure(tmp_path / "run"), **changes)
        code = cli.main(["train", path, "--dry-run", *flags])
        assert not (tmp_path / "run").exists()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_dry_run_shows_the_inputs_and_writes_nothing(dry, world, tmp_path):
    rows = helpers.task_rows(20)
    rows[4]["prompt"] = "1" * 70
    first = TasksConfig(
        helpers.write_rows(tmp_path / "first.jsonl", rows), pass_rate_columns=("weak", "strong")
    )
    second = TasksConfig(str(world / "tasks.jsonl"), domain_column="answer")
    held_out = EvalConfig((TasksConfig(str(world / "tasks.jsonl"), name="held"),), num_samples=2)
    code, said, _ = dry(tasks=(first, second), evaluation=held_out, eval_steps=3)
    assert code == 0 and said.endswith("\nready\n")
    assert re.search(r"first +19 +1 over 64 tokens, up to 70\n", said)
    assert re.search(r"tasks +16 +none\n", said) and re.search(r"held +16 +held out +none\n", said)
    assert re.search(r"first +19 +54.3%\n", said) and "2 others" in said
    assert re.search(r"tasks in the pool +35, 15 with the prompt and answer of another one", said)
    assert re.search(r"prompt tokens +p5 4 +p50 4 +p95 6 +max 6\n", said)
    assert re.search(r"weak +0 .{10} 1 +0.\d+ +0.0% +0.0% +45.7%\n", said)
    assert "task 0 of first, 4 tokens, ground truth 0\n    0+0=\n" in said
    assert re.search(r"graders:starts +1 +1 +1 +as it is +0 +0 +0\n", said)
    assert re.search(r"parameters +\d+(\.\d+)? k, all trained", said)
    assert "data 2 x fsdp 2 x model 2 = 8 devices" in said
    assert "3, with 3 completions of every held-out task: 144 rollouts" in said


def test_a_reward_that_scores_no_ground_truth_is_named(dry):
    assert ("graders:zero gives no ground truth more than an empty answer") in dry(
        rewards=("graders:zero",)
    )[1]


def test_a_failing_reward_is_named_without_blaming_the_answer_column(dry):
    said = dry(rewards=("graders:broken", "graders:counts_ids"))[1]
    assert "graders:broken fails: error, RuntimeError: the grader is broken" in said
    assert "answer_column" not in said and "counts_ids fails" not in said


def test_a_column_that_a_reward_needs_and_tasks_lack_is_named(dry):
    code, _, errors = dry(rewards=("graders:needs_solution",))
    assert (
        code != 0
        and ("the reward graders:needs_solution needs solution, but the tasks have no such column")
        in errors
    )


def test_missing_inputs_are_listed_with_their_remedies(dry, tmp_path):
    absent = TasksConfig(str(tmp_path / "absent.jsonl"), pass_rate_columns=("weak", "strong"))
    code, said, _ = dry(
        *("--mesh.data", "1"),
        model="Qwen/Qwen2.5-0.5B-Instruct",
        tasks=absent,
        rewards=("nowhere_at_all:reward",),
        max_completion_length=64,
    )
    assert code == 2 and said.endswith("\n4 things are missing\n")
    assert "run `hf download Qwen/Qwen2.5-0.5B-Instruct`" in said and "absent.jsonl" in said
    assert "nowhere_at_all:reward do not load: ModuleNotFoundError" in said
    assert "a mesh of 4 devices, and this machine has 8 devices" in said
    assert "494 M, all trained" in said and "shape as published" in said
    assert "Prompts as the policy reads them" not in said and "Reference pass rates" not in said
    assert "selector and task table" not in said and "times the tasks" not in said


def test_tasks_without_a_tokenizer_are_counted_but_not_measured(dry):
    code, said, _ = dry(model="Qwen/Qwen2.5-0.5B-Instruct", max_completion_length=64)
    assert code == 2 and said.endswith("\n1 thing is missing\n")
    assert (
        "none is dropped here yet" in said
        and ("Reference pass rates") in said
        and "p50" not in said
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"model": "nobody/knows-this"},
            "nobody/knows-this is not here, and its shape is not known",
        ),
        ({"select": SelectConfig(name="bot")}, "no selector 'bot'"),
        ({"mesh": MeshConfig(data=2, model=4)}, "num_key_value_heads 2 does not divide"),
        ({"batch_size": 6}, "batch_size 6 does not divide"),
        ({"batch_size": 24}, "batch_size is 24 but there are 16 tasks"),
        ({"rewards": ("exakt",)}, "no reward is named 'exakt': did you mean exact?"),
        ({"max_prompt_length": 2}, "no prompt of tasks is short enough"),
    ],
    ids=str,
)
def test_a_mistake_is_reported_in_one_sentence(changes, wanted, dry):
    code, _, said = dry(**changes)
    assert (
        code == 2
        and re.search(wanted, said)
        and said.count("jaxrft: error: ") == 1
        and "Traceback" not in said
    )


def test_a_run_whose_rewards_all_fail_is_not_ready(dry):
    code, said, _ = dry(rewards=("graders:broken",))
    assert code == 2 and said.endswith("\n1 thing is missing\n")
    assert "a reward for any of the tasks that were tried; graders:broken: " in " ".join(
        said.split()
    )
    code, said, _ = dry(rewards=("graders:broken", "graders:starts"))
    assert code == 0 and said.endswith("\nready\n")


def test_a_run_in_the_folder_is_resumed_or_refused(whole, configure, capsys):
    before = helpers.contents(whole[0])
    dry_run.show(configure(whole[0], steps=9))
    assert (f"{whole[0]}, resumes after step 6\n") in capsys.readouterr().out.replace(
        "\n               ", ""
    )
    with pytest.raises(InputError, match="holds a run already"):
        dry_run.show(configure(whole[0], resume="never"))
    with pytest.raises(InputError, match="of another run: its seed is 0, this run's is 1"):
        dry_run.show(configure(whole[0], seed=1))
    assert helpers.contents(whole[0]) == before


def test_programs_that_do_not_fit_keep_a_run_from_starting(capsys):
    chip = chip_of("v5e:2x2").gib * 2**30
    fitting = programs.Compiled("select", 1.0, 0, chip // 2, 1e9)
    too_large = fitting._replace(name="learn", peak=2 * chip)
    failing = fitting._replace(name="decode", failure="out of memory")
    assert render.programs(Page(), [fitting], "v5e:2x2")
    assert not render.programs(Page(), [fitting, too_large], "v5e:2x2")
    assert not render.programs(Page(), [failing, fitting], "v5e:2x2")
    render.missing(Page(), [], fits=False)
    assert capsys.readouterr().out.endswith("\nnot all programs fit\n")


def test_a_config_that_leaves_the_selector_alone_is_told_which_others_there_are(dry, world):
    code, said, _ = dry(tasks=TasksConfig(str(world / "tasks.jsonl")), select=SelectConfig())
    assert code == 0 and "select.name is uniform" in said
    assert "select.name is" not in dry()[1]


@pytest.mark.parametrize("topology", ["", "v5e", "4x4", "v9:2x2", "v5e:4", "v5e:4x4x4x4"])
def test_an_unknown_topology_is_refused(topology):
    with pytest.raises(
        InputError, match=f"topology is '{topology}': give one of v4, v5e, v5p, v6e"
    ):
        programs.devices(topology)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_tpu_compiler_is_reported_with_the_remedy():
    with pytest.raises(
        Missing, match=re.escape(f"needs the TPU compiler libtpu: {install_command('tpu')}")
    ):
        programs.devices("v5e:4x4")


def test_programs_of_a_topology_are_neither_read_from_a_cache_nor_written_to_it(tmp_path):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_enable_compilation_cache",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path), 0.0, True), strict=True):
            jax.config.update(name, value)
        with programs.without_cache():
            jax.jit(lambda x: x + 3).lower(1.0).compile()
            assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x + 4).lower(1.0).compile()
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_programs_are_compiled_for_a_topology(dry, recwarn):
    code, said, _ = dry("--topology", "v5e:4x2")
    assert not [each for each in recwarn if "compilation cache" in str(each.message)]
    assert (
        code == 0
        and said.endswith("\nready\n")
        and ("Compiled for v5e:4x2, chips of 16 GiB") in said
    )
    assert re.search(
        r"At best on v5e:4x2, seconds a step\n.*\n +rollout +[\d.e-]+ +interconnect ",
        said,
    )
    assert re.search(
        r"select +fits: .*\n +prefill +fits: .*\n +decode +fits: .*\n +update selector +fits: .*\n"
        r" +learn +fits: ",
        said,
    )
