"""The folder of a run; saves and restores ONE pytree, `RunState`, by orbax: atomic, checked, the newest n."""

import errno
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from jax.experimental import multihost_utils

from jaxrft import config as configs
from jaxrft import lock
from jaxrft.config import Config
from jaxrft.files import UnreadableJSON, read_json, read_regular, remove, replace_file
from jaxrft.types import Array, Feedback, InputError

logger = logging.getLogger(__name__)

FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
REMEDY = "put that right, and the same command goes on from the newest checkpoint"
MILLION = 1_000_000
SUMS = "SHA256SUMS"
IDENTITY = "identity.json"
SAVING = ".saving"  # ends the name of a checkpoint that is being written
STEP = re.compile("0|[1-9][0-9]*")  # the only spelling of a step as the name of a folder
LAST = np.iinfo(np.int32).max  # the last step that a state can be of


class Tally(NamedTuple):
    """What metrics count over a whole run."""

    last_seen: Array  # [N] int32, the step that last rolled the task out, -1 = none
    tokens: Array  # [2] int32, sampled tokens: millions and rest, since int32 alone would overflow
    rollouts: Array  # [2] int32, likewise


def count(tally: Tally, feedback: Feedback, step: Array, num_generations: int) -> Tally:
    """The tally after a step that rolled out the tasks of `feedback` [B], each so many times; a task N is padding."""
    ids, tokens = feedback.ids, jnp.sum(feedback.tokens.astype(jnp.int32))
    return Tally(
        last_seen=tally.last_seen.at[ids].set(step, mode="drop"),
        tokens=_add(tally.tokens, tokens),
        rollouts=_add(tally.rollouts, jnp.sum(ids < tally.last_seen.shape[0], dtype=jnp.int32) * num_generations),
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

    A checkpoint is the folder <step>/ of `state/`, written by orbax, `identity.json`, and their `SHA256SUMS`, which
    `sha256sum --check` reads too. It gets its name when all of it is there, and counts while the sums are right.

    `identity` names what a state belongs to (model, tasks, selector): a checkpoint of anything else is
    refused. A state may be restored on another mesh or number of processes than it was saved on.
    """

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, Any]):
        """Of `folder`, which need not exist; `keep` newest checkpoints stay, what killed saves left is removed."""
        self.folder, self.keep = folder.absolute(), keep
        self.identity = json.loads(json.dumps(identity))
        self.newest: int | None = None  # the step last saved or restored
        self.orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        on_first(self._clear)

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        self.open = ExitStack()
        # Of several failed writes orbax raises one; asyncio logs the others, when they are collected.
        self.open.enter_context(_without_stacks(logging.getLogger("absl"), logging.getLogger("asyncio")))
        if jax.process_index() == 0:
            self.open.callback(self._clear)
        self.open.callback(self.orbax.close)
        return self

    def __exit__(self, *_: object) -> None:
        """Closes what is open."""
        self.open.close()

    def save(self, state: RunState) -> None:
        """Saves `state` under its step; raises InputError when the disk is full, and leaves what was there before."""
        step = int(state.step)
        path = self.folder / f"{step}{SAVING}"
        try:
            on_first(lambda: self._make_room(state))
            self._write(path / "state", state)
            on_first(lambda: self._commit(path, step))
        except InputError as error:
            _let_go(error)
            if jax.process_index() == 0:
                self._clear()
            left = "but there is none yet" if self.newest is None else f"which is of step {self.newest}"
            raise InputError(f"{error}, {left}") from error
        self.newest = step

    def restore(self, like: RunState) -> RunState | None:
        """The newest good state, with the shapes, dtypes and shardings of `like`, whose memory it takes.

        None, and `like` as it is, where no step has been saved. Logs which steps were passed over, and why. Raises
        InputError when none is good, or when the newest good one is of another model, other tasks or another selector.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        passed = []
        for step in json.loads(told(lambda: json.dumps(steps_in(self.folder)[::-1]))):
            state, flaw = None, told(lambda step=step: flaw_of(self.folder / f"{step}"))
            if not flaw:
                on_first(lambda step=step: self._check_identity(step))
                # Or a state that fits the devices once would have to fit twice.
                jax.tree.map(lambda x: x.is_deleted() or x.delete(), like)
                state, flaw = self._read(step, abstract)
            if state is not None:
                self.newest = step
                if passed and jax.process_index() == 0:
                    logger.warning("passing over %s in %s: going on from step %d", "; ".join(passed), self.folder, step)
                return state
            passed.append(f"the checkpoint of step {step} ({flaw})")
        if passed:
            raise InputError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(passed)}: bring one back from a copy, or "
                "choose another output_dir to start afresh"
            )
        return None

    def _write(self, path: Path, state: RunState) -> None:
        """Writes the state to a folder; raises InputError when the disk is full, whatever orbax makes of that."""
        try:
            with writing(self.folder):
                self.orbax.save(path, args=ocp.args.StandardSave(state))
        except InputError:
            raise
        except ValueError as error:  # tensorstore may tell of a file that it misses because it could not write it
            with writing(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size_of(state))
            raise InputError(f"cannot write to {self.folder} ({str(error)[:200]}): {REMEDY}") from error

    def _read(self, step: int, abstract: RunState) -> tuple[RunState | None, str]:
        """The state of a step, or why orbax does not read it."""
        try:
            return self.orbax.restore(self.folder / f"{step}/state", args=ocp.args.StandardRestore(abstract)), ""
        except jax.errors.JaxRuntimeError:  # such as too little memory: another checkpoint would do no better
            raise
        except Exception as error:  # whatever a library makes of bytes that are no checkpoint of its own
            return None, f"orbax cannot read it: {str(error).partition(chr(10))[0]}"

    def _check_identity(self, step: int) -> None:
        """Raises InputError when the checkpoint is of another run."""
        saved = read_json(self.folder / f"{step}" / IDENTITY, dict)  # `flaw_of` has read it before
        for name in self.identity | saved:
            here, there = self.identity.get(name), saved.get(name)
            if here != there:
                raise InputError(
                    f"the checkpoint in {self.folder} is of another run: its {name} is {_short(there)}, this run's is "
                    f"{_short(here)}; choose another output_dir, or the config it was made with"
                )

    def _commit(self, path: Path, step: int) -> None:
        """Makes what was written to `path` the checkpoint of `step`, and only then removes those that are to go.

        Those of later steps are among them: the run would have gone on from there, were they good.
        """
        with writing(self.folder):
            replace_file(path / IDENTITY, json.dumps(self.identity, indent=2) + "\n")
            lines = (f"{digest}  {name}\n" for name, digest in sorted(digests(path).items()))
            replace_file(path / SUMS, "".join(lines))
            place = self.folder / f"{step}"
            if os.path.lexists(place):
                place.rename(self.folder / f"{step}.old{SAVING}")
            path.rename(place)
            here = steps_in(self.folder)
            for each in set(here).difference([each for each in here if each <= step][-self.keep :]):
                with suppress(OSError):
                    remove(self.folder / f"{each}")
            self._clear()

    def _make_room(self, state: RunState) -> None:
        """Removes leftovers; raises InputError when the state of several processes does not fit on the disk.

        One of them must not fail alone in the midst of a save: the others would wait for it.
        """
        self._clear()
        if jax.process_count() > 1:
            check_room(self.folder, size_of(state))

    def _clear(self) -> None:
        """Removes what saves that came to nothing have left; a failed one may still write for a moment.

        A link under such a name goes, too: the next save would follow it.
        """
        for seconds in (0.1, 0.3, 1.0, 0.0):
            left = list(self.folder.glob(f"*{SAVING}*"))
            for path in left:
                with suppress(OSError):
                    remove(path)
            if not any(os.path.lexists(path) for path in left):
                return
            time.sleep(seconds)


