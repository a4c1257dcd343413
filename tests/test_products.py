import chex
import jax
import jax.numpy as jnp
import pytest

from jaxrft.lm.products import product


@pytest.mark.parametrize(
    "equation, of_w",
    [("rtd,df->rtf", (4, 9)), ("rtd,df->rtf", (4, 2)), ("rtd,dhe->rthe", (4, 3, 2))],
)
def test_its_gradient_is_that_of_einsum(equation, of_w):
    """Where the product widens, and where it narrows."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (2, 5, 4)), jax.random.normal(keys[1], of_w)

    def gradient(multiply):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(multiply(equation, x, w))), argnums=(0, 1))(
            x, w
        )

    chex.assert_trees_all_close(gradient(product), gradient(jnp.einsum), rtol=1e-6, atol=1e-6)
