"""Compaction: the rows of a rollout that have not ended move together, into a smaller grid or to
make room for waiting prompts.

The rows of a shard are a grid of blocks. A block is `width` rows of one prompt, whose keys and
values are stored once a block; the blocks of a prompt are next to each other. All functions move
rows within their shard only.
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
    starts: Array  # [S, Q'] bool, whether a block is the first of its prompt


def grids(prompts: int, num_generations: int, max_completion_length: int) -> tuple[Grid, ...]:
    """Returns the grids of a rollout of `prompts` on each shard, from the largest to the smallest.

    Where on average g rows of a prompt are left, a block has g / 4 of them: fewer places stay
    empty, and a prompt is stored about four times.

    >>> grids(32, 8, 256)
    (Grid(blocks=32, width=8), Grid(blocks=128, width=1), Grid(blocks=64, width=1), \
Grid(blocks=16, width=1))
    """
    full = Grid(prompts, num_generations)
    return _with_smaller([full], SHRINKS, num_generations, max_completion_length)


def waiting_grids(
    max_rows: int, num_generations: int, max_completion_length: int
) -> tuple[Grid, ...]:
    """Returns the grids of a rollout that has more prompts than `max_rows` on each shard take.

    Prompts enter when the live rows fit the second grid, which has half of the places of the first;
    the others wait. Rows of a prompt that entered before are mixed with whole groups, so that all
    blocks have a quarter of a group, or the next smaller divisor.

    >>> waiting_grids(64, 8, 256)
    (Grid(blocks=32, width=2), Grid(blocks=16, width=2), Grid(blocks=16, width=1), \
Grid(blocks=4, width=1))
    """
    quarter = max(1, num_generations // 4)
    width = next(each for each in range(quarter, 0, -1) if num_generations % each == 0)
    half = Grid(max_rows // (2 * num_generations) * (num_generations // width), width)
    full = Grid(2 * half.blocks, width)
    return _with_smaller([full, half], SHRINKS[1:], num_generations, max_completion_length)


def _with_smaller(
    grids: list[Grid], shrinks: tuple[int, ...], num_generations: int, max_completion_length: int
) -> tuple[Grid, ...]:
    if max_completion_length <= SHORT:
        return tuple(grids)
    for shrink in shrinks:
        width = max(1, num_generations // (4 * shrink))
        grid = Grid(-(-grids[0].rows // (shrink * width)), width)
        if grid.rows < grids[-1].rows:
            grids.append(grid)
    return tuple(grids)


def fits(ended: Array, starts: Array, now: Grid, smaller: Grid) -> Array:
    """Returns whether the live rows of all shards fit a smaller grid.

    ended [R] bool; starts [blocks] bool, whether a block is the first of its prompt.
    """
    needed, _ = _needed(ended, starts, now, smaller.width)
    return jnp.max(jnp.sum(needed, axis=1)) <= smaller.blocks


def plan(ended: Array, starts: Array, now: Grid, smaller: Grid) -> Moves:
    """Computes which rows a smaller grid takes; see `fits`.

    The live rows of a prompt fill blocks of the smaller grid, in their order.
    """
    shards = ended.shape[0] // now.rows
    live = ~ended.reshape(shards, now.rows)
    needed, before_prompt = _needed(ended, starts, now, smaller.width)
    first_block = jnp.cumsum(needed, axis=1) - needed
    start = first_block * smaller.width - before_prompt  # less the live rows before
    place = jnp.repeat(start, now.width, axis=1) + jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(live, place, smaller.rows)

    def invert(place: Array) -> Array:
        empty = jnp.full(smaller.rows, now.rows, jnp.int32)
        return empty.at[place].set(jnp.arange(now.rows, dtype=jnp.int32), mode="drop")

    rows = jax.vmap(invert)(place)
    filled = rows < now.rows
    rows = jnp.where(filled, rows, 0)
    # the first place of a block is filled if any is
    blocks = rows.reshape(shards, smaller.blocks, smaller.width)[:, :, 0] // now.width
    prompt = jnp.cumsum(starts.reshape(shards, now.blocks), axis=1, dtype=jnp.int32)
    of_block = jnp.take_along_axis(prompt, blocks, axis=1)
    is_other = of_block[:, 1:] != of_block[:, :-1]
    return Moves(rows, filled, blocks, jnp.pad(is_other, ((0, 0), (1, 0)), constant_values=True))


def _needed(ended: Array, starts: Array, now: Grid, width: int) -> tuple[Array, Array]:
    """Counts the blocks of `width` that the live rows of each prompt take, and the live rows of the
    shard before each prompt.

    Both are [S, Q]; the first is at the last block of a prompt, and 0 at the others.
    """
    shards = ended.shape[0] // now.rows
    live = ~ended.reshape(shards, now.blocks, now.width)
    starts = starts.reshape(shards, now.blocks)
    count = jnp.sum(live, axis=2, dtype=jnp.int32)
    up_to = jnp.cumsum(count, axis=1)
    before_prompt = jax.lax.cummax(jnp.where(starts, up_to - count, 0), axis=1)
    is_last = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    return -(-jnp.where(is_last, up_to - before_prompt, 0) // width), before_prompt


def take(tree: PyTree, index: Array) -> PyTree:
    """Takes rows `index` [S, n] of each shard from leaves [S * m, ...]. Returns [S * n, ...]."""
    shards, count = index.shape

    def take_leaf(x: Array) -> Array:
        by_shard = x.reshape(shards, -1, *x.shape[1:])
        taken = jax.vmap(lambda x, index: x[index])(by_shard, index)
        return taken.reshape(shards * count, *x.shape[1:])

    return jax.tree.map(take_leaf, tree)


def put(tree: PyTree, index: Array, rows: PyTree) -> PyTree:
    """Writes `rows`, leaves [S * n, ...], to the places `index` [S, n] of leaves [S * m, ...].

    What lies behind the end of a shard is dropped.
    """
    shards = index.shape[0]

    def put_leaf(x: Array, rows: Array) -> Array:
        by_shard = x.reshape(shards, -1, *x.shape[1:])
        new = rows.reshape(shards, -1, *x.shape[1:])
        write = jax.vmap(lambda x, index, new: x.at[index].set(new, mode="drop"))
        written = write(by_shard, index, new).reshape(x.shape)
        return constrain(written, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(put_leaf, tree, rows)


def append(first: PyTree, second: PyTree, shards: int) -> PyTree:
    """Appends the rows of each shard, leaves [S * n, ...], to those of `first` [S * m, ...]."""

    def append_leaf(x: Array, y: Array) -> Array:
        parts = (each.reshape(shards, -1, *each.shape[1:]) for each in (x, y))
        joined = jnp.concatenate(tuple(parts), axis=1)
        return constrain(joined.reshape(-1, *x.shape[1:]), "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(append_leaf, first, second)
