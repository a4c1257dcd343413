"""What held-out trials say of a policy: avg@k, pass@k, maj@k, lengths, and intervals over tasks."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxrft.config import pass_at as powers_up_to
from jaxrft.stats import Interval, bootstrap_means


class Samples(NamedTuple):
    """k completions of each of N tasks."""

    success: np.ndarray  # [N, k]
    lengths: np.ndarray  # [N, k] tokens
    truncated: np.ndarray  # [N, k] bool, without an end within the longest length
    majority: np.ndarray  # [N, 1] success of the majority's answer; [N, 0] if not measured


def no_samples(num_tasks: int) -> Samples:
    """Returns 0 completions of each task."""
    none = np.zeros((num_tasks, 0), np.float32)
    return Samples(none, none, none.astype(bool), none)


class Trials(NamedTuple):
    """Completions of the N tasks of a held-out set."""

    greedy: np.ndarray  # [N] success of the greedy completion
    samples: Samples  # k may be 0
    domain: np.ndarray  # [N] int32, index into `domains`
    domains: tuple[str, ...]  # names
    rows: np.ndarray  # [N] int32, rows of the set's source, from 0
    num_dropped: int = 0  # tasks of the set that were left out


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


def by_task(name: str, trials: Trials) -> dict[str, np.ndarray]:
    """Computes what each task adds to the mean of each metric of a set, [N] each.

    A task is solved by a success of 1.
    """
    values = {f"eval/{name}/greedy": trials.greedy}
    samples = trials.samples
    k = samples.success.shape[1]
    if k:
        values[f"eval/{name}/avg@{k}"] = samples.success.mean(axis=1)
        solved = samples.success >= 1.0
        values |= {f"eval/{name}/pass@{each}": pass_at(solved, each) for each in powers_up_to(k)}
        if samples.majority.shape[1]:
            values[f"eval/{name}/maj@{k}"] = samples.majority[:, 0]
        values[f"eval/{name}/mean_length"] = samples.lengths.mean(axis=1)
        values[f"eval/{name}/clipped_ratio"] = samples.truncated.mean(axis=1)
    return values


def median_length(trials: Trials) -> float:
    """Computes the median of the lengths of all samples, of which there are some."""
    return float(np.median(trials.samples.lengths))


def in_domain(trials: Trials, number: int) -> Trials:
    """Selects the tasks of a domain."""
    ids = np.flatnonzero(trials.domain == number)
    return trials._replace(
        greedy=trials.greedy[ids],
        samples=Samples(*(each[ids] for each in trials.samples)),
        domain=trials.domain[ids],
        rows=trials.rows[ids],
        num_dropped=0,
    )


def by_domain(name: str, trials: Trials) -> dict[str, Trials]:
    """Splits the trials of a set by domain, {<name>/<domain>: trials}; empty for a single one."""
    present = np.unique(trials.domain).tolist()
    if len(present) < 2:
        return {}
    return {f"{name}/{trials.domains[number]}": in_domain(trials, number) for number in present}


def with_domains(sets: Mapping[str, Trials]) -> dict[str, Trials]:
    """Adds the trials of the domains of each set to those of the sets."""
    together = {}
    for name, trials in sets.items():
        together |= {name: trials, **by_domain(name, trials)}
    return together


def metrics(sets: Mapping[str, Trials]) -> dict[str, float]:
    """Computes the metrics of all sets, and greedy and avg@k of their domains."""
    found = {}
    for name, trials in sets.items():
        found |= {metric: float(values.mean()) for metric, values in by_task(name, trials).items()}
        if trials.samples.success.shape[1]:
            found[f"eval/{name}/median_length"] = median_length(trials)
        for domain, part in by_domain(name, trials).items():
            found[f"eval/{domain}/greedy"] = float(part.greedy.mean())
            if part.samples.success.shape[1]:
                k = part.samples.success.shape[1]
                found[f"eval/{domain}/avg@{k}"] = float(part.samples.success.mean())
    return found


def intervals(sets: Mapping[str, Trials]) -> dict[str, Interval]:
    """Computes the metrics of all sets and of their domains with 95 % intervals, by a bootstrap
    over tasks.
    """
    return {
        metric: interval
        for name, trials in with_domains(sets).items()
        for metric, interval in _intervals(by_task(name, trials)).items()
    }


def _intervals(values: dict[str, np.ndarray]) -> dict[str, Interval]:
    found = bootstrap_means(np.stack(list(values.values()), axis=1))
    return dict(zip(values, found, strict=True))
