"""Measures `adaptive` in worlds that it was not tuned for.

Item response models, whose domains move in different ways, and students in hostile worlds: next to
`uniform`, and to `bots` with its references, all with the same seeds. Two versions of a selector
are compared by running this at two commits with the same seeds.
"""

import argparse
import contextlib
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _script
from benchmarks._script import whole_number
from jaxrft import simulate
from jaxrft.select import adaptive, selectors
from jaxrft.simulate.command import believing
from jaxrft.simulate.trials import run, scores
from jaxrft.simulate.worlds import SCHEDULES
from jaxrft.stats import mean_interval
from jaxrft.types import Array, Feedback, Tasks

STEPS = 200
TASKS = 249
BATCH = 16
GENERATIONS = 16
WIDTH = 32  # of the embeddings
REFERENCES = (0.10, 0.95)  # quantiles of the population of policies
FIGURES = ("effective_group_ratio", "mse", "coverage")
APART = ("up", "still", "down", "jump")


class Kind(NamedTuple):
    """A population of tasks, a population of policies, and how a policy moves through it."""

    schedule: tuple[str, ...]  # of each domain
    begin: float  # quantile of the policies
    end: float
    difficulty: float  # mean, in logits
    spread: float  # standard deviation of the difficulties
    ability: float  # standard deviation of the policies' abilities
    bimodal: bool = False  # half of the tasks are easy, half are hard


KINDS = {
    "improves": Kind(("up",), 0.15, 0.85, 0.0, 2.5, 1.5),
    "improves, hard": Kind(("up",), 0.05, 0.85, 1.5, 2.5, 1.5),
    "apart": Kind(APART, 0.10, 0.90, 0.5, 2.5, 1.5),
    "apart, hard": Kind(APART, 0.05, 0.80, 2.5, 3.0, 2.0),
    "apart, two kinds": Kind(APART, 0.05, 0.85, 1.5, 2.8, 2.0, bimodal=True),
    "all jump": Kind(("jump",), 0.15, 0.85, 1.0, 2.5, 1.5),
}
KNOWN = ("nothing", "domains", "domains and embeddings")  # to the selector, about the tasks
HOSTILE = {
    "useless embeddings": {"signal": 0.0, "references": "none"},
    "references anti-correlated": {"signal": 0.0, "references": "anti"},
    "references constant": {"signal": 0.0, "references": "constant"},
    "references 0": {"signal": 0.0, "references": "zero"},
    "rewards of noise": {"signal": 0.0, "rewards": "noise"},
    "a policy that gets worse": {"signal": 0.0, "forgetting": 0.03},
    "easy tasks, a policy that gets worse": {"signal": 0.0, "forgetting": 0.03, "difficulty": -1.0},
}


# Parts of `adaptive` -> the options and the names of its module that leave each out.
ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unchanged": ({}, {}),
    "no change points": ({}, {"CHANGE_POINT": np.inf}),
    "walk is not estimated": (
        {},
        {"_walk": lambda state, *_: (state.log_walk, state.walk_information)},
    ),
    "shared information does not decay": ({}, {"DECAY": 0.0}),
    "no exploration": ({}, {"MOST_EXPLORATION": 0.0}),
    "epsilon = 0": ({"epsilon": 0.0}, {}),
    "kappa = 0": ({"kappa": 0.0}, {}),
    "no tolerance": ({}, {"TOLERANCE": 0.0}),
    "new tasks are not preferred": ({}, {"NEW_TOLERANCE": 0.0}),
}


class Items(NamedTuple):
    """The parameters of the tasks."""

    difficulty: Array  # [N]
    slope: Array  # [N], discrimination
    domain: Array  # [N] int32


def item_response(kind: Kind, known: str) -> simulate.World:
    """Returns a world in which p = sigmoid(slope (ability of the domain - difficulty)); new tasks
    for every key.

    The two-parameter logistic model (Birnbaum 1968). Slopes are log-normal with a deviation of 0.3.
    `known`: the columns of the tasks that a selector has, one of KNOWN.
    """

    def ability(quantile: Array) -> Array:
        return kind.ability * jax.scipy.special.ndtri(quantile)

    def init(key: Array) -> tuple[Tasks, Items]:
        keys = jax.random.split(key, 5)
        raw = jax.random.normal(keys[0], (TASKS,))
        if kind.bimodal:
            raw = jax.random.rademacher(keys[1], (TASKS,), jnp.float32) + 0.4 * raw
        items = Items(
            difficulty=kind.difficulty + kind.spread * raw,
            slope=jnp.exp(0.3 * jax.random.normal(keys[2], (TASKS,))),
            domain=jnp.arange(TASKS, dtype=jnp.int32) % len(kind.schedule),
        )
        references = ability(jnp.array(REFERENCES))[None]
        rates = jax.nn.sigmoid(items.slope[:, None] * (references - items.difficulty[:, None]))
        one_hot = jax.nn.one_hot(items.domain, len(kind.schedule))
        features = jnp.concatenate([raw[:, None], one_hot], axis=1)
        mixed = features @ jax.random.normal(keys[3], (features.shape[1], WIDTH))
        embeddings = mixed + 2 * jax.random.normal(keys[4], mixed.shape)
        tasks = Tasks(
            reference_pass_rates=rates,
            embeddings=embeddings if known.endswith("embeddings") else None,
            domain=items.domain if known.startswith("domains") else None,
        )
        return tasks, items

    def pass_rates(items: Items, step: Array) -> Array:
        progress = jnp.asarray(step, jnp.float32) / (STEPS - 1)
        quantile = jnp.stack([SCHEDULES[name](progress) for name in kind.schedule])
        abilities = ability(kind.begin + (kind.end - kind.begin) * quantile)
        return jax.nn.sigmoid(items.slope * (abilities[items.domain] - items.difficulty))

    def roll_out(key: Array, items: Items, step: Array, ids: Array) -> Feedback:
        draws = jax.random.uniform(key, (*ids.shape, GENERATIONS))
        solved = draws < pass_rates(items, step)[ids][:, None]
        trials = jnp.full(ids.shape, GENERATIONS, jnp.float32)
        return Feedback(ids, solved.sum(axis=1).astype(jnp.float32), trials, trials)

    def learn(key: Array, items: Items, feedback: Feedback) -> Items:
        return items

    return simulate.World(TASKS, init, pass_rates, roll_out, learn)


