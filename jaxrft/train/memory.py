"""Estimates the memory of rollouts and updates, and chooses how many rows are decoded at once and
what is rematerialized.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.learn import packing, update
from jaxrft.lm import attention, compaction, model
from jaxrft.lm.compaction import Grid
from jaxrft.lm.model import ModelConfig
from jaxrft.lm.policy import LanguageModel
from jaxrft.mesh import describe_array, on_device
from jaxrft.types import PyTree

# The planned share of a device's memory. The rest is for copies, padding and fragmentation.
PLANNED = 0.8


def bin_shapes(
    config: Config, mesh: meshes.AnyMesh, prompt_length: int
) -> dict[int, packing.Shape]:
    """Returns the shapes of the bins of an update, with prompts padded to `prompt_length` tokens,
    by the longest completion.
    """
    return packing.choose_shapes(
        prompt_length=prompt_length,
        completion_length=config.max_completion_length,
        num_generations=config.num_generations,
        rows=config.rows_per_micro_batch,
        samples=config.tasks_per_update * config.num_generations,
        shards=meshes.shards(mesh, "batch"),
    )


def activation_bytes(
    config: Config, shape: ModelConfig, mesh: meshes.AnyMesh, prompt_length: int, remat: str
) -> int:
    """Estimates the bytes on each device of the activations saved for the backward pass, and of
    those of the layer that runs.
    """
    size = jnp.dtype(config.dtype).itemsize
    layer = _saved_numbers(shape, mesh, "none")
    saved = shape.num_layers * _saved_numbers(shape, mesh, remat)

    def of_round(bins: packing.Shape) -> int:
        rows = bins.bins_per_round // meshes.shards(mesh, "batch")
        queries = min(bins.length, attention.QUERIES)
        scores = rows * shape.num_heads * queries * bins.length // meshes.shards(mesh, "heads")
        return (saved + layer) * rows * bins.length * size + 3 * 4 * scores

    return max(map(of_round, bin_shapes(config, mesh, prompt_length).values()))


def _saved_numbers(shape: ModelConfig, mesh: meshes.AnyMesh, remat: str) -> int:
    """Counts the numbers that a layer saves for each slot, on each device.

    "full": its input. "dots": the results of its matrix products too. "none": about six numbers in
    float32 for each number of the residual stream, the heads and the hidden units, as compiled
    programs hold.
    """
    split = meshes.shards(mesh, "heads")
    width = shape.hidden_size
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // split
    hidden = shape.intermediate_size // split
    return {
        "full": width,
        "dots": 3 * width + heads + 2 * hidden,
        "none": 6 * (width + heads + hidden),
    }[remat]


def logits_bytes(
    config: Config, shape: ModelConfig, mesh: meshes.AnyMesh, prompt_length: int
) -> int:
    """Estimates the bytes on each device of a chunk of logits, their probabilities and their
    gradient.
    """
    shapes = bin_shapes(config, mesh, prompt_length).values()
    shards = meshes.shards(mesh, "batch")
    slots = max(bins.bins_per_round // shards * bins.length for bins in shapes)
    vocabulary = shape.vocab_size // meshes.shards(mesh, "vocab")
    return 3 * 4 * min(update.CHUNK, slots * vocabulary)


def memory_to_plan(mesh: meshes.AnyMesh) -> int | None:
    """Returns the memory of a device in bytes; None if it is unknown, and on CPUs.

    On a CPU memory is slow relative to arithmetic: recomputing all activations is a tenth faster
    than saving them, so that there is nothing to plan.
    """
    if meshes.platform(mesh) == "cpu":
        return None
    return meshes.memory_of_a_device(mesh)


def choose_remat(
    config: Config,
    shape: ModelConfig,
    mesh: meshes.AnyMesh,
    prompt_length: int,
    *,
    held: PyTree,
    params: PyTree,
    memory: int | None,
) -> str:
    """Returns the config's `remat`; for "auto", the one that recomputes least and fits into memory.

    `held` is everything that stays on the devices. `params` are the trained parameters, whose
    gradient takes twice their memory in float32. `memory` is that of `memory_to_plan`; if it is
    None, the choice is "full".
    """
    if config.remat != "auto":
        return config.remat
    if memory is None:
        return "full"
    always = (
        on_device(held) + 2 * on_device(params) + logits_bytes(config, shape, mesh, prompt_length)
    )
    for remat in ("none", "dots"):
        if always + activation_bytes(config, shape, mesh, prompt_length, remat) <= PLANNED * memory:
            return remat
    return "full"


def cache_bytes(lm: LanguageModel, mesh: meshes.AnyMesh, rows: int, length: int) -> int:
    """Counts the bytes on each device of a cache of `rows` x `length` positions."""
    axes = ("batch", "kv_heads", None, None)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: lm.policy.init_cache(rows, length)))
    return on_device(
        [describe_array(mesh, leaf.shape, leaf.dtype, *axes[: leaf.ndim]) for leaf in leaves]
    )


def rollout_bytes(
    config: Config,
    lm: LanguageModel,
    mesh: meshes.AnyMesh,
    prompt_length: int,
    grids: Sequence[Grid],
    *,
    entering: int = 0,
) -> dict[str, int]:
    """Counts the bytes on each device that a rollout takes, by part; the logits are an estimate.

    `grids` are the rows of each shard, the first the largest. `entering` prompts of each shard are
    prefilled while others are decoded.
    """
    shards = meshes.shards(mesh, "batch")
    longest = config.max_completion_length
    vocabulary = lm.config.vocab_size // meshes.shards(mesh, "vocab")
    is_penalized = config.repetition_penalty != 1.0

    def seen(rows: int) -> int:
        return rows * vocabulary if is_penalized else 0

    def both(blocks: int, rows: int) -> int:
        prompts = cache_bytes(lm, mesh, blocks * shards, prompt_length)
        return prompts + cache_bytes(lm, mesh, rows * shards, longest) + seen(rows)

    weights = [
        describe_array(
            mesh,
            row.shape,
            jnp.dtype(config.dtype),
            *(None if axis == "embed" and config.gather_for_rollout else axis for axis in row.axes),
        )
        for row in model.base(lm.config)
    ]
    full = grids[0]
    parts = {
        "policy for the rollout": on_device(weights),
        "prompts' keys and values": cache_bytes(lm, mesh, full.blocks * shards, prompt_length),
        "completions' keys and values": cache_bytes(lm, mesh, full.rows * shards, longest),
        "logits of a token": (5 if is_penalized else 4) * 4 * full.rows * vocabulary,
    }
    if is_penalized:
        parts["tokens that rows have seen"] = seen(full.rows)
    if entering:
        parts["both, of the rows that stay and those that enter"] = both(
            full.blocks + entering, full.rows
        )
    elif len(grids) > 1:
        parts["both, of the rows that move to a smaller grid"] = both(
            grids[1].blocks, grids[1].rows
        )
    return parts


def choose_concurrent_rows(
    config: Config,
    lm: LanguageModel,
    mesh: meshes.AnyMesh,
    prompt_length: int,
    *,
    prompts: int,
    num_generations: int,
    held: PyTree,
    memory: int | None,
) -> int | None:
    """Returns the config's `max_concurrent_rows`; for 0, as many rows as fit into memory, None for
    all.

    A rollout has `prompts` with `num_generations` each; `held` is everything that stays on the
    devices. `memory` is that of `memory_to_plan`; if it is None, all rows are decoded at once. At
    least two groups on each shard are.
    """
    shards = meshes.shards(mesh, "batch")
    if config.max_concurrent_rows:
        # an evaluation may have larger groups than training, for which the number was given
        least = 0 if num_generations == config.num_generations else 2 * num_generations * shards
        return max(config.max_concurrent_rows, least)
    if memory is None:
        return None
    budget = PLANNED * memory - on_device(held)
    longest = config.max_completion_length

    def needed(grids: Sequence[Grid], entering: int = 0) -> int:
        parts = rollout_bytes(config, lm, mesh, prompt_length, grids, entering=entering)
        return sum(parts.values())

    if needed(compaction.grids(prompts // shards, num_generations, longest)) <= budget:
        return None

    # linear in `count`
    def needed_if_entering(count: int) -> int:
        rows = 2 * count * num_generations
        return needed(compaction.waiting_grids(rows, num_generations, longest), count)

    one, two = map(needed_if_entering, (1, 2))
    entering = 1 + max(0, int((budget - one) // (two - one)))
    return 2 * entering * num_generations * shards
