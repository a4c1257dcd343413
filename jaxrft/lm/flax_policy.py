"""Makes a `Policy` of a Flax module, with or without a cache of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxrft.lm.attention import FREE, PADDED, Segments, visible
from jaxrft.lm.model import Policy
from jaxrft.types import Array, InputError, PyTree


class Forward(Protocol):
    """Calls a module that has its parameters; what a user of `flax_policy` writes."""

    def __call__(
        self, module: Any, tokens: Array, positions: Array, mask: Array, cache: PyTree | None, /
    ) -> Array | tuple[Array, PyTree]:
        """Returns logits [rows, T, V]; with a cache also its entries of the new tokens."""
        ...


class Cache(NamedTuple):
    """The earlier tokens: as the module caches them, or the tokens themselves."""

    entries: PyTree  # leaves [rows, length, ...]
    # [rows, length] int32; FREE for slots not written yet, PADDED for padding
    positions: Array


def flax_policy(
    module: linen.Module | nnx.Module,
    forward: Forward,
    init_cache: Callable[[int, int], PyTree] | None = None,
) -> Policy:
    """Returns the Policy of a Linen or NNX module, whose parameters are `module.init(...)` or
    `nnx.state(module)`.

    Without `init_cache` each new token costs a pass over all before it. `forward(module, tokens,
    positions, mask, None)` returns logits [rows, T, V] of tokens and positions [rows, T]; `mask`
    [rows, 1, T, T] says which tokens (last axis) each token may see.

    With `init_cache(rows, length)`, which returns a pytree of zeros with leaves [rows, length,
    ...], `forward(module, tokens, positions, mask, cache)` returns (logits, new): the same pytree
    for the T new tokens, leaves [rows, T, ...]. `mask` [rows, 1, T, length + T] covers the tokens
    of the cache and then the new ones, and the module attends to both, joined in this order. The
    caller stores the new entries. Each new token copies the cache once, since a group's shared
    prompt is joined to each of its samples.

    The module must be causal: it may look at other tokens through `mask` only. That cannot be
    checked; a module that looks elsewhere gives logits in training that differ from those of the
    rollout. Logits of a whole batch exist at once, [rows, T, V], where the package's decoder makes
    a few positions at a time.

    >>> class Model(linen.Module):
    ...     @linen.compact
    ...     def __call__(self, tokens, positions, mask):
    ...         x = linen.Embed(12, 8)(tokens) + linen.Embed(32, 8)(positions)
    ...         return linen.Dense(12)(x + linen.MultiHeadDotProductAttention(2)(x, mask=mask))
    >>> def forward(module, tokens, positions, mask, cache):
    ...     return module(tokens, positions, mask)
    >>> policy = flax_policy(Model(), forward)
    >>> tokens = jnp.zeros((2, 3), jnp.int32)
    >>> params = Model().init(jax.random.key(0), tokens, tokens, None)
    >>> logits, cache = policy.apply(params, tokens, tokens, tokens == 0)
    >>> logits.shape
    (2, 3, 12)

    Raises InputError for a module that is of neither kind, and for logits or cache entries of
    another shape.
    """
    call = _bind(module, forward)

    def attend_to(
        earlier: Cache,
        params: PyTree,
        tokens: Array,
        positions: Array,
        valid: Array,
        segments: Segments | None = None,
    ) -> tuple[Array, Cache]:
        """Returns the logits [rows, T, V] of tokens [rows, T] behind `earlier` ones, and their own
        entries.

        There are no earlier ones where the tokens are of several `segments`.
        """
        key_positions = jnp.where(valid, positions, PADDED)
        all_positions = jnp.concatenate([earlier.positions, key_positions], axis=1)
        if init_cache is None:
            new = tokens
            all_tokens = jnp.concatenate([earlier.entries, tokens], axis=1)
            logits = _all_logits(call, params, all_tokens, all_positions, segments)
            logits = logits[:, -tokens.shape[1] :]
        else:
            mask = _mask(positions, all_positions, segments)
            logits, new = _checked_pair(call(params, tokens, positions, mask, earlier.entries))
            logits = _checked_logits(logits, tokens.shape)
            _check_entries(new, earlier.entries, tokens.shape)
        return logits, Cache(new, key_positions)

    def apply(
        params: PyTree,
        tokens: Array,
        positions: Array,
        valid: Array,
        prefix: Cache | None = None,
        segments: Segments | None = None,
    ) -> tuple[Array, Cache]:
        rows = tokens.shape[0]
        earlier = empty_cache(rows, 0) if prefix is None else _repeat(prefix, rows)
        return attend_to(earlier, params, tokens, positions, valid, segments)

    def unchanged(tree: PyTree) -> PyTree:
        return tree

    def decode(
        params: PyTree, prefix: Cache, tokens: Array, positions: Array, slot: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        earlier = _join(_repeat(prefix, tokens.shape[0]), cache)
        valid = jnp.ones((tokens.shape[0], 1), bool)
        logits, new = attend_to(earlier, params, tokens[:, None], positions[:, None], valid)
        return unembed(params, logits[:, 0]), _write(cache, new, slot)

    def empty_cache(rows: int, length: int) -> Cache:
        entries = (
            jnp.zeros((rows, length), jnp.int32) if init_cache is None else init_cache(rows, length)
        )
        _check_leaves(entries, rows, length)
        return Cache(entries, jnp.full((rows, length), FREE, jnp.int32))

    def resize_cache(cache: Cache, length: int, first: Array | int) -> Cache:
        longer = _join(cache, empty_cache(cache.positions.shape[0], length))

        def part(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, first, length, axis=1)

        return jax.tree.map(part, longer)

    def unembed(params: PyTree, logits: Array) -> Array:
        return logits.astype(jnp.float32)

    return Policy(
        apply=apply,
        unembed=unembed,
        init_cache=empty_cache,
        resize_cache=resize_cache,
        prepare_weights=unchanged,
        prepare_prompts=unchanged,
        decode=decode,
    )


def _bind(
    module: linen.Module | nnx.Module, forward: Forward
) -> Callable[..., Array | tuple[Array, PyTree]]:
    """Returns `forward` as a function of the parameters and its other arguments."""
    if isinstance(module, linen.Module):
        return linen.apply(forward, module)
    if isinstance(module, nnx.Module):
        graph, _, other = nnx.split(module, nnx.Param, ...)
        return lambda params, *arguments: forward(nnx.merge(graph, params, other), *arguments)
    raise InputError(
        f"module is a {type(module).__name__}: it must be a flax.linen.Module or a flax.nnx.Module"
    )


def _all_logits(
    call: Callable[..., Array | tuple[Array, PyTree]],
    params: PyTree,
    tokens: Array,
    positions: Array,
    segments: Segments | None,
) -> Array:
    """Computes the logits [rows, T, V] of all tokens [rows, T] in one pass, without a cache."""
    inputs = jnp.where(positions < PADDED, positions, 0)
    mask = _mask(positions, positions, segments)
    return _checked_logits(call(params, tokens, inputs, mask, None), tokens.shape)


def _check_leaves(entries: PyTree, rows: int, length: int) -> None:
    for leaf in jax.tree.leaves(entries):
        if leaf.shape[:2] != (rows, length):
            raise InputError(
                f"init_cache({rows}, {length}) returned a leaf of shape {leaf.shape}: "
                f"it must be [{rows}, {length}, ...]"
            )


def _mask(queries: Array, keys: Array, segments: Segments | None) -> Array:
    """Returns which keys [rows, K] each query [rows, T] may see, by positions and segments. [rows,
    1, T, K] bool.
    """
    causal = queries[:, None, :, None] >= keys[:, None, None, :]
    return causal if segments is None else causal & visible(segments, segments)[:, None]


def _repeat(prefix: Cache, rows: int) -> Cache:
    group = rows // prefix.positions.shape[0]
    return jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), prefix)


def _join(first: Cache, second: Cache) -> Cache:
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), first, second)


def _write(cache: Cache, new: Cache, slot: Array) -> Cache:
    """Writes new entries at `slot`, which all rows share."""

    def put(old: Array, x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), slot, axis=1)

    return jax.tree.map(put, cache, new)


def _checked_logits(logits: Array | tuple, tokens_shape: tuple[int, ...]) -> Array:
    if isinstance(logits, tuple):
        raise InputError("forward returned a tuple: without init_cache it must return logits alone")
    if logits.ndim != 3 or logits.shape[:2] != tokens_shape:
        rows, steps = tokens_shape
        raise InputError(
            f"forward returned logits of shape {logits.shape}: they must be "
            f"[{rows}, {steps}, vocabulary]"
        )
    return logits


def _checked_pair(result: Array | tuple[Array, PyTree]) -> tuple[Array, PyTree]:
    if not isinstance(result, tuple) or len(result) != 2:
        kind = type(result).__name__
        raise InputError(
            f"forward returned a {kind}: with init_cache it must return (logits, new entries)"
        )
    return result


def _check_entries(new: PyTree, cache: PyTree, tokens_shape: tuple[int, ...]) -> None:
    expected = jax.tree.map(lambda x: (*tokens_shape, *x.shape[2:]), cache)
    shapes = jax.tree.map(lambda x: x.shape, new)
    if shapes != expected:
        raise InputError(
            f"forward returned new cache entries of shapes {shapes}: they must be {expected}, as "
            "init_cache has them"
        )
