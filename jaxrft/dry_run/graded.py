"""Do the rewards know a right answer when they see one? Each is tried on the ground truths of a few
tasks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxrft.rewards import ground_truth
from jaxrft.rewards.pool import Pool
from jaxrft.tasks.table import TaskTable, take_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How a right answer may be spelt; the first one that a reward likes best is told.
SPELLINGS = {
    "as it is": "{}",
    "in \\boxed{}": "\\boxed{{{}}}",
    "after ####": "#### {}",
    "in <answer>": "<answer>{}</answer>",
}


class Trial(NamedTuple):
    """What a reward gave to right answers and to an empty one, a task each; None = no reward."""

    name: str
    spelling: str  # of the ground truths, a key of SPELLINGS
    right: list[float | None]
    empty: list[float | None]
    # how it failed on the first completion on which it did, a sentence; "" if it never did
    failure: str

    @property
    def applies(self) -> bool:
        """Checks whether the reward gave a number to any answer."""
        return any(value is not None for value in (*self.right, *self.empty))

    @property
    def fails(self) -> bool:
        """Checks whether the reward applies, but prefers no right answer to an empty one."""
        better = [
            (right or 0.0) > (empty or 0.0)
            for right, empty in zip(self.right, self.empty, strict=True)
        ]
        return self.applies and not any(better)


def unjudged(trials: Sequence[Trial]) -> bool:
    """Checks whether one of the tasks that were tried has no reward at all.

    Nothing would be learned from such a task.
    """
    tasks = zip(*(trial.right for trial in trials), strict=True)
    return any(set(rewards) == {None} for rewards in tasks)


def trials(
    names: tuple[str, ...],
    pool: Pool,
    table: TaskTable,
    ids: list[int],
    *,
    text: "PreTrainedTokenizerBase | None" = None,
    trainer_state: Mapping[str, int] | None = None,
) -> list[Trial]:
    """Tries each reward of the pool on the ground truths of the tasks `ids`.

    `names` are the names of the rewards. Without ground truths there are no trials. `text` is the
    tokenizer. Without one, the bytes of a completion stand in for its token ids.
    """
    if "answer" not in table.columns:
        return []
    truths = [table.columns["answer"][i] for i in ids]
    read = zip(truths, ground_truth.texts(truths, several=True), strict=True)
    answers = [str(truth) if answer is None else answer for truth, answer in read]
    spelt = [[spelling.format(answer) for answer in answers] for spelling in SPELLINGS.values()]
    completions = [text for texts in (*spelt, [""] * len(ids)) for text in texts]
    asked = ids * (len(SPELLINGS) + 1)
    columns = take_rows(table.columns, asked)
    graded = pool.grade(
        [table.prompts[i] for i in asked],
        completions,
        columns,
        completion_ids=[_token_ids(completion, text) for completion in completions],
        truncated=[False] * len(completions),
        trainer_state=trainer_state,
    )
    found = []
    for name, rewards in zip(names, graded.rewards, strict=True):
        *right, empty = (rewards[i : i + len(ids)] for i in range(0, len(rewards), len(ids)))
        spelling, best = max(zip(SPELLINGS, right, strict=True), key=_sum)
        found.append(Trial(name, spelling, best, empty, graded.causes.get(name, "")))
    return found


def _sum(spelt: tuple[str, list[float | None]]) -> float:
    return sum(reward or 0.0 for reward in spelt[1])


def _token_ids(completion: str, text: "PreTrainedTokenizerBase | None") -> list[int]:
    if text is None:
        return list(completion.encode(errors="replace"))
    return text.encode(completion, add_special_tokens=False)
