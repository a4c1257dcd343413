"""The policy as pure functions: a decoder-only transformer, with and without cache, and its one
table of weights.

Sources: Llama (arXiv 2302.13971, 2407.21783), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388);
grouped-query attention (arXiv 2305.13245); LoRA (arXiv 2106.09685), here a reparametrization: the
decoder computes with W + alpha / rank * A B, not with x W and x A B apart.
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
from jaxrft.lm.attention import (
    PADDED,
    Attend,
    AttendSlots,
    Cache,
    LayerCache,
    Segments,
    accumulation_dtype,
    attend,
    attend_cached,
    attend_slots,
    lay_out,
    slot_axis,
)
from jaxrft.lm.products import product
from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree

Params = dict[str, Array]


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


class Policy(NamedTuple):
    """The interface of a language model for rollout.py and update.py."""

    apply: Callable[..., tuple[Array, PyTree]]
    """(params, tokens [rows, T], positions [rows, T], valid [rows, T] bool, prefix=None,
    segments=None) -> (hidden [rows, T, D], the keys and values of these tokens, which can serve as
    a prefix). A prefix of B rows serves rows = B * G without being copied. With `segments` a row
    holds several sequences."""
    unembed: Callable[[PyTree, Array], Array]
    """(params, hidden [..., D]) -> logits [..., V] float32."""
    init_cache: Callable[[int, int], PyTree]
    """(rows, length) -> an empty cache of `decode`; leaves [rows, ...]."""
    resize_cache: Callable[[PyTree, int, Array | int], PyTree]
    """(cache, length, first) -> `length` slots of the cache from `first` on, those behind its end
    empty."""
    prepare_weights: Callable[[PyTree], PyTree]
    """(params) -> the weights that `decode` reads for every token, laid out for it."""
    prepare_prompts: Callable[[PyTree], PyTree]
    """(prefix) -> the prompts that `decode` reads for every token, leaves [B, ...]."""
    decode: Callable[[PyTree, PyTree, Array, Array, Array, PyTree], tuple[Array, PyTree]]
    """(weights, prompts, tokens [rows], positions [rows], slot [] int32, cache) -> (logits [rows,
    V] float32, cache). All rows write the same slot of the cache. A row sees its prompt, and as
    many slots, up to that one, as it has tokens behind its prompt: the slots before are free."""


class DecodeWeights(NamedTuple):
    """The weights as the decoder reads them for every token, in the dtype of computation."""

    layers: tuple[Params, ...]  # merged, of each layer by itself
    others: Params  # those that are no layer's


class DecodePrompts(NamedTuple):
    """The prompts' keys and values of B blocks of rows, as the decoder reads them."""

    prefix: tuple[LayerCache, ...]  # of each layer
    visible: Array  # [B, P] bool, which slots of the prefix hold a token


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
        """Checks whether the first axis counts layers."""
        return self.axes[0] == "layer"


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Lists every weight of the decoder and of its adapters.

    Initialization, sharding, loading and export follow this table.
    """
    return (*base(config), *adapters(config))


def base(config: ModelConfig) -> tuple[Weight, ...]:
    """Lists the weights of the decoder without adapters, those of a Hugging Face checkpoint."""
    weight = partial(_weight, config)
    norm = partial(weight, constant=1.0)
    matrix = partial(weight, transpose=True)
    layer = "model.layers.{}."
    attention = layer + "self_attn."
    mlp = layer + "mlp."
    rows = [
        weight("embed", "vocab embed", "model.embed_tokens.weight", fan_in="embed"),
        norm("attention_norm", "layer embed", layer + "input_layernorm.weight"),
        matrix("q", "layer embed heads head", attention + "q_proj.weight", fan_in="embed"),
        matrix("k", "layer embed kv_heads head", attention + "k_proj.weight", fan_in="embed"),
        matrix("v", "layer embed kv_heads head", attention + "v_proj.weight", fan_in="embed"),
        matrix("o", "layer heads head embed", attention + "o_proj.weight", fan_in="heads head"),
        norm("mlp_norm", "layer embed", layer + "post_attention_layernorm.weight"),
        matrix("gate", "layer embed mlp", mlp + "gate_proj.weight", fan_in="embed"),
        matrix("up", "layer embed mlp", mlp + "up_proj.weight", fan_in="embed"),
        matrix("down", "layer mlp embed", mlp + "down_proj.weight", fan_in="mlp"),
        norm("final_norm", "embed", "model.norm.weight"),
    ]
    if config.attention_bias:
        rows += [
            weight("q_bias", "layer heads head", attention + "q_proj.bias"),
            weight("k_bias", "layer kv_heads head", attention + "k_proj.bias"),
            weight("v_bias", "layer kv_heads head", attention + "v_proj.bias"),
        ]
    if config.output_bias:
        rows.append(weight("o_bias", "layer embed", attention + "o_proj.bias"))
    if config.qk_norm:
        rows += [
            norm("q_norm", "layer head", attention + "q_norm.weight"),
            norm("k_norm", "layer head", attention + "k_norm.weight"),
        ]
    if not config.tie_word_embeddings:
        rows.append(weight("unembed", "vocab embed", "lm_head.weight", fan_in="embed"))
    return tuple(rows)


def _weight(
    config: ModelConfig,
    name: str,
    axes: str,
    hf: str,
    *,
    fan_in: str = "",
    transpose: bool = False,
    constant: float = 0.0,
) -> Weight:
    """Makes a row of the table, with the sizes that the config gives to its `axes`.

    `fan_in` names those that a product sums over; without any the weight is `constant`.
    """
    sizes = {
        "layer": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "mlp": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head": config.head_dim,
    }
    names = tuple(axes.split())
    shape = tuple(sizes[axis] for axis in names)
    inputs = math.prod(sizes[axis] for axis in fan_in.split()) if fan_in else None
    return Weight(name, shape, names, inputs, hf, transpose, constant)


def adapters(config: ModelConfig) -> tuple[Weight, ...]:
    """Lists the weights of the LoRA adapters, none without LoRA.

    A weight W [in, out] of a layer has the factors A [in, rank] and B [rank, out]. Names, layout
    and initialization are those of peft. A is Kaiming-uniform with a = sqrt(5), which is uniform
    between -+1 / sqrt(in). B is zero, so that adapters change nothing at first.
    """
    if config.lora is None:
        return ()
    rank = config.lora.rank
    rows = []
    for row in base(config):
        if row.name in config.lora.targets:
            name_a, name_b = adapter_names(row.name)
            # up to there the dimensions are layer and inputs
            inputs = 3 if row.axes[2] == "head" else 2
            shapes = (*row.shape[:inputs], rank), (row.shape[0], rank, *row.shape[inputs:])
            axes = (*row.axes[:inputs], "rank"), ("layer", "rank", *row.axes[inputs:])
            hf = f"base_model.model.{row.hf.removesuffix('weight')}lora_"
            rows.append(
                Weight(name_a, shapes[0], axes[0], row.fan_in, f"{hf}A.weight", True, uniform=True)
            )
            rows.append(Weight(name_b, shapes[1], axes[1], None, f"{hf}B.weight", True))
    return tuple(rows)


def adapter_names(target: str) -> tuple[str, str]:
    """Names the adapter's two factors A and B of a weight."""
    return f"{target}_lora_a", f"{target}_lora_b"


