"""Opens, adapts and exports the policy of a run."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.host.files import short_digest
from jaxrft.lm import attention, cudnn_attention, hub, model, tokenizer, weights
from jaxrft.streams import stream_key
from jaxrft.types import Array, InputError, PyTree

logger = logging.getLogger(__name__)


class LanguageModel(NamedTuple):
    """A policy, its parameters on the mesh, and its tokenizer."""

    config: model.ModelConfig
    policy: model.Policy
    params: PyTree  # trained, float32: all parameters, or the adapters of LoRA
    frozen: model.Params  # not trained, in the dtype of the config: the base of LoRA, otherwise {}
    tokenizer: Any
    eos_ids: tuple[int, ...]
    folder: Path  # of its checkpoint


def open_model(config: Config, mesh: Mesh, *, trained: bool = True) -> LanguageModel:
    """Loads the policy of a Hugging Face folder, or of an id on the hub, onto the mesh.

    What is trained, all parameters or fresh adapters, is float32; the others need no more digits
    than are computed with. A policy that is not `trained` has no adapters, and its parameters are
    in the dtype of the config.
    """
    lm = read_model(config, hub.find(config.model), mesh, trained=trained)
    dtype = jnp.float32 if trained and lm.config.lora is None else jnp.dtype(config.dtype)
    params = weights.load(lm.folder, lm.config, mesh=mesh, dtype=dtype)
    if lm.config.lora is None:
        return lm._replace(params=params)
    return lm._replace(params=draw_adapters(config, lm.config, mesh), frozen=params)


def read_model(
    config: Config, folder: Path, mesh: meshes.AnyMesh, *, trained: bool = True
) -> LanguageModel:
    """Reads the policy of a Hugging Face folder: its shape and its tokenizer, but no parameters.

    It has the adapters that the config asks for if it is to be `trained`.
    """
    shape = weights.read_config(folder)._replace(lora=lora_config(config) if trained else None)
    check_rank(config, shape)
    loaded = tokenizer.load(str(folder))
    if len(loaded) > shape.vocab_size:
        raise InputError(
            f"the tokenizer of {config.model} has {len(loaded)} tokens but the model only "
            f"{shape.vocab_size}: they do not belong together"
        )
    check_length(config, weights.max_positions(folder))
    return LanguageModel(
        shape,
        make_policy(config, shape, mesh),
        None,
        {},
        loaded,
        tokenizer.eos_ids(loaded, str(folder)),
        folder,
    )


def learner_policy(
    config: Config, lm: LanguageModel, mesh: meshes.AnyMesh, *, remat: str
) -> model.Policy:
    """Returns the policy as an update computes it; warns if the config's kernel cannot be used on
    this mesh.
    """
    attend = attention.attend
    if config.attention == "cudnn":
        reason = cudnn_attention.unsupported_reason(
            lm.config.head_dim, config.dtype, meshes.platform(mesh)
        )
        if reason:
            logger.warning("attention is cudnn, but updates attend by XLA: %s", reason)
        else:
            attend = cudnn_attention.attend
    decoder = model.decoder(lm.config, dtype=jnp.dtype(config.dtype), remat=remat, attend=attend)
    return lm.policy._replace(apply=decoder.apply)


def make_policy(config: Config, shape: model.ModelConfig, mesh: meshes.AnyMesh) -> model.Policy:
    """Returns the decoder that the config asks for; warns if its kernel cannot be used on this
    mesh.
    """
    attend_slots = attention.attend_slots
    kind = attention.cache_of(meshes.platform(mesh), shape.head_dim)
    if config.attention == "pallas":
        # here, since most runs do not need it, and importing it takes time
        from jaxrft.lm import pallas_attention

        reason = pallas_attention.unsupported_reason(
            shape.head_dim, config.max_completion_length, meshes.platform(mesh)
        )
        if reason:
            logger.warning("attention is pallas, but completions are decoded by XLA: %s", reason)
        else:
            attend_slots = pallas_attention.attend_slots
            kind = attention.TpuLayerCache
    return model.decoder(
        shape,
        dtype=jnp.dtype(config.dtype),
        gather_for_decode=config.gather_for_rollout,
        attend_slots=attend_slots,
        kind=kind,
    )


def lora_config(config: Config) -> model.LoRA | None:
    """Describes the adapters that the config asks for, their targets sorted; None at rank 0."""
    rank = config.lora.rank
    targets = sorted(set(config.lora.targets))
    return model.LoRA(rank, config.lora.alpha, tuple(targets)) if rank else None


def check_rank(config: Config, shape: model.ModelConfig) -> None:
    """Raises InputError for adapters that are larger than the weights that they adapt."""
    if config.lora.rank > shape.hidden_size:
        raise InputError(
            f"lora.rank is {config.lora.rank:,}: it must be at most {shape.hidden_size:,}, the "
            f"hidden_size of {config.model}"
        )


def draw_adapters(config: Config, shape: model.ModelConfig, mesh: Mesh) -> model.Params:
    """Draws new adapters on the mesh, from the seed of the config."""
    rows = model.adapters(shape)
    shardings = {row.name: meshes.sharding(mesh, *row.axes) for row in rows}
    return jax.jit(
        lambda: model.draw(stream_key(config.seed, 0, "init"), rows), out_shardings=shardings
    )()


def fingerprint(params: PyTree, mesh: meshes.AnyMesh, *, dtype: DTypeLike | None = None) -> str:
    """Computes a digest of every bit of the parameters.

    It is the same on any mesh, because integer sums do not depend on their order. With `dtype`, it
    is the digest of the parameters cast to `dtype`.
    """

    def checksums(params: PyTree) -> Array:
        return jnp.stack(
            [_checksum(x if dtype is None else x.astype(dtype)) for x in jax.tree.leaves(params)]
        )

    sums = jax.jit(checksums, out_shardings=meshes.sharding(mesh))(params)
    return short_digest(np.asarray(sums).tobytes())


def _checksum(x: Array) -> Array:
    """Computes the sum of (2 i + 1) * bits_i over the numbers of x, modulo 2^32.

    bits_i are the bits of the i-th number, read as an integer.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(
        jnp.uint32
    )
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def export_adapters(
    config: Config, lm: LanguageModel, params: PyTree, folder: Path, *, card: str | None
) -> None:
    """Writes adapters alone, for peft; they name the folder or the id of their base."""
    base = str(lm.folder) if Path(config.model).is_dir() else config.model
    weights.save_adapters(folder, params, lm.config, source=base, card=card)


