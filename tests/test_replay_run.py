"""Runs with replay: what they train on, and that a stopped one goes on bit for bit."""

import helpers
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrft.config import MeshConfig, ReplayConfig
from jaxrft.train.loop import train
from jaxrft.types import InputError

HARD = {  # every option that is not the default, several updates a step
    "replay": ReplayConfig(capacity=8, max_age=3, draw="advantage", clip_center="proximal"),
    "mini_batch_size": 4,
    "micro_batch_size": 8,
    "num_iterations": 2,
}


@pytest.fixture(scope="module")
def replayed(configure, tmp_path_factory):
    """(folder, final state) of six steps with replay; leave the folder as it is."""
    folder = tmp_path_factory.mktemp("replayed") / "run"
    return folder, train(configure(folder, **HARD))


@pytest.mark.slow
def test_half_of_a_batch_is_replayed_as_soon_as_the_buffer_can_give_it(replayed):
    folder, state = replayed
    lines, groups = helpers.metrics(folder), state.replay.groups
    fractions = [line["replay/fraction"] for line in lines]
    assert fractions[0] == 0 and fractions[-1] == 0.5 and set(fractions) == {0, 0.5}
    rolled = np.diff([0, *(line["num_tokens"] for line in lines)])
    for line, tokens in zip(lines, rolled, strict=True):
        samples = tokens / line["completions/mean_length"]
        if line["replay/fraction"] == 0.5:
            assert (
                round(samples) == 4 * 4
                and 1 <= line["replay/age"] <= 3
                and 0 < line["replay/ess"] <= 1
            )
        else:
            assert (
                round(samples) == 8 * 4
                and line["replay/age"] is None
                and line["replay/ess"] is None
            )
    kept = np.asarray(groups.rewards)[np.asarray(groups.step) >= 0]
    assert len(kept) > 4 and (kept.min(axis=1) < kept.max(axis=1)).all()
    rows = groups.tokens.sharding.shard_shape(groups.tokens.shape)[0]
    assert rows == 8 // 4 and groups.tokens.sharding.mesh.shape["data"] == 2


@pytest.mark.slow
def test_resume_with_replay_is_bit_for_bit(configure, replayed, tmp_path):
    folder, state = replayed
    run = helpers.stopped_after(3, folder, tmp_path / "run")
    helpers.assert_same_bits(train(configure(run, **HARD)), state)
    assert helpers.metrics(run) == helpers.metrics(folder)


@pytest.mark.slow
def test_buffer_loads_on_another_mesh_but_not_with_another_size(configure, replayed):
    folder, state = replayed
    mesh = MeshConfig(data=4, model=2)
    helpers.assert_same_bits(train(configure(folder, mesh=mesh, **HARD)), state)
    for other in (ReplayConfig(), ReplayConfig(capacity=12)):
        with pytest.raises(InputError, match="its replay.capacity is 8, this run's is (0|12)"):
            train(configure(folder, **HARD | {"replay": other}))


@pytest.mark.slow
def test_groups_of_skipped_updates_are_not_stored(configure, tmp_path):
    """The first of four updates a step leaves such large parameters that none after it is finite:
    3, 7, 11 in a row.
    """
    hard = HARD | {"learning_rate": 1e30, "max_skipped_updates": 9}
    state = train(configure(tmp_path, steps=2, **hard))
    assert int(state.optimizer.skipped) == 7 and (np.asarray(state.replay.groups.step) < 0).all()
    with pytest.raises(
        InputError, match="last 11 updates .* step 3, .* newest checkpoint is of step 2"
    ):
        train(configure(tmp_path, steps=3, **hard))
    assert not load_file(tmp_path / "not-finite-3.safetensors")["replayed"].any()


def test_fresh_groups_that_the_mesh_does_not_divide_are_a_mistake(configure, tmp_path):
    with pytest.raises(
        InputError, match="batch_size x replay.fresh_fraction 4 does not divide .* a multiple of 8"
    ):
        train(configure(tmp_path, mesh=MeshConfig(data=8), replay=HARD["replay"]))
