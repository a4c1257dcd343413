"""Bytes that each device will hold, by part: the state by its exact shapes and shardings, temporary
arrays by rule.

| part | how |
|---|---|
| parameters, optimizer, KL reference, replay buffer, embeddings, task table, selector | exact: shards of the run's |
| reference groups, resampled groups | exact: the shapes of groups, at the widest prompts |
| policy for the rollout, key-value caches, tokens seen (repetition_penalty) | exact: shapes and shardings of the rollout, at the widest prompts |
| logits of a token | estimate: R rows of the vocabulary in float32, four times (raw, truncated, both normalized), five with repetition_penalty |
| gradients | estimate: float32, twice (the sum so far and that of a micro-batch) |
| all-gathered embeddings | estimate: the unembedding and its gradient in float32, the embedding in the run's dtype |
| activations | estimate: what each layer saves of a round of bins, see `train.memory`, and the inside of one layer |
| logits of a chunk | estimate: a chunk of `learn.update`, three times (logits, probabilities, gradient) |

What a compiler adds (copies, padding to tiles, fragmentation) is not counted; `programs` asks it.
"""  # noqa: E501

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft import mesh as meshes
from jaxrft.host.checkpoint import size_of
from jaxrft.mesh import on_device
from jaxrft.train.memory import activation_bytes, logits_bytes, rollout_bytes
from jaxrft.train.setup import Opened, group_shapes
from jaxrft.types import PyTree

ALWAYS = "always"
ROLLOUT = "rollout"
LEARN = "learning"


class Part(NamedTuple):
    """Bytes of one part on each device."""

    name: str
    bytes: int
    phase: str  # when they are held: ALWAYS, ROLLOUT or LEARN
    exact: bool


def parts(run: Opened, prompt_length: int, *, tasks: bool = True) -> list[Part]:
    """Lists the arrays of a device, with prompts padded to `prompt_length` tokens.

    The table of tasks and the selector are listed only with `tasks`.
    """
    config = run.setup.config
    num_references = config.select.num_references if run.setup.selector.reference_set else 0
    num_resampled = config.batch_size if config.dynamic_sampling else 0
    candidates = (
        *_always(run, tasks),
        _groups(run, "reference groups", num_references),
        _groups(run, "resampled groups", num_resampled),
        *_rollout(run, prompt_length),
        *_learning(run, prompt_length),
    )
    return [part for part in candidates if part.bytes]


def peak(parts: list[Part], phase: str) -> int:
    """Sums the bytes on each device in a phase."""
    return sum(part.bytes for part in parts if part.phase in (ALWAYS, phase))


def number(tree: PyTree) -> int:
    """Counts the numbers in a pytree of arrays."""
    return sum(x.size for x in jax.tree.leaves(tree))


def _always(run: Opened, tasks: bool) -> list[Part]:
    """Lists what stays on the devices during all of a run; without `tasks`, nothing of the
    selector.
    """
    table = run.constants.tasks._replace(embeddings=None, projections=None)
    held = {
        "parameters that are trained": run.state.params,
        "optimizer": run.state.optimizer,
        "parameters that are not trained": run.constants.frozen,
        "KL reference": None if run.constants.frozen else run.constants.reference_params,
        "replay buffer": run.state.replay,
        "embeddings of the tasks": run.constants.tasks.embeddings if tasks else None,
        "projections of the tasks": run.constants.tasks.projections if tasks else None,
        "selector and task table": (run.state.selector, run.state.counters, table)
        if tasks
        else None,
    }
    return [Part(name, on_device(tree), ALWAYS, True) for name, tree in held.items()]


def _groups(run: Opened, name: str, count: int) -> Part:
    """Describes `count` groups next to the batch, which stay until it has been learned from."""
    group = group_shapes(run.setup)
    return Part(
        name, count // meshes.shards(run.setup.mesh, "batch") * size_of(group), ALWAYS, True
    )


def _rollout(run: Opened, prompt_length: int) -> list[Part]:
    config = run.setup.config
    generate = run.setup.generate
    waits = generate.waits(config.batch_size)
    parts = rollout_bytes(
        config,
        run.setup.lm,
        run.setup.mesh,
        prompt_length,
        generate.grids(config.batch_size),
        entering=generate.entering(config.batch_size) if waits else 0,
    )
    return [
        Part(name, count, ROLLOUT, name != "logits of a token") for name, count in parts.items()
    ]


def _learning(run: Opened, prompt_length: int) -> list[Part]:
    config = run.setup.config
    shape = run.setup.lm.config
    mesh = run.setup.mesh
    size = jnp.dtype(config.dtype).itemsize
    embedding = _vocabulary(run) * shape.hidden_size
    where = (config, shape, mesh, prompt_length)
    activations = activation_bytes(*where, run.setup.remat)
    return [
        Part("gradients", 2 * on_device(run.state.params), LEARN, False),
        Part(
            "all-gathered embeddings",
            (size if run.constants.frozen else 2 * 4) * embedding + size * embedding,
            LEARN,
            False,
        ),
        Part(f"activations, remat {run.setup.remat}", activations, LEARN, False),
        Part("logits of a chunk", logits_bytes(*where), LEARN, False),
    ]


def _vocabulary(run: Opened) -> int:
    """Counts the tokens of the vocabulary whose weights a device holds."""
    return run.setup.lm.config.vocab_size // meshes.shards(run.setup.mesh, "vocab")
