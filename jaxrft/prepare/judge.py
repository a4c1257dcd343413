"""How well pass rates are predicted for policies and tasks that were not trained on, beside simpler
ways to do it.

M policies, N tasks, of which some of each are held out. Of every policy, some known tasks, drawn at
random, are references, whose pass rates are given; the others are to be told.
"""

from functools import partial
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from jaxrft import stats
from jaxrft.report.picture import panels
from jaxrft.select.dots import attention
from jaxrft.select.dots.predictor import Predictor
from jaxrft.types import Array, Projections

GROUPS = {  # which (policies, tasks) are held out
    "new policies, known tasks": (True, False),
    "known policies, new tasks": (False, True),
    "new policies, new tasks": (True, True),
}
METHODS = (
    "predictor",
    "ridge on references",
    "ridge on others",
    "mean of others",
    "mean of references",
)
FIGURES = ("pearson", "spearman", "brier", "error")
PENALTIES = np.logspace(-3, 6, 19)  # of ridge regression, relative to the variance of a column
BINS = 10  # of a calibration curve
NOTES = (
    "pearson, spearman: over the tasks of a policy, mean over policies; brier: squared error "
    "against single answers;",
    "error: against pass rates. ± 95 % intervals over splits, which share data. The mean of "
    "others is known only for",
    "tasks that other policies were trained on.",
)


class Split(NamedTuple):
    """What is held out, and what is given."""

    policies: np.ndarray  # [M] bool, held out
    tasks: np.ndarray  # [N] bool, held out
    references: np.ndarray  # [M, K] int64, known tasks of each policy, distinct


class Judged(NamedTuple):
    """What the methods say of a split."""

    split: Split
    found: dict[str, np.ndarray]  # method -> [M, N]


def splits(
    seed: int, pass_rates: np.ndarray, *, count: int, held_out: float, num_references: int
) -> list[Split]:
    """Draws `count` splits of pass rates [M, N] into what is held out and what is known.

    A split holds out the share `held_out` of the policies, and of the tasks, at least one of
    either. Successive splits take turns through all policies and tasks, in random orders.
    References are drawn from the tasks that are not held out, those of known pass rate first.
    """
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(size) for size in pass_rates.shape]

    def turn(order: np.ndarray, index: int) -> np.ndarray:
        chosen = np.zeros(len(order), bool)
        size = share(len(order), held_out)
        chosen[np.take(order, np.arange(index * size, (index + 1) * size), mode="wrap")] = True
        return chosen

    found = []
    for index in range(count):
        policies, tasks = (turn(order, index) for order in orders)
        last = np.isnan(pass_rates) + 2 * tasks[None]  # known ones first, held-out ones never
        drawn = np.argsort(rng.random(pass_rates.shape) + last, axis=1)[:, :num_references]
        found.append(Split(policies, tasks, drawn))
    return found


def share(size: int, held_out: float) -> int:
    """Computes how many of `size` are held out: max(1, round(held_out * size))."""
    return max(1, round(held_out * size))


def predictions(
    predictor: Predictor, embeddings: np.ndarray, pass_rates: np.ndarray, split: Split
) -> dict[str, np.ndarray]:
    """Predicts the pass rates [M, N] by each of `METHODS`.

    `ridge on references` regresses the pass rates of the policy's references on their embeddings.
    `ridge on others` regresses the mean pass rate of the policies trained on, over all tasks
    trained on. `mean of others` is that mean itself: it is unknown for tasks held out, and is given
    for policies held out only, since it is made of the others. Both are shifted so that their mean
    over the references is the policy's own. `mean of references` is the policy's mean over its
    references, for all tasks.

    Predictions are clipped to [0, 1]. They are NaN for references, and where a method has none.
    """
    train = np.where(split.tasks[None], np.nan, pass_rates)[~split.policies]
    mean = stats.known_mean(train, axis=0)  # [N], NaN for tasks held out
    line = ridge(embeddings, mean)
    found = {name: np.full(pass_rates.shape, np.nan) for name in METHODS}
    found["predictor"] = _attended(predictor, embeddings, pass_rates, split)
    for policy, ids in enumerate(split.references):
        rates = pass_rates[policy, ids]
        given = np.full(len(mean), np.nan)
        given[ids] = rates
        found["ridge on references"][policy] = ridge(embeddings, given)
        found["ridge on others"][policy] = line + stats.known_mean(rates - line[ids])
        found["mean of references"][policy] = stats.known_mean(rates)
        if split.policies[policy]:
            found["mean of others"][policy] = mean + stats.known_mean(rates - mean[ids])
    for rates in found.values():
        np.put_along_axis(rates, split.references, np.nan, axis=1)
    return {name: np.clip(rates, 0, 1) for name, rates in found.items()}


def _attended(
    predictor: Predictor, embeddings: np.ndarray, pass_rates: np.ndarray, split: Split
) -> np.ndarray:  # [M, N] float64
    """Runs the predictor on arrays of the host, with the references of a split."""
    params, calibration, temperature, top_k, _ = predictor
    given = np.take_along_axis(pass_rates, split.references, axis=1)
    found = _attend(
        params,
        jnp.asarray(embeddings, jnp.float32),
        jnp.asarray(given, jnp.float32),
        jnp.asarray(split.references),
        calibration=calibration,
        temperature=temperature,
        top_k=top_k,
    )
    return np.array(found, np.float64)


