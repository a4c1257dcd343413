"""What a run is made of, its first state, and the programs of its steps; described ones too, without any memory."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.learn import grpo, replay, reward_shaping, update
from jaxrft.learn.replay import Groups, Replay
from jaxrft.lm.policy import LanguageModel, compile_rollout
from jaxrft.report import metrics
from jaxrft.report.visits import Visits
from jaxrft.select import selectors
from jaxrft.select.base import Selector
from jaxrft.select.checks import check_batch
from jaxrft.select.dots.predictor import Predictor, selector_options
from jaxrft.streams import stream_key
from jaxrft.tasks import table
from jaxrft.tasks.projections import project_table
from jaxrft.tasks.table import TaskTable
from jaxrft.train.state import Counters, TrainState, count_rollouts
from jaxrft.types import Array, Choice, Feedback, InputError, Rollout, Tasks


class Run(NamedTuple):
    """All that a run is made of, beside its state."""

    config: Config
    mesh: Any
    lm: LanguageModel
    table: TaskTable  # of the tasks, on the host
    tasks: Tasks  # on the devices
    selector: Selector
    predictor: Predictor | None  # that the selector uses, if it uses any
    learner: update.Update
    replay: Replay | None
    reference: Any  # parameters of the policy that the KL is taken to, with LoRA the frozen ones; None = no KL
    pool: Any = None  # graders, of a run that is carried out
    visits: Visits | None = None  # what they said of each task, likewise
    evaluate: Any = None  # (params, step, stopped) -> metrics, likewise
    measure: Any = None  # (params, step, table, ids, stopped) -> pass rates [N], likewise, where they are wanted


class Judged(NamedTuple):
    """Groups of rollouts, graded; B tasks."""

    groups: Groups
    feedback: Feedback
    informative: Array  # [B] bool, successes not all equal
    distance: Array  # [B] float32, of the pass rate to the target; infinite where the group is not informative
    metrics: dict[str, Array]


class Programs(NamedTuple):
    """The jitted programs of a step; they keep the state's shardings, and reuse the memory of what they change."""

    size: Any  # (state) -> how many new groups, on the host, the next step learns from: fewer if a replay has others
    probe: Any  # (selector_state, step, tasks) -> choice, of tasks to roll out in order to know
    select: Any  # (selector_state, step, tasks, exclude [N], random stream, *, batch_size) -> (choice, selector_state)
    generate: Any  # (params, step, prompts, lengths, ids, number of the random stream) -> rollouts
    judge: Any  # (step, ids, (prompts, lengths), rollouts, rewards, success) -> judged
    note: Any  # (selector_state, tally, step, tasks, choice, *parts, reference) -> (selector_state, tally, metrics)
    join: Any  # (groups, parts of other groups, rows of all of these) -> groups
    learn: Any  # (state, groups, reference, frozen) -> (state, metrics)
    draw: Any  # (buffer, groups, step) -> (what that step learns from, which of it is replayed)
    store: Any  # (buffer, parts of groups, which of them) -> buffer


