"""The README.md of an exported policy: a model card with the facts of its run."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import metadata_load
from yaml import YAMLError

from jaxrft.config import SAMPLING, Config, SelectConfig, TasksConfig
from jaxrft.errors import InputError
from jaxrft.fields import is_path
from jaxrft.host.files import JSON, UnreadableJSON, read_json
from jaxrft.host.multihost import on_host0
from jaxrft.host.terminal import escaped
from jaxrft.host.yaml_files import format_yaml
from jaxrft.lm import hub
from jaxrft.report import records
from jaxrft.rewards.lookup import REWARDS

Kind = Literal["policy", "best", "adapter"]

LONGEST = 200  # characters of a text in a table
# one line without what YAML or Markdown reads, as the licenses of the hub are
_LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)
_LINK = re.compile(r"https?://[\w./?=&%#~+:@-]{1,300}", re.ASCII)
_TICKS = re.compile("`+")
MAX_CARD_BYTES = 1 << 20  # of a base model's; the longest of the hub have some 100 kB
RUN_FILE = "run.yaml"
MARK = "..."  # stands for the folders of an absolute path


class Facts(NamedTuple):
    """What a card says."""

    config: Config
    step: int  # of the policy
    kind: Kind
    base: Path  # folder of the model that the run began with
    entries: dict[int, dict[str, JSON]]  # metrics by step
    versions: dict[str, JSON]  # of versions.json


def model_card(config: Config, step: int, base: Path, kind: Kind = "policy") -> str | None:
    """Returns the README.md of the policy that the run in `config.output_dir` had after `step`
    steps.

    `base` is the folder of the model that it began with. Reads metrics.jsonl and versions.json;
    what they lack is said to be unknown. All processes call it; it is None on all but the first.
    """
    return on_host0(lambda: render(_facts(config, step, base, kind)))


def _facts(config: Config, step: int, base: Path, kind: Kind) -> Facts:
    folder = Path(config.output_dir)
    entries: dict[int, dict[str, JSON]] = {}
    with contextlib.suppress(InputError):  # a policy is written whatever became of its metrics
        for entry in records.read(folder / "metrics.jsonl", step).entries:
            entries[entry["step"]] = entries.get(entry["step"], {}) | entry
    try:
        versions = read_json(folder / "versions.json", dict)
    except (OSError, UnreadableJSON):
        versions = {}
    return Facts(config, step, kind, base, entries, versions)


def render(facts: Facts) -> str:
    """Returns the card: the header that the hub reads, then facts for people."""
    name = _code(Path(os.path.abspath(facts.config.output_dir)).name)
    parts = (
        f"---\n{format_yaml(_header(facts))}---\n\n# {name}, step {facts.step}",
        _introduction(facts),
        "## Run\n\n" + _table(("", ""), _run(facts)),
        "## Evaluation\n\n" + "\n\n".join(_evaluation(facts)),
        "## To repeat it\n\n" + "\n\n".join(_repeat(facts.config)),
        "## What it has not been tested for\n\n" + _untested(facts),
    )
    return "\n\n".join(parts) + "\n"


# The header


def _header(facts: Facts) -> dict[str, JSON]:
    """Returns what the hub reads: nothing that is only likely."""
    config = facts.config
    repository = _repository(config.model)
    adapter = facts.kind == "adapter"
    header: dict[str, JSON] = {}
    if repository is not None:
        relation = "adapter" if adapter else "finetune"
        header |= {"base_model": repository, "base_model_relation": relation}
    header |= {"library_name": "peft" if adapter else "transformers"}
    header |= {"pipeline_tag": "text-generation"} | _license(facts.base)
    names = [each.source.partition(":")[2] for each in config.task_sets if _on_hub(each)]
    if names:
        header["datasets"] = list(dict.fromkeys(name.partition("@")[0] for name in names))
    tags = ["jaxrft", "reinforcement-learning", "grpo", config.loss_type.replace("_", "-")]
    header["tags"] = [*dict.fromkeys(tags), *(["lora"] if config.lora.rank else [])]
    return header


def _repository(model: str) -> str | None:
    """Returns owner/name of a model of the hub; None for a folder."""
    found = None if Path(model).is_dir() else hub.ID.fullmatch(model)
    return found[1] if found else None


def _on_hub(tasks: TasksConfig) -> bool:
    kind, _, name = tasks.source.partition(":")
    return kind == "hub" and hub.ID.fullmatch(name) is not None


def _license(base: Path) -> dict[str, JSON]:
    """Returns the license that the README.md of a model's folder declares; {} if none is known."""
    path = base / "README.md"
    rules = {"license": _LICENSE, "license_name": _LICENSE, "license_link": _LINK}
    try:
        readable = path.is_file() and path.stat().st_size <= MAX_CARD_BYTES
        header: object = metadata_load(path) if readable else None
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}
    if not isinstance(header, dict):
        return {}
    found = {
        name: header[name]
        for name, rule in rules.items()
        if isinstance(header.get(name), str) and rule.fullmatch(header[name])
    }
    return found if "license" in found else {}


