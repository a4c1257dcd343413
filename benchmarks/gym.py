"""Checks the scorers of reasoning_gym, family by family, as the reward `gym` calls them.

    python -m benchmarks.gym --tasks 4 --families sudoku zebra_puzzles

Prints, for each family, the least score of its own answers; of the answers of other tasks the
highest score and how many score 1; the highest score of all answers at once, and of answers that
know nothing of the task.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import tyro

from benchmarks import _script
from jaxrft.errors import InputError
from jaxrft.fields import Checked
from jaxrft.rewards.gym import GymReward
from jaxrft.rewards.inside import plain
from jaxrft.tasks.gym import Maker

GUESSES = ("0", "True", "I do not know")
EXAMPLES = ("possible_answer", "example_answer", "example_correct_answer")


class Scores(NamedTuple):
    """What answers to tasks of one family are worth."""

    own: float  # least
    different: int  # tasks whose neighbor has another answer
    other: float  # highest
    others_solved: int
    together: float  # highest
    guesses: tuple[float, ...]  # highest of each


def make(family: str, count: int, maker: Maker) -> tuple[list[dict], list[str]]:
    """Makes tasks; returns ground truths and right answers, fewer where none is known.

    Where a task has no answer, its metadata may have one as an example.
    """
    config = {"seed": 7 << 20, "size": count}
    items = [(0, i) for i in range(count)]
    made = maker.ask({"dataset": family, "configs": [config], "items": items})
    truths = [{"gym": family, "config": config, "entry": task["entry"]} for task in made]
    answers = [answer for task in made if (answer := _answer(task)) is not None]
    return truths, answers


def _answer(task: dict) -> str | None:
    if task["answer"] is not None:
        return task["answer"]
    entry = plain.decode(task["entry"])
    metadata = entry["metadata"] if isinstance(entry, dict) else {}
    examples = [metadata[name] for name in EXAMPLES if name in metadata]
    if not examples:
        return None
    return examples[0] if isinstance(examples[0], str) else json.dumps(examples[0])


def measure(family: str, count: int, reward: GymReward, maker: Maker) -> Scores | None:
    """Scores answers to `count` tasks; None where no right answer is known."""
    truths, answers = make(family, count, maker)
    if len(answers) < count:
        return None

    def score(texts: list[str], solutions: list[dict]) -> list[float]:
        completions = [f"<answer>{text}</answer>" for text in texts]
        return [value or 0.0 for value in reward(completions, completions, answer=solutions)]

    neighbors = answers[1:] + answers[:1]
    pairs = [
        (other, truth)
        for other, own, truth in zip(neighbors, answers, truths, strict=True)
        if other != own
    ]
    others = score([other for other, _ in pairs], [truth for _, truth in pairs])
    return Scores(
        own=min(score(answers, truths)),
        different=len(pairs),
        other=max(others, default=0.0),
        others_solved=sum(value == 1 for value in others),
        together=max(score([" ".join(dict.fromkeys(answers))] * count, truths)),
        guesses=tuple(max(score([guess] * count, truths)) for guess in GUESSES),
    )


@dataclass(frozen=True)
class Options(Checked):
    """Checks the scorers of reasoning_gym, and prints a line of JSON for each family."""

    tasks: int = 4
    """Tasks of a family, at least 2."""
    families: tuple[str, ...] = ()
    """Families; all by default."""

    def __post_init__(self) -> None:
        """Raises InputError for numbers out of range, too."""
        super().__post_init__()
        if self.tasks < 2:
            raise InputError(f"tasks is {self.tasks}: it must be at least 2")


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.gym")
    reward = GymReward(seconds=30.0)
    reward.start_in_worker()
    try:
        with Maker("") as maker:
            families = options.families or maker.ask({"dataset": ""})["families"]
            for family in families:
                scores = measure(family, options.tasks, reward, maker)
                fields = {"no answer": True} if scores is None else scores._asdict()
                print(json.dumps({"family": family} | fields), flush=True)
    finally:
        reward.close()


if __name__ == "__main__":
    _script.run(main)
