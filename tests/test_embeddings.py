"""Embeddings of prompts: the policy's own means, the same after any interruption, found by the
prompt in any table.
"""

import json
import os
import re
import signal
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrft import cli
from jaxrft import mesh as meshes
from jaxrft.config import EvalConfig, LoRAConfig, MeshConfig, SelectConfig, TasksConfig
from jaxrft.lm import embed, model, weights
from jaxrft.lm import tokenizer as tokenizers
from jaxrft.prepare import embeddings as command
from jaxrft.prepare.journal import Journal
from jaxrft.tasks import embeddings
from jaxrft.tasks.embeddings import PROMPTS, ROWS, SOURCE
from jaxrft.tasks.open_sets import open_mixture, open_tasks
from jaxrft.train.loop import train
from jaxrft.train.resume import run_identity
from jaxrft.train.setup import open_run
from jaxrft.types import InputError

LONG = "1" * 65  # a token more than a prompt may have
KILLED = """
import os, signal, sys
from jaxrft import cli
from jaxrft.prepare import journal

def add(self, number, result):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # its rows are written and not noted
    note(self, number, result)

note, journal.Journal.add = journal.Journal.add, add
cli.main(sys.argv[1:])
"""


def rows():
    """Tasks of several lengths; one prompt occurs twice, with another answer, and one is too
    long.
    """
    further = [{"prompt": "7" * 20 + "=", "answer": "0"}, {"prompt": "0+0=", "answer": "1"}]
    return [*helpers.task_rows(14), *further, {"prompt": LONG, "answer": "1"}]


