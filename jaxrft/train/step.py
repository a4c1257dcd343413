"""The stages of a training step: select, roll out, grade, score, update the selector, learn.

Each stage is a method of `Step`, which runs on the host. Below the class are the jitted functions
that the methods call, compiled once for each `Setup`, static argument and set of shapes. Those of
the rollout are made by `jaxrft.lm.segments.compile_rollout`, and graders run in processes of their
own.
`resample.py` calls the stages until a batch is full, and `loop.py` step after step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.learn import grpo, replay, reward_shaping, update
from jaxrft.learn.replay import Buffer, Groups
from jaxrft.lm import model
from jaxrft.lm.model import Params
from jaxrft.lm.segments import Work
from jaxrft.report import metrics
from jaxrft.report.visits import Visits
from jaxrft.rewards.grading import (
    Grading,
    Rewards,
    check_rewards,
    drop_failed_rows,
    trainer_state,
)
from jaxrft.rewards.pool import Pool
from jaxrft.streams import STREAMS, stream_key
from jaxrft.tasks.table import TaskTable, buckets, prompt_batch
from jaxrft.train.setup import Constants, Setup, Tree
from jaxrft.train.state import Counters, TrainState, count_rollouts
from jaxrft.types import Array, Choice, Feedback, PyTree, Rollout, Tasks

ROLLOUT = STREAMS.index("rollout")
Metrics = dict[str, PyTree]  # scalars, of devices or of Python


class RolledOut(NamedTuple):
    """Completions of the tasks `ids`."""

    ids: np.ndarray  # [B] int32
    prompts: tuple[Array, Array]  # tokens [B, P] and lengths [B]
    rollout: Rollout  # R = B * G rows
    grading: Grading  # has begun with groups that ended early
    work: Work
    seconds: float  # that it took


class ScoredGroups(NamedTuple):
    """Groups of graded completions; B tasks."""

    groups: Groups
    feedback: Feedback
    informative: Array  # [B] bool, successes not all equal, whatever else the rewards are
    # [B] float32, distance of the pass rate to the target; infinite = not informative
    distance: Array
    metrics: Metrics


@dataclass(frozen=True, eq=False)
class Step:
    """The stages of a training step.

    A stage that returns a state donates the memory of its argument, which must not be used again.
    """

    setup: Setup
    table: TaskTable  # of the tasks, on the host
    constants: Constants  # arrays on the devices
    pool: Pool  # graders
    visits: Visits  # groups rolled out of each task, and their successes, for reports

    def num_fresh(self, state: TrainState) -> int:
        """Returns how many groups the next step rolls out: fewer if the replay has enough others.

        There are two sizes, each a set of compiled programs.
        """
        fewest = self.setup.config.fresh_batch_size
        if (
            self.setup.replay is not None
            and int(fresh_needed(self.setup, state.replay, state.step)) <= fewest
        ):
            return fewest
        return self.setup.config.batch_size

    def reference_set(self, state: TrainState) -> Choice:
        """Draws the reference set, with the pass rates that the selector believes."""
        return draw_reference_set(self.setup, state.selector, state.step, self.constants.tasks)

    def select(
        self, state: TrainState, *, batch_size: int, exclude: np.ndarray, stream: int
    ) -> tuple[Choice, TrainState]:
        """Chooses the tasks of a batch, none of the ids `exclude` [m] while there are others.

        `stream` is the number of a random stream, see `jaxrft.streams`.
        """
        mask = self.constants.nothing_excluded
        if len(exclude):
            on_host = np.zeros(self.setup.num_tasks, bool)
            on_host[exclude] = True
            mask = meshes.place_table(on_host, self.setup.mesh, self.setup.num_tasks)
        choice, selector = select_tasks(
            self.setup,
            state.selector,
            state.step,
            self.constants.tasks,
            mask,
            np.int32(stream),
            batch_size=batch_size,
        )
        return choice, state._replace(selector=selector)

    def roll_out(self, state: TrainState, ids: np.ndarray, *, stream: int = ROLLOUT) -> RolledOut:
        """Samples a group of completions of each of the tasks `ids` [B], and waits for them.

        Groups that have ended are graded while others are decoded.
        """
        config = self.setup.config
        mesh = self.setup.mesh
        prompts = prompt_batch(self.table, ids, buckets(self.table.lengths), mesh)
        params = model.all_params(state.params, self.constants.frozen)
        grading = Grading(
            config,
            self.setup.lm,
            self.pool,
            self.table,
            ids,
            trainer_state=trainer_state(config, int(state.step)),
        )
        start = time.perf_counter()
        rollout = self.setup.generate(
            params,
            state.step,
            *prompts,
            meshes.from_host(mesh, ids),
            np.int32(stream),
            watcher=grading,
        )
        jax.block_until_ready(rollout.lengths)
        seconds = time.perf_counter() - start
        return RolledOut(ids, prompts, rollout, grading, self.setup.generate.work(), seconds)

    def grade(self, rolled: RolledOut) -> Rewards:
        """Grades the completions that are not graded yet, each process those that it holds.

        Raises InputError when something is wrong with the rewards of the first batch of the
        process.
        """
        config = self.setup.config
        rewards = rolled.grading.result(rolled.rollout)
        first = self.visits.is_empty()
        rewards = check_rewards(config, rewards, self.pool, num_tasks=len(rolled.ids), first=first)
        self.visits.add(rolled.ids, rewards.success, rewards.success_valid)
        return rewards

    def score(self, state: TrainState, rolled: RolledOut, rewards: Rewards) -> ScoredGroups:
        """Makes groups with advantages, and the feedback of their tasks, of graded completions."""
        config = self.setup.config
        mesh = self.setup.mesh
        learned = drop_failed_rows(rewards)
        shape = (len(rolled.ids), config.num_generations, -1)
        scored = score_groups(
            self.setup,
            state.step,
            meshes.from_host(mesh, rolled.ids),
            rolled.prompts,
            rolled.rollout,
            meshes.from_host(mesh, learned.rewards.reshape(shape), "batch", None, None),
            meshes.from_host(mesh, learned.valid.reshape(shape), "batch", None, None),
            meshes.from_host(mesh, rewards.success_index, "batch"),
        )
        tokens = scored.metrics["completions/mean_length"] * np.float32(
            len(rolled.ids) * config.num_generations
        )
        return scored._replace(
            metrics=scored.metrics
            | {
                "rollout/utilization": tokens / np.float32(rolled.work.drawn),
                "timing/tokens_per_second": tokens / np.float32(rolled.seconds),
                "rollout/segments": rolled.work.segments,
            }
        )

    def update_selector(
        self,
        state: TrainState,
        choice: Choice,
        *parts: tuple[Feedback, Array],
        is_reference_set: bool = False,
    ) -> tuple[TrainState, Metrics]:
        """Updates the selector, and the counters, by the feedback of a choice.

        `parts` are (feedback, informative) of one or more batches, in the order of the choice;
        `informative` is for metrics only. If the choice `is_reference_set`,
        `Selector.update_references` takes the feedback, else `Selector.update`.
        """
        selector, counters, measured = update_selector_state(
            self.setup,
            state.selector,
            state.counters,
            state.step,
            self.constants.tasks,
            choice,
            *parts,
            is_reference_set=is_reference_set,
        )
        return state._replace(selector=selector, counters=counters), measured

    def belief(self, state: TrainState) -> Array:
        """Counts the tasks by the pass rate that the selector believes, see `metrics.histogram`."""
        return count_beliefs(self.setup, state.selector, self.constants.tasks)

    def learn(
        self,
        state: TrainState,
        groups: Groups,
        surplus: Sequence[tuple[tuple[Groups, ...], np.ndarray]],
    ) -> tuple[TrainState, Metrics]:
        """Updates the policy by the groups of a batch [B].

        `surplus`: informative groups without a slot in the batch, which enter the replay. Each is
        (parts, rows), and `rows` [K] is a bool mask over the concatenated parts.
        """
        constants = self.constants
        params = (constants.reference_params, constants.frozen)
        learned, measured = update_policy(self.setup, without_tasks(state), groups, *params)
        state = learned._replace(selector=state.selector, counters=state.counters)
        if self.setup.replay is not None:  # after the update, which draws from the buffer
            for parts, rows in surplus:
                buffer = store_groups(self.setup, state.replay, parts, rows)
                state = state._replace(replay=buffer)
        return state, measured


def _constrain(tree: Tree, shardings: PyTree) -> Tree:
    """Constrains the shardings of a tree; `shardings` is a tree, or one for all leaves."""
    return jax.lax.with_sharding_constraint(tree, shardings)


def _replicated(setup: Setup, tree: Tree) -> Tree:
    return _constrain(tree, meshes.sharding(setup.mesh))


@partial(jax.jit, static_argnums=0)
def fresh_needed(setup: Setup, buffer: Buffer, step: Array) -> Array:
    """Returns how many fresh groups [] the next batch needs."""
    assert setup.replay is not None
    return setup.replay.fresh_needed(buffer, step)


@partial(jax.jit, static_argnums=0)
def draw_reference_set(setup: Setup, selector_state: PyTree, step: Array, tasks: Tasks) -> Choice:
    """Draws the ids [K] of a reference set, with the pass rates that the selector believes them to
    have.
    """
    selector = setup.selector
    assert selector.reference_set is not None
    ids = selector.reference_set(
        stream_key(setup.config.seed, step, "reference set"), selector_state, tasks
    )
    believed = selector.pass_rate(selector_state, tasks)[ids]
    return _replicated(setup, Choice(ids, believed))


@partial(jax.jit, static_argnums=0, static_argnames="batch_size", donate_argnums=1)
def select_tasks(
    setup: Setup,
    selector_state: PyTree,
    step: Array,
    tasks: Tasks,
    exclude: Array,
    stream: Array,
    *,
    batch_size: int,
) -> tuple[Choice, PyTree]:
    """Chooses `batch_size` tasks, and none of the mask `exclude` [N] while there are others.

    `stream` [] is the number of the random stream.
    """
    key = stream_key(setup.config.seed, step, stream)
    choice, selector_state = setup.selector.select(
        key, selector_state, tasks, batch_size=batch_size, exclude=exclude
    )
    assert setup.shardings is not None
    return _replicated(setup, choice), _constrain(selector_state, setup.shardings.selector)


@partial(jax.jit, static_argnums=0)
def score_groups(
    setup: Setup,
    step: Array,
    ids: Array,
    prompts: tuple[Array, Array],
    rollout: Rollout,
    rewards: Array,
    valid: Array,
    success_index: Array,
) -> ScoredGroups:
    """Computes advantages and feedback from the `rewards` [B, G, F] of the tasks `ids` [B].

    A reward is not `valid` [B, G, F] if its function returned None, or if a grader failed on the
    sample. A sample without any is no trial and is not learned from. A group whose rewards are all
    equal has advantages of 0. `success_index` [B] int32 is the reward that measures success of each
    task.
    """
    config = setup.config
    shape = rewards.shape[:2]  # [B, G]
    lengths = rollout.lengths.reshape(shape)
    total, total_valid, tolerance, measured = sum_rewards(
        config, rewards, valid, success_index, lengths
    )
    total = grpo.leveled(total, total_valid, tolerance=tolerance)  # 0 where not valid
    success = jnp.where(total_valid, reward_shaping.take_reward(rewards, success_index), 0.0)
    successes = jnp.sum(success, axis=1)
    trials = jnp.sum(total_valid, axis=1, dtype=jnp.float32)
    pass_rate = successes / jnp.maximum(trials, 1.0)
    informative = grpo.informative(success, total_valid)
    is_cut = ~rollout.finished.reshape(shape)
    masked = is_cut if config.mask_truncated_completions else jnp.zeros(shape, bool)
    groups = Groups(
        *prompts,
        tokens=rollout.tokens.reshape(*shape, -1),
        mask=jnp.where((total_valid & ~masked)[..., None], rollout.mask.reshape(*shape, -1), 0.0),
        logprobs=rollout.logprobs.reshape(*shape, -1),
        advantages=grpo.advantages(total, scale_rewards=config.scale_rewards, mask=total_valid),
        rewards=total,
        valid=total_valid,
        task=ids,
        step=jnp.full(shape[:1], step),
        weights=importance_weights(config, rollout, shape),
    )
    differ = grpo.informative(total, total_valid)
    measured |= metrics.rewards(rewards, valid, config.rewards, total, total_valid, differ)
    measured |= metrics.completions(rollout)
    feedback = Feedback(ids, successes, trials, jnp.sum(lengths, axis=1).astype(jnp.float32))
    distance = jnp.where(informative, jnp.abs(pass_rate - config.select.target), jnp.inf)
    return ScoredGroups(
        groups=_constrain(groups, meshes.sharding(setup.mesh, "batch")),
        feedback=_replicated(setup, feedback),
        informative=_replicated(setup, informative),
        distance=_replicated(setup, distance),
        metrics=_replicated(setup, measured),
    )


def sum_rewards(
    config: Config, rewards: Array, valid: Array, success_index: Array, lengths: Array
) -> tuple[Array, Array, Array, Metrics]:
    """Computes the weighted sums of the valid rewards [B, G, F] of completions of `lengths` tokens
    [B, G].

    Returns the sums, whether they exist, the tolerance within which their differences are rounding,
    all [B, G], and metrics. The soft overlong penalty is one more term of each sum, if there is
    one.
    """
    weights = jnp.array(config.reward_weights or [1.0] * len(config.rewards), jnp.float32)
    total, total_valid = reward_shaping.total(rewards, valid, weights, success=success_index)
    magnitude = reward_shaping.magnitude(rewards, valid, weights)
    if config.overlong_buffer == 0:
        return total, total_valid, grpo.rounding(magnitude, len(config.rewards)), {}
    penalty = reward_shaping.overlong(
        lengths,
        max_completion_length=config.max_completion_length,
        overlong_buffer=config.overlong_buffer,
        overlong_penalty=config.overlong_penalty,
    )
    tolerance = grpo.rounding(magnitude + jnp.abs(penalty), len(config.rewards) + 1)
    measured = {"completions/overlong_penalty": jnp.mean(penalty)}
    return total + penalty, total_valid, tolerance, measured


def importance_weights(config: Config, rollout: Rollout, shape: tuple[int, ...]) -> Array | None:
    """Computes importance weights [B, G, T] of the tokens; None = no correction.

    They correct for top-k, top-p, min-p and the repetition penalty, by which tokens are drawn from
    another distribution than the policy's.
    """
    if config.importance_sampling_correction == "none":
        return None
    weights = grpo.importance_weights(
        rollout.logprobs,
        rollout.sampling_logprobs,
        rollout.mask,
        importance_sampling_correction=config.importance_sampling_correction,
        importance_sampling_cap=config.importance_sampling_cap,
        importance_sampling_mode=config.importance_sampling_mode,
    )
    return weights.reshape(*shape, -1)


@partial(jax.jit, static_argnums=0, static_argnames="is_reference_set", donate_argnums=(1, 2))
def update_selector_state(
    setup: Setup,
    selector_state: PyTree,
    counters: Counters,
    step: Array,
    tasks: Tasks,
    choice: Choice,
    *parts: tuple[Feedback, Array],
    is_reference_set: bool = False,
) -> tuple[PyTree, Counters, Metrics]:
    """Updates selector and counters by the feedback of a choice; returns metrics of the beliefs
    before.

    Rows whose id is N, the number of tasks, are padding. `step` is the number of policy updates so
    far, without that of this step.
    """
    selector = setup.selector
    feedback, informative = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    counters = count_rollouts(
        counters, feedback, step + 1, num_generations=setup.config.num_generations
    )
    measured = metrics.selection(choice, feedback, informative, counters.last_seen)
    measured |= metrics.by_domain(feedback, informative, choice, tasks, setup.domains)
    update = selector.update_references if is_reference_set else selector.update
    assert update is not None and setup.shardings is not None
    selector_state = _constrain(update(selector_state, tasks, feedback), setup.shardings.selector)
    counters = _constrain(counters, setup.shardings.counters)
    return selector_state, counters, _replicated(setup, measured)


@partial(jax.jit, static_argnums=0)
def count_beliefs(setup: Setup, selector_state: PyTree, tasks: Tasks) -> Array:
    """Counts the tasks by believed pass rate."""
    return _replicated(setup, metrics.histogram(setup.selector.pass_rate(selector_state, tasks)))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def update_policy(
    setup: Setup, state: TrainState, groups: Groups, reference_params: Params | None, frozen: Params
) -> tuple[TrainState, Metrics]:
    """Completes the batch from the replay, updates the policy, stores the fresh groups in the
    replay, counts the step.

    `state` is that of `without_tasks`. If an update was skipped because its loss or gradient is not
    finite, no group of the batch is stored: they may be the reason.
    """
    drawn, replayed = complete_batch(setup, state.replay, groups, state.step)
    batch = update.Batch(
        prompts=drawn.prompts,
        lengths=drawn.lengths,
        tokens=drawn.tokens,
        mask=drawn.mask,
        logprobs=drawn.logprobs,
        advantages=drawn.advantages,
        weights=drawn.weights,
    )
    replay_metrics = {}
    if replayed is not None:
        replay_metrics = replay.metrics(drawn, replayed, state.step)
        batch = batch._replace(replayed=jnp.broadcast_to(replayed[:, None], drawn.advantages.shape))
    key = stream_key(setup.config.seed, state.step, "learn")
    params, optimizer, measured = setup.learner.step(
        key, state.params, state.optimizer, batch, reference_params, frozen
    )
    if state.replay is not None:
        none_skipped = jnp.broadcast_to(measured["skipped_updates"] == 0, groups.task.shape)
        state = state._replace(replay=_stored(setup, state.replay, (groups,), none_skipped))
    state = state._replace(step=state.step + 1, params=params, optimizer=optimizer)
    assert setup.shardings is not None
    state = _constrain(state, without_tasks(setup.shardings))
    return state, _replicated(setup, measured | replay_metrics)


def without_tasks(state: TrainState) -> TrainState:
    """Leaves out the arrays of the selector and the counters, whose shapes depend on the selector
    and on the number of tasks.

    So `update_policy`, which compiles the longest, is the same program for all of them.
    """
    return state._replace(selector=None, counters=None)


def complete_batch(
    setup: Setup, buffer: Buffer | None, fresh: Groups, step: Array
) -> tuple[Groups, Array | None]:
    """Returns the groups [B] that a step learns from, and which of them are replayed; None in a run
    without replay.

    None is drawn if the fresh groups fill the batch: `Step.num_fresh` decides so when the buffer
    has too few others.
    """
    if setup.replay is None or buffer is None:
        return fresh, None
    if fresh.step.shape[0] == setup.config.batch_size:
        return fresh, jnp.zeros(setup.config.batch_size, bool)
    key = stream_key(setup.config.seed, step, "replay")
    return setup.replay.draw(key, buffer, widen(fresh, buffer.groups.prompts.shape[1]), step)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def store_groups(setup: Setup, buffer: Buffer, parts: tuple[Groups, ...], rows: Array) -> Buffer:
    """Adds the informative groups of the concatenated `parts` to the replay, where `rows` [K] bool
    is True.
    """
    assert setup.shardings is not None
    return _constrain(_stored(setup, buffer, parts, rows), setup.shardings.replay)


def _stored(setup: Setup, buffer: Buffer, parts: tuple[Groups, ...], rows: Array) -> Buffer:
    assert setup.replay is not None
    width = buffer.groups.prompts.shape[1]
    groups = jax.tree.map(lambda *x: jnp.concatenate(x), *(widen(part, width) for part in parts))
    valid = groups.valid & rows[:, None]  # groups without rewards are not added
    return setup.replay.add(buffer, groups._replace(valid=valid))


def widen(groups: Groups, width: int) -> Groups:
    """Pads the prompts of groups to `width` tokens."""
    missing = width - groups.prompts.shape[1]
    return groups._replace(prompts=jnp.pad(groups.prompts, ((0, 0), (0, missing))))
