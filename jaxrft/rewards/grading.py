"""Grades rollouts on all hosts, and tells successes from other rewards."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrft.config import Config
from jaxrft.lm import tokenizer
from jaxrft.lm.policy import LanguageModel
from jaxrft.rewards import pool as pools
from jaxrft.rewards.lookup import Reward
from jaxrft.tasks import table
from jaxrft.types import InputError, Rollout

logger = logging.getLogger(__name__)


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
    """Starts the workers that grade by the functions `reward`, or else the configured rewards."""
    named = dict(reward or zip(config.rewards, config.rewards, strict=True))
    return pools.Pool(
        list(named.items()),
        workers=config.reward_workers,
        timeout=config.reward_timeout,
        completions_as=config.reward_completions,
    )


def trainer_state(config: Config, done: int) -> dict[str, int]:
    """Builds what rewards are told of a run that has `done` the given number of steps.

    The names are those of transformers' TrainerState.
    """
    return {"global_step": done, "max_steps": config.steps}


class Rewards(NamedTuple):
    """What graders said of a rollout, the same on every process but for the samples."""

    rewards: np.ndarray  # [R, F] float32, 0 where not valid
    valid: np.ndarray  # [R, F] bool, False = does not apply, or lost
    lost: np.ndarray  # [R, F] bool, the rewards that failures of graders cost
    failures: dict[str, int]  # how many, by kind
    samples: list[tuple[int, str]]  # (row, text) of the completions that this process graded
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
    """Grades a rollout of tasks `ids` [B]: each process grades the rows it holds, and all learn all
    rewards.

    Of a row that several processes hold, the one with its first copy is in charge. `trainer_state`
    is what rewards are told of the run, see `trainer_state`.
    """
    rows = rollouts.lengths.shape[0]
    generations = rows // len(ids)
    lengths = {
        _first_row(shard): np.asarray(shard.data) for shard in rollouts.lengths.addressable_shards
    }
    mine = []
    tokens = []
    for shard in rollouts.tokens.addressable_shards:
        if shard.replica_id == 0:
            first = _first_row(shard)
            block = np.asarray(shard.data)
            mine += range(first, first + len(block))
            tokens += [row[:length] for row, length in zip(block, lengths[first], strict=True)]
    marks = tokenizer.marks(lm.tokenizer, lm.eos_ids)
    decode = partial(
        tokenizer.decode,
        lm.tokenizer,
        without=marks,
        skip_special_tokens=config.skip_special_tokens,
    )
    completions = [decode(row) for row in tokens]
    asked = [int(ids[row // generations]) for row in mine]
    columns = {name: [entries[i] for i in asked] for name, entries in tasks.columns.items()}
    graded = pool.grade(
        [tasks.prompts[i] for i in asked],
        completions,
        columns,
        completion_ids=[row.tolist() for row in tokens],
        # no end within max_completion_length
        truncated=[int(row[-1]) not in lm.eos_ids for row in tokens],
        trainer_state=trainer_state,
    )
    values, not_none = without_none(graded.rewards)
    rewards = np.zeros((rows, len(values)), np.float32)
    rewards[mine] = values.T
    valid = np.zeros(rewards.shape, bool)
    valid[mine] = not_none.T
    lost = np.zeros(rewards.shape, bool)
    for reward, i in graded.lost:
        lost[mine[i], reward] = True
    counts = np.array([graded.failures[kind] for kind in pools.KINDS])
    if jax.process_count() > 1:  # rows of other processes are 0 here, so that sums put all together
        parts = (rewards, valid.astype(np.int32), lost.astype(np.int32), counts)
        found = multihost_utils.process_allgather(parts)
        rewards, valid, lost, counts = (x.sum(axis=0) for x in found)
    failures: dict[str, int] = dict(zip(pools.KINDS, counts.tolist(), strict=True))
    samples = list(zip(mine, completions, strict=True))
    return Rewards(rewards, valid.astype(bool), lost.astype(bool), failures, samples)


def without_none(rewards: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rewards as float32 with 0 for None, and which are valid, that is, not None; both
    of their shape.
    """
    values = np.array(rewards, np.float32)  # None becomes NaN, which goes no further
    valid = ~np.isnan(values)
    return np.where(valid, values, np.float32(0)), valid


