import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.lm import blocks

X = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
Y = np.arange(10, dtype=np.int32).reshape(2, 5)


@pytest.mark.parametrize(("width", "seen"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (9, 5)])
def test_blocks_are_equally_long_and_change_no_number(width, seen):
    """5 positions in blocks of at most 4 are two of 3, one position of them padding."""
    shapes = []

    def f(x, y):
        shapes.append((x.shape, y.shape))
        return {"sum": jnp.sum(x, axis=-1), "both": jnp.sin(x) * y[..., None].astype(jnp.float32)}

    got, pull = jax.vjp(lambda x: blocks.over_time(f, width, x, Y), jnp.asarray(X))
    assert set(shapes) == {((2, seen, 3), (2, seen))}
    np.testing.assert_array_equal(got["sum"], X.sum(axis=-1))
    np.testing.assert_allclose(got["both"], np.sin(X) * Y[..., None], atol=1e-5)
    (gradient,) = pull(jax.tree.map(jnp.ones_like, got))
    np.testing.assert_allclose(gradient, 1 + np.cos(X) * Y[..., None], atol=1e-5)
