"""A group's squared gradient norm against p(1 - p)(1 - 1/G), the theorem behind DOTS.

Theorem of arXiv 2506.05316, for rewards of 0 or 1 and advantages A = r - mean(r), not scaled: with
s_i the gradient of log pi(completion i), the group's gradient is g = 1/G sum_i A_i s_i, and if
rewards do not depend on the s_i,

    G E|g|^2 = E|s|^2 p (1 - p) (1 - 1/G).

Measured is E|g|^2 over disjoint groups of rollouts of a task, whose p comes from other rollouts:
once with the rewards of the task, and once with coins that fall on 1 as often, for which the
assumption holds. Real rewards break it: what a policy rarely does has a large gradient, and
successes share a direction, that of p, which does not average out.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _script
from benchmarks._script import whole_number
from jaxrft.assets import TINY
from jaxrft.fields import UINT32, path_argument
from jaxrft.learn import grpo, masked
from jaxrft.learn.update import completion_logprobs
from jaxrft.lm import model, rollout, tokenizer, weights
from jaxrft.lm.model import Params, Policy
from jaxrft.stats import pearson
from jaxrft.tasks import builtin
from jaxrft.types import Array

GROUPS = (2, 4, 8, 16, 32)  # sizes of a group
BINS = np.linspace(0.0, 1.0, 6)  # of pass rates, in the table
PROMPT, COMPLETION = 16, 9  # tokens at most


class Measured(NamedTuple):
    """Measurements of N tasks."""

    pass_rates: np.ndarray  # [N]
    scores: np.ndarray  # [N], E|s|^2
    norms: np.ndarray  # [N, len(GROUPS)], E|g|^2
    # [N, len(GROUPS)], E|g|^2 with rewards that do not depend on the completions
    of_coins: np.ndarray


def group_norms(gram: Array, rewards: Array) -> Array:
    """Computes E|g|^2 over disjoint groups of each size in GROUPS.

    `gram` [M, M] of the gradients s_i . s_j, `rewards` [M]; M a multiple of the sizes. Returns
    [len(GROUPS)].
    """

    def norm(size: int) -> Array:
        groups = jnp.arange(rewards.shape[0]).reshape(-1, size)
        advantages = grpo.advantages(rewards[groups], scale_rewards="none")
        inner = gram[groups[:, :, None], groups[:, None, :]]  # [M / G, G, G]
        return jnp.mean(jnp.einsum("ni,nij,nj->n", advantages, inner, advantages)) / size**2

    return jnp.stack([norm(size) for size in GROUPS])


def gram_matrix(
    policy: Policy, params: Params, prompt: Array, length: Array, tokens: Array, mask: Array
) -> Array:
    """Computes s_i . s_j [M, M] for the completions `tokens` [M, T] of a prompt [P].

    `mask` [M, T] is 1 up to and including EOS.
    """

    def logprob(params: Params, tokens: Array, mask: Array) -> Array:
        logprobs, _ = completion_logprobs(policy, params, prompt[None], length[None], tokens[None])
        return jnp.sum(masked.zero(logprobs, mask[None]))

    scores = jax.vmap(jax.grad(logprob), (None, 0, 0))(params, tokens, mask)
    rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(scores)]
    return sum((x @ x.T for x in rows), jnp.zeros((mask.shape[0],) * 2, jnp.float32))


@partial(jax.jit, static_argnames=("policy", "samples"))
def measure_task(
    policy: Policy,
    params: Params,
    key: Array,
    task: tuple[Array, Array, Array, Array],
    *,
    samples: int,
) -> tuple[Array, ...]:
    """Measures the fields of Measured for one task: (number, prompt [P], length, answer [T] with
    END).

    From 2 * `samples` rollouts: gradients from the first half, p from the second.
    """
    number, prompt, length, answer = task
    options = {"num_generations": 2 * samples, "max_completion_length": COMPLETION, "eos_ids": (0,)}
    drawn = rollout.generate(
        policy, params, key, prompt[None], length[None], number[None], **options
    )
    rewards = jnp.all(drawn.tokens == answer[None], axis=1).astype(jnp.float32)
    gram = gram_matrix(policy, params, prompt, length, drawn.tokens[:samples], drawn.mask[:samples])
    pass_rate = jnp.mean(rewards[samples:])
    coins = jax.random.bernoulli(jax.random.fold_in(key, number), pass_rate, (samples,)).astype(
        jnp.float32
    )
    norms = (group_norms(gram, kind) for kind in (rewards[:samples], coins))
    return pass_rate, jnp.mean(jnp.diagonal(gram)), *norms


def measure(*, tasks: int, samples: int, seed: int = 0) -> Measured:
    """Measures `samples` gradients and a pass rate of each of the first `tasks` of the pool
    `digits`, with right answers.
    """
    shape, text = weights.read_config(TINY), tokenizer.load(TINY)
    params, policy = weights.load(TINY, shape), model.decoder(shape, remat="none")
    chosen, key = builtin.split("digits")[0][:tasks], jax.random.key(seed)
    measured = []
    for number, task in enumerate(chosen):
        prompt, answer = np.zeros(PROMPT, np.int32), np.zeros(COMPLETION, np.int32)
        encoded = text.encode(task.prompt)
        prompt[: len(encoded)], answer[: len(task.answer)] = encoded, text.encode(task.answer)
        row = tuple(map(jnp.asarray, (np.int32(number), prompt, np.int32(len(encoded)), answer)))
        measured.append(measure_task(policy, params, key, row, samples=samples))
    return Measured(*(np.array(values) for values in zip(*jax.device_get(measured), strict=True)))


def theorem(pass_rates: np.ndarray, size: int) -> np.ndarray:
    """Computes p (1 - p) (1 - 1/G) of pass rates [N]."""
    return pass_rates * (1.0 - pass_rates) * (1.0 - 1.0 / size)


def shares(measured: Measured) -> dict[str, np.ndarray]:
    """Computes G E|g|^2 / E|s|^2 [N, len(GROUPS)] for each kind of rewards; the theorem predicts
    p (1 - p) (1 - 1/G).
    """
    scale = np.array(GROUPS) / measured.scores[:, None]
    return {"the task's rewards": measured.norms * scale, "coins": measured.of_coins * scale}


def correlations(measured: Measured, share: np.ndarray) -> np.ndarray:
    """Computes Pearson correlations over the tasks of a share [N, len(GROUPS)] with the theorem's.
    Returns [len(GROUPS)].
    """
    pairs = zip(share.T, GROUPS, strict=True)
    return np.array([pearson(column, theorem(measured.pass_rates, size)) for column, size in pairs])


def table(measured: Measured) -> str:
    """Formats means of the shares by pass rate and group size, next to the theorem's, and
    correlations, in Markdown.
    """
    lines = ["| rewards | p | tasks |" + "".join(f" G = {size} |" for size in GROUPS)]
    lines.append("|---" * (3 + len(GROUPS)) + "|")
    kinds = shares(measured) | {
        "theorem": np.stack([theorem(measured.pass_rates, size) for size in GROUPS], axis=1)
    }
    for name, share in kinds.items():
        for low, high in zip(BINS[:-1], BINS[1:], strict=True):
            rows = (
                (measured.pass_rates > low)
                & (measured.pass_rates <= high)
                & (measured.pass_rates < 1)
            )
            if rows.any():
                means = "".join(f" {mean:.3f} |" for mean in share[rows].mean(axis=0))
                lines.append(f"| {name} | {low:.1f} to {high:.1f} | {rows.sum()} |{means}")
    for name, share in shares(measured).items():
        lines.append(
            f"| {name} | correlation | {len(share)} "
            "|" + "".join(f" {x:.2f} |" for x in correlations(measured, share))
        )
    return "\n".join(lines)


def draw(measured: Measured, path: Path) -> None:
    """Draws each task's share over its pass rate, with both kinds of rewards, for three sizes of a
    group.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    line, shown = np.linspace(0.0, 1.0, 101), (GROUPS[0], 8, GROUPS[-1])
    axes = figure.subplots(2, len(shown), sharex=True, sharey="row")
    for row, (name, share) in zip(axes, shares(measured).items(), strict=True):
        for cell, size in zip(row, shown, strict=True):
            cell.plot(
                measured.pass_rates,
                share[:, GROUPS.index(size)],
                ".",
                markersize=4,
                alpha=0.6,
                label="a task",
            )
            cell.plot(
                line, theorem(line, size), color="black", linewidth=1, label="p (1 - p) (1 - 1/G)"
            )
            cell.set_title(f"{name}, G = {size}", fontsize=10)
        row[0].set_ylabel("G E|g|² / E|s|²")
    for cell in axes[-1]:
        cell.set_xlabel("pass rate p")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradients", description=__doc__)
    parser.add_argument(
        "--tasks",
        type=whole_number("tasks", 1),
        default=192,
        help="of the quickstart's pool, with right answers",
    )
    parser.add_argument(
        "--samples",
        type=whole_number("samples", 1),
        default=64,
        help="gradients a task; a multiple of the largest group, 32",
    )
    parser.add_argument("--seed", type=whole_number("seed", 0, UINT32), default=0)
    parser.add_argument(
        "--picture", type=path_argument, help="file to draw to, such as gradients.png"
    )
    options = parser.parse_args(arguments)
    measured = measure(tasks=options.tasks, samples=options.samples, seed=options.seed)
    print(table(measured))
    if options.picture:
        draw(measured, options.picture)


if __name__ == "__main__":
    _script.run(main)
