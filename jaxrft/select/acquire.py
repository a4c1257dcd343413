"""From pass rates to a batch: draws, distances to the target, and an exact top-k over a sharded table."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain, shards
from jaxrft.select import posterior
from jaxrft.types import Array


def thompson(key: Array, state: posterior.BetaState, *, batch_size: int, target: ArrayLike = 0.5) -> Array:
    """Ids [B] of the tasks whose draw theta_i ~ Beta(alpha_i, beta_i) is nearest `target` [arXiv 2510.26374]."""
    key_draw, key_tie = jax.random.split(key)
    return nearest(key_tie, posterior.sample(key_draw, state), batch_size=batch_size, target=target)


def nearest(key: Array, pass_rate: Array, *, batch_size: int, target: ArrayLike = 0.5) -> Array:
    """Ids [B] of the tasks whose `pass_rate` [N] is nearest `target`; ties at random, NaN last."""
    return smallest(key, jnp.abs(pass_rate - jnp.asarray(target, pass_rate.dtype)), batch_size=batch_size)


def smallest(key: Array, score: Array, *, batch_size: int) -> Array:
    """Ids [B] int32, distinct, of the B smallest scores [N], smallest first; ties at random by `key`, NaN last.

    Exact, and the same on any mesh: every shard of the table sorts its own rows, and the B best of each meet.
    """
    num_tasks = score.shape[0]
    count = shards(jax.sharding.get_abstract_mesh(), "task")
    count = count if num_tasks % count == 0 else 1
    table = (score, jax.random.bits(key, (num_tasks,)), jnp.arange(num_tasks, dtype=jnp.int32))
    if count > 1:
        rows = [constrain(x.reshape(count, -1), "task", None) for x in table]
        table = [x[:, :batch_size].reshape(-1) for x in jax.lax.sort(rows, dimension=1, num_keys=2)]
    return jax.lax.sort(table, num_keys=2)[2][:batch_size]  # sort puts NaN behind infinity
