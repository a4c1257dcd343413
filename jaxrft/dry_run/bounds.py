"""Lower bounds on the seconds of a rollout and of an update, from the shape of a decoder.

All counts are for one chip of a mesh whose chips share the work evenly. Norms, rotations, softmax,
activations and the logits on their way to memory are not counted, so a time is a lower bound: "at
best".
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp

from jaxrft import mesh as meshes
from jaxrft.dry_run.chips import Chip
from jaxrft.learn.packing import MAX_ROUND_SLOTS
from jaxrft.lm import model
from jaxrft.lm.model import ModelConfig
from jaxrft.mesh import on_device
from jaxrft.train.setup import Opened

BOUNDS = ("matrix products", "memory bandwidth", "interconnect")
# bytes of a trained number: AdamW reads four float32 (with the gradient) and writes three
OPTIMIZER = 28


@dataclass(frozen=True)
class Decode:
    """A decode loop as one chip runs it."""

    config: ModelConfig
    rows: int = 256  # of this chip
    group_size: int = 8
    prompt_length: int = 256
    new_tokens: int = 1024
    model_parallel: int = 1  # chips that share heads, hidden units and vocabulary
    item_size: int = 2  # bytes of a number; 2 = bfloat16

    @property
    def prompts(self) -> float:
        """Counts the prompts of this chip; fewer than one when chips share a group."""
        return self.rows / self.group_size

    @property
    def position_bytes(self) -> int:
        """Counts the bytes of a row's keys and values at one position, over all layers."""
        c = self.config
        return (
            2 * c.num_layers * c.num_kv_heads * c.head_dim * self.item_size // self.model_parallel
        )

    @property
    def weight_bytes(self) -> int:
        """Counts the bytes of the weights that every token is computed with.

        The embedding is among them only if it also serves as the unembedding.
        """
        rows = model.base(self.config)
        used = [row for row in rows if row.name != "embed" or self.config.tie_word_embeddings]
        return sum(math.prod(row.shape) for row in used) * self.item_size // self.model_parallel

    @property
    def cache_bytes(self) -> int:
        """Counts the bytes of the keys and values of all rows' new tokens."""
        return self.position_bytes * self.rows * self.new_tokens

    def bytes_per_pass(self, position: int) -> int:
        """Counts the bytes of a pass that reads `position` generated positions of each row and
        writes one.

        All weights are read once, and so are the prompts, a group's as one.
        """
        prompts = self.rows // self.group_size * self.prompt_length
        return self.weight_bytes + self.position_bytes * (prompts + self.rows * (position + 1))


class Need(NamedTuple):
    """What a stage needs of one chip."""

    flops: float
    memory: float  # bytes between the chip and its memory
    interconnect: float  # bytes that leave the chip


