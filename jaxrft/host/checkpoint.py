"""Saves and restores a pytree by orbax: atomically, with checksums, and keeps the newest n."""

import gc
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrft.host.disk import RESUME_REMEDY, check_room, writing
from jaxrft.host.files import JSON, UnreadableJSON, read_json, read_regular, remove, replace_file
from jaxrft.host.multihost import broadcast_from_host0, on_host0
from jaxrft.types import Array, InputError, PyTree

logger = logging.getLogger(__name__)


SUMS = "SHA256SUMS"
IDENTITY = "identity.json"
FORMAT = 2  # of the state; written to IDENTITY. Format 1 wrote none
LAST_OF_FORMAT_1 = "0.1.0"  # the last version of this package that reads it
SAVING = ".saving"  # ends the name of a checkpoint that is being written
STEP = re.compile("0|[1-9][0-9]*")  # the only spelling of a step as the name of a folder
LAST = np.iinfo(np.int32).max  # the last step that a state can be of


class State(Protocol):
    """A pytree of arrays, with the number of steps done among them."""

    @property
    def step(self) -> Array:
        """Returns the steps done, a scalar."""
        ...


S = TypeVar("S", bound=State)


class Checkpoints:
    """The checkpoints of a run's folder; use it as a context manager.

    A checkpoint is the folder <step>/ of `state/`, written by orbax, `identity.json`, and their
    `SHA256SUMS`, which `sha256sum --check` reads too. It gets its name when all of it is there, and
    counts while the sums are right.

    `identity` names what a state belongs to (model, tasks, selector): a checkpoint of anything else
    is refused. A state may be restored on another mesh or number of processes than it was saved on.
    """

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, JSON]):
        """Opens `folder`, which need not exist, and removes leftovers of killed saves.

        Each save keeps the `keep` newest checkpoints.
        """
        self.folder = folder.absolute()
        self.keep = keep
        self.identity = json.loads(json.dumps(identity))
        self.newest: int | None = None  # the step last saved or restored
        self.orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        on_host0(self._clear)

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        self.open = ExitStack()
        # Of several failed writes orbax raises one; asyncio logs the others, when they are
        # collected.
        self.open.enter_context(
            _without_stacks(logging.getLogger("absl"), logging.getLogger("asyncio"))
        )
        if jax.process_index() == 0:
            self.open.callback(self._clear)
        self.open.callback(self.orbax.close)
        return self

    def __exit__(self, *_: object) -> None:
        """Closes what is open."""
        self.open.close()

    def save(self, state: State) -> None:
        """Saves `state` under its step; raises InputError when the disk is full, and leaves what
        was there before.
        """
        step = int(state.step)
        path = self.folder / f"{step}{SAVING}"
        try:
            on_host0(lambda: self._make_room(state))
            self._write(path / "state", state)
            on_host0(lambda: self._commit(path, step))
        except InputError as error:
            _drop_objects(error)
            if jax.process_index() == 0:
                self._clear()
            newest = (
                "but there is none yet"
                if self.newest is None
                else (f"which is of step {self.newest}")
            )
            raise InputError(f"{error}, {newest}") from error
        self.newest = step

    def restore(self, like: S) -> S | None:
        """Restores the newest good state, with the shapes, dtypes and shardings of `like`.

        It takes the memory of `like`. Returns None, and leaves `like` as it is, where no step has
        been saved. Logs which steps were skipped, and why. Raises InputError when none is good,
        or when the newest good one is of another model, other tasks or another selector.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        skipped = []
        for step in json.loads(
            broadcast_from_host0(lambda: json.dumps(steps_in(self.folder)[::-1]))
        ):
            state = None
            flaw = broadcast_from_host0(lambda step=step: flaw_of(self.folder / f"{step}"))
            if not flaw:
                on_host0(lambda step=step: self._check_identity(step))
                # Or a state that fits the devices once would have to fit twice.
                jax.tree.map(lambda x: x.is_deleted() or x.delete(), like)
                state, flaw = self._read(step, abstract)
            if state is not None:
                self.newest = step
                if skipped and jax.process_index() == 0:
                    logger.warning(
                        "skipping %s in %s: resuming from step %d",
                        "; ".join(skipped),
                        self.folder,
                        step,
                    )
                return state
            skipped.append(f"the checkpoint of step {step} ({flaw})")
        if skipped:
            raise InputError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(skipped)}: bring one "
                "back from a copy, or choose another output_dir to start afresh"
            )
        return None

    def _write(self, path: Path, state: State) -> None:
        """Writes the state to a folder; raises InputError when the disk is full, whatever orbax
        makes of that.
        """
        try:
            with writing(self.folder):
                self.orbax.save(path, args=ocp.args.StandardSave(state))
        except InputError:
            raise
        # tensorstore may report a missing file, which it could not write
        except ValueError as error:
            with writing(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size_of(state))
            raise InputError(
                f"cannot write to {self.folder} ({str(error)[:200]}): {RESUME_REMEDY}"
            ) from error

    def _read(self, step: int, abstract: S) -> tuple[S | None, str]:
        """Reads the state of a step; returns it and "", or None and why orbax does not read it."""
        try:
            return self.orbax.restore(
                self.folder / f"{step}/state", args=ocp.args.StandardRestore(abstract)
            ), ""
        # such as too little memory: another checkpoint would do no better
        except jax.errors.JaxRuntimeError:
            raise
        # whatever a library makes of bytes that are no checkpoint of its own
        except Exception as error:
            _drop_objects(error)
            return None, f"orbax cannot read it: {str(error).partition(chr(10))[0]}"

    def _check_identity(self, step: int) -> None:
        """Raises InputError when the checkpoint is of another run."""
        saved = read_identity(self.folder, step)  # `flaw_of` has read it before
        others = {name: None for name in saved if name not in self.identity}
        check_identity(self.folder, saved, self.identity | others)

    def _commit(self, path: Path, step: int) -> None:
        """Renames `path` to the checkpoint of `step`, and then removes older ones but for `keep`.

        Those of later steps are removed too: they are damaged, or the run would have resumed there.
        """
        with writing(self.folder):
            replace_file(
                path / IDENTITY, json.dumps({"format": FORMAT} | self.identity, indent=2) + "\n"
            )
            lines = (f"{digest}  {name}\n" for name, digest in sorted(digests(path).items()))
            replace_file(path / SUMS, "".join(lines))
            target = self.folder / f"{step}"
            if os.path.lexists(target):
                target.rename(self.folder / f"{step}.old{SAVING}")
            path.rename(target)
            steps = steps_in(self.folder)
            kept = [each for each in steps if each <= step][-self.keep :]
            for each in set(steps).difference(kept):
                with suppress(OSError):
                    remove(self.folder / f"{each}")
            self._clear()

    def _make_room(self, state: State) -> None:
        """Removes leftovers; raises InputError when the state of several processes does not fit on
        the disk.

        One of them must not fail alone in the midst of a save: the others would wait for it.
        """
        self._clear()
        if jax.process_count() > 1:
            check_room(self.folder, size_of(state))

    def _clear(self) -> None:
        """Removes leftovers of failed and killed saves.

        It tries several times, since a failed save may still write for a moment. A link under such
        a name is removed too: the next save would follow it.
        """
        for seconds in (0.1, 0.3, 1.0, 0.0):
            leftovers = list(self.folder.glob(f"*{SAVING}*"))
            for path in leftovers:
                with suppress(OSError):
                    remove(path)
            if not any(os.path.lexists(path) for path in leftovers):
                return
            time.sleep(seconds)


def find_checkpoint(folder: Path, step: int | None) -> int:
    """Finds the checkpoint of a step, or the newest good one for None; returns its step.

    Raises InputError when there is none, or it is damaged. Logs which newer ones were skipped.
    """
    steps = steps_in(folder)
    if not steps:
        raise InputError(f"there is no checkpoint in {folder}: give the output_dir of a run")
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise InputError(f"there is no checkpoint of step {step} in {folder}: it has {known}")
        if flaw := flaw_of(folder / f"{step}"):
            raise InputError(
                f"the checkpoint of step {step} in {folder} is damaged ({flaw}): choose another"
            )
        return step
    for newest in reversed(steps):
        flaw = flaw_of(folder / f"{newest}")
        if not flaw:
            return newest
        logger.warning("skipping the checkpoint of step %d in %s: %s", newest, folder, flaw)
    raise InputError(f"no checkpoint in {folder} can be used: bring one back from a copy")


def read_identity(folder: Path, step: int) -> dict[str, JSON]:
    """Reads what the checkpoint of a step belongs to; raises InputError for another format."""
    saved = read_json(folder / f"{step}" / IDENTITY, dict)
    if (written := saved.pop("format", 1)) != FORMAT:
        version = (
            f"jaxrft {LAST_OF_FORMAT_1}" if written == 1 else "the version of jaxrft that made them"
        )
        raise InputError(
            f"the checkpoints in {folder} have format {_short(written)}, this version reads "
            f"format {FORMAT}: finish the run with {version}, or choose another output_dir"
        )
    return saved


def check_identity(folder: Path, saved: dict[str, JSON], wanted: dict[str, JSON]) -> None:
    """Raises InputError when `saved`, of a checkpoint in `folder`, lacks or contradicts what is
    `wanted`.
    """
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise InputError(
                f"the checkpoint in {folder} is of another run: its {name} is "
                f"{_short(saved.get(name))}, this run's is {_short(value)}; choose another "
                "output_dir, or the config it was made with"
            )


def read_params(folder: Path, step: int, like: dict[str, jax.ShapeDtypeStruct]) -> PyTree:
    """Reads the trained parameters of a checkpoint, and nothing else of its state.

    They get the shapes, dtypes and shardings of `like`. Raises InputError when others were saved.
    """
    item = {"params": like}
    restore = ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    with _without_stacks(logging.getLogger("absl")):
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            params = checkpointer.restore(folder.absolute() / f"{step}/state", args=restore)
        # such as too little memory
        except jax.errors.JaxRuntimeError:
            raise
        # whatever a library makes of bytes that are no checkpoint of its own
        except Exception as error:
            _drop_objects(error)
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"the checkpoint of step {step} in {folder} cannot be read ({reason}): choose "
                "another"
            ) from error
        finally:
            checkpointer.close()
    return params["params"]


def steps_in(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in the folder, good or not, in ascending order.

    A checkpoint is a folder, or a link to one, whose name is the number of a step in ASCII digits,
    as str writes it.
    """
    names = [path.name for path in folder.glob("*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(step for step in map(int, names) if step <= LAST)


def digests(folder: Path) -> dict[str, str]:
    """Computes the SHA-256 of every file within `folder`, by its path there.

    The list of these sums is left out, and so are hidden files, which are not of the checkpoint.
    """
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name[0] != "." and path != folder / SUMS
    ]

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
        actual = digests(folder)
    except FileNotFoundError:
        return f"it has no {SUMS}"
    except (OSError, UnicodeDecodeError) as error:
        return f"it cannot be read: {error}"
    if missing := sorted(listed.keys() - actual.keys()):
        return f"{missing[0]} is missing"
    if changed := sorted(name for name, digest in actual.items() if listed.get(name) != digest):
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


def _short(value: object) -> str:
    """Returns a value as one short phrase."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {entry}" for key, entry in value.items())
    else:
        value = repr(value)
    return value if len(value) <= 300 else f"{value[:300]}..."


def size_of(state: PyTree) -> int:
    """Computes the bytes of arrays, all shards together, or of their descriptions."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@contextmanager
def _without_stacks(*libraries: logging.Logger) -> Iterator[None]:
    """Keeps libraries from printing the stack trace of an error that they also raise, or of objects
    that they drop because of one.
    """

    def stackless(record: logging.LogRecord) -> bool:
        return not record.exc_info

    def ignore_closed_loop(event: "sys.UnraisableHookArgs") -> None:
        if str(event.exc_value) != "Event loop is closed":
            before(event)

    for library in libraries:
        library.addFilter(stackless)
    before = sys.unraisablehook
    sys.unraisablehook = ignore_closed_loop
    try:
        yield
    finally:
        sys.unraisablehook = before
        for library in libraries:
            library.removeFilter(stackless)


def _drop_objects(error: BaseException) -> None:
    """Drops what only the frames of an error hold, and what is left in cycles: asyncio reports
    writes that failed when they are dropped.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()
