"""Values that no machine has, and paths with ~ and $NAME, in every field of every config and
command.
"""

import argparse
import ast
import dataclasses
import enum
import functools
import http
import importlib
import math
import pkgutil
import re
from decimal import Decimal
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

import jaxrft
from benchmarks import graders
from benchmarks._script import whole_number
from jaxrft import fields
from jaxrft import mesh as meshes
from jaxrft.config import Config, EvalConfig, LoRAConfig, ReplayConfig, SelectConfig, TasksConfig
from jaxrft.errors import InputError
from jaxrft.fields import Checked, FilePath, expand_path, path_argument
from jaxrft.prepare import dataset, embeddings, pass_rates, predictor
from jaxrft.select import selectors
from jaxrft.select.dots import training
from jaxrft.simulate import worlds
from jaxrft.simulate.command import SimulateConfig, simulate
from jaxrft.tasks import sources

ROOT = Path(jaxrft.__file__).parent
# Fields of text that name no file: columns, data sets, functions, selectors, metrics, templates'
# arguments.
NAMES = {
    *(
        "split",
        "subset",
        "name",
        "prompt_column",
        "answer_column",
        "pass_rate_columns",
        "domain_column",
        "suite",
        "reward",
    ),
    *(
        "stop",
        "system_prompt",
        "rewards",
        "success_reward",
        "keep_best",
        "selectors",
        "schedule",
        "topology",
    ),
    *("chat_template_kwargs", "chat_template_date"),
}
COMMANDS = {
    Config: {"model": "policy", "tasks": TasksConfig("tasks.jsonl"), "output_dir": "run"},
    SimulateConfig: {},
    pass_rates.Options: {"out": "rates.parquet"},
    embeddings.Options: {"out": "rows.safetensors"},
    predictor.Options: {"out": "predictor.safetensors"},
    predictor.ResponsesOptions: {"out": "predictor.safetensors", "responses": "answers.npz"},
    dataset.Options: {},
    graders.Options: {},
}


HELD_OUT = {"evaluation": EvalConfig((TasksConfig("held.jsonl"),))}
EVALUATED = HELD_OUT | {"eval_steps": 1, "keep_best": "held/greedy"}


def make(kind=Config, **changes):
    settings = COMMANDS[kind] | changes
    if "config" in {field.name for field in dataclasses.fields(kind)}:
        settings["config"] = make()
    return kind(**settings)


def roots():
    """All classes of options, of all modules."""
    for module in pkgutil.walk_packages(jaxrft.__path__, "jaxrft."):
        if module.name not in ("jaxrft.rewards.worker", "jaxrft.__main__"):
            importlib.import_module(module.name)
    waiting = Checked.__subclasses__()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        yield kind


def leaves(kind, prefix=()):
    """(path of names, field) of all that is no dataclass itself, in a dataclass; sets of tasks are
    entered once.
    """
    for field in dataclasses.fields(kind):
        path = (*prefix, field.name)
        inner = [
            each for each in (field.type, *get_args(field.type)) if dataclasses.is_dataclass(each)
        ]
        inner += [
            each
            for part in get_args(field.type)
            for each in get_args(part)
            if dataclasses.is_dataclass(each)
        ]
        if not inner:
            yield path, field
        elif inner[0] is not Config:
            yield from leaves(inner[0], path)


def changed(options, path, value):
    """The options with a value in place of another one, in a set of tasks where the path leads
    through some.
    """
    name, *rest = path
    if not rest:
        return dataclasses.replace(options, **{name: value})
    inner = getattr(options, name)
    if isinstance(inner, tuple):
        return dataclasses.replace(
            options, **{name: (changed(TasksConfig("held.jsonl"), rest, value),)}
        )
    if dataclasses.is_dataclass(inner):
        return dataclasses.replace(options, **{name: changed(inner, rest, value)})
    raise AssertionError(path)


def is_tuple(field):
    return "tuple[" in str(field.type)


def holds(field, kind):
    return kind in set(fields.leaf_types(field.type))


def title(value):
    return ".".join(value) if isinstance(value, tuple) else ""


CONFIG = [(path, field) for path, field in leaves(Config) if field.type is not bool]


def test_all_commands_hold_their_options_to_the_rules():
    """What `flags.parse` fills in is Checked, what argparse does is a path by `path_argument`."""
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            named = {key.arg: ast.unparse(key.value) for key in call.keywords}
            assert named.get("type") != "Path", f"{path}: type=path_argument"
            parsers = ("tyro.cli", "flags.parse")
            if ast.unparse(call.func) in parsers and path.name != "cli.py":
                module = importlib.import_module(
                    ".".join(("jaxrft", *path.relative_to(ROOT).with_suffix("").parts))
                )
                kind = attrgetter(ast.unparse(call.args[0]))(module)
                assert issubclass(kind, Checked), f"{path}: {kind.__name__} must be Checked"


