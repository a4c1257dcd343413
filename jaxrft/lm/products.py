"""Matrix products whose gradient suits XLA's processors."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrft.types import Array


def product(equation: str, x: Array, w: Array, *, dtype: DTypeLike | None = None) -> Array:
    """Returns `jnp.einsum(equation, x, w)`, of activations and a weight, or of queries and keys, in
    `dtype`.

    The gradient of `w` sums over positions, and XLA transposes the first operand of such a product:
    on CPUs element by element, together with what made it. So the narrower one comes first. JAX's
    own rule puts the result's gradient there, which is the wider one where a layer widens: on two
    cores that was a quarter of an update. Gradients are computed in the dtype of `x` and `w`, which
    is one.
    """
    return _product(equation, x.dtype if dtype is None else dtype, x, w)


def _einsum(equation: str, dtype: DTypeLike, x: Array, w: Array) -> Array:
    return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def _forward(
    equation: str, dtype: DTypeLike, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, dtype, x, w), (x, w)


def _backward(
    equation: str, dtype: DTypeLike, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w = saved
    g = g.astype(x.dtype)
    operands, of_result = equation.split("->")
    of_x, of_w = operands.split(",")
    to_x = jnp.einsum(f"{of_result},{of_w}->{of_x}", g, w)
    if x.size <= g.size:
        return to_x, jnp.einsum(f"{of_x},{of_result}->{of_w}", x, g)
    return to_x, jnp.einsum(f"{of_result},{of_x}->{of_w}", g, x)


_product = jax.custom_vjp(_einsum, nondiff_argnums=(0, 1))
_product.defvjp(_forward, _backward)
