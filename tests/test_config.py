import dataclasses
import inspect
import json
import math
import os
import re
from typing import get_args

import pytest

from jaxrft import config as configs
from jaxrft import mesh as meshes
from jaxrft.config import (
    Config,
    EvalConfig,
    LoRAConfig,
    MeshConfig,
    ReplayConfig,
    SelectConfig,
    TasksConfig,
)
from jaxrft.learn import grpo, replay, reward_shaping, update
from jaxrft.lm import model, rollout, sampling
from jaxrft.rewards.pool import Pool
from jaxrft.select import selectors, topk, uniform
from jaxrft.types import InputError


def make(**changes):
    return Config(
        **{"model": "policy", "tasks": TasksConfig("tasks.jsonl"), "output_dir": "run"} | changes
    )


# field, a value out of its range, what the message says beside them
OUT_OF_RANGE = [
    *(
        (name, 0, "at least 1")
        for name in ("steps", "batch_size", "max_prompt_length", "max_completion_length")
    ),
    *(
        (name, 0, "at least 1")
        for name in ("num_iterations", "keep_checkpoints", "save_steps", "reward_workers")
    ),
    *(
        (name, -1, "0 or more")
        for name in ("top_k", "warmup_steps", "eval_steps", "seed", "log_completions_steps")
    ),
    *((name, -0.5, "0 or more") for name in ("kl_coef", "learning_rate", "weight_decay")),
    ("learning_rate", float("nan"), "a finite number"),
    ("num_generations", 1, "at least 2, because an advantage compares the samples of a task"),
    ("temperature", 0.0, "positive; evaluation is greedy by itself"),
    ("top_p", 0.0, "in (0, 1]"),
    ("top_p", 1.1, "in (0, 1]"),
    ("min_p", -0.1, "in [0, 1]"),
    ("min_p", 1.1, "in [0, 1]"),
    ("stop", ("Question:", ""), "texts of at least one character; leave the empty one out"),
    ("repetition_penalty", 0.0, "in [0.001, 1000]; 1 = off"),
    ("epsilon", 0.0, "in (0, 1)"),
    ("epsilon", 1.0, "in (0, 1)"),
    ("epsilon_high", 0.0, "positive"),
    ("delta", 1.2, "above 1 + epsilon_high, 1.2"),
    ("entropy_coef", -0.5, "0 or more"),
    ("overlong_buffer", -1, "in tokens, from 0 to max_completion_length 1024"),
    ("overlong_buffer", 1025, "in tokens, from 0 to max_completion_length 1024"),
    ("overlong_penalty", -1.0, "0 or more"),
    ("importance_sampling_correction", "row", "one of none, token, sequence"),
    ("importance_sampling_cap", 0.0, "positive"),
    ("importance_sampling_mode", "drop", "one of truncate, mask"),
    ("importance_sampling_mode", "mask", "truncate while importance_sampling_correction is none"),
    ("kl_estimator", "k1", "one of k3, k3_corrected"),
    ("kl_estimator", "k3_corrected", "k3 while kl_coef is 0"),
    ("max_grad_norm", 0.0, "positive"),
    ("reward_timeout", 0.0, "positive, in seconds"),
    ("rewards", (), "at least one reward"),
    ("reward_weights", (1.0, 2.0), "one for each reward"),
    ("success_reward", "exact", "one of the rewards math"),
    ("mini_batch_size", 0, "a divisor of batch_size 32"),
    ("mini_batch_size", 5, "a divisor of batch_size 32"),
    ("micro_batch_size", 0, "a divisor of a mini-batch's 256"),
    ("micro_batch_size", 96, "a divisor of a mini-batch's 256"),
    ("dtype", "float16", "one of float32, bfloat16"),
    ("loss_type", "ppo", "one of grpo, dapo, dr_grpo, gspo, cispo"),
    ("scale_rewards", "tasks", "one of group, batch, none"),
    ("resume", "always", "one of auto, never"),
    ("chat_template_date", "", "a date such as 2025-01-31"),
    ("chat_template_date", "20250131", "a date such as 2025-01-31"),
    ("chat_template_date", "2025-02-30", "a date such as 2025-01-31"),
    ("chat_template_date", "31 Jan 2025", "a date such as 2025-01-31"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused(name, value, wanted):
    with pytest.raises(InputError) as error:
        make(**{name: value})
    assert str(error.value).startswith(f"{name} is {value!r}: it must be ") and wanted in str(
        error.value
    )


def test_stop_strings_are_few():
    with pytest.raises(InputError, match="at most 1,024 bytes of UTF-8 in all, not 1,200"):
        make(stop=("é" * 300, "ä" * 300))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "",
            r"is '': it must be a JSON object such as {\"enable_thinking\": false}, but it is "
            r"empty",
        ),
        ("enable_thinking=False", "but it is not JSON"),
        ("[1]", "but it holds a list"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"tokenize": true}', "tokenize is set by jaxrft: leave it out"),
        ('{"messages": []}', "messages is set by jaxrft: leave it out"),
        ('{"documents": 5}', "documents must be a list of objects"),
        (
            {"enable_thinking": False},
            "is a dict: it must be JSON text, '{\"enable_thinking\": false}'",
        ),
        (5, "is 5: it must be of type str"),
    ],
)
def test_variables_for_chat_templates_are_json(value, said):
    with pytest.raises(InputError, match=f"^chat_template_kwargs .*{said}"):
        make(chat_template_kwargs=value)
    assert make(chat_template_kwargs='{"enable_thinking": false, "tools": [{"name": "add"}]}')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model is 3: it must be of type str"),
        (
            {"tasks": None},
            "tasks is None: it must be of type TasksConfig | tuple[TasksConfig, ...]",
        ),
        ({"tasks": [TasksConfig("a")]}, "it must be of type TasksConfig | tuple[TasksConfig, ...]"),
        (
            {"tasks": (TasksConfig("a"), TasksConfig("b", limit="3"))},
            "tasks[1].limit is '3': it must be of type int",
        ),
        ({"tasks": TasksConfig(None)}, "tasks.source is None: it must be of type str"),
        ({"steps": "3"}, "steps is '3': it must be of type int"),
        ({"steps": 3.0}, "steps is 3.0: it must be of type int"),
        ({"steps": True}, "steps is True: it must be of type int"),
        ({"top_p": False}, "top_p is False: it must be of type float"),
        ({"distributed": 1}, "distributed is 1: it must be of type bool"),
        ({"epsilon_high": "0.3"}, "epsilon_high is '0.3': it must be of type float | None"),
        (
            {"rewards": "math"},
            "rewards is 'math': it must be of type tuple[str, ...], such as ('math',)",
        ),
        (
            {"rewards": ["math"]},
            "rewards is ['math']: it must be of type tuple[str, ...], such as ('math',)",
        ),
        ({"rewards": ("math", max)}, f"rewards[1] is {max!r}: it must be of type str"),
        (
            {"reward_weights": 1.0},
            "reward_weights is 1.0: it must be of type tuple[float, ...] | None",
        ),
        (
            {"select": SelectConfig(prior=(1.0,))},
            "select.prior is (1.0,): it must be of type tuple[float, float]",
        ),
        (
            {"select": SelectConfig(prior=(1, "1"))},
            "select.prior[1] is '1': it must be of type float",
        ),
        (
            {"select": SelectConfig(order="none")},
            "order is 'none': it must be one of shuffled, replacement, sequent",
        ),
        ({"mesh": MeshConfig(model=2.0)}, "mesh.model is 2.0: it must be of type int"),
        (
            {"lora": LoRAConfig(targets=("q", "qkv"))},
            "lora.targets[1] is 'qkv': it must be one of q, k, v, o, gate, ",
        ),
        (
            {"evaluation": EvalConfig(TasksConfig("a"))},
            "it must be of type tuple[TasksConfig, ...], such as (TasksConfig(",
        ),
        (
            {"evaluation": EvalConfig((TasksConfig("a"), TasksConfig("b", limit="3")))},
            "evaluation.tasks[1].limit is '3': it must be of type int | None",
        ),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make(**changes)


