"""Opens the policies of a run's checkpoints, and exports them as Hugging Face folders."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxrft import config as configs
from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.fields import Checked, FilePath
from jaxrft.host.checkpoint import find_checkpoint, read_identity, read_params
from jaxrft.host.files import JSON, UnreadableJSON, read_json
from jaxrft.host.multihost import broadcast_from_host0
from jaxrft.lm import hub, model, weights
from jaxrft.lm.policy import (
    LanguageModel,
    export_adapters,
    export_merged,
    fingerprint,
    read_model,
)
from jaxrft.train.card import model_card
from jaxrft.train.devices import computing_on
from jaxrft.types import InputError, PyTree


@dataclass(frozen=True)
class Options(Checked):
    """Writes the policy of a checkpoint as a Hugging Face folder, as the end of a run does."""

    run: tyro.conf.Positional[FilePath]
    """Folder of the run, its output_dir."""
    step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Step of the checkpoint; the newest good one by default."""
    out: FilePath | None = None
    """Folder to write, RUN/policy-<step> by default; with LoRA the merged policy, and the adapters
    alone in its folder adapter/."""
    model: FilePath | None = None
    """Where the model that the run began with is now, if it has moved."""


def main(options: Options) -> str:
    """Exports the policy of a checkpoint; returns a sentence that says where it is.

    Raises InputError when there is no such run or checkpoint, and when the folder cannot be
    written.
    """
    config = config_of_run(Path(options.run))
    if options.model is not None:
        config = replace(config, model=options.model)
    mesh = _mesh_for(config)
    with computing_on(mesh, config):
        lm, step = open_checkpoint(config, mesh, options.step)
        folder = Path(options.out or Path(options.run) / f"policy-{step}")
        where = export(config, lm, lm.params, step, folder, adapter=folder / "adapter")
        return f"the policy of step {step} is in {where}"


def export(
    config: Config, lm: LanguageModel, params: PyTree, step: int, folder: Path, *, adapter: Path
) -> str:
    """Writes the policy of a step, its adapters merged, to `folder`, and adapters alone to
    `adapter`, each with a model card; returns the end of a sentence that says where they are.
    """
    card = model_card(config, step, lm.folder)
    export_merged(lm, params, folder, step, card=card)
    if lm.config.lora is None:
        return f"{folder}"
    card = model_card(config, step, lm.folder, "adapter")
    export_adapters(config, lm, params, adapter, card=card)
    return f"{folder}, its adapters alone are in {adapter}"


def config_of_run(folder: Path) -> Config:
    """Returns the config of the run in a folder, and that folder as its output_dir.

    Raises InputError when there is none.
    """
    path = folder / "config.json"
    try:
        tree = read_json(path, dict)
    except (OSError, UnreadableJSON) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder} is no folder of a run: {path} cannot be read ({reason}); give the "
            "output_dir of one that has trained a step"
        ) from error
    # A run that was moved, or whose folder was given relative to another one, is where it is.
    return configs.from_json(tree | {"output_dir": str(folder)}, f"{path}")


def _mesh_for(config: Config) -> Mesh:
    """Lays out this machine's devices as the run's, which gives the same bits, or as they are.

    On another number of devices, those share the weights that divide them.
    """
    try:
        return meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    except InputError:
        shape = weights.read_config(hub.find(config.model))
        return meshes.make(fsdp=math.gcd(shape.hidden_size, jax.device_count()))


def open_checkpoint(
    config: Config, mesh: Mesh, step: int | None, *, dtype: DTypeLike = jnp.float32
) -> tuple[LanguageModel, int]:
    """Opens the policy of a checkpoint in the config's output_dir; returns it and its step.

    `step` None is the newest good one. Parameters are cast to `dtype`, but adapters are float32 and
    their base is in the dtype of the config. Nothing else of the checkpoint is read, so that any
    selector, tasks and optimizer will do. Raises InputError for a checkpoint of another model.
    """
    folder = Path(config.output_dir) / "checkpoints"
    step = int(broadcast_from_host0(lambda: str(find_checkpoint(folder, step))))
    identity = read_identity(folder, step)
    lm = read_model(config, hub.find(config.model), mesh)
    _check_model(config, lm, identity, folder)
    if lm.config.lora is None:
        rows = model.base(lm.config)
    else:
        dtype = jnp.float32
        rows = model.adapters(lm.config)
        frozen = weights.load(lm.folder, lm.config, mesh=mesh, dtype=jnp.dtype(config.dtype))
        if fingerprint(frozen, mesh) != identity["digest of the model's parameters"]:
            raise InputError(
                f"the adapters in {folder} are of another model than {config.model}: "
                "give the model that the run began with"
            )
        lm = lm._replace(frozen=frozen)
    like = {row.name: meshes.describe_array(mesh, row.shape, dtype, *row.axes) for row in rows}
    return lm._replace(params=read_params(folder, step, like)), step


def _check_model(
    config: Config, lm: LanguageModel, identity: dict[str, JSON], folder: Path
) -> None:
    """Raises InputError when a checkpoint is of a model of another shape."""
    shape = lm.config._asdict()
    if lm.config.lora is not None:
        shape["lora"] = lm.config.lora._asdict() | {"targets": list(lm.config.lora.targets)}
    for name, value in shape.items():
        saved = identity.get(f"model's {name}")
        if saved != value:
            raise InputError(
                f"the checkpoints in {folder} are of another model than {config.model}: the "
                f"model's {name} is {saved} there, and {value} here; give the config of the run"
            )
