"""What the backward pass keeps for a round of bins, by rule, and how much of it a device has room
for.
"""

import jax.numpy as jnp

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.learn import packing, update
from jaxrft.lm import attention
from jaxrft.lm.model import ModelConfig
from jaxrft.mesh import on_device
from jaxrft.types import PyTree

# Of a device's memory, so much is planned for: the rest is for copies, padding and fragmentation.
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
    """Estimates the bytes on each device of what the backward pass keeps, and of one layer's own
    while it runs.
    """
    bins = bin_shape(config, mesh, prompt_length)
    rows = bins.bins_per_round // meshes.shards(mesh, "batch")
    slots = rows * bins.length
    size = jnp.dtype(config.dtype).itemsize
    layer = _kept_numbers(shape, mesh, "none")
    queries = min(bins.length, attention.QUERIES)
    scores = rows * shape.num_heads * queries * bins.length // meshes.shards(mesh, "heads")
    kept = shape.num_layers * _kept_numbers(shape, mesh, remat)
    return (kept + layer) * slots * size + 3 * 4 * scores


def _kept_numbers(shape: ModelConfig, mesh: meshes.AnyMesh, remat: str) -> int:
    """Counts the numbers a slot that a layer keeps on each device.

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
    """Returns the bytes of a device that may be filled to save arithmetic; None where they are not
    known, and on CPUs.

    A CPU's memory is slow beside its arithmetic: to compute everything again is faster there, by a
    tenth.
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
    """Returns the config's `remat`; of "auto" the one that computes least again and that the
    devices have room for.

    `held` is all that stays on the devices, and `params` what is trained, whose gradient is there
    twice in float32. `memory` is `memory_to_plan` of the devices; "full" where it is None.
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
