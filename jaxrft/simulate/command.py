"""The command: jaxrft simulate [--responses FILE.npz] [flags]."""

import json
import math
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from jaxrft import stats
from jaxrft.config import SelectConfig
from jaxrft.errors import shown
from jaxrft.fields import Checked, FilePath
from jaxrft.host import libtpu
from jaxrft.host.files import JSON
from jaxrft.report.compilation import counted_compilations
from jaxrft.report.console import Display
from jaxrft.report.picture import panels
from jaxrft.select import selectors
from jaxrft.select.base import Selector
from jaxrft.select.checks import check_batch, check_choice
from jaxrft.select.dots.predictor import Predictor, load_predictor, selector_options
from jaxrft.simulate import worlds
from jaxrft.simulate.oracle import oracle, reveal
from jaxrft.simulate.trials import Trace, run, scores
from jaxrft.types import InputError

FIGURES = ("effective_group_ratio", "signal", "mse", "pearson", "auc", "coverage")
ABILITY = "ability"  # of students only: a replayed policy does not learn
NEED_REFERENCES = ("bots", "easy_to_hard")
UNUSED = {"name": "selectors are named with --selectors", "embeddings": "the world has its own"}
MOST_GROUPS = 2**28  # of some 20 bytes
MOST_SEEDS = 2**31 - 1  # int32
ORACLE = "oracle"
GROUPS = "groups"  # rolled out; shown with dots, whose reference sets add to them


@dataclass(frozen=True)
class SimulateConfig(Checked):
    """Selectors compared without a language model, on synthetic students or on a replayed response
    matrix.

    A row a selector, means over the seeds and half the width of their 95 % intervals. effective:
    share of the groups that were informative, neither all right nor all wrong; signal: mean 4 p (1
    - p) of the chosen; mse, pearson: of the pass rates believed before a step, against the true
    ones of all tasks; auc: how well they predicted which of the chosen would be informative;
    coverage: share of the tasks rolled out in the last 50 steps; ability: of students, the mean
    pass rate at the end. uniform has no beliefs: with references, it is scored by the beliefs that
    bots would have after its rollouts.
    """

    responses: FilePath | None = None
    """An .npz with `responses` [policies, tasks] of 1 right, 0 wrong, -1 missing, rows sorted by
    ability, weakest first; optionally `embeddings` and `domain`. Replayed as one changing policy,
    the 4 % of the rows around a quantile; without it, synthetic students."""
    selectors: tuple[str, ...] = ("uniform", "bots", "adaptive")
    """Selectors to compare; also oracle, which knows the true pass rates."""
    predictor: FilePath | None = None
    """The predictor of `dots`, a .safetensors file of `jaxrft prepare predictor` for embeddings
    such as the world's.
    """
    steps: int = 200
    """Steps of a run."""
    batch_size: int = 16
    """Tasks per step."""
    num_generations: int = 16
    """Rollouts per task."""
    seeds: int = 5
    """Runs of each selector; all selectors run in the same world for a seed."""
    first_seed: int = 0
    """Seed of the first run; the next ones count up from it."""
    schedule: tuple[str, ...] = ("up",)
    """How the replayed policy moves between the quantiles `begin` and `end` of the rows: up, still
    (half-way), down, jump (at half-time). One for all tasks or one a domain; without domains, task
    i follows schedule i modulo them."""
    begin: float = 0.15
    """Quantile of the rows at which a replayed policy begins."""
    end: float = 0.85
    """Quantile at which it ends."""
    students: worlds.StudentConfig = worlds.StudentConfig()
    select: SelectConfig = SelectConfig()
    """Hyper-parameters of the selectors."""
    json: bool = False
    """Print the figures as a JSON list instead of a table."""
    plot: FilePath | None = None
    """Draw the runs into this file; the suffix chooses the format."""


def main(arguments: list[str], prog: str) -> int:
    """Parses, simulates and prints; returns the exit code. Raises InputError for a mistake of the
    user's.
    """
    from jaxrft import flags

    config = flags.parse(SimulateConfig, arguments, prog)
    if config.plot:
        _check_picture(Path(config.plot))
    with libtpu.quiet():
        jax.devices()
    traces, rows = simulate(config)
    print("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]" if config.json else table(rows))
    if config.plot:
        draw(traces, config.plot)
    return 0