def distinct():
    return list(dict.fromkeys(row["prompt"] for row in rows() if row["prompt"] != LONG))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return helpers.write_rows(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", rows())


@pytest.fixture(scope="module")
def prepare(configure, source):
    """(**changes) -> the config of a few batches."""
    settings = {"output_dir": "nowhere", "tasks": TasksConfig(source), "batch_size": 4}
    return lambda **changes: configure(**settings | changes)


@pytest.fixture(scope="module")
def file(prepare, tmp_path_factory):
    """The file of an uninterrupted command."""
    out = tmp_path_factory.mktemp("embeddings") / "e.safetensors"
    assert command.run(command.Options(prepare(), str(out)))
    assert [path.name for path in out.parent.iterdir()] == ["e.safetensors"]
    return out


@pytest.fixture(scope="module")
def policy(world):
    """(decoder, its parameters, its tokenizer)."""
    folder = str(world / "policy")
    return (
        model.decoder(helpers.SHAPE),
        weights.load(folder, helpers.SHAPE),
        tokenizers.load(folder),
    )


def test_padding_is_not_seen(policy):
    tokens, lengths = (
        jnp.asarray([[3, 4, 5, 6, 7, 8], [9, 3, 2, 0, 0, 0]], jnp.int32),
        jnp.asarray([6, 3], jnp.int32),
    )
    pooled = jax.jit(partial(embed.pooled, policy[0]))
    found = pooled(policy[1], tokens, lengths)
    assert found.shape == (2, 16) and found.dtype == jnp.float32
    np.testing.assert_array_equal(pooled(policy[1], tokens.at[1, 3:].set(11), lengths)[1], found[1])
    np.testing.assert_allclose(
        pooled(policy[1], tokens[1:, :3], lengths[1:])[0], found[1], atol=1e-6
    )


def test_a_file_holds_the_mean_hidden_state_of_every_distinct_prompt(file, policy):
    found, prompt = embeddings.read(file), distinct()[-1]
    assert (
        found.rows.shape == (15, 16) == (len(distinct()), found.source["width"])
        and found.rows.dtype == np.float32
    )
    assert found.source["pooling"] == "mean of the last hidden states"
    decoder, params, text = policy
    tokens = jnp.asarray([tokenizers.render(text, prompt)], jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = jax.jit(decoder.apply)(params, tokens, positions, jnp.ones(tokens.shape, bool))
    row = embeddings.of_prompts(found, [prompt], path=file, name="tasks")[0]
    np.testing.assert_allclose(row, np.asarray(hidden[0]).mean(axis=0), atol=1e-6)


def test_messages_and_texts_have_different_digests():
    text, messages = "1", [{"role": "user", "content": "1"}]
    found = embeddings.digests([text, messages, [dict(reversed(messages[0].items()))]])
    assert found.dtype == np.uint8 and found.shape == (3, 16)
    assert found[0].tobytes() != found[1].tobytes() == found[2].tobytes()


@pytest.mark.slow
def test_killed_it_writes_the_same_file(prepare, file, tmp_path):
    out, path = tmp_path / "e.safetensors", helpers.write_config(tmp_path / "config.py", prepare())
    started = helpers.start("-c", KILLED, "prepare", "embeddings", path, "--out", out)
    ((code, _, errors),) = helpers.finish(started)
    journal = tmp_path / "e.safetensors.partial"
    assert code == -9 and not out.exists() and len(journal.read_text().splitlines()) == 4, errors
    with journal.open("a") as torn:
        torn.write('[3, "12')  # as a kill in the middle of a write leaves it
    assert command.run(command.Options(prepare(), str(out)))
    assert out.read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py", "e.safetensors"]


def test_a_signal_ends_it_and_rows_that_are_lost_are_made_again(
    prepare, file, monkeypatch, tmp_path, capsys
):
    out, add = tmp_path / "e.safetensors", Journal.add

    def add_and_stop(self, number, result):
        add(self, number, result)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "add", add_and_stop)
    assert not command.run(command.Options(prepare(), str(out))) and not out.exists()
    assert not command.run(command.Options(prepare(), str(out)))
    assert "resuming after 1 of 4 batches" in capsys.readouterr().out
    monkeypatch.undo()
    with (tmp_path / "e.safetensors.partial.rows").open("r+b") as kept:
        kept.write(b"\0" * 64)  # some of the first batch's
    assert command.run(command.Options(prepare(), str(out)))
    assert "resuming after 1 of 4 batches" in capsys.readouterr().out
    assert out.read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(prepare, file, tmp_path):
    out = tmp_path / "e.safetensors"
    path = helpers.write_config(tmp_path / "config.py", prepare(mesh=MeshConfig()))
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{helpers.free_port()}",
        "JAX_NUM_PROCESSES": 2,
    }
    arguments = ("-m", "jaxrft", "prepare", "embeddings", path, "--out", out, "--distributed")
    pair = [
        helpers.start(*arguments, devices=1, JAX_PROCESS_ID=index, **variables)
        for index in range(2)
    ]
    for code, _, errors in helpers.finish(*pair):
        assert code == 0, errors
    found, wanted = load_file(out), load_file(file)
    np.testing.assert_array_equal(found[PROMPTS], wanted[PROMPTS])
    np.testing.assert_allclose(found[ROWS], wanted[ROWS], atol=1e-6)


def written(path, prompts, found, **source):
    metadata = {SOURCE: json.dumps({"model": "a", "pooling": "mean"} | source)}
    save_file({PROMPTS: embeddings.digests(prompts), ROWS: found}, path, metadata=metadata)
    return str(path)


