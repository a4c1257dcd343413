"""What is told of the tasks, as a few numbers each: which domain, and where among the
embeddings.
"""

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
    The table is one that `checks.check_table` has seen.
    """
    parts = []
    if tasks.domain is not None:
        parts.append(jax.nn.one_hot(domain(tasks.domain), DOMAINS, dtype=jnp.float32))
    if tasks.embeddings is not None:
        parts.append(components(tasks.embeddings))
    return jnp.concatenate(parts, axis=1) if parts else jnp.zeros((num_tasks, 1), jnp.float32)


def domain(ids: Array) -> Array:
    """Computes which feature tells each of the domains `ids` [N]."""
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
    found = x @ basis
    _, turn = jnp.linalg.eigh(found.T @ found)
    found = found @ turn
    scale = jnp.sqrt(size * jnp.mean(found * found, axis=0, keepdims=True))
    return jnp.where(scale > 1e-3, found / jnp.maximum(scale, 1e-3), 0)
