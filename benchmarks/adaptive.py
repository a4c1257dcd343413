"""How `adaptive` fares where nothing was chosen for it.

Response matrices drawn from item-response models, replayed as policies whose domains move in different ways (which task
belongs to which is not told), and students in hostile worlds, against `uniform` with the same seeds.
"""

import argparse

import numpy as np

from benchmarks import _script
from jaxrft import simulate
from jaxrft.fields import whole_number
from jaxrft.select import selectors
from jaxrft.simulate.command import believing
from jaxrft.simulate.trials import run, scores
from jaxrft.stats import mean_interval

STEPS, TASKS, POLICIES = 200, 249, 2000
APART = ("up", "still", "down", "jump")
MATRICES = {  # schedules, quantiles at begin and end, mean and spread of difficulty, spread of ability
    "improves": (("up",), 0.15, 0.85, 0.0, 2.5, 1.5),
    "improves, hard": (("up",), 0.05, 0.85, 1.5, 2.5, 1.5),
    "apart": (APART, 0.10, 0.90, 0.5, 2.5, 1.5),
    "apart, hard": (APART, 0.05, 0.80, 2.5, 3.0, 2.0),
    "apart, two kinds": (APART, 0.05, 0.85, 1.5, 2.8, 2.0),
    "all jump": (("jump",), 0.15, 0.85, 1.0, 2.5, 1.5),
}
HOSTILE = {
    "useless embeddings": {"signal": 0.0, "references": "none"},
    "references anti-correlated": {"signal": 0.0, "references": "anti"},
    "references constant": {"signal": 0.0, "references": "constant"},
    "references 0": {"signal": 0.0, "references": "zero"},
    "rewards of noise": {"signal": 0.0, "rewards": "noise"},
    "a policy that gets worse": {"signal": 0.0, "forgetting": 0.03},
    "easy tasks, a policy that gets worse": {"signal": 0.0, "forgetting": 0.03, "difficulty": -1.0},
}


def matrix(seed: int, difficulty: float, spread: float, ability: float, *, two_kinds: bool = False) -> np.ndarray:
    """Answers [P, N] of policies to tasks: sigmoid(a (ability - difficulty)), a log-normal; rows sorted by ability."""
    rng = np.random.default_rng(seed)
    raw = (
        np.where(rng.random(TASKS) < 0.5, -1, 1) + 0.4 * rng.normal(size=TASKS) if two_kinds else rng.normal(size=TASKS)
    )
    slope = np.exp(0.3 * rng.normal(size=TASKS))
    theta = np.sort(ability * rng.normal(size=POLICIES))[:, None]
    chance = 1 / (1 + np.exp(-slope * (theta - difficulty - spread * raw)))
    return (rng.random(chance.shape) < chance).astype(np.int8)


def matrices(seeds: int) -> None:
    """Prints effective group ratio, squared error and coverage of each selector on each kind of matrix."""
    bots = selectors.bots(16)
    chosen = {
        "uniform": believing(selectors.uniform(16), bots),
        "bots": bots,
        "adaptive": selectors.adaptive(16),
    }
    for name, (schedule, begin, end, *shape) in MATRICES.items():
        for selector, functions in chosen.items():
            found = []
            for seed in range(seeds):
                data = simulate.Responses(matrix(seed, *shape, two_kinds=name.endswith("kinds")))
                world = simulate.replay(data, steps=STEPS, num_generations=16, schedule=schedule, begin=begin, end=end)
                found.append(scores(run(world, functions, 1, STEPS, batch_size=16), TASKS))
            mean = {
                key: np.mean([each[key][0] for each in found]) for key in ("effective_group_ratio", "mse", "coverage")
            }
            print(f"{name:22} {selector:9}" + "".join(f" {key} {value:.3f}" for key, value in mean.items()), flush=True)


def hostile(seeds: int) -> None:
    """Prints the difference in final ability to `uniform`, paired by seed, with its 95 % interval."""
    for name, changes in HOSTILE.items():
        world = simulate.students(simulate.StudentConfig(**changes), num_generations=16)
        names = ["adaptive"] if changes.get("references") == "none" else ["bots", "adaptive"]
        base = run(world, selectors.uniform(16), seeds, STEPS, batch_size=16).ability[:, -1]
        for selector in names:
            trace = run(world, selectors.make(selector, 16), seeds, STEPS, batch_size=16)
            gain = np.asarray(trace.ability[:, -1] - base)
            mean, low, high = mean_interval(gain)
            print(f"{name:38} {selector:9} {mean:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive", description=__doc__)
    parser.add_argument(
        "--seeds", type=whole_number("seeds", 0, 1_000_000), default=8, help="matrices of each kind; 0 = none"
    )
    parser.add_argument(
        "--paired", type=whole_number("paired", 0, 1_000_000), default=32, help="students of each kind; 0 = none"
    )
    options = parser.parse_args(arguments)
    if options.seeds:
        matrices(options.seeds)
    if options.paired:
        hostile(options.paired)


if __name__ == "__main__":
    _script.run(main)
