"""Reward functions of the end-to-end tests; workers import this file, so it imports nothing
heavy.
"""

import os
import signal
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

from jaxrft.rewards.functions import exact


def note(prompts, completions):
    """Adds a line for each completion to the file RECORD, if there is to be one."""
    if "RECORD" in os.environ:
        with open(os.environ["RECORD"], "a") as file:
            file.writelines(
                f"{prompt} {text}\n" for prompt, text in zip(prompts, completions, strict=True)
            )


def starts(prompts, completions, *, answer, **columns):
    """1 for a completion whose first character is one of the answer's.

    Notes what it was asked in the file RECORD; sends the signal SEND to the trainer, once, when the
    file LOG has LINES.
    """
    note(prompts, completions)
    if "SEND" in os.environ:
        log, sent = Path(os.environ["LOG"]), Path(os.environ["LOG"] + ".sent")
        if (
            log.exists()
            and len(log.read_text().splitlines()) >= int(os.environ["LINES"])
            and not sent.exists()
        ):
            sent.touch()
            os.kill(trainer(), signal.Signals[os.environ["SEND"]])
    return [
        float(text[:1] != "" and text[0] in first)
        for text, first in zip(completions, answer, strict=True)
    ]


def chatty(prompts, completions, *, answer, **columns):
    """As `starts`, but prints at length."""
    print("日", "x" * 10_000, flush=True)
    print("日", file=sys.stderr, flush=True)
    return starts(prompts, completions, answer=answer)


def unsure(prompts, completions, *, answer, **columns):
    """As `starts`, but with None where there is no answer."""
    scores = starts(prompts, completions, answer=[first or "" for first in answer])
    return [None if first is None else score for score, first in zip(scores, answer, strict=True)]


def trainer():
    """The process that has the pool: the parent of the subreaper, whose child a worker is."""
    return int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])


def letters(prompts, completions, **columns):
    """The share of a completion's characters that are letters."""
    return [
        sum(character.isalpha() for character in text) / max(1, len(text)) for text in completions
    ]


def spread(prompts, completions, **columns):
    """Another number in [0, 1] for nearly every completion."""
    return [sum(map(ord, text)) % 97 / 96 for text in completions]


def zero(prompts, completions, **columns):
    return [0.0] * len(completions)


def three(prompts, completions, **columns):
    return [3.0] * len(completions)


def broken(prompts, completions, **columns):
    raise RuntimeError("the grader is broken")


def counts_ids(completion_ids, trainer_state, **kwargs):
    """The number of sampled tokens, once the run's steps are counted."""
    return [
        float(len(ids)) + trainer_state.global_step / trainer_state.max_steps
        for ids in completion_ids
    ]


def needs_solution(completions, solution, **kwargs):
    return [1.0] * len(completions)


def troubles(prompts, completions, *, answer, **columns):
    """As `starts`, but hangs, dies, raises or answers twice for some completions."""
    first = completions[0][:1]
    if first == "1":
        time.sleep(1000)
    if first == "2":
        os._exit(3)
    if first == "3":
        raise RuntimeError("no threes")
    return starts(prompts, completions, answer=answer) * (2 if first == "4" else 1)


def unlucky(prompts, completions, *, answer, **columns):
    """As the built-in `exact`, but on one completion in a hundred it raises, or does, once, what
    MISHAP says.
    """
    if zlib.crc32(f"{prompts[0]}{completions[0]}".encode()) % 100:
        return exact(prompts, completions, answer=answer)
    mine = f"{os.environ['MISHAP']}.{os.getpid()}"
    with suppress(FileNotFoundError):
        os.rename(os.environ["MISHAP"], mine)  # which only one of several workers can
        match Path(mine).read_text():
            case "hang":
                time.sleep(1000)
            case "exit":
                os._exit(3)
            case "length":
                return [1.0, 1.0]
            case "print":
                print("[1.0]", flush=True)
    raise RuntimeError("an unlucky completion")


asked = [0]


def late(prompts, completions, **columns):
    """A success until one step of 32 completions is graded, then now and then more than that."""
    asked[0] += 1
    return [1.5 if asked[0] > 32 and asked[0] % 4 == 0 else float(asked[0] % 2)]


def later(prompts, completions, **columns):
    """Successes until an evaluation of 16 tasks and a step of 32 samples are graded, then
    nothing.
    """
    asked[0] += 1
    return [1.0 if asked[0] <= 48 else None]


def never(prompts, completions, **columns):
    """Applies to no completion."""
    return [None] * len(completions)


def halves(apply):
    """A reward as `starts` for the tasks `apply` holds of, by the number that their prompts begin
    with.
    """

    def reward(prompts, completions, *, answer, **columns):
        given = starts(prompts, completions, answer=answer)
        return [
            x if apply(int(p.split("+")[0])) else None for p, x in zip(prompts, given, strict=True)
        ]

    return reward


even, odd = halves(lambda number: number % 2 == 0), halves(lambda number: number % 2 == 1)
