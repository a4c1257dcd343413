"""Functions of positions applied to a block of them at a time, for memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrft.types import Array, PyTree


def over_time(f: Callable[..., PyTree], width: int, *xs: Array) -> PyTree:
    """Computes f(*xs) by blocks of at most `width` positions of the time axis T.

    xs and the leaves of the result are [R, T, ...]. `f` must not mix positions. The backward pass
    recomputes a block. Blocks are equally long, the last one padded with zeros; T <= `width` is a
    plain call.
    """
    rows, steps = xs[0].shape[:2]
    if steps <= width:
        return f(*xs)
    count = -(-steps // width)
    width = -(-steps // count)

    def split(x: Array) -> Array:  # [R, T, ...] -> [count, R, width, ...]
        x = jnp.pad(x, ((0, 0), (0, count * width - steps)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:  # and back
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(rows, count * width, *x.shape[3:])[:, :steps]

    blocks = jax.lax.map(jax.checkpoint(lambda block: f(*block)), tuple(map(split, xs)))
    return jax.tree.map(join, blocks)
