"""Times the choice of a step's tasks, next to the published estimator and to the step itself.

Medians of seconds, measured by turns so that all meet the same machine, which should have nothing
else to do. Some three minutes on two cores; `--parts` measures a part.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _script
from benchmarks._script import whole_number
from jaxrft import mesh as meshes
from jaxrft.assets import TINY
from jaxrft.config import Config, SelectConfig, TasksConfig
from jaxrft.fields import path_argument
from jaxrft.host.files import UnreadableJSON, read_json
from jaxrft.report import records
from jaxrft.select import selectors
from jaxrft.select.dots import attention
from jaxrft.tasks import builtin
from jaxrft.train.loop import train
from jaxrft.types import Array, Choice, Feedback, Projections, Tasks

ROOT = Path(__file__).parents[1]
PUBLISHED = "published, numpy"
WITH_EMBEDDINGS = "adaptive, embeddings"  # of which it uses 32 components
BATCH, GENERATIONS = 32, 16  # of the paper [arXiv 2510.26374]
PAPER, MILLION, SHARDED = 54_400, 1_000_000, 10_000_000  # tasks
SMALL_BATCH, SMALL_GENERATIONS = 16, 8  # of the quickstart
EMBEDDING, WIDTH, QUERIES, REFERENCES = 1536, 896, 10_240, 256  # of DOTS [arXiv 2506.05316]

# A step of 1.5B parameters, from below: what eight H100 compute at 40 % of their peak, and no
# faster than they read parameters and key-value cache. 32 x 16 rollouts of 256 + 1,024 tokens.
PARAMETERS, PROMPT, COMPLETION = 1.54e9, 256, 1024
CHIPS, PEAK, UTILIZATION, BANDWIDTH = 8, 989e12, 0.4, 3.35e12  # FLOP/s in bfloat16, byte/s, of one
CACHE = 28 * 2 * 2 * 128 * 2  # bytes a token: layers, keys and values, heads, width, bfloat16


class Published(NamedTuple):
    """BOTS' estimator [arXiv 2510.26374] as its equations say, in numpy: what ours is measured
    against.
    """

    alpha: np.ndarray  # [N] float64
    beta: np.ndarray  # [N]
    capability: float  # NaN before the first batch


def choose(rng: np.random.Generator, state: Published, batch_size: int) -> np.ndarray:
    """Chooses the ids [B] of the tasks whose draw theta_i ~ Beta(alpha_i, beta_i) is nearest 0.5.

    They are in any order.
    """
    return np.argpartition(np.abs(rng.beta(state.alpha, state.beta) - 0.5), batch_size)[:batch_size]


def observe(
    state: Published,
    weak: np.ndarray,
    strong: np.ndarray,
    ids: np.ndarray,
    successes: np.ndarray,
    *,
    num_generations: int,
    decay: float = 0.1,
    rho: float = 0.1,
    momentum: float = 0.9,
) -> Published:
    """Returns the state after `successes` [B] of `num_generations` rollouts of tasks `ids` [B].

    alpha <- (1 - decay) alpha + decay + (1 - rho) s + rho s~, beta likewise with failures; s~ by
    interpolation between the pass rates `weak` and `strong` [N] of the references.
    """
    rates = successes / num_generations
    base = weak[ids].mean()
    capability = (rates.mean() - base) / (strong[ids].mean() - base + 1e-6)
    if not np.isnan(state.capability):
        capability = momentum * state.capability + (1 - momentum) * capability
    implicit = np.clip(weak + capability * (strong - weak), 0, 1)
    implicit[ids] = rates
    alpha = (1 - decay) * state.alpha + decay + rho * num_generations * implicit
    beta = (1 - decay) * state.beta + decay + rho * num_generations * (1 - implicit)
    alpha[ids] += (1 - rho) * successes
    beta[ids] += (1 - rho) * (num_generations - successes)
    return Published(alpha, beta, float(capability))


def world(num_tasks: int) -> tuple[Tasks, np.ndarray]:
    """Draws tasks and their pass rates [N], between those of a weak and a strong reference."""
    rng = np.random.default_rng(0)
    rates = rng.beta(1, 1, num_tasks).astype(np.float32)
    references = np.stack([0.6 * rates, 1 - 0.6 * (1 - rates)], axis=1)
    projected = jnp.ones((num_tasks, 1))  # no step predicts without a reference set
    return Tasks(jnp.asarray(references), projections=Projections(projected, projected)), rates


def published(num_tasks: int, batch_size: int, num_generations: int) -> Callable[[], Any]:
    """Returns a step of the published estimator: choose, and learn from the rollouts."""
    tasks, rates = world(num_tasks)
    weak, strong = np.asarray(tasks.reference_pass_rates, np.float64).T.copy()
    rng = np.random.default_rng(1)
    state = Published(np.ones(num_tasks), np.ones(num_tasks), float("nan"))

    def step() -> None:
        nonlocal state
        ids = choose(rng, state, batch_size)
        successes = rng.binomial(num_generations, rates[ids]).astype(np.float64)
        state = observe(state, weak, strong, ids, successes, num_generations=num_generations)

    return step


def ours(name: str, num_tasks: int, batch_size: int, num_generations: int) -> Callable[[], Any]:
    """Returns a step of the selector called `name`: its `select` on the device, the rollouts, its
    `update`.
    """
    tasks, rates = world(num_tasks)
    if name == WITH_EMBEDDINGS:
        name, tasks = (
            "adaptive",
            tasks._replace(embeddings=jax.random.normal(jax.random.key(2), (num_tasks, 32))),
        )
    selector = make(name, num_generations)
    # leaves may not share memory, which is donated
    state = jax.tree.map(jnp.copy, selector.init(tasks, num_tasks))
    rng, keys = np.random.default_rng(1), iter([*jax.random.split(jax.random.key(0), 1000)])
    select = jax.jit(selector.select, static_argnames="batch_size", donate_argnums=1)

    # as in a run, where counts become feedback within the program
    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, tasks: Tasks, choice: Choice, solved: Array) -> Any:
        return selector.update(state, tasks, feedback(choice, solved, num_generations))

    def step() -> None:
        nonlocal state
        choice, state = select(next(keys), state, tasks, batch_size=batch_size)
        solved = rng.binomial(num_generations, rates[np.asarray(choice.ids)])
        state = jax.block_until_ready(update(state, tasks, choice, solved.astype(np.float32)))

    return step


def feedback(choice: Choice, solved: Array | np.ndarray, num_generations: int) -> Feedback:
    """Makes the feedback of `num_generations` rollouts of each task, of which `solved` [B] are
    right.
    """
    trials = jnp.full(len(solved), num_generations, jnp.float32)
    return Feedback(choice.ids, jnp.asarray(solved, jnp.float32), trials, trials)


def make(name: str, num_generations: int) -> selectors.Selector:
    """Makes the selector called `name`; `dots` of tasks that are projected already."""
    if name != "dots":
        return selectors.make(name, num_generations)
    return selectors.dots(num_generations, predictor=predictor(1, 1), calibration="plain")


def predictor(embedding: int, width: int) -> attention.Params:
    """Draws towers of one layer."""

    def norm(size: int) -> attention.Affine:
        return attention.Affine(jnp.ones(size), jnp.zeros(size))

    def tower(key: jax.Array) -> attention.Tower:
        weight = jax.random.normal(key, (embedding, width)) / np.sqrt(embedding).astype(np.float32)
        return attention.Tower(
            norm(embedding), (attention.Affine(weight, jnp.zeros(width)),), norm(width)
        )

    query, reference = map(tower, jax.random.split(jax.random.key(0)))
    return attention.Params(query, reference)


def side_by_side(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Measures the median seconds of each, by turns; the first two calls do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def steps(
    num_tasks: int, repeats: int, *, batch_size: int = BATCH, num_generations: int = GENERATIONS
) -> dict[str, float]:
    """Measures the median seconds of a step by selector, and of the published estimator."""
    sizes = (num_tasks, batch_size, num_generations)
    subjects = {PUBLISHED: published(*sizes)}
    subjects |= {name: ours(name, *sizes) for name in [*selectors.SELECTORS, WITH_EMBEDDINGS]}
    return side_by_side(subjects, repeats)


def predictions(repeats: int) -> dict[str, float]:
    """Measures the median seconds of DOTS' attention over a projected table, and of the
    projection.
    """
    keys = jax.random.split(jax.random.key(1))
    embeddings = jax.random.normal(keys[0], (QUERIES, EMBEDDING))
    rates = jax.random.uniform(keys[1], (REFERENCES,))
    params = predictor(EMBEDDING, WIDTH)
    project = jax.jit(attention.project)
    projections = project(params, embeddings, embeddings[:REFERENCES])

    def predict(top_k: int | None) -> Callable[[], Any]:
        options: dict[str, Any] = {"calibration": "plain", "top_k": top_k}
        program = jax.jit(lambda *x: attention.predict_projected(*x, **options))
        return lambda: jax.block_until_ready(program(params, projections, rates))

    subjects = {
        "all references": predict(None),
        "top_k 32": predict(32),
        "the projection, once": lambda: jax.block_until_ready(
            project(params, embeddings, embeddings)
        ),
    }
    return side_by_side(subjects, repeats)


def sharded(names: tuple[str, ...] = ("uniform", "bots", "adaptive")) -> None:
    """Prints, as JSON, seconds of a step over 10,000,000 tasks on all devices and how many tasks
    each holds.
    """
    mesh = meshes.make()
    figures = {}
    tasks, rates = world(SHARDED)
    tasks = meshes.place_table(tasks._replace(projections=None), mesh, SHARDED)
    with jax.set_mesh(mesh):
        for name in names:
            selector = make(name, GENERATIONS)
            state = meshes.place_table(jax.device_get(selector.init(tasks, SHARDED)), mesh, SHARDED)
            select = jax.jit(selector.select, static_argnames="batch_size", donate_argnums=1)
            update = jax.jit(selector.update, donate_argnums=0)
            for step in range(2):
                start = time.perf_counter()
                choice, state = select(jax.random.key(step), state, tasks, batch_size=BATCH)
                ids = np.asarray(choice.ids)
                solved = np.rint(GENERATIONS * rates[ids])
                state = jax.block_until_ready(
                    update(state, tasks, feedback(choice, solved, GENERATIONS))
                )
                figures[name] = {
                    "seconds": time.perf_counter() - start,
                    "distinct": len(set(ids.tolist())),
                }
            tables = [x for x in jax.tree.leaves(state) if x.shape[:1] == (SHARDED,)]
            figures[name]["tasks a device"] = max(
                x.addressable_shards[0].data.shape[0] for x in tables
            )
    print(json.dumps(figures))


def on_virtual_devices(count: int = 8) -> dict[str, Any]:
    """Runs `sharded` in a process of its own with `count` devices, and returns its figures."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-c", "from benchmarks import select; select.sharded()"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def quickstart(number: int = 12) -> float:
    """Measures the median seconds of a step of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=TINY,
            tasks=TasksConfig(source="builtin:digits"),
            select=SelectConfig(name="bots"),
            output_dir=folder,
            steps=number,
            max_prompt_length=16,
            max_completion_length=9,
            rewards=("exact",),
            learning_rate=1e-4,
            eval_steps=0,
            save_steps=number,
            batch_size=SMALL_BATCH,
            num_generations=SMALL_GENERATIONS,
        )
        train(config)
        lines = records.read(Path(folder) / "metrics.jsonl").entries
    seconds = [line["step_time"] for line in lines if "step_time" in line][2:]
    return statistics.median(seconds)


def estimate() -> dict[str, float]:
    """Estimates a lower bound for the seconds of a step of 1.5B parameters on eight H100."""
    rows = BATCH * GENERATIONS
    tokens = rows * (PROMPT + COMPLETION)
    learn = 6 * PARAMETERS * tokens / (CHIPS * PEAK * UTILIZATION)
    read = 2 * PARAMETERS + rows / CHIPS * (PROMPT + COMPLETION / 2) * CACHE
    return {"learn": learn, "rollout": COMPLETION * read / BANDWIDTH}


def tables(repeats: int) -> dict[str, dict[str, float]]:
    """Measures `steps` by the number of tasks: of the quickstart, of the paper and a million."""
    small = builtin.FAMILIES["digits"].size
    sizes = {"batch_size": SMALL_BATCH, "num_generations": SMALL_GENERATIONS}
    seconds = {str(small): steps(small, repeats, **sizes)}
    return seconds | {str(number): steps(number, repeats) for number in (PAPER, MILLION)}


PARTS: dict[str, Callable[[int], Any]] = {  # of the page, by the number of repeats
    "steps": tables,
    "quickstart": lambda repeats: quickstart(),
    "sharded": lambda repeats: on_virtual_devices(),
    "attention": predictions,
}


def page(parts: dict[str, Any]) -> str:
    """Formats the figures of all PARTS."""
    tables = parts["steps"]["figures"]
    small, paper, _ = tables.values()
    return PAGE.format(
        conditions="\n".join(f"* {name}: {x['conditions']}" for name, x in parts.items()),
        columns=" | ".join(f"{int(number):,} tasks" for number in tables),
        rules="--:|" * len(tables),
        rows="\n".join(_row(name, [*tables.values()]) for name in small),
        shares=_shares(small, paper, parts["quickstart"]["figures"]),
        spread="\n".join(
            f"* `{name}`: {x['seconds']:.2f} s a step, {x['tasks a device']:,} tasks a device"
            for name, x in parts["sharded"]["figures"].items()
        ),
        predictions="\n".join(
            f"* {name}: {x:.3f} s" for name, x in parts["attention"]["figures"].items()
        ),
    )


def _row(name: str, tables: list[dict[str, float]]) -> str:
    cells = (f"{1e3 * each[name]:.2f} ({each[name] / each[PUBLISHED]:.2f})" for each in tables)
    return f"| {name} | " + " | ".join(cells) + " |"


def _shares(small: dict[str, float], paper: dict[str, float], quickstart_step: float) -> str:
    """Formats a line a selector: its share of the quickstart's step, and of the step of 1.5B
    parameters.
    """
    bound = estimate()
    names = [name for name in small if name != PUBLISHED]
    return "\n".join(
        [
            f"* the quickstart: {quickstart_step:.3f} s, measured here",
            f"* 1.5B parameters: {sum(bound.values()):.2f} s, of which {bound['learn']:.2f} "
            "learning and "
            f"{bound['rollout']:.2f} decoding, the estimate below",
            "",
            "| | of the quickstart's | of 1.5B parameters' |",
            "|---|--:|--:|",
            *(
                f"| {name} | {small[name] / quickstart_step:.2%} "
                f"| {paper[name] / sum(bound.values()):.3%} |"
                for name in names
            ),
        ]
    )


PAGE = f"""# What choosing costs

