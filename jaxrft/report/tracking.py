"""Sends the metrics of a run to trackers, under the names that they have in metrics.jsonl."""

import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import jax

from jaxrft import config as configs
from jaxrft.config import Config
from jaxrft.host import crash
from jaxrft.host.files import JSON, UnreadableJSON, read_json, replace_file
from jaxrft.host.installation import install_command
from jaxrft.host.multihost import on_host0
from jaxrft.types import InputError

logger = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "jaxrft"  # in which wandb and trackio show the runs, unless the environment names another
WAITING = 1000  # entries that a tracker may be behind
PATIENCE = 60.0  # seconds that a tracker has at the end to take them


class Tracker(Protocol):
    """Shows the metrics of one run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""
        ...

    def close(self, step: int, error: str) -> None:
        """Ends the run after `step`; `error` is the sentence of a failed run, else ''."""
        ...


Item = Callable[[Tracker], None]  # what a tracker is told


class TensorBoard:
    """Writes an event file, in the folder `tensorboard` of the run.

    Events are written at once, since tensorboardX's own SummaryWriter waits forever for its thread
    after the disk was full.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Opens a file, and hides what earlier files have of the steps after `start`."""
        self.summary = import_module("tensorboardX.summary")
        self.protocol = import_module("tensorboardX.proto.event_pb2")
        (folder / "tensorboard").mkdir(exist_ok=True)
        self.writer = import_module("tensorboardX.event_file_writer").EventsWriter(
            str(folder / "tensorboard" / "events"), filename_suffix=f".{start + 1:08}"
        )
        restart = self.protocol.SessionLog(status=self.protocol.SessionLog.START)
        self._write(start + 1, session_log=restart)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a scalar for each metric."""
        # not by `summary.scalar`, which changes names such as avg@8
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._write(step, summary={"value": values})
        self.writer.flush()

    def close(self, step: int, error: str) -> None:
        """Writes the sentence of a failed run as a text `error`, and closes the file."""
        if error:
            self._write(step, summary=self.summary.text("error", error))
        self.writer.close()

    def _write(self, step: int, **content: object) -> None:
        event = self.protocol.Event(wall_time=time.time(), step=step, **content)
        self.writer.write_event(event)


class Wandb:
    """Continues or begins a run of Weights & Biases, whose files are in the run's folder.

    wandb itself drops the steps of a resumed run that it has.
    """

    def __init__(self, folder: Path, config: dict[str, JSON], run_id: str) -> None:
        """Opens the run `run_id`; WANDB_PROJECT and WANDB_MODE=offline do what wandb says."""
        wandb = import_module("wandb")
        offline = os.environ.get("WANDB_MODE") == "offline"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=folder.absolute().name,
            dir=folder,
            config=config,
            resume=None if offline else "allow",  # an upload joins the parts of one id
            settings=wandb.Settings(console="off", silent=True),
        )
        logger.info("wandb tracks this run: %s", self.run.dir if self.run.offline else self.run.url)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row to the history."""
        self.run.log(dict(metrics), step=step)

    def close(self, step: int, error: str) -> None:
        """Finishes the run; one that has failed has the sentence as `error` in its summary."""
        self.run.summary["error"] = error
        self.run.finish(exit_code=1 if error else 0)


class Trackio:
    """Continues or begins a run of trackio.

    Of the steps that a resumed run repeats, it leaves out those that trackio has: unlike
    TensorBoard and wandb, trackio would show them twice.
    """

    def __init__(self, folder: Path, config: dict[str, JSON], run_id: str, start: int) -> None:
        """Opens the run whose name ends in `run_id`, since trackio knows runs by their names."""
        self.trackio = import_module("trackio")
        self.run = self.trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{folder.absolute().name}-{run_id}",
            config=config,
            resume="allow",
        )
        self.repeated = range(start + 1, getattr(self.run, "_next_step", 0))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row, unless the run has it."""
        if step not in self.repeated:
            self.run.log(dict(metrics), step=step)

    def close(self, step: int, error: str) -> None:
        """Finishes the run, after an alert with the sentence if it has failed."""
        if error:
            level = self.trackio.AlertLevel.ERROR
            self.run.alert("the run failed", text=error, level=level)
        self.run.finish()