def steps_in(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in the folder, be it good or not, in their order.

    A checkpoint is a folder, or a link to one, whose name is the number of a step in ASCII digits, as str writes it.
    """
    names = [path.name for path in folder.glob("*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(step for step in map(int, names) if step <= LAST)


def digests(folder: Path) -> dict[str, str]:
    """Path within `folder` -> SHA-256 of every file but the list of these; hidden ones are none of ours."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "." and path != folder / SUMS]

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock to others
        return dict(zip(names, threads.map(digest, paths), strict=True))


def flaw_of(folder: Path) -> str:
    """Returns why the checkpoint in `folder` cannot be used; an empty text for a good one."""
    try:
        lines = read_regular(folder / SUMS).decode().splitlines()
        listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = digests(folder)
    except FileNotFoundError:
        return f"it has no {SUMS}"
    except (OSError, UnicodeDecodeError) as error:
        return f"it cannot be read: {error}"
    if missing := sorted(listed.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if changed := sorted(name for name, digest in found.items() if listed.get(name) != digest):
        return f"{changed[0]} is not as {SUMS} says"
    if not listed:
        return f"{SUMS} is empty"
    try:
        read_json(folder / IDENTITY, dict)
    except FileNotFoundError:
        return f"it has no {IDENTITY}"
    except (OSError, UnreadableJSON) as error:
        return f"{IDENTITY} cannot be read: {error}"
    return ""


def _short(value: Any) -> str:
    """Returns a value as one short phrase."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {entry}" for key, entry in value.items())
    else:
        value = repr(value)
    return value if len(value) <= 300 else f"{value[:300]}..."


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises InputError for what the disk of `folder` refuses to take."""
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        # tensorstore and safetensors tell of a full disk in their text only.
        told = next((reason for reason in FULL if reason in str(error)), None)
        if reason := getattr(error, "strerror", None) or told:
            raise InputError(f"cannot write to {folder} ({reason}): {REMEDY}") from error
        raise


def size_of(state: Any) -> int:
    """Bytes of the arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(state))


def check_room(folder: Path, size: int) -> None:
    """Raises InputError when there are not `size` bytes left on the disk that `folder` is, or will be, on."""
    with writing(folder):
        if shutil.disk_usage(folder.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _without_stacks(*libraries: logging.Logger) -> Iterator[None]:
    """Keeps libraries from printing the stack of an error that they raise as well, or of what they drop for one."""

    def stackless(record: logging.LogRecord) -> bool:
        return not record.exc_info

    def note(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            before(event)

    for library in libraries:
        library.addFilter(stackless)
    before, sys.unraisablehook = sys.unraisablehook, note
    try:
        yield
    finally:
        gc.collect()  # what is dropped later is told of
        sys.unraisablehook = before
        for library in libraries:
            library.removeFilter(stackless)


def _let_go(error: BaseException | None) -> None:
    """Clears what the frames behind an error hold: of the writes that failed, asyncio tells when they are dropped."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def open_folder(config: Config) -> Iterator[Path]:
    """Yields the run's folder, made if need be, and keeps other runs out of it within the block.

    Process 0 decides and holds the lock, and all raise alike. Raises InputError when the folder cannot be written to,
    is not the same one for all processes, is in use, or holds a run that is not to be resumed or would be lost.
    """
    folder = Path(config.output_dir)
    if "://" in config.output_dir:
        raise InputError(
            f"output_dir {config.output_dir} is a URL, but runs are written to folders only: give the path under which "
            "that storage is mounted"
        )
    with ExitStack() as locked:
        with ExitStack() as stack:

            def make() -> str:
                try:
                    if folder.is_dir():  # first, or a run that is under way would be described as one that has ended
                        locked.enter_context(_lock(folder))
                    check_contents(folder, config.resume)
                    if not folder.is_dir():
                        folder.mkdir(parents=True)
                        locked.enter_context(_lock(folder))
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
        yield folder


def _lock(folder: Path) -> AbstractContextManager[None]:
    remedy = "wait for its end, or choose another output_dir"
    return lock.held(folder / ".lock", f"output_dir {folder}", remedy)


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
    """The steps that have a checkpoint in a run's folder, be it good or not."""
    return steps_in(folder / "checkpoints")


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


def told(function: Callable[[], str]) -> str:
    """What `function` returns on process 0, for all."""
    found = on_first(function)
    return found if jax.process_count() == 1 else from_first(found or "")


def from_first(text: str) -> str:
    """The `text` of process 0."""
    said = text.encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    size = max(1024, 1 << length.bit_length())  # few programs, each a shape
    sent = np.frombuffer(said[:size].ljust(size, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes()[:length].decode()


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
        earlier = read_json(path, dict)
    except (OSError, UnreadableJSON) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("what this run's config was so far is unknown: %s (%s) is rewritten", path, reason)
        return
    for name, (now, before) in configs.differences(config, earlier).items():
        logger.warning("this run goes on with another %s: %s, it was %s", name, now, before)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a .safetensors file that is at no time there in part; raises InputError when the disk is full."""
    with writing(path.parent):
        replace_file(path, safetensors.numpy.save(arrays))
