"""`jaxrft prepare dataset` on small files in the layout of each published data set."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import writers

from jaxrft import cli, tasks
from jaxrft.config import TasksConfig
from jaxrft.prepare import dataset
from jaxrft.prepare.recipes import RECIPES
from jaxrft.types import InputError

GSM8K = [
    {"question": "How many?", "answer": "Half of <<2500*2=5000>>5,000.\n#### 2,500"},
    {"question": "How cold?", "answer": "#### -7"},
    {"question": "Combien d'€ ?", "answer": "#### 3"},
]
MATH = [
    {
        "problem": "$1 + 1$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "$\\boxed{1}$, no, $\\boxed{\\frac{4}{2}}$.",
    },
    {
        "problem": "$1 + 2$?",
        "level": "Level 5",
        "type": "Geometry",
        "solution": "It is $\\fbox{3}$.",
    },
    {
        "problem": "$1 + 3$?",
        "level": "Level ?",
        "type": "Geometry",
        "solution": "It is $\\boxed 4$.",
    },
]
DEEPSCALER = [
    {"problem": "1 + 1", "answer": "2", "solution": "Add."},
    {"problem": "1 + 2", "answer": "", "solution": ""},
    {"problem": "1 + 3", "answer": "4", "solution": ""},
]
ORZ = [
    [
        {"from": "human", "value": f"1 + {n}"},
        {"from": "assistant", "ground_truth": {"value": str(1 + n), "type": "math"}},
    ]
    for n in (1, 2)
]
DEEPMATH = [
    {
        "question": "1 + 1",
        "final_answer": "2",
        "difficulty": 4.5,
        "topic": "Sums -> Small",
        "r1_solution_1": "Long.",
    },
    {
        "question": "1 + 2",
        "final_answer": "3",
        "difficulty": -1.0,
        "topic": "Sums",
        "r1_solution_1": "Longer.",
    },
]
GURU_MATH = [
    {
        "data_source": "math__dapo",
        "prompt": [{"content": "1 + 1", "role": "user"}],
        "ability": "math",
        "apply_chat_template": True,
        "qwen2.5_7b_pass_rate": rate,
        "qwen3_30b_pass_rate": 1.0,
        "extra_info": {"index": 3, "split": "train"},
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    for rate in (0.3125, None)
]
GURU_LOGIC = [
    {
        "data_source": "logic__zebra",
        "prompt": [{"content": "Be brief.", "role": "system"}, {"content": "Who?", "role": "user"}],
        "ability": "logic",
        "extra_info": {"index": 3},
        "reward_model": {"ground_truth": {"rows": [["Ann", "cat"]]}, "style": "rule"},
    }
]
SCP = [
    {"problem": "Mass?", "answer": "3 kg", "domain": "physics"},
    {"problem": "Acid?", "answer": "HCl"},
]


def user(text):
    return [{"role": "user", "content": text}]


# Data set -> its files, the answers, and further columns as they are loaded.
SETS = {
    "gsm8k": (
        {"train.jsonl": GSM8K},
        ["2500", "-7", "3"],
        {"solution": [row["answer"] for row in GSM8K]},
    ),
    "math": (
        {
            "algebra/train-00000-of-00001.parquet": MATH[:1],
            "geometry/train-00000-of-00001.parquet": MATH[1:],
        },
        ["\\frac{4}{2}", "3", "4"],
        {"level": [row["level"] for row in MATH], "domain": ["Algebra", "Geometry", "Geometry"]},
    ),
    "deepscaler": ({"deepscaler.json": DEEPSCALER}, ["2", "4"], {"solution": ["Add.", ""]}),
    "orz": ({"orz_math_57k_collected.json": ORZ}, ["2", "3"], {}),
    "deepmath": (
        {"data/train-00000-of-00010.parquet": DEEPMATH},
        ["2", "3"],
        {"difficulty": [4.5, -1.0], "topic": ["Sums -> Small", "Sums"]},
    ),
    "guru": (
        {
            "train/math__combined_54.4k.parquet": GURU_MATH,
            "train/logic__zebra_puzzle_1.3k.parquet": GURU_LOGIC,
        },
        ["2", "2", '{"rows": [["Ann", "cat"]]}'],
        {
            "domain": ["math", "math", "logic"],
            "data_source": ["math__dapo", "math__dapo", "logic__zebra"],
        },
    ),
    "scp25k": ({"scp.jsonl": SCP}, ["3 kg", "HCl"], {"domain": ["physics", "science"]}),
}


def written(folder, files):
    return [writers.write_file(folder / "files" / path, rows) for path, rows in files.items()]


def loaded(folder, name, **options):
    return tasks.load(TasksConfig(source=f"tfds:{name}", data_dir=str(folder), **options))


def test_every_recipe_is_tried():
    assert SETS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", SETS)
def test_files_as_they_are_published_become_a_tfds_data_set(tmp_path, name):
    files, answers, columns = SETS[name]
    folder = dataset.prepare(name, written(tmp_path, files), data_dir=str(tmp_path))
    assert folder == tmp_path / name / dataset.VERSION and {*os.listdir(tmp_path)} == {
        "files",
        name,
    }
    rows = loaded(tmp_path, name)
    assert rows.columns["answer"] == answers
    assert {key: rows.columns[key] for key in columns} == columns
    assert set(rows.columns) == {"answer", *RECIPES[name].columns}
    assert len(rows.prompts) == len(answers)
    assert all({"role", "content"} == set(message) for prompt in rows.prompts for message in prompt)


def test_gsm8k_from_tfds_equals_gsm8k_from_its_file(tmp_path):
    (path,) = written(tmp_path, {"train.jsonl": GSM8K})
    dataset.prepare("gsm8k", [path], data_dir=str(tmp_path))
    there, here = loaded(tmp_path, "gsm8k"), tasks.load(TasksConfig(source=path))
    assert (there.prompts, there.columns) == (here.prompts, here.columns)


def test_one_json_file_a_task_as_in_the_first_math(tmp_path):
    paths = written(tmp_path, {f"train/algebra/{n}.json": row for n, row in enumerate(MATH)})
    dataset.prepare("math", paths, data_dir=str(tmp_path))
    assert loaded(tmp_path, "math").prompts == [user(row["problem"]) for row in MATH]


def test_gurus_pass_rates_serve_as_references(tmp_path):
    files, _, _ = SETS["guru"]
    dataset.prepare("guru", written(tmp_path, files), data_dir=str(tmp_path))
    rows = loaded(
        tmp_path, "guru", pass_rate_columns=("qwen2.5_7b_pass_rate", "qwen3_30b_pass_rate")
    )
    nan = np.nan
    assert rows.reference_pass_rates is not None
    np.testing.assert_array_equal(
        rows.reference_pass_rates, [[0.3125, 1.0], [nan, 1.0], [nan, nan]]
    )
    assert rows.prompts[2] == [{"role": "system", "content": "Be brief."}, *user("Who?")]
    assert json.loads(rows.columns["extra_info"][0]) == {"index": 3, "split": "train"}


def test_a_split_is_added_to_an_existing_data_set(tmp_path, capsys):
    for split, rows in {"train": GSM8K, "test": GSM8K[:2], "hard": GSM8K[1:]}.items():
        (path,) = written(tmp_path, {f"{split}.jsonl": rows})
        assert (
            cli.main(
                [
                    "prepare",
                    "dataset",
                    "gsm8k",
                    "--file",
                    path,
                    "--split",
                    split,
                    "--data-dir",
                    str(tmp_path),
                ]
            )
            == 0
        )
        said = capsys.readouterr().out
    assert f"--tasks.source tfds:gsm8k --tasks.split hard --tasks.data-dir {tmp_path}" in said
    answers = [
        loaded(tmp_path, "gsm8k", split=split).columns["answer"]
        for split in ("train", "test", "hard")
    ]
    assert answers == [["2500", "-7", "3"], ["2500", "-7"], ["-7", "3"]]


def killed(tmp_path, program):
    """Prepares gsm8k's split test in a process that the program, run in it first, is to kill."""
    (path,) = written(tmp_path, {"test.jsonl": GSM8K})
    program += f"\ndataset.prepare('gsm8k', [{path!r}], split='test', data_dir={str(tmp_path)!r})"
    imports = "import os; from jaxrft.prepare import dataset\n"
    assert subprocess.run([sys.executable, "-c", imports + program]).returncode == -signal.SIGKILL
    return path