def _check_picture(path: Path) -> None:
    """Raises InputError unless a picture can be written to `path`."""
    from matplotlib.backend_bases import FigureCanvasBase

    if not path.absolute().parent.is_dir():
        raise InputError(f"the picture cannot be written to {path}: its folder does not exist")
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.is_dir() or path.suffix[1:].lower() not in formats:
        raise InputError(
            f"the picture cannot be written to {path}: name a file that ends in .png, .svg or .pdf"
        )


def simulate(config: SimulateConfig) -> tuple[dict[str, Trace], list[dict[str, JSON]]]:
    """Runs every selector; returns the traces by selector, and a row of figures for each.

    The figures are means over the seeds, `ci95` their 95 % intervals, None = unknown. Shows its
    progress on the standard error.
    """
    names = _words("selectors", config.selectors, (*selectors.SELECTORS, ORACLE))
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"selectors are {shown(','.join(names))}: name {twice[0]} once")
    if not _has_references(config) and (
        asking := [name for name in names if name in NEED_REFERENCES]
    ):
        raise InputError(
            f"students.references is none, but {asking[0]} needs them: leave it out of --selectors"
        )
    for name, why in UNUSED.items():
        if getattr(config.select, name) != getattr(SelectConfig, name):
            raise InputError(
                f"select.{name} is an option of training, but here {why}: leave it out"
            )
    world = _world(config)
    check_batch(config.batch_size, world.num_tasks)
    predictor = _predictor(config) if "dots" in names else None
    traces = {}
    display = Display(len(names), unit="selector", stream=sys.stderr)
    with display, counted_compilations(display):
        for number, name in enumerate(names):
            display.status(f"simulating {name}")
            traces[name] = run(
                world,
                _selector(name, config, predictor),
                config.seeds,
                config.steps,
                batch_size=config.batch_size,
                first_seed=config.first_seed,
                reveal=reveal if name == ORACLE else None,
                predictor=predictor.params if predictor and name == "dots" else None,
                target=config.select.target,
            )
            display.advance(number + 1)
    figures = (
        *FIGURES,
        *([ABILITY] if config.responses is None else []),
        *([GROUPS] if predictor else []),
    )
    return traces, [_row(name, trace, world.num_tasks, figures) for name, trace in traces.items()]


def _predictor(config: SimulateConfig) -> Predictor:
    """Loads the predictor that dots uses; raises InputError if no file is named."""
    file = config.predictor or config.select.predictor
    if file is None:
        raise InputError(
            "the selector dots needs a file of `jaxrft prepare predictor`: name "
            "one with --predictor"
        )
    return load_predictor(file)