def export_merged(
    lm: LanguageModel, params: PyTree, folder: Path, step: int, *, card: str | None
) -> None:
    """Writes the policy of a step, its adapters merged, and replaces the one in `folder`."""
    whole = model.all_params(params, lm.frozen)
    weights.save(folder, whole, lm.config, source=lm.folder, step=step, card=card)


def check_finite(lm: LanguageModel, params: PyTree, *, step: int, newest: int | None) -> None:
    """Raises InputError when trained parameters are not finite after `step`; `newest` is the last
    saved step.
    """
    if flaw := weights.not_finite(params, lm.config):
        newest_sentence = (
            "there is no checkpoint yet"
            if newest is None
            else (f"the newest checkpoint is of step {newest}")
        )
        raise InputError(
            f"after step {step} {flaw}: it is not saved, {newest_sentence}; lower the learning_rate"
        )


def check_length(config: Config, limit: int | None) -> None:
    """Raises InputError when prompts and completions may outgrow the `limit` that the model was
    made for.
    """
    most = config.max_prompt_length + config.max_completion_length
    if limit is not None and most > limit:
        raise InputError(
            f"max_prompt_length {config.max_prompt_length} + max_completion_length "
            f"{config.max_completion_length} is "
            f"{most}, but {config.model} has max_position_embeddings {limit}: lower one of the two"
        )
