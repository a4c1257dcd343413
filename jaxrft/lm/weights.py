"""Hugging Face folders <-> parameters, both ways: config.json and safetensors, read and written shard by shard."""

import contextlib
import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrft.lm import model
from jaxrft.lm.model import ModelConfig, Params, RopeScaling, Weight
from jaxrft.types import Array, InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What else belongs to a checkpoint and goes along unchanged when it is saved again.
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
DTYPES = ("F32", "BF16", "F16")
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}  # keys


class Family(NamedTuple):
    """What a `model_type` of transformers says about the decoder without spelling it out."""

    architecture: str
    qk_norm: bool
    attention_bias: bool | None  # of queries, keys and values; None = the key attention_bias says so, of the output too
    num_key_value_heads: int | None  # where the key is absent; None = as many as heads
    head_dim: int | None  # likewise; None = hidden_size / heads


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", False, attention_bias=True, num_key_value_heads=32, head_dim=None),
    "qwen3": Family("Qwen3ForCausalLM", True, attention_bias=None, num_key_value_heads=32, head_dim=128),
    "llama": Family("LlamaForCausalLM", False, attention_bias=None, num_key_value_heads=None, head_dim=None),
}


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the decoder in a Hugging Face folder, whose config.json has the keys of transformers 4 or 5.

    Raises InputError when there is no such folder or file, or for a decoder that `model.py` does not compute.
    """
    return model_config(_read_keys(Path(folder)), str(folder))


def max_positions(folder: str | Path) -> int | None:
    """Tokens, prompt and completion together, that the decoder in a Hugging Face folder was made for; None = unsaid."""
    return _read_keys(Path(folder)).get("max_position_embeddings")


def hf_config(config: ModelConfig, **extra: Any) -> dict[str, Any]:
    """The config.json of a decoder made here, in the keys of transformers 4, which transformers 5 reads too.

    `extra` adds keys such as eos_token_id and max_position_embeddings. Raises InputError if no family has this shape.
    """
    keys = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
    }
    if config.output_bias:
        keys["attention_bias"] = True
    if config.rope_scaling is not None:
        keys["rope_scaling"] = {"rope_type": "llama3"} | config.rope_scaling._asdict()
    for name, family in FAMILIES.items():
        named = {"architectures": [family.architecture], "model_type": name} | keys
        if model_config(named, name) == config:
            return named | extra
    shape = ", ".join(f"{name}={getattr(config, name)}" for name in ("attention_bias", "output_bias", "qk_norm"))
    raise InputError(f"{shape} fits none of the model types {', '.join(FAMILIES)}")


def load(
    folder: str | Path, config: ModelConfig, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32
) -> Params:
    """The parameters of a Hugging Face folder in `dtype`, sharded by `model.shardings` when a mesh is given.

    Adapters are not among them. With a mesh, a process reads only what its devices hold. Raises InputError when a
    tensor is missing, has the wrong shape or has no place in the decoder, and when there are no safetensors.
    """
    folder, weights = Path(folder), model.base(config)
    shardings = model.shardings(config, mesh) if mesh is not None else {}
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check(folder, tensors, weights)
        return {weight.name: _place(weight, tensors, shardings.get(weight.name), dtype) for weight in weights}


def check(folder: str | Path, config: ModelConfig) -> None:
    """Raises InputError where `load` would; reads names and shapes only."""
    with contextlib.ExitStack() as stack:
        _check(Path(folder), _open(Path(folder), stack), model.base(config))


def save(
    folder: str | Path,
    params: Params,
    config: ModelConfig,
    *,
    source: str | Path | Mapping[str, Any],
    dtype: Any = jnp.float32,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face folder that transformers opens, in files of at most `max_shard_size` bytes.

    Adapters in `params` are added to their weights. `source` is the folder the parameters came from, whose config.json,
    tokenizer and generation_config.json go along, or the keys of a new config.json (`hf_config`). Every process takes
    part in gathering, tensor by tensor; process 0 writes, and an existing checkpoint is replaced only after the new one
    is complete. Raises InputError when `folder` cannot be written or holds something else, or when `source` describes
    another model.
    """
    dtype = np.dtype(dtype)
    keys = dict(source) if isinstance(source, Mapping) else _read_keys(Path(source))
    if model_config(keys, "source") != config._replace(lora=None):
        raise InputError("the config.json to be saved is another model's: give the folder the parameters came from")
    files = _split(_pieces(model.base(config)), dtype.itemsize, max_shard_size)
    with _replacing(Path(folder)) as new:
        _write(new, files, params, config, dtype)
        if new is not None:
            _write_index(new, files, dtype.itemsize)
            named = {"torch_dtype", "dtype"} & keys.keys() or {"torch_dtype"}
            _write_json(new / "config.json", keys | dict.fromkeys(named, dtype.name))
            if not isinstance(source, Mapping):
                _carry(Path(source), new)
    multihost_utils.sync_global_devices(f"jaxrft: saved {folder}")