@partial(jax.jit, static_argnames=("calibration", "temperature", "top_k"))
def _attend(
    params: attention.Params,
    embeddings: Array,
    rates: Array,
    references: Array,
    **options: Unpack[attention.Options],
) -> Array:
    """Predicts pass rates [M, N] from those [M, K] of references [M, K]."""
    query, reference = attention.project_table(params, embeddings)

    def one(given: tuple[Array, Array]) -> Array:
        rates, ids = given
        return attention.predict_projected(
            params, Projections(query, reference[ids]), rates, **options
        )

    return jax.lax.map(one, (rates, references))


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fits ridge regression from embeddings x [N, E] to the known entries of y [N]; predicts all N.

    Entries that are NaN are unknown. The penalty is the one of `PENALTIES` with the smallest
    leave-one-out error.
    """
    known = ~np.isnan(y)
    centre = x[known].mean(axis=0)
    level = y[known].mean()
    spread = np.maximum(x[known].std(axis=0), 1e-6)
    whole = (x - centre) / spread
    u, s, v = np.linalg.svd(whole[known], full_matrices=False)
    target = u.T @ (y[known] - level)
    size = known.sum()
    shrunk = s**2 / (s**2 + size * PENALTIES[:, None])  # [penalties, rank]
    leverage = np.einsum("pr,nr->pn", shrunk, u**2) + 1 / size
    errors = (y[known] - level - np.einsum("pr,nr->pn", shrunk * target, u)) / np.maximum(
        1 - leverage, 1e-6
    )
    best = shrunk[(errors**2).mean(axis=1).argmin()]
    return level + whole @ (v.T @ (best * target / np.maximum(s, 1e-12)))


def figures(found: np.ndarray, pass_rates: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Scores predictions [M, N] against pass rates where `chosen` [M, N]; averages over policies.

    pearson and spearman are taken over the tasks of a policy, and are 0 for a prediction that is
    the same for all tasks.
    brier is the mean squared error against single answers, r (1 - p)^2 + (1 - r) p^2.
    error is that against pass rates.
    Unknown pass rates do not count, nor do policies with fewer than 3 tasks to score. A figure is
    NaN where there is nothing to score.
    """
    rows = []
    for p, r, kept in zip(found, pass_rates, chosen, strict=True):
        kept = kept & ~np.isnan(p) & ~np.isnan(r)
        p = p[kept]
        r = r[kept]
        if len(p) >= 3:
            brier = r * (1 - p) ** 2 + (1 - r) * p**2
            rows.append(
                (
                    correlation(p, r),
                    correlation(rankdata(p), rankdata(r)),
                    brier.mean(),
                    ((p - r) ** 2).mean(),
                )
            )
    means = stats.known_mean(np.array(rows), axis=0) if rows else [np.nan] * len(FIGURES)
    return dict(zip(FIGURES, map(float, means), strict=True))


def correlation(p: np.ndarray, r: np.ndarray) -> float:
    """Computes Pearson's correlation of predictions with pass rates.

    It is 0 for constant predictions, NaN for constant pass rates.
    """
    if np.allclose(p - p.mean(), 0) and not np.allclose(r - r.mean(), 0):
        return 0.0
    return stats.pearson(p, r)


def curve(found: np.ndarray, pass_rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes a calibration curve: the mean prediction and mean pass rate [BINS] of bins.

    Each bin has equally many predictions.
    """
    order = np.argsort(found, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    return tuple(np.array([x[part].mean() for part in parts]) for x in (found, pass_rates))  # pyright: ignore


def table(judged: list[Judged], pass_rates: np.ndarray) -> str:
    """Formats the figures as a table: means over splits ± half the width of 95 % intervals."""
    width = max(map(len, GROUPS)) + 2
    lines = []
    for group in GROUPS:
        lines.append(f"{group:{width}}" + "".join(f"{name:>16}" for name in FIGURES))
        for method in METHODS:
            cells = map(cell, values(judged, pass_rates, group, method).T)
            lines.append(f"  {method:{width - 2}}" + "".join(f"{text:>16}" for text in cells))
    return "\n".join([*lines, *NOTES])


def values(judged: list[Judged], pass_rates: np.ndarray, group: str, method: str) -> np.ndarray:
    """Computes `FIGURES` of a method in one of `GROUPS` for each split, [splits, figures]."""
    rows = (figures(found[method], pass_rates, held(split, group)) for split, found in judged)
    return np.array([list(row.values()) for row in rows])


def held(split: Split, group: str) -> np.ndarray:
    """Computes the mask [M, N] of the pass rates that are in one of `GROUPS`."""
    policies, tasks = GROUPS[group]
    return (split.policies == policies)[:, None] & (split.tasks == tasks)[None]


def cell(values: np.ndarray) -> str:
    """Formats the mean of the finite values ± half the width of their interval; "-" for none."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return f"{values[0]:.3f}" if len(values) else "-"
    mean, low, high = stats.mean_interval(values)
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


def draw(judged: list[Judged], pass_rates: np.ndarray, out: str) -> None:
    """Draws mean pass rates over predictions to the file `out`, a panel for each of `GROUPS`."""
    with panels(len(GROUPS), out, height=3.8) as axes:
        for axis, group in zip(axes, GROUPS, strict=True):
            axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
            for index, method in enumerate(METHODS[:-1]):  # the last tells no task from another
                pairs = []
                for split, found in judged:
                    kept = held(split, group) & ~np.isnan(found[method]) & ~np.isnan(pass_rates)
                    pairs.append((found[method][kept], pass_rates[kept]))
                predicted, observed = (np.concatenate(x) for x in zip(*pairs, strict=True))
                if len(predicted):
                    axis.plot(
                        *curve(predicted, observed),
                        marker="o",
                        markersize=3,
                        color=f"C{index}",
                        label=method,
                    )
            axis.set(title=group, xlabel="predicted", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes[0].set_ylabel("mean pass rate")
        axes[0].legend(frameon=False, fontsize="small")
