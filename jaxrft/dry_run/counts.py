"""How much a run is: rows, updates, tokens, evaluations, checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrft.config import Config
from jaxrft.learn.packing import Shape
from jaxrft.lm.segments import CompiledRollout
from jaxrft.train.resume import saved_steps


def due(steps: int, every: int) -> int:
    """Counts the events that occur every `every` steps and at the last step; `every` 0 = never."""
    return -(-steps // every) if every else 0


def run(config: Config, num_tasks: int | None) -> list[tuple[str, str]]:
    """Describes the steps as pairs (what, how much).

    It counts the passes over the tasks only if `num_tasks` is known.
    """
    c = config
    rows = c.batch_size * c.num_generations
    sampled = (1 + c.dynamic_sampling) * rows * c.max_completion_length
    passes = (
        ""
        if num_tasks is None
        else (f", {c.steps * c.batch_size / num_tasks:.3g} times the tasks of the pool")
    )
    return [
        (
            "steps",
            f"{c.steps:,}, each of {c.batch_size:,} tasks x {c.num_generations} = "
            f"{rows:,} rollouts",
        ),
        ("rollouts", f"{c.steps * rows:,}{passes}"),
        *resampling(config),
        *reference_sets(config),
        ("tokens", f"at most {sampled:,} sampled a step, {short(c.steps * sampled)} in all"),
        ("updates", f"{c.updates_per_step:,} a step, each of {c.tasks_per_update:,} tasks"),
    ]


def decoding(generate: CompiledRollout, prompts: int) -> list[tuple[str, str]]:
    """Describes the programs that decode completions as pairs (what, how much)."""
    waiting = []
    if generate.waits(prompts):
        entering = number(generate.entering(prompts) * generate.shards, "prompt")
        waiting.append(("waiting", f"{entering} enter at once, when half of the rows have ended"))
    rows = ", ".join(f"{grid.rows * generate.shards:,}" for grid in generate.grids(prompts))
    slots = ", ".join(f"{length:,}" for length in generate.cache_lengths)
    programs = number(generate.num_programs(prompts), "program")
    return [
        ("decoding", f"{rows} rows with a cache of {slots} tokens: at most {programs}"),
        *waiting,
    ]


def bins(shapes: dict[int, Shape]) -> list[tuple[str, str]]:
    """Describes the bins that an update computes as pairs (what, how much)."""
    kinds = ", ".join(
        f"up to {longest:,} tokens in bins of {shape.length:,}, {shape.bins_per_round:,} at a time"
        for longest, shape in shapes.items()
    )
    return [("packed", f"completions of {kinds}")]


def resampling(config: Config) -> list[tuple[str, str]]:
    """Describes the rounds of resampling as pairs (what, how much), none without
    `dynamic_sampling`.

    A round rolls out new groups in place of uninformative ones. The numbers are upper bounds.
    """
    if not config.dynamic_sampling:
        return []
    rows = config.dynamic_sampling * config.batch_size * config.num_generations
    rounds = number(config.dynamic_sampling, "round")
    return [
        (
            "resampling",
            f"at most {rounds} a step, of {rows:,} more rollouts, {config.steps * rows:,} in all",
        )
    ]


def reference_sets(config: Config) -> list[tuple[str, str]]:
    """Describes the reference sets of the selector "dots" as pairs (what, how much).

    Other selectors have none. Their tasks are rolled out next to the batches, and the pass rates of
    all others are predicted from theirs.
    """
    if config.select.name != "dots":
        return []
    count = config.select.num_references
    every = config.select.reference_every
    rows = count * config.num_generations
    total = due(config.steps, every) * rows
    reuse = "their informative groups fill up to three quarters of a batch"
    said = f"{rows:,} more rollouts every {every} steps, {total:,} in all; {reuse}"
    return [("reference sets", said)]


def evaluations(config: Config, num_tasks: Sequence[int | None]) -> list[tuple[str, str]]:
    """Describes the evaluations as pairs (what, how much).

    `num_tasks` are the sizes of the held-out sets, None = not known.
    """
    if not config.eval_steps or not num_tasks:
        return [("evaluations", "none")]
    times = 1 + due(config.steps, config.eval_steps)
    samples = [1 + config.samples_of(tasks) for tasks in config.evaluation.tasks]
    known = [
        count * each for count, each in zip(num_tasks, samples, strict=True) if count is not None
    ]
    rollouts = (
        (f"{times * sum(known):,} rollouts")
        if len(known) == len(num_tasks)
        else "some sets are missing"
    )
    each = " or ".join(map(str, dict.fromkeys(samples)))
    return [("evaluations", f"{times}, with {each} completions of every held-out task: {rollouts}")]


def checkpoints(config: Config, state: int, policy: int) -> list[tuple[str, str]]:
    """Describes what is written as pairs (what, how much).

    `state` and `policy` are the bytes of a checkpoint and of the policy that is saved at the end.
    """
    times = due(config.steps, config.save_steps)
    num_kept = min(times, config.keep_checkpoints)
    written = (
        f"{times} of {size(state)} before compression, {num_kept} kept; the policy at the "
        f"end, {size(policy)}"
    )
    done = max(saved_steps(Path(config.output_dir)), default=None)
    progress = (
        "new"
        if done is None
        else f"resumes after step {done}"
        if done < config.steps
        else f"is at step {done} already"
    )
    return [("checkpoints", written), ("folder", f"{config.output_dir}, {progress}")]


def histogram(rates: np.ndarray) -> np.ndarray:
    """Counts the pass rates [N] in each tenth of [0, 1]. [10].

    A rate of 1 is in the last tenth, NaN in none.
    """
    known = rates[np.isfinite(rates)]
    # A rate such as 0.3, a float32 below its tenth, belongs to the tenth that it is written as.
    return np.bincount(np.minimum((known * 10 + 1e-4).astype(int), 9), minlength=10)


def number(count: int, thing: str) -> str:
    """Formats a number of things: 1 device, 2 devices."""
    ending = "" if count == 1 else "es" if thing.endswith("ch") else "s"
    return f"{count:,} {thing}{ending}"


def short(value: float, unit: str = "") -> str:
    """Formats a large number in three figures and a letter before its unit: 1.57 M."""
    for scale, letter in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if value >= scale:
            return f"{value / scale:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def size(count: int) -> str:
    """Formats a number of bytes in a binary unit: 1.50 GiB."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def seconds(value: float) -> str:
    """Formats a duration in three figures: 0.00123, 12.3, 1,230."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
