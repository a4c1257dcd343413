"""`jaxrft eval`: measures a policy, saves the results, and compares them with the run's own."""

import dataclasses
import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from jaxrft import config as configs
from jaxrft import suites
from jaxrft.config import Config, TasksConfig
from jaxrft.errors import InputError
from jaxrft.fields import Checked, FilePath
from jaxrft.host.disk import writing
from jaxrft.host.files import JSON, UnreadableJSON, read_json, replace_file
from jaxrft.host.multihost import on_host0
from jaxrft.lm import config_json
from jaxrft.report import records
from jaxrft.stats import Interval
from jaxrft.train import estimates, figures
from jaxrft.train.evaluate import Measured, Which, evaluation_config, measure_policy

# Fields that change the figures of an evaluation.
SETTINGS = re.compile(
    r"evaluation\.(?!batch_size)|(seed|dtype|temperature|top_[pk]|min_p|"
    r"repetition_penalty|stop|max_prompt_length|max_completion_length|rewards|success_reward|"
    r"skip_special_tokens|reward_completions|"
    r"chat_template_kwargs)$"
)
ROUNDING = 1e-6


@dataclass(frozen=True)
class Options(Checked):
    """The command line of `jaxrft eval`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    checkpoint: Annotated[Which, tyro.conf.arg(metavar="[N]")] = None
    """Evaluate the checkpoint of step N of the run in output_dir, the newest without N; by default
    the model itself, which may be a run's folder: --model RUN is RUN/policy."""
    out: FilePath | None = None
    """File of the results, as JSON; by default <output_dir>/evaluations/<policy>.json, in which
    <policy> is step-<N> of a checkpoint, else the name of the model, with the names of suites."""
    suite: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=SOURCE")
    ] = ()
    """Evaluate on a benchmark in place of the config's held-out sets, asked and graded as is usual
    for it: gsm8k, math500, aime24, aime25, amc23, minerva_math, olympiadbench or gpqa_diamond.
    SOURCE is a file in the columns of the published one, or hub:OWNER/NAME. May be given several
    times. CONFIG may be left out then, with --model instead."""
    num_samples: int | None = None
    """Samples a task, of all sets; by default as the config says, and of a --suite 32 for aime24,
    aime25 and amc23, 4 for the others."""
    limit: int | None = None
    """Use only the first tasks of each set."""


class OwnFigures(NamedTuple):
    """What a run itself measured with the same draws."""

    run: Path | None  # its folder; None = no run has measured this policy
    step: int  # of the draws
    metrics: dict[str, float]  # empty = the run had no evaluation at the step
    differences: dict[str, tuple[JSON, JSON]]  # of settings: (now, the run's)


def run(options: Options) -> list[str]:
    """Evaluates and saves; returns the lines to print."""
    config = evaluated_config(options)
    measured = measure_policy(config, options.checkpoint, draws_of=step_of_draws)
    own = own_figures(config, measured)
    found = estimates.intervals(measured.trials)
    path = Path(options.out or default_path(config, measured, bool(options.suite)))
    document = as_json(config, measured, own, found)
    on_host0(lambda: _write(path, document))
    lines = figures.table(measured.trials, found, evaluation_config(config))
    relation = [] if options.suite else comparison(own, measured.metrics)
    return [*lines, *relation, f"saved in {path}"]


def suite_defaults() -> Config:
    """Returns the config of an evaluation on suites that is given no other: it lacks the model."""
    return Config(
        "model",
        TasksConfig(),
        ".",
        temperature=suites.TEMPERATURE,
        top_p=suites.TOP_P,
        max_prompt_length=suites.MAX_PROMPT_LENGTH,
        max_completion_length=suites.MAX_COMPLETION_LENGTH,
    )


def evaluated_config(options: Options) -> Config:
    """Returns the config whose held-out sets are those to evaluate on, as the options say.

    Raises InputError for a suite that is not known or is given twice.
    """
    config = options.config
    sets = tuple(map(suite_tasks, options.suite)) or config.evaluation.tasks
    names = [tasks.title for tasks in sets]
    if options.suite and (twice := {name for name in names if names.count(name) > 1}):
        raise InputError(f"--suite {min(twice)} is given twice: evaluate on one file at a time")
    changes = {"num_samples": options.num_samples, "limit": options.limit}
    given = {name: value for name, value in changes.items() if value is not None}
    if not (given or options.suite):
        return config
    sets = tuple(dataclasses.replace(tasks, **given) for tasks in sets)
    return dataclasses.replace(
        config,
        keep_best=None,
        early_stopping_patience=0,
        evaluation=dataclasses.replace(config.evaluation, tasks=sets),
    )


def suite_tasks(text: str) -> TasksConfig:
    """Returns the held-out set of an argument NAME=SOURCE, with the usual number of samples.

    Of the hub it is the split of the benchmark's data set.
    """
    name, separator, source = text.partition("=")
    if not (separator and source):
        raise InputError(f"--suite is {text!r}: give NAME=FILE, such as math500=test.jsonl")
    suite = suites.SUITES.get(name)
    if suite is None:
        raise InputError(f"--suite is {text!r}: {configs.nearest_suite(name)}")
    tasks = TasksConfig(source, suite=name, num_samples=suite.num_samples)
    if source.startswith("hub:"):
        return dataclasses.replace(tasks, split=suite.split, subset=suite.subset)
    return tasks


