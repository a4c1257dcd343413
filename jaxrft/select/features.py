"""Features of the tasks: the domain, and principal components of the embedding."""

import jax
import jax.numpy as jnp

from jaxrft.types import Array, Tasks

DOMAINS = 16  # features of a task's domain
COMPONENTS = 32  # features of its embedding
ITERATIONS = 3


def describe(tasks: Tasks, num_tasks: int) -> Array:
    """Computes features [N, F] of every task from its domain and its embedding.

    They are the domain (modulo 16, one-hot) and the principal components of the embedding. The
    components are standardized and share one unit of squared length a task. Tasks without domains
    and embeddings have one feature, 0: checkpoints hold no empty arrays.
    The table must have passed `checks.check_table`.
    """
    parts = []
    if tasks.domain is not None:
        parts.append(jax.nn.one_hot(domain(tasks.domain), DOMAINS, dtype=jnp.float32))
    if tasks.embeddings is not None:
        parts.append(components(tasks.embeddings))
    return jnp.concatenate(parts, axis=1) if parts else jnp.zeros((num_tasks, 1), jnp.float32)


def domain(ids: Array) -> Array:
    """Computes the index of the feature of each of the domains `ids` [N]."""
    return ids % DOMAINS


def components(embeddings: Array) -> Array:
    """Computes the leading principal components [N, F] of `embeddings` [N, E].

    They are found by subspace iteration [arXiv 0909.4061].
    """
    num_tasks, width = embeddings.shape
    x = embeddings.astype(jnp.float32)
    x = x - x.mean(axis=0, keepdims=True)
    x = x / jnp.maximum(jnp.sqrt(jnp.mean(x * x)), 1e-12)
    size = min(COMPONENTS, width)
    basis = jax.random.normal(jax.random.key(0), (width, size), jnp.float32)
    for _ in range(ITERATIONS):
        basis = jnp.linalg.qr(x.T @ (x @ basis))[0]
    projected = x @ basis
    _, rotation = jnp.linalg.eigh(projected.T @ projected)
    projected = projected @ rotation
    scale = jnp.sqrt(size * jnp.mean(projected * projected, axis=0, keepdims=True))
    return jnp.where(scale > 1e-3, projected / jnp.maximum(scale, 1e-3), 0)
