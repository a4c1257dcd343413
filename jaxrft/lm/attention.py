"""Grouped-query attention (arXiv 2305.13245): of many queries for training, of one query a row for
decoding.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrft.lm.products import product
from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree

# Positions of keys that no query may see: every real position is smaller, and attention is causal
# in positions.
FREE = jnp.iinfo(jnp.int32).max  # a slot of a cache that is not written yet
PADDED = FREE - 1  # a slot that holds padding
HIDDEN = -1e30  # score of a key that a query may not see

# The queries of a block: float32 scores never exist for all pairs of positions at once.
QUERIES = 256


class Cache(NamedTuple):
    """Keys and values of every layer, as the forward pass returns them."""

    keys: Array  # [L, rows, length, kv_heads, head_dim]
    values: Array  # [L, rows, length, kv_heads, head_dim]
    positions: Array  # [L, rows, length] int32, PADDED for padding


class LayerCache(NamedTuple):
    """Keys and values of one layer, as decoding reads and updates them.

    The axis that a matrix product does not sum over is last: slots in keys, head_dim in values.
    XLA's products on CPUs are several times slower the other way round.
    """

    keys: Array  # [rows, kv_heads, head_dim, length]
    values: Array  # [rows, kv_heads, length, head_dim]


class TpuLayerCache(LayerCache):
    """The same with keys [rows, kv_heads, length, head_dim]. It is read before the new slot is
    written.

    A TPU writes a slot as the tiles that hold it. A tile has 128 numbers of the last axis and 8 of
    the one before: with slots last it takes 128 of them. And a layer that fits into VMEM would go
    there and back for the new slot, if what is attended to were what is written. On other
    processors XLA copies a cache that is written after it was read.
    """


def cache_of(platform: str, head_dim: int) -> type[LayerCache]:
    """Returns the layout of keys for decoding on a platform.

    Where a head does not fill a tile, XLA on TPUs puts slots last whatever their place, and pads a
    slot that is apart.
    """
    return TpuLayerCache if platform == "tpu" and head_dim % 128 == 0 else LayerCache


def slot_axis(cache: LayerCache) -> int:
    """Returns the axis of `keys` along which the slots are; in `values` it is 2."""
    return 2 if isinstance(cache, TpuLayerCache) else 3


def lay_out(keys: Array, values: Array, kind: type[LayerCache]) -> LayerCache:
    """Transposes keys and values [rows, T, kv_heads, head_dim] of a layer for decoding."""
    order = (0, 2, 1, 3) if issubclass(kind, TpuLayerCache) else (0, 2, 3, 1)
    return kind(keys.transpose(order), values.transpose(0, 2, 1, 3))


def write_slot(cache: LayerCache, new: LayerCache, slot: Array) -> LayerCache:
    """Returns a cache with the single slot of `new` at `slot`."""
    write = jax.lax.dynamic_update_slice_in_dim
    keys = write(cache.keys, new.keys, slot, slot_axis(cache))
    return type(cache)(keys, write(cache.values, new.values, slot, 2))


def accumulation_dtype(dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype of sums and logits: float32, or float64 if that is the `dtype` of the
    computation.
    """
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


class Segments(NamedTuple):
    """The segments of the tokens of rows that hold several sequences.

    A token sees tokens of its segment, and of the segment `prompt` that its segment continues.
    """

    ids: Array  # [rows, T] int32, the segment of each token
    prompt: Array  # [rows, T] int32, the segment that it continues; a prompt continues itself


Attend = Callable[[Array, Array, Cache, Cache | None, Segments | None], Array]
"""The arguments of `attend`, in their order."""


