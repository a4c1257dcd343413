"""What held-out trials say of a policy: avg@k, pass@k, lengths, and intervals over tasks."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxrft.stats import Interval, bootstrap_means


class Trials(NamedTuple):
    """Completions of the N tasks of a held-out set."""

    greedy: np.ndarray  # [N] success of the greedy completion
    samples: np.ndarray  # [N, k] success of the samples; k may be 0
    lengths: np.ndarray  # [N, k] their tokens


def pass_at(solved: np.ndarray, k: int) -> np.ndarray:
    """Estimates the chance that one of `k` samples solves the task, without bias.

    pass@k = 1 - C(n - c, k) / C(n, k) for c of n samples that solve it, `solved` [N, n] bool.
    Source: Chen et al., Evaluating Large Language Models Trained on Code, 2021, equation 1.
    """
    n = solved.shape[1]
    failed = n - solved.sum(axis=1)
    # C(n - c, k) / C(n, k), the chance that k samples without replacement all fail
    factors = [np.clip((failed - i) / (n - i), 0.0, 1.0) for i in range(k)]
    return 1.0 - np.prod(factors, axis=0)


def by_task(name: str, trials: Trials, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Computes what each task adds to the mean of each metric of a set, [N] each.

    `ks` are those of pass@k, at most the number of samples. A task is solved by a success of 1.
    """
    values = {f"eval/{name}/greedy": trials.greedy}
    samples = trials.samples
    if samples.shape[1]:
        values[f"eval/{name}/avg@{samples.shape[1]}"] = samples.mean(axis=1)
        solved = samples >= 1.0
        values |= {f"eval/{name}/pass@{k}": pass_at(solved, k) for k in ks}
        values[f"eval/{name}/mean_length"] = trials.lengths.mean(axis=1)
    return values


def metrics(sets: Mapping[str, Trials], ks: tuple[int, ...]) -> dict[str, float]:
    """Computes the metrics of all sets."""
    return {
        metric: float(values.mean())
        for name, trials in sets.items()
        for metric, values in by_task(name, trials, ks).items()
    }


def intervals(sets: Mapping[str, Trials], ks: tuple[int, ...]) -> dict[str, Interval]:
    """Computes the metrics of all sets with 95 % intervals, by a bootstrap over tasks."""
    return {
        metric: interval
        for name, trials in sets.items()
        for metric, interval in _intervals(by_task(name, trials, ks)).items()
    }


def _intervals(values: dict[str, np.ndarray]) -> dict[str, Interval]:
    found = bootstrap_means(np.stack(list(values.values()), axis=1))
    return dict(zip(values, found, strict=True))