def step_of_draws(config: Config, folder: Path) -> int:
    """Returns the step whose draws an evaluation of the model in `folder` uses: that of the run
    which has measured it.

    It is 0 for the model that the run in output_dir began with, else the step that an exported
    policy is of, else 0.
    """
    if _began_with(config):
        return 0
    return exported_step(folder) or 0


def exported_step(folder: Path) -> int | None:
    """Returns the step that a policy was exported at; None for a folder that says none."""
    step = _recorded(folder).get(config_json.STEP)
    return step if type(step) is int else None


def _began_with(config: Config) -> bool:
    """Checks whether the run in output_dir began with `config.model`."""
    return _recorded(Path(config.output_dir)).get("model") == config.model


def _recorded(folder: Path) -> dict[str, JSON]:
    """Reads the config.json of the run or the policy in a folder; {} if there is none."""
    try:
        return read_json(folder / "config.json", dict)
    except (OSError, UnreadableJSON):
        return {}


def own_figures(config: Config, measured: Measured) -> OwnFigures:
    """Finds what the policy's run measured at the step of the draws, and with which settings."""
    folder = Path(config.output_dir)
    if measured.checkpoint is None and not _began_with(config):
        folder = measured.folder.parent
        if exported_step(measured.folder) is None or not (folder / "metrics.jsonl").is_file():
            return OwnFigures(None, measured.step, {}, {})
    if not (folder / "metrics.jsonl").is_file():
        return OwnFigures(None, measured.step, {}, {})
    metrics: dict[str, float] = {}
    for entry in records.read(folder / "metrics.jsonl").entries:
        if entry["step"] == measured.step:
            metrics |= {
                name: value
                for name, value in entry.items()
                if name.startswith("eval/") and isinstance(value, int | float)
            }
    differences = configs.differences(measured.config, _recorded(folder))
    relevant = {name: pair for name, pair in differences.items() if SETTINGS.match(name)}
    return OwnFigures(folder, measured.step, metrics, relevant)


def comparison(own: OwnFigures, metrics: dict[str, float]) -> list[str]:
    """Says how the figures relate to those of the run."""
    if own.run is None:
        return [
            f"no run to compare with: the draws are those of step {own.step}; --checkpoint N "
            "evaluates a policy of the run in output_dir with the draws of its own evaluation"
        ]
    if own.differences:
        changed = ", ".join(_change(name, *pair) for name, pair in own.differences.items())
        return [f"not comparable with the figures of the run in {own.run}: {changed}"]
    if not own.metrics:
        return [
            f"the run in {own.run} has no evaluation of step {own.step}; with the same settings "
            "and the same draws, it would have measured this"
        ]
    differ = [
        f"{name} {value:.4f}"
        for name, value in own.metrics.items()
        if name in metrics and abs(metrics[name] - value) > ROUNDING
    ]
    where = f"the run in {own.run} measured"
    if not differ:
        return [f"{where} the same at step {own.step}: the draws are the same"]
    return [
        f"{where} {', '.join(differ)} at step {own.step}, with the same draws: rounding on other "
        "devices changes some samples"
    ]


def _change(name: str, now: JSON, before: JSON) -> str:
    """Says how a setting differs from that of the run; of sets of tasks, in which fields."""
    if not (isinstance(now, list) or isinstance(before, list)):
        return f"{name} is {now!r}, there it was {before!r}"
    fields: set[str] = set()
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        for one, other in zip(now, before, strict=True):
            if isinstance(one, dict) and isinstance(other, dict):
                fields |= {key for key in one | other if one.get(key) != other.get(key)}
    return f"{name} differs" + (f" in {', '.join(sorted(fields))}" if fields else "")


def default_path(config: Config, measured: Measured, on_suites: bool = False) -> Path:
    """Returns the file of the results of a policy, whose name has those of suites."""
    name = f"step-{measured.checkpoint}"
    if measured.checkpoint is None:
        is_folder = Path(config.model).is_dir()
        name = "-".join(measured.folder.absolute().parts[-2:]) if is_folder else config.model
    if on_suites:
        name = "-".join([name, *measured.trials])
    safe = re.sub(r"[^\w.@-]+", "-", name)
    return Path(config.output_dir) / "evaluations" / f"{safe}.json"


def as_json(
    config: Config, measured: Measured, own: OwnFigures, found: dict[str, Interval]
) -> dict[str, JSON]:
    """Returns the results as a document."""
    return {
        "model": config.model,
        "checkpoint": measured.checkpoint,
        "step_of_draws": measured.step,
        "metrics": measured.metrics | {name: each.mean for name, each in found.items()},
        "intervals": {name: [each.low, each.high] for name, each in found.items()},
        "run": {
            "folder": None if own.run is None else str(own.run),
            "metrics": own.metrics,
            "different_settings": {name: list(pair) for name, pair in own.differences.items()},
        },
        "tasks": {
            name: {
                "row": (trials.rows + 1).tolist(),
                "domain": [trials.domains[number] for number in trials.domain],
                "greedy": trials.greedy.tolist(),
                "samples": trials.samples.success.tolist(),
                "lengths": trials.samples.lengths.tolist(),
                "truncated": trials.samples.truncated.tolist(),
                "majority": trials.samples.majority.ravel().tolist(),
            }
            for name, trials in measured.trials.items()
        },
        "jaxrft": importlib.metadata.version("jaxrft"),
        "config": dataclasses.asdict(measured.config),
    }


def _write(path: Path, document: dict[str, JSON]) -> None:
    with writing(path.parent, "give another file with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(document) + "\n")
