"""Flax modules as policies, in Linen and in NNX, without a cache and with a cache of their own."""

import doctest
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.learn import grpo, update
from jaxrft.lm import compaction, rollout
from jaxrft.lm import flax_policy as module_under_test
from jaxrft.lm.flax_policy import flax_policy
from jaxrft.lm.model import Policy
from jaxrft.lm.policy import LanguageModel
from jaxrft.lm.segments import compile_rollout
from jaxrft.streams import stream_key
from jaxrft.types import Array, InputError

VOCABULARY, WIDTH, HEADS, LONGEST = 12, 16, 2, 16
TOKENS = jnp.array([[2, 3, 4], [5, 0, 0]])
POSITIONS = jnp.tile(jnp.arange(3), (2, 1))


class LinenTransformer(nn.Module):
    """One block."""

    def setup(self) -> None:
        self.embed = nn.Embed(VOCABULARY, WIDTH)
        self.place = nn.Embed(LONGEST, WIDTH)
        self.query = nn.DenseGeneral((HEADS, WIDTH // HEADS))
        self.key = nn.DenseGeneral((HEADS, WIDTH // HEADS))
        self.value = nn.DenseGeneral((HEADS, WIDTH // HEADS))
        self.out = nn.DenseGeneral(WIDTH, axis=(-2, -1))
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(VOCABULARY)

    def __call__(
        self, tokens: Array, positions: Array, mask: Array | None, cache: Any = None
    ) -> Any:
        x = self.embed(tokens) + self.place(positions)
        new = {"keys": self.key(x), "values": self.value(x)}
        seen = (
            new
            if cache is None
            else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), cache, new)
        )
        mixed = nn.dot_product_attention(self.query(x), seen["keys"], seen["values"], mask=mask)
        logits = self.head(self.norm(x + self.out(mixed)))
        return logits if cache is None else (logits, new)


def init_cache(rows: int, length: int) -> dict[str, Array]:
    shape = (rows, length, HEADS, WIDTH // HEADS)
    return {"keys": jnp.zeros(shape), "values": jnp.zeros(shape)}


def forward(module: Any, tokens: Array, positions: Array, mask: Array, cache: Any) -> Any:
    return module(tokens, positions, mask, cache)


@cache
def linen_params() -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(LinenTransformer().init)(jax.random.key(0), tokens, tokens, None)


def linen() -> tuple[Policy, Any]:
    """The Policy of a Linen module, and parameters."""
    return flax_policy(LinenTransformer(), forward), linen_params()


def linen_with_cache() -> tuple[Policy, Any]:
    """The same module and parameters with keys and values in a cache."""
    return flax_policy(LinenTransformer(), forward, init_cache), linen_params()


class NNXTransformer(nnx.Module):
    """One block."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.place = nnx.Embed(LONGEST, WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Array, positions: Array, mask: Array) -> Array:
        x = self.embed(tokens) + self.place(positions)
        return self.head(self.norm(x + self.attend(x, mask=mask)))

    def step(
        self, tokens: Array, positions: Array, mask: Array, cache: Array
    ) -> tuple[Array, Array]:
        """Caches what attention reads, from which it computes all keys and values again."""
        x = self.embed(tokens) + self.place(positions)
        mixed = self.attend(x, jnp.concatenate([cache, x], axis=1), mask=mask)
        return self.head(self.norm(x + mixed)), x


def flax_nnx() -> tuple[Policy, Any]:
    """The Policy of an NNX module, and parameters."""
    module = NNXTransformer(nnx.Rngs(0))

    def forward(module: Any, tokens: Array, positions: Array, mask: Array, cache: None) -> Array:
        return module(tokens, positions, mask)

    return flax_policy(module, forward), nnx.state(module, nnx.Param)


def flax_nnx_with_cache() -> tuple[Policy, Any]:
    """The same module and parameters with a cache."""
    module = NNXTransformer(nnx.Rngs(0))

    def forward(module: Any, *arguments: Array) -> tuple[Array, Array]:
        return module.step(*arguments)

    policy = flax_policy(module, forward, lambda rows, length: jnp.zeros((rows, length, WIDTH)))
    return policy, nnx.state(module, nnx.Param)


@pytest.mark.parametrize(
    "library",
    [
        linen,
        pytest.param(linen_with_cache, marks=pytest.mark.slow),
        pytest.param(flax_nnx, marks=pytest.mark.slow),
        pytest.param(flax_nnx_with_cache, marks=pytest.mark.slow),
    ],
)
def test_a_flax_module_is_rolled_out_and_trained(library):
    """Logprobs of rollout and learner agree, and the policy learns to say 7, the reward being how
    often it does.
    """
    policy, params = library()
    prompts, lengths = (
        jnp.array([[2, 3, 4], [5, 0, 0], [6, 8, 0], [9, 10, 11]]),
        jnp.array([3, 1, 2, 3]),
    )
    tasks, group, time = 4, 8, 5
    options = {"num_generations": group, "max_completion_length": time, "eos_ids": (0,)}
    generate = jax.jit(partial(rollout.generate, policy, **options))
    learner = update.make(
        policy, mini_batch_size=tasks, micro_batch_size=tasks * group, learning_rate=3e-2
    )

    @jax.jit
    def train(key, params, state, rollouts):
        said = jnp.sum(rollouts.mask, axis=1, where=rollouts.tokens == 7).reshape(tasks, group)
        cells = [
            x.reshape(tasks, group, time)
            for x in (rollouts.tokens, rollouts.mask, rollouts.logprobs)
        ]
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


@pytest.mark.slow
def test_finished_rows_of_a_flax_module_leave_the_grid(monkeypatch):
    """The samples are those of a rollout that computes all rows to the end."""
    policy, params = linen_with_cache()
    prompts = jnp.array([[2, 3, 4], [5, 0, 0], [6, 8, 0], [9, 10, 11]])
    lengths = jnp.array([3, 1, 2, 3])
    ends = (0, 1, 2, 3)
    options = {"num_generations": 8, "max_completion_length": 6, "eos_ids": ends}
    key = stream_key(0, np.int32(1), "rollout")
    want = jax.jit(partial(rollout.generate, policy, **options))(
        params, key, prompts, lengths, jnp.arange(4)
    )
    monkeypatch.setattr(compaction, "SHORT", 0)
    monkeypatch.setattr(rollout, "SLOTS", 2)
    config = Config("policy", TasksConfig(), "run", num_generations=8, max_completion_length=6)
    lm = LanguageModel(None, policy, None, {}, None, ends, Path())
    generate = compile_rollout(lm, config, meshes.make(1, 1, 1, devices=jax.devices()[:1]))
    got = generate(params, np.int32(1), prompts, lengths, jnp.arange(4))
    np.testing.assert_array_equal(np.where(got.mask, got.tokens, 0), want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    work = generate.work()
    assert work.segments > 2 and got.lengths.sum() <= work.drawn < 4 * 8 * want.lengths.max()


@pytest.mark.parametrize(
    "library, cached", [(linen, linen_with_cache), (flax_nnx, flax_nnx_with_cache)]
)
def test_a_cache_changes_no_logits(library: Callable, cached: Callable):
    """Prompts of a group are shared, and tokens come one at a time."""
    prompts, valid = TOKENS, POSITIONS < jnp.array([[3], [1]])
    tokens = jnp.array([[7, 8], [9, 1], [2, 3], [4, 6]])  # two samples of each prompt
    positions = jnp.array([[3, 4], [3, 4], [1, 2], [1, 2]])
    results = []
    for policy, params in (library(), cached()):
        apply, decode = jax.jit(policy.apply), jax.jit(policy.decode)
        _, prefix = apply(params, prompts, POSITIONS, valid)
        at_once, _ = apply(params, tokens, positions, jnp.ones((4, 2), bool), prefix)
        cache = policy.init_cache(4, 3)
        prepared = policy.prepare_weights(params), policy.prepare_prompts(prefix)
        logits = []
        for step in range(2):
            part = tokens[:, step], positions[:, step], jnp.int32(step)
            each, cache = decode(*prepared, *part, cache)
            logits.append(each)
        results += [at_once, jnp.stack(logits, axis=1)]
    for other in results[1:]:
        chex.assert_trees_all_close(results[0], other, rtol=1e-7, atol=1e-5)


def test_the_mask_hides_padding_and_later_tokens():
    masks = []

    def forward(module: Any, tokens: Array, positions: Array, mask: Array, cache: None) -> Array:
        masks.append(mask)
        return module(tokens, positions, mask)

    module = NNXTransformer(nnx.Rngs(0))
    policy = flax_policy(module, forward)
    policy.apply(nnx.state(module, nnx.Param), TOKENS, POSITIONS, POSITIONS < jnp.array([[3], [1]]))
    first, second = np.asarray(masks[0][:, 0]).astype(int)
    np.testing.assert_array_equal(first, [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    # the others are padding, of which nothing is used
    np.testing.assert_array_equal(second[0], [1, 0, 0])


@pytest.mark.parametrize(
    "returned, init_cache, message",
    [
        (jnp.zeros((2, 12)), None, r"logits of shape \(2, 12\): they must be \[2, 3, vocabulary\]"),
        (
            jnp.zeros((2, 1, 12)),
            None,
            r"logits of shape \(2, 1, 12\): they must be \[2, 3, "
            r"vocabulary\]",
        ),
        (
            (jnp.zeros((2, 3, 12)), None),
            None,
            "a tuple: without init_cache it must return logits alone",
        ),
        (
            np.zeros((2, 3, 12)),
            init_cache,
            r"a ndarray: with init_cache it must return "
            r"\(logits, new entries\)",
        ),
        (
            (jnp.zeros((2, 3, 12)), jnp.zeros((2, 3))),
            init_cache,
            r"cache entries of shapes "
            r"\(2, 3\): they must be {'k",
        ),
        (
            None,
            lambda rows, length: jnp.zeros((length, 1)),
            r"init_cache\(2, 0\) returned a "
            r"leaf of shape \(0, 1\)",
        ),
    ],
)
def test_wrong_result_of_forward_is_an_error(returned, init_cache, message):
    policy = flax_policy(LinenTransformer(), lambda *arguments: returned, init_cache)
    with pytest.raises(InputError, match=message):
        policy.apply({}, TOKENS, POSITIONS, POSITIONS < 3)


def test_other_modules_are_refused():
    with pytest.raises(
        InputError,
        match="module is a function: it must be a flax.linen.Module or a flax.nnx.Module",
    ):
        flax_policy(lambda x: x, forward)  # pyright: ignore


def test_example_in_the_docstring_runs():
    assert doctest.testmod(module_under_test).failed == 0
