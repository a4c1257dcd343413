"""What a run is made of, its first state, and the programs of its steps; described ones too, without any memory."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import checkpoint, runtime
from jaxrft import mesh as meshes
from jaxrft.checkpoint import RunState, Tally
from jaxrft.config import Config
from jaxrft.learn import grpo, replay, shaping, update
from jaxrft.learn.replay import Groups, Replay
from jaxrft.report import metrics
from jaxrft.runtime import LanguageModel
from jaxrft.select import selectors
from jaxrft.select.selectors import Selector
from jaxrft.tasks import table
from jaxrft.tasks.table import TaskTable
from jaxrft.types import Array, Choice, Feedback, Rollout, Tasks


class Run(NamedTuple):
    """All that a run is made of, beside its state."""

    config: Config
    mesh: Any
    lm: LanguageModel
    table: TaskTable  # of the tasks, on the host
    tasks: Tasks  # on the devices
    selector: Selector
    learner: update.Update
    replay: Replay | None
    reference: Any  # parameters of the policy that the KL is taken to, with LoRA the frozen ones; None = no KL
    pool: Any = None  # graders, of a run that is carried out
    evaluate: Any = None  # (params, step) -> metrics, likewise
    measure: Any = None  # (params, step, table, ids) -> pass rates [N], likewise, for a selector that wants them


class Programs(NamedTuple):
    """The jitted programs of a step; they keep the state's shardings, and `learn` reuses its memory."""

    size: Any  # (state) -> how many tasks, on the host, the next step rolls out: fewer when a replay gives the others
    select: Any  # (selector_state, step, tasks, *, count=batch_size) -> (choice, selector_state)
    generate: Any  # (params, step, prompts, lengths, ids) -> rollouts
    learn: Any  # (state, tasks, choice, (prompts, lengths), rollouts, rewards, reference, frozen) -> (state, metrics)


def assemble(
    config: Config, mesh: meshes.AnyMesh, lm: LanguageModel, rows: TaskTable, *, described: bool = False
) -> tuple[Run, RunState]:
    """A run without its graders and evaluation, and its first state, which takes the parameters of `lm`.

    `described`: those are jax.ShapeDtypeStructs, and so are all arrays of the run and of the state.
    """
    number, everywhere = len(rows.lengths), meshes.sharding(mesh)
    selector = make_selector(config, config.batch_size)
    rates = np.full(number, np.nan, np.float32) if selector.measure else None
    on_host: Any = rows.reference_pass_rates, rows.embeddings, rows.domain, rates
    tasks = Tasks(*on_host)
    learner, memory = make_learner(config, lm), make_replay(config)
    shardings = update.optimizer_shardings(learner, lm.params, everywhere)
    put: Any
    put, init, copy = meshes.place, jax.jit(learner.init, out_shardings=shardings), jnp.copy
    if described:
        put, init, copy = meshes.describe, init.eval_shape, lambda x: x
    on_mesh: Any = partial(meshes.place_table, mesh=mesh, num_tasks=number, put=put)
    state = RunState(
        step=put(np.zeros((), np.int32), everywhere),
        params=lm.params,
        optimizer=init(lm.params),
        selector=on_mesh(selector.init(tasks, number)),
        replay=memory and empty(memory, config, mesh, rows, described=described),
        tally=on_mesh(Tally._make((np.full(number, -1, np.int32), np.zeros(2, np.int32)))),
    )
    reference = (lm.frozen or jax.tree.map(copy, lm.params)) if config.kl_coef > 0 else None
    lm = lm._replace(params=None)  # the state's from now on, which each step gives new memory
    return Run(config, mesh, lm, rows, on_mesh(tasks), selector, learner, memory, reference), state


def make_selector(config: Config, count: int) -> Selector:
    """The selector of the config for batches of `count` tasks; its state is the same for any."""
    own = dataclasses.asdict(config.select)
    del own["embeddings"]  # which the tasks have
    return selectors.make(batch_size=count, num_generations=config.num_generations, **own)