def attend(
    q: Array,
    positions: Array,
    current: Cache,
    prefix: Cache | None = None,
    segments: Segments | None = None,
) -> Array:
    """Computes grouped-query attention as one softmax over a prefix and the current keys, QUERIES
    queries at a time.

    q [rows, T, H, head], positions [rows, T]; the leaves of `current`, the keys and values of the
    same tokens, are [rows, T, ...], those of a
    prefix [B, length, ...], and its row b serves the rows / B queries from b * rows / B on.
    Attention is causal in positions, and tokens that see each other stand in their order: a block
    of queries needs current keys up to its end only. Returns [rows, T, H, head].
    """
    steps = q.shape[1]
    count = -(-steps // QUERIES)
    width = -(-steps // count)
    attend_block = _attend_block if count == 1 else jax.checkpoint(_attend_block)
    mixed = []
    for start in range(0, steps, width):
        stop = min(start + width, steps)
        earlier, keys = _slice((current, segments), 0, stop)
        queries = _slice(segments, start, stop)
        seen = None if queries is None else visible(queries, keys)
        sources = [_Source(earlier, seen)]
        if prefix is not None:
            sources.insert(0, _Source(prefix, None))
        mixed.append(attend_block(q[:, start:stop], positions[:, start:stop], sources))
    return constrain(jnp.concatenate(mixed, axis=1), "batch", "time", "heads", "head")


def _slice(tree: PyTree, start: int, stop: int) -> PyTree:
    """Returns the positions `start` to `stop` of leaves [rows, T, ...]."""
    return jax.tree.map(lambda x: x[:, start:stop], tree)


class _Source(NamedTuple):
    """Keys and values of one layer that a block of queries reads."""

    cache: Cache
    seen: Array | None  # [rows, queries, length] bool, by segments; None = all


def visible(queries: Segments, keys: Segments) -> Array:
    """Returns which keys [rows, K] each query [rows, T] may see by its segments. [rows, T, K]
    bool.
    """
    ids = keys.ids[:, None, :]
    return (ids == queries.ids[:, :, None]) | (ids == queries.prompt[:, :, None])


def _attend_block(q: Array, positions: Array, sources: list[_Source]) -> Array:
    """Computes `attend` for one block of queries; its scores are [rows, H, T, all lengths]."""
    rows, steps, heads, width = q.shape
    scores = []
    for source, seen in sources:
        batch, length, kv_heads, _ = source.keys.shape
        grouped = q.reshape(batch, rows // batch, steps, kv_heads, heads // kv_heads, width)
        wide = accumulation_dtype(q.dtype)
        score = product("bgtkqe,bske->bgkqts", grouped, source.keys, dtype=wide)
        query = positions.reshape(batch, rows // batch, 1, 1, steps, 1)
        sees = source.positions.reshape(batch, 1, 1, 1, 1, length) <= query
        if seen is not None:
            sees &= seen.reshape(batch, rows // batch, 1, 1, steps, length)
        score = jnp.where(sees, score / math.sqrt(width), HIDDEN)
        scores.append(score.reshape(rows, kv_heads, heads // kv_heads, steps, length))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    mixed = jnp.zeros((), q.dtype)
    start = 0
    for source, _ in sources:
        batch, length, kv_heads, _ = source.values.shape
        part = weights[..., start : start + length]
        part = part.reshape(batch, rows // batch, kv_heads, heads // kv_heads, steps, length)
        start += length
        out = product("bgkqts,bske->bgtkqe", part, source.values)
        mixed = mixed + out.reshape(q.shape)
    return mixed


AttendSlots = Callable[[Array, LayerCache, Array, Array], tuple[Array, Array, Array]]
"""(queries [rows, kv_heads, M, head_dim], cache, first [rows] int32, last [] int32) -> what
attention to the slots from a row's first to the last gives: the largest score, the sum of
exponentials [rows, kv_heads, M, 1] and the mix of values [rows, kv_heads, M, head_dim]. For a row
without such slots the largest score is HIDDEN, and the others are finite."""


def attend_slots(
    q: Array, cache: LayerCache, first: Array, last: Array
) -> tuple[Array, Array, Array]:
    """Attends by XLA, which reads all slots of the cache; see `AttendSlots`."""
    slots = jnp.arange(cache.values.shape[2], dtype=last.dtype)[None]
    visible = (slots >= first[:, None]) & (slots <= last)
    return _attend_part(q, cache, visible[:, None, None, :])


def attend_cached(
    q: Array,
    prefix: LayerCache,
    visible: Array,
    cache: LayerCache,
    new: LayerCache,
    first: Array,
    slot: Array,
    attend_slots: AttendSlots,
) -> tuple[Array, LayerCache]:
    """Attends from one query a row to the row's prompt, its slots of the cache from its `first` to
    the one before `slot`, and the new one, as one softmax.

    q [rows, H, head_dim]; the prefix has B rows, of which row b serves the rows / B queries from b
    * rows / B on; visible [B, P] bool; `new` is a single slot; first [rows] int32. Returns [rows,
    H, head_dim] and the cache with `new` at `slot`.

    The queries that share keys are the rows of one matrix product: H / kv_heads for a row's
    cache, and rows / B times as many for its prompt. The parts are merged by log-sum-exp: with the
    largest score m_i, the sum z_i = sum exp(s - m_i) and the mix o_i = sum exp(s - m_i) v of each
    part, and m the largest m_i, the result is sum_i exp(m_i - m) o_i / sum_i exp(m_i - m) z_i
    (arXiv 2112.05682).
    """
    rows, heads, width = q.shape
    batch, kv_heads, _, _ = prefix.keys.shape
    group = rows // batch
    grouped = q.reshape(batch, group, kv_heads, heads // kv_heads, width)
    to_prompt = grouped.swapaxes(1, 2).reshape(batch, kv_heads, -1, width)
    of_prompt = _attend_part(to_prompt, prefix, visible[:, None, None, :])

    # [B, kv_heads, group * H / kv_heads, n] -> [rows, kv_heads, H / kv_heads, n]
    def of_rows(x: Array) -> Array:
        x = x.reshape(batch, kv_heads, group, heads // kv_heads, x.shape[-1])
        return x.swapaxes(1, 2).reshape(rows, kv_heads, heads // kv_heads, x.shape[-1])

    queries = grouped.reshape(rows, kv_heads, heads // kv_heads, width)
    written = write_slot(cache, new, slot)
    parts = [tuple(map(of_rows, of_prompt))]
    if isinstance(cache, TpuLayerCache):
        score = _scores(queries, new)
        parts.append(attend_slots(queries, cache, first, slot - 1))
        parts.append((score, jnp.ones_like(score), new.values))
    else:
        parts.append(attend_slots(queries, written, first, slot))
    highest = reduce(jnp.maximum, [largest for largest, _, _ in parts])
    scales = [jnp.exp(largest - highest) for largest, _, _ in parts]
    mixed = reduce(jnp.add, [scale * mix for scale, (_, _, mix) in zip(scales, parts, strict=True)])
    total = reduce(
        jnp.add, [scale * part for scale, (_, part, _) in zip(scales, parts, strict=True)]
    )
    mixed = (mixed / total).astype(q.dtype).reshape(rows, heads, width)
    return constrain(mixed, "batch", "heads", "head"), written


def _attend_part(q: Array, cache: LayerCache, visible: Array) -> tuple[Array, Array, Array]:
    """Attends from queries [rows, kv_heads, M, head_dim] to the keys of a cache, without the
    softmax's division.

    Returns the largest score, the sum of exponentials [rows, kv_heads, M, 1] and the mix of values,
    all in the `accumulation_dtype` of the queries.
    """
    scores = jnp.where(visible, _scores(q, cache), HIDDEN)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    mix = jnp.einsum(
        "rkms,rkse->rkme",
        weights.astype(q.dtype),
        cache.values,
        preferred_element_type=scores.dtype,
    )
    return highest, jnp.sum(weights, axis=-1, keepdims=True), mix


def _scores(q: Array, cache: LayerCache) -> Array:
    """Returns the scores [rows, kv_heads, M, length] of a cache's keys, in the `accumulation_dtype`
    of the queries.
    """
    keys = "rkse" if isinstance(cache, TpuLayerCache) else "rkes"
    wide = accumulation_dtype(q.dtype)
    return jnp.einsum(f"rkme,{keys}->rkms", q, cache.keys, preferred_element_type=wide) / math.sqrt(
        q.shape[-1]
    )
