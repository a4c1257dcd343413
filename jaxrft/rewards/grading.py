"""Grades rollouts on all hosts, and chooses the reward of each task that counts as its success."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrft.config import Config, graded_by, has_majority, success_rewards
from jaxrft.lm import tokenizer
from jaxrft.lm.policy import LanguageModel
from jaxrft.lm.rollout import Samples
from jaxrft.rewards import pool as pools
from jaxrft.rewards.lookup import Reward
from jaxrft.tasks import table
from jaxrft.types import Array, InputError, Rollout

logger = logging.getLogger(__name__)

PATIENCE = 0.01  # seconds of grading between two looks at the device


def rewards_by_name(reward: object) -> dict[str, Reward]:
    """Collects one function, or a dict of several, in a dict by name.

    Raises InputError for anything else.
    """
    functions: dict = (
        reward if isinstance(reward, dict) else {getattr(reward, "__name__", None): reward}
    )
    if not functions or not all(
        isinstance(name, str) and callable(f) for name, f in functions.items()
    ):
        raise InputError(
            f"reward is {reward!r}: give a function from a module's top level or "
            "a dict of some by name"
        )
    return functions


def open_rewards(config: Config, reward: dict[str, Reward] | None = None) -> pools.Pool:
    """Starts the workers that grade by the functions `reward`, or else the configured rewards.

    They load what the held-out sets need, too.
    """
    named: dict[str, str | Reward] = dict(
        reward or zip(config.rewards, config.rewards, strict=True)
    )
    for tasks in config.evaluation.tasks:
        graded = graded_by(config, tasks)
        named |= {name: name for name in graded.rewards if name not in named}
        if has_majority(success_rewards(graded)):
            named |= {majority_name(name): votes_by(name) for name in success_rewards(graded)}
    return pools.Pool(
        list(named.items()),
        workers=config.reward_workers,
        timeout=config.reward_timeout,
        completions_as=config.reward_completions,
        path=config.reward_path,
    )


def votes_by(reward: str) -> str:
    """Returns the path of the majority vote that belongs to a reward of `config.VOTING`."""
    return f"jaxrft.rewards.majority:{reward}"


def majority_name(reward: str) -> str:
    """Returns the name in a pool of the majority vote that belongs to a reward."""
    return f"majority of {reward}"


def trainer_state(config: Config, done: int) -> dict[str, int]:
    """Builds the `trainer_state` argument of rewards, for a run that has done `done` steps.

    The names are those of transformers' TrainerState.
    """
    return {"global_step": done, "max_steps": config.steps}


class Rewards(NamedTuple):
    """The rewards of a rollout, the same on every process but for the samples."""

    rewards: np.ndarray  # [R, F] float32, 0 where not valid
    valid: np.ndarray  # [R, F] bool, False = does not apply, or lost
    lost: np.ndarray  # [R, F] bool, rewards lost to failures of graders
    failures: dict[str, int]  # the number of failures, by kind
    samples: list[tuple[int, str]]  # (row, text) of the completions that this process graded
    # [R] bool, rows without an end within max_completion_length
    truncated: np.ndarray = np.zeros(0, bool)
    # [B] int32, the reward that is success of each task
    success_index: np.ndarray = np.zeros(0, np.int32)

    @property
    def failed(self) -> np.ndarray:
        """Marks the rows on which a grader failed, [R] bool."""
        return np.any(self.lost, axis=1, keepdims=True)[:, 0]

    @property
    def is_success(self) -> np.ndarray:
        """Marks the one reward of a row that is its success, [R, F] bool; see `check_rewards`."""
        rows, count = self.rewards.shape
        index = np.repeat(self.success_index, rows // len(self.success_index))
        return np.arange(count) == index[:, None]

    @property
    def success(self) -> np.ndarray:
        """Selects the success of each row, [R] float32, 0 where not valid."""
        return self.rewards[self.is_success]

    @property
    def success_valid(self) -> np.ndarray:
        """Marks the rows that have a success, 0 or not, [R] bool."""
        return self.valid[self.is_success]


class Grading:
    """Grades the completions of a rollout of tasks `ids` [B], also while it is decoded.

    Each process grades the rows that it holds. A row that several processes hold is graded by the
    process with its first replica. Which rows are graded when changes no reward.
    """

    def __init__(
        self,
        config: Config,
        lm: LanguageModel,
        pool: pools.Pool,
        tasks: table.TaskTable,
        ids: np.ndarray,
        *,
        trainer_state: dict[str, int] | None = None,
    ) -> None:
        """Grades nothing yet; for `trainer_state` see the function of that name."""
        pool.finish()  # what was begun of a rollout that was given up
        self._names = config.rewards
        self._lm = lm
        self._pool = pool
        self._tasks = tasks
        self._ids = ids
        self._state = trainer_state
        marks = tokenizer.marks(lm.tokenizer, lm.eos_ids)
        self._decode = partial(
            tokenizer.decode,
            lm.tokenizer,
            without=marks,
            skip_special_tokens=config.skip_special_tokens,
        )
        self._rows: list[int] = []  # of which grading has begun
        self._completions: list[str] = []
        self._truncated: list[bool] = []
        self._mistake: InputError | None = None
        self._result: Rewards | None = None

    def left(self, samples: Samples) -> None:
        """Begins to grade groups that have ended, of a rollout that is decoded on.

        A mistake that shows is raised by `result`, when all processes are there.
        """
        if self._mistake is not None:
            return
        try:
            self._begin(samples.tokens, samples.lengths, samples.finished, samples.ended)
        except InputError as mistake:
            self._mistake = mistake

    def wait(self, stopped: Callable[[], bool]) -> None:
        """Grades until all that was begun is graded, or until `stopped()` is true."""
        while not stopped() and self._pool.work(PATIENCE):
            pass

    def result(self, rollouts: Rollout) -> Rewards:
        """Grades the other rows, once; all processes get all rewards."""
        if self._result is not None:
            return self._result
        if self._mistake is None:
            self._begin(rollouts.tokens, rollouts.lengths, rollouts.finished, None)
        graded = self._pool.finish()
        if self._mistake is not None:
            raise self._mistake
        rows = rollouts.lengths.shape[0]
        values, not_none = without_none(graded.rewards)
        rewards = np.zeros((rows, len(values)), np.float32)
        rewards[self._rows] = values.T
        valid = np.zeros(rewards.shape, bool)
        valid[self._rows] = not_none.T
        lost = np.zeros(rewards.shape, bool)
        for reward, i in graded.lost:
            lost[self._rows[i], reward] = True
        truncated = np.zeros(rows, bool)
        truncated[self._rows] = self._truncated
        counts = np.array([graded.failures[kind] for kind in pools.KINDS])
        if jax.process_count() > 1:  # rows of other processes are 0 here, so that the sum has all
            flags = (x.astype(np.int32) for x in (valid, lost, truncated))
            gathered = multihost_utils.process_allgather((rewards, *flags, counts))
            rewards, valid, lost, truncated, counts = (x.sum(axis=0) for x in gathered)
        failures: dict[str, int] = dict(zip(pools.KINDS, counts.tolist(), strict=True))
        samples = sorted(zip(self._rows, self._completions, strict=True))
        valid, lost, truncated = (x.astype(bool) for x in (valid, lost, truncated))
        self._result = Rewards(rewards, valid, lost, failures, samples, truncated)
        return self._result

    def _begin(self, tokens: Array, lengths: Array, finished: Array, ended: Array | None) -> None:
        """Begins to grade the groups that have `ended` [R], None for all, but not yet been begun.

        tokens [R, T] int32, lengths [R] int32, finished [R] bool.
        """
        rows = lengths.shape[0]
        group = rows // len(self._ids)
        begun = set(self._rows)
        rows_now: list[int] = []
        tokens_now: list[np.ndarray] = []
        truncated: list[bool] = []  # no end within max_completion_length
        held = zip(*(_local_rows(x) for x in (tokens, lengths, finished)), strict=True)
        ready = (
            [None] * len(_local_rows(lengths))
            if ended is None
            else [x for _, x in _local_rows(ended)]
        )
        for ((first, block), (_, counts), (_, ends)), mask in zip(held, ready, strict=True):
            numbers = np.arange(len(counts))
            if mask is not None:
                numbers = numbers[np.repeat(mask.reshape(-1, group).all(axis=1), group)]
            for i in numbers:
                if first + i not in begun:
                    rows_now.append(int(first + i))
                    tokens_now.append(block[i, : counts[i]])
                    truncated.append(not ends[i])
        if not rows_now:
            return
        completions = [self._decode(row) for row in tokens_now]
        task_ids = [int(self._ids[row // group]) for row in rows_now]
        columns = {
            name: [entries[i] for i in task_ids] for name, entries in self._tasks.columns.items()
        }
        self._pool.begin(
            [self._tasks.prompts[i] for i in task_ids],
            completions,
            columns,
            completion_ids=[row.tolist() for row in tokens_now],
            truncated=truncated,
            trainer_state=self._state,
            rewards=self._names,
        )
        self._rows += rows_now
        self._completions += completions
        self._truncated += truncated


def grade_rollout(
    config: Config,
    lm: LanguageModel,
    rollouts: Rollout,
    pool: pools.Pool,
    tasks: table.TaskTable,
    ids: np.ndarray,
    *,
    trainer_state: dict[str, int] | None = None,
) -> Rewards:
    """Grades a rollout of tasks `ids` [B]; see `Grading`."""
    grading = Grading(config, lm, pool, tasks, ids, trainer_state=trainer_state)
    return grading.result(rollouts)


def majority_success(config: Config, rewards: Rewards, pool: pools.Pool) -> np.ndarray:
    """Computes the success of the majority's answer of each task, [B] float32; see
    `majority.majority`.

    Each process counts the votes of the tasks that it graded. A vote that is lost to a failure is
    0.
    """
    num_tasks = len(rewards.success_index)
    group = len(rewards.rewards) // num_tasks
    successes = rewards.success.reshape(num_tasks, group)
    truncated = rewards.truncated.reshape(num_tasks, group)
    texts = [text for _, text in rewards.samples]  # of whole groups, one after the other
    ids = np.array([row // group for row, _ in rewards.samples[::group]], np.int32)
    found = np.zeros(num_tasks, np.float32)
    for number in np.unique(rewards.success_index[ids]).tolist():
        places = np.flatnonzero(rewards.success_index[ids] == number)
        tasks = ids[places]
        graded = pool.grade(
            [""] * len(tasks),
            [texts[place * group : (place + 1) * group] for place in places],
            {"successes": successes[tasks].tolist()},
            truncated=truncated[tasks].tolist(),
            rewards=(majority_name(config.rewards[number]),),
        )
        found[tasks] = [value or 0.0 for value in graded.rewards[0]]
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(found).sum(axis=0)
    return found


def _local_rows(x: Array) -> list[tuple[int, np.ndarray]]:
    """Returns the shards of `x` [R, ...] whose rows this process grades, as (number of the first
    row, rows).
    """
    return [
        (shard.index[0].start or 0, np.asarray(shard.data))
        for shard in x.addressable_shards
        if shard.replica_id == 0
    ]


def without_none(rewards: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rewards as float32 with 0 for None, and which are valid, that is, not None; both
    of their shape.
    """
    values = np.array(rewards, np.float32)  # None becomes NaN, which goes no further
    valid = ~np.isnan(values)
    return np.where(valid, values, np.float32(0)), valid


