"""The folder of a run: its lock, its records, and checks before it is resumed."""

import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrft import config as configs
from jaxrft.config import Config
from jaxrft.host import crash, lock
from jaxrft.host.checkpoint import check_identity, read_identity, steps_in
from jaxrft.host.disk import writing
from jaxrft.host.files import UnreadableJSON, read_json, replace_file, short_digest
from jaxrft.host.multihost import broadcast_from_host0, broadcast_text, on_host0
from jaxrft.lm.model import Params
from jaxrft.lm.policy import fingerprint
from jaxrft.select.dots.predictor import predictor_digest
from jaxrft.tasks import table
from jaxrft.tasks.table import TaskTable
from jaxrft.train.setup import Setup
from jaxrft.types import InputError

logger = logging.getLogger(__name__)


def run_identity(setup: Setup, tasks: TaskTable, params: Params) -> dict[str, Any]:
    """Collects what must be the same when a run is resumed: model, tasks, and fixed fields of the
    config.

    `params` are those of the model as it was loaded. See `config.resume_rule` for the fields.
    """
    rates = tasks.reference_pass_rates
    identity = {f"model's {name}": value for name, value in setup.lm.config._asdict().items()}
    # with LoRA the base weights are not in the checkpoint
    if lora := setup.lm.config.lora:
        identity |= {"model's lora": lora._asdict(), "model's dtype": setup.config.dtype}
    identity["digest of the model's parameters"] = fingerprint(params, setup.mesh)
    if setup.predictor is not None:
        identity["digest of the predictor"] = predictor_digest(setup.predictor)
        identity["tasks of a reference set"] = setup.config.select.num_references
    return identity | {
        **table.identity(tasks),
        "digest of the domains": short_digest(
            tasks.domain.tobytes() + json.dumps(tasks.domains).encode()
        ),
        "digest of the reference pass rates": None
        if rates is None
        else short_digest(rates.tobytes()),
        "digest of the embeddings": digest_of_embeddings(setup.config, tasks),
        **fixed_fields(setup.config),
    }


def fixed_fields(config: Config) -> dict[str, Any]:
    """Returns {dotted field: value} of the fields that a resumed run may not change."""
    rules = ("fixed", "fixed with replay") if config.replay.capacity else ("fixed",)
    fields = configs.flat(json.loads(configs.to_json(config)))
    return {name: value for name, value in fields.items() if configs.resume_rule(name) in rules}


def digest_of_embeddings(config: Config, tasks: TaskTable) -> str | None:
    """Computes the digest of the embeddings, or of the policy that computes them.

    Embeddings by the policy depend on the mesh by rounding, so that their values have no digest.
    """
    if tasks.embeddings is None:
        return None
    if any(each.embeddings is not None for each in config.task_sets):
        return short_digest(tasks.embeddings.tobytes())
    return (tasks.embedded_by or {})["digest of the model's parameters"]


@contextmanager
def open_folder(config: Config) -> Iterator[Path]:
    """Creates and locks the run's folder, and yields its path.

    Process 0 decides and holds the lock; all processes raise the same error. Raises InputError when
    the folder cannot be written to, is not the same one for all processes, is in use, or holds a
    run that is not to be resumed or would be lost. After an InputError, also of the block, folders
    that were created here and are empty are removed.
    """
    folder = Path(config.output_dir)
    if "://" in config.output_dir:
        raise InputError(
            f"output_dir {config.output_dir} is a URL, but runs are written to folders only: "
            "give the path where that storage is mounted"
        )
    created: list[Path] = []
    with _removed_if_refused(created), ExitStack() as locked:
        with ExitStack() as stack:

            def make_test_file() -> str:
                try:
                    # The lock is first, so that an active run is not reported as one that ended.
                    if folder.is_dir():
                        locked.enter_context(_lock(folder))
                    check_contents(folder, config.resume)
                    if not folder.is_dir():
                        created.extend(
                            each for each in (folder, *folder.parents) if not each.exists()
                        )
                        folder.mkdir(parents=True)
                        locked.enter_context(_lock(folder))
                    return stack.enter_context(
                        tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-")
                    ).name
                except OSError as error:
                    raise InputError(
                        f"cannot write to output_dir {folder} ({error.strerror}): choose "
                        "another folder"
                    ) from error

            test_file = Path(on_host0(make_test_file) or "").name
            exists = (folder / broadcast_text(test_file)).exists()
            is_shared = exists and os.access(folder, os.W_OK)
            # otherwise the first save would wait forever
            if not np.all(multihost_utils.process_allgather(np.array(is_shared))):
                raise InputError(
                    f"not every host finds in output_dir {folder} what process 0 writes there: "
                    "output_dir must be on storage that all hosts share and may write to"
                )
        yield folder


