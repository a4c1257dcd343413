"""Compaction: when rows of a rollout have ended, those that have not move into a smaller grid.

The rows of a shard are a grid of blocks. A block is `width` rows of one prompt, whose keys and
values are stored once a block. All functions move rows within their shard only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree

# A smaller grid has 1 / SHRINKS as many rows as the first. Each is a program to compile for each
# length of the cache.
SHRINKS = (2, 4, 16)
SHORT = 64  # tokens; completions end so soon that a smaller grid is not worth its program


class Grid(NamedTuple):
    """The rows of a decoding batch on each shard."""

    blocks: int
    width: int

    @property
    def rows(self) -> int:
        """Counts the rows."""
        return self.blocks * self.width


class Moves(NamedTuple):
    """Which rows and blocks of a grid those of another one are, on each of S shards."""

    rows: Array  # [S, R'] int32
    filled: Array  # [S, R'] bool, whether there is a row to move
    blocks: Array  # [S, Q'] int32


def grids(prompts: int, num_generations: int, max_completion_length: int) -> tuple[Grid, ...]:
    """Returns the grids of a rollout of `prompts` on each shard, from the largest to the smallest.

    Where on average g rows of a prompt are left, a block has g / 4 of them: fewer slots stay
    empty, and a prompt is stored about four times.

    >>> grids(32, 8, 256)
    (Grid(blocks=32, width=8), Grid(blocks=128, width=1), Grid(blocks=64, width=1), \
Grid(blocks=16, width=1))
    """
    grids = [Grid(prompts, num_generations)]
    if max_completion_length <= SHORT:
        return tuple(grids)
    for shrink in SHRINKS:
        width = max(1, num_generations // (4 * shrink))
        grid = Grid(-(-grids[0].rows // (shrink * width)), width)
        if grid.rows < grids[-1].rows:
            grids.append(grid)
    return tuple(grids)


def fits(done: Array, now: Grid, smaller: Grid) -> Array:
    """Returns whether the live rows of all shards fit a smaller grid. `done` [R] bool."""
    live = ~done.reshape(-1, now.blocks, now.width)
    return jnp.max(jnp.sum(_blocks_needed(live, smaller.width), axis=1)) <= smaller.blocks


def plan(done: Array, now: Grid, smaller: Grid) -> Moves:
    """Computes which rows a smaller grid takes. `done` [R] bool.

    The live rows of a block fill blocks of the smaller grid, in their order.
    """
    live = ~done.reshape(-1, now.blocks, now.width)
    shards = live.shape[0]
    needed = _blocks_needed(live, smaller.width)
    first_block = jnp.cumsum(needed, axis=1) - needed
    rank = jnp.cumsum(live.astype(jnp.int32), axis=2) - 1
    place = first_block[:, :, None] * smaller.width + rank
    place = jnp.where(live, place, smaller.rows).reshape(shards, now.rows)

    def invert(place: Array) -> Array:
        empty = jnp.full(smaller.rows, now.rows, jnp.int32)
        return empty.at[place].set(jnp.arange(now.rows, dtype=jnp.int32), mode="drop")

    rows = jax.vmap(invert)(place)
    filled = rows < now.rows
    rows = jnp.where(filled, rows, 0)
    # the first place of a block is filled if any is
    blocks = rows.reshape(shards, smaller.blocks, smaller.width)[:, :, 0] // now.width
    return Moves(rows, filled, blocks)


def take(tree: PyTree, index: Array) -> PyTree:
    """Takes rows `index` [S, n] of each shard from leaves [S * m, ...]. Returns [S * n, ...]."""
    shards, count = index.shape

    def of(x: Array) -> Array:
        by_shard = x.reshape(shards, -1, *x.shape[1:])
        taken = jax.vmap(lambda x, index: x[index])(by_shard, index)
        return taken.reshape(shards * count, *x.shape[1:])

    return jax.tree.map(of, tree)


def put(tree: PyTree, index: Array, rows: PyTree) -> PyTree:
    """Writes `rows`, leaves [S * n, ...], to the places `index` [S, n] of leaves [S * m, ...].

    What lies behind the end of a shard is dropped.
    """
    shards = index.shape[0]

    def of(x: Array, rows: Array) -> Array:
        by_shard = x.reshape(shards, -1, *x.shape[1:])
        new = rows.reshape(shards, -1, *x.shape[1:])
        write = jax.vmap(lambda x, index, new: x.at[index].set(new, mode="drop"))
        written = write(by_shard, index, new).reshape(x.shape)
        return constrain(written, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(of, tree, rows)


def _blocks_needed(live: Array, width: int) -> Array:
    """Counts the blocks [S, Q] of `width` that take the live rows of each block [S, Q, W]."""
    return -(-jnp.sum(live, axis=2, dtype=jnp.int32) // width)
