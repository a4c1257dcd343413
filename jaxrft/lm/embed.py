"""Embeds a prompt as one vector: the mean of a policy's last hidden states."""

import jax.numpy as jnp

from jaxrft.lm.model import Policy
from jaxrft.types import Array, PyTree


def pooled(policy: Policy, params: PyTree, tokens: Array, lengths: Array) -> Array:
    """Averages the hidden states after the final norm over each prompt's tokens. [B, D] float32.

    e_b = 1 / n_b sum_{t < n_b} h_bt, summed in float32 whatever the policy computes in:
    transformers' `hidden_states[-1]`, averaged. tokens [B, P] right-padded, lengths [B] their
    numbers n of real tokens, at least 1; padding is not seen.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    valid = positions < lengths[:, None]
    hidden, _ = policy.apply(params, tokens, positions, valid)
    total = jnp.sum(jnp.where(valid[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
    return total / lengths[:, None].astype(jnp.float32)