@pytest.mark.parametrize(
    "kind", sorted(roots(), key=str), ids=lambda kind: f"{kind.__module__}.{kind.__name__}"
)
def test_every_text_is_a_path_or_known_to_be_none(kind, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("RUNS", "/data/runs")
    assert kind in COMMANDS or kind.__name__ in ("Output", "Options")
    for path, field in leaves(kind):
        text, is_path = holds(field, str), holds(field, fields._PATH)
        assert text <= (is_path or path[-1] in NAMES), (
            f"{'.'.join(path)}: annotate it FilePath, or name it in NAMES"
        )
        # which sets have not
        if is_path and kind in COMMANDS and path != ("evaluation", "tasks", "embeddings"):
            for value, wanted in (
                ("~/a", "/home/someone/a"),
                ("$RUNS/${RUNS}/b", "/data/runs//data/runs/b"),
            ):
                given, wanted = ((value,), (wanted,)) if is_tuple(field) else (value, wanted)
                found = changed(make(kind), path, given)
                for name in path:
                    found = getattr(found, name)
                    found = found[0] if isinstance(found, tuple) and name != path[-1] else found
                assert found == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("~", "/home/me"),
        ("~/a b", "/home/me/a b"),
        ("~root/x", f"{Path('~root').expanduser()}/x"),
        ("$HOME/runs/$NAME-1", "/home/me/runs/seven-1"),
        ("${NAME}s/${HOME}", "sevens//home/me"),
        ("a/~/b~", "a/~/b~"),  # as in a shell
        ("./~/$$NAME/$${NAME}", "./~/$NAME/${NAME}"),
        ("100$/5$", "100$/5$"),
        ("$TRICKY/x", "/with/$NAME/x"),  # a value is not read again
        ("hub:openai/gsm8k@main", "hub:openai/gsm8k@main"),
        ("tfds:~math/$NAME:1.0.0", "tfds:~math/$NAME:1.0.0"),
        ("builtin:digits", "builtin:digits"),
        ("Qwen/Qwen2.5-0.5B-Instruct@main", "Qwen/Qwen2.5-0.5B-Instruct@main"),
        ("日本/é", "日本/é"),
    ],
)
def test_paths_are_expanded(text, wanted, monkeypatch):
    for name, value in {"HOME": "/home/me", "NAME": "seven", "TRICKY": "/with/$NAME"}.items():
        monkeypatch.setenv(name, value)
    assert expand_path(text) == expand_path(expand_path(text)) == wanted
    config = make(model=text)
    assert config.model == dataclasses.replace(config, steps=3).model == wanted
    assert str(path_argument(text)) == str(Path(wanted))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "$NOWHERE/x",
            "output_dir is '$NOWHERE/x': set the environment variable NOWHERE, or write $$ for a $",
        ),
        ("${NOWHERE}", "output_dir is '${NOWHERE}': set the environment variable NOWHERE"),
        ("$EMPTY/x", "set the environment variable EMPTY"),
        ("${NOWHERE:-runs}", "write variables as $NAME or ${NAME}"),
        ("${NOWHERE", "write variables as $NAME or ${NAME}"),
        ("${}", "write variables as $NAME or ${NAME}"),
        (
            "~no-such-user/x",
            "~no-such-user is no user's home folder; write ./~no-such-user for a folder's name",
        ),
        ("", "output_dir is '': give the path of a file or folder"),
        ("a\0b", "output_dir is 'a\\x00b': take the NUL character out"),
        ("a\udc80b", "output_dir is 'a\\udc80b': it is not Unicode text"),
        ("x" * 5000, "...' (5002 characters): a name in a path has at most 255 bytes, shorten it"),
        ("é" * 128, "a name in a path has at most 255 bytes"),
        ("/x" * 2000, "a path has at most 3840 bytes, shorten it"),
        ("$LONG", "a name in a path has at most 255 bytes"),
        ("$SURROGATE", "it is not Unicode text"),
    ],
)
def test_a_bad_path_is_reported_in_one_sentence(text, wanted, monkeypatch):
    for name, value in {"EMPTY": "", "LONG": "x" * 300, "SURROGATE": "a\udc80"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        make(output_dir=text)
    assert wanted.replace("...' (", "... (") in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(argparse.ArgumentTypeError, match="the path is "):
        path_argument(text)


NO_FLOATS = (math.nan, math.inf, -math.inf, 1e39, -1e300, 1e-300, 10**400, 10**5000)
NO_INTS = (2**63, -(2**63), 10**30, 10**400, 10**5000, math.nan, math.inf)
NO_TEXTS = ("\0", "a\0b", "\ud800", "\udcff")


@pytest.mark.parametrize(
    ("path", "field"),
    CONFIG,
    ids=title,
)
def test_a_value_that_no_machine_has_is_refused_by_every_field(path, field):
    values = ("", "\0", 7)  # of a choice between words
    for kind, those in ((float, NO_FLOATS), (int, NO_INTS), (str, NO_TEXTS)):
        values = those if holds(field, kind) else values
    for value in values:
        with pytest.raises(InputError) as error:
            changed(make(), path, tuple([value] * 2) if is_tuple(field) else value)
        said = str(error.value)
        assert path[-1] in said and len(said) < 600 and ": " in said and "\n" not in said


@functools.cache
def trained_on_nothing():
    """Parameters for dots."""
    return training.initial(jax.random.key(0), 8, calibration="group_logit_temp", width=8, layers=1)


def through_the_door(config, path):
    """What a run checks before it allocates anything for the field."""
    if path[0] == "mesh":
        meshes.abstract(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    if path[0] == "select":
        own = dataclasses.asdict(config.select)
        del own["embeddings"], own["name"]
        for name in [name for name in selectors.SELECTORS if path[-1] in selectors.fields(name)]:
            predictor = {"predictor": trained_on_nothing()} if name == "dots" else {}
            selectors.make(name, config.num_generations, **own | predictor)
    if path[-1] == "limit":
        tasks = config.tasks if path[0] == "tasks" else config.evaluation.tasks[0]
        sources.load(dataclasses.replace(tasks, source="builtin:digits"))


NUMBERS = [(path, field) for path, field in CONFIG if holds(field, int) or holds(field, float)]


@pytest.mark.parametrize(("path", "field"), NUMBERS, ids=title)
def test_a_number_at_an_edge_is_taken_or_one_sentence(path, field):
    values = (
        (0, -1, 1, 3, 2**31 - 1)
        if holds(field, int)
        else (0.0, -0.0, -1.0, 1.2e-38, 3.4e38, -3.4e38, 10**38)
    )
    for value in values:
        try:
            changed(make(**HELD_OUT), path, (value,) * 2 if is_tuple(field) else value)
        except InputError as error:
            assert ": " in str(error) and len(str(error)) < 500


ANY_SIZE = {  # 10**9 means what it says
    *(
        "steps",
        "seed",
        "warmup_steps",
        "eval_steps",
        "save_steps",
        "log_completions_steps",
        "keep_checkpoints",
    ),
    *(
        "max_skipped_updates",
        "early_stopping_patience",
        "dynamic_sampling",
        "max_concurrent_rows",
        "num_iterations",
        "top_k",
        "max_age",
        "limit",
        "rank",
    ),
    *("candidates", "num_references", "reference_every"),
    *("data", "fsdp", "model"),  # devices that a dry run may plan for
}


@pytest.mark.parametrize(
    ("path", "field"),
    [(path, field) for path, field in CONFIG if holds(field, int)],
    ids=title,
)
def test_a_size_is_refused_where_it_is_negative_or_cannot_be(path, field):
    for value, fine in ((-1, {"data"}), (10**9, ANY_SIZE)):
        if path[-1] in fine:
            through_the_door(changed(make(**EVALUATED), path, value), path)
            continue
        with pytest.raises(InputError) as error:
            through_the_door(changed(make(**EVALUATED), path, value), path)
        assert re.search(rf"\b{path[-1]}(=| is )-?1", str(error.value))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"output_dir": ""}, "output_dir is '': give the path"),
        ({"model": ""}, "model is '': give the path"),
        ({"seed": 2**32}, "seed is 4294967296: it must be 0 or more, and at most 4,294,967,295"),
        ({"seed": -1}, "seed is -1: it must be 0 or more"),
        ({"kl_coef": math.inf}, "kl_coef is inf: it must be a finite number"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf: it must be a finite number"),
        ({"reward_timeout": math.inf}, "reward_timeout is inf: it must be a finite number"),
        (
            {"reward_timeout": 1e7},
            "reward_timeout is 10000000.0: it must be at most 2,147,483 seconds",
        ),
        ({"reward_timeout": 1e-9}, "reward_timeout is 1e-09: it must be at least 0.001 seconds"),
        ({"temperature": 1e-30}, "temperature is 1e-30: it must be at least 1e-06"),
        ({"warmup_steps": 10**30}, "it must be at most 2,147,483,647"),
        ({"reward_workers": 10**6}, "reward_workers is 1000000: it must be at most 1,024"),
        (
            {"rewards": ("exact", "exact")},
            "rewards is ('exact', 'exact'): it must be different rewards",
        ),
        (
            {"rewards": ("exact", "math"), "reward_weights": (0.0, 0.0)},
            "it must be not all 0, which leaves no reward",
        ),
        (
            {"rewards": ("exact", "math"), "reward_weights": (1.0, math.nan)},
            "reward_weights[1] is nan",
        ),
        ({"batch_size": 10**9}, "1,000,000,000 x 8 x 2,048, is at most 2,147,483,647 tokens"),
        ({"max_prompt_length": 2**31 - 1}, "max_prompt_length is 2147483647: it must be such that"),
        (
            {"evaluation": EvalConfig((TasksConfig("a"),), num_samples=10**9)},
            "evaluation.num_samples is 1000000000: it must be such that evaluation.batch_size "
            "x evaluation.num_sam",
        ),
        (
            {"replay": ReplayConfig(10**9)},
            "replay.capacity is 1000000000: it must be at most 67,108,864 groups",
        ),
        (
            {"lora": LoRAConfig(2, targets=("q", "q"))},
            "lora.targets is ('q', 'q'): it must be different",
        ),
        ({"tasks": TasksConfig("a", weight=10**400)}, "tasks.weight is "),
        (
            {"tasks": (TasksConfig("a"), TasksConfig("b\0"))},
            "tasks[1].source is 'b\\x00': take the NUL",
        ),
        ({"select": SelectConfig(prior=(1.0, math.inf))}, "select.prior[1] is inf"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_value_that_no_machine_has_is_one_sentence(changes, wanted):
    with pytest.raises(InputError) as error:
        make(**changes)
    assert wanted in str(error.value)


def test_the_largest_values_are_accepted():
    big = 2**31 - 1
    make(
        steps=big,
        seed=2**32 - 1,
        warmup_steps=big,
        save_steps=big,
        eval_steps=0,
        top_k=big,
        keep_checkpoints=big,
    )
    make(
        reward_timeout=2_147_483.0,
        temperature=1e-6,
        kl_coef=1e30,
        learning_rate=0,
        reward_workers=1024,
    )
    make(
        rewards=("exact", "math"),
        reward_weights=(0.0, -1.0),
        output_dir="/" + "/".join(["x" * 255] * 14),
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"eval_steps": 5},
            "eval_steps is 5: it must be 0 while evaluation.tasks is (), "
            "nothing to evaluate on: give",
        ),
        (
            {"overlong_penalty": 0.5},
            "left as it is while overlong_buffer is 0, no penalty: set overlong_buffer too",
        ),
        (
            {"importance_sampling_cap": 3.0},
            "left as it is while importance_sampling_correction is none: set that too",
        ),
        ({"lora": LoRAConfig(alpha=32.0)}, "left as it is while lora.rank is 0"),
    ],
)
def test_a_field_without_effect_is_a_mistake(changes, wanted):
    with pytest.raises(InputError) as error:
        make(**changes)
    assert wanted in str(error.value)


