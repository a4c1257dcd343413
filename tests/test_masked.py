import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrft.learn import masked

GARBAGE = (np.nan, np.inf, -np.inf, 1e38)


def test_numbers_worked_by_hand():
    x = jnp.array([[1.0, 2.0, 6.0, jnp.nan], [jnp.inf, 5.0, 5.0, 5.0]])
    mask = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(masked.zero(x, mask), [[1, 2, 6, 0], [0, 5, 5, 5]])
    np.testing.assert_array_equal(masked.count(mask, axis=1), [3, 3])
    np.testing.assert_array_equal(masked.mean(x, mask, axis=1), [3, 5])
    # (4 + 1 + 9) / 2 = 7
    np.testing.assert_allclose(
        masked.std(x, mask, axis=1, keepdims=True), [[np.sqrt(7)], [0]], rtol=1e-6
    )
    assert masked.mean(x, mask) == 4.0


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int32, jnp.float32, jnp.bfloat16])
def test_any_dtype_of_mask_and_values(dtype):
    mask = jnp.array([1, 0, 1]).astype(dtype)
    for x in (jnp.array([1, 7, 3], jnp.int32), jnp.array([1, 7, 3], jnp.bfloat16)):
        mean = masked.mean(x, mask)
        assert mean == 2.0 and mean.dtype == jnp.float32


@pytest.mark.parametrize("reduce", [masked.mean, masked.std])
@pytest.mark.parametrize("kept", [0, 1, 2, 4])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_value_and_gradient_are_finite_whatever_the_mask_hides(reduce, kept, garbage):
    mask = jnp.arange(4) < kept
    # equal values: the root of a variance of 0
    for values in ([3.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]):
        x = jnp.where(mask, jnp.array(values), garbage)
        value, gradient = jax.value_and_grad(reduce)(x, mask)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[kept:].any()
        if kept == 0:
            assert value == 0


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 6), elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.bool_, (3, 6)),
    st.sampled_from(GARBAGE),
)
def test_equals_numpy_on_the_entries_kept(x, mask, garbage):
    dirty = jnp.asarray(np.where(mask, x, np.float32(garbage)))
    means = masked.mean(dirty, jnp.asarray(mask), axis=1)
    stds = masked.std(dirty, jnp.asarray(mask), axis=1)
    for row, keep, mean, std in zip(x.astype(np.float64), mask, means, stds, strict=True):
        kept = row[keep]
        np.testing.assert_allclose(mean, kept.mean() if keep.any() else 0.0, atol=1e-4)
        np.testing.assert_allclose(std, kept.std(ddof=1) if keep.sum() > 1 else 0.0, atol=1e-4)
