"""Opens the safetensors of a Hugging Face folder, under the names that transformers gives to a
decoder's tensors.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxrft.host.files import inside
from jaxrft.lm.config_json import ADAPTER_CONFIG, CONFIG, read_object
from jaxrft.types import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
DTYPES = ("F32", "BF16", "F16")
COPY_AGAIN = "copy it again from the checkpoint"
EMBED = "model.embed_tokens.weight"
UNEMBED = "lm_head.weight"
MAX_NAME = 500  # characters of a tensor's name

# Modules that wrap another one and compute nothing, as they show in the path to a tensor: those of
# torch.compile, DistributedDataParallel, FullyShardedDataParallel, activation checkpointing and
# Lightning Fabric.
WRAPPERS = {
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}

# Names of tensors that a checkpoint of a decoder does not have, and what such a checkpoint is.
FOREIGN = (
    (
        re.compile(
            r"\.lora_[AB]\.|\.lora_[AB]$|\.lora_embedding_[AB]|\.base_layer\.|^base_model\.model\."
        ),
        "holds adapters of peft that are not merged: merge them with merge_and_unload(), and "
        "save that",
    ),
    (
        re.compile(r"^tok_embeddings\.|\.attention\.w[qkvo]\.|\.feed_forward\.w[123]\."),
        "is in the format of Meta's releases: give the folder that transformers' "
        "convert_llama_weights_to_hf.py makes",
    ),
    (
        re.compile(
            r"(^|\.)(language_model|vision_tower|vision_model|visual|multi_modal_projector)\."
        ),
        "holds more than a decoder of text: give a model of text only",
    ),
    (
        re.compile(r"^(score|v_head|classifier|value_head|reward_head)\."),
        "holds a model that gives scores, not tokens: give one for causal language modeling",
    ),
)

# Names of tensors by quantization method; quant_method in config.json takes precedence.
QUANTIZED = (
    (
        "bitsandbytes",
        re.compile(
            r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$|\.quant_state"
        ),
    ),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("compressed-tensors", re.compile(r"\.weight_(packed|shape|zero_point|global_scale)$")),
    ("fp8", re.compile(r"\.(weight|input|activation|output)_scale(_inv)?$")),
    ("mxfp4", re.compile(r"_(blocks|scales)$")),
    ("MLX", re.compile(r"\.(scales|biases)$")),
    ("AQLM", re.compile(r"\.(codes|codebooks)$")),
    ("HQQ", re.compile(r"\.W_q$")),
    ("quanto", re.compile(r"\.weight\._(data|scale|shift)$")),
)
# Methods that transformers undoes: what makes a model without them; M is AutoModelForCausalLM, t is
# transformers.
DEQUANTIZE = {
    "bitsandbytes": "M.from_pretrained({folder!r}).dequantize()",
    "fp8": "M.from_pretrained({folder!r}, "
    "quantization_config=t.FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "M.from_pretrained({folder!r}, quantization_config=t.Mxfp4Config(dequantize=True))",
    "compressed-tensors": "M.from_pretrained({folder!r}, quantization_config="
    "t.CompressedTensorsConfig(dequantize=True))",
    "gguf": "M.from_pretrained({folder!r}, gguf_file={file!r})",
}
# Weights in formats that are not read, by the end of their names.
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz", ".gguf")


class TensorSlice(Protocol):
    """A tensor of an open safetensors file, of which parts are read."""

    def get_shape(self) -> list[int]:
        """Returns the shape of the whole tensor."""
        ...

    def get_dtype(self) -> str:
        """Returns the name that safetensors has for its dtype."""
        ...

    def __getitem__(self, index: object, /) -> np.ndarray:
        """Reads a part."""
        ...


class Opened(NamedTuple):
    """The tensors of a folder, whose headers alone are read."""

    slices: dict[str, TensorSlice]  # name in transformers -> safetensors slice
    left_out: tuple[str, ...]  # other safetensors of the folder, which no index names


def has_tensors(folder: Path) -> bool:
    """Checks whether the folder has a safetensors file, or the index of several."""
    return any(_is_file(folder / name) for name in (SINGLE, INDEX))


def files_of(index: Path) -> set[str]:
    """Returns the names of the files that the index of a checkpoint lists, all of its own folder.

    Raises InputError when it lists none, or one that is elsewhere.
    """
    weight_map = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise InputError(f"{index} does not say which tensors are where: {COPY_AGAIN}")
    files = set(weight_map.values())
    for file in sorted(files):
        try:
            inside(index.parent, file)
        except ValueError as error:
            raise InputError(
                f"{index} names a file that is elsewhere, {file!r:.200}: {COPY_AGAIN}"
            ) from error
    return files


def open_folder(folder: Path, stack: contextlib.ExitStack) -> Opened:
    """Opens every tensor of a folder; it reads headers only.

    Raises InputError for a folder without safetensors, for files that are broken or missing, for
    two tensors of one name, and for checkpoints that are quantized, unmerged or not of a decoder:
    it says which, and what to do.
    """
    if not folder.is_dir():
        raise InputError(
            f"no folder {folder}: give the folder of a downloaded Hugging Face checkpoint"
        )
    files = _files(folder)
    by_name: dict[str, tuple[str, TensorSlice]] = {}  # name in the file -> (file, slice)
    for file in files:
        if not _is_file(folder / file):
            raise InputError(f"{folder} has no {file}, which its {INDEX} names: {COPY_AGAIN}")
        try:
            opened = stack.enter_context(safe_open(folder / file, framework="numpy"))
            slices = {name: opened.get_slice(name) for name in opened.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / file} is broken ({error}): {COPY_AGAIN}") from error
        for name, tensor in slices.items():
            if name in by_name:
                raise InputError(
                    f"{folder} has the tensor {name} twice, in {by_name[name][0]} and in {file}: "
                    "leave one of the two out"
                )
            by_name[name] = (file, tensor)
    names = transformers_names(by_name, folder)
    slices = {names[stored]: tensor for stored, (_, tensor) in by_name.items()}
    _check_format(folder, slices)
    others = {path.name for path in folder.glob("*.safetensors")} - set(files)
    return Opened(slices, tuple(sorted(others)))


def _files(folder: Path) -> list[str]:
    """Returns the names of the files that hold the tensors of a folder."""
    single, index = (_is_file(folder / name) for name in (SINGLE, INDEX))
    if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} holds a model and adapters next to it, in {ADAPTER}: merge them, or move "
            "them elsewhere"
        )
    if single and index and files_of(folder / INDEX) != {SINGLE}:
        raise InputError(
            f"{folder} holds two checkpoints, {SINGLE} and the files of {INDEX}: move one of "
            "them elsewhere"
        )
    if single:
        return [SINGLE]
    if index:
        return sorted(files_of(folder / INDEX))
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS)
    if others and others[0].endswith(".gguf"):
        remedy = _command("gguf", folder, others[0])
        raise InputError(f"{folder} has {others[0]}, but only safetensors are read: {remedy}")
    if others:
        raise InputError(
            f"{folder} has {others[0]}, but only safetensors are read: save it "
            "again with transformers"
        )
    raise InputError(
        f"{folder} has no {SINGLE}: give the folder of a downloaded Hugging Face checkpoint"
    )


def _is_file(path: Path) -> bool:
    """Checks whether a file exists; False for a name that the file system does not accept."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def transformers_names(stored: Iterable[str], folder: Path) -> dict[str, str]:
    """Returns the name in transformers of each tensor by its name in the file.

    The rule: wrappers (`WRAPPERS`) and a path that all names share (`_shared`) are no part of a
    name, and names none of which begins with "model." all lack it, but for the head's. Raises
    InputError for names that follow no one rule: outer wrappers on some only, "model." on some
    only, and two tensors that come to have one name.
    """
    stored = list(stored)
    for name in stored:
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise InputError(
                f"{folder} has a tensor of a name that no decoder has, {name!r:.100}: {COPY_AGAIN}"
            )
    outer = {name: _outer(name) for name in stored}
    if len(set(outer.values())) > 1:
        first, second = _examples(outer)
        raise InputError(
            f"{folder} has tensors of two kinds of names, {first} and {second}: {COPY_AGAIN}"
        )
    plain = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in stored
    }
    for pattern, what in FOREIGN:
        for name in plain.values():
            if pattern.search(name):
                raise InputError(f"{folder} {what} (its tensors are named like {name})")
    shared = _shared(plain.values())
    plain = {name: short.removeprefix(shared) for name, short in plain.items()}
    prefixed = {
        name: short.startswith("model.")
        for name, short in plain.items()
        if not short.startswith("lm_head.")
    }
    if len(set(prefixed.values())) > 1 and _mixes(plain.values()):
        first, second = _examples(prefixed)
        raise InputError(
            f"{folder} has tensors of two kinds of names, {first} and {second}: {COPY_AGAIN}"
        )
    if not any(prefixed.values()) and _mixes(plain.values()):
        plain |= {name: f"model.{plain[name]}" for name in prefixed}
    seen: dict[str, str] = {}
    for name, short in plain.items():
        if short in seen:
            raise InputError(
                f"{folder} has the tensor {short} twice, as {seen[short]} and as {name}: "
                f"{COPY_AGAIN}"
            )
        seen[short] = name
    return plain