# The facts


def _introduction(facts: Facts) -> str:
    config = facts.config
    model = _code(shown_path(config.model))
    if Path(config.model).is_dir():
        model = f"the model in a folder, {model},"
    what = {"policy": "The policy", "best": "The best policy", "adapter": "LoRA adapters"}
    sentence = (
        f"{what[facts.kind]} of a run of jaxrft {_version(facts, 'jaxrft')} that finetuned {model} "
        "by reinforcement learning, on tasks whose answers a program grades. It is that after step "
        f"{facts.step} of {config.steps}."
    )
    if facts.kind == "adapter":
        sentence = sentence.replace("It is that", "They are those")
        sentence += " peft opens them on top of that model."
    if facts.kind == "best":
        number = len([step for step, x in facts.entries.items() if step and _has_evaluation(x)])
        sentence += (
            f" It was chosen by {_code(config.keep_best)}, the highest of {number} evaluations so "
            "far, so that this figure is too high by chance."
        )
    return sentence


def _run(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yields (name, value) of what was trained, on what and how, in Markdown."""
    config = facts.config
    last = facts.entries.get(facts.step, {})
    yield "base model", _code(shown_path(config.model))
    if not _license(facts.base):
        yield "license", "not stated in the base model's folder"
    yield "trained", _trained(config)
    yield "tasks", ", ".join(_code(shown_path(each.source)) for each in config.task_sets)
    yield "number of tasks", _count(facts.versions.get("training tasks"))
    yield "rewards", ", ".join(map(_reward, config.rewards))
    if config.success_reward is not None:
        yield "success is", _code(_shown_reward(config.success_reward))
    yield "selector", _selector(config.select)
    yield "a step", f"{config.batch_size} tasks x {config.num_generations} rollouts"
    yield "rollouts", _count(last.get("rollouts"))
    yield "tokens sampled", _count(last.get("num_tokens"))
    yield "loss", f"{config.loss_type}, advantages by {config.scale_rewards}"
    schedule = f"{config.learning_rate:g}, {config.learning_rate_schedule}"
    yield (
        "learning rate",
        schedule
        + (f" after {config.warmup_steps} updates of warm-up" if config.warmup_steps else ""),
    )
    yield "arithmetic", f"{config.dtype}; the weights here are float32"
    yield "seed", f"{config.seed}"
    yield "devices", _text(facts.versions.get("devices"))
    packages = (name for name in facts.versions if name not in NO_PACKAGES)
    versions = ", ".join(f"{_text(name)} {_version(facts, name)}" for name in packages)
    yield "versions", versions or "not recorded"


NO_PACKAGES = ("devices", "training tasks", "held-out tasks")  # in versions.json


def _trained(config: Config) -> str:
    lora = config.lora
    if not lora.rank:
        return "all weights"
    return f"LoRA adapters of rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.targets)}"


def _reward(name: str) -> str:
    if name in REWARDS:
        return _code(name)
    if ":" not in name:
        return f"{_code(name)} (a function in Python, not in this folder)"
    return f"{_code(_shown_reward(name))} (the user's own, not in this folder)"


def _selector(select: SelectConfig) -> str:
    """Names the selector, and its hyper-parameters that are not the defaults."""
    fields = _changed(select)
    fields.pop("name", None)
    return ", ".join([_code(select.name), *(f"{name} {_code(x)}" for name, x in fields.items())])


def _evaluation(facts: Facts) -> Iterator[str]:
    """Yields paragraphs: the figures before and after, and how they were measured."""
    sampling = facts.config.evaluation
    before = facts.entries.get(0, {})
    after = facts.entries.get(facts.step, {})
    numbers = facts.versions.get("held-out tasks")
    rows = [
        (
            _code(tasks.title),
            _count(numbers.get(tasks.title) if isinstance(numbers, dict) else None),
            kind,
            _figure(before.get(f"eval/{tasks.title}/{kind}")),
            _figure(after.get(f"eval/{tasks.title}/{kind}")),
        )
        for tasks in sampling.tasks
        for kind in _kinds(facts.config.samples_of(tasks))
    ]
    if not rows or not (_has_evaluation(before) or _has_evaluation(after)):
        yield f"There is none of step {facts.step}."
        return
    if not _has_evaluation(after):
        yield f"There is none of step {facts.step}, only the one before training."
    yield _table(("held-out set", "tasks", "success", "before", f"after step {facts.step}"), rows)
    sets = ", ".join(
        f"{_code(each.title)} is {_code(shown_path(each.source))}" for each in sampling.tasks
    )
    sentence = f"Sets: {sets}. greedy is the success of one completion a task of likeliest tokens"
    counts = {facts.config.samples_of(tasks) for tasks in sampling.tasks} - {0}
    if counts:
        k = counts.pop() if len(counts) == 1 else "k"
        sentence += (
            f"; avg@{k} the mean success of {k} samples a task, and pass@{k} the share of tasks "
            f"that at least one of them solves. {_sampling(facts.config)}"
        )
    yield sentence.removesuffix(".") + "."


def _kinds(k: int) -> list[str]:
    """Returns the figures of a held-out set with `k` samples a task."""
    return ["greedy", *([f"avg@{k}", f"pass@{k}"] if k else [])]


def _has_evaluation(entry: Mapping[str, JSON]) -> bool:
    return any(name.startswith("eval/") for name in entry)


def _sampling(config: Config) -> str:
    """Says how the samples of evaluations are drawn."""
    given = {
        name: getattr(config if value is None else config.evaluation, name)
        for name in SAMPLING
        for value in [getattr(config.evaluation, name)]
    }
    drawn = f"Samples are drawn at temperature {given['temperature']:g}"
    drawn += f", top_p {given['top_p']:g}" if given["top_p"] < 1 else ""
    drawn += f", top_k {given['top_k']}" if given["top_k"] else ""
    drawn += f", min_p {given['min_p']:g}" if given["min_p"] else ""
    drawn += f"; completions have at most {given['max_completion_length']:,} tokens"
    penalty = given["repetition_penalty"]
    drawn += f", a repetition penalty of {penalty:g}" if penalty != 1 else ""
    stop = ", ".join(_code(text) for text in given["stop"])
    return f"{drawn}, and end with any of {stop}" if stop else drawn


def _repeat(config: Config) -> Iterator[str]:
    """Yields paragraphs: the config without defaults, and the command that runs it."""
    text = format_yaml(run_fields(config))
    fence = "`" * max(3, 1 + max(map(len, _TICKS.findall(text)), default=0))
    yield f"With the fields that are not the defaults in a file `{RUN_FILE}`:"
    yield f"{fence}yaml\n{text}{fence}"
    yield f"```bash\njaxrft train {RUN_FILE}\n```"
    if f"{MARK}/" in text:
        yield f"`{MARK}/` stands for a folder of the machine of the run: write your own there."


def _untested(facts: Facts) -> str:
    """Says which claims the run does not support."""
    measured = _has_evaluation(facts.entries.get(facts.step, {}))
    numbers = facts.versions.get("held-out tasks")
    sizes = [x for x in numbers.values() if _is_count(x)] if isinstance(numbers, dict) else []
    first = (
        "Success was measured on the held-out sets above only, with their prompts and the sampling "
        "that is described there."
        if measured
        else "Success of this policy on held-out tasks was not measured."
    )
    if measured and sizes and min(sizes) > 0:
        # the widest normal interval of a share, p = 1/2
        half_width = 1.96 * (0.25 / min(sizes)) ** 0.5
        first += (
            f" Over {min(sizes):,} tasks, chance alone moves a figure by up to {half_width:.3f} "
            "(95 %)."
        )
    return (
        f"* {first}\n"
        "* Nothing else was measured: no other tasks, prompts or languages, no other abilities of "
        "the base model, which finetuning may have cost, and no safety.\n"
        "* Rewards are programs. A policy may have found answers that they accept and a person "
        "would not."
    )


# The config


def run_fields(config: Config) -> dict[str, JSON]:
    """Returns the fields of a config that repeat its run, as JSON: those that are not defaults.

    Absolute paths are cut to their last names, since they say where things are on one machine.
    `reward_path` keeps relative paths only, and `output_dir` is a name.
    """
    fields = _changed(config)
    fields["output_dir"] = Path(os.path.abspath(config.output_dir)).name or "run"
    fields["rewards"] = [_shown_reward(name) for name in config.rewards]
    folders = [path for path in config.reward_path if not os.path.isabs(path)]
    fields.pop("reward_path", None)
    return fields | ({"reward_path": folders} if folders else {})


def _changed(section: Any) -> dict[str, JSON]:
    """Returns the fields of a config, or of a section of it, whose values are not the defaults."""
    return {
        field.name: _as_json(getattr(section, field.name), is_path(field.type))
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != field.default
    }


def _as_json(value: Any, path: bool) -> JSON:
    if dataclasses.is_dataclass(value):
        return _changed(value)
    if isinstance(value, tuple):
        return [_as_json(item, path) for item in value]
    return shown_path(value) if path and isinstance(value, str) else value


def shown_path(path: str) -> str:
    """Returns a path as it was given, or the last name of an absolute one behind an ellipsis.

    >>> shown_path("/home/someone/data/tasks.jsonl"), shown_path("data/tasks.jsonl")
    ('.../tasks.jsonl', 'data/tasks.jsonl')
    """
    return f"{MARK}/{os.path.basename(path.rstrip('/'))}" if os.path.isabs(path) else path


def _shown_reward(name: str) -> str:
    place, colon, attribute = name.rpartition(":")
    return f"{shown_path(place)}{colon}{attribute}"


# Markdown


def _code(value: object) -> str:
    """Formats foreign text as a code span: one line in which nothing is markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = escaped(text, keep="")
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    fence = "`" * (1 + max(map(len, _TICKS.findall(text)), default=0))
    space = " " if not text.strip() or {text[0], text[-1]} & {"`", " "} else ""
    return f"{fence}{space}{text}{space}{fence}"


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    """Formats a table; a cell may hold code spans, in which a bar is no border either."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(map(_row, lines))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: JSON) -> str:
    return f"{value:,.0f}" if _is_count(value) else "not recorded"


def _figure(value: JSON) -> str:
    return f"{value:.3f}" if _is_count(value) else "not measured"


def _text(value: JSON) -> str:
    """Formats a text of versions.json, which has no markup unless someone wrote some into it."""
    if value is None:
        return "not recorded"
    return value if re.fullmatch(r"[\w .,+()-]{1,200}", f"{value}") else _code(f"{value}")


def _version(facts: Facts, name: str) -> str:
    return _text(facts.versions.get(name))