def check_rewards(
    config: Config, rewards: Rewards, pool: pools.Pool, *, num_tasks: int, first: bool
) -> Rewards:
    """Chooses the reward of each task that counts as its success; success outside [0, 1] is lost,
    to `invalid`.

    Raises InputError in the `first` batch when `check_candidates` does, and when no completion has
    a success: then something is wrong with the rewards, and no training is lost yet.
    """
    record_ranges(config, rewards, pool, first=first)
    candidates = success_candidates(config, pool)
    if first:
        check_candidates(config, pool)
    index = success_indices(rewards, candidates, num_tasks=num_tasks)
    rewards = rewards._replace(success_index=index)
    if first and not (rewards.success_valid & ~rewards.failed).any():
        counts = ", ".join(f"{n} {kind}" for kind, n in rewards.failures.items() if n) or "all None"
        raise InputError(
            f"no completion of the first batch got a reward ({counts}): see the warning above, "
            f"and check the rewards {', '.join(config.rewards)} and the columns of the tasks"
        )
    outside = rewards.is_success & ((rewards.rewards < 0) | (rewards.rewards > 1))
    return rewards._replace(
        rewards=np.where(outside, np.float32(0), rewards.rewards),
        valid=rewards.valid & ~outside,
        lost=rewards.lost | outside,
        failures=rewards.failures | {"invalid": rewards.failures["invalid"] + int(outside.sum())},
    )


