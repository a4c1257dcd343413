"""Mistakes in a config, its data or its folder: one sentence, exit code 2, nothing of an existing
run touched.
"""

import dataclasses
import functools
import re
import shutil

import graders
import helpers
import pytest

from jaxrft import cli, config
from jaxrft.config import Config, LoRAConfig, MeshConfig, ReplayConfig, SelectConfig, TasksConfig
from jaxrft.lm.policy import check_length
from jaxrft.train.devices import open_mesh
from jaxrft.train.loop import train
from jaxrft.types import InputError


def rows(**changes):
    return [row | changes for row in helpers.task_rows()]


def tasks(folder, entries, **options):
    return TasksConfig(source=helpers.write_rows(folder / "tasks.jsonl", entries), **options)


def policy(folder, **options):
    (folder / "policy").mkdir()
    return helpers.write_policy(folder / "policy", **options)


def adapters(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return str(folder / "adapter")


def in_the_way(folder):
    (folder / "file").write_text("kept")
    return str(folder / "file" / "run")


REFERENCES = {"pass_rate_columns": ("weak", "strong")}
SMALL = helpers.SHAPE._replace(intermediate_size=16)
# What is wrong; changes of a config that works, from an empty folder; what the sentence says.
MISTAKES = {
    "no such data file": (
        lambda d: {"tasks": TasksConfig(source=str(d / "tasks.json1"))},
        "tasks.json1",
    ),
    "no such model": (lambda d: {"model": str(d / "nowhere")}, "no folder .*nowhere"),
    "no such model on the hub": (
        lambda d: {"model": "owner/nowhere"},
        "run `hf download owner/nowhere` where there is",
    ),
    "missing prompts": (
        lambda d: {"tasks": tasks(d, [{"text": "1"}] * 16)},
        "no column prompt, only text",
    ),
    "missing reference": (
        lambda d: {"tasks": tasks(d, rows(), pass_rate_columns=("week",))},
        "week.*did you mean weak",
    ),
    "missing ground truth": (
        lambda d: {"tasks": tasks(d, [{"prompt": "1", "weak": 0.5}] * 16), "rewards": ("exact",)},
        "exact needs ground truths .*answer_column",
    ),
    "no task": (lambda d: {"tasks": tasks(d, [])}, "holds no tasks"),
    "pass rate 1.2": (
        lambda d: {"tasks": tasks(d, rows(strong=1.2), **REFERENCES)},
        "row 1, column strong is 1.2.*0, 1",
    ),
    "bots without reference": (lambda d: {"tasks": tasks(d, rows())}, "reference"),
    "prompts too long": (lambda d: {"max_prompt_length": 2}, "no prompt of tasks is short enough"),
    "too few tasks": (
        lambda d: {"tasks": tasks(d, rows()[:7], **REFERENCES)},
        "batch_size is 8 but there are 7 tasks",
    ),
    "tokenizer without EOS": (
        lambda d: {"model": policy(d, eos=None)},
        "no token that ends a completion",
    ),
    "adapters larger than the model": (
        lambda d: {"lora": LoRAConfig(rank=10**9)},
        "lora.rank is 1,000,000,000: it must be at most 16, the hidden_size of ",
    ),
    "replay larger than memory": (
        lambda d: {"tasks": tasks(d, rows(), **REFERENCES), "replay": ReplayConfig(10**9)},
        "replay.capacity is 1,000,000,000: its groups take [0-9,.]+ GiB of each device, which "
        "has [0-9,.]+ GiB; lower",
    ),
    "selector out of range": (
        lambda d: {"select": SelectConfig("bots", decay=2.0)},
        "decay is 2.0: it must be",
    ),
    "adapters instead of a model": (
        lambda d: {"model": adapters(d)},
        "adapter holds adapters only: give",
    ),
    "longer than the model": (
        lambda d: {"model": policy(d, max_position_embeddings=67)},
        "max_prompt_length 64 . max_completion_length 4 is 68, but .*policy has "
        "max_position_embeddings 67: lower",
    ),
    "folder that cannot be written": (
        lambda d: {"output_dir": in_the_way(d)},
        "cannot write to output_dir",
    ),
    "folder in a bucket": (
        lambda d: {"output_dir": "gs://bucket/run"},
        "output_dir gs://bucket/run is a URL",
    ),
    "num_generations 1": (
        lambda d: {"num_generations": 1},
        "num_generations is 1: it must be at least 2",
    ),
    "unknown reward": (
        lambda d: {"rewards": ("exakt",)},
        "no reward is named 'exakt': did you mean exact?",
    ),
    "unknown module": (lambda d: {"rewards": ("nowhere:reward",)}, "nowhere"),
    "unknown selector": (lambda d: {"select": SelectConfig(name="bot")}, "no selector 'bot'.*bots"),
    "mesh": (lambda d: {"mesh": MeshConfig(data=3)}, "data=3.*8 devices"),
    "mesh and model": (
        lambda d: {"mesh": MeshConfig(data=2, model=4)},
        "num_key_value_heads 2 does not divide",
    ),
    "batch and mesh": (lambda d: {"batch_size": 6}, "batch_size 6 does not divide"),
    "micro_batch_size": (lambda d: {"micro_batch_size": 12}, "micro_batch_size is 12"),
    "success outside [0, 1]": (
        lambda d: {"rewards": ("graders:three",)},
        "graders:three gave 3.*--success-reward exact",
    ),
    "broken grader": (
        lambda d: {"rewards": ("graders:broken",)},
        r"no completion .* got a "
        r"reward \(32 error\)",
    ),
}


def refused(arguments, capsys):
    """The one sentence that a command ends with, whatever it warned of before."""
    code = cli.main(arguments)
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert code == 2 and last.startswith("jaxrft: error: ") and said.count("jaxrft: error: ") == 1
    assert "Traceback" not in said
    return last


@pytest.fixture
def attempt(configure, tmp_path, capsys):
    """Runs `jaxrft train` on changes of a config that works."""

    def run(*flags, **changes):
        path = helpers.write_config(tmp_path / "config.py", configure(tmp_path / "run"), **changes)
        return refused(["train", path, *flags], capsys)

    return run


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, attempt, tmp_path):
    make_changes, wanted = MISTAKES[mistake]
    assert re.search(wanted, attempt(**make_changes(tmp_path)))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("make_changes", "wanted"),
    [
        (lambda d: {"resume": "never"}, "holds a run already"),
        (
            lambda d: {"model": policy(d, shape=SMALL)},
            "model's intermediate_size is 32, this run's is 16",
        ),
        (
            lambda d: {"select": SelectConfig(name="uniform")},
            "its select.name is 'bots', this run's is 'uniform'",
        ),
        (
            lambda d: {"seed": 1},
            "its seed is 0, this run's is 1; choose another output_dir, or the config it was made",
        ),
        (lambda d: {"model": policy(d, spread=0.3)}, "its digest of the model's parameters is "),
        (
            lambda d: {"tasks": tasks(d, rows()[:15], **REFERENCES)},
            "number of tasks is 16, this run's is 15",
        ),
        (lambda d: {"tasks": tasks(d, rows()[::-1], **REFERENCES)}, "digest of the tasks"),
        (
            lambda d: {"tasks": tasks(d, rows(answer="7"), **REFERENCES)},
            "digest of the ground truths",
        ),
        (
            lambda d: {"tasks": tasks(d, rows(weak=0.1), **REFERENCES)},
            "digest of the reference pass rates",
        ),
        (lambda d: {"tasks": tasks(d, [], **REFERENCES)}, "holds no tasks"),
        (lambda d: {"model": str(d / "nowhere")}, "no folder"),
        (lambda d: {"steps": 9, "rewards": ("graders:three",)}, "gave 3"),
        (lambda d: {"steps": 9, "rewards": ("graders:broken",)}, "no completion"),
    ],
)
def test_a_mistake_leaves_an_existing_run_as_it_was(make_changes, wanted, attempt, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    before = helpers.contents(tmp_path / "run")
    assert re.search(wanted, attempt(**make_changes(tmp_path)))
    assert helpers.contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["trian"], "no command 'trian'"),
        (["train"], "no config given"),
        (["train", "nowhere.py"], "no config file nowhere.py"),
        (["eval", "nowhere.py"], "no config file nowhere.py"),
    ],
)
def test_a_mistake_in_the_command(arguments, wanted, capsys):
    assert wanted in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--stepz", "3"], "Unrecognized options: --stepz.* Perhaps you meant: --steps"),
        (["--select.dekay", "0.1"], "--select.dekay.* Perhaps you meant: --select.decay"),
        (
            ["--tasks.0.source", "a.jsonl"],
            "Unrecognized options: --tasks.0.source.* Perhaps you meant: .*--tasks.source",
        ),
        (["--steps", "many"], "parsing --steps.*'many'"),
        (
            ["--resume", "sometimes"],
            "choice 'sometimes' for argument '--resume'. Expected one of .'auto', 'never'.",
        ),
    ],
)
def test_a_mistake_in_a_flag_is_answered_by_the_parser(flags, wanted, configure, capsys, tmp_path):
    path = helpers.write_config(tmp_path / "config.py", configure(tmp_path / "run"))
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", path, *flags])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert exit.value.code == 2 and re.search(wanted, said) and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--checkpoint-steps", "--save-steps"),
        ("--lr=1e-5", "--learning-rate"),
        ("--kl_loss_coef", "--kl-coef"),
    ],
)
def test_a_flag_by_the_name_of_another_trainer_is_answered_with_its_name_here(flag, field, attempt):
    said = attempt(flag, "4")
    assert f"there is no flag {flag.partition('=')[0]}: did you mean {field}?" in said