def init(key: Array, config: ModelConfig) -> Params:
    """Draws random float32 parameters: normal with variance 1 / fan-in, norms 1, biases 0.

    Adapters are drawn as `adapters` says.
    """
    return draw(key, table(config))


def draw(key: Array, rows: tuple[Weight, ...]) -> Params:
    """Draws random float32 parameters for some rows of the table."""

    def one(weight: Weight, key: Array) -> Array:
        if weight.fan_in is None:
            return jnp.full(weight.shape, weight.constant, jnp.float32)
        if weight.uniform:
            return jax.random.uniform(key, weight.shape, jnp.float32, -1.0, 1.0) / math.sqrt(
                weight.fan_in
            )
        return jax.random.normal(key, weight.shape, jnp.float32) / math.sqrt(weight.fan_in)

    return {
        row.name: one(row, k) for row, k in zip(rows, jax.random.split(key, len(rows)), strict=True)
    }


def shardings(config: ModelConfig, mesh: meshes.AnyMesh) -> dict[str, jax.sharding.NamedSharding]:
    """Computes the sharding of each parameter on `mesh`.

    Raises InputError if the mesh does not divide the sizes of the decoder.
    """
    for what, size, axis in (
        ("hidden_size", config.hidden_size, "embed"),
        ("vocab_size", config.vocab_size, "vocab"),
        ("intermediate_size", config.intermediate_size, "mlp"),
        ("num_attention_heads", config.num_heads, "heads"),
        ("num_key_value_heads", config.num_kv_heads, "kv_heads"),
    ):
        meshes.check_divides(mesh, f"the model's {what}", size, axis)
    return {row.name: meshes.sharding(mesh, *row.axes) for row in table(config)}


def all_params(params: PyTree, frozen: Params | None) -> PyTree:
    """Merges the trained parameters of a policy with its frozen ones, if it has any."""
    return {**frozen, **params} if frozen else params


