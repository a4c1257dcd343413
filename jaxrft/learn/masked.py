"""Reductions over the entries with mask 1 that never give NaN, neither in value nor in gradient.

What stands at a masked place (NaN, inf, garbage) changes nothing; over an empty mask every
reduction is 0. All take `x` of any shape and a `mask` of the same shape (0 or 1), both of any
dtype, and compute in float32. `axis` and `keepdims` are numpy's. Raises InputError for a mask of
another shape and for numbers that are not real.
"""

import jax.numpy as jnp

from jaxrft.shapes import REAL, check_dtypes, check_same_shape
from jaxrft.types import Array

Axis = int | tuple[int, ...] | None


def zero(x: Array, mask: Array) -> Array:
    """Returns `x` in float32 with exactly 0, and gradient 0, where the mask is 0.

    Call it before, not after, a function that can overflow (exp, log, 1/x): a product with the mask
    keeps 0 * inf.
    """
    check_same_shape(x=x, mask=mask)
    check_dtypes(REAL, x=x, mask=mask)
    return jnp.where(mask.astype(bool), x.astype(jnp.float32), 0.0)


def count(mask: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """Returns the number of entries that the mask keeps, float32."""
    check_dtypes(REAL, mask=mask)
    return jnp.sum(mask.astype(bool), axis=axis, keepdims=keepdims, dtype=jnp.float32)


def mean(x: Array, mask: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """Returns the mean of the entries kept; 0 if there is none."""
    total = jnp.sum(zero(x, mask), axis=axis, keepdims=keepdims)
    return total / jnp.maximum(count(mask, axis=axis, keepdims=keepdims), 1.0)


def std(x: Array, mask: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """Computes the unbiased standard deviation, sqrt(sum (x - mean)^2 / (n - 1)), of the entries
    kept; 0 if n < 2.

    Deviation: the gradient where all entries are equal, infinite in truth, is 0.
    """
    clean = zero(x, mask)
    centered = zero(clean - mean(clean, mask, axis=axis, keepdims=True), mask)
    degrees = jnp.maximum(count(mask, axis=axis, keepdims=keepdims) - 1.0, 1.0)
    variance = jnp.sum(centered**2, axis=axis, keepdims=keepdims) / degrees
    spread = variance > 0
    return jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)