def save_adapters(folder: str | Path, params: Params, config: ModelConfig, *, source: str) -> None:
    """Writes the adapters in `params`, float32, as a folder that peft opens on top of the model `source`.

    That is a folder or an id on the hub, owner/name[@revision]. Every process takes part; process 0 writes. Raises
    InputError when `folder` cannot be written or holds something else.
    """
    with _replacing(Path(folder)) as new:
        _write(new, {ADAPTER: _pieces(model.adapters(config))}, params, config, np.dtype(np.float32))
        if new is not None:
            _write_json(new / ADAPTER_CONFIG, peft_config(config, source))
    multihost_utils.sync_global_devices(f"jaxrft: saved {folder}")


def peft_config(config: ModelConfig, source: str) -> dict[str, Any]:
    """The adapter_config.json of adapters on top of the model `source`; raises ValueError for a decoder without."""
    if config.lora is None:
        raise ValueError("a decoder without adapters has no adapter_config.json")
    alpha = config.lora.alpha
    name, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
    targets = {row.hf.split(".")[-2] for row in model.base(config) if row.name in config.lora.targets}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
        "r": config.lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # peft's own are integers
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


# config.json


def _read_keys(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: give the folder of a downloaded Hugging Face checkpoint")
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{folder} holds adapters only: give the folder of a model with them merged, such as policy beside it"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    return read_json(folder / "config.json")


def model_config(keys: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape of the decoder that the keys of a config.json describe; where they are silent, as transformers has it.

    Raises InputError, which names `where`, for a decoder that `model.py` does not compute.
    """
    rope = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    supported = (
        ("model_type", keys.get("model_type"), tuple(FAMILIES)),
        ("hidden_act", keys.get("hidden_act", "silu"), ("silu",)),
        ("mlp_bias", keys.get("mlp_bias", False), (False,)),
        ("rope type", _rope_type(rope), ("default", "llama3")),
        ("attention with a sliding window", _slides(keys), (False,)),
    )
    for what, value, values in supported:
        if value not in values:
            raise InputError(f"{where}: {what} {value!r} is not supported, only {', '.join(map(repr, values))}")
    for name in SIZES & keys.keys():
        if not isinstance(keys[name], int) or keys[name] < 1:
            raise InputError(f"{where}: {name} is {keys[name]!r}: it must be a positive whole number")
    family, told_bias = FAMILIES[keys["model_type"]], bool(keys.get("attention_bias", False))
    try:
        heads, width = keys["num_attention_heads"], keys["hidden_size"]
        return ModelConfig(
            vocab_size=keys["vocab_size"],
            hidden_size=width,
            intermediate_size=keys["intermediate_size"],
            num_layers=keys["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=keys.get("num_key_value_heads", family.num_key_value_heads) or heads,
            head_dim=keys.get("head_dim") or family.head_dim or width // heads,
            rope_theta=float(rope.get("rope_theta", keys.get("rope_theta", 10_000.0))),
            rms_norm_eps=keys.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=keys.get("tie_word_embeddings", False),
            attention_bias=told_bias if family.attention_bias is None else family.attention_bias,
            output_bias=told_bias and family.attention_bias is None,
            qk_norm=family.qk_norm,
            rope_scaling=_scaling(rope),
        )
    except KeyError as error:
        raise InputError(f"{where}: config.json has no key {error}: copy it again from the checkpoint") from error


def _rope_type(rope: Any) -> str:
    """The kind of rotary embeddings; transformers 5 may give each kind of layer its own, which no family here has."""
    if not isinstance(rope, Mapping):
        return rope
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "by layer"
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    return RopeScaling(*(rope[name] for name in RopeScaling._fields)) if _rope_type(rope) == "llama3" else None


def _slides(keys: Mapping[str, Any]) -> bool:
    """Whether any layer attends through a sliding window, by the defaults of transformers."""
    if keys.get("layer_types"):
        return any(kind != "full_attention" for kind in keys["layer_types"])
    windowed = bool(keys.get("use_sliding_window")) and keys.get("sliding_window", 4096) is not None
    return windowed and keys.get("max_window_layers", 28) < keys.get("num_hidden_layers", 0)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; raises InputError when it is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): copy it again from the checkpoint") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object: copy it again from the checkpoint")
    return found


def files_of(index: Path) -> set[str]:
    """The names of the files of a checkpoint that its index lists; raises InputError when it lists none."""
    try:
        return set(read_json(index)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} does not say which tensors are where: copy it again from the checkpoint") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Layout: a layer of a weight <-> its tensor in the file


def _names(weight: Weight) -> list[str]:
    """The tensors that hold a weight: one, or one a layer."""
    return [weight.hf.format(layer) for layer in range(weight.shape[0])] if weight.layered else [weight.hf]


def _layer_shape(weight: Weight) -> tuple[int, ...]:
    return weight.shape[1:] if weight.layered else weight.shape


def _layout(weight: Weight) -> list[list[int]]:
    """For each dimension of the tensor in the file, the dimensions of a layer that it merges.

    "head" joins the dimension before it, and `transpose` swaps inputs with outputs: q [D, H, e] is [[1, 2], [0]].
    """
    groups: list[list[int]] = []
    for dimension, axis in enumerate(weight.axes[1:] if weight.layered else weight.axes):
        if axis == "head" and groups:
            groups[-1].append(dimension)
        else:
            groups.append([dimension])
    return groups[::-1] if weight.transpose else groups


def _stored_shape(weight: Weight) -> tuple[int, ...]:
    shape = _layer_shape(weight)
    return tuple(math.prod(shape[i] for i in group) for group in _layout(weight))


# Reading


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor of the checkpoint by name, as a safetensors slice: nothing but headers is read yet."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: give the folder of a downloaded Hugging Face checkpoint")
    if (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        files = sorted(files_of(folder / INDEX))
    elif other := sorted(path.name for path in folder.glob("*.bin")):
        raise InputError(f"{folder} has {other[0]}, but only safetensors are read: save it again with transformers")
    else:
        raise InputError(f"{folder} has no {SINGLE}: give the folder of a downloaded Hugging Face checkpoint")
    tensors = {}
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder} has no {file}, which its {INDEX} names: copy it again from the checkpoint")
        try:
            opened = stack.enter_context(safe_open(folder / file, framework="numpy"))
        except SafetensorError as error:
            raise InputError(f"{folder / file} is broken ({error}): copy it again from the checkpoint") from error
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}
    return tensors


def _check(folder: Path, tensors: Mapping[str, Any], weights: tuple[Weight, ...]) -> None:
    """Raises InputError unless the tensors are just those of the decoder, in their shapes."""
    shapes = {name: _stored_shape(weight) for weight in weights for name in _names(weight)}
    for name, shape in shapes.items():
        if name not in tensors:
            raise InputError(
                f"{folder} has no tensor {name}, which its config.json calls for: copy the checkpoint again"
            )
        found, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if found != shape:
            raise InputError(f"{folder}: tensor {name} has shape {found}, but its config.json makes it {shape}")
        if dtype not in DTYPES:
            raise InputError(f"{folder}: tensor {name} is of dtype {dtype}, but only {', '.join(DTYPES)} are read")
    # Not parameters: the output weights of a checkpoint that ties them, and a constant that old versions saved.
    known = shapes.keys() | {"lm_head.weight"}
    left = [name for name in tensors if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise InputError(f"{folder}: tensor {min(left)} has no place in the decoder that its config.json describes")


def _place(weight: Weight, tensors: Mapping[str, Any], sharding: jax.sharding.Sharding | None, dtype: Any) -> Array:
    """A weight on its devices, or on the default device without a sharding.

    It waits until it is there: reading ahead of the transfers, the host would hold ever more of the weights.
    """
    if sharding is None:
        return jnp.asarray(_read(weight, tensors, [(0, size) for size in weight.shape], dtype)).block_until_ready()

    @functools.cache  # devices that hold the same block share one reading
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        return _read(weight, tensors, list(bounds), dtype)

    def block(index: Any) -> np.ndarray:
        return read(*(span.indices(size)[:2] for span, size in zip(index, weight.shape, strict=True)))

    return jax.make_array_from_callback(weight.shape, sharding, block).block_until_ready()


def _read(weight: Weight, tensors: Mapping[str, Any], bounds: list[tuple[int, int]], dtype: Any) -> np.ndarray:
    """The block of a weight within `bounds`, start and stop of every dimension, from its layers' tensors."""
    if not weight.layered:
        return _read_layer(weight, tensors[_names(weight)[0]], bounds).astype(dtype, copy=False)
    layers, bounds = bounds[0], bounds[1:]
    block = np.empty((layers[1] - layers[0], *(stop - start for start, stop in bounds)), dtype)
    for at, name in enumerate(_names(weight)[slice(*layers)]):
        block[at] = _read_layer(weight, tensors[name], bounds)
    return block


def _read_layer(weight: Weight, tensor: Any, bounds: list[tuple[int, int]]) -> np.ndarray:
    """The block of one layer within `bounds`; a merged dimension ("head") is never sharded, hence whole."""
    shape, groups = _layer_shape(weight), _layout(weight)
    inner = [math.prod(shape[i] for i in group[1:]) for group in groups]
    window = tuple(slice(*(n * edge for edge in bounds[group[0]])) for group, n in zip(groups, inner, strict=True))
    order = list(itertools.chain(*groups))
    return tensor[window].reshape([bounds[i][1] - bounds[i][0] for i in order]).transpose(np.argsort(order))


# Writing


class Piece(NamedTuple):
    """A tensor of the file: one layer of a weight, or a weight without layers."""

    name: str
    weight: Weight
    layer: int | None


def _pieces(weights: tuple[Weight, ...]) -> list[Piece]:
    """The tensors of some rows of the table, in their order."""
    return [
        Piece(name, weight, layer if weight.layered else None)
        for weight in weights
        for layer, name in enumerate(_names(weight))
    ]


def _split(pieces: list[Piece], itemsize: int, max_shard_size: int) -> dict[str, list[Piece]]:
    """File name -> the tensors in it: as many, in their order, as fit `max_shard_size` bytes."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        bytes_each = math.prod(_layer_shape(piece.weight)) * itemsize
        if shards[-1] and size + bytes_each > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += bytes_each
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _write(
    folder: Path | None, files: Mapping[str, list[Piece]], params: Params, config: ModelConfig, dtype: np.dtype
) -> None:
    """Writes the tensors of each file, for which all processes gather them; only one has a folder."""
    for file, pieces in files.items():
        held = {}
        for piece in pieces:
            tensor = _gather(piece, params, config, dtype)
            if folder is not None:
                held[piece.name] = tensor
        if folder is not None:
            save_file(held, folder / file, metadata={"format": "pt"})  # transformers 4 insists on a format


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _layer(parts: tuple[Array, ...], layer: Array | None, *, config: ModelConfig, dtype: Any) -> Array:
    """One layer of a stacked weight [L, ...] with its adapter, if it has one; all of the weight for None."""
    if layer is not None:
        parts = tuple(jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in parts)
    return model.merge(config, parts, dtype)


def _gather(piece: Piece, params: Params, config: ModelConfig, dtype: np.dtype) -> np.ndarray:
    """A tensor of the file, whole, on every process."""
    layer = None if piece.layer is None else np.int32(piece.layer)
    value = _layer(model.parts_of(params, piece.weight.name), layer, config=config, dtype=dtype)
    here = value.is_fully_addressable or value.is_fully_replicated
    whole = np.asarray(value) if here else multihost_utils.process_allgather(value, tiled=True)
    order = list(itertools.chain(*_layout(piece.weight)))
    return np.ascontiguousarray(whole.transpose(order).reshape(_stored_shape(piece.weight)))


def _write_index(folder: Path, files: Mapping[str, list[Piece]], itemsize: int) -> None:
    """The index of a checkpoint of several files."""
    if len(files) > 1:
        names = {piece.name: file for file, pieces in files.items() for piece in pieces}
        size = itemsize * sum(math.prod(_layer_shape(piece.weight)) for pieces in files.values() for piece in pieces)
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": names})


def _carry(source: Path, folder: Path) -> None:
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and (any(folder.glob("*.safetensors")) or not any(folder.iterdir()))


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path | None]:
    """A folder beside `folder` to write into, renamed to it at the end; None on processes other than 0."""
    if jax.process_index() != 0:
        yield None
        return
    folder = folder.resolve()
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    try:
        if old.exists() and not folder.exists():  # a process was killed between the two renames below
            old.rename(folder)
        if folder.exists() and not _replaceable(folder):
            raise InputError(f"{folder} exists and is not a checkpoint: give another folder, or remove it first")
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        remedy = "give a folder where you may write, on a disk with room"
        raise InputError(f"cannot write {folder} ({error}): {remedy}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
