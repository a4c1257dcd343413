"""Trains a predictor of pass rates on those of several policies, and scores it on held-out policies
and tasks.
"""

import logging
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import numpy as np
import tyro

from jaxrft import stats
from jaxrft.config import Config, TasksConfig
from jaxrft.fields import Checked, FilePath, Seed
from jaxrft.prepare import score
from jaxrft.prepare.pass_rates import SUFFIX
from jaxrft.prepare.score import Predictions, Split
from jaxrft.report.console import Display
from jaxrft.select.dots import training
from jaxrft.select.dots.attention import Calibration
from jaxrft.select.dots.predictor import Origin, Predictor, save_predictor
from jaxrft.simulate import worlds
from jaxrft.tasks import embeddings, sources
from jaxrft.types import InputError

logger = logging.getLogger(__name__)

MAX_SPLITS = 1000
# Beyond these training takes too much memory or time; the published predictor has width 896 and 3
# layers.
MAX_FIT = {
    "width": 65_536,
    "layers": 100,
    "epochs": 1_000_000,
    "learning_rate": 1e3,
    "temperature": 1e6,
}


@dataclass(frozen=True)
class FitConfig:
    """How a predictor is trained; the defaults are as published."""

    calibration: Calibration = "group_logit_temp"
    """Calibration of the attention's average: plain (none), platt, temperature or
    group_logit_temp."""
    width: int = 896
    """Width of the space in which tasks are compared."""
    layers: int = 3
    """Number of linear layers that map an embedding into that space."""
    num_references: int = 256
    """Tasks whose pass rates are given, in training and scoring; a run may use another number."""
    epochs: int = 20
    """Passes over all pass rates."""
    batch_size: int = 256
    """Tasks predicted in a step."""
    learning_rate: float = 1e-3
    """Adam's learning rate at the beginning; it falls linearly to 0."""
    dropout: float = 0.1
    """Dropout rate of hidden units, in [0, 1)."""
    temperature: float = 1.0
    """Temperature of the attention: its scores are divided by it."""
    top_k: int | None = None
    """Attend to the top_k most similar references only."""


