"""Hugging Face folders <-> parameters, both ways: config.json and safetensors, read and written
shard by shard.
"""

import contextlib
import functools
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxrft import mesh as meshes
from jaxrft.host.files import remove
from jaxrft.lm import config_json, model, tensors
from jaxrft.lm.config_json import ADAPTER_CONFIG, CONFIG
from jaxrft.lm.config_json import FAMILIES as FAMILIES
from jaxrft.lm.config_json import hf_config as hf_config
from jaxrft.lm.config_json import max_positions as max_positions
from jaxrft.lm.config_json import model_config as model_config
from jaxrft.lm.model import ModelConfig, Params, Weight
from jaxrft.lm.tensors import ADAPTER, EMBED, SINGLE, UNEMBED, TensorSlice
from jaxrft.lm.tensors import INDEX as INDEX
from jaxrft.types import Array, InputError

logger = logging.getLogger(__name__)

# Other files of a checkpoint, which are copied when it is saved again.
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
    "added_tokens.json vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json "
    "generation_config.json"
).split()
BLOCK = 1 << 24  # elements of two tensors that are compared at a time


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the shape of the decoder in a Hugging Face folder, whose config.json has keys of
    transformers 4 or 5.

    A decoder is tied only if its files agree: where config.json ties the embeddings, but they hold
    another lm_head.weight, it is not tied, as in transformers 5. Warns once of tensors that
    contradict config.json, and of keys that are not read. Raises InputError when there is no such
    folder or file, or for a decoder that `model.py` does not compute.
    """
    folder = Path(folder)
    keys = config_json.read(folder)
    config = model_config(keys, folder / CONFIG)
    if unread := config_json.unread(keys):
        _warn_once(
            f"{folder / CONFIG} has keys that are not read, as if they were absent: "
            f"{', '.join(unread)}"
        )
    if not tensors.has_tensors(folder):
        return config
    with contextlib.ExitStack() as stack:
        opened = tensors.open_folder(folder, stack)
        if opened.left_out:
            _warn_once(f"{folder} has safetensors that are not read: {', '.join(opened.left_out)}")
        if config.tie_word_embeddings and not _are_equal(opened.slices, EMBED, UNEMBED):
            _warn_once(
                f"{folder}: config.json ties the embeddings, but {UNEMBED} differs from "
                f"{EMBED}: they are not tied, as "
                "in transformers 5; set tie_word_embeddings to false in config.json to say so"
            )
            config = config._replace(tie_word_embeddings=False)
    return config


@functools.cache
def _warn_once(message: str) -> None:
    if jax.process_index() == 0:
        logger.warning("%s", message)


def _are_equal(slices: Mapping[str, TensorSlice], name: str, other: str) -> bool:
    """Compares two tensors, a block of rows at a time; one that is absent equals any."""
    if name not in slices or other not in slices:
        return True
    first = slices[name]
    second = slices[other]
    shape = first.get_shape()
    if shape != second.get_shape() or len(shape) != 2:
        return False
    rows = max(1, BLOCK // max(1, shape[1]))
    blocks = (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
    return all(np.array_equal(first[block], second[block]) for block in blocks)


def load(
    folder: str | Path,
    config: ModelConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Reads the parameters of a Hugging Face folder in `dtype`, sharded by `model.shardings` when a
    mesh is given.

    Adapters are not among them. With a mesh, a process reads only what its devices hold. Raises
    InputError when a tensor is missing, has the wrong shape, does not belong to the decoder or
    holds values that are not finite in `dtype`, and when there are no safetensors.
    """
    folder = Path(folder)
    weights = model.base(config)
    shardings = model.shardings(config, mesh) if mesh is not None else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(over="ignore"))  # what overflows in `dtype` is told below
        slices = _open(folder, config, stack)
        params = {
            weight.name: _place(weight, slices, shardings.get(weight.name), dtype)
            for weight in weights
        }
    if flaw := not_finite(params, config):
        raise InputError(
            f"{folder}: {flaw}: its weights are broken, copy them again or give another checkpoint"
        )
    return params


def check(folder: str | Path, config: ModelConfig) -> None:
    """Raises InputError where `load` would for names, shapes and dtypes; reads no values."""
    with contextlib.ExitStack() as stack:
        _open(Path(folder), config, stack)