def item_responses(names: tuple[str, ...], seeds: int, first_seed: int) -> None:
    """Prints effective group ratio, squared error and coverage of each selector in each kind of
    world.
    """
    bots = selectors.bots(GENERATIONS)
    uniform = believing(selectors.uniform(GENERATIONS), bots)
    rows = {"uniform": (uniform, KNOWN[:1]), "bots": (bots, KNOWN[:1])}
    rows = {name: row for name, row in rows.items() if name in names}
    rows |= {name: (selectors.make(name, GENERATIONS), KNOWN) for name in names if name not in rows}
    for name, kind in KINDS.items():
        for selector, (functions, variants) in rows.items():
            for known in variants:
                world = item_response(kind, known)
                trace = run(world, functions, seeds, STEPS, batch_size=BATCH, first_seed=first_seed)
                values = scores(trace, TASKS)
                figures = "".join(f"  {key} {interval(values[key])}" for key in FIGURES)
                print(f"{name:17} {selector:9} knows {known:23}{figures}", flush=True)


def ablations(seeds: int, first_seed: int) -> None:
    """Prints the figures of `adaptive` without each of its parts: means over all kinds of
    worlds.
    """
    for part, (options, changed) in ABLATIONS.items():
        for known in (KNOWN[0], KNOWN[-1]):
            with mock.patch.multiple(adaptive, **changed) if changed else contextlib.nullcontext():
                selector = selectors.adaptive(GENERATIONS, **options)
                values = []
                for kind in KINDS.values():
                    world = item_response(kind, known)
                    trace = run(
                        world, selector, seeds, STEPS, batch_size=BATCH, first_seed=first_seed
                    )
                    values.append(scores(trace, TASKS))
            means = {key: np.mean([each[key] for each in values], axis=0) for key in FIGURES}
            figures = "".join(f"  {key} {interval(mean)}" for key, mean in means.items())
            print(f"{part:34} knows {known:23}{figures}", flush=True)


def hostile(names: tuple[str, ...], seeds: int, first_seed: int) -> None:
    """Prints the difference in final ability to `uniform`, paired by seed, with its 95 %
    interval.
    """

    def ability(world: simulate.World, selector: str) -> np.ndarray:
        functions = selectors.make(selector, GENERATIONS)
        trace = run(world, functions, seeds, STEPS, batch_size=BATCH, first_seed=first_seed)
        return np.asarray(trace.ability[:, -1])

    for name, changes in HOSTILE.items():
        world = simulate.students(simulate.StudentConfig(**changes), num_generations=GENERATIONS)
        base = ability(world, "uniform")
        for selector in names:
            if selector == "uniform" or (
                selector == "bots" and changes.get("references") == "none"
            ):
                continue
            mean, low, high = mean_interval(ability(world, selector) - base)
            print(f"{name:38} {selector:9} {mean:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)


def interval(values: np.ndarray) -> str:
    """Returns the mean of the values [seeds] and half the width of its 95 % interval."""
    mean, low, high = mean_interval(values)
    return f"{mean:.4f} ± {(high - low) / 2:.4f}"


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive", description=__doc__)
    for flag, default, said in (
        ("seeds", 8, "worlds of each kind"),
        ("paired", 32, "students of each kind"),
    ):
        parser.add_argument(
            f"--{flag}",
            type=whole_number(flag, 0, 1_000_000),
            default=default,
            help=f"{said}; 0 = none",
        )
    parser.add_argument("--first-seed", type=whole_number("first-seed", 0, 1_000_000), default=0)
    parser.add_argument(
        "--selectors",
        nargs="+",
        default=("uniform", "bots", "adaptive"),
        choices=("uniform", "bots", "adaptive"),
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="leaves out the parts of adaptive, one by one, instead",
    )
    options = parser.parse_args(arguments)
    names = tuple(options.selectors)
    if options.ablate:
        ablations(options.seeds, options.first_seed)
        return
    if options.seeds:
        item_responses(names, options.seeds, options.first_seed)
    if options.paired:
        hostile(names, options.paired, options.first_seed)


if __name__ == "__main__":
    _script.run(main)