def record_ranges(config: Config, rewards: Rewards, pool: pools.Pool, *, first: bool) -> None:
    """Records the range of each reward's first values in the pool, which training and evaluation
    share.
    """
    for name, column, valid in zip(config.rewards, rewards.rewards.T, rewards.valid.T, strict=True):
        values = column[valid]
        if len(values) == 0 or name in pool.first_ranges:
            continue
        pool.first_ranges[name] = float(values.min()), float(values.max())
        if (
            not first
            and config.success_reward is None
            and not may_be_success(pool, name)
            and jax.process_index() == 0
        ):
            logger.warning(
                "the reward %s gave %g and is never success, which must lie in [0, 1]: tasks "
                "to which no other reward "
                "applies give no training signal, unless success_reward names another",
                *(name, out_of_range(pool, name)),
            )


def may_be_success(pool: pools.Pool, name: str) -> bool:
    """Checks whether a reward may be success: whether its values in the first batch that has any
    all lie in [0, 1].

    Returns True before that batch. A resumed run decides anew.
    """
    lowest, highest = pool.first_ranges.get(name, (0.0, 1.0))
    return lowest >= 0 and highest <= 1


def out_of_range(pool: pools.Pool, name: str) -> float:
    """Returns a first value outside [0, 1] of a reward that has one."""
    lowest, highest = pool.first_ranges[name]
    return lowest if lowest < 0 else highest


