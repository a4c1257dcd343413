"""Tasks of reasoning_gym: one family, with options in the form `gym:zebra_puzzles?num_people=4-6`.

Tasks are made in a process of their own with a fixed hash seed, on which some families depend; so
every host and every start of a run has the same ones.
"""

import difflib
import itertools
import json
import os
import re
import subprocess
import tempfile
from contextlib import suppress
from typing import NamedTuple

from jaxrft.errors import Missing
from jaxrft.host import launch
from jaxrft.host.files import JSON
from jaxrft.host.installation import install_command
from jaxrft.tasks.files import Columns
from jaxrft.types import InputError

INSTRUCTION = "Write the final answer, and nothing else, between <answer> and </answer>."
SIZE = 500  # tasks, unless `size` says otherwise; reasoning_gym's own default
LARGEST = 1 << 20  # tasks of a seed: reasoning_gym adds a task's number to its seed
SEEDS = 4096  # so that all seeds fit into 32 bits
COMBINATIONS = 256  # of the values of ranges
_RANGE = re.compile(r"(-?[0-9]+)-(-?[0-9]+)")

Options = dict[str, JSON]


class Source(NamedTuple):
    """What the name of a source says."""

    family: str
    size: int
    seed: int
    values: dict[str, str]  # of the family's own options


def load(name: str) -> Columns:
    """Makes the tasks of `FAMILY?size=500&seed=0&OPTION=VALUE`.

    An option is a field of the family's configuration. Of fields `min_x` and `max_x`, `x=4-6` gives
    both; of one integer, `x=4-6` makes as many tasks of each of 4, 5 and 6, in turn. Columns:
    `prompt` messages, `answer` what the reward `gym` needs, `reference` an answer in text or None,
    `domain` the family, `difficulty` as the family tells it. Raises InputError.
    """
    source = parse(name)
    with Maker(name) as maker:
        described = maker.ask({"dataset": source.family})
        if "options" not in described:
            raise InputError(_unknown_family(source.family, described["families"]))
        configs = configurations(source, described["options"])
        share = -(-source.size // len(configs))
        common = {"seed": source.seed * LARGEST, "size": share}
        full = [config | common for config in configs]
        items = [(i % len(full), i // len(full)) for i in range(source.size)]
        tasks = maker.ask({"dataset": source.family, "configs": full, "items": items})
    prompts = [f"{task['question'].rstrip()}\n\n{INSTRUCTION}" for task in tasks]
    return {
        "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
        "answer": [
            {"gym": source.family, "config": full[number], "entry": task["entry"]}
            for (number, _), task in zip(items, tasks, strict=True)
        ],
        "reference": [task["answer"] for task in tasks],
        "domain": [source.family] * len(tasks),
        "difficulty": [task["difficulty"] for task in tasks],
    }


def parse(name: str) -> Source:
    """Reads the name of a source; raises InputError."""
    family, _, query = name.partition("?")
    values: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or key in values:
            wrong = "is there twice" if key in values else "has no value"
            raise InputError(
                f"tasks.source gym:{name}: the option {key} {wrong}: give options as in "
                "gym:zebra_puzzles?size=500&num_people=4-6"
            )
        values[key] = value
    size = _integer(values.pop("size", str(SIZE)), "size", 1, LARGEST)
    seed = _integer(values.pop("seed", "0"), "seed", 0, SEEDS - 1)
    return Source(family, size, seed, values)


def _integer(value: str, option: str, least: int, most: int) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or not least <= int(value) <= most:
        raise InputError(
            f"tasks.source: the option {option} is {value!r}: give an integer from {least} to "
            f"{most}"
        )
    return int(value)


def _unknown_family(family: str, families: list[str]) -> str:
    near = difflib.get_close_matches(family, families, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(families)}"
    return f"reasoning_gym has no family {family!r}: {hint}"


def configurations(source: Source, defaults: Options) -> list[Options]:
    """Returns the configurations of a source: one, or one for each combination of its ranges."""
    fixed: Options = {}
    ranges: dict[str, list[JSON]] = {}
    for option, text in source.values.items():
        pair = (f"min_{option}", f"max_{option}")
        whole = _RANGE.fullmatch(text)
        if option not in defaults and pair[0] in defaults and pair[1] in defaults:
            low, high = whole.groups() if whole else (text, text)
            fixed[pair[0]] = _value(option, low, defaults[pair[0]])
            fixed[pair[1]] = _value(option, high, defaults[pair[1]])
        elif option not in defaults:
            raise InputError(_unknown_option(source.family, option, defaults))
        elif whole and _is_integer(defaults[option]):
            low, high = map(int, whole.groups())
            ranges[option] = list(range(low, high + 1))
            if not 0 < len(ranges[option]) <= COMBINATIONS:
                raise InputError(
                    f"the option {option} of {source.family} is {text}: give a range of 1 to "
                    f"{COMBINATIONS} values"
                )
        else:
            fixed[option] = _value(option, text, defaults[option])
    combined = [
        fixed | dict(zip(ranges, values, strict=True))
        for values in itertools.islice(itertools.product(*ranges.values()), COMBINATIONS + 1)
    ]
    if len(combined) > COMBINATIONS:
        raise InputError(
            f"the ranges of {source.family} have more than {COMBINATIONS} combinations: give "
            "fewer, or several sets of tasks"
        )
    return combined


def _unknown_option(family: str, option: str, defaults: Options) -> str:
    names = [name for name in defaults if name not in ("size", "seed")]
    bounds = {name[4:] for name in names if name.startswith("min_")}
    names += sorted(name for name in bounds if f"max_{name}" in names)
    near = difflib.get_close_matches(option, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(['size', 'seed', *names])}"
    return f"{family} has no option {option}: {hint}"


def _is_integer(value: JSON) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _value(option: str, text: str, default: JSON) -> JSON:
    """Reads the value of an option, whose type is that of its default."""
    if isinstance(default, str):
        return text
    value: JSON
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text.split(",")
    if isinstance(default, float) and _is_integer(value):
        value = float(value)
    if default is not None and type(value) is not type(default):
        kind = {list: "a list", bool: "true or false"}.get(type(default), type(default).__name__)
        raise InputError(
            f"the option {option} is {text!r}: its default is {json.dumps(default)}, give {kind}"
        )
    return value


class Maker:
    """The process that has reasoning_gym; a context manager, with which it ends.

    It runs in an empty folder, for some families execute programs, which may write files.
    """

    def __init__(self, name: str) -> None:
        """Starts the process; `name` is that of the source."""
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="jaxrft-gym-")
        self._process = subprocess.Popen(
            launch.command("jaxrft.rewards.inside.gym"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._folder.name,
            env=os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Maker":
        """Returns the process itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def ask(self, request: dict[str, JSON]) -> JSON:
        """Returns the answer to a request; raises InputError for what cannot be made."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise InputError(
                f"reasoning_gym fails to make gym:{self._name} ({last[:200]}): change its options"
            )
        answer = json.loads(line)
        if isinstance(answer, dict) and "missing" in answer:
            raise Missing(
                f"tasks.source gym:NAME needs the package reasoning-gym ({answer['missing']}): "
                f"{install_command('gym')}"
            )
        if isinstance(answer, dict) and "error" in answer:
            raise InputError(f"reasoning_gym refuses gym:{self._name}: {answer['error']}")
        return answer
