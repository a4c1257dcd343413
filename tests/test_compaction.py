"""Rows of a rollout that are left move into smaller grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft.lm import compaction
from jaxrft.lm.compaction import Grid


def test_a_plan_by_hand():
    """Blocks of 4 rows with 3, 0 and 2 live ones need 2, 0 and 1 blocks of 2 rows."""
    live = jnp.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
    ended, starts = ~live.reshape(-1), jnp.ones(3, bool)
    moves = compaction.plan(ended, starts, Grid(3, 4), Grid(4, 2))
    assert moves.rows[0].tolist() == [0, 2, 3, 0, 9, 11, 0, 0]
    assert moves.filled[0].tolist() == [True, True, True, False, True, True, False, False]
    assert moves.blocks[0].tolist() == [0, 0, 2, 0]
    assert moves.starts[0].tolist() == [True, False, True, True]
    assert compaction.fits(ended, starts, Grid(3, 4), Grid(3, 2))
    assert not compaction.fits(ended, starts, Grid(3, 4), Grid(2, 2))


def test_blocks_of_a_prompt_are_joined():
    """The prompt of the first three blocks has 1 + 2 + 1 live rows, which fill two blocks of 2."""
    live = jnp.array([[0, 1], [1, 1], [1, 0], [0, 1]], bool)
    ended, starts = ~live.reshape(-1), jnp.array([True, False, False, True])
    moves = compaction.plan(ended, starts, Grid(4, 2), Grid(4, 2))
    assert moves.rows[0].tolist() == [1, 2, 3, 4, 7, 0, 0, 0]
    assert moves.blocks[0, :3].tolist() == [0, 1, 3]
    assert moves.starts[0, :3].tolist() == [True, False, True]
    assert compaction.fits(ended, starts, Grid(4, 2), Grid(3, 2))
    assert not compaction.fits(ended, starts, Grid(4, 2), Grid(2, 2))


SHAPES = [(1, Grid(5, 3), 1), (2, Grid(3, 4), 2), (3, Grid(2, 6), 4)]
plan = jax.jit(compaction.plan, static_argnums=(2, 3))


@settings(deadline=None)
@given(st.sampled_from(SHAPES), st.randoms(use_true_random=False), st.floats(0, 1))
def test_every_live_row_is_in_one_place_of_a_block_of_its_prompt(shape, random, share):
    shards, now, width = shape
    smaller = Grid(now.blocks * -(-now.width // width), width)
    live = np.array([random.random() < share for _ in range(shards * now.rows)])
    starts = np.array([random.random() < 0.5 for _ in range(shards * now.blocks)])
    starts.reshape(shards, now.blocks)[:, 0] = True
    prompt = np.cumsum(starts)
    moves = plan(~live, starts, now, smaller)
    for shard, rows in enumerate(np.asarray(moves.rows)):
        filled = np.asarray(moves.filled[shard])
        kept = rows[filled]
        assert sorted(kept) == np.flatnonzero(live.reshape(shards, -1)[shard]).tolist()
        of_shard = prompt[shard * now.blocks : (shard + 1) * now.blocks]
        blocks = np.asarray(moves.blocks[shard])
        of_place = np.repeat(of_shard[blocks], width)
        assert (of_place[filled] == of_shard[kept // now.width]).all()
        used = filled.reshape(-1, width).any(axis=1)
        assert len(set(of_shard[blocks[used]])) == moves.starts[shard][used].sum()
        # no block but the last of a prompt has an empty place
        for number in set(of_shard[blocks[used]]):
            of_prompt = filled[of_place == number]
            assert used.sum() == len(used) or of_prompt[: of_prompt.sum()].all()


def test_rows_are_taken_from_and_put_into_their_shard():
    table = {"a": jnp.arange(6), "b": jnp.arange(12).reshape(6, 2)}
    index = jnp.array([[2, 0], [1, 1]])
    taken = compaction.take(table, index)
    assert taken["a"].tolist() == [2, 0, 4, 4]
    assert taken["b"].tolist() == [[4, 5], [0, 1], [8, 9], [8, 9]]
    behind = jnp.array([[2, 0], [1, 3]])
    assert compaction.put(table["a"], behind, jnp.array([-1, -2, -3, -4])).tolist() == [
        -2, 1, -1, 3, -3, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("generations", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("prompts", [1, 3, 32])
def test_grids_shrink_and_hold_the_share_of_the_rows(prompts, generations):
    grids = compaction.grids(prompts, generations, 256)
    assert grids[0] == Grid(prompts, generations)
    rows = [grid.rows for grid in grids]
    assert rows == sorted(set(rows), reverse=True)
    assert len(grids) <= 4
    for grid in grids[1:]:
        assert generations % grid.width == 0
    assert compaction.grids(prompts, generations, compaction.SHORT) == grids[:1]


@pytest.mark.parametrize("generations", [1, 2, 6, 8, 9, 64])
def test_half_of_the_places_take_whole_groups(generations):
    for rows in (2 * generations, 5 * generations, 100 * generations):
        full, half, *smaller = compaction.waiting_grids(rows, generations, 256)
        assert full.rows == 2 * half.rows <= rows
        assert half.rows % generations == 0 and generations % half.width == 0
        assert [grid.rows for grid in smaller] == sorted({g.rows for g in smaller}, reverse=True)
        short = compaction.waiting_grids(rows, generations, compaction.SHORT)
        assert short == (full, half)