def assemble(
    config: Config,
    mesh: meshes.AnyMesh,
    lm: LanguageModel,
    rows: TaskTable,
    predictor: Predictor | None = None,
    *,
    described: bool = False,
) -> tuple[Run, TrainState]:
    """A run without its graders and evaluation, and its first state, which takes the parameters of `lm`.

    `predictor`: of a selector that needs one. `described`: those parameters are jax.ShapeDtypeStructs, and so are all
    arrays of the run and of the state.
    """
    number, everywhere = len(rows.lengths), meshes.sharding(mesh)
    selector = make_selector(config, predictor)
    rates = np.full(number, np.nan, np.float32) if selector.measure else None
    # dots has all that it needs of embeddings in their projections
    on_host: Any = rows.reference_pass_rates, None if predictor else rows.embeddings, rows.domain, rates
    tasks = Tasks(*on_host)
    learner, memory = make_learner(config, lm), make_replay(config)
    shardings = update.optimizer_shardings(learner, lm.params, everywhere)
    put: Any
    put, init, copy = meshes.place, jax.jit(learner.init, out_shardings=shardings), jnp.copy
    if described:
        put, init, copy = meshes.describe, init.eval_shape, lambda x: x
    on_mesh: Any = partial(meshes.place_table, mesh=mesh, num_tasks=number, put=put)
    projections = predictor and project_table(predictor, rows, mesh, described=described)
    beliefs = selector.init(tasks._replace(projections=projections), number)
    check_batch(config.batch_size, rows.lengths, None)
    state = TrainState(
        step=put(np.zeros((), np.int32), everywhere),
        params=lm.params,
        optimizer=init(lm.params),
        selector=on_mesh(beliefs),
        replay=memory and empty(memory, config, mesh, rows, described=described),
        tally=on_mesh(Counters._make((np.full(number, -1, np.int32), *np.zeros((2, 2), np.int32)))),
    )
    reference = (lm.frozen or jax.tree.map(copy, lm.params)) if config.kl_coef > 0 else None
    lm = lm._replace(params=None)  # the state's from now on, which each step gives new memory
    tasks = on_mesh(tasks)._replace(projections=projections)
    return Run(config, mesh, lm, rows, tasks, selector, predictor, learner, memory, reference), state


def make_selector(config: Config, predictor: Predictor | None) -> Selector:
    """Returns the selector of the config."""
    own = dataclasses.asdict(config.select) | (selector_options(predictor) if predictor else {})
    del own["embeddings"]  # which the tasks have
    return selectors.make(num_generations=config.num_generations, **own)


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
    if described:
        return init.eval_shape()
    shards = jax.tree.map(lambda x, of: math.prod(of.shard_shape(x.shape)) * x.dtype.itemsize, buffer, where)
    check_fits(config.replay.capacity, sum(jax.tree.leaves(shards)), meshes.memory_of_a_device(mesh))
    return init()


def check_fits(capacity: int, needed: int, available: int | None) -> None:
    """Raises InputError for a replay buffer of more bytes than each device has: the system would kill the process."""
    if available is not None and needed > available:
        raise InputError(
            f"replay.capacity is {capacity:,}: its groups take {needed / 2**30:,.1f} GiB of each device, which has "
            f"{available / 2**30:,.1f} GiB; lower it"
        )


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
        kl_estimator=config.kl_estimator,
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        clip=config.replay.clip,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def compile_steps(run: Run, state: TrainState) -> Programs:
    """The programs of a run whose state lies as this one does; both may be descriptions."""
    everywhere, rows = meshes.sharding(run.mesh), meshes.sharding(run.mesh, "batch")
    where = jax.tree.map(lambda x: x.sharding, state)

    def compiled(function: Any, out: Any, **options: Any) -> Any:
        return jax.jit(partial(function, run), out_shardings=out, **options)

    return Programs(
        size=partial(rollout_size, run, None if run.replay is None else jax.jit(run.replay.fresh_needed)),
        probe=compiled(probe, everywhere),
        select=compiled(select, (everywhere, where.selector), static_argnames="batch_size", donate_argnums=0),
        generate=compile_rollout(run.lm, run.config, run.mesh),
        judge=compiled(judge, Judged(rows, *[everywhere] * 4)),  # pyright: ignore[reportArgumentType]
        note=compiled(
            note, (where.selector, where.tally, everywhere), static_argnames="reference", donate_argnums=(0, 1)
        ),
        join=compiled(join, rows),
        learn=compiled(learn, (where, everywhere), donate_argnums=0),
        draw=compiled(draw, rows),
        store=compiled(store, where.replay, donate_argnums=0),
    )


def rollout_size(run: Run, fresh_needed: Any, state: TrainState) -> int:
    """How many new groups the next step learns from: there are two sizes, each a set of compiled programs."""
    fewest = run.config.fresh_batch_size
    enough = fresh_needed is not None and int(fresh_needed(state.replay, state.step)) <= fewest
    return fewest if enough else run.config.batch_size


