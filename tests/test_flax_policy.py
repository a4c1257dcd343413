"""An example: a Flax module as a `Policy`, in Linen and in NNX.

A module needs no cache of its own. `recomputing` makes a Policy of any causal forward pass whose cache is the tokens
themselves: each new token costs a pass over all before it, T times the work of a cache of keys and values, and a
prompt is computed once a sample. Good for trying a model out; a module with a cache of its own implements the three
functions of `Policy` directly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft.learn import grpo, update
from jaxrft.lm import rollout
from jaxrft.lm.model import FREE, PADDED, Policy
from jaxrft.types import Array

VOCABULARY, WIDTH, HEADS, LONGEST = 12, 16, 2, 16


class Seen(NamedTuple):
    """The cache of a policy without one."""

    tokens: Array  # [1, rows, length] int32
    positions: Array  # [1, rows, length] int32, FREE where nothing was written, PADDED where there is nothing to see


def recomputing(forward: Callable[..., Array], unembed: Callable[..., Array]) -> Policy:
    """The Policy of forward(params, tokens [rows, S], positions [rows, S]) -> hidden [rows, S, D], causal in positions.

    `unembed` is (params, hidden [..., D]) -> logits [..., V].
    """

    def apply(
        params: Any,
        tokens: Array,
        positions: Array,
        valid: Array,
        cache: Seen | None = None,
        prefix: Seen | None = None,
    ) -> tuple[Array, Seen]:
        own, start = Seen(tokens[None], jnp.where(valid, positions, PADDED)[None]), jnp.int32(0)
        if cache is not None:
            start = jnp.sum(cache.positions[0, 0] != FREE, dtype=jnp.int32)
            own = jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, start, axis=2), cache, own)
        seen = own
        if prefix is not None:
            start = start + prefix.tokens.shape[2]
            group = tokens.shape[0] // prefix.tokens.shape[1]
            seen = jax.tree.map(lambda p, x: jnp.concatenate([jnp.repeat(p, group, axis=1), x], axis=2), prefix, own)
        hidden = forward(params, seen.tokens[0], seen.positions[0])
        return jax.lax.dynamic_slice_in_dim(hidden, start, tokens.shape[1], axis=1), own

    def init_cache(rows: int, length: int) -> Seen:
        tokens = jnp.zeros((1, rows, length), jnp.int32)
        return Seen(tokens, jnp.full_like(tokens, FREE))

    return Policy(apply, unembed, init_cache)


def causal(positions: Array) -> Array:
    """Which keys a query may see, [rows, 1, queries, keys]: padding and free slots lie in the far future."""
    return positions[:, None, :, None] >= positions[:, None, None, :]


class LinenTransformer(nn.Module):
    """One block."""

    def setup(self) -> None:
        self.embed, self.place = nn.Embed(VOCABULARY, WIDTH), nn.Embed(LONGEST, WIDTH)
        self.attend, self.norm = nn.MultiHeadDotProductAttention(HEADS), nn.LayerNorm()
        self.head = nn.Dense(VOCABULARY)

    def __call__(self, tokens: Array, positions: Array) -> Array:
        x = self.embed(tokens) + self.place(jnp.minimum(positions, LONGEST - 1))
        return self.norm(x + self.attend(x, mask=causal(positions)))

    def logits(self, hidden: Array) -> Array:
        return self.head(hidden)

    def both(self, tokens: Array, positions: Array) -> Array:
        """For `init`, which makes the parameters of what it calls."""
        return self.logits(self(tokens, positions))


def linen() -> tuple[Policy, Any]:
    """The Policy of a Linen module, and parameters."""
    module = LinenTransformer()
    tokens = jnp.zeros((1, 1), jnp.int32)
    policy = recomputing(module.apply, partial(module.apply, method="logits"))
    return policy, jax.jit(partial(module.init, method="both"))(jax.random.key(0), tokens, tokens)


class NNXTransformer(nnx.Module):
    """One block."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.place = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(LONGEST, WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Array, positions: Array) -> Array:
        x = self.embed(tokens) + self.place(jnp.minimum(positions, LONGEST - 1))
        return self.norm(x + self.attend(x, mask=causal(positions)))


def flax_nnx() -> tuple[Policy, Any]:
    """The Policy of an NNX module, and parameters."""
    graph, params = nnx.split(NNXTransformer(nnx.Rngs(0)))
    policy = recomputing(
        lambda params, tokens, positions: nnx.merge(graph, params)(tokens, positions),
        lambda params, hidden: nnx.merge(graph, params).head(hidden),
    )
    return policy, params


@pytest.mark.parametrize("library", [linen, flax_nnx])
def test_a_flax_module_is_rolled_out_and_trained(library):
    """Logprobs of rollout and learner agree, and the policy learns to say 7, the reward being how often it does."""
    policy, params = library()
    prompts, lengths = jnp.array([[2, 3, 4], [5, 0, 0], [6, 8, 0], [9, 10, 11]]), jnp.array([3, 1, 2, 3])
    tasks, group, time = 4, 8, 5
    options = {"num_generations": group, "max_completion_length": time, "eos_ids": (0,)}
    generate = jax.jit(partial(rollout.generate, policy, **options))
    learner = update.make(policy, mini_batch_size=tasks, micro_batch_size=tasks * group, learning_rate=3e-2)

    @jax.jit
    def train(key, params, state, rollouts):
        said = jnp.sum(rollouts.mask, axis=1, where=rollouts.tokens == 7).reshape(tasks, group)
        cells = [x.reshape(tasks, group, time) for x in (rollouts.tokens, rollouts.mask, rollouts.logprobs)]
        batch = update.Batch(prompts, lengths, *cells, advantages=grpo.advantages(said))
        learned, _ = update.completion_logprobs(policy, params, prompts, lengths, rollouts.tokens)
        return *learner.step(key, params, state, batch)[:2], jnp.mean(said), learned * rollouts.mask

    state, rewards = learner.init(params), []
    for step in range(12):
        key = jax.random.fold_in(jax.random.key(1), step)
        rollouts = generate(params, key, prompts, lengths, jnp.arange(tasks))
        params, state, reward, learned = train(key, params, state, rollouts)
        rewards.append(float(reward))
        np.testing.assert_allclose(rollouts.logprobs, learned, atol=1e-4)
    assert rewards[-1] > rewards[0] + 1.0

    rollouts = generate(params, jax.random.key(2), prompts, lengths, jnp.arange(tasks))
    padded = jnp.pad(prompts, ((0, 0), (0, 2)))
    wider = generate(params, jax.random.key(2), padded, lengths, jnp.arange(tasks))
    np.testing.assert_array_equal(wider.tokens, rollouts.tokens)