@pytest.mark.parametrize("others", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "program",
    [
        pytest.param("dataset._task = lambda *_: os.kill(os.getpid(), 9)", marks=pytest.mark.slow),
        pytest.param("dataset._move = lambda *_: os.kill(os.getpid(), 9)", marks=pytest.mark.slow),
        "os.replace = lambda _, to: 'dataset_info' in str(to) and os.kill(os.getpid(), 9)",
    ],
    ids=["in a row", "before the move", "in the move"],
)
def test_a_kill_leaves_nothing_that_loads_as_whole_and_the_command_can_be_repeated(
    tmp_path, program, others
):
    if others:
        dataset.prepare(
            "gsm8k", written(tmp_path, {"train.jsonl": GSM8K[:1]}), data_dir=str(tmp_path)
        )
    elif "replace" in program:
        pytest.skip("a first split is moved in one piece")
    path = killed(tmp_path, program)
    with pytest.raises(
        InputError, match="has no split 'test', only train" if others else "gsm8k is not prepared"
    ):
        loaded(tmp_path, "gsm8k", split="test")
    dataset.prepare("gsm8k", [path], split="test", data_dir=str(tmp_path))
    assert len(loaded(tmp_path, "gsm8k", split="test").prompts) == 3
    assert not others or len(loaded(tmp_path, "gsm8k").prompts) == 1


