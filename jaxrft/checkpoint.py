"""The folder of a run; saves and restores ONE pytree, `RunState`, by orbax: atomic, the newest n."""

import errno
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxrft import config as configs
from jaxrft.config import Config
from jaxrft.types import Array, Feedback, InputError

logger = logging.getLogger(__name__)

FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
MILLION = 1_000_000


class Tally(NamedTuple):
    """What metrics count over a whole run."""

    last_seen: Array  # [N] int32, the step that last rolled the task out, -1 = none
    tokens: Array  # [2] int32, sampled tokens: millions and rest, since int32 alone would overflow
    rollouts: Array  # [2] int32, likewise


def count(tally: Tally, feedback: Feedback, step: Array, num_generations: int) -> Tally:
    """The tally after a step that rolled out the tasks of `feedback` [B], each so many times."""
    ids, tokens = feedback.ids, jnp.sum(feedback.tokens.astype(jnp.int32))
    return Tally(
        last_seen=tally.last_seen.at[ids].set(step),
        tokens=_add(tally.tokens, tokens),
        rollouts=_add(tally.rollouts, ids.size * num_generations),
    )


def _add(number: Array, more: Array | int) -> Array:
    rest = number[1] + more
    return jnp.stack([number[0] + rest // MILLION, rest % MILLION])


def totals(tally: Tally) -> dict[str, int]:
    """Tokens and rollouts sampled so far, as metrics name them."""
    numbers = {"num_tokens": tally.tokens, "rollouts": tally.rollouts}
    return {name: MILLION * int(x[0]) + int(x[1]) for name, x in jax.device_get(numbers).items()}


class RunState(NamedTuple):
    """All that a run is at a step: what is not here derives from the config and the step."""

    step: Array  # scalar int32, steps done
    params: Any  # what is trained, float32
    optimizer: Any
    selector: Any
    replay: Any
    tally: Tally


class Checkpoints:
    """The checkpoints of a run's folder; use it as a context manager.

    `identity` names what a state belongs to (model, tasks, selector): a checkpoint of anything else is
    refused. A state may be restored on another mesh or number of processes than it was saved on.
    """

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, Any]):
        """Opens `folder`, which need not exist; `keep` newest checkpoints stay, what killed saves left is removed."""
        # Process 0 decides for all: it lists the steps, removes leftovers and commits, the others wait for it.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,
            enable_async_checkpointing=False,
        )
        self.folder = folder.absolute()
        self.identity = json.loads(json.dumps(identity))
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for what is being written; a folder without any checkpoint goes."""
        self.manager.close()
        with suppress(OSError):  # not empty, or another process was first
            self.folder.rmdir()

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self.manager.latest_step()

    def save(self, state: RunState) -> None:
        """Saves `state` under its step; raises InputError when the disk is full."""
        saved = ocp.args.Composite(state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(self.identity))
        with writing(self.folder), _without_stacks(logging.getLogger("absl")):
            self.manager.save(int(state.step), args=saved)

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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises InputError for what the disk of `folder` refuses to take."""
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore tells of a full disk in the text of a ValueError
        told = next((reason for reason in FULL if reason in str(error)), None)
        if reason := getattr(error, "strerror", None) or told:
            remedy = "put that right, and the same command goes on from the newest checkpoint"
            raise InputError(f"cannot write to {folder} ({reason}): {remedy}") from error
        raise


@contextmanager
def _without_stacks(library: logging.Logger) -> Iterator[None]:
    """Keeps a library from printing the stack of an error that it raises as well."""

    def stackless(record: logging.LogRecord) -> bool:
        return not record.exc_info

    library.addFilter(stackless)
    try:
        yield
    finally:
        library.removeFilter(stackless)


def open_folder(config: Config) -> Path:
    """The run's folder, made if need be; process 0 decides and all raise alike.

    Raises InputError when it cannot be written to, is not the same folder for all processes, or holds a run that is
    not to be resumed or would be lost.
    """
    folder = Path(config.output_dir)
    if "://" in config.output_dir:
        raise InputError(
            f"output_dir {config.output_dir} is a URL, but runs are written to folders only: give the path under which "
            "that storage is mounted"
        )
    with ExitStack() as stack:

        def make() -> str:
            try:
                check_contents(folder, config.resume)
                folder.mkdir(parents=True, exist_ok=True)
                return stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-")).name
            except OSError as error:
                mistake = f"cannot write to output_dir {folder} ({error.strerror}): choose another folder"
                raise InputError(mistake) from error

        probe = on_first(make) or ""
        seen = (folder / from_first(Path(probe).name)).exists() and os.access(folder, os.W_OK)
        if not np.all(multihost_utils.process_allgather(np.array(seen))):  # or the first save would wait for ever
            raise InputError(
                f"not every host finds in output_dir {folder} what process 0 writes there: output_dir must be on "
                "storage that all hosts share and may write to"
            )
    return folder


def check_contents(folder: Path, resume: str) -> None:
    """Raises InputError when `folder` holds a run that a new one would overwrite."""
    saved = saved_steps(folder)
    begun = (folder / "config.json").exists() or (folder / "metrics.jsonl").exists()
    if (folder / "policy").exists() and not saved:
        raise InputError(
            f"{folder} holds a trained policy but no checkpoints to go on from: choose another output_dir, or move "
            f"{folder / 'policy'} away to start afresh"
        )
    if resume == "never" and (saved or begun):
        raise InputError(f"{folder} holds a run already: choose another output_dir, or resume=auto to go on with it")
    if begun and not saved:
        logger.warning("the run in %s ended before its first checkpoint: it starts afresh", folder)


def saved_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints of a run's folder; orbax renames each to its step at the end."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` returns on process 0, None on the others, which do not call it; its InputError all raise."""
    result, mistake = None, ""
    if jax.process_index() == 0:
        try:
            result = function()
        except InputError as error:
            mistake = str(error)
    if jax.process_count() > 1:
        mistake = from_first(mistake)
    if mistake:
        raise InputError(mistake)
    return result


def from_first(text: str, size: int = 1024) -> str:
    """The `text` of process 0, up to `size` bytes of it."""
    sent = np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes().rstrip(b"\0").decode(errors="ignore")


def write_records(folder: Path, config: Config) -> None:
    """Writes config.json and versions.json; logs what differs from the config the run had so far."""
    if saved_steps(folder):
        _log_differences(folder / "config.json", config)
    packages = ("jaxrft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "math-verify")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes"
    with writing(folder):
        replace_file(folder / "config.json", configs.to_json(config) + "\n")
        replace_file(folder / "versions.json", json.dumps(versions | {"devices": devices}, indent=2) + "\n")


def _log_differences(path: Path, config: Config) -> None:
    """Logs the fields in which `config` differs from the one at `path`."""
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        logger.warning("what this run's config was so far is unknown, since %s cannot be read: it is rewritten", path)
        return
    for name, (now, before) in configs.differences(config, earlier).items():
        logger.warning("this run goes on with another %s: %s, it was %s", name, now, before)


def replace_file(path: Path, text: str) -> None:
    """Writes a file that is at no time there in part."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