def success_candidates(config: Config, pool: pools.Pool) -> np.ndarray:
    """Returns which rewards may be success, [F] bool: `success_reward` if it is given, else all
    whose first values lie in [0, 1].
    """
    if config.success_reward is not None:
        return np.array([name == config.success_reward for name in config.rewards])
    return np.array([may_be_success(pool, name) for name in config.rewards])


def check_candidates(config: Config, pool: pools.Pool) -> None:
    """Raises InputError when `success_reward`, or by default the first reward that gave any value,
    has values outside [0, 1].

    A later reward may fit, but only the user knows whether it tells right from wrong.
    """
    given = [name for name in config.rewards if name in pool.first_ranges]
    required = given[:1] if config.success_reward is None else [config.success_reward]
    for name in required:
        if not may_be_success(pool, name):
            advice = "name another with success_reward"
            if len(config.rewards) == 1:
                advice = (
                    "scale it to [0, 1], or add a reward that does lie there, such as --rewards "
                    f"{name} exact --reward-weights 1 0 --success-reward exact"
                )
            raise InputError(
                f"the reward {name} gave {out_of_range(pool, name):g}, but a success must lie in "
                f"[0, 1]: {advice}"
            )


def success_indices(rewards: Rewards, candidates: np.ndarray, *, num_tasks: int) -> np.ndarray:
    """Returns the reward that is success of each task, [B] int32: the first candidate that is not
    None for the task.

    A reward is None for a task if it is for all samples of the task, and a reward that a failure
    cost is not None. Of a task without any the index is the first candidate's, which is not valid
    there. `candidates` [F] bool.
    """
    given = rewards.valid | rewards.lost
    applies = given.reshape(num_tasks, -1, given.shape[1]).any(axis=1) & candidates  # [B, F]
    index = np.where(applies.any(axis=1), applies.argmax(axis=1), candidates.argmax())
    return index.astype(np.int32)


def drop_failed_rows(rewards: Rewards) -> Rewards:
    """Marks all rewards of rows on which a grader failed as not valid, since their sums are not
    known.

    A row to which a reward does not apply keeps its other rewards.
    """
    valid = rewards.valid & ~rewards.failed[:, None]
    return rewards._replace(rewards=np.where(valid, rewards.rewards, np.float32(0)), valid=valid)