SIMULATED = [(path, field) for path, field in leaves(SimulateConfig) if field.type is not bool]


@pytest.mark.parametrize(("path", "field"), SIMULATED, ids=title)
def test_simulate_refuses_values_beyond_any_machine(path, field):
    for kind, values in ((float, NO_FLOATS), (int, NO_INTS), (str, NO_TEXTS)):
        for value in values if holds(field, kind) else ():
            with pytest.raises(InputError) as error:
                changed(SimulateConfig(), path, (value,) * 2 if is_tuple(field) else value)
            assert path[-1] in str(error.value) and len(str(error.value)) < 500


SIZES = [path for path, field in SIMULATED if path[0] != "select" and holds(field, int)]


@pytest.mark.parametrize("path", SIZES, ids=title)
def test_simulate_refuses_negative_sizes(path):
    with pytest.raises(InputError, match=f"{path[-1]} is -1"):
        simulate(changed(SimulateConfig(), path, -1))


@pytest.mark.parametrize("text", ["0", "-1", "1e400", "10000000000", "9" * 5000, "nan", ""])
def test_an_argument_that_is_no_count_is_refused(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=whole_number("seeds", 1))
    with pytest.raises(SystemExit):
        parser.parse_args(["--seeds", text])
    assert "argument --seeds: " in capsys.readouterr().err


