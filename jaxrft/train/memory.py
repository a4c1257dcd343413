"""Estimates the memory of activations in the backward pass, and chooses what is rematerialized."""

import jax.numpy as jnp

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.learn import packing, update
from jaxrft.lm import attention
from jaxrft.lm.model import ModelConfig
from jaxrft.mesh import on_device
from jaxrft.types import PyTree

# The planned share of a device's memory. The rest is for copies, padding and fragmentation.
PLANNED = 0.8


def bin_shape(config: Config, mesh: meshes.AnyMesh, prompt_length: int) -> packing.Shape:
    """Returns the shape of the bins of an update, with prompts padded to `prompt_length` tokens."""
    return packing.choose_shape(
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
    bins = bin_shape(config, mesh, prompt_length)
    rows = bins.bins_per_round // meshes.shards(mesh, "batch")
    slots = rows * bins.length
    size = jnp.dtype(config.dtype).itemsize
    layer = _saved_numbers(shape, mesh, "none")
    queries = min(bins.length, attention.QUERIES)
    scores = rows * shape.num_heads * queries * bins.length // meshes.shards(mesh, "heads")
    saved = shape.num_layers * _saved_numbers(shape, mesh, remat)
    return (saved + layer) * slots * size + 3 * 4 * scores


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
    bins = bin_shape(config, mesh, prompt_length)
    slots = bins.bins_per_round // meshes.shards(mesh, "batch") * bins.length
    vocabulary = shape.vocab_size // meshes.shards(mesh, "vocab")
    return 3 * 4 * min(update.CHUNK, slots * vocabulary)


def memory_to_plan(mesh: meshes.AnyMesh) -> int | None:
    """Returns the bytes of a device that saved activations may use; None if unknown, and on CPUs.

    A CPU's memory is slow relative to its arithmetic: full rematerialization is a tenth faster.
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