class Thread:
    """Tells a tracker what it is given, in a thread, so that the run never waits for it.

    A tracker that fails is told further entries, but the first failure alone is a warning.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        """Starts the thread, which opens the tracker."""
        self.name = name
        self.open_tracker = open_tracker
        self.items: queue.Queue[Item | None] = queue.Queue(WAITING)
        self.failed = False
        self.thread = threading.Thread(target=self._run, name=f"track-{name}", daemon=True)
        self.thread.start()

    def tell(self, item: Item) -> None:
        """Hands over an item, unless too many wait."""
        try:
            self.items.put_nowait(item)
        except queue.Full:
            self._warn(f"it is {WAITING} entries behind")

    def close(self, step: int, error: str, patience: float) -> None:
        """Waits until the tracker has taken all and has closed, `patience` seconds at most."""
        if not self.thread.is_alive():
            return
        deadline = time.monotonic() + patience
        with suppress(queue.Full):
            self.items.put(lambda tracker: tracker.close(step, error), timeout=patience)
            self.items.put(None, timeout=max(0.0, deadline - time.monotonic()))
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self._warn(f"it has not taken all within {patience:g} s")

    def _run(self) -> None:
        try:
            tracker = self.open_tracker()
        except Exception as error:  # whatever another package may raise
            self._warn(crash.first_line(error))
            return
        while (item := self.items.get()) is not None:
            try:
                item(tracker)
            except Exception as error:
                self._warn(crash.first_line(error))

    def _warn(self, reason: str) -> None:
        """Warns of the first failure."""
        if not self.failed:
            logger.warning(
                "%s does not get all metrics, and the run goes on: %s", self.name, reason
            )
        self.failed = True


class Tracking:
    """The trackers of a run, `config.report_to`; a context manager.

    Only the first process tracks. The ids of the tracked runs are in `tracking.json` of the run's
    folder, so that a resumed run continues them.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        """Opens nothing yet; raises InputError if the package of a tracker is not installed."""
        on_host0(lambda: check_packages(config.report_to))
        self.config = config
        self.folder = folder
        self.threads: dict[str, Thread] = {}
        self.step = 0

    def open(self, start: int) -> None:
        """Opens the trackers of a run that resumes from step `start`, -1 = afresh."""
        if not self.config.report_to or jax.process_index() != 0:
            return
        self.step = max(start, 0)
        ids = tracked_ids(self.folder) if start >= 0 else {}
        ids = {name: ids.get(name) or secrets.token_hex(4) for name in self.config.report_to}
        config = json.loads(configs.to_json(self.config))
        open_tracker: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(self.folder, start),
            "wandb": lambda: Wandb(self.folder, config, ids["wandb"]),
            "trackio": lambda: Trackio(self.folder, config, ids["trackio"], start),
        }
        try:
            replace_file(self.folder / "tracking.json", json.dumps(ids, indent=2) + "\n")
        except OSError as error:
            logger.warning(
                "a resumed run will be tracked as another one, since tracking.json cannot be "
                "written (%s)",
                error.strerror,
            )
        self.threads = {name: Thread(name, open_tracker[name]) for name in ids}

    def log(self, step: int, entry: Mapping[str, JSON]) -> None:
        """Hands the numbers of an entry of metrics.jsonl to the trackers."""
        self.step = max(self.step, step)
        numbers = {
            name: value
            for name, value in entry.items()
            if isinstance(value, int | float) and name != "step"
        }
        for thread in self.threads.values():
            thread.tell(lambda tracker: tracker.log(step, numbers))

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the trackers, with the sentence of an error that ends the run."""
        interrupted = error is not None and not isinstance(error, Exception)  # by a second Ctrl-C
        for thread in self.threads.values():
            thread.close(self.step, sentence(error), 1.0 if interrupted else PATIENCE)


def check_packages(names: tuple[str, ...]) -> None:
    """Raises InputError if the package of a tracker is not installed."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"report_to names {name}, but the package {PACKAGES[name]} is not installed: "
                f"{install_command(name)}, or leave it out of report_to"
            )


def tracked_ids(folder: Path) -> dict[str, str]:
    """Reads {tracker: id} of the tracked runs of a folder, {} if there are none."""
    try:
        ids = read_json(folder / "tracking.json", dict)
    except FileNotFoundError:
        return {}
    except (OSError, UnreadableJSON) as error:
        logger.warning("the run is tracked as another one: tracking.json is unknown (%s)", error)
        return {}
    return {name: value for name, value in ids.items() if isinstance(value, str)}


def sentence(error: BaseException | None) -> str:
    """Returns what a failed run says of its error; '' for none."""
    if error is None:
        return ""
    if isinstance(error, InputError):
        return str(error)
    known = crash.no_bug(error) if isinstance(error, Exception) else None
    return known or crash.first_line(error)