def test_options_of_other_commands_are_checked():
    for kind, changes in (
        (predictor.ResponsesOptions, {"seed": 2**32}),
        (predictor.ResponsesOptions, {"fit": predictor.FitConfig(temperature=math.nan)}),
        (predictor.Options, {"held_out": math.inf}),
        (embeddings.Options, {"out": "a\0.safetensors"}),
        (pass_rates.Options, {"merge": ("a.parquet", "$NOWHERE/b.parquet")}),
        (pass_rates.Options, {"name": "\ud800"}),
        (dataset.Options, {"file": ("x" * 5000,)}),
        (graders.Options, {"tasks": 0}),
        (graders.Options, {"samples": 1}),
        (graders.Options, {"repeats": 10**30}),
    ):
        with pytest.raises(InputError):
            make(kind, **changes)


def test_students_are_checked_by_name():
    with pytest.raises(InputError, match="students.spread is nan: it must be a finite number"):
        SimulateConfig(students=worlds.StudentConfig(spread=math.nan))


def test_file_paths_stay_text():
    assert str in get_args(FilePath)
    assert isinstance(make().output_dir, str) and repr(make().output_dir) == "'run'"


class Word(str, enum.Enum):  # noqa: UP042 - whose str() is not its value
    BOTS = "bots"


