"""The types that all modules share: tasks, a choice of tasks, a rollout, and its feedback.

Glossary of axis letters, used in every signature and comment:

| letter | meaning |
|---|---|
| N | tasks in the table |
| B | tasks chosen in a step (`batch_size`) |
| G | rollouts a task (`num_generations`) |
| R | rows of a rollout, R = B * G, the samples of a task next to each other |
| P | prompt tokens, padded |
| T | completion tokens, padded (`max_completion_length`) |
| K | reference policies |
| E | width of a prompt embedding |
| V, D, L, H | vocabulary, width, layers and heads of the policy |

A bool mask `valid` says which of the values next to it exist; the others are 0. Pass rates that are
unknown are NaN.
"""

from typing import Any, NamedTuple

import jax

from jaxrft.errors import InputError as InputError
from jaxrft.errors import Missing as Missing

Array = jax.Array
PyTree = Any  # nested containers of arrays, as `jax.tree` walks them


class Projections(NamedTuple):
    """Embeddings projected by a frozen predictor, which predicts the pass rate of a query from
    those of similar references.
    """

    query: Array  # [N, h] float32
    reference: Array  # [N, h] float32


class Tasks(NamedTuple):
    """Device arrays about every task; None means that this run has none."""

    reference_pass_rates: Array | None = None  # [N, K] float32, weakest policy first; NaN = unknown
    embeddings: Array | None = None  # [N, E] float32
    domain: Array | None = None  # [N] int32
    # of the embeddings, by `jaxrft.select.dots.attention.project` (dots)
    projections: Projections | None = None


class Choice(NamedTuple):
    """The tasks to roll out in a step."""

    ids: Array  # [B] int32, distinct
    pass_rate: Array  # [B] float32, posterior mean; NaN from a selector without beliefs


class Feedback(NamedTuple):
    """The results of the rollouts of a step, by task."""

    ids: Array  # [B] int32
    successes: Array  # [B] float32, 0..trials
    trials: Array  # [B] float32; 0 marks padding, which selectors ignore
    tokens: Array  # [B] float32, completion tokens spent


class Rollout(NamedTuple):
    """Sampled completions, and their log-probabilities."""

    tokens: Array  # [R, T] int32, padding after the end
    lengths: (
        Array  # [R] int32, tokens up to and including the last, EOS or the end of a stop string
    )
    mask: Array  # [R, T] float32, 1 for these
    logprobs: Array  # [R, T] float32, log pi of the policy at the sampling temperature
    # [R, T] float32, of what was drawn from (top-k, top-p, min-p, repetition penalty)
    sampling_logprobs: Array
    finished: Array  # [R] bool, by EOS or a stop string; False = cut at the longest length