@pytest.mark.parametrize(
    ("name", "files", "options", "message"),
    [
        ("gms8k", {}, [], "no data set 'gms8k' can be prepared: did you mean gsm8k"),
        ("tulu", {}, [], "no data set 'tulu' can be prepared: it is one of gsm8k, math, "),
        (
            "orz",
            {},
            [],
            "no files of orz given: add --file, data/orz_math_57k_collected.json of github.com",
        ),
        (
            "gsm8k",
            {"a.jsonl": GSM8K},
            ["--split", "train[:5]"],
            r"--split is 'train\[:5\]': a split is called by a word",
        ),
        (
            "gsm8k",
            {"a.jsonl": GSM8K},
            ["--split", "all"],
            "--split is 'all': a split is called by a word, .* not all",
        ),
        (
            "gsm8k",
            {"a.jsonl": [{"question": "\ud83d", "answer": "#### 5"}]},
            [],
            "a.jsonl line 1 is not JSON",
        ),
        (
            "gsm8k",
            {"a.csv": GSM8K},
            [],
            "a.csv is of no kind that can be read: give a .parquet, .jsonl or .json file",
        ),
        (
            "gsm8k",
            {"a.jsonl": [*GSM8K, {"question": "?"}]},
            [],
            "a.jsonl row 4 has no answer: give train.jsonl",
        ),
        (
            "gsm8k",
            {"a.jsonl": [*GSM8K, {"question": "?", "answer": "5"}]},
            [],
            "row 4 is .* ends in #### and a number",
        ),
        (
            "gsm8k",
            {"a.jsonl": [{"question": "", "answer": "#### 5"}]},
            [],
            "row 1 is .*the prompt is empty",
        ),
        ("math", {"a.parquet": [{"problem": "?"}]}, [], "a.parquet row 1 has no level: give"),
        ("orz", {"a.json": [*ORZ, ORZ[0][:1]]}, [], "a.json row 3 is .*, no such task"),
        ("orz", {"a.json": DEEPSCALER}, [], "a.json row 1 is .*, no such task"),
        ("deepscaler", {"a.json": ORZ}, [], "a.json row 1 is .*, no such task"),
        (
            "deepscaler",
            {"a.json": DEEPSCALER[1:2]},
            [],
            "a.json: no row has an answer; give deepscaler.json",
        ),
        ("deepscaler", {"a.json": []}, [], "a.json: no row has an answer"),
        (
            "deepmath",
            {"a.jsonl": [{**DEEPMATH[0], "difficulty": "hard"}]},
            [],
            "row 1 is .*could not convert",
        ),
        (
            "guru",
            {"a.jsonl": [{**GURU_MATH[0], "prompt": "no list"}, {"prompt": 7}]},
            [],
            "row 2 has no ability",
        ),
        ("guru", {"a.jsonl": [{**GURU_MATH[0], "prompt": [7]}]}, [], "row 1 is .*, no such task"),
        (
            "scp25k",
            {"a.jsonl": [{"problem": "?", "matched_solution": "Long."}]},
            [],
            "row 1 has no answer: give not",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_files(
    tmp_path, capsys, name, files, options, message
):
    paths = written(tmp_path, files)
    data_dir = tmp_path / "data"
    arguments = [
        name,
        *(["--file", *paths] if paths else []),
        *options,
        "--data-dir",
        str(data_dir),
    ]
    assert cli.main(["prepare", "dataset", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("jaxrft: error: ") and re.search(message, said)
    assert not [path for path in data_dir.rglob("*") if path.is_file()]


def test_an_existing_split_and_an_unwritable_folder_are_refused(tmp_path):
    paths = written(tmp_path, {"train.jsonl": GSM8K})
    folder = dataset.prepare("gsm8k", paths, data_dir=str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(
        InputError,
        match="has a split train already: choose another --split or --data-dir, or delete it",
    ):
        dataset.prepare("gsm8k", paths, data_dir=str(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(
        InputError, match="cannot write to .*train.jsonl/gsm8k.*: choose another --data-dir"
    ):
        dataset.prepare("gsm8k", paths, data_dir=paths[0])


def test_without_a_name_all_are_listed_with_their_files(capsys):
    assert cli.main(["prepare", "dataset"]) == 0
    said = capsys.readouterr().out
    assert all(name in said and recipe.files in said for name, recipe in RECIPES.items())
    assert cli.main(["prepare"]) == 2 and cli.main(["prepare", "data"]) == 2
    assert "jaxrft prepare makes dataset" in capsys.readouterr().err
