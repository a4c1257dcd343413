"""Runs with `dots`: what they roll out in order to know, what of it they train on, and that stopped
ones go on.
"""

import helpers
import jax
import numpy as np
import pytest

from jaxrft import mesh as meshes
from jaxrft.config import Config, ReplayConfig, SelectConfig, TasksConfig
from jaxrft.dry_run import counts, memory, resolve
from jaxrft.lm import tokenizer
from jaxrft.select.dots import training
from jaxrft.select.dots.predictor import Origin, Predictor, save_predictor
from jaxrft.select.reference_groups import batch_size_index, batch_sizes
from jaxrft.tasks.open_sets import open_mixture
from jaxrft.tasks.projections import open_predictor
from jaxrft.train import resample
from jaxrft.train.loop import train
from jaxrft.train.setup import describe_run, open_run
from jaxrft.types import InputError

K, B, G = 12, 8, 4  # of a reference set, of a batch, of a task; on 4 shards of tasks


@pytest.fixture(scope="module")
def dots(world, configure):
    """(output_dir, **changes) -> the config of a run with embeddings and a predictor that knows
    nothing.
    """
    rows = helpers.task_rows()
    made = {"model": "none", "width": 8}
    noise = np.random.default_rng(0).normal(size=(len(rows), 8)).astype(np.float32)
    helpers.write_embeddings(
        world / "embeddings.safetensors", [row["prompt"] for row in rows], noise, made
    )
    params = training.initial(jax.random.key(0), 8, width=8, layers=1)
    save_predictor(
        world / "predictor.safetensors",
        Predictor(params, "group_logit_temp", 1.0, None, Origin("none", 8)),
    )
    common = {
        "predictor": str(world / "predictor.safetensors"),
        "num_references": K,
        "temperature": 0.1,
    }
    tasks = TasksConfig(
        str(world / "tasks.jsonl"), embeddings=str(world / "embeddings.safetensors")
    )

    def make(output_dir, **changes):
        select = SelectConfig(name="dots", **common | changes.pop("select", {}))
        return configure(output_dir, **{"tasks": tasks, "select": select} | changes)

    return make


@pytest.fixture(scope="module")
def learned(dots, tmp_path_factory):
    """(folder, final state, what each step learned from) of six steps; leave the folder as it
    is.
    """
    folder, steps, fill_slots = tmp_path_factory.mktemp("dots") / "run", [], resample.fill_slots

    def note(step, first, references, slots):
        batch = fill_slots(step, first, references, slots)
        steps.append((first.ids, references, batch))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "fill_slots", note)
        return folder, train(dots(folder)), steps


def test_batch_sizes_worked_by_hand():
    assert batch_sizes(16) == (4, 8, 12, 16) and batch_sizes(3) == (1, 2, 3)
    assert batch_sizes(16, multiple=8) == (8, 16) and batch_sizes(1) == (1,)
    sizes = [batch_sizes(16)[batch_size_index(16, informative)] for informative in range(18)]
    assert sizes == [16] * 4 + [12] * 4 + [8] * 4 + [4] * 6


@pytest.mark.slow
def test_reference_groups_are_counted_and_save_rollouts(learned):
    folder, state, _ = learned
    lines = helpers.metrics(folder)
    assert [line.get("select/references") for line in lines] == [K, None] * 3
    rolled = np.diff([0, *(line["rollouts"] for line in lines)])
    trained = [line.get("select/references/trained", 0) for line in lines]
    assert rolled.tolist() == [
        G * (line.get("select/references", 0) + B - m)
        for line, m in zip(lines, trained, strict=True)
    ]
    assert set(trained[::2]) <= {0, 4} and sum(trained) > 0
    assert lines[0]["select/coverage"] >= 12 / 16 and all(
        0 <= line["select/references/brier"] <= 1 for line in lines[2::2]
    )
    spent = np.diff([0, *(line["num_tokens"] for line in lines)])
    assert (spent >= rolled).all() and (spent <= 4 * rolled).all()
    assert state.counters.rollouts.tolist() == [0, sum(rolled)]


@pytest.mark.slow
def test_informative_groups_nearest_the_target_join_the_batch_once(learned):
    folder, _, steps = learned
    for line, (ids, references, batch) in zip(helpers.metrics(folder), steps, strict=True):
        assert batch.ids[: len(ids)].tolist() == ids.tolist()
        assert (
            batch.ids.tolist() == np.asarray(batch.groups.task).tolist()
            and len(set(batch.ids.tolist())) == B
        )
        if len(references.ids):
            assert len(set(references.ids.tolist())) == K
            informative = np.isfinite(references.distance)
            ratio = line["select/references/effective_group_ratio"]
            assert ratio == pytest.approx(informative.mean())
            joined = np.isin(references.ids, batch.ids[len(ids) :])
            worst = references.distance[joined].max(initial=0)
            assert np.isfinite(worst) and (references.distance[~joined] >= worst).all()
            assert joined.sum() == (4 if informative.sum() >= 4 else 0)


