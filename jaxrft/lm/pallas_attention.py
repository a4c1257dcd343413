"""A Pallas kernel for TPUs: attention of one query a row to the slots of its cache that are
written.

XLA's program reads a cache up to its length, free slots too, and has the scores of all slots at
once. The kernel reads blocks of slots up to the current one, keys and values once, and has the
scores of one block at once, in VMEM. It is opt-in until it has been timed on a TPU.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrft import mesh as meshes
from jaxrft.lm.attention import HIDDEN, LayerCache
from jaxrft.types import Array

LANES = 128  # of a vector register of a TPU: the minor dimension of its tiles
SUBLANES = 8  # of 4 bytes
BLOCK = LANES  # slots that are read at once
# of keys, and of values, at once; each is read twice ahead, which takes 4 MiB of 16 MiB of VMEM
BLOCK_BYTES = 2**20
NAME = "decode_attention"  # of the kernel in a compiled program
INTERPRET = False  # Whether the kernel is run as JAX operations, on any device: for tests


class Ref(Protocol):
    """A block in VMEM, or scalars in SMEM."""

    shape: tuple[int, ...]

    def __getitem__(self, index: object) -> Array:
        """Reads a part of the block."""
        ...

    def __setitem__(self, index: object, value: Array) -> None:
        """Writes a part of the block."""
        ...


class Block(NamedTuple):
    """The block of an array that is in VMEM at once."""

    shape: tuple[int, ...]
    # of the indices of the grid, and of the last slot, an array [1]
    index_map: Callable[..., tuple[int | Array, ...]]


class Plan(NamedTuple):
    """The grid and blocks of the kernel; n are rows times key-value heads."""

    grid: tuple[int, int]
    queries: Block  # of [n, M, head_dim]; also of the mix of values
    keys: Block  # of [n, slots, head_dim]; also of values
    scalars: Block  # of [n, M], a number a query


def unsupported_reason(head_dim: int, slots: int, platform: str) -> str:
    """Returns why the kernel cannot attend to a cache with this number of slots, "" if it can.

    A head, or a number of slots, that fills no whole tile would be padded, or transposed by XLA on
    the way in and out.
    """
    if INTERPRET:
        return ""
    if platform != "tpu":
        return f"the devices are of the platform {platform}, and the kernel is for TPUs"
    if head_dim % LANES:
        return f"the policy's head_dim is {head_dim}, and the kernel needs a multiple of {LANES}"
    if slots % BLOCK:
        return f"max_completion_length is {slots:,}, and the kernel needs a multiple of {BLOCK}"
    return ""


def attend_slots(
    q: Array, cache: LayerCache, first: Array, last: Array
) -> tuple[Array, Array, Array]:
    """Does what `attention.attend_slots` does with a `TpuLayerCache`. A mesh's devices compute
    their rows and heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not meshes.is_ours(mesh) or mesh.manual_axes:
        return _attend(q, *cache, first, last)
    heads = meshes.spec("batch", "kv_heads")
    attend = jax.shard_map(
        _attend,
        mesh=mesh,
        in_specs=(heads, heads, heads, meshes.spec("batch"), meshes.spec()),
        out_specs=(heads, heads, heads),
        check_vma=False,  # the kernel does not say over which axes its results vary
    )
    return attend(q, *cache, first, last)


def _attend(
    q: Array, keys: Array, values: Array, first: Array, last: Array
) -> tuple[Array, Array, Array]:
    """Computes `attend_slots` on one device.

    A row's heads are as separate as rows are, so both are one axis n.
    """
    rows, kv_heads, queries, width = q.shape
    slots = values.shape[2]
    flat = (rows * kv_heads, queries)
    grid, *blocks = plan(*flat, width, slots, keys.dtype.itemsize)
    of_queries, of_keys, of_scalars = (pl.BlockSpec(*block) for block in blocks)
    call = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[of_scalars, of_queries, of_keys, of_keys],
            out_specs=[of_scalars, of_scalars, of_queries],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (flat, flat, (*flat, width))
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=INTERPRET,
        name=NAME,
    )
    highest, total, mix = call(
        last.reshape(1),
        jnp.broadcast_to(first[:, None, None], (rows, kv_heads, queries)).reshape(flat),
        q.reshape(*flat, width),
        keys.reshape(-1, slots, width),
        values.reshape(-1, slots, width),
    )
    scalars = (rows, kv_heads, queries, 1)
    return highest.reshape(scalars), total.reshape(scalars), mix.reshape(q.shape)


def plan(n: int, queries: int, width: int, slots: int, item_size: int) -> Plan:
    """Divides the arrays into blocks; `width` is head_dim.

    Behind the block of the last slot the index stays the same, so that nothing more is fetched.
    """
    block = BLOCK if slots % BLOCK == 0 else slots
    fitting = BLOCK_BYTES // (width * block * item_size)
    count = min(n, max(SUBLANES, fitting // SUBLANES * SUBLANES))

    def read(step: int | Array, last: Ref) -> Array:
        return jnp.minimum(step, jnp.maximum(last[0], 0) // block)

    return Plan(
        grid=(pl.cdiv(n, count), slots // block),
        queries=Block((count, queries, width), lambda i, j, last: (i, 0, 0)),
        keys=Block((count, block, width), lambda i, j, last: (i, read(j, last), 0)),
        scalars=Block((count, queries), lambda i, j, last: (i, 0)),
    )


def _kernel(
    last: Ref, first: Ref, q: Ref, keys: Ref, values: Ref, highest: Ref, total: Ref, mix: Ref
) -> None:
    """Adds a block of slots to the largest score, the sum and the mix, which stay in VMEM from
    block to block.

    A score larger than those before scales what was summed up by exp(before - largest) (arXiv
    1805.02867).
    """
    block = pl.program_id(1)
    size = keys.shape[1]
    product: Callable[..., Array] = partial(jnp.einsum, preferred_element_type=jnp.float32)

    @pl.when(block == 0)
    def start() -> None:
        highest[...] = jnp.full(highest.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mix[...] = jnp.zeros(mix.shape, jnp.float32)

    @pl.when(block * size <= last[0])
    def add() -> None:
        scores = product("nme,nse->nms", q[...], keys[...]) / math.sqrt(q.shape[2])
        slots = block * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        visible = (slots >= first[...][..., None]) & (slots <= last[0])
        scores = jnp.where(visible, scores, HIDDEN)
        before = highest[...]
        largest = jnp.maximum(before, jnp.max(scores, axis=-1))
        scale = jnp.exp(before - largest)
        weights = jnp.exp(scores - largest[..., None])
        highest[...] = largest
        total[...] = scale * total[...] + jnp.sum(weights, axis=-1)
        mixed = product("nms,nse->nme", weights.astype(q[...].dtype), values[...])
        mix[...] = scale[..., None] * mix[...] + mixed
