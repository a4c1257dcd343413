"""Scores predictions of pass rates on held-out policies and tasks, and those of simpler methods.

Of M policies and N tasks some are held out. Some tasks of each policy, drawn at random from those
that are not held out, are references: their pass rates are given, and all others are predicted.
"""

from functools import partial
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

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
    """The policies and tasks held out, and the references."""

    policies: np.ndarray  # [M] bool, held out
    tasks: np.ndarray  # [N] bool, held out
    references: np.ndarray  # [M, K] int64, known tasks of each policy, distinct


class Predictions(NamedTuple):
    """The pass rates that each method predicts in a split."""

    split: Split
    rates: dict[str, np.ndarray]  # method -> [M, N]


def splits(
    seed: int, pass_rates: np.ndarray, *, count: int, held_out: float, num_references: int
) -> list[Split]:
    """Draws `count` splits of pass rates [M, N] into held-out and known ones.

    A split holds out the share `held_out` of the policies, and of the tasks, at least one of
    either. Successive splits take turns through all policies and tasks, in random orders.
    References are drawn from the tasks that are not held out, those of known pass rate first.
    """
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(size) for size in pass_rates.shape]

    def turn(order: np.ndarray, index: int) -> np.ndarray:
        chosen = np.zeros(len(order), bool)
        size = held_out_size(len(order), held_out)
        chosen[np.take(order, np.arange(index * size, (index + 1) * size), mode="wrap")] = True
        return chosen

    result = []
    for index in range(count):
        policies, tasks = (turn(order, index) for order in orders)
        last = np.isnan(pass_rates) + 2 * tasks[None]  # known ones first, held-out ones never
        drawn = np.argsort(rng.random(pass_rates.shape) + last, axis=1)[:, :num_references]
        result.append(Split(policies, tasks, drawn))
    return result


def held_out_size(size: int, held_out: float) -> int:
    """Computes the number held out of `size`: max(1, round(held_out * size))."""
    return max(1, round(held_out * size))


def predictions(
    predictor: Predictor, embeddings: np.ndarray, pass_rates: np.ndarray, split: Split
) -> dict[str, np.ndarray]:
    """Predicts the pass rates [M, N] by each of `METHODS`.

    `ridge on references` regresses the pass rates of the policy's references on their embeddings.
    `ridge on others` regresses the mean pass rate of the policies trained on, over all tasks
    trained on. `mean of others` is that mean itself: it is unknown for tasks held out, and is given
    for policies held out only, since it is made of the others. Both are shifted to the policy's
    mean over the references. `mean of references` is the policy's mean over its references, for all
    tasks.

    Predictions are clipped to [0, 1]. They are NaN for references, and where a method has none.
    """
    train = np.where(split.tasks[None], np.nan, pass_rates)[~split.policies]
    mean = stats.known_mean(train, axis=0)  # [N], NaN for tasks held out
    line = ridge(embeddings, mean)
    rates = {name: np.full(pass_rates.shape, np.nan) for name in METHODS}
    rates["predictor"] = _run_predictor(predictor, embeddings, pass_rates, split)
    for policy, ids in enumerate(split.references):
        known = pass_rates[policy, ids]
        given = np.full(len(mean), np.nan)
        given[ids] = known
        rates["ridge on references"][policy] = ridge(embeddings, given)
        rates["ridge on others"][policy] = line + stats.known_mean(known - line[ids])
        rates["mean of references"][policy] = stats.known_mean(known)
        if split.policies[policy]:
            rates["mean of others"][policy] = mean + stats.known_mean(known - mean[ids])
    for predicted in rates.values():
        np.put_along_axis(predicted, split.references, np.nan, axis=1)
    return {name: np.clip(predicted, 0, 1) for name, predicted in rates.items()}