def test_an_int_is_a_float():
    assert (
        make(
            temperature=1, epsilon_high=1, reward_weights=(1,), select=SelectConfig(prior=(1, 1))
        ).temperature
        == 1
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_samples": -1}, "evaluation.num_samples is -1: it must be 0 or more"),
        ({"batch_size": 0}, "evaluation.batch_size is 0: it must be at least 1"),
        ({"temperature": 0.0}, "evaluation.temperature is 0.0: it must be at least 1e-06; eval"),
        ({"top_p": 0.0}, "evaluation.top_p is 0.0: it must be in "),
        ({"stop": ("",)}, "evaluation.stop is .'',.: it must be texts of at least one character"),
        ({"min_p": 2.0}, "evaluation.min_p is 2.0: it must be in "),
        ({"repetition_penalty": -1.0}, "evaluation.repetition_penalty is -1.0: it must be in "),
        ({"max_completion_length": 0}, "evaluation.max_completion_length is 0: it must be at"),
    ],
)
def test_an_evaluation_out_of_range_is_refused(changes, wanted):
    with pytest.raises(InputError, match=wanted):
        make(evaluation=EvalConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rank": -1}, "lora.rank is -1: it must be 0 or more"),
        ({"alpha": 0.0}, "lora.alpha is 0.0: it must be positive"),
        (
            {"targets": ("q",)},
            r"lora.targets is \('q',\): it must be left as it is while lora.rank is 0, which "
            r"finetun",
        ),
        ({"targets": ()}, r"lora.targets is \(\): it must be at least one weight"),
    ],
)
def test_adapters_out_of_range_are_refused(changes, wanted):
    with pytest.raises(InputError, match=wanted):
        make(lora=LoRAConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"capacity": -1}, "replay.capacity is -1: it must be 0 or more"),
        (
            {"capacity": 15},
            "replay.capacity is 15: it must be at least 16, the groups that a step draws",
        ),
        (
            {"capacity": 64, "fresh_fraction": 0.0},
            "replay.fresh_fraction is 0.0: it must be such that at least one of",
        ),
        ({"capacity": 64, "fresh_fraction": 1.0}, "batch_size 32 tasks is fresh and one replayed"),
        ({"capacity": 64, "max_age": 0}, "replay.max_age is 0: it must be at least 1 step"),
    ],
)
def test_a_replay_out_of_range_is_refused(changes, wanted):
    with pytest.raises(InputError, match=wanted):
        make(replay=ReplayConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"eval_steps": 0},
            "keep_best is 'test/greedy' but eval_steps is 0, never: set eval_steps too",
        ),
        (
            {"keep_best": "test/avg@8"},
            "it must be a metric of the evaluations, test/greedy, test/avg@4, test/pass@4",
        ),
        ({"evaluation": EvalConfig()}, "evaluations, none without evaluation.tasks"),
    ],
)
def test_keep_best_needs_a_metric_of_the_evaluations(changes, wanted):
    held_out = EvalConfig((TasksConfig("test.jsonl"),), num_samples=4)
    settings = {"keep_best": "test/greedy", "evaluation": held_out, "eval_steps": 5}
    assert make(**settings).keep_best == "test/greedy"
    with pytest.raises(InputError, match=wanted):
        make(**settings | changes)