def test_names_of_other_trainers_stand_for_fields():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(config.OTHER_NAMES.values()) <= fields
    assert not config.OTHER_NAMES.keys() & fields


def test_a_mistake_in_the_value_of_a_flag_is_one_sentence(attempt):
    assert "error: num_generations is 1: it must be at least 2" in attempt("--num-generations", "1")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("config = 3", "defines no `config = Config"),
        (
            "from jaxrft.config import *\nconfig = Config(model='a', tasks=TasksConfig(), "
            "output='b')",
            "output_dir",
        ),
        ("config = ", "invalid syntax"),
        ("steps = 3\nconfig = stepz", "config.py, line 2: NameError: name 'stepz' is not defined"),
    ],
)
def test_a_mistake_in_a_config_file(text, wanted, capsys, tmp_path):
    (tmp_path / "config.py").write_text(text)
    assert wanted in refused(["train", str(tmp_path / "config.py")], capsys)


def test_a_model_may_be_used_to_its_full_length(configure, tmp_path):
    config = configure(tmp_path)  # 64 + 4 tokens
    check_length(config, 68)
    check_length(config, None)
    with pytest.raises(InputError, match="max_position_embeddings 67"):
        check_length(config, 67)


@pytest.mark.parametrize(
    "reward",
    [
        functools.partial(graders.zero),
        3,
        "math",
        [graders.zero],
        {},
        {"zero": 3},
        {1: graders.zero},
    ],
    ids=lambda reward: type(reward).__name__,
)
def test_a_reward_that_is_no_function(reward, configure, tmp_path):
    with pytest.raises(InputError, match=re.escape(f"reward is {reward!r}: give a function")):
        train(configure(tmp_path / "run"), reward=reward)


def test_distributed_without_a_coordinator_is_refused(configure, tmp_path):
    path = helpers.write_config(tmp_path / "config.py", configure(tmp_path / "run"))
    code, _, said = helpers.jaxrft("train", path, "--distributed")
    assert code == 2 and "Traceback" not in said
    wanted = (
        "JAX_COORDINATOR_ADDRESS is None, JAX_NUM_PROCESSES None and JAX_PROCESS_ID None "
        ".*: set them to"
    )
    assert re.search(f"jaxrft: error: .*{wanted}", said)


@pytest.mark.parametrize(("count", "index"), [("two", "0"), ("2", "first")])
def test_processes_that_are_not_counted(count, index, configure, monkeypatch, tmp_path):
    values = {
        "JAX_COORDINATOR_ADDRESS": "localhost:1234",
        "JAX_NUM_PROCESSES": count,
        "JAX_PROCESS_ID": index,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError,
        match=f"is localhost:1234, JAX_NUM_PROCESSES {count} and JAX_PROCESS_ID {index} ",
    ):
        open_mesh(configure(tmp_path, distributed=True))