def _run_predictor(
    predictor: Predictor, embeddings: np.ndarray, pass_rates: np.ndarray, split: Split
) -> np.ndarray:  # [M, N] float64
    """Runs the predictor on arrays of the host, with the references of a split."""
    params, calibration, temperature, top_k, _ = predictor
    given = np.take_along_axis(pass_rates, split.references, axis=1)
    rates = _attend(
        params,
        jnp.asarray(embeddings, jnp.float32),
        jnp.asarray(given, jnp.float32),
        jnp.asarray(split.references),
        calibration=calibration,
        temperature=temperature,
        top_k=top_k,
    )
    return np.array(rates, np.float64)


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
    center = x[known].mean(axis=0)
    level = y[known].mean()
    spread = np.maximum(x[known].std(axis=0), 1e-6)
    standardized = (x - center) / spread
    u, s, v = np.linalg.svd(standardized[known], full_matrices=False)
    target = u.T @ (y[known] - level)
    size = known.sum()
    shrunk = s**2 / (s**2 + size * PENALTIES[:, None])  # [penalties, rank]
    leverage = np.einsum("pr,nr->pn", shrunk, u**2) + 1 / size
    errors = (y[known] - level - np.einsum("pr,nr->pn", shrunk * target, u)) / np.maximum(
        1 - leverage, 1e-6
    )
    best = shrunk[(errors**2).mean(axis=1).argmin()]
    return level + standardized @ (v.T @ (best * target / np.maximum(s, 1e-12)))


def figures(predicted: np.ndarray, pass_rates: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Scores predictions [M, N] against pass rates where `chosen` [M, N]; averages over policies.

    pearson and spearman are taken over the tasks of a policy, and are 0 for a prediction that is
    the same for all tasks.
    brier is the mean squared error against single answers, r (1 - p)^2 + (1 - r) p^2.
    error is that against pass rates.
    Unknown pass rates do not count, nor do policies with fewer than 3 tasks to score. A figure is
    NaN where there is nothing to score.
    """
    rows = []
    for p, r, mask in zip(predicted, pass_rates, chosen, strict=True):
        mask = mask & ~np.isnan(p) & ~np.isnan(r)
        p = p[mask]
        r = r[mask]
        if len(p) >= 3:
            brier = r * (1 - p) ** 2 + (1 - r) * p**2
            rows.append(
                (
                    correlation(p, r),
                    correlation(stats.rank(p), stats.rank(r)),
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


def curve(predicted: np.ndarray, pass_rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes a calibration curve: the mean prediction and mean pass rate [BINS] of bins.

    Each bin has equally many predictions.
    """
    order = np.argsort(predicted, kind="stable")
    bins = [ids for ids in np.array_split(order, BINS) if len(ids)]
    return tuple(np.array([x[ids].mean() for ids in bins]) for x in (predicted, pass_rates))  # pyright: ignore


def table(predictions: list[Predictions], pass_rates: np.ndarray) -> str:
    """Formats the figures as a table: means over splits ± half the width of 95 % intervals."""
    width = max(map(len, GROUPS)) + 2
    lines = []
    for group in GROUPS:
        lines.append(f"{group:{width}}" + "".join(f"{name:>16}" for name in FIGURES))
        for method in METHODS:
            cells = map(cell, values(predictions, pass_rates, group, method).T)
            lines.append(f"  {method:{width - 2}}" + "".join(f"{text:>16}" for text in cells))
    return "\n".join([*lines, *NOTES])


def values(
    predictions: list[Predictions], pass_rates: np.ndarray, group: str, method: str
) -> np.ndarray:
    """Computes `FIGURES` of a method in one of `GROUPS` for each split, [splits, figures]."""
    rows = (
        figures(rates[method], pass_rates, in_group(split, group)) for split, rates in predictions
    )
    return np.array([list(row.values()) for row in rows])


def in_group(split: Split, group: str) -> np.ndarray:
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


def draw(predictions: list[Predictions], pass_rates: np.ndarray, out: str) -> None:
    """Draws mean pass rates over predictions to the file `out`, a panel for each of `GROUPS`."""
    with panels(len(GROUPS), out, height=3.8) as axes:
        for axis, group in zip(axes, GROUPS, strict=True):
            axis.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle=":")
            for index, method in enumerate(
                METHODS[:-1]
            ):  # the last predicts one number for all tasks
                pairs = []
                for split, rates in predictions:
                    known = ~np.isnan(rates[method]) & ~np.isnan(pass_rates)
                    mask = in_group(split, group) & known
                    pairs.append((rates[method][mask], pass_rates[mask]))
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