def test_a_step_rolls_out_all_tasks_unless_there_is_a_replay():
    assert (
        make().fresh_batch_size
        == make(replay=ReplayConfig(fresh_fraction=0.25)).fresh_batch_size
        == 32
    )
    assert make(replay=ReplayConfig(capacity=64, fresh_fraction=0.25)).fresh_batch_size == 8


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"tasks": ()}, "tasks is (): give at least one set of tasks"),
        (
            {"tasks": (TasksConfig("x/a.jsonl"), TasksConfig("y/a.parquet"))},
            "two sets of tasks are called 'a': give each a `name` of its own",
        ),
        (
            {"evaluation": EvalConfig((TasksConfig("a.jsonl"), TasksConfig("b.jsonl", name="a")))},
            "two sets of evaluation.tasks are called 'a'",
        ),
        (
            {"evaluation": EvalConfig((TasksConfig("a.jsonl", weight=1.0),))},
            "the held-out set a has a weight: only sets that are trained on have one",
        ),
        (
            {"tasks": TasksConfig("a.jsonl", weight=0.0)},
            "the weight of a is 0.0: it must be positive",
        ),
        (
            {"tasks": TasksConfig("a.jsonl", weight=math.inf)},
            "tasks.weight is inf: it must be a finite number",
        ),
        (
            {"tasks": (TasksConfig("a.jsonl", weight=1), TasksConfig("b.jsonl"))},
            "b has no weight but other sets of tasks have: give one to all of them or to none",
        ),
    ],
    ids=str,
)
def test_sets_that_make_no_mixture_are_refused(changes, wanted):
    with pytest.raises(InputError, match=re.escape(wanted)):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"min_learning_rate_ratio": 0.1},
            "it must be left as it is while learning_rate_schedule is constant: set that too",
        ),
        (
            {"min_learning_rate_ratio": 1.5, "learning_rate_schedule": "linear"},
            "min_learning_rate_ratio is 1.5: it must be in [0, 1]",
        ),
        (
            {"warmup_steps": 100, "learning_rate_schedule": "cosine"},
            "warmup_steps is 100: it must be less than the 100 updates of the run",
        ),
        (
            {"learning_rate_schedule": "step"},
            "learning_rate_schedule is 'step': it must be one of constant, linear, cosine",
        ),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_is_refused(changes, wanted):
    with pytest.raises(InputError, match=re.escape(wanted)):
        make(**changes)