def not_finite(params: Params, config: ModelConfig) -> str:
    """Names the first tensor with values that are not finite, and counts them; "" where all are.

    Counted on the devices that hold the parameters. Every process takes part, and has the same
    answer.
    """
    rows = [row for row in model.table(config) if row.name in params]
    sharding = params[rows[0].name].sharding
    replicated = (
        meshes.sharding(sharding.mesh) if isinstance(sharding, jax.sharding.NamedSharding) else None
    )
    arrays = tuple(params[row.name] for row in rows)
    counts = _count_not_finite(tuple(row.layered for row in rows), replicated)(arrays)
    flawed = [
        (name, int(number), math.prod(_layer_shape(row)), str(params[row.name].dtype))
        for row, count in zip(rows, counts, strict=True)
        for name, number in zip(_names(row), np.atleast_1d(np.asarray(count)), strict=True)
        if number
    ]
    if not flawed:
        return ""
    name, number, size, dtype = flawed[0]
    more = f", and {len(flawed) - 1} more tensors have some" if len(flawed) > 1 else ""
    return f"tensor {name} has {number} of {size} values that are not finite in {dtype}{more}"


@functools.cache
def _count_not_finite(
    layered: tuple[bool, ...], replicated: jax.sharding.Sharding
) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
    """Compiles the count of values that are not finite: [L] of a weight with layers, a number of
    another.
    """

    def count(params: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(
            jnp.sum(
                ~jnp.isfinite(x), axis=tuple(range(1, x.ndim)) if each else None, dtype=jnp.uint32
            )
            for x, each in zip(params, layered, strict=True)
        )

    return jax.jit(count, out_shardings=replicated)


def save(
    folder: str | Path,
    params: Params,
    config: ModelConfig,
    *,
    source: str | Path | Mapping[str, object],
    dtype: DTypeLike = jnp.float32,
    max_shard_size: int = 5 * 10**9,
    step: int | None = None,
    card: str | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers opens, in files of at most `max_shard_size`
    bytes.

    Adapters in `params` are added to their weights. `step` is that of a run, which config.json
    says. `card` is the text of README.md, if there is to be one. `source` is the folder the
    parameters came from, whose config.json, tokenizer and generation_config.json go along, or the
    keys of a new config.json (`hf_config`). Every process takes part in gathering, tensor by
    tensor; process 0 writes, and an existing checkpoint is replaced only after the new one is
    complete. What config.json and the tokenizer's files say of other files is left out
    (`config_json.export_keys`). Raises InputError when `folder` cannot be written or holds
    something else, when `source` describes another model, and for values that are not finite in
    `dtype`; then a checkpoint that is there stays.
    """
    dtype = np.dtype(dtype)
    keys = dict(source) if isinstance(source, Mapping) else config_json.read(Path(source))
    described = model_config(keys, "source")
    # `read_config` may have found otherwise
    if not isinstance(source, Mapping) and described.tie_word_embeddings:
        described = described._replace(tie_word_embeddings=config.tie_word_embeddings)
    if described != config._replace(lora=None):
        raise InputError(
            "the config.json to be saved is another model's: give the folder the "
            "parameters came from"
        )
    files = _split(_pieces(model.base(config)), dtype.itemsize, max_shard_size)
    with _replacing(Path(folder)) as new:
        _write(new, files, params, config, dtype)
        if new is not None:
            _write_index(new, files, dtype.itemsize)
            exported = config_json.export_keys(keys, config, dtype.name)
            exported.pop(config_json.STEP, None)  # of the policy that a run began with
            if step is not None:
                exported[config_json.STEP] = step
            config_json.write(new / CONFIG, exported)
            if not isinstance(source, Mapping):
                _copy_tokenizer(Path(source), new)
            _write_card(new, card)
    multihost_utils.sync_global_devices(f"jaxrft: saved {folder}")


def save_adapters(
    folder: str | Path,
    params: Params,
    config: ModelConfig,
    *,
    source: str,
    card: str | None = None,
) -> None:
    """Writes the adapters in `params`, float32, as a folder that peft opens on top of the model
    `source`.

    That is a folder or an id on the hub, owner/name[@revision]. `card` is the text of README.md, if
    there is to be one. Every process takes part; process 0 writes. Raises InputError when `folder`
    cannot be written or holds something else.
    """
    with _replacing(Path(folder)) as new:
        _write(
            new, {ADAPTER: _pieces(model.adapters(config))}, params, config, np.dtype(np.float32)
        )
        if new is not None:
            config_json.write(new / ADAPTER_CONFIG, peft_config(config, source))
            _write_card(new, card)
    multihost_utils.sync_global_devices(f"jaxrft: saved {folder}")


def _write_card(folder: Path, card: str | None) -> None:
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def peft_config(config: ModelConfig, source: str) -> dict[str, object]:
    """Builds the adapter_config.json of adapters on top of the model `source`.

    Raises ValueError for a decoder without adapters.
    """
    if config.lora is None:
        raise ValueError("a decoder without adapters has no adapter_config.json")
    alpha = config.lora.alpha
    name, _, revision = (
        (str(Path(source).resolve()), "", "") if Path(source).is_dir() else source.partition("@")
    )
    targets = {
        row.hf.split(".")[-2] for row in model.base(config) if row.name in config.lora.targets
    }
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


# Layout: a layer of a weight <-> its tensor in the file


def _names(weight: Weight) -> Iterator[str]:
    """Yields the names of the tensors that hold a weight: one, or one a layer."""
    yield from map(weight.hf.format, range(weight.shape[0])) if weight.layered else (weight.hf,)


def _layer_shape(weight: Weight) -> tuple[int, ...]:
    return weight.shape[1:] if weight.layered else weight.shape


def _layout(weight: Weight) -> list[list[int]]:
    """Groups the dimensions of a layer's weight by the dimension of the tensor that merges them.

    "head" joins the dimension before it, and `transpose` swaps inputs with outputs: q [D, H, e] is
    [[1, 2], [0]].
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


def _open(folder: Path, config: ModelConfig, stack: contextlib.ExitStack) -> dict[str, TensorSlice]:
    """Opens the tensors of a decoder; raises InputError unless they are just its own, in their
    shapes.
    """
    slices = tensors.open_folder(folder, stack).slices
    # the same one by its other name
    if config.tie_word_embeddings and EMBED not in slices and UNEMBED in slices:
        slices[EMBED] = slices[UNEMBED]
    # Not parameters: the output weights of a checkpoint that ties them, and a constant that old
    # versions saved.
    known = {UNEMBED}
    for weight in model.base(config):
        for name in _names(weight):
            if name not in slices:
                raise InputError(_missing_tensor(folder, name, slices.keys() - known))
            actual = tuple(slices[name].get_shape())
            shape = _stored_shape(weight)
            if actual != shape:
                raise InputError(
                    f"{folder}: tensor {name} has shape {actual}, but its "
                    f"config.json makes it {shape}"
                )
            known.add(name)
    unknown = [
        name for name in slices if name not in known and not name.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        raise InputError(
            f"{folder}: tensor {min(unknown)} does not belong to the decoder that its "
            "config.json describes"
        )
    return slices


def _missing_tensor(folder: Path, name: str, others: Set[str]) -> str:
    """Says that a tensor is missing, and names one that is there instead."""
    present = f", but {min(others)} and others" if others else ""
    return (
        f"{folder} has no tensor {name}, which its config.json calls for{present}: copy the "
        "checkpoint again"
    )


def _place(
    weight: Weight,
    slices: Mapping[str, TensorSlice],
    sharding: jax.sharding.Sharding | None,
    dtype: DTypeLike,
) -> Array:
    """Reads a weight onto its devices, or onto the default device without a sharding.

    It waits for the transfer. If reading ran ahead, the host would hold more and more of the
    weights.
    """
    if sharding is None:
        return jnp.asarray(
            _read(weight, slices, [(0, size) for size in weight.shape], dtype)
        ).block_until_ready()

    @functools.cache  # devices that hold the same block share one reading
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        return _read(weight, slices, list(bounds), dtype)

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # which the type of the callback allows
        return read(
            *(span.indices(size)[:2] for span, size in zip(index, weight.shape, strict=True))
        )

    return jax.make_array_from_callback(weight.shape, sharding, block).block_until_ready()


def _read(
    weight: Weight,
    slices: Mapping[str, TensorSlice],
    bounds: list[tuple[int, int]],
    dtype: DTypeLike,
) -> np.ndarray:
    """Reads the block of a weight within `bounds` from its layers' tensors, in `dtype`.

    `bounds` are (start, stop) of every dimension.
    """
    if not weight.layered:
        return _read_layer(weight, slices[weight.hf], bounds).astype(dtype, copy=False)
    layers = bounds[0]
    bounds = bounds[1:]
    block = np.empty((layers[1] - layers[0], *(stop - start for start, stop in bounds)), dtype)
    for at, name in enumerate(itertools.islice(_names(weight), *layers)):
        block[at] = _read_layer(weight, slices[name], bounds)
    return block


def _read_layer(weight: Weight, tensor: TensorSlice, bounds: list[tuple[int, int]]) -> np.ndarray:
    """Reads the block of one layer within `bounds`, in the layer's own dimensions.

    A merged dimension ("head") is never sharded, so the block holds all of it.
    """
    shape = _layer_shape(weight)
    groups = _layout(weight)
    inner = [math.prod(shape[i] for i in group[1:]) for group in groups]
    window = tuple(
        slice(*(n * edge for edge in bounds[group[0]]))
        for group, n in zip(groups, inner, strict=True)
    )
    order = list(itertools.chain(*groups))
    return (
        tensor[window]
        .reshape([bounds[i][1] - bounds[i][0] for i in order])
        .transpose(np.argsort(order))
    )


# Writing


class Piece(NamedTuple):
    """A tensor of the file: one layer of a weight, or a weight without layers."""

    name: str
    weight: Weight
    layer: int | None


def _pieces(weights: tuple[Weight, ...]) -> list[Piece]:
    """Lists the tensors of some rows of the table, in their order."""
    return [
        Piece(name, weight, layer if weight.layered else None)
        for weight in weights
        for layer, name in enumerate(_names(weight))
    ]


def _split(pieces: list[Piece], itemsize: int, max_shard_size: int) -> dict[str, list[Piece]]:
    """Splits tensors into files: {file name: its tensors}, in their order.

    A file takes as many as fit into `max_shard_size` bytes, and at least one.
    """
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
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }


def _write(
    folder: Path | None,
    files: Mapping[str, list[Piece]],
    params: Params,
    config: ModelConfig,
    dtype: np.dtype,
) -> None:
    """Writes the tensors of each file, for which all processes gather them; only one has a
    folder.
    """
    for file, pieces in files.items():
        arrays = {}
        for piece in pieces:
            tensor = _gather(piece, params, config, dtype)
            if folder is not None:
                arrays[piece.name] = tensor
        if folder is not None:
            # transformers 4 insists on a format
            save_file(arrays, folder / file, metadata={"format": "pt"})


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _layer(
    factors: tuple[Array, ...], layer: Array | None, *, config: ModelConfig, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Merges one layer of a stacked weight [L, ...] with its adapter, if it has one; all of the
    weight for None.

    Returns it, and the number of its values that are not finite.
    """
    if layer is not None:
        factors = tuple(
            jax.lax.dynamic_index_in_dim(factor, layer, keepdims=False) for factor in factors
        )
    merged = model.merge_lora(config, factors, dtype)
    return merged, jnp.sum(~jnp.isfinite(merged), dtype=jnp.uint32)


def _gather(piece: Piece, params: Params, config: ModelConfig, dtype: np.dtype) -> np.ndarray:
    """Gathers all of a tensor of the file on every process; raises InputError where it is not
    finite.
    """
    layer = None if piece.layer is None else np.int32(piece.layer)
    value, bad = _layer(
        model.weight_factors(params, piece.weight.name), layer, config=config, dtype=dtype
    )
    if int(bad):
        raise InputError(
            f"the policy is not exported: tensor {piece.name} has {int(bad)} of {value.size} "
            f"values that are not finite in {dtype}; go back to an earlier checkpoint, and lower "
            "the learning_rate"
        )
    is_local = value.is_fully_addressable or value.is_fully_replicated
    array = np.asarray(value) if is_local else multihost_utils.process_allgather(value, tiled=True)
    order = list(itertools.chain(*_layout(piece.weight)))
    return np.ascontiguousarray(array.transpose(order).reshape(_stored_shape(piece.weight)))


def _write_index(folder: Path, files: Mapping[str, list[Piece]], itemsize: int) -> None:
    """Writes the index of a checkpoint, if it has several files."""
    if len(files) > 1:
        names = {piece.name: file for file, pieces in files.items() for piece in pieces}
        size = itemsize * sum(
            math.prod(_layer_shape(piece.weight)) for pieces in files.values() for piece in pieces
        )
        config_json.write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": names})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of the tokenizer, without the keys that name code or a place of other
    files.
    """
    for name in TOKENIZER_FILES:
        path = source / name
        if not path.is_file():
            continue
        shutil.copyfile(path, folder / name)
        if name.endswith("_config.json"):
            keys = config_json.read_object(path)
            if keys.keys() & config_json.ORIGIN:
                portable = {
                    key: value for key, value in keys.items() if key not in config_json.ORIGIN
                }
                config_json.write(folder / name, portable)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and (any(folder.glob("*.safetensors")) or not any(folder.iterdir()))


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path | None]:
    """Yields a folder next to `folder` to write into, and renames it to `folder` at the end.

    Yields None on processes other than 0. Raises InputError if `folder` cannot be written, or
    exists and is not a checkpoint.
    """
    if jax.process_index() != 0:
        yield None
        return
    folder = folder.resolve()
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    try:
        if (
            old.is_dir() and not old.is_symlink() and not folder.exists()
        ):  # a process was killed between the two renames below
            old.rename(folder)
        if folder.exists() and not _replaceable(folder):
            raise InputError(
                f"{folder} exists and is not a checkpoint: give another folder, or remove it first"
            )
        for leftover in (new, old):
            remove(leftover)  # of a link, the link
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