@pytest.mark.slow
def test_resume_with_reference_sets_is_bit_for_bit(dots, learned, tmp_path):
    folder, state, _ = learned
    run = helpers.stopped_after(3, folder, tmp_path / "run")
    helpers.assert_same_bits(train(dots(run)), state)
    assert helpers.metrics(run) == helpers.metrics(folder)


@pytest.mark.slow
def test_surplus_groups_enter_the_replay(dots, tmp_path):
    settings = {"replay": ReplayConfig(capacity=16), "select": {"reference_every": 4}}
    state = train(dots(tmp_path, steps=2, save_steps=1, **settings))
    made, kept = state.replay.groups.step, state.replay.groups.rewards
    first, second = helpers.metrics(tmp_path)
    informative = K * first["select/references/effective_group_ratio"]
    fresh = (B - first["select/references/trained"]) * (1 - first["frac_reward_zero_std"])
    assert informative > first["select/references/trained"]
    assert (made == 0).sum() == min(16, round(informative + fresh)) and second[
        "replay/fraction"
    ] == 0.5
    kept = np.asarray(kept)[np.asarray(made) == 0]
    assert (kept.min(axis=1) < kept.max(axis=1)).all()


@pytest.mark.slow
def test_tasks_are_projected_once_and_counted_by_the_dry_run(dots, tmp_path):
    config, mesh = dots(tmp_path), meshes.make(2, 2, 2)
    real = open_run(config, mesh)
    table = real.constants.tasks.projections
    assert (
        real.constants.tasks.embeddings is None
        and table.query.shape == table.reference.shape == (16, 8)
    )
    assert table.query.sharding.shard_shape((16, 8)) == (4, 8)
    inputs = resolve.resolve_inputs(config, meshes.abstract(2, 2, 2))
    described = describe_run(
        config, meshes.abstract(2, 2, 2), inputs.lm, inputs.pool.table, inputs.predictor
    )
    for a, b in zip(
        jax.tree.leaves(described.constants), jax.tree.leaves(real.constants), strict=True
    ):
        assert (a.shape, a.dtype, a.sharding.spec) == (b.shape, b.dtype, b.sharding.spec)
    parts = {part.name: part.bytes for part in memory.parts(described, 8)}
    assert parts["projections of the tasks"] == 2 * 4 * 8 * 4
    # Of 3 tasks: prompt, its length, id and step; of each of 4 samples: 4 tokens thrice, advantage,
    # reward and a mask.
    assert parts["reference groups"] == 3 * (4 * (8 + 1 + 1 + 1 + 4 * (4 * 3 + 2)) + 4)
    assert dict(counts.run(config, 16))["reference sets"].startswith(
        "48 more rollouts every 2 steps, 144 in all; "
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_references": 20}, "select.num_references is 20 but there are 16 tasks"),
        (
            {"num_references": 6},
            "select.num_references 6 does not divide over .*: choose a multiple of 4",
        ),
        (
            {"predictor": "nowhere.safetensors"},
            "no file nowhere.safetensors: make one with jaxrft prepare predictor",
        ),
        (
            {"predictor": "other"},
            "was trained on embeddings by another .width 8., but these are by none .width 8.",
        ),
    ],
)
def test_a_mistake_is_one_sentence(dots, changes, message, tmp_path):
    if changes.get("predictor") == "other":
        changes = {"predictor": str(tmp_path / "other.safetensors")}
        params = training.initial(jax.random.key(0), 8, width=8, layers=1)
        save_predictor(
            changes["predictor"],
            Predictor(params, "group_logit_temp", 1.0, None, Origin("another", 8)),
        )
    config = dots(tmp_path, select=changes)
    rows = open_mixture(config, tokenizer.load(config.model))
    with pytest.raises(InputError, match=message):
        open_predictor(config, rows, meshes.abstract(2, 2, 2))


def test_missing_input_of_dots_is_reported_first():
    with pytest.raises(
        InputError,
        match="select.predictor is None, but select.name dots needs a file of `jaxrft prepa",
    ):
        Config("model", TasksConfig("a.jsonl"), "run", select=SelectConfig("dots"))
    with pytest.raises(
        InputError, match="a has no embeddings, which select.name dots needs: name a file"
    ):
        Config(
            "model",
            TasksConfig("a.jsonl"),
            "run",
            select=SelectConfig("dots", predictor="b.safetensors"),
        )
