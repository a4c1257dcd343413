"""Checks that the rewards recognize right answers, by the ground truths of a few tasks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxrft.rewards import ground_truth
from jaxrft.rewards.pool import Pool
from jaxrft.tasks.table import TaskTable, reference, take_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Spellings of a right answer; the first that a reward scores highest is reported.
SPELLINGS = {
    "as it is": "{}",
    "in \\boxed{}": "\\boxed{{{}}}",
    "after ####": "#### {}",
    "in <answer>": "<answer>{}</answer>",
}
REWARDS_BY_TESTS = ("code", "code_solved")


class RewardCheck(NamedTuple):
    """The rewards of right answers and of empty ones, one each a task; None = no reward."""

    name: str  # of the reward
    spelling: str  # of the ground truths, a key of SPELLINGS
    right: list[float | None]
    empty: list[float | None]
    # a sentence about the first completion on which it failed; "" if it never did
    failure: str

    @property
    def applies(self) -> bool:
        """Checks whether the reward gave a number to any answer."""
        return any(value is not None for value in (*self.right, *self.empty))

    @property
    def fails(self) -> bool:
        """Checks whether the reward applies, but prefers no right answer to an empty one.

        Returns False for rewards whose ground truths are tests, which are no answers.
        """
        if self.name in REWARDS_BY_TESTS:
            return False
        better = [
            (right or 0.0) > (empty or 0.0)
            for right, empty in zip(self.right, self.empty, strict=True)
        ]
        return self.applies and not any(better)


def any_without_reward(checks: Sequence[RewardCheck]) -> bool:
    """Checks whether one of the tasks has no reward at all, and so no training signal."""
    tasks = zip(*(check.right for check in checks), strict=True)
    return any(set(rewards) == {None} for rewards in tasks)


def check_rewards(
    names: tuple[str, ...],
    pool: Pool,
    table: TaskTable,
    ids: list[int],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    trainer_state: Mapping[str, int] | None = None,
) -> list[RewardCheck]:
    """Grades the ground truths of the tasks `ids` by each reward of the pool.

    `names` are the names of the rewards. Returns an empty list without ground truths. Without a
    tokenizer, the bytes of a completion replace its token ids.
    """
    if "answer" not in table.columns:
        return []
    truths = [table.columns["answer"][i] for i in ids]
    texts = zip(ids, ground_truth.texts(truths, several=True), strict=True)
    answers = [str(reference(table, i)) if text is None else text for i, text in texts]
    spelled = [spelling.format(answer) for spelling in SPELLINGS.values() for answer in answers]
    completions = [*spelled, *([""] * len(ids))]
    rows = ids * (len(SPELLINGS) + 1)
    columns = take_rows(table.columns, rows)
    graded = pool.grade(
        [table.prompts[i] for i in rows],
        completions,
        columns,
        completion_ids=[_token_ids(completion, tokenizer) for completion in completions],
        truncated=[False] * len(completions),
        trainer_state=trainer_state,
        rewards=names,
    )
    checks = []
    for name, rewards in zip(names, graded.rewards, strict=True):
        *right, empty = (rewards[i : i + len(ids)] for i in range(0, len(rewards), len(ids)))
        spelling, best = max(zip(SPELLINGS, right, strict=True), key=_sum)
        checks.append(RewardCheck(name, spelling, best, empty, graded.causes.get(name, "")))
    return checks


def _sum(rewards: tuple[str, list[float | None]]) -> float:
    return sum(reward or 0.0 for reward in rewards[1])


def _token_ids(completion: str, tokenizer: "PreTrainedTokenizerBase | None") -> list[int]:
    if tokenizer is None:
        return list(completion.encode(errors="replace"))
    return tokenizer.encode(completion, add_special_tokens=False)
