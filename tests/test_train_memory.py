from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.learn import update
from jaxrft.lm import compaction, model
from jaxrft.lm.model import ModelConfig
from jaxrft.lm.policy import LanguageModel
from jaxrft.train import memory

SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
CONFIG = Config(
    model="m",
    tasks=TasksConfig("tasks.jsonl"),
    output_dir="run",
    batch_size=32,
    num_generations=8,
    max_completion_length=256,
)
ONE = meshes.abstract(1, 1, 1)


def test_activations_by_hand():
    """4 bins of 31 + 2 * 256 slots, 2 at a time: width 16, 4 heads and 2 x 2 of keys and values of
    8, 32 hidden units.

    A layer keeps 16 numbers a slot, or 3 * 16 + 64 + 2 * 32 = 176 with its products, or 6 * (16 +
    64 + 32) = 672. Scores are those of a block of 256 queries, three times.
    """
    assert memory.bin_shapes(CONFIG, ONE, 32) == {256: (543, 2)}
    slots, scores = 2 * 543, 3 * 4 * 2 * 4 * 256 * 543
    for remat, numbers in (("full", 16), ("dots", 176), ("none", 672)):
        want = (3 * numbers + 672) * slots * 4 + scores
        assert memory.activation_bytes(CONFIG, SHAPE, ONE, 32, remat) == want
    half = replace(CONFIG, dtype="bfloat16")
    split = memory.activation_bytes(half, SHAPE, meshes.abstract(1, 1, 2), 32, "dots")
    assert split == (3 * (3 * 16 + 32 + 32) + 6 * (16 + 32 + 16)) * slots * 2 + scores // 2
    assert memory.logits_bytes(CONFIG, SHAPE, ONE, 32) == 3 * 4 * slots * 64
    assert (
        memory.logits_bytes(CONFIG, SHAPE._replace(vocab_size=2**20), ONE, 32)
        == 3 * 4 * update.CHUNK
    )


@pytest.mark.parametrize("asked", ["auto", "full", "dots", "none"])
def test_the_fastest_remat_that_fits_is_chosen(asked):
    """Of the config's own words nothing is changed, whatever the memory."""
    config = replace(CONFIG, remat=asked)
    params = jax.ShapeDtypeStruct((10_000,), jnp.float32, sharding=meshes.sharding(ONE))
    held = jax.ShapeDtypeStruct((25_000,), jnp.float32, sharding=meshes.sharding(ONE))
    always = 100_000 + 2 * 40_000 + memory.logits_bytes(config, SHAPE, ONE, 32)

    def chosen(free):
        return memory.choose_remat(config, SHAPE, ONE, 32, held=held, params=params, memory=free)

    assert chosen(None) == ("full" if asked == "auto" else asked)
    for remat, less in (("none", "dots"), ("dots", "full")):
        enough = (always + memory.activation_bytes(config, SHAPE, ONE, 32, remat)) / memory.PLANNED
        assert chosen(enough + 1) == (remat if asked == "auto" else asked)
        assert chosen(enough - 1) == (less if asked == "auto" else asked)


def lm_of(shape):
    return LanguageModel(shape, model.decoder(shape), None, {}, None, (0,), Path())


def test_bytes_of_a_rollout_by_hand():
    """32 prompts of 8 rows; a position of 3 layers has 2 x 2 x 8 float32 of keys and values."""
    lm = lm_of(SHAPE)
    position = 3 * 2 * 2 * 8 * 4
    grids = compaction.grids(32, 8, 256)
    found = memory.rollout_bytes(CONFIG, lm, ONE, 32, grids)
    assert found["prompts' keys and values"] == 32 * 32 * position
    assert found["completions' keys and values"] == 256 * 256 * position
    # half of the rows, each with a prompt of its own
    moved = 128 * (32 + 256) * position
    assert found["both, of the rows that move to a smaller grid"] == moved
    assert found["logits of a token"] == 4 * 4 * 256 * 64
    penalized = memory.rollout_bytes(replace(CONFIG, repetition_penalty=1.1), lm, ONE, 32, grids)
    assert penalized["tokens that rows have seen"] == 256 * 64
    assert penalized["logits of a token"] == 5 * 4 * 256 * 64
    moved = "both, of the rows that move to a smaller grid"
    assert penalized[moved] - found[moved] == grids[1].rows * 64
    waiting = compaction.waiting_grids(64, 8, 256)
    found = memory.rollout_bytes(CONFIG, lm, ONE, 32, waiting, entering=4)
    # blocks of two rows, and the prompts that enter
    assert found["prompts' keys and values"] == 32 * 32 * position
    both = ((32 + 4) * 32 + 64 * 256) * position
    assert found["both, of the rows that stay and those that enter"] == both


@pytest.mark.parametrize("asked", [0, 64])
def test_as_many_rows_are_decoded_at_once_as_fit(asked):
    config = replace(CONFIG, max_concurrent_rows=asked)
    lm = lm_of(SHAPE)
    held = jax.ShapeDtypeStruct((25_000,), jnp.float32, sharding=meshes.sharding(ONE))

    def chosen(free):
        return memory.choose_concurrent_rows(
            config, lm, ONE, 32, prompts=32, num_generations=8, held=held, memory=free
        )

    def enough(grids, entering=0):
        parts = memory.rollout_bytes(config, lm, ONE, 32, grids, entering=entering)
        return (100_000 + sum(parts.values())) / memory.PLANNED

    if asked:
        assert chosen(1) == chosen(None) == asked
        of_evaluation = memory.choose_concurrent_rows(
            config, lm, ONE, 32, prompts=32, num_generations=50, held=held, memory=None
        )
        assert of_evaluation == 100  # two groups
        return
    everything = enough(compaction.grids(32, 8, 256))
    assert chosen(None) is None and chosen(everything + 1) is None
    for rows in (16, 32, 96):
        least = enough(compaction.waiting_grids(rows, 8, 256), entering=rows // 16)
        assert chosen(least + 1) == rows
        assert chosen(least - 1) == max(16, rows - 16)
