"""The policy as pure functions: a decoder-only transformer, with and without cache, and its one table of weights.

Sources: Llama (arXiv 2302.13971, 2407.21783), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388); grouped-query
attention (arXiv 2305.13245); LoRA (arXiv 2106.09685), here a reparametrisation: the decoder computes with
W + alpha / rank * A B, not with x W and x A B apart.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrft import mesh as meshes
from jaxrft.lm import blocks
from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree

Params = dict[str, Array]

# Positions of keys that no query may see: every real position is smaller, and attention is causal in positions.
FREE = jnp.iinfo(jnp.int32).max  # a slot of a cache that nothing was written to
PADDED = FREE - 1  # a slot that holds padding

# Attention takes so many queries at a time, so that its float32 scores never exist for all pairs of positions.
QUERIES = 256


class RopeScaling(NamedTuple):
    """Llama 3.1's stretching of rotary position embeddings to contexts `factor` times as long."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class LoRA(NamedTuple):
    """Which weights have adapters, and of which rank: W becomes W + alpha / rank * A B."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # names in the table


class ModelConfig(NamedTuple):
    """The shape of a decoder; hashable."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = True  # of queries, keys and values
    output_bias: bool = False  # of what attention adds to the residual stream
    qk_norm: bool = False  # queries and keys pass an RMSNorm over head_dim before they are rotated
    rope_scaling: RopeScaling | None = None
    lora: LoRA | None = None


class Cache(NamedTuple):
    """Keys and values of every layer; rows are written in step, so that they share the next free slot."""

    keys: Array  # [L, rows, length, kv_heads, head_dim]
    values: Array  # [L, rows, length, kv_heads, head_dim]
    positions: Array  # [L, rows, length] int32, FREE or PADDED where there is nothing to see


class Policy(NamedTuple):
    """All that rollout.py and update.py know of a language model."""

    apply: Callable[..., tuple[Array, PyTree]]
    """(params, tokens [rows, T], positions [rows, T], valid [rows, T] bool, cache=None, prefix=None)
    -> (hidden [rows, T, D], cache). Without a cache the one returned holds just these tokens and can serve as a
    prefix; with one, its next T slots are written. A prefix of B rows serves rows = B * G without being copied."""
    unembed: Callable[[PyTree, Array], Array]
    """(params, hidden [..., D]) -> logits [..., V] float32."""
    init_cache: Callable[[int, int], PyTree]
    """(rows, length) -> an empty cache; leaves [L, rows, length, ...]."""


class Weight(NamedTuple):
    """A row of the table: one parameter, all layers stacked."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names, jaxrft.mesh.RULES
    fan_in: int | None  # normal with variance 1 / fan_in; None = the constant below
    hf: str  # name in a Hugging Face checkpoint; {} is the layer
    transpose: bool = False  # whether Hugging Face stores [out, in]; if not, only "head" is merged
    constant: float = 0.0
    uniform: bool = False  # between -+1 / sqrt(fan_in) instead of normal

    @property
    def layered(self) -> bool:
        """Whether the first axis counts layers."""
        return self.axes[0] == "layer"


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of the decoder and of its adapters: drives initialisation, sharding, loading and export."""
    return (*base(config), *adapters(config))