def _outer(name: str) -> str:
    """Returns the wrappers that a name begins with."""
    parts = name.split(".")
    count = next((i for i, part in enumerate(parts) if part not in WRAPPERS), len(parts))
    return ".".join(parts[:count])


def _shared(names: Iterable[str]) -> str:
    """Returns the path to the module that is the decoder, as in "actor.model.embed_tokens.weight";
    "" without one.

    All names begin with it, such as those of a trainer that holds the decoder and was saved with
    it.
    """
    names = list(names)
    embeddings = [name for name in names if name.endswith(".embed_tokens.weight")]
    if len(embeddings) != 1:
        return ""
    path = embeddings[0].removesuffix("embed_tokens.weight").removesuffix("model.")
    return path if all(name.startswith(path) for name in names) else ""


def _mixes(names: Iterable[str]) -> bool:
    """Checks whether some tensors of a decoder have names without "model.".

    Any other name without it is that of a tensor which the decoder does not have.
    """
    return any(name.startswith(("embed_tokens.", "layers.", "norm.")) for name in names)


def _examples(kinds: Mapping[str, object]) -> tuple[str, str]:
    """Returns a name of the first kind, and one of another."""
    first = min(kinds)
    return first, min(name for name in kinds if kinds[name] != kinds[first])


def _check_format(folder: Path, slices: Mapping[str, TensorSlice]) -> None:
    """Raises InputError for tensors that are quantized, or of a dtype that is not read."""
    dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
    marked = {name: method for name in slices for method, sign in QUANTIZED if sign.search(name)}
    strange = [name for name, dtype in dtypes.items() if dtype not in DTYPES]
    if not marked and not strange:
        return
    keys = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    settings = keys.get("quantization_config")
    named = settings.get("quant_method") if isinstance(settings, dict) else None
    method = named if isinstance(named, str) else next(iter(marked.values()), None)
    if method is None and dtypes[strange[0]].startswith("F8"):
        method = "fp8"
    if (
        method == "fp8" != named
        and strange
        and not any(dtypes[name].startswith("F8") for name in strange)
    ):
        method = "compressed-tensors"  # whose whole numbers have scales of the same names
    name = min(strange or marked)
    flaw = f"tensor {name} is of dtype {dtypes[name]}"
    only = f"but only {', '.join(DTYPES)} are read"
    if method is None:
        raise InputError(f"{folder}: {flaw}, {only}: save it again in one of them")
    if not strange:
        only = "of a kind that only quantized checkpoints have"
    raise InputError(
        f"{folder} is quantized by {method:.40} ({flaw}, {only}): give the checkpoint that it "
        "was made from" + (f", or {_command(method, folder)}" if method in DEQUANTIZE else "")
    )


def _command(method: str, folder: Path, file: str = "") -> str:
    """Returns the remedy for a checkpoint that transformers can dequantize."""
    made = DEQUANTIZE[method].format(folder=str(folder), file=file)
    code = f"import transformers as t; M = t.AutoModelForCausalLM; {made}.save_pretrained('OUT')"
    return f'dequantize it with `python -c "{code}"` and copy the tokenizer to OUT'