def test_updates_of_a_run_are_those_of_its_mini_batches():
    config = make(steps=5, batch_size=8, mini_batch_size=2, num_iterations=3)
    assert (config.updates_per_step, config.num_updates) == (12, 60)


def test_one_set_or_several():
    a, b = TasksConfig("a.jsonl"), TasksConfig("b.jsonl")
    assert make(tasks=a).task_sets == (a,) and make(tasks=(a, b)).task_sets == (a, b)


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("data/gsm8k.train.jsonl", "gsm8k.train"),
        ("builtin:digits", "digits"),
        ("tfds:gsm8k", "gsm8k"),
        ("tfds:math/algebra:1.0.0", "math"),
        ("hub:openai/gsm8k", "gsm8k"),
    ],
)
def test_a_set_is_called_after_its_source_or_as_it_says(source, title):
    assert TasksConfig(source).title == title and TasksConfig(source, name="mine").title == "mine"


def test_the_two_sided_clip_has_no_place_in_cispo():
    with pytest.raises(InputError, match="delta is 4.0: it must be None with cispo"):
        make(delta=4.0, loss_type="cispo")
    with pytest.raises(InputError, match="delta is 4.0: it must be above 1 . epsilon_high, 5"):
        make(delta=4.0, epsilon_high=4.0)


def test_the_edges_of_the_ranges_are_allowed():
    make(
        steps=1,
        batch_size=1,
        num_generations=2,
        top_k=0,
        top_p=1.0,
        learning_rate=0.0,
        seed=0,
        save_steps=1,
    )
    make(mini_batch_size=8, micro_batch_size=4, evaluation=EvalConfig(num_samples=0, batch_size=1))
    make(
        rewards=("math", "exact"),
        reward_weights=(1.0, 0.2),
        success_reward="exact",
        epsilon_high=1.5,
        delta=2.6,
    )
    make(max_completion_length=8, overlong_buffer=8, overlong_penalty=0.0, entropy_coef=0.0)