def base(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows of the table without those of adapters: what a Hugging Face checkpoint holds."""
    c, layer = config, "model.layers.{}."
    d, f, h, kv, e, n = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.num_layers
    attention, mlp = layer + "self_attn.", layer + "mlp."
    rows = [
        Weight("embed", (c.vocab_size, d), ("vocab", "embed"), d, "model.embed_tokens.weight"),
        Weight("attention_norm", (n, d), ("layer", "embed"), None, layer + "input_layernorm.weight", constant=1.0),
        Weight("q", (n, d, h, e), ("layer", "embed", "heads", "head"), d, attention + "q_proj.weight", True),
        Weight("k", (n, d, kv, e), ("layer", "embed", "kv_heads", "head"), d, attention + "k_proj.weight", True),
        Weight("v", (n, d, kv, e), ("layer", "embed", "kv_heads", "head"), d, attention + "v_proj.weight", True),
        Weight("o", (n, h, e, d), ("layer", "heads", "head", "embed"), h * e, attention + "o_proj.weight", True),
        Weight("mlp_norm", (n, d), ("layer", "embed"), None, layer + "post_attention_layernorm.weight", constant=1.0),
        Weight("gate", (n, d, f), ("layer", "embed", "mlp"), d, mlp + "gate_proj.weight", True),
        Weight("up", (n, d, f), ("layer", "embed", "mlp"), d, mlp + "up_proj.weight", True),
        Weight("down", (n, f, d), ("layer", "mlp", "embed"), f, mlp + "down_proj.weight", True),
        Weight("final_norm", (d,), ("embed",), None, "model.norm.weight", constant=1.0),
    ]
    if c.attention_bias:
        rows += [
            Weight("q_bias", (n, h, e), ("layer", "heads", "head"), None, attention + "q_proj.bias"),
            Weight("k_bias", (n, kv, e), ("layer", "kv_heads", "head"), None, attention + "k_proj.bias"),
            Weight("v_bias", (n, kv, e), ("layer", "kv_heads", "head"), None, attention + "v_proj.bias"),
        ]
    if c.output_bias:
        rows.append(Weight("o_bias", (n, d), ("layer", "embed"), None, attention + "o_proj.bias"))
    if c.qk_norm:
        rows += [
            Weight("q_norm", (n, e), ("layer", "head"), None, attention + "q_norm.weight", constant=1.0),
            Weight("k_norm", (n, e), ("layer", "head"), None, attention + "k_norm.weight", constant=1.0),
        ]
    if not c.tie_word_embeddings:
        rows.append(Weight("unembed", (c.vocab_size, d), ("vocab", "embed"), d, "lm_head.weight"))
    return tuple(rows)


def adapters(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows of the adapters, none without LoRA: for W [in, out] of a layer A [in, rank] and B [rank, out].

    Names, layout and initialisation are those of peft: A Kaiming-uniform with a = sqrt(5), which is uniform between
    -+1 / sqrt(in), and B zero, so that adapters change nothing at first.
    """
    if config.lora is None:
        return ()
    rank, rows = config.lora.rank, []
    for row in base(config):
        if row.name in config.lora.targets:
            name_a, name_b = adapter_names(row.name)
            inputs = 3 if row.axes[2] == "head" else 2  # up to there the dimensions are layer and inputs
            shapes = (*row.shape[:inputs], rank), (row.shape[0], rank, *row.shape[inputs:])
            axes = (*row.axes[:inputs], "rank"), ("layer", "rank", *row.axes[inputs:])
            hf = f"base_model.model.{row.hf.removesuffix('weight')}lora_"
            rows.append(Weight(name_a, shapes[0], axes[0], row.fan_in, f"{hf}A.weight", True, uniform=True))
            rows.append(Weight(name_b, shapes[1], axes[1], None, f"{hf}B.weight", True))
    return tuple(rows)


def adapter_names(target: str) -> tuple[str, str]:
    """What the adapter's two factors of a weight are called."""
    return f"{target}_lora_a", f"{target}_lora_b"


def init(key: Array, config: ModelConfig) -> Params:
    """Random float32 parameters: normal with variance 1 / fan-in, norms 1, biases 0; adapters as `adapters` says."""
    return draw(key, table(config))


def draw(key: Array, rows: tuple[Weight, ...]) -> Params:
    """Random float32 parameters of some rows of the table."""

    def one(weight: Weight, key: Array) -> Array:
        if weight.fan_in is None:
            return jnp.full(weight.shape, weight.constant, jnp.float32)
        if weight.uniform:
            return jax.random.uniform(key, weight.shape, jnp.float32, -1.0, 1.0) / math.sqrt(weight.fan_in)
        return jax.random.normal(key, weight.shape, jnp.float32) / math.sqrt(weight.fan_in)

    return {row.name: one(row, k) for row, k in zip(rows, jax.random.split(key, len(rows)), strict=True)}


def shardings(config: ModelConfig, mesh: meshes.AnyMesh) -> dict[str, jax.sharding.NamedSharding]:
    """Where each parameter lives on `mesh`; raises InputError for a mesh that does not divide the decoder."""
    for what, size, axis in (
        ("hidden_size", config.hidden_size, "embed"),
        ("vocab_size", config.vocab_size, "vocab"),
        ("intermediate_size", config.intermediate_size, "mlp"),
        ("num_attention_heads", config.num_heads, "heads"),
        ("num_key_value_heads", config.num_kv_heads, "kv_heads"),
    ):
        meshes.check_divides(mesh, f"the model's {what}", size, axis)
    return {row.name: meshes.sharding(mesh, *row.axes) for row in table(config)}


def whole(params: PyTree, frozen: Params | None) -> PyTree:
    """All parameters of a policy: those that are trained and, if there are any, those that are not."""
    return {**frozen, **params} if frozen else params


def merged(config: ModelConfig, params: Params, dtype: DTypeLike) -> Params:
    """The parameters as the decoder computes with them, in `dtype`: those of the base, with the adapters added."""
    parts = {row.name: parts_of(params, row.name) for row in base(config)}
    adapted = {name: parts.pop(name) for name, held in list(parts.items()) if len(held) > 1}

    def merge_all(parts: dict[str, tuple[Array, ...]]) -> Params:
        return {name: merge(config, held, dtype) for name, held in parts.items()}

    # A layer at a time, so that the float32 sums of all layers never exist together.
    return merge_all(parts) | (jax.lax.map(merge_all, adapted) if adapted else {})


def gathered(config: ModelConfig, params: Params, dtype: DTypeLike) -> Params:
    """The `merged` parameters, whole over `fsdp` and split over `model` only.

    A loop that runs the decoder many times on the same parameters gathers them once in this way, instead of a layer at
    a time in each pass.
    """
    ready = merged(config, params, dtype)
    return {row.name: _gathered(ready[row.name], row.axes, dtype) for row in base(config)}


def parts_of(params: Params, name: str) -> tuple[Array, ...]:
    """(W, A, B) of a weight whose adapter is in `params`, (W,) otherwise."""
    return tuple(params[part] for part in (name, *adapter_names(name)) if part in params)


def merge(config: ModelConfig, parts: tuple[Array, ...], dtype: DTypeLike) -> Array:
    """W + alpha / rank * A B of one layer's (W, A, B), summed in float32, in `dtype`; of (W,) alone W.

    The frozen weights alone are thus the policy that LoRA started from. The price of merging before multiplying is a
    gradient of W's size, one layer's at a time, summed over devices as if W were trained, from which those of A and B
    are taken. What it buys: rollout, learner and export compute with the same numbers, so that no ratio departs from 1
    by the rounding of two ways to multiply, and in decoding an adapter of any rank costs nothing.
    """
    if config.lora is None or len(parts) == 1:
        return parts[0].astype(dtype)
    weight, a, b = parts
    product = jnp.tensordot(a, b, 1, precision="highest", preferred_element_type=jnp.float32)
    return (weight.astype(jnp.float32) + config.lora.alpha / config.lora.rank * product).astype(dtype)


def decoder(config: ModelConfig, *, dtype: DTypeLike = jnp.float32, remat: bool = True) -> Policy:
    """The decoder as a Policy that computes in `dtype` whatever the parameters' dtype is.

    `remat` recomputes each layer in the backward pass instead of keeping its activations.
    """
    return Policy(
        apply=partial(apply, config, dtype=dtype, remat=remat),
        unembed=partial(unembed, config, dtype=dtype),
        init_cache=partial(init_cache, config, dtype=dtype),
    )


def init_cache(config: ModelConfig, rows: int, length: int, *, dtype: DTypeLike = jnp.float32) -> Cache:
    """A cache with `length` free slots for each of `rows` rows."""
    shape = (config.num_layers, rows, length)
    keys = jnp.zeros((*shape, config.num_kv_heads, config.head_dim), dtype)
    return _shard_cache(Cache(keys, jnp.zeros_like(keys), jnp.full(shape, FREE, jnp.int32)))


def unembed(config: ModelConfig, params: Params, hidden: Array, *, dtype: DTypeLike = jnp.float32) -> Array:
    """Logits [..., V] in float32 of final hidden states [..., D]."""
    name = "embed" if config.tie_word_embeddings else "unembed"
    weights = _gathered(params[name], ("vocab", "embed"), dtype)
    logits = jnp.einsum("...d,vd->...v", hidden.astype(dtype), weights, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    valid: Array,
    cache: Cache | None = None,
    prefix: Cache | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = True,
) -> tuple[Array, Cache]:
    """The decoder's forward pass; see `Policy.apply`.

    Attention is causal in `positions`, not in slots: prompts may be padded on either side.
    """
    axes = {row.name: row.axes[1:] for row in base(config) if row.layered}
    rope = _rope(positions, rope_frequencies(config))
    seen = jnp.where(valid, positions, PADDED)
    # All rows advance together, so that row 0 of layer 0 tells the slot to write.
    slot = jnp.sum(cache.positions[0, 0] != FREE, dtype=jnp.int32) if cache is not None else jnp.zeros((), jnp.int32)

    def layer(carry: tuple[Array, Cache | None], xs: PyTree) -> tuple[PyTree, PyTree]:
        (x, cache), (index, weights, prefix) = carry, xs
        w = {name: _gathered(merge(config, parts, dtype), axes[name], dtype) for name, parts in weights.items()}
        q, k, v = _project(config, w, rms_norm(x, w["attention_norm"], config.rms_norm_eps), rope)
        own = Cache(k, v, seen)
        if cache is not None:
            cache = jax.tree.map(lambda old, new: _write(old, new, index, slot), cache, own)
        here = own if cache is None else jax.tree.map(lambda leaf: leaf[index], cache)
        mixed = attend(q, positions, [here] if prefix is None else [prefix, here])
        x = x + jnp.einsum("rthe,hed->rtd", mixed, w["o"])
        if config.output_bias:
            x = x + w["o_bias"][None, None]
        x = constrain(x + _mlp(w, rms_norm(x, w["mlp_norm"], config.rms_norm_eps)), "batch", "time", "embed")
        return (x, cache), (own if cache is None else None)

    x = constrain(_gathered(params["embed"], ("vocab", "embed"), dtype)[tokens], "batch", "time", "embed")
    layers = (jnp.arange(config.num_layers), {name: parts_of(params, name) for name in axes}, prefix)
    (x, cache), fresh = jax.lax.scan(jax.checkpoint(layer) if remat else layer, (x, cache), layers)
    hidden = rms_norm(x, params["final_norm"].astype(dtype), config.rms_norm_eps)
    return hidden, _shard_cache(fresh if cache is None else cache)


def attend(q: Array, positions: Array, sources: list[Cache]) -> Array:
    """Grouped-query attention over several sources of keys as one softmax, QUERIES queries at a time.

    q [rows, T, H, head], positions [rows, T]; a source's leaves are one layer's, [B, length, ...], and its row b
    serves the rows / B queries from b * rows / B on. Returns [rows, T, H, head].
    """
    mixed = blocks.over_time(partial(_attend_block, sources=sources), QUERIES, q, positions)
    return constrain(mixed, "batch", "time", "heads", "head")


def _attend_block(q: Array, positions: Array, *, sources: list[Cache]) -> Array:
    """`attend` for one block of queries; its scores are [rows, H, T, all lengths]."""
    rows, steps, heads, width = q.shape
    scores = []
    for source in sources:
        batch, length, kv_heads, _ = source.keys.shape
        grouped = q.reshape(batch, rows // batch, steps, kv_heads, heads // kv_heads, width)
        score = jnp.einsum("bgtkqe,bske->bgkqts", grouped, source.keys, preferred_element_type=jnp.float32)
        query = positions.reshape(batch, rows // batch, 1, 1, steps, 1)
        visible = source.positions.reshape(batch, 1, 1, 1, 1, length) <= query
        score = jnp.where(visible, score / math.sqrt(width), -1e30)
        scores.append(score.reshape(rows, kv_heads, heads // kv_heads, steps, length))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    mixed, start = jnp.zeros((), q.dtype), 0
    for source in sources:
        batch, length, kv_heads, _ = source.values.shape
        part = weights[..., start : start + length]
        part = part.reshape(batch, rows // batch, kv_heads, heads // kv_heads, steps, length)
        start += length
        out = jnp.einsum("bgkqts,bske->bgtkqe", part, source.values)
        mixed = mixed + out.reshape(q.shape)
    return mixed


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, the statistics in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def _gathered(weight: Array, axes: tuple[str | None, ...], dtype: DTypeLike) -> Array:
    """A weight as it is computed with: in `dtype`, and whole over `fsdp`, whose devices have rows of their own."""
    return constrain(weight.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


def _project(config: ModelConfig, w: Params, x: Array, rope: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Queries, keys (both rotated) and values of one layer."""

    def project(name: str) -> Array:
        out = jnp.einsum("rtd,dhe->rthe", x, w[name])
        if config.attention_bias:
            out = out + w[f"{name}_bias"][None, None]
        if config.qk_norm and name != "v":
            out = rms_norm(out, w[f"{name}_norm"], config.rms_norm_eps)
        return constrain(out, "batch", "time", "heads" if name == "q" else "kv_heads", "head")

    return _rotate(project("q"), *rope), _rotate(project("k"), *rope), project("v")


def _mlp(w: Params, x: Array) -> Array:
    """SwiGLU."""
    gate = jax.nn.silu(jnp.einsum("rtd,df->rtf", x, w["gate"]))
    inner = constrain(gate * jnp.einsum("rtd,df->rtf", x, w["up"]), "batch", "time", "mlp")
    return jnp.einsum("rtf,fd->rtd", inner, w["down"])


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position [head_dim / 2] of rotary position embeddings, float32: theta^(-2i / head_dim).

    With `rope_scaling`, those whose wave is longer than the original context / low_freq_factor are divided by factor,
    those shorter than it / high_freq_factor are kept, and in between both are mixed, linearly in original context /
    wavelength [arXiv 2407.21783; Hugging Face's `llama3`]. Made by numpy, so that they are the same on all devices.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1 / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = map(np.float32, config.rope_scaling)
    waves = context * frequencies / np.float32(2 * np.pi)  # of each pair, in the original context
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _rope(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosines and sines [rows, T, 1, head_dim / 2] of rotary position embeddings (arXiv 2104.09864)."""
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + head_dim / 2) of x [rows, T, heads, head_dim]: the layout of Hugging Face weights."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _write(cache: Array, new: Array, layer: Array, slot: Array) -> Array:
    """Writes new [rows, T, ...] into cache [L, rows, length, ...] of `layer` from `slot` on."""
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, slot, *(zero,) * (new.ndim - 2))
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), start)


def _shard_cache(cache: Cache) -> Cache:
    """A cache sharded over rows and key-value heads."""
    axes = ("layer", "batch", None, "kv_heads", "head")
    return Cache(*(constrain(leaf, *axes[: leaf.ndim]) for leaf in cache))