def weight_factors(params: Params, name: str) -> tuple[Array, ...]:
    """Looks up (W, A, B) of a weight whose adapter is in `params`, (W,) of any other weight."""
    return tuple(params[part] for part in (name, *adapter_names(name)) if part in params)


def merge_lora(config: ModelConfig, factors: tuple[Array, ...], dtype: DTypeLike) -> Array:
    """Computes W + alpha / rank * A B from one layer's (W, A, B), in `dtype`; W from (W,) alone.

    The frozen weights alone are thus the policy that LoRA started from. The cost of merging before
    multiplying is a gradient of W's size, one layer's at a time, summed over devices as if W were
    trained, from which those of A and B are taken. The benefit: rollout, learner and export
    compute with the same numbers, so that no ratio departs from 1 by the rounding of two ways to
    multiply, and in decoding an adapter of any rank costs nothing.
    """
    if config.lora is None or len(factors) == 1:
        return factors[0].astype(dtype)
    weight, a, b = factors
    wide = accumulation_dtype(dtype)
    product = jnp.tensordot(a, b, 1, precision="highest", preferred_element_type=wide)
    return (weight.astype(wide) + config.lora.alpha / config.lora.rank * product).astype(dtype)


def decoder(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "full",
    gather_for_decode: bool = True,
    attend: Attend = attend,
    attend_slots: AttendSlots = attend_slots,
    kind: type[LayerCache] = LayerCache,
) -> Policy:
    """Returns the decoder as a Policy that computes in `dtype` whatever the parameters' dtype is.

    `remat`, a key of `REMATS`, says what the backward pass computes again. `gather_for_decode`
    gathers all weights over `fsdp` once for decoding, instead of gathering each layer
    for every token. `attend`, of many queries, and `attend_slots`, of one in decoding, may be
    kernels: `jaxrft.lm.cudnn_attention`, `jaxrft.lm.pallas_attention`. `kind` of cache is what
    decoding reads: that of `attention.cache_of`, and `TpuLayerCache` for the kernel.
    """
    return Policy(
        apply=partial(apply, config, dtype=dtype, remat=remat, attend=attend),
        unembed=partial(unembed, config, dtype=dtype),
        init_cache=partial(init_cache, config, dtype=dtype, kind=kind),
        resize_cache=resize_cache,
        prepare_weights=partial(prepare_weights, config, dtype=dtype, gather=gather_for_decode),
        prepare_prompts=partial(prepare_prompts, config, kind=kind),
        decode=partial(
            decode, config, dtype=dtype, gathered=gather_for_decode, attend_slots=attend_slots
        ),
    )


# remat -> the layer, with what it saves for the backward pass: its input, the results of its matrix
# products, or everything. The scores of attention are never saved where there are several blocks of
# queries.
REMATS: dict[str, Callable[[Callable], Callable]] = {
    "full": jax.checkpoint,
    "dots": partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "none": lambda layer: layer,
}