@pytest.mark.parametrize("generations, rows", [(6, 4), (4, 6)])
def test_a_micro_batch_holds_whole_groups_or_a_part_of_one(generations, rows):
    """12 rows are divisible by both, but neither divides the other."""
    with pytest.raises(
        InputError,
        match=f"micro_batch_size is {rows}: .* multiple of num_generations {generations}",
    ):
        make(batch_size=12 // generations, num_generations=generations, micro_batch_size=rows)


def test_sizes_that_are_not_given():
    config = make(batch_size=8, num_generations=4)
    assert (config.tasks_per_update, config.rows_per_micro_batch, config.eval_batch_size) == (
        8,
        32,
        8,
    )
    config = make(
        batch_size=8, num_generations=4, mini_batch_size=2, evaluation=EvalConfig(batch_size=3)
    )
    assert (config.tasks_per_update, config.rows_per_micro_batch, config.eval_batch_size) == (
        2,
        8,
        3,
    )
    assert make(micro_batch_size=16).rows_per_micro_batch == 16


GOOD = """
from jaxrft.config import Config, SelectConfig, TasksConfig
config = Config("policy", TasksConfig("tasks.jsonl"), "run", seed=3, select=SelectConfig(decay=0.2))
"""


def write(tmp_path, text, name="experiment.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_load(tmp_path):
    assert configs.load(write(tmp_path, GOOD)) == make(seed=3, select=SelectConfig(decay=0.2))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seed=", "sed=", "experiment.py, line 3: .*'sed'.*; did you mean seed?"),
        ("seed=3", "batchsize=3", "'batchsize'.*; did you mean batch_size?"),
        ("decay=", "decy=", "'decy'.*; did you mean decay?"),
        (
            "decay=",
            "measured=",
            "'measured'; the oracle is a measurement now, benchmarks/_oracle.py: leave the "
            "field out",
        ),
        ("decay=", "probe_every=", "'probe_every'; its name is reference_every now"),
        ('TasksConfig("tasks.jsonl")', 'TasksConfig(sorce="x")', "'sorce'.*; did you mean source?"),
        ("seed=3", "zzzzzz=3", "'zzzzzz'"),
        ("seed=3", "seed=-3", "experiment.py, line 3: seed is -3: it must be 0 or more"),
        ("seed=3", "seed=three", "experiment.py, line 3: NameError: name 'three' is not defined"),
        ("seed=3", "seed=3 // 0", "experiment.py, line 3: ZeroDivisionError: "),
        ("seed=3", "seed=int('x')", "experiment.py, line 3: ValueError: invalid literal"),
        ("seed=3", "seed=max(*[int])", "experiment.py, line 3: TypeError: "),
        ('"run", ', "", "output_dir"),  # a required field is missing
        ("config =", "settings =", r"defines no `config = Config\(...\)`"),
        ("config = Config(", "config = dict(a=(", "experiment.py: SyntaxError: .*line 3"),
        ("SelectConfig, ", "SelectConfg, ", "SelectConfg"),
    ],
)
def test_a_config_that_does_not_load_says_why(tmp_path, before, after, message):
    text = GOOD.replace(before, after)
    assert text != GOOD
    with pytest.raises(InputError, match=message):
        configs.load(write(tmp_path, text))


def test_other_files_than_configs_are_refused(tmp_path):
    with pytest.raises(InputError, match="no config file .*absent.py: give the path"):
        configs.load(str(tmp_path / "absent.py"))
    with pytest.raises(InputError, match="experiment.toml is not a Python file"):
        configs.load(write(tmp_path, GOOD, "experiment.toml"))
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", "{}", "config.json")
    with pytest.raises(InputError, match="; the config of that run is .*/run/config.json"):
        configs.load(str(tmp_path / "run"))


