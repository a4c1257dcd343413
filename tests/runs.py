"""A run as a process that can be watched, its checkpoints, and what is not the same at the ends of
two runs.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import orbax.checkpoint as ocp

from jaxrft.rewards import pool
from jaxrft.train.resume import saved_steps
from tests import helpers

MARK = "FAULTS_IN"  # in the environment of all processes of a run
RESUMED = re.compile(
    r"resuming after step \d+ of|ended before its first checkpoint: it starts "
    r"afresh"
)
TORN = ".torn"  # a file in checkpoints that have been damaged
PATIENCE = 300.0  # seconds for whatever a process may take


class Trainer:
    """A process that trains, what it has said and how far it has come."""

    startup = 60.0  # seconds to the first step, of the quickest so far

    def __init__(self, scratch: Path, folder: Path, config: str):
        self.metrics, self.output, self.errors = (
            folder / "metrics.jsonl",
            scratch / "output",
            scratch / "errors",
        )
        steps = saved_steps(folder)
        self.resumes = self.metrics.exists() or bool(steps)
        self.torn = [
            step for step in steps[-1:] if (folder / f"checkpoints/{step}" / TORN).exists()
        ]
        self.began, cache = (
            time.time(),
            os.environ.get("JAX_COMPILATION_CACHE_DIR", scratch / "compiled"),
        )
        with self.output.open("w") as output, self.errors.open("w") as errors:
            where = {
                "stdout": output,
                "stderr": errors,
                "MISHAP": scratch / "mishap",
                MARK: scratch,
            }
            where |= {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
            }
            self.process = helpers.start("-m", "jaxrft", "train", config, devices=1, **where)

    def said(self) -> str:
        return self.output.read_text() + self.errors.read_text()

    def sentences(self) -> list[str]:
        """What it said of itself, but for rewards that graders lost."""
        lines = [line for line in self.said().splitlines() if "rewards lost to" not in line]
        return [
            line
            for line in lines
            if RESUMED.search(line) or line.startswith(("jaxrft: ", "stopped"))
        ]

    def step(self) -> int:
        """The last step that this process has written of."""
        if not self.metrics.exists() or self.metrics.stat().st_mtime < self.began:
            return 0
        steps = re.findall(r'^\{"step": (\d+),.*"reward": ', self.metrics.read_text(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def wait(self, condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
        """Whether the condition comes true while the process lives, within so many seconds."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            if condition():
                return True
            time.sleep(0.01)
        return False

    def comes_to(self, step: int, part: float) -> bool:
        """Waits for a part of 0.3 s after a step, 0 = of the time to the first; whether the process
        lives then.
        """
        seconds = 0.3 * part
        if step == 0:
            self.wait(lambda: self.step() > 0, self.began + part * Trainer.startup - time.time())
            seconds = 0.0
        elif self.wait(lambda: self.step() > 0):
            Trainer.startup = min(Trainer.startup, time.time() - self.began)
            self.wait(lambda: self.step() >= step)
        self.wait(lambda: False, seconds)
        return self.process.poll() is None

    def hears(self, words: re.Pattern[str], start: int = 0) -> str:
        """What it says, from a place in its errors on, that fits; nothing if it ends or takes too
        long.
        """
        self.wait(lambda: words.search(self.errors.read_text(), start))
        found = words.search(self.errors.read_text(), start)
        return found[0] if found else ""


def processes(scratch: Path) -> list[int]:
    """The living processes of the run in `scratch`."""
    mark, found = f"{MARK}={scratch}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (path / "environ").read_bytes():
                found.append(int(path.name))
    return sorted(found)


def tear(folder: Path, chance: random.Random) -> str:
    """Damages a file of the newest checkpoint, if there is an older one to go on from; says how."""
    steps = saved_steps(folder)
    if len(steps) < 2:
        return ", and no checkpoint that can be spared"
    newest = folder / f"checkpoints/{steps[-1]}"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    path, how = chance.choice(files), chance.choice(("cut", "changed", "deleted"))
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    path.unlink()
    if how == "changed":
        data[place] ^= 1 << chance.randrange(8)
    if how != "deleted":
        path.write_bytes(data if how == "changed" else data[:place])
    (newest / TORN).touch()
    return f", {path.relative_to(folder)} {how}"


def differences(folder: Path, other: Path) -> Iterator[str]:
    """What is not the same at the ends of two runs."""
    here, there = metrics(folder), metrics(other)
    if here != there:
        yield (
            "metrics of steps "
            f"{[line['step'] for line in there if line not in here] or 'that stand there twice'}"
        )
    try:
        helpers.assert_same_bits(last_state(folder), last_state(other))
    except AssertionError as error:
        yield f"state {str(error).splitlines()[0]}"
    policy, wanted = (
        {path.name: path.read_bytes() for path in (x / "policy").iterdir()} for x in (folder, other)
    )
    yield from (
        f"policy/{name}" for name in policy | wanted if policy.get(name) != wanted.get(name)
    )
    yield from (
        f"{path.name}, which is left"
        for path in folder.iterdir()
        if not (other / path.name).exists()
    )


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl but for times; rewards lost to whatever kind of failure are
    counted together.
    """
    lines = helpers.metrics(folder)
    for line in lines:
        line["lost"] = sum(line.pop(f"rewards/{kind}", 0) for kind in pool.KINDS)
    return lines


def last_state(folder: Path) -> dict:
    """All arrays of the newest checkpoint."""
    newest = folder / f"checkpoints/{saved_steps(folder)[-1]}"
    with ocp.StandardCheckpointer() as orbax:
        return orbax.restore(newest.absolute() / "state")