def _world(config: SimulateConfig) -> worlds.World:
    for name in ("steps", "batch_size", "num_generations", "seeds"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}: it must be at least 1")
    if not 0 <= config.first_seed <= MOST_SEEDS - config.seeds:
        raise InputError(
            f"first_seed is {config.first_seed}: it must be from 0 to {MOST_SEEDS:,} less the seeds"
        )
    if config.steps * config.batch_size * config.seeds > MOST_GROUPS:
        raise InputError(
            f"steps {config.steps}, batch_size {config.batch_size} and seeds {config.seeds} "
            "make more than "
            f"{MOST_GROUPS:,} groups, all of which are held in memory: lower one of them"
        )
    for name in ("begin", "end"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(
                f"{name} is {getattr(config, name)}: a quantile of the rows lies in [0, 1]"
            )
    replay_options = [
        name
        for name in ("schedule", "begin", "end")
        if getattr(config, name) != getattr(SimulateConfig, name)
    ]
    if config.responses is None and replay_options:
        raise InputError(
            f"{replay_options[0]} is an option of a replayed policy, but --responses is missing: "
            "name its answers with --responses"
        )
    if config.responses is None:
        return worlds.students(config.students, num_generations=config.num_generations)
    return worlds.replay(
        worlds.load(config.responses),
        steps=config.steps,
        num_generations=config.num_generations,
        schedule=_words("schedules", config.schedule, worlds.SCHEDULES),
        begin=config.begin,
        end=config.end,
    )


def _words(name: str, values: tuple[str, ...], options: Collection[str]) -> tuple[str, ...]:
    """Returns the words of a flag given as `a b` or `a,b`; raises InputError unless each is one of
    `options`.
    """
    words = tuple(word.strip() for value in values for word in value.split(","))
    if not any(words):
        raise InputError(f"{name} are none: name some of {', '.join(options)}")
    if not all(words):
        raise InputError(f"{name} are {shown(' '.join(values))}: a name is missing next to a comma")
    for word in words:
        check_choice(name.removesuffix("s"), word, options)
    return words


def _selector(name: str, config: SimulateConfig, predictor: Predictor | None) -> Selector:
    """Makes the selector called `name`.

    `uniform` has no beliefs. In a world with references it is scored by the beliefs that `bots`
    would have after its rollouts.
    """
    if name == ORACLE:
        return oracle(
            config.num_generations, target=config.select.target, balance=config.select.balance
        )
    fields = asdict(config.select)
    for unused in UNUSED:
        del fields[unused]
    fields |= selector_options(predictor) if predictor else {}
    chosen, bots = (
        selectors.make(each, config.num_generations, **fields) for each in (name, "bots")
    )
    return believing(chosen, bots) if name == "uniform" and _has_references(config) else chosen


def _has_references(config: SimulateConfig) -> bool:
    """Checks whether the world has pass rates of reference policies."""
    return config.responses is not None or config.students.references != "none"


def believing(chooser: Selector, believer: Selector) -> Selector:
    """Chooses tasks as `chooser`, and has the beliefs of `believer` after the same rollouts."""

    def select(key, state, tasks, *, batch_size, exclude=None):
        choice, chosen = chooser.select(
            key, state[0], tasks, batch_size=batch_size, exclude=exclude
        )
        return choice, (chosen, state[1])

    return Selector(
        init=lambda tasks, num_tasks: (
            chooser.init(tasks, num_tasks),
            believer.init(tasks, num_tasks),
        ),
        select=select,
        update=lambda state, tasks, feedback: (
            chooser.update(state[0], tasks, feedback),
            believer.update(state[1], tasks, feedback),
        ),
        pass_rate=lambda state, tasks: believer.pass_rate(state[1], tasks),
    )


def _row(name: str, trace: Trace, num_tasks: int, figures: tuple[str, ...]) -> dict[str, JSON]:
    """Builds the JSON row of a selector: the means of its figures and their 95 % intervals."""
    values = {key: value for key, value in scores(trace, num_tasks).items() if key in figures}
    return {
        "selector": name,
        **{key: _finite(value.mean()) for key, value in values.items()},
        "ci95": {key: _ends(value) for key, value in values.items()},
    }


def _ends(values: np.ndarray) -> list[float | None]:
    interval = stats.mean_interval(values)
    return [_finite(interval.low), _finite(interval.high)]


def _finite(x: float) -> float | None:
    """Rounds a number to six decimals for JSON; None for NaN and infinities."""
    return round(float(x), 6) if math.isfinite(x) else None


def table(rows: list[dict[str, JSON]]) -> str:
    """Formats the rows as a table: means and half the width of their 95 % intervals."""
    names = [key for key in rows[0] if key not in ("selector", "ci95")]
    width = max(len(row["selector"]) for row in rows)
    lines = [
        " " * width
        + "".join(f"  {name.replace('effective_group_ratio', 'effective'):>14}" for name in names)
    ]
    for row in rows:
        cells = [_cell(row[name], row["ci95"][name]) for name in names]
        lines.append(f"{row['selector']:<{width}}" + "".join(f"  {cell:>14}" for cell in cells))
    return "\n".join(lines)


def _cell(mean: float | None, ends: list[float | None]) -> str:
    if mean is None:
        return "-"
    low, high = ends
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ± {(high - low) / 2:.3f}"


def draw(traces: dict[str, Trace], out: str) -> None:
    """Writes a picture of informative groups, error and the policy's pass rate over the steps to
    `out`.
    """
    drawn = (
        (
            "share of informative groups",
            lambda trace: trace.informative.sum(axis=2) / trace.rolled.sum(axis=2),
            10,
        ),
        ("squared error of believed pass rates", lambda trace: trace.squared_error, 1),
        ("mean pass rate of the policy", lambda trace: trace.ability, 1),
    )
    with panels(len(drawn), out) as axes:
        for axis, (title, values, window) in zip(axes, drawn, strict=True):
            for name, trace in traces.items():
                kernel = np.ones(min(window, trace.ids.shape[1]))
                mean = np.convolve(
                    np.mean(values(trace), axis=0), kernel / kernel.size, mode="valid"
                )
                axis.plot(np.arange(kernel.size - 1, kernel.size - 1 + mean.size), mean, label=name)
            axis.set(title=title, xlabel="step", ylim=(0, None))
        axes[0].legend(frameon=False)
