"""How much a run is: rows, updates, tokens, evaluations, checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrft.config import Config
from jaxrft.learn.packing import Shape
from jaxrft.train.resume import saved_steps


def due(steps: int, every: int) -> int:
    """How often something happens that happens every so many steps and at the last one; 0 = never."""
    return -(-steps // every) if every else 0


def run(config: Config, num_tasks: int | None) -> list[tuple[str, str]]:
    """(what, how much) of the steps; passes over the tasks only where their number is known."""
    c = config
    rows, updates = c.batch_size * c.num_generations, c.num_iterations * (c.batch_size // c.tasks_per_update)
    sampled = (1 + c.dynamic_sampling) * rows * c.max_completion_length
    passes = "" if num_tasks is None else f", {c.steps * c.batch_size / num_tasks:.3g} times the tasks of the pool"
    return [
        ("steps", f"{c.steps:,}, each of {c.batch_size:,} tasks x {c.num_generations} = {rows:,} rollouts"),
        ("rollouts", f"{c.steps * rows:,}{passes}"),
        *refills(config),
        *probes(config),
        ("tokens", f"at most {sampled:,} sampled a step, {short(c.steps * sampled)} in all"),
        ("updates", f"{updates:,} a step, each of {c.tasks_per_update:,} tasks"),
    ]


def bins(shape: Shape) -> list[tuple[str, str]]:
    """(what, how much) of the bins that an update computes."""
    return [
        ("packed", f"completions and their prompts in bins of {shape.length:,} tokens, {shape.together:,} at a time")
    ]


def refills(config: Config) -> list[tuple[str, str]]:
    """(what, how much) of what is rolled out in place of groups that teach nothing, at most."""
    if not config.dynamic_sampling:
        return []
    rows = config.dynamic_sampling * config.batch_size * config.num_generations
    times = number(config.dynamic_sampling, "refill")
    return [("refills", f"at most {times} a step, of {rows:,} more rollouts, {config.steps * rows:,} in all")]


def probes(config: Config) -> list[tuple[str, str]]:
    """(what, how much) of what is rolled out beside the batches, in order to know."""
    if config.select.name != "dots":
        return []
    count, every = config.select.num_references, config.select.probe_every
    rows = count * config.num_generations
    total = due(config.steps, every) * rows
    saved = "their informative groups spare up to three quarters of a batch"
    return [("probes", f"{rows:,} more rollouts every {every} steps, {total:,} in all; {saved}")]


def evaluations(config: Config, num_tasks: Sequence[int | None]) -> list[tuple[str, str]]:
    """(what, how much) of the evaluations on sets of so many tasks, None = not known."""
    if not config.eval_steps or not num_tasks:
        return [("evaluations", "none")]
    times, samples = 1 + due(config.steps, config.eval_steps), 1 + config.evaluation.num_samples
    known = [count for count in num_tasks if count is not None]
    rollouts = f"{times * samples * sum(known):,} rollouts" if len(known) == len(num_tasks) else "sets not all here"
    return [("evaluations", f"{times}, with {samples} completions of every held-out task: {rollouts}")]


def checkpoints(config: Config, state: int, policy: int) -> list[tuple[str, str]]:
    """(what, how much) of what is written, for a state and a policy of so many bytes."""
    times = due(config.steps, config.save_steps)
    kept = min(times, config.keep_checkpoints)
    written = f"{times} of {size(state)} before compression, {kept} kept; the policy at the end, {size(policy)}"
    done = max(saved_steps(Path(config.output_dir)), default=None)
    there = (
        "new" if done is None else f"goes on after step {done}" if done < config.steps else f"is at step {done} already"
    )
    return [("checkpoints", written), ("folder", f"{config.output_dir}, {there}")]


def histogram(rates: np.ndarray) -> np.ndarray:
    """How many of the pass rates [N] are in each tenth of [0, 1], [10]; 1 is in the last one, NaN in none."""
    known = rates[np.isfinite(rates)]
    # A rate such as 0.3, a float32 below its tenth, belongs to the tenth that it is written as.
    return np.bincount(np.minimum((known * 10 + 1e-4).astype(int), 9), minlength=10)


def number(count: int, thing: str) -> str:
    """So many things: 1 device, 2 devices."""
    ending = "" if count == 1 else "es" if thing.endswith("ch") else "s"
    return f"{count:,} {thing}{ending}"


def short(value: float) -> str:
    """A large number in three figures and a letter: 1.57 M."""
    for unit, letter in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g} "


def size(count: int) -> str:
    """Bytes as people write them."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def seconds(value: float) -> str:
    """A duration in three figures: 0.00123, 12.3, 1,230."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
