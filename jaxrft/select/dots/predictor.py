"""Reads and writes a trained predictor as one safetensors file: weights by name, settings in the
metadata.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from jaxrft.host.files import parse_json, replace_file, short_digest
from jaxrft.select.dots import training
from jaxrft.select.dots.attention import NEEDS, Calibration, Params
from jaxrft.types import Array, InputError, Missing

FORMAT = "jaxrft predictor 1"
SETTINGS = ("calibration", "temperature", "top_k")
PREPARE = "make one with jaxrft prepare predictor"


class Origin(NamedTuple):
    """The model that made the embeddings of prompts."""

    model: str  # as it was named
    width: int  # E
    digest: str | None = None  # of the model's parameters, if known


class Predictor(NamedTuple):
    """Parameters and settings with which `attention.predict` predicts pass rates from
    embeddings.
    """

    params: Params
    calibration: Calibration
    temperature: float  # of the attention
    top_k: int | None
    embeddings: Origin  # of those it was trained on, the only ones that it applies to


def save_predictor(path: str | Path, predictor: Predictor) -> None:
    """Replaces the file at `path` atomically; parameters that the calibration does not need are
    left out.

    Raises InputError for a predictor that `load_predictor` would not take, and for a file that
    cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(
            f"a predictor cannot be written to {path}: give a name that ends in .safetensors"
        )
    unused = set().union(*NEEDS.values()) - set(NEEDS.get(predictor.calibration, ()))
    params = predictor.params._replace(**dict.fromkeys(unused))
    tensors = {name: np.asarray(x, np.float32) for name, x in _names(params).items()}
    settings = {name: getattr(predictor, name) for name in SETTINGS}
    settings["embeddings"] = predictor.embeddings._asdict()
    _assemble(str(path), tensors, settings)
    metadata = {"format": FORMAT, "settings": json.dumps(settings)}
    try:
        replace_file(path, safetensors.numpy.save(tensors, metadata))
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error}): give a folder where you may write"
        ) from error


def load_predictor(path: str | Path) -> Predictor:
    """Reads the float32 predictor in a file that `save_predictor` wrote.

    Raises InputError for a file that is missing, holds something else, or whose tensors do not fit
    together.
    """
    if not Path(path).is_file():
        raise Missing(f"no file {path}: {PREPARE}, or give the path of one")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            file_format = metadata.get("format", "something else")
            tensors = {}
            settings = {}
            if file_format == FORMAT:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                settings = parse_json(metadata.get("settings", ""), dict)
    # numpy lacks some of its types, as bfloat16
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a predictor ({error}): {PREPARE}") from error
    if file_format != FORMAT:
        raise InputError(f"{path} holds {file_format}, not a {FORMAT}: {PREPARE}")
    return _assemble(str(path), tensors, settings)


def selector_options(predictor: Predictor) -> dict[str, object]:
    """Returns the keyword arguments of `selectors.dots` that a predictor determines."""
    options = {"attention_temperature": predictor.temperature, "top_k": predictor.top_k}
    return {"predictor": predictor.params, "calibration": predictor.calibration} | options


def untrained_predictor(origin: Origin) -> Predictor:
    """Returns a predictor of the published sizes, on the host, for embeddings of `origin`."""
    params = jax.jit(partial(training.initial, embedding_width=origin.width))(jax.random.key(0))
    return Predictor(jax.tree.map(np.asarray, params), "group_logit_temp", 1.0, None, origin)


def predictor_digest(predictor: Predictor) -> str:
    """Computes a digest of twelve characters of the parameters and settings."""
    content = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(predictor.params))
    return short_digest(content + repr(predictor[1:]).encode())


def check_embeddings(predictor: Predictor, origin: Origin) -> None:
    """Raises InputError unless embeddings of this origin are those that the predictor was trained
    on.

    Models are told apart by their parameters, or by name where the parameters of one are not known.
    """
    model, width, digest = predictor.embeddings
    same = origin.model == model if None in (digest, origin.digest) else origin.digest == digest
    if origin.width != width or not same:
        raise InputError(
            f"the predictor was trained on embeddings by {_shown(predictor.embeddings)}, but "
            "these are by "
            f"{_shown(origin)}: embed the tasks with {model}, or train a predictor on these"
        )


def _shown(origin: Origin) -> str:
    parameters = f", parameters {origin.digest}" if origin.digest else ""
    return f"{origin.model} (width {origin.width}{parameters})"


def _assemble(where: str, tensors: dict[str, np.ndarray], settings: dict) -> Predictor:
    """Checks named tensors and settings, and makes the predictor of them."""
    try:
        source = settings["embeddings"]
        origin = Origin(str(source["model"]), int(source["width"]), source.get("digest"))
        calibration, temperature, top_k = (settings[name] for name in SETTINGS)
        valid = (
            calibration in get_args(Calibration) and math.isfinite(temperature) and temperature > 0
        )
        valid = (
            valid
            and (top_k is None or (isinstance(top_k, int) and top_k >= 1))
            and origin.width >= 1
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"{where}: its settings {settings} are not those of a predictor: {PREPARE}"
        )
    like = _like(tensors, calibration, origin.width)
    shapes = {name: x.shape for name, x in _names(like).items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        shape = tensors[name].shape if name in tensors else None
        if shape != shapes.get(name):
            given, wanted = (
                list(x) if x is not None else "absent" for x in (shape, shapes.get(name))
            )
            raise InputError(
                f"{where}: the tensor {name} is {given}, it must be {wanted}: {PREPARE}"
            )
        if not np.isfinite(tensors[name]).all():
            raise InputError(
                f"{where}: the tensor {name} holds numbers that are not finite: {PREPARE}"
            )
    leaves = [jnp.asarray(tensors[name], jnp.float32) for name in shapes]
    params = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Predictor(params, calibration, float(temperature), top_k, origin)


def _like(tensors: dict[str, np.ndarray], calibration: Calibration, embedding_width: int) -> Params:
    """Describes a predictor with as many layers as the tensors name, as wide as the last of
    them.
    """
    layers = sum(name.startswith("query.layers.") and name.endswith(".weight") for name in tensors)
    width = tensors["query.norm_out.bias"].size if "query.norm_out.bias" in tensors else 0
    initial = partial(
        training.initial,
        embedding_width=embedding_width,
        calibration=calibration,
        width=max(1, width),
        layers=max(1, layers),
    )
    return jax.eval_shape(initial, jax.random.key(0))


def _names(params: Params) -> dict[str, Array]:
    """Returns the tensors of a predictor by name, such as query.layers.0.weight."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
