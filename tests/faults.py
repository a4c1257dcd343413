"""Breaks runs of the quickstart at random moments, and compares how they end with the end of an
undisturbed one.

    python -m tests.faults --seconds 600
    python -m tests.faults --seconds 900 --kinds kill --faults 25 --per-run 25 --steps 160

A run is the command line in processes of its own, started again as often as it takes. Its last
state, metrics.jsonl but for times, and the exported policy must be the undisturbed run's, bit for
bit; every stop must have its exit code and a sentence, none a stack trace, and no process may be
left behind. The kinds of faults:

    kill, term, hup                   that signal, at any time from the start of Python to the export of the policy
    stop                              SIGTERM to every process of the run, as schedulers send it to a whole job
    tear                              kill; then a file of the newest checkpoint is cut, changed in one bit, or deleted
    full                              the disk is full until the run has said so
    hang, exit, raise, length, print  what the grader does on the next of some completions that get no reward

The disk is a small file system in a mount namespace of the command's own where that is allowed,
otherwise a limit on the size of files. With graders' faults the undisturbed run loses the same
rewards, by `raise`.
"""  # noqa: E501

import dataclasses
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import tyro

from jaxrft import config as configs
from jaxrft.config import EvalConfig, ReplayConfig, TasksConfig
from tests import helpers
from tests.runs import MARK, PATIENCE, RESUMED, Trainer, differences, processes, tear

Kind = Literal[
    "kill", "term", "hup", "stop", "tear", "full", "hang", "exit", "raise", "length", "print"
]
ASKING = {"term": signal.SIGTERM, "hup": signal.SIGHUP, "stop": signal.SIGTERM}
SIGNALS = {"kill": signal.SIGKILL, "tear": signal.SIGKILL} | ASKING
LOSSES = {
    "hang": "timeout",
    "exit": "crash",
    "raise": "error",
    "length": "wrong_length",
    "print": "error",
}
CODES = {"kill": -9, "tear": -9, "term": 143, "hup": 143, "stop": 143, "full": 2}  # or 0
STOPPED = re.compile(r"stopped by (a signal|SIG[A-Z]+)")
FULL = re.compile(r".*(No space left on device|File too large).*")
UNSAVED = re.compile(r".*is not saved, and the run goes on: .*")
QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.py"
DISK = 24 << 20  # bytes
LEFT = 300_000  # bytes that a full disk has left at most, less than a checkpoint
LEAVE = 10.0  # seconds from the end of a step in which a run is gone that was asked to end