@contextmanager
def _removed_if_refused(folders: list[Path]) -> Iterator[None]:
    """Removes the folders, the deepest first, when the block raises InputError and they are
    empty.
    """
    try:
        yield
    except InputError:
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()
        raise


def _lock(folder: Path) -> AbstractContextManager[None]:
    remedy = "wait until it ends, or choose another output_dir"
    return lock.held(folder / ".lock", f"output_dir {folder}", remedy)


def check_contents(folder: Path, resume: str) -> None:
    """Raises InputError when `folder` holds a run that a new one would overwrite."""
    saved = saved_steps(folder)
    begun = (folder / "config.json").exists() or (folder / "metrics.jsonl").exists()
    if (folder / "policy").exists() and not saved:
        raise InputError(
            f"{folder} holds a trained policy but no checkpoints to resume from: choose another "
            f"output_dir, or move {folder / 'policy'} away to start a new run"
        )
    if resume == "never" and (saved or begun):
        raise InputError(
            f"{folder} holds a run already: choose another output_dir, or "
            "resume it with resume=auto"
        )
    if begun and not saved:
        logger.warning("the run in %s ended before its first checkpoint: it starts anew", folder)


def check_settings(config: Config) -> None:
    """Raises InputError when the newest checkpoint in `output_dir` is of a run with other fixed
    fields of the config.

    One that cannot be read counts as none: resuming tells why.
    """
    steps = saved_steps(Path(config.output_dir))
    if not steps:
        return
    folder = Path(config.output_dir).absolute() / "checkpoints"
    with suppress(OSError, UnreadableJSON):
        check_identity(folder, read_identity(folder, steps[-1]), fixed_fields(config))


def saved_steps(folder: Path) -> list[int]:
    """Lists the steps whose checkpoints are in a run's folder, without checking that they load."""
    return steps_in(folder / "checkpoints")


def write_records(
    folder: Path, config: Config, *, num_tasks: int, held_out: Mapping[str, int]
) -> None:
    """Writes config.json and versions.json; logs the fields in which a resumed run differs.

    `num_tasks` are in the table, and `held_out` in each set that is evaluated on.
    """
    if saved_steps(folder):
        _log_differences(folder / "config.json", config)
    packages = ("jaxrft", *crash.PACKAGES, "math-verify")
    versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
    devices = (
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes"
    )
    facts = {"devices": devices, "training tasks": num_tasks, "held-out tasks": dict(held_out)}
    with writing(folder):
        replace_file(folder / "config.json", configs.to_json(config) + "\n")
        replace_file(folder / "versions.json", json.dumps(versions | facts, indent=2) + "\n")


def _log_differences(path: Path, config: Config) -> None:
    """Logs the fields in which `config` differs from the one at `path`."""
    try:
        earlier = read_json(path, dict)
    except (OSError, UnreadableJSON) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning(
            "the earlier config of this run is unknown: %s (%s) is overwritten", path, reason
        )
        return
    for name, (now, before) in configs.differences(config, earlier).items():
        logger.warning("this run resumes with %s %s, it was %s", name, now, before)


def with_template_date(config: Config, begun: Callable[[], str | None] = lambda: None) -> Config:
    """Sets the date that chat templates see, the same on every process.

    It is that of the config, else the one that `begun` returns, else that of the run in
    `output_dir`, else today's. So the prompts of a run are the same when it is resumed later.
    """
    if config.chat_template_date is not None:
        return config
    date = broadcast_from_host0(lambda: begun() or template_date_of_run(Path(config.output_dir)))
    return dataclasses.replace(config, chat_template_date=date)


def template_date_of_run(folder: Path) -> str:
    """Returns the date in the records of the run that has begun in a folder, or today's."""
    today = datetime.date.today().isoformat()
    if not saved_steps(folder):
        return today
    try:
        recorded = read_json(folder / "config.json", dict).get("chat_template_date")
        return datetime.date.fromisoformat(recorded or today).isoformat()
    except (OSError, ValueError, TypeError) as error:
        logger.warning(
            "the first day of the run in %s is unknown (%s): chat templates get today's date; set "
            "chat_template_date if the tasks differ from those of the run",
            folder,
            error,
        )
        return today
