"""Tokens of the rollout, next to those of a forward pass over the whole prefix, without a cache,
for every token.

In float64 they are all equal. In float32 rounding may swap two tokens whose perturbed logits,
logits / temperature + Gumbel noise, are nearly equal.
"""

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.lm import attention, compaction, model, rollout, sampling, stop_strings
from jaxrft.lm.policy import LanguageModel
from jaxrft.lm.segments import compile_rollout
from jaxrft.streams import stream_key

SHAPE = model.ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
LORA = model.LoRA(3, 6.0, ("q", "k", "v", "o", "down"))
STRETCHED = model.RopeScaling(8.0, 1.0, 4.0, 16)
EOS = (0, 1)
MANY = tuple(range(10))  # of the 40 tokens, so that most rows end early
LONGEST, TIME = 7, 8  # tokens of a prompt, of a completion
SEED, STEP = 3, 5
# What the tokens spell, of one letter or two, and strings that end most completions early.
PIECES = [bytes(b"abc"[i // 3**j % 3] for j in range(1 + i % 2)) for i in range(SHAPE.vocab_size)]
STOP = ("cab", "bb", "acac")
CLOSE = 1e-4  # of perturbed logits that rounding to float32 may swap


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy, and how it is sampled."""

    shape: model.ModelConfig = SHAPE
    slots: int = 4  # by which the cache grows
    ends: tuple[int, ...] = EOS
    leaves: bool = False  # whether rows that are left move into smaller grids
    max_rows: int | None = None  # of all, more prompts wait
    entries: int = 0  # how often prompts enter
    tasks: int = 8
    slow: bool = False  # whether it is a slow test
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    mesh: tuple[int, int, int] = (1, 1, 1)
    kind: type[attention.LayerCache] = attention.LayerCache


CASES = {
    "biases": Case(),
    "LoRA, stretched positions, one head of keys": Case(
        SHAPE._replace(lora=LORA, rope_scaling=STRETCHED, num_kv_heads=1), slots=3, temperature=1.3
    ),
    "qk_norm, tied embeddings, a head of keys each, one segment": Case(
        SHAPE._replace(
            qk_norm=True,
            tie_word_embeddings=True,
            num_kv_heads=4,
            attention_bias=False,
            output_bias=True,
        ),
        slots=16,
        temperature=0.7,
    ),
    "top_k and top_p": Case(top_k=9, top_p=0.9, temperature=2.0),
    "min_p, a repetition penalty and stop strings, rows that leave": Case(
        min_p=0.1, repetition_penalty=1.4, temperature=1.5, stop=STOP, leaves=True
    ),
    "a repetition penalty and stop strings, rows that enter on a mesh": Case(
        slow=True,
        repetition_penalty=1.4,
        slots=2,
        stop=STOP,
        leaves=True,
        max_rows=64,
        entries=5,
        tasks=20,
        mesh=(2, 2, 2),
    ),
    "top_p on a mesh": Case(slow=True, top_p=0.7, temperature=0.8, mesh=(2, 2, 2)),
    "rows that leave": Case(ends=MANY, leaves=True),
    "rows that leave on a mesh": Case(slow=True, slots=2, ends=MANY, leaves=True, mesh=(2, 2, 2)),
    "rows that leave, a TPU's cache on a mesh": Case(
        slow=True, ends=MANY, leaves=True, mesh=(4, 2, 1), kind=attention.TpuLayerCache
    ),
    "rows that enter": Case(ends=MANY, leaves=True, max_rows=32, entries=6, tasks=11),
    "rows that enter, one group at a time": Case(slow=True, slots=2, max_rows=16, entries=8),
    "rows that enter on a mesh": Case(
        slow=True, slots=2, ends=MANY, leaves=True, max_rows=64, entries=5, tasks=20, mesh=(2, 2, 2)
    ),
    "rows that enter, a TPU's cache on a mesh": Case(
        slow=True,
        ends=MANY,
        leaves=True,
        max_rows=32,
        entries=5,
        tasks=10,
        mesh=(2, 1, 2),
        kind=attention.TpuLayerCache,
    ),
    "a TPU's cache": Case(slow=True, kind=attention.TpuLayerCache),
    "a TPU's cache on a mesh": Case(slots=3, mesh=(2, 2, 2), kind=attention.TpuLayerCache),
}


class Prompts(NamedTuple):
    """Right-padded prompts of several lengths, and the ids of their tasks."""

    tokens: np.ndarray  # [B, LONGEST] int32
    lengths: np.ndarray  # [B] int32
    ids: np.ndarray  # [B] int32


def make_prompts(number):
    random = np.random.default_rng(1)
    lengths = random.integers(1, LONGEST + 1, number).astype(np.int32)
    lengths[0] = LONGEST
    tokens = random.integers(2, SHAPE.vocab_size, (number, LONGEST)).astype(np.int32)
    tokens[np.arange(LONGEST) >= lengths[:, None]] = 0
    return Prompts(tokens, lengths, random.permutation(1000)[:number].astype(np.int32))


def make_params(shape, dtype):
    """Random parameters, norms, biases and adapters among them."""
    random = np.random.default_rng(0)
    draws = {
        row.name: random.normal(row.constant, (row.fan_in or 8) ** -0.5, row.shape)
        for row in model.table(shape)
    }
    return {name: draw.astype(np.float32).astype(dtype) for name, draw in draws.items()}


def sampled_by_rollout(case, dtype, params, prompts, group):
    """The rollout of a training step."""
    config = Config(
        "policy",
        TasksConfig(),
        "run",
        seed=SEED,
        num_generations=group,
        max_completion_length=TIME,
        temperature=case.temperature,
        top_p=case.top_p,
        top_k=case.top_k,
        min_p=case.min_p,
        repetition_penalty=case.repetition_penalty,
    )
    devices = jax.devices()[: np.prod(case.mesh)]
    mesh = meshes.make(*case.mesh, devices=devices)
    policy = model.decoder(case.shape, dtype=dtype, kind=case.kind)
    lm = LanguageModel(case.shape, policy, None, {}, None, case.ends, Path())
    rows = [meshes.from_host(mesh, array, "batch", *[None] * (array.ndim - 1)) for array in prompts]
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, model.shardings(case.shape, mesh))
        generate = compile_rollout(lm, config, mesh, max_rows=case.max_rows)
        if case.stop:  # as if of a tokenizer
            generate.stop = stop_strings.build(PIECES, case.stop)
        compact, enter = generate.compact, generate.enter
        moves = []
        entries = []
        generate.compact = lambda *state, **grids: moves.append(grids) or compact(*state, **grids)
        generate.enter = lambda *state, **grids: entries.append(grids) or enter(*state, **grids)
        found = generate(placed, np.int32(STEP), *rows)
    assert case.leaves == bool(moves)
    assert len(entries) == case.entries
    return found


def sampled_token_by_token(case, dtype, params, prompts, group):
    """Completions [R, TIME], 0 behind their ends, and logits and noise [R, TIME, V]; a token has
    the largest sum.
    """
    policy = model.decoder(case.shape, dtype=dtype, remat="none")
    starts = np.repeat(prompts.lengths, group)
    count = len(starts)
    positions = np.tile(np.arange(LONGEST + TIME, dtype=np.int32), (count, 1))
    tokens = np.pad(np.repeat(prompts.tokens, group, axis=0), ((0, 0), (0, TIME)))
    keys = keys_of_samples(prompts.ids, group)
    # attention is causal: what is not drawn yet changes nothing
    all_valid = np.ones(tokens.shape, bool)

    @jax.jit
    def logits_and_noise(params, keys, tokens, time):
        hidden, _ = policy.apply(params, tokens, positions, all_valid)
        last = hidden[jnp.arange(count), starts + time - 1]
        seen = sampling.tokens_seen(tokens, starts + time, case.shape.vocab_size)
        logits = policy.unembed(params, last)
        penalty = case.repetition_penalty
        logits = sampling.penalize(logits, seen, repetition_penalty=penalty) / case.temperature
        allowed = sampling.truncate(logits, top_k=case.top_k, top_p=case.top_p, min_p=case.min_p)
        gumbel = partial(jax.random.gumbel, shape=logits.shape[1:], dtype=jnp.float32)
        noise = jax.vmap(lambda key: gumbel(jax.random.fold_in(key, time)))(keys)
        return allowed, noise.astype(logits.dtype)

    parts = []
    done = np.zeros(count, bool)
    completions = np.zeros((count, TIME), np.int32)
    for time in range(TIME):
        logits, noise = jax.device_get(logits_and_noise(params, keys, tokens, np.int32(time)))
        parts.append((logits, noise))
        drawn = np.argmax(logits + noise, axis=1).astype(np.int32)
        completions[:, time] = np.where(done, 0, drawn)
        tokens[np.arange(count), starts + time] = drawn
        done |= [is_finished(case, row[: time + 1]) for row in completions]
    logits, noise = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
    return completions, logits, noise


def is_finished(case, tokens):
    """Whether a completion has come to an end, of its own or by a stop string."""
    text = b"".join(PIECES[token] for token in tokens).decode()
    return tokens[-1] in case.ends or any(each in text for each in case.stop)


def keys_of_samples(ids, group):
    """One key after another."""
    key = stream_key(SEED, STEP, "rollout")
    fold = jax.random.fold_in
    task = np.repeat(ids, group)
    number = np.tile(np.arange(group, dtype=np.int32), len(ids))
    return jax.lax.map(lambda sample: fold(fold(key, sample[0]), sample[1]), (task, number))


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def first_differences(got, want):
    """(row, column) of the first token in which each row differs, if it does."""
    different = got != want
    rows = np.flatnonzero(different.any(axis=1))
    return [(row, int(different[row].argmax())) for row in rows]


def sample_both(case, dtype, monkeypatch, *, tasks, group):
    monkeypatch.setattr(rollout, "SLOTS", case.slots)
    if case.leaves:
        monkeypatch.setattr(compaction, "SHORT", 0)
    with jax.enable_x64(True) if dtype == np.float64 else nullcontext():
        params = make_params(case.shape, dtype)
        arguments = (case, dtype, params, make_prompts(tasks), group)
        return sampled_by_rollout(*arguments), *sampled_token_by_token(*arguments)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * case.slow) for name, case in CASES.items()],
)
def test_in_float64_every_token_is_that_of_the_whole_prefix(monkeypatch, name):
    got, want, logits, _ = sample_both(
        CASES[name], np.float64, monkeypatch, tasks=CASES[name].tasks, group=8
    )
    np.testing.assert_array_equal(np.where(got.mask, got.tokens, 0), want)
    ends = [
        is_finished(CASES[name], row[:length])
        for row, length in zip(want, got.lengths, strict=True)
    ]
    np.testing.assert_array_equal(got.finished, ends)
    assert logits.dtype == np.float64
    probability = np.take_along_axis(softmax(logits), want[..., None], axis=-1)[..., 0]
    logprobs = np.log(np.where(got.mask, probability, 1.0))
    np.testing.assert_allclose(got.sampling_logprobs, logprobs, rtol=1e-6, atol=1e-6)
    assert got.lengths.max() == TIME and got.lengths.min() < 4  # some end and some do not


@pytest.mark.parametrize(
    "name",
    ["biases", "top_k and top_p", pytest.param("rows that leave", marks=pytest.mark.slow)],
)
def test_in_float32_only_tokens_that_are_nearly_equal_are_swapped(monkeypatch, name):
    got, want, logits, noise = sample_both(CASES[name], np.float32, monkeypatch, tasks=128, group=8)
    tokens = np.where(got.mask, got.tokens, 0)
    found = first_differences(tokens, want)
    assert len(found) <= len(want) // 1000
    for row, column in found:
        perturbed = logits[row, column] + noise[row, column]
        assert perturbed[want[row, column]] - perturbed[tokens[row, column]] < CLOSE