def test_tables_find_their_rows_through_limits_weights_and_drops(prepare, source, policy, tmp_path):
    prompts = distinct() + [f"{prompt}?" for prompt in distinct()]
    order = np.random.default_rng(0).permutation(len(prompts))
    values = np.arange(len(prompts), dtype=np.float16)[:, None] * np.ones((1, 3), np.float16)
    path = written(tmp_path / "e.safetensors", [prompts[i] for i in order], values[order])
    others = [row | {"prompt": f"{row['prompt']}?"} for row in rows()]
    sets = (
        TasksConfig(source, embeddings=path, weight=3.0),
        TasksConfig(
            helpers.write_rows(tmp_path / "others.jsonl", others),
            embeddings=path,
            weight=1.0,
            limit=12,
        ),
    )
    table = open_mixture(prepare(tasks=sets), policy[2])
    assert (
        len(table.prompts) == 21
        and table.embeddings.dtype == np.float32
        and table.embedded_by["width"] == 3
    )
    assert [prompts.index(prompt) for prompt in table.prompts] == table.embeddings[:, 1].tolist()


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (
            lambda path: None,
            "no file .*e.safetensors: make it with `jaxrft prepare embeddings "
            "CONFIG --out .*e.safet",
        ),
        (
            lambda path: path.write_text("x"),
            "e.safetensors cannot be read as safetensors with the tensors prompts and",
        ),
        (
            lambda path: save_file({"a": np.zeros(1)}, path),
            "e.safetensors holds no embeddings of prompts: make it",
        ),
        (
            lambda path: written(path, ["1"], np.zeros((2, 3))),
            r"holds embeddings \(2, 3\) of float64 for prompts \(1, 16\)",
        ),
        (
            lambda path: written(path, distinct()[:9], np.zeros((9, 3), np.float32)),
            "e.safetensors has no embedding for 6 of the 16 tasks of tasks: .* --overwrite, "
            "with the tasks and",
        ),
        (
            lambda path: written(path, distinct(), np.full((15, 3), np.nan, np.float16)),
            "e.safetensors has embeddings that are not finite for 16 of the 16 tasks of tasks: "
            "make them again",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(make, wanted, prepare, source, policy, tmp_path):
    make(tmp_path / "e.safetensors")
    tasks = TasksConfig(source, embeddings=str(tmp_path / "e.safetensors"))
    with pytest.raises(InputError, match=wanted):
        open_tasks(tasks, prepare(), policy[2])


def test_embeddings_of_two_kinds_do_not_mix(prepare, source, policy, tmp_path):
    paths = [
        written(tmp_path / f"{width}.safetensors", distinct(), np.zeros((15, width), np.float32))
        for width in (3, 4)
    ]
    sets = tuple(TasksConfig(source, name=path[-13], embeddings=path) for path in paths)
    with pytest.raises(
        InputError,
        match="of 3 are model a, pooling mean, width 3, but those of 4 model a, .* width 4: mak",
    ):
        open_mixture(prepare(tasks=sets), policy[2])
    with pytest.raises(
        InputError, match="b has no embeddings but other sets of tasks have: give them to all sets"
    ):
        prepare(tasks=(sets[0], TasksConfig("b.jsonl")))
    with pytest.raises(
        InputError,
        match="the held-out set 3 has embeddings: only sets that are trained on have some",
    ):
        prepare(evaluation=EvalConfig(sets[:1]))


def refusal(config, out, **options):
    with pytest.raises(InputError) as error:
        command.run(command.Options(config, str(out), **options))
    return str(error.value)


def test_a_mistake_leaves_existing_files(prepare, file, tmp_path, monkeypatch):
    out, before = tmp_path / "e.safetensors", file.read_bytes()
    assert ("exists already: give another --out, or --overwrite to replace it") in refusal(
        prepare(), file
    )
    assert file.read_bytes() == before
    assert "e.npz: give the path of a .safetensors file" in refusal(prepare(), tmp_path / "e.npz")
    assert "no prompt of tasks is short enough" in refusal(prepare(max_prompt_length=1), out)
    assert not list(tmp_path.iterdir())
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "e.safetensors.partial.rows").symlink_to(tmp_path / "precious")
    assert (
        "e.safetensors.partial.rows (it is a link): put that right, and run the same"
    ) in refusal(prepare(), out)
    assert not out.exists() and (tmp_path / "precious").read_text() == "kept"
    (tmp_path / "e.safetensors.partial.rows").unlink()
    out.write_text("another file")
    assert command.run(command.Options(prepare(), str(out), file_dtype="float16", overwrite=True))
    found, wanted = embeddings.read(out).rows, embeddings.read(file).rows
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
    assert "embeddings reach 70000, too large for float16: give --file-dtype float32" in str(
        pytest.raises(
            InputError, command.narrowed, np.full((1, 1), 7e4, np.float32), np.dtype("float16")
        ).value
    )