class AtBest(NamedTuple):
    """The least seconds of a stage: those of each part of the chip, the longest of which
    bounds it.
    """

    flops: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Computes the seconds of the stage if all parts of the chip work at the same time."""
        return max(self)

    @property
    def bound(self) -> str:
        """Names what takes longest, one of BOUNDS."""
        return max(zip(self, BOUNDS, strict=True))[1]


def at_best(need: Need, chip: Chip) -> AtBest:
    """Returns the least seconds of a stage on a chip."""
    return AtBest(
        need.flops / chip.flops, need.memory / chip.memory, need.interconnect / chip.interconnect
    )


def forward_flops(decode: Decode) -> float:
    """Counts the multiplications and additions of prompts and completions, all computed once,
    without their logits.

    2 N a token with N the weights of the layers' products, and 4 L H head_dim a pair of a query and
    a key that it sees. A completion's last token is no input.
    """
    c = decode.config
    weights = sum(
        math.prod(row.shape) for row in model.base(c) if row.layered and row.fan_in is not None
    )
    prompt = decode.prompt_length
    generated = decode.new_tokens - 1
    tokens = decode.prompts * prompt + decode.rows * generated
    pairs = decode.prompts * _pairs(0, prompt) + decode.rows * _pairs(prompt, generated)
    return (
        2 * weights * tokens + 4 * c.num_layers * c.num_heads * c.head_dim * pairs
    ) / decode.model_parallel


def logits_flops(decode: Decode) -> float:
    """Counts the operations of the logits of every token of the completions."""
    c = decode.config
    return (
        2 * c.vocab_size * c.hidden_size * decode.rows * decode.new_tokens / decode.model_parallel
    )


def _pairs(before: int, tokens: int) -> int:
    """Returns the number of pairs of `tokens` queries and the keys that they see, `before` of them
    older.
    """
    return tokens * before + tokens * (tokens + 1) // 2


def rollout_need(
    decode: Decode, *, fsdp: int = 1, gather: bool = True, max_rows: int | None = None
) -> Need:
    """Counts what a rollout needs whose completions are all as long as `new_tokens`.

    Every token but the first is a pass that moves `bytes_per_pass` bytes; the prompts are computed
    before. Where at most `max_rows` of a chip are decoded at once, more passes read the weights.
    Weights are gathered over `fsdp` once, or, unless `gather`, for every pass. Chips that share
    heads sum the outputs of attention and of the MLP.
    """
    passes = range(1, decode.new_tokens)
    parts = 1 if max_rows is None else math.ceil(decode.rows / max_rows)
    gathers = 1 if gather else parts * len(passes)
    tokens = decode.prompts * decode.prompt_length + decode.rows * len(passes)
    return Need(
        flops=forward_flops(decode) + logits_flops(decode),
        memory=decode.weight_bytes * (1 + (parts - 1) * len(passes))
        + sum(decode.bytes_per_pass(position) for position in passes),
        interconnect=gathers * _all_gather_bytes(decode, fsdp)
        + 2 * _all_reduce_bytes(decode, tokens),
    )


def update_need(
    decode: Decode,
    *,
    trained: int,
    data: int = 1,
    fsdp: int = 1,
    num_iterations: int = 1,
    updates: int = 1,
    rounds: int = 1,
    repeated: bool = True,
    reference: bool = False,
) -> Need:
    """Counts what a step's updates need, of completions that are all as long as `new_tokens`.

    A forward pass, a backward pass of two products for each, that is 6 N a token, and, if
    `repeated`, the forward pass again for the activations that were not kept; with a `reference`
    policy one more. `trained` numbers are on this chip. Each of `rounds`, bins that are computed
    together, reads the weights for every pass, gathers them twice over `fsdp`, and reduces their
    gradients once; each of `updates` sums gradients over `data`.
    """
    passes = 2 + repeated + reference
    tokens = decode.prompts * decode.prompt_length + decode.rows * (decode.new_tokens - 1)
    reduced = 2 * passes * _all_reduce_bytes(decode, tokens)
    gradients = 4 * trained * 2 * (data - 1) / data
    return Need(
        flops=num_iterations * (passes + 1) * (forward_flops(decode) + logits_flops(decode)),
        memory=rounds * passes * decode.weight_bytes + updates * OPTIMIZER * trained,
        interconnect=rounds * 3 * _all_gather_bytes(decode, fsdp)
        + num_iterations * reduced
        + updates * gradients,
    )


def _all_gather_bytes(decode: Decode, fsdp: int) -> float:
    """Returns the bytes that a chip sends when the weights are gathered around a ring of `fsdp`
    chips.
    """
    return decode.weight_bytes * (fsdp - 1) / fsdp


def _all_reduce_bytes(decode: Decode, tokens: float) -> float:
    """Returns the bytes that a chip sends when one output a layer is summed around a ring of m
    chips: 2 (m - 1) / m.
    """
    m = decode.model_parallel
    return (
        2
        * (m - 1)
        / m
        * decode.config.num_layers
        * decode.config.hidden_size
        * tokens
        * decode.item_size
    )


def stages(run: Opened, prompt_length: int) -> list[tuple[str, Need]]:
    """Returns (name, need) of a step's rollout and updates, for completions of full and of half
    length.
    """
    config = run.setup.config
    mesh = run.setup.mesh
    shards = meshes.shards(mesh, "batch")
    fsdp = meshes.shards(mesh, "embed")
    full = Decode(
        config=run.setup.lm.config,
        rows=config.batch_size * config.num_generations // shards,
        group_size=config.num_generations,
        prompt_length=prompt_length,
        new_tokens=config.max_completion_length,
        model_parallel=meshes.shards(mesh, "heads"),
        item_size=jnp.dtype(config.dtype).itemsize,
    )
    minis = config.batch_size // config.tasks_per_update
    max_rows = run.setup.generate.max_rows
    if max_rows is not None:
        max_rows //= shards
    needs = []
    for share, divisor in (("", 1), (", half as long", 2)):
        update = replace(full, new_tokens=max(1, full.new_tokens // divisor))
        sampled = replace(update, rows=config.fresh_batch_size * config.num_generations // shards)
        rollout = rollout_need(
            sampled, fsdp=fsdp, gather=config.gather_for_rollout, max_rows=max_rows
        )
        learn = update_need(
            update,
            trained=on_device(run.state.params) // 4,
            data=shards // fsdp,
            fsdp=fsdp,
            num_iterations=config.num_iterations,
            updates=config.num_iterations * minis,
            rounds=config.num_iterations
            * max(minis, math.ceil(update.rows * update.new_tokens / MAX_ROUND_SLOTS)),
            repeated=run.setup.remat == "full",
            reference=config.kl_coef > 0,
        )
        needs += [(f"rollout{share}", rollout), (f"update{share}", learn)]
    return needs
