"""The decoding kernel, interpreted on CPU, next to XLA's own program."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.lm import attention, model, pallas_attention, rollout
from jaxrft.lm.policy import LanguageModel, make_policy
from jaxrft.lm.segments import compile_rollout

CONFIG = Config("policy", TasksConfig(), "run", num_generations=2, max_completion_length=12)
SHAPE = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


@pytest.fixture
def interpreted(monkeypatch):
    """Blocks of four slots, and three blocks of rows where there are more than 16 rows times
    heads.
    """
    monkeypatch.setattr(pallas_attention, "INTERPRET", True)
    monkeypatch.setattr(pallas_attention, "BLOCK", 4)
    # as few rows at once as possible: SUBLANES
    monkeypatch.setattr(pallas_attention, "BLOCK_BYTES", 1)


def draw(rows, kv_heads, queries, width, slots, dtype=jnp.float32):
    """Queries of every row and head, and a full cache."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, kv_heads, queries, width), *[(rows, kv_heads, slots, width)] * 2
    q, k, v = (
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return 4 * q, attention.TpuLayerCache(k, v)


@pytest.mark.parametrize(
    ("rows", "kv_heads", "queries", "width", "slots"),
    [
        (2, 1, 1, 8, 8),  # a head of keys for each of queries
        (3, 2, 2, 8, 12),
        (5, 4, 7, 16, 16),  # the last block of rows holds 4 of 8
        (8, 3, 2, 4, 7),  # no multiple of the block: all slots are one
        (1, 1, 7, 8, 4),
    ],
)
def test_the_kernel_equals_xla_at_every_slot(interpreted, rows, kv_heads, queries, width, slots):
    q, cache = draw(rows, kv_heads, queries, width, slots)
    kernel = jax.jit(pallas_attention.attend_slots)
    for slot in range(slots):
        first = jnp.arange(rows, dtype=jnp.int32) % (slot + 2)  # the last has no slot yet
        got = kernel(q, cache, first, jnp.int32(slot))
        want = attention.attend_slots(q, cache, first, jnp.int32(slot))
        sees = np.asarray(first) <= slot
        assert (np.asarray(got[0])[~sees] == attention.HIDDEN).all()
        for mine, other in zip(got, want, strict=True):
            assert mine.shape == other.shape and mine.dtype == jnp.float32
            assert np.isfinite(mine).all()
            np.testing.assert_allclose(mine[sees], other[sees], rtol=1e-5, atol=1e-5)


def test_slots_behind_the_current_one_are_not_looked_at(interpreted):
    q, cache = draw(3, 2, 2, 8, 12)
    slots = jnp.zeros(3, jnp.int32), jnp.int32(5)
    want = pallas_attention.attend_slots(q, cache, *slots)
    keys = cache.keys.at[..., 8:, :].set(jnp.nan)  # the blocks behind that of the slot
    values = cache.values.at[..., 8:, :].set(jnp.nan)
    got = pallas_attention.attend_slots(q, attention.TpuLayerCache(keys, values), *slots)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_in_bfloat16_the_kernel_is_as_near_as_xla(interpreted):
    q, cache = draw(4, 2, 6, 16, 12, jnp.bfloat16)
    slots = jnp.zeros(4, jnp.int32), jnp.int32(9)

    def normalized(parts):
        _, total, mix = parts
        return mix / total

    wide = attention.TpuLayerCache(*(x.astype(jnp.float32) for x in cache))
    exact = normalized(attention.attend_slots(q.astype(jnp.float32), wide, *slots))
    got = normalized(pallas_attention.attend_slots(q, cache, *slots))
    by_xla = normalized(attention.attend_slots(q, cache, *slots))
    np.testing.assert_allclose(got, exact, atol=0.02)  # of values of about 1, weights having 8 bits
    np.testing.assert_allclose(by_xla, exact, atol=0.02)


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_rollout_by_the_kernel_draws_the_same_tokens(interpreted, monkeypatch, sizes):
    monkeypatch.setattr(rollout, "SLOTS", 8)
    mesh = meshes.make(*sizes, devices=jax.devices()[: np.prod(sizes)])
    random = np.random.default_rng(0)
    params = {
        row.name: random.normal(row.constant, (row.fan_in or 8) ** -0.5, row.shape).astype(
            np.float32
        )
        for row in model.table(SHAPE)
    }
    tokens = random.integers(2, 32, (8, 5)).astype(np.int32)
    lengths = random.integers(1, 6, 8).astype(np.int32)
    data = (tokens, lengths, np.arange(8, dtype=np.int32))
    results = []
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, model.shardings(SHAPE, mesh))
        rows = [
            meshes.from_host(mesh, array, "batch", *[None] * (array.ndim - 1)) for array in data
        ]
        for name in ("xla", "pallas"):
            config = dataclasses.replace(CONFIG, attention=name)
            policy = make_policy(config, SHAPE, mesh)
            kernel = pallas_attention.attend_slots if name == "pallas" else attention.attend_slots
            assert policy.decode.keywords["attend_slots"] is kernel  # pyright: ignore
            lm = LanguageModel(SHAPE, policy, None, {}, None, (0,), Path())
            results.append(compile_rollout(lm, config, mesh)(placed, np.int32(1), *rows))
    xla, pallas = results
    np.testing.assert_array_equal(pallas.tokens, xla.tokens)
    np.testing.assert_allclose(pallas.logprobs, xla.logprobs, atol=1e-5)


