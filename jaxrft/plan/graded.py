"""Do the rewards know a right answer when they see one? Each is tried on the ground truths of a few tasks."""

from typing import NamedTuple

import numpy as np

from jaxrft.rewards.pool import Pool
from jaxrft.tasks.table import TaskTable

# How a right answer may be spelt; the first one that a reward likes best is told.
SPELLINGS = {
    "as it is": "{}",
    "in \\boxed{}": "\\boxed{{{}}}",
    "after ####": "#### {}",
    "in <answer>": "<answer>{}</answer>",
}


class Trial(NamedTuple):
    """What a reward gave to right answers and to an empty one, a task each; NaN = no reward."""

    name: str
    spelling: str  # of the ground truths, a key of SPELLINGS
    right: list[float]
    empty: list[float]

    @property
    def fails(self) -> bool:
        """Whether it tells nothing apart: nothing is better than an empty answer."""
        return not np.any(np.nan_to_num(self.right) > np.nan_to_num(self.empty))


def trials(names: tuple[str, ...], pool: Pool, table: TaskTable, ids: list[int]) -> list[Trial]:
    """Each reward of the pool, called `names`, on the ground truths of the tasks `ids`; none without ground truths."""
    if "answer" not in table.columns:
        return []
    answers = [table.columns["answer"][i] for i in ids]
    spelt = [[spelling.format(answer) for answer in answers] for spelling in SPELLINGS.values()]
    completions = [text for texts in (*spelt, [""] * len(ids)) for text in texts]
    asked = ids * (len(SPELLINGS) + 1)
    columns = {name: [entries[i] for i in asked] for name, entries in table.columns.items()}
    graded = pool.grade([table.prompts[i] for i in asked], completions, columns)
    rewards = np.array(graded.rewards, np.float32).reshape(len(names), -1, len(ids))  # None becomes NaN
    found = []
    for name, (*right, empty) in zip(names, rewards, strict=True):
        sums = [np.nan_to_num(each).sum() for each in right]
        best = int(np.argmax(sums))
        found.append(Trial(name, list(SPELLINGS)[best], right[best].tolist(), empty.tolist()))
    return found