def test_the_file_is_on_the_devices_and_tells_a_run_from_others(
    prepare, source, file, mesh, tmp_path
):
    config = prepare(
        tasks=TasksConfig(source, embeddings=str(file)),
        select=SelectConfig("uniform"),
        batch_size=8,
    )
    run = open_run(config, mesh)
    assert (
        run.constants.tasks.embeddings.shape == (16, 16)
        and run.constants.tasks.embeddings.dtype == jnp.float32
    )
    assert run.constants.tasks.embeddings.sharding.spec == meshes.sharding(mesh, "task", None).spec
    np.testing.assert_array_equal(run.constants.tasks.embeddings, run.table.embeddings)
    name, changed = (
        ("digest of the embeddings"),
        run.table._replace(embeddings=run.table.embeddings + 1),
    )
    there = run_identity(run.setup, changed, run.state.params)[name]
    assert len({run_identity(run.setup, run.table, run.state.params)[name], there, None}) == 3


@pytest.mark.parametrize(
    "lora",
    [LoRAConfig(), pytest.param(LoRAConfig(rank=2), marks=pytest.mark.slow)],
    ids=["whole", "lora"],
)
def test_the_policys_own_embeddings_are_those_of_its_file(lora, prepare, file, mesh):
    select = SelectConfig("adaptive", embeddings="policy")
    run = open_run(prepare(select=select, lora=lora, batch_size=8), mesh)
    wanted = embeddings.of_prompts(
        embeddings.read(file), run.table.prompts, path=file, name="tasks"
    )
    np.testing.assert_allclose(run.constants.tasks.embeddings, wanted, atol=1e-6)
    source = embeddings.read(file).source
    assert run.table.embedded_by == source
    assert (
        run_identity(run.setup, run.table, run.state.params)["digest of the embeddings"]
        == source["digest of the model's parameters"]
    )
    run = open_run(prepare(select=SelectConfig("uniform", embeddings="policy"), batch_size=8), mesh)
    assert (
        run.constants.tasks.embeddings is None
        and run_identity(run.setup, run.table, run.state.params)["digest of the embeddings"] is None
    )


@pytest.mark.slow
def test_a_run_with_the_policys_embeddings_resumes_bit_for_bit(configure, tmp_path):
    settings = {"select": SelectConfig("adaptive", embeddings="policy"), "save_steps": 1}
    whole = tmp_path / "whole"
    state = train(configure(whole, steps=2, **settings))
    run = helpers.stopped_after(1, whole, tmp_path / "run")
    helpers.assert_same_bits(train(configure(run, steps=2, **settings)), state)
    assert helpers.metrics(run) == helpers.metrics(whole)


def test_the_dry_run_knows_them(prepare, source, file, capsys, tmp_path):
    def dry(config, code=0):
        path = helpers.write_config(tmp_path / "config.py", config)
        assert cli.main(["train", path, "--dry-run"]) == code
        return capsys.readouterr().out

    given = prepare(
        tasks=TasksConfig(source, embeddings=str(file)),
        select=SelectConfig("uniform"),
        batch_size=8,
    )
    said = dry(given)
    assert re.search(
        r"embeddings +width 16, mean of the last hidden states "
        r"of",
        said,
    ) and said.endswith("\nready\n")
    # 16 tasks over 4 devices, 16 floats each
    assert "embeddings of the tasks" in said and "256 bytes" in said
    absent = prepare(
        tasks=TasksConfig(source, embeddings="e.safetensors"),
        select=SelectConfig("uniform"),
        batch_size=8,
    )
    said = dry(absent, code=2)
    assert (
        "1. no file e.safetensors: make it with `jaxrft prepare embeddings"
    ) in said and "over 64 tokens" in said
    assert "width 16, missing, taken to be as wide as the policy" in said
    said = dry(prepare(select=SelectConfig("adaptive", embeddings="policy"), batch_size=8))
    assert "width 16, mean of the last hidden states of the policy itself" in said
