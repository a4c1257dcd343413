"""Fits the predictor that `dots` needs, on the pass rates of other policies."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import make_quickstart
from jaxrft.assets import TINY
from jaxrft.lm import embed, model, weights
from jaxrft.select.dots import training
from jaxrft.select.dots.predictor import Origin, Predictor, save_predictor
from jaxrft.tasks import builtin

TASKS, SAMPLES = 2048, 8  # of the pool at most; rollouts a task and policy
REFERENCES = 32  # tasks of a reference set
WIDTH = 64


def rollouts(family: str, policies: int) -> int:
    """Counts the rollouts behind a predictor."""
    return policies * min(TASKS, builtin.FAMILIES[family].size) * SAMPLES


def write(family: str, policies: Sequence[Path], out: Path) -> None:
    """Fits a predictor on the pass rates of the tiny policy and of those in the folders `policies`,
    and saves it.
    """
    tasks, truths = builtin.split(family)
    asked = make_quickstart.examples([task.prompt for task in tasks[:TASKS]], truths[:TASKS])
    shape = weights.read_config(TINY)
    rates, start = [], weights.load(TINY, shape)
    for params in (start, *(weights.load(folder, shape) for folder in policies)):
        rates.append(make_quickstart.rollouts(shape, params, asked, samples=SAMPLES).mean(axis=1))
    embeddings = embed.pooled(
        model.decoder(shape, remat="none"), start, asked.prompts, asked.lengths
    )
    table = embeddings, jnp.asarray(np.stack(rates), jnp.float32)
    params, _ = training.fit(jax.random.key(0), *table, width=WIDTH, num_references=REFERENCES)
    origin = Origin(TINY, shape.hidden_size)
    save_predictor(out, Predictor(params, "group_logit_temp", 1.0, None, origin))