@dataclass(frozen=True, kw_only=True)
class Output(Checked):
    """The output of `jaxrft prepare predictor`."""

    out: FilePath
    """Safetensors file for the predictor, which is trained on all policies and tasks."""
    splits: int = 5
    """Number of random splits for scoring: a predictor trained on some policies and tasks is scored
    on the others; 0 = no scoring."""
    held_out: float = 0.2
    """Share of the policies, and of the tasks, that each split holds out."""
    plot: FilePath | None = None
    """File for a plot of the calibration on held-out data; the suffix chooses the format."""
    fit: FitConfig = field(default_factory=FitConfig)


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """The command line: CONFIG's tasks, with embeddings and pass rates of several policies.

    Policies are `tasks.pass_rate_columns`, or else all columns whose names end in _pass_rate.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ResponsesOptions(Output):
    """The command line without CONFIG: a response matrix in place of task files."""

    responses: FilePath
    """An .npz with `responses` [rows, tasks] of 1 right, 0 wrong, -1 missing, rows sorted by
    ability, and `embeddings` [tasks, E]."""
    policies: int = 25
    """Number of policies that the rows are cut into, each of adjacent rows; a pass rate is their
    mean."""
    seed: Seed = 0
    """Seed of the splits, the initial weights and the batches."""


class Data(NamedTuple):
    """Pass rates of M policies on N tasks."""

    embeddings: np.ndarray  # [N, E] float32
    pass_rates: np.ndarray  # [M, N] float64, NaN = unknown
    policies: tuple[str, ...]  # [M] names
    origin: Origin


def main(options: Output) -> None:
    """Reads the data that the command line names; trains and scores a predictor on it."""
    if isinstance(options, ResponsesOptions):
        run(of_responses(options), options, options.seed)
    elif isinstance(options, Options):
        run(of_tasks(options.config), options, options.config.seed)


def of_responses(options: ResponsesOptions) -> Data:
    """Reads a response matrix and cuts its rows into policies, whose means are pass rates.

    Raises InputError for a matrix without embeddings, or with fewer rows than policies.
    """
    data = worlds.load(options.responses)
    if data.embeddings is None:
        raise InputError(
            f"{options.responses} has no array `embeddings`: a predictor needs a row for each task"
        )
    rows = np.asarray(data.embeddings, np.float32)
    if not 1 <= options.policies <= len(data.responses):
        raise InputError(
            f"policies is {options.policies}: {options.responses} has {len(data.responses)} "
            "rows to make them of"
        )
    answers = np.where(data.responses < 0, np.nan, data.responses)
    rates = np.stack(
        [stats.known_mean(part, axis=0) for part in np.array_split(answers, options.policies)]
    )
    names = tuple(f"policy {number}" for number in range(1, options.policies + 1))
    return Data(rows, rates, names, Origin(Path(options.responses).name, rows.shape[1]))


def of_tasks(config: Config) -> Data:
    """Reads the embeddings and pass rates of the tasks of a config, each prompt once.

    Leaves out tasks without an embedding. Raises InputError for sets without embeddings or pass
    rates, or with those of different policies or models.
    """
    sets = [_of_set(tasks) for tasks in config.task_sets]
    (first, _), *others = sets
    for tasks, (data, _) in zip(config.task_sets[1:], others, strict=True):
        if data.policies != first.policies or data.origin != first.origin:
            raise InputError(
                f"{tasks.title} has pass rates of {shown(data.policies)} and embeddings by "
                f"{data.origin.model}, but {config.task_sets[0].title} of "
                f"{shown(first.policies)} and by {first.origin.model}: give the same"
            )
    once = np.sort(
        np.unique(np.concatenate([digests for _, digests in sets]), axis=0, return_index=True)[1]
    )
    rows = np.concatenate([data.embeddings for data, _ in sets])
    rates = np.concatenate([data.pass_rates for data, _ in sets], axis=1)
    return Data(rows[once], rates[:, once], first.policies, first.origin)


def _of_set(tasks: TasksConfig) -> tuple[Data, np.ndarray]:
    """Reads the embeddings and pass rates of a set's tasks, and digests [N, 16] of their prompts.

    Leaves out tasks without an embedding.
    """
    if tasks.embeddings is None:
        raise InputError(
            f"{tasks.title} has no embeddings: make them with `jaxrft prepare embeddings CONFIG "
            "--out FILE.safetensors` and give --tasks.embeddings FILE.safetensors"
        )
    columns, references = sources.read(tasks)
    names = tasks.pass_rate_columns or tuple(name for name in columns if name.endswith(SUFFIX))
    rows = sources.interpret(columns, references, replace(tasks, pass_rate_columns=names))
    rates = rows.reference_pass_rates
    if rates is None:
        raise InputError(
            f"{tasks.source} has no pass rates: add those of several policies with `jaxrft "
            "prepare pass-rates CONFIG --out FILE.parquet`, and give --tasks.source FILE.parquet"
        )
    content = embeddings.read(tasks.embeddings)
    digests = embeddings.digests(rows.prompts)
    embedded = {key.tobytes() for key in content.prompts}
    ids = [index for index, key in enumerate(digests) if key.tobytes() in embedded] or range(
        len(digests)
    )
    if len(ids) < len(digests):
        missing = len(digests) - len(ids)
        logger.info(
            "%d of %d tasks of %s have no embedding and are left out",
            missing,
            len(digests),
            tasks.title,
        )
    prompts = [rows.prompts[index] for index in ids]
    values = embeddings.of_prompts(content, prompts, path=tasks.embeddings, name=tasks.title)
    names = names or tuple(f"reference {number}" for number in range(1, rates.shape[1] + 1))
    source = content.source
    origin = Origin(
        str(source.get("model")), values.shape[1], source.get("digest of the model's parameters")
    )
    return Data(values, rates[ids].T.astype(np.float64), names, origin), digests[ids]


def run(data: Data, options: Output, seed: int) -> list[Predictions]:
    """Trains and scores a predictor for each split, then trains one on everything and writes it.

    Returns the predictions of each split. Raises InputError first for data and options that cannot
    be used.
    """
    check(data, options)
    key = jax.random.key(seed)
    rates = data.pass_rates
    fit = options.fit
    settings = {
        "count": options.splits,
        "held_out": options.held_out,
        "num_references": fit.num_references,
    }
    splits = score.splits(seed, rates, **settings)
    for split in splits:
        unknown = np.isnan(np.take_along_axis(rates, split.references, axis=1)).all(axis=1)
        if unknown.any():
            raise InputError(
                f"too few pass rates of {data.policies[int(unknown.argmax())]} are known to "
                "hold some out: leave it out"
            )
    with Display((options.splits + 1) * fit.epochs, unit="epoch") as display:
        display.say(
            f"{len(rates)} policies ({shown(data.policies)}) on {rates.shape[1]:,} tasks, "
            f"embeddings by {data.origin.model} of width {data.origin.width:,}"
        )
        predictions = []
        for number, split in enumerate(splits, 1):
            train = partial(
                train_predictor,
                display=display,
                title=f"split {number} of {options.splits}",
                after=number - 1,
            )
            predictor = train(jax.random.fold_in(key, number), training_data(data, split), fit)
            predicted = score.predictions(predictor, data.embeddings, rates, split)
            predictions.append(Predictions(split, predicted))
        predictor = train_predictor(
            key, data, fit, display=display, title="all policies and tasks", after=options.splits
        )
    save_predictor(options.out, predictor)
    if predictions:
        display.say(score.table(predictions, rates))
    if predictions and options.plot:
        score.draw(predictions, rates, options.plot)
    display.say(f"the predictor of all policies and tasks is in {options.out}")
    return predictions


def train_predictor(
    key: jax.Array, data: Data, fit: FitConfig, *, display: Display, title: str, after: int
) -> Predictor:
    """Trains a predictor; raises InputError when its weights end up not finite.

    `display` shows its epochs after those of the `after` predictors trained before it.
    """

    def report(epoch: int, loss: float) -> None:
        numbers = f"{title}: loss {loss:.4f}"
        display.advance(after * fit.epochs + epoch, numbers)
        if epoch == fit.epochs:
            display.say(numbers)

    params, _ = training.fit(key, data.embeddings, data.pass_rates, report=report, **asdict(fit))  # pyright: ignore
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise InputError(
            f"training on {title} ended in weights that are not finite: lower "
            f"fit.learning_rate, {fit.learning_rate:g}"
        )
    return Predictor(params, fit.calibration, fit.temperature, fit.top_k, data.origin)


def training_data(data: Data, split: Split) -> Data:
    """Selects the policies and tasks that are not held out."""
    rates = data.pass_rates[~split.policies][:, ~split.tasks]
    names = tuple(
        name for name, held in zip(data.policies, split.policies, strict=True) if not held
    )
    return Data(data.embeddings[~split.tasks], rates, names, data.origin)


def check(data: Data, options: Output) -> None:
    """Raises InputError for data and options that cannot be used, before any training."""
    num_policies, num_tasks = data.pass_rates.shape
    if num_policies < 2:
        raise InputError(
            f"there are pass rates of {shown(data.policies) or 'no policy'} only: a predictor "
            "learns what several policies have in common, so give those of at least 2, in "
            f"columns that end in {SUFFIX} or that tasks.pass_rate_columns names"
        )
    if not 0 <= options.splits <= MAX_SPLITS or not 0 < options.held_out < 1:
        raise InputError(
            f"splits is {options.splits}, held_out {options.held_out}: 0 to {MAX_SPLITS:,}, "
            "and in (0, 1), are right"
        )
    for name, most in MAX_FIT.items():
        value = getattr(options.fit, name)
        if not 0 < value <= most:
            raise InputError(f"fit.{name} is {value}: it must be positive, and at most {most:,}")
    held_out = score.held_out_size(num_tasks, options.held_out) if options.splits else 0
    num_known = num_tasks - held_out
    if options.splits and score.held_out_size(num_policies, options.held_out) == num_policies:
        raise InputError(
            f"held_out is {options.held_out}: it leaves none of the "
            f"{num_policies} policies to train on"
        )
    if not 1 <= options.fit.num_references <= num_known // 2:
        raise InputError(
            f"fit.num_references is {options.fit.num_references}, but at most half of the "
            f"{num_known} tasks to train on can "
            f"be references: give 1 to {num_known // 2}, or more tasks"
        )
    for name, rates in zip(data.policies, data.pass_rates, strict=True):
        if np.isnan(rates).all():
            raise InputError(f"no pass rate of {name} is known: leave it out")
    if options.plot and not options.splits:
        raise InputError(
            "plot shows held-out predictions, but splits is 0: raise splits, or leave plot out"
        )
    for path, suffixes in (
        (options.out, (".safetensors",)),
        (options.plot, (".png", ".svg", ".pdf")),
    ):
        if path and (
            Path(path).suffix not in suffixes or not Path(path).absolute().parent.is_dir()
        ):
            raise InputError(
                f"cannot write to {path}: give a name that ends in {' or '.join(suffixes)}, in "
                "an existing folder"
            )


def shown(names: tuple[str, ...]) -> str:
    """Joins the names; of more than six only the first and the last."""
    return ", ".join(names) if len(names) <= 6 else f"{names[0]} to {names[-1]}"