def probe(run: Run, selector_state: Any, step: Array, tasks: Tasks) -> Choice:
    """The tasks that the selector wants to know about, and what it has believed of them so far."""
    choose: Any = run.selector.reference_set
    ids = choose(stream_key(run.config.seed, step, "probe"), selector_state, tasks)
    return Choice(ids, run.selector.pass_rate(selector_state, tasks)[ids])


def select(
    run: Run, selector_state: Any, step: Array, tasks: Tasks, exclude: Array, stream: Array, *, batch_size: int
) -> tuple[Choice, Any]:
    """Chooses `batch_size` tasks, and none of the mask `exclude` [N] while there are others.

    `stream` is the number of the random stream.
    """
    key = stream_key(run.config.seed, step, stream)
    return run.selector.select(key, selector_state, tasks, batch_size=batch_size, exclude=exclude)


def judge(
    run: Run, step: Array, ids: Array, prompts: Any, rollouts: Rollout, rewards: Array, success_index: Array
) -> Judged:
    """What `rewards` [B, G, F], NaN = does not apply, make of the rollouts of the tasks `ids` [B].

    `success_index` [B] int32: which of the rewards is success of each task.
    """
    config, groups = run.config, rewards.shape[:2]
    total, valid, tolerance, of_length = sums(config, rewards, success_index, rollouts.lengths.reshape(groups))
    total = grpo.leveled(total, valid, tolerance=tolerance)
    success = jnp.where(valid, reward_shaping.of_tasks(rewards, success_index), 0.0)
    trials = jnp.sum(valid, axis=1, dtype=jnp.float32)
    rate = jnp.sum(success, axis=1) / jnp.maximum(trials, 1.0)
    informative = grpo.informative(success, valid)
    spent = jnp.sum(rollouts.lengths.reshape(groups), axis=1)
    last = jnp.take_along_axis(rollouts.tokens, rollouts.lengths[:, None] - 1, axis=1)
    truncated = ~jnp.any(last == jnp.asarray(run.lm.eos_ids, jnp.int32)[None], axis=1)
    leaves = truncated.reshape(groups) if config.mask_truncated_completions else jnp.zeros(groups, bool)
    fresh = Groups(
        *prompts,
        tokens=rollouts.tokens.reshape(*groups, -1),
        mask=jnp.where((valid & ~leaves)[..., None], rollouts.mask.reshape(*groups, -1), 0.0),
        logprobs=rollouts.logprobs.reshape(*groups, -1),
        advantages=grpo.advantages(total, scale_rewards=config.scale_rewards, mask=valid),
        rewards=jnp.where(valid, total, jnp.nan),
        task=ids,
        step=jnp.full(groups[:1], step),
        weights=importance_weights(config, rollouts, groups),
    )
    found = metrics.rewards(rewards, config.rewards, total, valid, grpo.informative(total, valid))
    return Judged(
        groups=fresh,
        feedback=Feedback(ids, jnp.sum(success, axis=1), trials, spent.astype(jnp.float32)),
        informative=informative,
        distance=jnp.where(informative, jnp.abs(rate - config.select.target), jnp.inf),
        metrics=of_length | found | metrics.completions(rollouts, truncated),
    )


def note(
    run: Run,
    selector_state: Any,
    tally: Counters,
    step: Array,
    tasks: Tasks,
    choice: Choice,
    *parts: Any,
    reference: bool = False,
) -> tuple[Any, Counters, dict[str, Array]]:
    """Tells selector and tally what came of a choice, (feedback, informative) of its `parts`; metrics of beliefs.

    Rows of the task N are padding. `reference`: the choice is a reference set.
    """
    feedback, informative = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    tally = count_rollouts(tally, feedback, step + 1, run.config.num_generations)
    found = metrics.selection(choice, feedback, informative, tally.last_seen)
    found |= metrics.by_domain(informative, choice, tasks, run.table.domains)
    learn_of: Any = run.selector.update_references if reference else run.selector.update
    return learn_of(selector_state, tasks, feedback), tally, found