`python -m benchmarks.select`. Medians, measured by turns. Part by part:

{{conditions}}

## A step: choose the tasks, learn from their rollouts

Milliseconds (and times the published estimator's): BOTS by its equations in numpy, float64, with a partial sort. The
first column with {SMALL_BATCH} tasks x {SMALL_GENERATIONS} rollouts, the others {BATCH} x {GENERATIONS}. `dots` between
reference sets; the prediction after a reference set is at the end.

| | {{columns}} |
|---|{{rules}}
{{rows}}

## Their share of a whole step

{{shares}}

The estimate is one from below, for {BATCH} x {GENERATIONS} rollouts of {PROMPT} + {COMPLETION} tokens among
{PAPER:,} tasks on {CHIPS} H100: 6 FLOPs a parameter and token at {UTILIZATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s, and
decoding no faster than parameters and key-value cache are read at {BANDWIDTH / 1e12:.2f} TB/s. The selection is what
it takes on this CPU.

## {SHARDED:,} tasks sharded over eight virtual devices

{{spread}}

## Attention: {QUERIES:,} tasks from {REFERENCES} references, E {EMBEDDING}, width {WIDTH}

{{predictions}}
"""  # noqa: E501


def machine() -> str:
    """Describes the machine and the versions of the packages."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy")
    )
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    cpu = next(
        (x.split(":")[1].strip() for x in _cpu() if x.startswith("model name")),
        platform.processor(),
    )
    return (
        f"{cpu}, {os.cpu_count()} cores, load {load}; Python {platform.python_version()}, "
        f"{versions}"
    )


