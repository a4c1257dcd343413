"""The folder of a run; saves and restores ONE pytree, `RunState`, by orbax: atomic, the newest n."""

import importlib.metadata
import json
import logging
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxrft import config as configs
from jaxrft.config import Config
from jaxrft.types import Array, InputError

logger = logging.getLogger(__name__)


class Tally(NamedTuple):
    """What metrics count over a whole run."""

    last_seen: Array  # [N] int32, the step that last rolled the task out, -1 = none
    tokens: Array  # [2] int32, sampled tokens: millions and rest, since int32 alone would overflow


class RunState(NamedTuple):
    """All that a run is at a step: what is not here derives from the config and the step."""

    step: Array  # scalar int32, steps done
    params: Any  # float32
    optimizer: Any
    selector: Any
    replay: Any
    tally: Tally


class Checkpoints:
    """The checkpoints of a run's folder; use it as a context manager.

    `identity` names what a state belongs to (model, number of tasks, selector): a checkpoint of anything else is
    refused. A state may be restored on another mesh or number of processes than it was saved on.
    """

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, Any]):
        """Opens `folder`, which need not exist; `keep` newest checkpoints stay."""
        # One process's clock or disk must not decide: orbax lets process 0 commit, the others wait for it.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self.folder = folder.absolute()
        self.identity = json.loads(json.dumps(identity))
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for what is being written."""
        self.manager.close()

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self.manager.latest_step()

    def save(self, state: RunState) -> None:
        """Saves `state` under its step; one that is there already is kept."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(self.identity))
        )

    def restore(self, like: RunState) -> RunState:
        """The newest state, with the shapes, dtypes and shardings of `like`, whose memory it takes.

        Raises InputError when it belongs to another model, another number of tasks or another selector.
        """
        step = self.latest()
        saved = self.manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))["identity"]
        for name in self.identity | saved:
            here, there = self.identity.get(name), saved.get(name)
            if here != there:
                raise InputError(
                    f"the checkpoint in {self.folder} is of another run: its {name} is {_short(there)}, this run's is "
                    f"{_short(here)}; choose another output_dir, or the config it was made with"
                )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        jax.tree.map(lambda x: x.delete(), like)  # or a state that fits the devices once would have to fit twice
        restored = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return restored["state"]


def _short(value: Any) -> str:
    """A value as one short phrase."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return repr(value)


def open_folder(config: Config) -> Path:
    """The run's folder, made if need be.

    Raises InputError when it cannot be written to, or holds a run that is not to be resumed.
    """
    folder = Path(config.output_dir)
    if config.resume == "never" and (folder / "config.json").exists():
        raise InputError(f"{folder} holds a run already: choose another output_dir, or resume=auto to go on with it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to output_dir {folder} ({error.strerror}): choose another folder") from error
    return folder


def write_records(folder: Path, config: Config) -> None:
    """Writes config.json and versions.json; logs what differs from the config the run had so far."""
    path = folder / "config.json"
    if path.exists():
        for name, (now, before) in configs.differences(config, json.loads(path.read_text(encoding="utf-8"))).items():
            logger.warning("this run goes on with another %s: %s, it was %s", name, now, before)
    path.write_text(configs.to_json(config) + "\n", encoding="utf-8")
    packages = ("jaxrft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "math-verify")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes"
    text = json.dumps(versions | {"devices": devices}, indent=2)
    (folder / "versions.json").write_text(text + "\n", encoding="utf-8")