@pytest.mark.parametrize(
    ("changes", "path", "wanted"),
    [
        ({"output_dir": Path("runs/a")}, "output_dir", "runs/a"),
        ({"model": Path("$RUNS/model")}, "model", "/data/runs/model"),
        ({"tasks": TasksConfig(Path("a.jsonl"))}, "tasks.source", "a.jsonl"),
        ({"seed": np.int64(3)}, "seed", 3),
        ({"steps": np.uint8(5)}, "steps", 5),
        ({"steps": http.HTTPStatus.OK}, "steps", 200),
        ({"learning_rate": np.float32(0.5)}, "learning_rate", 0.5),
        ({"learning_rate": np.int32(1)}, "learning_rate", 1),
        ({"learning_rate": Fraction(1, 4)}, "learning_rate", 0.25),
        ({"rewards": (np.str_("math"),), "reward_weights": (np.float16(2),)}, "rewards", ("math",)),
        ({"select": SelectConfig(name=Word.BOTS, rho=np.float64(0.5))}, "select.rho", 0.5),
        ({"select": SelectConfig(name=Word.BOTS)}, "select.name", "bots"),
    ],
    ids=str,
)
def test_numpy_numbers_and_enums_become_python_values(changes, path, wanted, monkeypatch):
    monkeypatch.setenv("RUNS", "/data/runs")
    config = make(**changes)
    found = attrgetter(path)(config)
    assert found == wanted
    assert repr(found) == repr(wanted) and str(found) == str(wanted)
    assert type(found) in (type(wanted), fields._Expanded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": np.int64(2**40)}, "seed is 1099511627776: it must be 0 or more, and at most"),
        ({"seed": np.int64(-1)}, "seed is -1: it must be 0 or more"),
        ({"seed": np.bool_(True)}, "seed is np.True_: it must be of type int"),
        ({"steps": np.float32(3)}, r"steps is np.float32\(3.0\): it must be of type int"),
        ({"steps": np.array([3])}, r"steps is array\(\[3\]\): it must be of type int"),
        ({"learning_rate": np.float32("nan")}, "learning_rate is nan: it must be a finite number"),
        ({"learning_rate": Fraction(10**400)}, "learning_rate is inf: it must be a finite number"),
        ({"learning_rate": Decimal(1)}, "learning_rate is Decimal.*: it must be of type float"),
        ({"output_dir": b"run"}, "output_dir is b'run': it must be of type str"),
        (
            {"output_dir": Path("$UNSET_HERE/a")},
            "output_dir is .*: set the environment variable UNSET_HERE",
        ),
        ({"rewards": (Path("a.py"),)}, r"rewards\[0\] is .*: it must be of type str"),
        ({"rewards": {"math"}}, r"such as \('math',\)$"),
        ({"rewards": None}, r"rewards is None: it must be of type tuple\[str, ...\]$"),
        ({"select": EvalConfig()}, "select is EvalConfig.*: it must be of type SelectConfig"),
        ({"select": SelectConfig}, "select is <class .*: it must be of type SelectConfig"),
        ({"select": {"name": "bots"}}, "select is .*: it must be of type SelectConfig"),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)
