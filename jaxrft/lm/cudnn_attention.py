"""Attention of packed sequences by cuDNN, which keeps no scores, for updates on GPUs (`attention =
"cudnn"`).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrft.lm.attention import Cache, Segments, visible
from jaxrft.types import Array

MOST_HEAD_DIM = 128  # cuDNN's limit for a gradient on all GPUs that it serves
MULTIPLE = 8  # head_dim must be a multiple of it


def unsupported_reason(head_dim: int, dtype: DTypeLike, platform: str) -> str:
    """Returns why cuDNN cannot compute attention, "" if it can."""
    if platform != "gpu":
        return f"it runs on GPUs, and these devices are of the platform {platform}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"dtype is {jnp.dtype(dtype)}, and it computes in bfloat16"
    if head_dim % MULTIPLE or head_dim > MOST_HEAD_DIM:
        return f"head_dim is {head_dim}, and it takes multiples of {MULTIPLE} up to {MOST_HEAD_DIM}"
    return ""


def attend(
    q: Array,
    positions: Array,
    current: Cache,
    prefix: Cache | None = None,
    segments: Segments | None = None,
    *,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Array:
    """Computes `jaxrft.lm.attention.attend` where queries and keys are of the same tokens,
    without a prefix.

    `implementation` is that of `jax.nn.dot_product_attention`: "xla" computes the same anywhere.
    """
    assert prefix is None, "updates have no prefix: prompts are packed with their completions"
    sees = current.positions[:, None, :] <= positions[:, :, None]
    if segments is not None:
        sees &= visible(segments, segments)
    return jax.nn.dot_product_attention(
        q, current.keys, current.values, mask=sees[:, None], implementation=implementation
    )