def test_on_a_mesh_each_device_reads_its_own_rows_and_heads(interpreted, mesh):
    q, cache = draw(8, 2, 3, 8, 12)
    first = np.arange(8, dtype=np.int32) % 7
    want = attention.attend_slots(q, cache, jnp.asarray(first), jnp.int32(6))
    placed = [
        meshes.from_host(mesh, np.asarray(x), "batch", "kv_heads", None, None) for x in (q, *cache)
    ]
    kernel = jax.jit(
        lambda q, k, v, first, last: pallas_attention.attend_slots(
            q, attention.TpuLayerCache(k, v), first, last
        )
    )
    with jax.set_mesh(mesh):
        placed_first = meshes.from_host(mesh, first, "batch")
        got = kernel(*placed, placed_first, jnp.int32(6))
        text = kernel.lower(*placed, placed_first, jnp.int32(6)).compile().as_text() or ""
    assert text and "all-" not in text and "collective" not in text
    for mine, other in zip(got, want, strict=True):
        assert mine.sharding.shard_shape(mine.shape)[:2] == (2, 1)
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "slots", "platform", "reason"),
    [
        (128, 1024, "tpu", ""),
        (128, 1024, "cpu", "the devices are of the platform cpu"),
        (64, 1024, "tpu", "head_dim is 64, and the kernel needs a multiple of 128"),
        (
            128,
            1000,
            "tpu",
            "max_completion_length is 1,000, and the kernel needs a multiple of 128",
        ),
    ],
)
def test_unsupported_shapes_and_platforms_have_a_reason(head_dim, slots, platform, reason):
    found = pallas_attention.unsupported_reason(head_dim, slots, platform)
    assert found.startswith(reason) if platform == "cpu" else reason in found
    assert bool(found) == bool(reason)


def test_without_a_tpu_xla_decodes_and_one_sentence_says_so(caplog, mesh):
    with caplog.at_level(logging.WARNING):
        policy = make_policy(dataclasses.replace(CONFIG, attention="pallas"), SHAPE, mesh)
    assert policy.decode.keywords["attend_slots"] is attention.attend_slots  # pyright: ignore
    (record,) = caplog.records
    assert record.message.startswith(
        "attention is pallas, but completions are decoded by XLA: the devices are of"
    )


def test_blocks_behind_the_current_slot_are_not_fetched():
    """Of 512 rows times heads 32 fit at once, of 1,024 slots a block has 128: the index stays at
    that of slot 300.
    """
    plan = pallas_attention.plan(512, 6, 128, 1024, 2)
    assert plan.grid == (16, 8)
    assert plan.queries.shape == (32, 6, 128)
    assert plan.keys.shape == (32, 128, 128)
    indices = [int(plan.keys.index_map(0, step, [300])[1]) for step in range(8)]
    assert indices == [0, 1, 2, 2, 2, 2, 2, 2]