YAML = """
model: policy
tasks: {source: tasks.jsonl, limit: 8}
output_dir: run
learning_rate: 1e-6          # no text, as YAML 1.1 has it
chat_template_date: 2025-01-31
seed: 3
rewards: [math, exact]
select:
  name: adaptive
  balance: none
replay.capacity: 4
evaluation:
  tasks:
    - source: a.jsonl
    - {source: b.jsonl, name: "010"}
"""


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_yaml_file_is_a_config(tmp_path, suffix):
    text = YAML.replace("replay.capacity: 4\n", "replay: {capacity: 64, fresh_fraction: 0.5}\n")
    assert configs.load(write(tmp_path, text, f"run.{suffix}")) == make(
        tasks=TasksConfig("tasks.jsonl", limit=8),
        learning_rate=1e-6,
        chat_template_date="2025-01-31",
        seed=3,
        rewards=("math", "exact"),
        select=SelectConfig("adaptive"),
        replay=ReplayConfig(capacity=64),
        evaluation=EvalConfig((TasksConfig("a.jsonl"), TasksConfig("b.jsonl", name="010"))),
    )


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
def test_the_config_json_of_a_run_is_a_config(tmp_path, name):
    config = make(
        tasks=(TasksConfig("a.jsonl", weight=0.5), TasksConfig("b.jsonl", weight=1.0)),
        lora=LoRAConfig(rank=4, targets=("q", "v")),
        select=SelectConfig(prior=(1.0, 2.0)),
        reward_weights=(2.0,),
        mesh=MeshConfig(model=2),
        learning_rate=3e-7,
    )
    assert configs.load(write(tmp_path, configs.to_json(config), name)) == config


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seed: 3", "sed: 3", "run.yaml is no config: sed is 3, but .* did you mean seed?"),
        ("balance: none", "balanse: none", "select.balanse is 'none', but .* mean balance?"),
        ("name: adaptive", "measured: 1", "select.measured is 1, .*benchmarks/_oracle.py: leave"),
        ("source: a.jsonl", "sauce: a", r"evaluation.tasks\[0\].sauce is 'a', .* mean source?"),
        ("replay.capacity: 4", "zzzzz: 4", "zzzzz is 4, .* known: it is one of model, tasks"),
        ("model: policy", "# none", "run.yaml is no config: model is missing: give it"),
        ("seed: 3", "seed: three", "seed is 'three': it must be of type int"),
        ("seed: 3", "seed: 010", "seed is '010': it must be of type int"),
        ("seed: 3", "seed: true", "seed is True: it must be of type int"),
        ("seed: 3", "seed: -3", "seed is -3: it must be 0 or more"),
        ("seed: 3", "steps:", "steps is None: it must be of type int"),
        ("rewards: [math, exact]", "rewards: math", r"rewards is 'math': .* such as \[math\]"),
        ("rewards: [math, exact]", "rewards: [1]", r"rewards\[0\] is 1: it must be of type str"),
        ("{source: tasks.jsonl, limit: 8}", "a.jsonl", "tasks is 'a.jsonl': .* as tasks.source"),
        ("limit: 8", "limit: x", "tasks.limit is 'x': it must be of type int | None"),
        (
            "model: policy",
            "model: policy\nmodel: b",
            "line 3, column 1: the key model stands twice",
        ),
        ("seed: 3", "seed: [3", "run.yaml cannot be read: it is not YAML .line "),
        (YAML, "- 1\n", "run.yaml cannot be read: it is no mapping of fields"),
        (YAML, "", "run.yaml cannot be read: it is no mapping of fields"),
        (YAML, "!!python/name:os.system x", "run.yaml cannot be read: it is not YAML .line 1"),
    ],
)
def test_a_mistake_in_a_yaml_file_is_one_sentence(tmp_path, before, after, message):
    text = YAML.replace(before, after)
    if after != "zzzzz: 4":
        text = text.replace("replay.capacity: 4\n", "")
    assert text != YAML
    with pytest.raises(InputError, match=message) as raised:
        configs.load(write(tmp_path, text, "run.yaml"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": "m"', "run.json cannot be read: it is not JSON"),
        ("[1]", "run.json cannot be read: it holds a list, not an object"),
        ('{"replay": {"clip": "paper"}}', "run.json is no config: model is missing"),
    ],
)
def test_a_mistake_in_a_json_file_is_one_sentence(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        configs.load(write(tmp_path, text, "run.json"))


def test_a_field_of_an_earlier_version_has_its_name_of_today(tmp_path):
    tree = json.loads(configs.to_json(make())) | {"select": {"probe_every": 3}}
    loaded = configs.load(write(tmp_path, json.dumps(tree), "run.json"))
    assert loaded.select.reference_every == 3


def test_differences_lists_fields_that_differ():
    config = make(evaluation=EvalConfig((TasksConfig("held.jsonl"),)), rewards=("math", "exact"))
    saved = json.loads(configs.to_json(config))
    assert saved["evaluation"]["tasks"][0]["source"] == "held.jsonl"
    assert configs.differences(config, saved) == {}
    changed = dataclasses.replace(config, seed=4, select=SelectConfig(rho=0.3), rewards=("math",))
    assert configs.differences(changed, saved) == {
        "seed": (4, 0),
        "select.rho": (0.3, 0.1),
        "rewards": (["math"], ["math", "exact"]),
    }
    del saved["seed"]
    saved["mesh"]["expert"] = 2
    assert configs.differences(config, saved) == {"seed": (0, None), "mesh.expert": (None, 2)}


def test_differences_compare_fields_that_an_earlier_version_lacked_with_their_defaults():
    held_out = EvalConfig((TasksConfig("held.jsonl"),))
    config = make(evaluation=held_out)
    saved = json.loads(configs.to_json(config))
    del saved["seed"], saved["rewards"], saved["evaluation"]["tasks"][0]["limit"]
    assert configs.differences(config, saved) == {}
    changed = dataclasses.replace(config, seed=4)
    assert configs.differences(changed, saved) == {"seed": (4, 0)}


def test_differences_compare_renamed_fields_under_their_new_names():
    saved = json.loads(configs.to_json(make()))
    saved["select"]["probe_every"] = saved["select"].pop("reference_every")
    del saved["replay"]["clip_center"]
    saved["replay"]["clip"] = "paper"
    assert configs.differences(make(), saved) == {"replay.clip_center": ("behavior", "paper")}


def defaults(kind):
    """Default values of a dataclass's fields."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


NAMESAKES = [
    (
        Config,
        rollout.Sampling,
        {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"},
    ),
    (Config, sampling.truncate, {"top_p", "top_k", "min_p"}),
    (Config, sampling.penalize, {"repetition_penalty"}),
    (Config, update.completion_logprobs, {"temperature"}),
    (
        Config,
        update.adamw,
        {"warmup_steps", "weight_decay", "max_grad_norm"}
        | {"learning_rate_schedule", "min_learning_rate_ratio"},
    ),
    (
        Config,
        update.make,
        {
            "num_iterations",
            "loss_type",
            "epsilon",
            "epsilon_high",
            "delta",
            "kl_coef",
            "entropy_coef",
            "temperature",
        }
        | {"learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "kl_estimator"}
        | {"learning_rate_schedule", "min_learning_rate_ratio"},
    ),
    (Config, grpo.advantages, {"scale_rewards"}),
    (Config, grpo.policy_loss, {"loss_type", "epsilon", "epsilon_high", "delta"}),
    (Config, grpo.importance_weights, {"importance_sampling_cap", "importance_sampling_mode"}),
    (Config, reward_shaping.overlong, {"overlong_penalty"}),
    (SelectConfig, selectors.uniform, {"order", "balance"}),
    (
        SelectConfig,
        selectors.bots,
        {"decay", "rho", "momentum", "target", "prior", "per_domain", "balance"},
    ),
    (
        SelectConfig,
        selectors.dots,
        {"num_references", "reference_every", "target", "temperature", "balance"},
    ),
    (MeshConfig, meshes.make, {"data", "fsdp", "model"}),
    (ReplayConfig, replay.ring, {"fresh_fraction", "max_age", "draw"}),
    (ReplayConfig, update.make, {"clip_center"}),
]


@pytest.mark.parametrize(
    ("kind", "function", "names"), NAMESAKES, ids=lambda x: getattr(x, "__name__", "")
)
def test_defaults_are_those_of_the_functions(kind, function, names):
    given = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.default is not p.empty
    }
    # The functions that reduce to a constant length take it only where it is needed.
    assert (given.keys() & defaults(kind).keys()) - {"max_completion_length"} == names
    assert {name: given[name] for name in names} == {name: defaults(kind)[name] for name in names}


def test_the_pool_waits_as_long_as_the_config_says():
    assert (
        inspect.signature(Pool).parameters["timeout"].default == defaults(Config)["reward_timeout"]
    )


def test_choices_are_those_of_the_functions():
    choices = {
        field.name: get_args(field.type)
        for kind in (Config, SelectConfig)
        for field in dataclasses.fields(kind)
    }
    assert choices["loss_type"] == tuple(grpo.LOSS_TYPES)
    assert choices["importance_sampling_correction"] == ("none", *grpo.CORRECTIONS)
    assert choices["scale_rewards"] == tuple(grpo.SCALES)
    assert choices["order"] == get_args(uniform.Order)
    assert choices["balance"] == get_args(topk.Balance)
    lora = model.LoRA(1, 1.0, LoRAConfig().targets)
    shape = model.ModelConfig(
        2, 2, 2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, lora=lora
    )
    matrices = [row for row in model.base(shape) if row.layered and row.transpose]
    assert [row.name for row in matrices] == list(lora.targets) and len(
        model.adapters(shape)
    ) == 2 * len(matrices)


def test_select_holds_the_union_of_the_selectors_fields():
    fields = {
        parameter.name
        for factory in selectors.SELECTORS.values()
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    of_the_predictor = {"calibration", "attention_temperature", "top_k"}  # its file says them
    assert defaults(SelectConfig).keys() == fields - of_the_predictor | {"name", "embeddings"}
    assert SelectConfig().name in selectors.SELECTORS


def test_a_changed_config_file_is_read_anew_and_leaves_no_bytecode(tmp_path, monkeypatch):
    """Two of one length within a second, which Python's own bytecode files do not tell apart."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    for seed in (3, 4):
        path = write(tmp_path, GOOD.replace("seed=3", f"seed={seed}"))
        os.utime(path, (0, 0))
        assert configs.load(path).seed == seed
    assert os.listdir(tmp_path) == [os.path.basename(path)]