def join(run: Run, groups: Groups, others: tuple[Groups, ...], rows: Array) -> Groups:
    """The `rows` [B] of `groups` and, behind them, the others, as one batch."""
    every = (groups, *others)
    width = max(each.prompts.shape[1] for each in every)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x)[rows], *(widened(each, width) for each in every))
    valid = jnp.isfinite(joined.rewards)
    total = jnp.where(valid, joined.rewards, 0.0)
    return joined._replace(advantages=grpo.advantages(total, scale_rewards=run.config.scale_rewards, mask=valid))


def learn(run: Run, state: TrainState, groups: Groups, ref: Any, frozen: Any) -> tuple[TrainState, dict[str, Array]]:
    """Updates the policy by the groups of the step, and those that a replay draws.

    Of a step with an update that could not be made, whose groups may be why, none enters the replay.
    """
    drawn, replayed = draw(run, state.replay, groups, state.step)
    key = stream_key(run.config.seed, state.step, "learn")
    batch, found = update.Batch(*drawn[:6], weights=drawn.weights), {}
    if replayed is not None:
        found = replay.metrics(drawn, replayed, state.step)
        batch = batch._replace(replayed=jnp.broadcast_to(replayed[:, None], drawn.advantages.shape))
    params, optimizer, of_update = run.learner.step(key, state.params, state.optimizer, batch, ref, frozen)
    if run.replay is not None:
        made = jnp.broadcast_to(of_update["skipped_updates"] == 0, groups.task.shape)
        state = state._replace(replay=store(run, state.replay, (groups,), made))
    return state._replace(step=state.step + 1, params=params, optimizer=optimizer), of_update | found


def store(run: Run, buffer: Any, groups: tuple[Groups, ...], which: Array) -> Any:
    """The buffer with those of the groups [K] that teach, of `which` [K] bool."""
    memory: Any = run.replay
    wide = (widened(each, buffer.groups.prompts.shape[1]) for each in groups)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *wide)
    return memory.add(buffer, whole._replace(rewards=jnp.where(which[:, None], whole.rewards, jnp.nan)))


def draw(run: Run, buffer: Any, fresh: Groups, step: Array) -> tuple[Groups, Array | None]:
    """The groups that the step learns from, and which of them [B] are replayed: none while the buffer is short.

    A run without replay learns from its fresh groups.
    """
    if run.replay is None:
        return fresh, None
    if fresh.step.shape[0] == run.config.batch_size:
        return fresh, jnp.zeros(run.config.batch_size, bool)
    key = stream_key(run.config.seed, step, "replay")
    return run.replay.draw(key, buffer, widened(fresh, buffer.groups.prompts.shape[1]), step)


def widened(groups: Groups, width: int) -> Groups:
    """The groups with prompts padded to `width` tokens."""
    return groups._replace(prompts=jnp.pad(groups.prompts, ((0, 0), (0, width - groups.prompts.shape[1]))))


def sums(
    config: Config, rewards: Array, success_index: Array, lengths: Array
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Computes what the rewards [B, G, F] of completions of so many tokens [B, G] come to, all [B, G].

    Returns the sums, whether they exist, the most that rounding may make of their differences, and metrics. The soft
    overlong penalty is one more term of each sum, if there is one.
    """
    reward_weights = jnp.array(config.reward_weights or [1.0] * len(config.rewards), jnp.float32)
    total, exists = reward_shaping.total(rewards, reward_weights, success=success_index)
    magnitude = reward_shaping.magnitude(rewards, reward_weights)
    if config.overlong_buffer == 0:
        return total, exists, grpo.rounding(magnitude, len(config.rewards)), {}
    penalty = reward_shaping.overlong(
        lengths,
        max_completion_length=config.max_completion_length,
        overlong_buffer=config.overlong_buffer,
        overlong_penalty=config.overlong_penalty,
    )
    tolerance = grpo.rounding(magnitude + jnp.abs(penalty), len(config.rewards) + 1)
    return total + penalty, exists, tolerance, {"completions/overlong_penalty": jnp.mean(penalty)}


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
        importance_sampling_mode=config.importance_sampling_mode,
    )
    return weights.reshape(*groups, -1)