def unembed(
    config: ModelConfig, params: Params, hidden: Array, *, dtype: DTypeLike = jnp.float32
) -> Array:
    """Computes logits [..., V] of final hidden states [..., D], in the `accumulation_dtype`."""
    name = "embed" if config.tie_word_embeddings else "unembed"
    weights = _all_gather(params[name], ("vocab", "embed"), dtype)
    wide = accumulation_dtype(dtype)
    logits = jnp.einsum("...d,vd->...v", hidden.astype(dtype), weights, preferred_element_type=wide)
    return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    valid: Array,
    prefix: Cache | None = None,
    segments: Segments | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "full",
    attend: Attend = attend,
) -> tuple[Array, Cache]:
    """Computes the decoder's forward pass; see `Policy.apply`.

    Attention is causal in `positions`, which rise along a sequence: prompts may be padded on either
    side.
    """
    axes = _layer_axes(config)
    rope = _rope(positions, rope_frequencies(config))
    key_positions = jnp.where(valid, positions, PADDED)

    def layer(x: Array, xs: PyTree) -> tuple[Array, Cache]:
        weights, prefix = xs
        w = {
            name: _all_gather(merge_lora(config, factors, dtype), axes[name], dtype)
            for name, factors in weights.items()
        }

        def attention(q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
            current = Cache(k, v, key_positions)
            return attend(q, positions, current, prefix, segments), current

        return _layer(config, w, x, rope, attention)

    x = constrain(
        _all_gather(params["embed"], ("vocab", "embed"), dtype)[tokens], "batch", "time", "embed"
    )
    layers = ({name: weight_factors(params, name) for name in axes}, prefix)
    x, cache = jax.lax.scan(REMATS[remat](layer), x, layers)
    return rms_norm(x, params["final_norm"].astype(dtype), config.rms_norm_eps), _shard_cache(cache)


Attention = Callable[[Array, Array, Array], tuple[Array, PyTree]]
"""(queries, keys, values) [rows, T, heads, head_dim] -> (mixed values [rows, T, heads, head_dim],
the new cache).
"""


def _layer(
    config: ModelConfig, w: Params, x: Array, rope: tuple[Array, Array], attention: Attention
) -> tuple[Array, PyTree]:
    """Computes one layer on x [rows, T, D]; returns its output and the cache of `attention`."""
    q, k, v = _project(config, w, rms_norm(x, w["attention_norm"], config.rms_norm_eps), rope)
    mixed, cache = attention(q, k, v)
    x = x + product("rthe,hed->rtd", mixed, w["o"])
    if config.output_bias:
        x = x + w["o_bias"][None, None]
    x = x + _mlp(w, rms_norm(x, w["mlp_norm"], config.rms_norm_eps))
    return constrain(x, "batch", "time", "embed"), cache


def init_cache(
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    dtype: DTypeLike = jnp.float32,
    kind: type[LayerCache] = LayerCache,
) -> tuple[LayerCache, ...]:
    """Returns a cache of `length` slots for each of `rows` rows: a buffer a layer, which `decode`
    updates in place.
    """
    zeros = jnp.zeros((rows, length, config.num_kv_heads, config.head_dim), dtype)
    return tuple(_shard_layer_cache(lay_out(zeros, zeros, kind)) for _ in range(config.num_layers))


def resize_cache(
    cache: tuple[LayerCache, ...], length: int, first: Array | int
) -> tuple[LayerCache, ...]:
    """Returns `length` slots of a cache from `first` on, those behind its end empty."""

    def resized(x: Array, axis: int) -> Array:
        added = (0, length)
        longer = jnp.pad(x, [added if each == axis else (0, 0) for each in range(x.ndim)])
        return jax.lax.dynamic_slice_in_dim(longer, first, length, axis)

    return tuple(
        _shard_layer_cache(
            type(layer)(resized(layer.keys, slot_axis(layer)), resized(layer.values, 2))
        )
        for layer in cache
    )


def prepare_weights(
    config: ModelConfig, params: Params, *, dtype: DTypeLike = jnp.float32, gather: bool = True
) -> DecodeWeights:
    """Lays out the weights for `decode`: merged, cast, and each layer an array of its own.

    With `gather` they are gathered over `fsdp`, and split over `model` only.
    """
    axes = _layer_axes(config)

    def prepare(weight: Array, axes: tuple[str | None, ...]) -> Array:
        return (
            _all_gather(weight, axes, dtype) if gather else constrain(weight.astype(dtype), *axes)
        )

    def layer(index: int) -> Params:
        layer_factors = {
            name: [factor[index] for factor in weight_factors(params, name)] for name in axes
        }
        return {
            name: prepare(merge_lora(config, tuple(factors), dtype), axes[name])
            for name, factors in layer_factors.items()
        }

    return DecodeWeights(
        layers=tuple(layer(index) for index in range(config.num_layers)),
        others={
            row.name: prepare(params[row.name], row.axes) for row in base(config) if not row.layered
        },
    )


def prepare_prompts(
    config: ModelConfig, prefix: Cache, *, kind: type[LayerCache] = LayerCache
) -> DecodePrompts:
    """Lays out the keys and values of prompts for `decode`, each layer an array of its own."""

    def layer(index: int) -> LayerCache:
        return _shard_layer_cache(lay_out(prefix.keys[index], prefix.values[index], kind))

    return DecodePrompts(
        prefix=tuple(layer(index) for index in range(config.num_layers)),
        visible=prefix.positions[0] < PADDED,
    )


def decode(
    config: ModelConfig,
    weights: DecodeWeights,
    prompts: DecodePrompts,
    tokens: Array,
    positions: Array,
    slot: Array,
    cache: tuple[LayerCache, ...],
    *,
    dtype: DTypeLike = jnp.float32,
    gathered: bool = True,
    attend_slots: AttendSlots = attend_slots,
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Computes one token of each row; see `Policy.decode`. `gathered`: whether `prepare_weights`
    gathered the weights.

    The layers are unrolled: each writes into a buffer of its own, which XLA then updates in place.
    In a scan over layers every layer would be sliced out of the stacked cache, and copied.
    """
    axes = _layer_axes(config)
    lengths = jnp.sum(prompts.visible, axis=1, dtype=jnp.int32)
    group = tokens.shape[0] // lengths.shape[0]
    first = slot - (positions - jnp.repeat(lengths, group))
    rope = _rope(positions[:, None], rope_frequencies(config))
    x = constrain(
        _all_gather(weights.others["embed"], ("vocab", "embed"), dtype)[tokens], "batch", "embed"
    )[:, None]
    written = []
    for layer, prefix, earlier in zip(weights.layers, prompts.prefix, cache, strict=True):

        def attention(
            q: Array, k: Array, v: Array, prefix: LayerCache = prefix, earlier: LayerCache = earlier
        ) -> tuple[Array, LayerCache]:
            new = lay_out(k, v, type(earlier))
            mixed, layer_cache = attend_cached(
                q[:, 0], prefix, prompts.visible, earlier, new, first, slot, attend_slots
            )
            return mixed[:, None], layer_cache

        # XLA would move what does not change out of the loop over tokens, and hold all layers at
        # once
        if not gathered:
            layer, x = jax.lax.optimization_barrier((layer, x))
        w = {name: _all_gather(weight, axes[name], dtype) for name, weight in layer.items()}
        x, layer_cache = _layer(config, w, x, rope, attention)
        written.append(layer_cache)
    hidden = rms_norm(x[:, 0], weights.others["final_norm"], config.rms_norm_eps)
    return unembed(config, weights.others, hidden, dtype=dtype), tuple(written)


def _layer_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of every weight of a layer, by name."""
    return {row.name: row.axes[1:] for row in base(config) if row.layered}


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Computes x / rms(x) * scale over the last axis, the rms in the `accumulation_dtype`."""
    wide = x.astype(accumulation_dtype(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def _all_gather(weight: Array, axes: tuple[str | None, ...], dtype: DTypeLike) -> Array:
    """Casts a weight to `dtype` and gathers it over the mesh axis `fsdp` for the computation.

    Between computations each device of `fsdp` holds a part of its "embed" dimension.
    """
    return constrain(weight.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


def _project(
    config: ModelConfig, w: Params, x: Array, rope: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Computes the queries, keys (both rotated) and values of one layer."""

    def project(name: str) -> Array:
        out = product("rtd,dhe->rthe", x, w[name])
        if config.attention_bias:
            out = out + w[f"{name}_bias"][None, None]
        if config.qk_norm and name != "v":
            out = rms_norm(out, w[f"{name}_norm"], config.rms_norm_eps)
        return constrain(out, "batch", "time", "heads" if name == "q" else "kv_heads", "head")

    return _rotate(project("q"), *rope), _rotate(project("k"), *rope), project("v")


def _mlp(w: Params, x: Array) -> Array:
    """Computes the SwiGLU block of a layer."""
    gate = jax.nn.silu(product("rtd,df->rtf", x, w["gate"]))
    inner = constrain(gate * product("rtd,df->rtf", x, w["up"]), "batch", "time", "mlp")
    return product("rtf,fd->rtd", inner, w["down"])


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Computes the frequencies theta^(-2i / head_dim) of rotary position embeddings.

    They are in radians a position, [head_dim / 2] float32. With `rope_scaling`, a frequency whose
    wave is longer than the original context / low_freq_factor is divided by factor. One whose wave
    is shorter than the original context / high_freq_factor is unchanged. In between both are mixed,
    linearly in original context / wavelength [arXiv 2407.21783; Hugging Face's `llama3`].
    Numpy computes them, so that they are the same on all devices.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1 / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = map(np.float32, config.rope_scaling)
    waves = context * frequencies / np.float32(2 * np.pi)  # of each pair, in the original context
    weight = np.clip((waves - low) / (high - low), 0, 1)
    return weight * frequencies + (1 - weight) * frequencies / factor


def _rope(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Computes the cosines and sines of rotary position embeddings (arXiv 2104.09864).

    Both are [rows, T, 1, head_dim / 2].
    """
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + head_dim / 2) of x [rows, T, heads, head_dim]: the layout of
    Hugging Face weights.
    """
    wide = accumulation_dtype(x.dtype)
    cos = cos.astype(wide)
    sin = sin.astype(wide)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def _shard_cache(cache: Cache) -> Cache:
    """Shards a cache over rows and key-value heads."""
    axes = ("layer", "batch", None, "kv_heads", "head")
    return Cache(*(constrain(leaf, *axes[: leaf.ndim]) for leaf in cache))


def _shard_layer_cache(cache: LayerCache) -> LayerCache:
    """Shards the cache of a layer over rows and key-value heads."""
    return type(cache)(*(constrain(x, "batch", "kv_heads", None, None) for x in cache))
