"""The files of configs/, which are not run here: they load, say what they must, and fit their
models and meshes.
"""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from jaxrft import config as configs
from jaxrft import dry_run
from jaxrft import mesh as meshes
from jaxrft.lm import published
from jaxrft.rewards.lookup import resolve
from jaxrft.train.devices import check_mesh

ROOT = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("configs/**/*.py")
    if path.parent.name != "graders"
)
RUN = ["configs/smollm2_arithmetic.py"]
PAPERS = [file for file in FILES if Path(file).parent.name in ("dots", "bots")]


def load(file):
    return configs.load(str(ROOT / file))


@pytest.mark.parametrize("file", FILES)
def test_its_docstring_is_its_command_and_what_to_expect(file):
    text = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    assert re.search(rf"^ +jaxrft train {re.escape(file)}", text, re.MULTILINE)
    if file != "configs/quickstart.py":
        experience = "Run with " if file in RUN else "Not yet run."
        assert all(f"\n\n{part}" in text for part in ("Hardware: ", "Expected: ", experience))
        model = load(file).model
        assert f"hf download {model}\n" in text and published.keys(model)


def test_no_two_write_to_the_same_folder():
    assert len({load(file).output_dir for file in FILES}) == len(FILES) == 16


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("devices", [1, 8, 16])
def test_its_mesh_divides_its_batches(file, devices):
    config = load(file)
    if config.mesh.model == -1 and devices > 8:
        pytest.skip("its eight heads of keys and values split no further")
    if config.batch_size < devices:
        pytest.skip("its batch is small, for one machine")
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.model]
    assert sizes.count(-1) == 1 and sorted(sizes)[1:] == [1, 1]
    mesh = AbstractMesh(tuple(devices if size == -1 else size for size in sizes), meshes.AXES)
    check_mesh(config, mesh)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("file", [file for file in FILES if file != "configs/quickstart.py"])
def test_prompts_and_completions_fit_the_model(file):
    config = load(file)
    length = (published.keys(config.model) or {})["max_position_embeddings"]
    assert config.max_prompt_length + config.max_completion_length <= length


@pytest.mark.parametrize("file", PAPERS)
def test_settings_of_the_papers(file):
    config, dots = load(file), "configs/dots/" in file
    batch = (
        config.batch_size,
        config.num_generations,
        config.tasks_per_update,
        config.learning_rate,
    )
    assert batch == ((512, 8, 64, 1e-6) if dots else (32, 16, 32, 1e-6))
    if dots:
        length = 3072 if "Math" in config.model else 4096
        assert (
            config.steps,
            config.temperature,
            config.max_prompt_length,
            config.max_completion_length,
        ) == (
            *(60, 0.6, 1024),
            length,
        )
        select = config.select
        assert (select.name, select.num_references, select.reference_every, select.temperature) == (
            "dots",
            256,
            2,
            1e-3,
        )
        assert (config.replay.capacity, config.fresh_batch_size) == (512, 256)
    else:
        assert config.select.name == "bots" and all(
            len(tasks.pass_rate_columns) == 2 for tasks in config.task_sets
        )


@pytest.mark.slow  # the plan of a small run is quick, in test_dry_run.py
@pytest.mark.parametrize("file", [file for file in FILES if file != "configs/quickstart.py"])
def test_its_dry_run_needs_nothing_but_itself(file, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)  # where its graders are found
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load(file)
    dry_run.show(dataclasses.replace(config, output_dir=str(tmp_path / "run"), reward_workers=1))
    page = " ".join(capsys.readouterr().out.split())
    assert (
        f"{config.batch_size} tasks x {config.num_generations}"
    ) in page and "Memory a device" in page
    if config.select.name == "dots":
        assert f"no file {config.select.predictor}: make one with jaxrft prepare predictor" in page
        assert "2,048 more rollouts every 2 steps, 61,440 in all" in page
    assert not (tmp_path / "run").exists()


FORM = "right</reasoning>\n<answer>\\boxed{%s}</answer>"


@pytest.mark.parametrize(
    ("completion", "credit"),
    [
        (FORM % "1,234", 1.0),
        (FORM % " 1234 ", 1.0),
        (FORM % "1235", 0.1),
        # two answers are not the form; the last counts
        (FORM % "1" + "<answer>\\boxed{1234}</answer>", 0.5),
        ("</reasoning><answer>1234</answer>", 0.0),  # no box, no credit
        ("the answer is \\boxed{7} or \\boxed{1234}", 0.5),
        ("the answer is \\boxed{1234} or \\boxed{7}", 0.0),
        ("<answer>\\boxed{1234}</answer></reasoning>", 0.5),  # in the wrong order
        ("", 0.0),
    ],
)
def test_partial_credit(monkeypatch, completion, credit):
    monkeypatch.chdir(ROOT)
    reward = resolve("configs.graders.tags:partial_credit")
    assert reward(["prompt"], [completion], answer=["1234"], data_source=["x"]) == [credit]


def test_gsm8k_in_tags_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    from configs.graders import tags

    row = {"question": "What is {1} + 1?", "answer": "1 + 1 = 2\n#### 2"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    tags.main(str(tmp_path / "train.jsonl"), str(tmp_path / "data/tasks.jsonl"))
    (task,) = map(json.loads, (tmp_path / "data/tasks.jsonl").read_text().splitlines())
    assert task["answer"] == "2" and task["prompt"].endswith(
        "Problem: What is {1} + 1?\n<reasoning>\n"
    )
    assert "<answer>\\boxed{}</answer>" in task["prompt"]