def _cpu() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def earlier(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Reads the figures of parts measured before, if the file exists."""
    if not path.absolute().parent.is_dir():
        parser.error(f"the figures cannot be written to {path}: its folder does not exist")
    try:
        parts = read_json(path, dict) if path.exists() else {}
        keys = {"conditions", "figures"}
        valid = set(parts) <= set(PARTS) and all(keys <= set(x) for x in parts.values())
    except (OSError, TypeError, UnreadableJSON):  # no JSON, or JSON of something else
        parts, valid = {}, False
    if not valid:
        parser.error(
            f"{path} does not hold the figures of this benchmark: name another file, or delete it"
        )
    return parts


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.select", description=__doc__)
    parser.add_argument(
        "--repeats", type=whole_number("repeats", 1), default=15, help="steps whose median counts"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="what is measured"
    )
    parser.add_argument(
        "--json",
        type=path_argument,
        help="file of the figures by part; other parts stay, and all parts make a page",
    )
    options = parser.parse_args(arguments)
    parts = earlier(options.json, parser) if options.json else {}
    for name in options.parts:
        parts[name] = {"conditions": machine(), "figures": PARTS[name](options.repeats)}
    if options.json:
        options.json.write_text(json.dumps(parts, indent=1) + "\n")
    print(page(parts) if set(PARTS) <= set(parts) else json.dumps(parts, indent=1))


if __name__ == "__main__":
    _script.run(main)