@dataclasses.dataclass(frozen=True)
class Options:
    """What to break."""

    seconds: float
    """When they are over, no fault strikes any more; the run that is under way is brought to its
    end.
    """
    seed: int = 0
    """What strikes when derives from it, as far as processes take equally long."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """What may strike."""
    faults: int = 1_000_000
    """How many strike at most."""
    per_run: int = 8
    """How many strike a run."""
    steps: int = 40
    """Of a run."""
    save_steps: int = 4
    """From a checkpoint to the next."""
    eval_steps: int = 16
    """From an evaluation to the next; 0 = none."""


class Fault(NamedTuple):
    """Strikes after a step of the process, 0 = before the first, and a part of 0.3 s, or of the
    time until then.
    """

    kind: Kind
    step: int
    part: float

    def __str__(self) -> str:
        return (
            f"{self.kind:6} {f'after step {self.step}' if self.step else 'while it starts'} "
            f"+ {self.part:.2f}"
        )


def draw(chance: random.Random, options: Options) -> list[Fault]:
    """The faults of one run in their order."""
    steps = sorted(chance.choices(range(1, options.steps + 1), k=options.per_run))
    return [
        Fault(chance.choice(options.kinds), step * (chance.random() > 0.25), chance.random())
        for step in steps
    ]


class Stage:
    """Where runs are broken: a folder with a disk, and what has been seen."""

    def __init__(self, options: Options, scratch: Path, mounted: bool):
        self.options, self.scratch, self.mounted = options, scratch, mounted
        self.disk, self.whole, self.mishap = (
            scratch / "disk",
            scratch / "undisturbed/run",  # of the same name: the model card has it
            scratch / "mishap",
        )
        self.chance, self.until = random.Random(options.seed), time.monotonic() + options.seconds
        self.struck: list[tuple[Fault, str]] = []
        self.wrong: list[str] = []
        self.starts = self.runs = 0

    @property
    def open(self) -> bool:
        """Whether more is to be broken."""
        return time.monotonic() < self.until and len(self.struck) < self.options.faults

    def start(self, folder: Path) -> Trainer:
        """A process of the quickstart, shortened, with replay, more checkpoints and, if wanted, a
        grader that fails.
        """
        held_out = EvalConfig(
            (TasksConfig("builtin:digits-test", limit=32),), num_samples=2, batch_size=32
        )
        config = dataclasses.replace(
            configs.load(str(QUICKSTART)),
            output_dir=str(folder),
            steps=self.options.steps,
            save_steps=self.options.save_steps,
            eval_steps=self.options.eval_steps,
            evaluation=held_out,
            replay=ReplayConfig(capacity=64),
            rewards=("graders:unlucky" if set(LOSSES) & set(self.options.kinds) else "exact",),
            reward_timeout=5.0,
        )
        self.starts += 1
        return Trainer(
            self.scratch, folder, helpers.write_config(self.scratch / "config.py", config)
        )

    def undisturbed(self) -> None:
        """A run that nobody disturbs, to compare the others with."""
        trainer = self.start(self.whole)
        trainer.comes_to(self.options.steps, 0)
        self.finish(trainer, None)

    def broken(self, faults: list[Fault]) -> None:
        """A run, started again until it has come to its end or is complained of; its faults strike
        who lives then.
        """
        left, code, known, folder = deque(faults), None, len(self.wrong), self.disk / "run"
        while code != 0 and len(self.wrong) == known:
            trainer, fault = self.start(folder), None
            while left and self.open and trainer.comes_to(left[0].step, left[0].part):
                fault = left.popleft()
                if outcome := self.strike(trainer, fault, folder):
                    self.struck.append((fault, outcome.replace(f"{self.disk}/", "")))
                    print(f"{fault}: {self.struck[-1][1]}", flush=True)
            code = self.finish(trainer, fault)
        found = list(differences(folder, self.whole)) if code == 0 else []
        end = (
            f"differs in {'; '.join(found)}"
            if found
            else ("as the undisturbed one")
            if code == 0
            else "is given up"
        )
        print(f"run {self.runs} ends: {end}", flush=True)
        self.wrong += found
        self.runs += 1
        shutil.rmtree(folder)

    def strike(self, trainer: Trainer, fault: Fault, folder: Path) -> str:
        """What comes of a fault; nothing when it is too late for it to come to anything."""
        if fault.kind in SIGNALS:
            return self.end(trainer, fault) + (
                tear(folder, self.chance) if fault.kind == "tear" else ""
            )
        before = len(trainer.errors.read_text())
        if fault.kind == "full":
            self.fill(trainer)
            said = trainer.hears(self.chance.choice((FULL, UNSAVED)), before) or trainer.hears(
                FULL, before
            )
            self.fill(trainer, full=False)
        else:
            (self.scratch / "next").write_text(fault.kind)
            (self.scratch / "next").rename(self.mishap)
            begun = trainer.wait(lambda: not self.mishap.exists())
            words = (
                r"^\[1.0\]$"
                if fault.kind == "print"
                else (
                    r"^.*rewards lost to "
                    rf"{LOSSES[fault.kind]}.*$"
                )
            )
            said = trainer.hears(re.compile(words, re.MULTILINE), before) if begun else ""
            self.mishap.unlink(missing_ok=True)
        if not said and trainer.process.poll() is None:
            self.complain(f"{fault}: nothing was said of it", trainer)
        return said

    def end(self, trainer: Trainer, fault: Fault) -> str:
        """Sends the signal of a fault, and says what the process makes of it."""
        for process in processes(self.scratch) if fault.kind == "stop" else [trainer.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, SIGNALS[fault.kind])
        asked = time.time()
        with suppress(subprocess.TimeoutExpired):
            trainer.process.wait(PATIENCE)
        written = trainer.metrics.stat().st_mtime if trainer.metrics.exists() else asked
        if (seconds := time.time() - max(asked, written)) > LEAVE:
            self.complain(f"{fault}: it took {seconds:.1f} s to leave", trainer)
        return f"exit {trainer.process.returncode}"

    def fill(self, trainer: Trainer, *, full: bool = True) -> None:
        """Leaves next to nothing of the disk, or all of it."""
        left, ballast = self.chance.randrange(LEFT), self.disk / "ballast"
        if not self.mounted:
            with suppress(ProcessLookupError):
                hard = resource.prlimit(trainer.process.pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(
                    trainer.process.pid, resource.RLIMIT_FSIZE, (left if full else hard, hard)
                )
        elif full:
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
            os.truncate(ballast, max(0, ballast.stat().st_size - left))
        else:
            ballast.unlink()

    def finish(self, trainer: Trainer, fault: Fault | None) -> int | None:
        """The exit code of a process that may end now; complains of what is wrong with that, or
        with what it said.
        """
        with suppress(subprocess.TimeoutExpired):
            trainer.process.wait(PATIENCE)
        code = trainer.process.poll()
        for flaw in self.flaws(trainer, code, fault):
            self.complain(f"{fault or 'left alone'}: {flaw}", trainer)
        for sentence in trainer.sentences():
            print(f"    {sentence.replace(f'{self.disk}/', '')}", flush=True)
        trainer.process.kill()
        return code

    def flaws(self, trainer: Trainer, code: int | None, fault: Fault | None) -> Iterator[str]:
        """What is wrong with the end of a process after, perhaps, a fault, and with what it
        said.
        """
        said, resumed = trainer.said(), RESUMED.findall(trainer.said())
        expected = {0, CODES.get(fault.kind, 0) if fault else 0}
        number = ASKING.get(fault.kind, 0) if fault else 0
        early = code == 128 + number and "with nothing to save" in said
        # Before jaxrft has begun, or after all is done, the signal is the kernel's.
        outside = code == -number and (not said or "the trained policy is in" in said)
        if code not in expected and not (number and (early or outside)):
            yield "it hangs" if code is None else f"exit {code}"
        if "Traceback" in said:
            yield "it shows a stack trace"
        lines = trainer.errors.read_text().splitlines()
        if noise := [line for line in lines if line and not line.startswith(("jaxrft: ", "[1.0]"))]:
            yield f"it says what is no sentence: {noise[0]}"
        if len(resumed) > 1 or (trainer.step() > 0 and trainer.resumes != bool(resumed)):
            yield f"it says {len(resumed)} times from where it goes on"
        if resumed and not all(f"the checkpoint of step {step} (" in said for step in trainer.torn):
            yield f"it does not say that the checkpoints of steps {trainer.torn} are damaged"
        if code == CODES["full"] and said.count("jaxrft: error: ") != 1:
            yield "it does not say why it ends"
        if number and code in (CODES["term"], 128 + number) and len(STOPPED.findall(said)) != 1:
            yield "it does not say that it was stopped"
        until = time.monotonic() + LEAVE
        while processes(self.scratch) and time.monotonic() < until:
            time.sleep(0.1)
        if left := processes(self.scratch):
            yield f"processes {left} are left"

    def complain(self, about: str, trainer: Trainer) -> None:
        """Notes what is wrong."""
        self.wrong.append(about)
        print(f"WRONG: {about}\n{trainer.said()}", flush=True)


def table(stage: Stage) -> str:
    """How many faults of each kind struck, and an example of what came of it."""
    rows = ["| fault | struck | for example |", "|---|---|---|"]
    for kind in dict.fromkeys(stage.options.kinds):
        outcomes = [outcome for fault, outcome in stage.struck if fault.kind == kind]
        rows.append(f"| {kind} | {len(outcomes)} | {outcomes[-1] if outcomes else ''} |")
    return "\n".join(rows)


def own_mounts() -> bool:
    """Goes on in a mount namespace of its own; whether it is in one, as it is not allowed
    everywhere.
    """
    if MARK in os.environ:
        return True
    command = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    with suppress(FileNotFoundError):
        trial = subprocess.run(
            [*command, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()], capture_output=True
        )
        if trial.returncode == 0:
            again = [*command, sys.executable, "-m", "tests.faults", *sys.argv[1:]]
            os.execvpe(command[0], again, os.environ | {MARK: ""})
    return False


def main() -> int:
    """1 if anything was wrong."""
    options = tyro.cli(Options, description=__doc__)
    mounted, began = own_mounts(), time.monotonic()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        stage = Stage(options, scratch, mounted)
        stage.disk.mkdir()
        if mounted:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", stage.disk], check=True
            )
            stack.callback(subprocess.run, ["umount", stage.disk])
        print(
            "the disk is",
            "a small file system" if mounted else "a limit on the size of files",
            flush=True,
        )
        stage.undisturbed()
        while stage.open and not stage.wrong:
            stage.broken(draw(stage.chance, options))
    print(table(stage))
    print(
        f"{len(stage.struck)} faults, {stage.runs} runs, {stage.starts} processes, "
        f"{time.monotonic() - began:.0f} s"
    )
    print("\n".join(["WRONG:", *stage.wrong]) if stage.wrong else "nothing was wrong")
    return 1 if stage.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