def make_replay(config: Config) -> Replay | None:
    """The replay of the config, if it has one."""
    c = config.replay
    if c.capacity == 0:
        return None
    return replay.ring(
        capacity=c.capacity,
        batch_size=config.batch_size,
        fresh_fraction=c.fresh_fraction,
        max_age=c.max_age,
        draw=c.draw,
    )


def empty(memory: Replay, config: Config, mesh: meshes.AnyMesh, rows: TaskTable, *, described: bool) -> replay.Buffer:
    """The empty buffer on the mesh, for the longest prompts there are; or its description."""
    like = replay.shapes(
        num_generations=config.num_generations,
        prompt_length=table.buckets(rows.lengths)[-1],
        completion_length=config.max_completion_length,
        weighted=config.importance_sampling_correction != "none",
    )
    buffer = jax.eval_shape(lambda: memory.init(like))
    where = jax.tree.map(lambda x: meshes.task_sharding(mesh, x.shape, config.replay.capacity), buffer)
    init = jax.jit(lambda: memory.init(like), out_shardings=where)
    return init.eval_shape() if described else init()


def make_learner(config: Config, lm: LanguageModel) -> update.Update:
    """The training step of the config."""
    return update.make(
        lm.policy,
        mini_batch_size=config.tasks_per_update,
        micro_batch_size=config.rows_per_micro_batch,
        num_iterations=config.num_iterations,
        loss_type=config.loss_type,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        clip=config.replay.clip,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def compile_steps(run: Run, state: RunState) -> Programs:
    """The programs of a run whose state lies as this one does; both may be descriptions."""
    config, mesh = run.config, run.mesh
    everywhere = meshes.sharding(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    reward_weights = np.array(config.reward_weights or [1.0] * len(config.rewards), np.float32)

    def select(selector_state: Any, step: Array, tasks: Tasks, *, count: int = config.batch_size) -> tuple[Choice, Any]:
        selector = make_selector(config, count)
        return selector.select(runtime.stream(config.seed, step, "select"), selector_state, tasks)

    def learn(
        state: RunState,
        tasks: Tasks,
        choice: Choice,
        prompts: Any,
        rollouts: Rollout,
        rewards: Array,
        ref: Any,
        frozen: Any,
    ) -> tuple[RunState, dict[str, Array]]:
        """Updates selector and policy; rewards [B, G, F], NaN = does not apply."""
        groups, counted = rewards.shape[:2], runtime.success_index(config)
        total, valid = shaping.total(rewards, jnp.asarray(reward_weights), success=counted)
        success = jnp.where(valid, rewards[..., counted], 0.0)
        trials = jnp.sum(valid, axis=1, dtype=jnp.float32)
        spent = jnp.sum(rollouts.lengths.reshape(groups), axis=1)
        feedback = Feedback(choice.ids, jnp.sum(success, axis=1), trials, spent.astype(jnp.float32))
        last = jnp.take_along_axis(rollouts.tokens, rollouts.lengths[:, None] - 1, axis=1)
        truncated = ~jnp.any(last == jnp.asarray(run.lm.eos_ids, jnp.int32)[None], axis=1)
        leaves = truncated.reshape(groups) if config.mask_truncated_completions else jnp.zeros(groups, bool)
        total, of_length = shape_lengths(config, total, rollouts.lengths.reshape(groups))
        fresh = Groups(
            *prompts,
            tokens=rollouts.tokens.reshape(*groups, -1),
            mask=jnp.where((valid & ~leaves)[..., None], rollouts.mask.reshape(*groups, -1), 0.0),
            logprobs=rollouts.logprobs.reshape(*groups, -1),
            advantages=grpo.advantages(total, scale_rewards=config.scale_rewards, mask=valid),
            rewards=jnp.where(valid, total, jnp.nan),
            task=choice.ids,
            step=jnp.full(groups[:1], state.step),
            weights=importance_weights(config, rollouts, groups),
        )
        batch, buffer, of_replay = remember(run, state.replay, fresh, state.step)
        key = runtime.stream(config.seed, state.step, "learn")
        params, optimizer, found = run.learner.step(key, state.params, state.optimizer, batch, ref, frozen)
        tally = checkpoint.count(state.tally, choice.ids, state.step + 1, jnp.sum(spent))
        found |= of_replay | of_length
        found |= metrics.rewards(rewards, config.rewards, total, valid, grpo.informative(total, valid))
        found |= metrics.completions(rollouts, truncated)
        informative = grpo.informative(success, valid)
        found |= metrics.selection(choice, feedback, informative, tally.last_seen)
        found |= metrics.by_domain(informative, choice, tasks, run.table.domains)
        selector = run.selector.update(state.selector, tasks, feedback)
        return RunState(state.step + 1, params, optimizer, selector, buffer, tally), found

    return Programs(
        partial(rollout_size, run, None if run.replay is None else jax.jit(run.replay.fresh_needed)),
        jax.jit(select, static_argnames="count", out_shardings=(everywhere, shardings.selector)),
        runtime.generator(run.lm, config, mesh),
        jax.jit(learn, donate_argnums=0, out_shardings=(shardings, everywhere)),
    )


def rollout_size(run: Run, fresh_needed: Any, state: RunState) -> int:
    """How many tasks the next step rolls out: there are two sizes, each a set of compiled programs."""
    fewest = run.config.fresh_batch_size
    enough = fresh_needed is not None and int(fresh_needed(state.replay, state.step)) <= fewest
    return fewest if enough else run.config.batch_size


def remember(run: Run, buffer: Any, fresh: Groups, step: Array) -> tuple[update.Batch, Any, dict[str, Array]]:
    """What the step learns from, the buffer after it, and metrics; the whole batch is fresh while the buffer is short.

    A run without replay learns from its fresh groups.
    """
    if run.replay is None:
        return update.Batch(*fresh[:6], weights=fresh.weights), buffer, {}
    width = buffer.groups.prompts.shape[1]
    wide = fresh._replace(prompts=jnp.pad(fresh.prompts, ((0, 0), (0, width - fresh.prompts.shape[1]))))
    groups, replayed = fresh, jnp.zeros(run.config.batch_size, bool)
    if fresh.step.shape[0] < run.config.batch_size:
        key = runtime.stream(run.config.seed, step, "replay")
        groups, replayed = run.replay.draw(key, buffer, wide, step)
    rows = jnp.broadcast_to(replayed[:, None], groups.advantages.shape)
    batch = update.Batch(*groups[:6], replayed=rows, weights=groups.weights)
    return batch, run.replay.add(buffer, wide), replay.metrics(groups, replayed, step)


def shape_lengths(config: Config, total: Array, lengths: Array) -> tuple[Array, dict[str, Array]]:
    """The rewards [B, G] of completions of so many tokens [B, G] with the soft overlong penalty, if there is one."""
    if config.overlong_buffer == 0:
        return total, {}
    penalty = shaping.overlong(
        lengths,
        max_completion_length=config.max_completion_length,
        overlong_buffer=config.overlong_buffer,
        overlong_penalty=config.overlong_penalty,
    )
    return total + penalty, {"completions/overlong_penalty": jnp.mean(penalty)}


def importance_weights(config: Config, rollouts: Rollout, groups: tuple[int, ...]) -> Array | None:
    """Weights [B, G, T] of the tokens' losses for what they were really drawn from; None = 1 each."""
    if config.importance_sampling_correction == "none":
        return None
    weights = grpo.importance_weights(
        rollouts.logprobs,
        rollouts.sampling_logprobs,
        rollouts.mask,
        importance_sampling_correction=config.importance_sampling_correction,
        importance_sampling_cap=config.importance_sampling_cap,
    )
    return weights.reshape(*groups, -1)
