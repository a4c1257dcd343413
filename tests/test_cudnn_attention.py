from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.lm import attention, cudnn_attention
from jaxrft.lm.attention import PADDED, Cache, Segments


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cudnn_attention_equals_blocked_attention(kv_heads):
    """Two rows of two sequences with one prompt each, and padding; JAX's own implementation of the
    same function.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 9, 4, 8))
    k, v = (jax.random.normal(each, (2, 9, kv_heads, 8)) for each in keys[1:])
    own = np.array([[-1, -1, 2, 2, 2, 5, 5, 5, 5], [-1, 1, 1, -4, 4, 4, 4, 4, 4]], np.int32)
    prompt = np.array([[-1] * 9, [-1, -1, -1, -4, -4, -4, -4, -4, -4]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2, 3, 0, 0]], np.int32)
    valid = np.array([[True] * 9, [True] * 7 + [False] * 2])
    weight = jnp.asarray(valid, jnp.float32)[..., None, None]
    segments = Segments(jnp.asarray(own), jnp.asarray(prompt))
    key_positions = jnp.where(valid, positions, PADDED)

    def gradient(attend):
        def loss(q, k, v):
            mixed = attend(q, jnp.asarray(positions), Cache(k, v, key_positions), None, segments)
            return jnp.sum(jnp.sin(mixed) * weight), mixed * weight

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    by_library = gradient(partial(cudnn_attention.attend, implementation="xla"))
    chex.assert_trees_all_close(by_library, gradient(attention.attend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "head_dim, dtype, platform, reason",
    [
        (64, "bfloat16", "gpu", ""),
        (128, "bfloat16", "gpu", ""),
        (64, "bfloat16", "cpu", "it runs on GPUs, and these devices are of the platform cpu"),
        (64, "float32", "gpu", "dtype is float32, and it computes in bfloat16"),
        (60, "bfloat16", "gpu", "head_dim is 60, and it takes multiples of 8 up to 128"),
        (256, "bfloat16", "gpu", "head_dim is 256, and it takes multiples of 8 up to 128"),
    ],
)
def test_where_it_cannot_attend_the_reason_is_said(head_dim, dtype, platform, reason):
    assert cudnn_attention.unsupported_reason(head_dim, dtype, platform) == reason