def check_rewards(
    config: Config, verdicts: Rewards, pool: pools.Pool, *, tasks: int, first: bool
) -> Rewards:
    """Tells which reward is success of each of so many `tasks`; those outside [0, 1] are lost, to
    `invalid`.

    Raises InputError in the `first` batch when a reward that may not be success stands where
    success is looked for, and when there is no success at all: then something is wrong with the
    rewards, and nothing is lost yet.
    """
    note_ranges(config, verdicts, pool, first=first)
    candidates = success_candidates(config, pool)
    if first:
        check_candidates(config, pool)
    verdicts = verdicts._replace(success_index=success_indices(verdicts, candidates, tasks=tasks))
    if first and not (verdicts.success_valid & ~verdicts.failed).any():
        counts = (
            ", ".join(f"{n} {kind}" for kind, n in verdicts.failures.items() if n) or "all None"
        )
        raise InputError(
            f"no completion of the first batch got a reward ({counts}): see the warning above, "
            "and check the rewards "
            f"{', '.join(config.rewards)} and the columns of the tasks"
        )
    outside = verdicts.is_success & ((verdicts.rewards < 0) | (verdicts.rewards > 1))
    return verdicts._replace(
        rewards=np.where(outside, np.float32(0), verdicts.rewards),
        valid=verdicts.valid & ~outside,
        lost=verdicts.lost | outside,
        failures=verdicts.failures | {"invalid": verdicts.failures["invalid"] + int(outside.sum())},
    )


def note_ranges(config: Config, verdicts: Rewards, pool: pools.Pool, *, first: bool) -> None:
    """Notes with the pool, so that training and evaluation share it, what range a reward's first
    values are in.
    """
    for name, column, valid in zip(
        config.rewards, verdicts.rewards.T, verdicts.valid.T, strict=True
    ):
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
                "applies teach nothing, unless another is named with success_reward",
                *(name, misfit(pool, name)),
            )


def may_be_success(pool: pools.Pool, name: str) -> bool:
    """Decides, once a reward, whether it may be success: if the first batch that has values of it
    has all in [0, 1].

    True while it gave none. A run that is resumed decides anew.
    """
    lowest, highest = pool.first_ranges.get(name, (0.0, 1.0))
    return lowest >= 0 and highest <= 1


def misfit(pool: pools.Pool, name: str) -> float:
    """Returns a value outside [0, 1] of a reward that does not fit."""
    lowest, highest = pool.first_ranges[name]
    return lowest if lowest < 0 else highest


def success_candidates(config: Config, pool: pools.Pool) -> np.ndarray:
    """Returns which rewards may be success, [F] bool: `success_reward` if it is given, else all
    that fit.
    """
    if config.success_reward is not None:
        return np.array([name == config.success_reward for name in config.rewards])
    return np.array([may_be_success(pool, name) for name in config.rewards])


def check_candidates(config: Config, pool: pools.Pool) -> None:
    """Raises InputError when `success_reward`, or by default the first reward that gave any value,
    does not fit.

    One behind it may, but only the user knows whether that one tells right from wrong.
    """
    given = [name for name in config.rewards if name in pool.first_ranges]
    wanted = given[:1] if config.success_reward is None else [config.success_reward]
    for name in wanted:
        if not may_be_success(pool, name):
            raise InputError(
                f"the reward {name} gave {misfit(pool, name):g}, but a success must lie in [0, 1]: "
                "name another with success_reward"
            )


def success_indices(verdicts: Rewards, candidates: np.ndarray, *, tasks: int) -> np.ndarray:
    """Returns the reward that is success of each task, [B] int32: the first candidate that is not
    None for the task.

    A reward is None for a task if it is for all samples of the task, and a reward that a failure
    cost is not None. Of a task without any the index is the first candidate's, which is not valid
    there. `candidates` [F] bool.
    """
    given = verdicts.valid | verdicts.lost
    applies = given.reshape(tasks, -1, given.shape[1]).any(axis=1) & candidates  # [B, F]
    found = np.where(applies.any(axis=1), applies.argmax(axis=1), candidates.argmax())
    return found.astype(np.int32)


def drop_failed_rows(verdicts: Rewards) -> Rewards:
    """Returns the rewards without those of rows on which a grader failed, whose sums are not known.

    A reward that does not apply to a row leaves the row its others.
    """
    valid = verdicts.valid & ~verdicts.failed[:, None]
    return verdicts._replace(rewards=np.where(valid, verdicts.rewards, np.float32(0)), valid=valid)


def _first_row(shard: jax.Shard) -> int:
    return shard.index[0].start or 0
