"""What training and evaluation share: the policy on its mesh, prompts, rollouts, and their rewards."""

import dataclasses
import datetime
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxrft import checkpoint, signals
from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.files import read_json
from jaxrft.lm import embed, hub, model, rollout, tokenizer, weights
from jaxrft.rewards import REWARDS, ground_truth
from jaxrft.rewards import pool as pools
from jaxrft.select import selectors
from jaxrft.tasks import embeddings, mixture, sources, table
from jaxrft.types import Array, InputError, Rollout

logger = logging.getLogger(__name__)

HEARTBEAT = 30  # seconds without a sign of life after which JAX ends all processes and says which is missing

# The random streams of a step; the last is that of a first refill, and those of others are the numbers behind it.
USES = (
    *("select", "rollout", "learn", "eval", "init", "prepare", "replay", "measure", "probe", "rollout of a probe"),
    "refill",
)


class LanguageModel(NamedTuple):
    """A policy, its parameters on the mesh, and its tokenizer."""

    config: model.ModelConfig
    policy: model.Policy
    params: Any  # what is trained, float32: all parameters, or the adapters of LoRA
    frozen: model.Params  # what is not, in the dtype of the config: the base of LoRA, otherwise {}
    tokenizer: Any
    eos_ids: tuple[int, ...]
    folder: Path  # of its checkpoint


def start(config: Config) -> Mesh:
    """Joins the other processes if there are any, and lays out the mesh."""
    if config.distributed and not jax.distributed.is_initialized():
        join()
    mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    check_mesh(config, mesh)
    return mesh


def join() -> None:
    """Joins the other processes of the run; raises InputError when nothing says which they are."""
    address, count, index = map(os.environ.get, ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.config.update("jax_enable_preemption_service", False)  # which would keep SIGTERM to itself
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, IndexError) as error:  # an address without a port is an IndexError
        raise InputError(
            f"distributed is True, but JAX_COORDINATOR_ADDRESS is {address}, JAX_NUM_PROCESSES {count} and "
            f"JAX_PROCESS_ID {index} ({error}): set them to, for example, localhost:1234, 2 and 0 to 1, outside of "
            "TPU pods and SLURM jobs"
        ) from error
    if jax.process_index() == 0:
        signals.leave_last()


# What check_mesh reads from the config: property -> the field to change.
FIELDS = {
    "tasks_per_update": "mini_batch_size",
    "rows_per_micro_batch": "micro_batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "fresh_batch_size": "batch_size x replay.fresh_fraction",
}


def check_mesh(config: Config, mesh: meshes.AnyMesh) -> None:
    """Raises InputError for batches that the mesh does not divide."""
    count, rows = meshes.shards(mesh, "batch"), config.rows_per_micro_batch
    for name in ("batch_size", *FIELDS):
        what = FIELDS.get(name, name)
        meshes.check_divides(mesh, what, getattr(config, name), "batch")
    groups = rows // config.num_generations
    if groups >= count and config.tasks_per_update % groups == 0 and groups % count == 0:
        return
    if groups < count and config.num_generations % (rows // count) == 0:
        return
    raise InputError(
        f"micro_batch_size {rows} does not divide over data x fsdp = {count} devices: choose a multiple of "
        f"{count * config.num_generations} rows, or {count} times a divisor of num_generations {config.num_generations}"
    )


def open_model(config: Config, mesh: Mesh, *, trained: bool = True) -> LanguageModel:
    """Loads the policy of a Hugging Face folder, or of an id on the hub, onto the mesh.

    What is trained, all parameters or fresh adapters, is float32; the others need no more digits than are computed
    with. A policy that is not `trained` has no adapters, and its parameters are in the dtype of the config.
    """
    lm = read_model(config, hub.find(config.model), trained=trained)
    dtype = jnp.float32 if trained and lm.config.lora is None else jnp.dtype(config.dtype)
    params = weights.load(lm.folder, lm.config, mesh=mesh, dtype=dtype)
    if lm.config.lora is None:
        return lm._replace(params=params)
    return lm._replace(params=draw_adapters(config, lm.config, mesh), frozen=params)


def read_model(config: Config, folder: Path, *, trained: bool = True) -> LanguageModel:
    """The policy of a Hugging Face folder, all but its parameters."""
    shape = weights.read_config(folder)._replace(lora=lora(config) if trained else None)
    check_rank(config, shape)
    text = tokenizer.load(str(folder))
    if len(text) > shape.vocab_size:
        raise InputError(
            f"the tokenizer of {config.model} has {len(text)} tokens but the model only {shape.vocab_size}: "
            "they do not belong together"
        )
    check_length(config, weights.max_positions(folder))
    policy = model.decoder(shape, dtype=jnp.dtype(config.dtype))
    return LanguageModel(shape, policy, None, {}, text, tokenizer.eos_ids(text, str(folder)), folder)


def lora(config: Config) -> model.LoRA | None:
    """The adapters that the config asks for, their targets in one order; None at rank 0."""
    rank, targets = config.lora.rank, sorted(set(config.lora.targets))
    return model.LoRA(rank, config.lora.alpha, tuple(targets)) if rank else None


def check_rank(config: Config, shape: model.ModelConfig) -> None:
    """Raises InputError for adapters that are larger than the weights that they adapt."""
    if config.lora.rank > shape.hidden_size:
        raise InputError(
            f"lora.rank is {config.lora.rank:,}: it must be at most {shape.hidden_size:,}, the hidden_size of "
            f"{config.model}"
        )


def draw_adapters(config: Config, shape: model.ModelConfig, mesh: Mesh) -> model.Params:
    """Fresh adapters on the mesh."""
    rows = model.adapters(shape)
    where = {row.name: meshes.sharding(mesh, *row.axes) for row in rows}
    return jax.jit(lambda: model.draw(stream(config.seed, 0, "init"), rows), out_shardings=where)()


def fingerprint(params: Any, mesh: Mesh, *, dtype: Any = None) -> str:
    """A digest of every bit of the parameters, the same on any mesh: integer sums do not depend on their order.

    `dtype`: of the parameters as they are computed with, whatever they are kept in.
    """

    def checksums(params: Any) -> Array:
        return jnp.stack([_checksum(x if dtype is None else x.astype(dtype)) for x in jax.tree.leaves(params)])

    sums = jax.jit(checksums, out_shardings=meshes.sharding(mesh))(params)
    return table.digest(np.asarray(sums).tobytes())


def _checksum(x: Array) -> Array:
    """The sum of x's bits as integers, each times an odd number of its place, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def export(config: Config, lm: LanguageModel, params: Any, folder: Path) -> str:
    """Writes the trained policy to <folder>/policy, adapters to <folder>/adapter besides; says where they are."""
    export_whole(lm, params, folder / "policy")
    if lm.config.lora is None:
        return f"the trained policy is in {folder / 'policy'}"
    weights.save_adapters(folder / "adapter", params, lm.config, source=config.model)
    return f"the trained policy is in {folder / 'policy'}, its adapters alone are in {folder / 'adapter'}"


def export_whole(lm: LanguageModel, params: Any, folder: Path) -> None:
    """Writes a policy, its adapters merged, in the place of the one in `folder`."""
    weights.save(folder, model.whole(params, lm.frozen), lm.config, source=lm.folder)


def check_finite(lm: LanguageModel, params: Any, *, step: int, newest: int | None) -> None:
    """Raises InputError when trained parameters are not finite after `step`; `newest` is the last that was saved."""
    if flaw := weights.not_finite(params, lm.config):
        kept = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
        raise InputError(f"after step {step} {flaw}: nothing of it is saved, {kept}; lower the learning_rate")


def check_length(config: Config, limit: int | None) -> None:
    """Raises InputError when prompts and completions may outgrow the `limit` that the model was made for."""
    most = config.max_prompt_length + config.max_completion_length
    if limit is not None and most > limit:
        raise InputError(
            f"max_prompt_length {config.max_prompt_length} + max_completion_length {config.max_completion_length} is "
            f"{most}, but {config.model} has max_position_embeddings {limit}: lower one of the two"
        )


def open_tasks(tasks: TasksConfig, config: Config, text: Any) -> table.TaskTable:
    """Reads and tokenizes tasks; raises InputError when they do not load or lack what the rewards need."""
    found = tokenize(sources.load(tasks), tasks, config, text)
    check_columns(config, found, tasks.source)
    return with_embeddings(found, tasks)


def tokenize(rows: sources.Rows, tasks: TasksConfig, config: Config, text: Any) -> table.TaskTable:
    """Returns the table of a set's rows, their prompts as tokens of the tokenizer `text`."""
    return table.prepare(
        rows,
        text,
        config.max_prompt_length,
        name=tasks.title,
        variables=json.loads(config.chat_template_kwargs),
        date=config.chat_template_date,
    )


def dated(config: Config, begun: Callable[[], str | None] = lambda: None) -> Config:
    """Returns the config with the date that chat templates are given, the same on every process.

    It is the one of the config, else the one with which the work in hand was `begun`, else that of the run in
    `output_dir`, else today's: prompts of one run are the same on every day.
    """
    if config.chat_template_date is not None:
        return config
    date = checkpoint.told(lambda: begun() or first_day(Path(config.output_dir)))
    return dataclasses.replace(config, chat_template_date=date)


def first_day(folder: Path) -> str:
    """Returns the date in the records of the run that has begun in a folder, or today's."""
    today = datetime.date.today().isoformat()
    if not checkpoint.saved_steps(folder):
        return today
    try:
        recorded = read_json(folder / "config.json", dict).get("chat_template_date")
        return datetime.date.fromisoformat(recorded or today).isoformat()
    except (OSError, ValueError, TypeError) as error:
        logger.warning(
            "the first day of the run in %s is not known (%s): chat templates get today's date; set chat_template_date "
            "if its tasks are taken for others",
            folder,
            error,
        )
        return today


def with_embeddings(found: table.TaskTable, tasks: TasksConfig) -> table.TaskTable:
    """The tasks of a set with the embeddings of its file, if it has one; raises InputError when it lacks any."""
    if tasks.embeddings is None:
        return found
    made = embeddings.read(tasks.embeddings)
    rows = embeddings.of_prompts(made, found.prompts, path=tasks.embeddings, name=tasks.title)
    return found._replace(embeddings=rows, embedded_by=made.made_by)


def embeds(config: Config) -> bool:
    """Whether the tasks of a run have embeddings: of a file, or of the policy for a selector that uses them."""
    own = config.select.embeddings == "policy" and config.select.name in selectors.USE_EMBEDDINGS
    return own or any(tasks.embeddings is not None for tasks in config.task_sets)


def embedder(
    lm: LanguageModel, config: Config, mesh: Mesh, tasks: table.TaskTable
) -> Callable[[np.ndarray], np.ndarray]:
    """(ids [<= B]) -> the embeddings [<= B, D] float32, on every process, of those tasks by the policy as it is loaded.

    With LoRA by its frozen weights, as fresh adapters change nothing.
    """
    params, widths = lm.frozen or lm.params, table.buckets(tasks.lengths)
    pooled = jax.jit(partial(embed.pooled, lm.policy), out_shardings=meshes.sharding(mesh))

    def of_batch(ids: np.ndarray) -> np.ndarray:
        filled = np.resize(ids, config.batch_size)  # the last batch is filled up with its own tasks
        return np.asarray(pooled(params, *prompt_batch(tasks, filled, widths, mesh)))[: len(ids)]

    return of_batch


def made_by(lm: LanguageModel, config: Config, mesh: Mesh) -> dict[str, Any]:
    """What tells the embeddings by this policy from those by others."""
    digest = fingerprint(lm.frozen or lm.params, mesh, dtype=config.dtype)
    shape = {"model": config.model, "pooling": embeddings.POOLING, "width": lm.config.hidden_size}
    return shape | {"dtype": config.dtype, "digest of the model's parameters": digest}


def open_mixture(config: Config, text: Any) -> table.TaskTable:
    """The tasks to train on: those of all sets, in the shares that their weights ask for."""
    tables = {tasks.title: open_tasks(tasks, config, text) for tasks in config.task_sets}
    shares = [tasks.weight for tasks in config.task_sets if tasks.weight is not None]
    found = mixture.mix(tables, shares or None, seed=config.seed)
    if count := mixture.duplicates(found):
        logger.warning("%d of %d tasks have the prompt and answer of another one", count, len(found.lengths))
    return found


def rewards_by_name(reward: Any) -> dict[str, Any]:
    """One function, or a dict of several, as a dict; raises InputError for anything else."""
    functions: dict[Any, Any] = reward if isinstance(reward, dict) else {getattr(reward, "__name__", None): reward}
    if not functions or not all(isinstance(name, str) and callable(f) for name, f in functions.items()):
        raise InputError(f"reward is {reward!r}: give a function from a module's top level or a dict of some by name")
    return functions


def open_rewards(config: Config, reward: dict[str, Any] | None = None) -> pools.Pool:
    """The workers that grade: the functions of `reward` by name, or else the configured rewards."""
    named = dict(reward or zip(config.rewards, config.rewards, strict=True))
    return pools.Pool(
        list(named.items()),
        workers=config.reward_workers,
        timeout=config.reward_timeout,
        completions_as=config.reward_completions,
    )


def stream(seed: int, step: Array | int, use: str | Array) -> Array:
    """The key of one use, by its name or its number, in one step: derived, never stored."""
    number = USES.index(use) if isinstance(use, str) else use
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)


def generator(lm: LanguageModel, config: Config, mesh: Mesh, **options: Any) -> Callable[..., Rollout]:
    """The jitted rollout: (params, step, prompts, lengths, ids) -> Rollout, its rows sharded over the mesh.

    `params` are all parameters, frozen ones and adapters. `options` are `rollout.generate`'s, beside those of the
    config, and `use`, the random stream; the number of another one may come behind the ids.
    """
    use = options.pop("use", "rollout")
    settings = {
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "eos_ids": lm.eos_ids,
    } | options

    def generate(
        params: Any, step: Array, prompts: Array, lengths: Array, ids: Array, number: Array | None = None
    ) -> Rollout:
        # Merged and cast once for the whole decoding instead of once a token; the learner does both in the same way.
        ready = model.gathered if config.gather_for_rollout else model.merged
        params = ready(lm.config, params, jnp.dtype(config.dtype))
        key = stream(config.seed, step, use if number is None else number)
        return rollout.generate(lm.policy, params, key, prompts, lengths, ids, **settings)

    rows, cells = meshes.sharding(mesh, "batch"), meshes.sharding(mesh, "batch", None)
    return jax.jit(generate, out_shardings=Rollout._make((cells, rows, cells, cells, cells)))


def prompt_batch(tasks: table.TaskTable, ids: np.ndarray, widths: tuple[int, ...], mesh: Mesh) -> tuple[Array, Array]:
    """Prompts [B, P] of the tasks `ids` in the narrowest of the widths, and their lengths [B], on the mesh."""
    tokens, lengths = table.batch(tasks, ids, table.bucket_of(tasks.lengths[ids], widths))
    return meshes.from_host(mesh, tokens, "batch", None), meshes.from_host(mesh, lengths, "batch")


def trainer_state(config: Config, done: int) -> dict[str, int]:
    """What rewards are told of a run that has `done` so many steps, under the names of transformers' TrainerState."""
    return {"global_step": done, "max_steps": config.steps}


class Verdicts(NamedTuple):
    """What graders said of a rollout, the same on every process but for the samples."""

    rewards: np.ndarray  # [R, F] float32, NaN = does not apply, or lost
    lost: np.ndarray  # [R, F] bool, the rewards that failures of graders cost
    failures: dict[str, int]  # how many, by kind
    samples: list[tuple[int, str]]  # (row, text) of the completions that this process graded
    success: np.ndarray = np.zeros(0, np.float32)  # [R] float32, NaN = none; see `check_verdicts`
    success_index: np.ndarray = np.zeros(0, np.int32)  # [B] int32, the reward that it is of each task

    @property
    def failed(self) -> np.ndarray:
        """Whether a grader failed on a row, [R] bool."""
        return np.any(self.lost, axis=1, keepdims=True)[:, 0]


def verify(
    config: Config,
    lm: LanguageModel,
    rollouts: Rollout,
    pool: pools.Pool,
    tasks: table.TaskTable,
    ids: np.ndarray,
    *,
    trainer_state: dict[str, int] | None = None,
) -> Verdicts:
    """Grades a rollout of tasks `ids` [B]: each process grades the rows it holds, and all learn all rewards.

    Of a row that several processes hold, the one with its first copy is in charge. `trainer_state` is what rewards
    are told of the run, see `trainer_state`.
    """
    rows, generations = rollouts.lengths.shape[0], rollouts.lengths.shape[0] // len(ids)
    lengths = {_start(shard): np.asarray(shard.data) for shard in rollouts.lengths.addressable_shards}
    mine, tokens = [], []
    for shard in rollouts.tokens.addressable_shards:
        if shard.replica_id == 0:
            first, block = _start(shard), np.asarray(shard.data)
            mine += range(first, first + len(block))
            tokens += [row[:length] for row, length in zip(block, lengths[first], strict=True)]
    marks = tokenizer.marks(lm.tokenizer, lm.eos_ids)
    decode = partial(tokenizer.decode, lm.tokenizer, without=marks, skip_special_tokens=config.skip_special_tokens)
    completions = [decode(row) for row in tokens]
    asked = [int(ids[row // generations]) for row in mine]
    columns = {name: [entries[i] for i in asked] for name, entries in tasks.columns.items()}
    graded = pool.grade(
        [tasks.prompts[i] for i in asked],
        completions,
        columns,
        completion_ids=[row.tolist() for row in tokens],
        truncated=[int(row[-1]) not in lm.eos_ids for row in tokens],  # no end within max_completion_length
        trainer_state=trainer_state,
    )
    rewards = np.zeros((rows, len(graded.rewards)), np.float32)
    rewards[mine] = np.array(graded.rewards, np.float32).T  # None becomes NaN
    lost = np.zeros(rewards.shape, bool)
    for reward, i in graded.lost:
        lost[mine[i], reward] = True
    counts = np.array([graded.failures[kind] for kind in pools.KINDS])
    if jax.process_count() > 1:  # rows of other processes are 0 here, so that sums put all together
        found = multihost_utils.process_allgather((rewards, lost.astype(np.int32), counts))
        rewards, lost, counts = (x.sum(axis=0) for x in found)
    failures: dict[str, int] = dict(zip(pools.KINDS, counts.tolist(), strict=True))
    return Verdicts(rewards, lost.astype(bool), failures, list(zip(mine, completions, strict=True)))


def check_verdicts(config: Config, verdicts: Verdicts, pool: pools.Pool, *, tasks: int, first: bool) -> Verdicts:
    """Tells which reward is success of each of so many `tasks`; those outside [0, 1] are lost, to `invalid`.

    Raises InputError in the `first` batch when a reward that may not be success stands where success is looked for,
    and when there is no success at all: then something is wrong with the rewards, and nothing is lost yet.
    """
    note_ranges(config, verdicts, pool, first=first)
    candidates = success_candidates(config, pool)
    if first:
        check_candidates(config, pool)
    index = success_indices(verdicts, candidates, tasks=tasks)
    of_rows = np.repeat(index, len(verdicts.rewards) // tasks)
    success = np.take_along_axis(verdicts.rewards, of_rows[:, None], axis=1)[:, 0]
    if first and not (np.isfinite(success) & ~verdicts.failed).any():
        counts = ", ".join(f"{n} {kind}" for kind, n in verdicts.failures.items() if n) or "all None"
        raise InputError(
            f"no completion of the first batch got a reward ({counts}): see the warning above, and check the rewards "
            f"{', '.join(config.rewards)} and the columns of the tasks"
        )
    outside = (success < 0) | (success > 1)
    costs = outside[:, None] & (np.arange(len(config.rewards)) == of_rows[:, None])
    nothing = np.float32(np.nan)
    return Verdicts(
        rewards=np.where(costs, nothing, verdicts.rewards),
        lost=verdicts.lost | costs,
        failures=verdicts.failures | {"invalid": verdicts.failures["invalid"] + int(outside.sum())},
        samples=verdicts.samples,
        success=np.where(outside, nothing, success),
        success_index=index,
    )


def note_ranges(config: Config, verdicts: Verdicts, pool: pools.Pool, *, first: bool) -> None:
    """Notes with the pool, so that training and evaluation share it, what range a reward's first values are in."""
    for name, column in zip(config.rewards, verdicts.rewards.T, strict=True):
        values = column[np.isfinite(column)]
        if len(values) == 0 or name in pool.first_ranges:
            continue
        pool.first_ranges[name] = float(values.min()), float(values.max())
        if not first and config.success_reward is None and not fits(pool, name) and jax.process_index() == 0:
            logger.warning(
                "the reward %s gave %g and is never success, which must lie in [0, 1]: tasks to which no other reward "
                "applies teach nothing, unless another is named with success_reward",
                *(name, misfit(pool, name)),
            )


def fits(pool: pools.Pool, name: str) -> bool:
    """Decides, once a reward, whether it may be success: if the first batch that has values of it has all in [0, 1].

    True while it gave none. A run that is resumed decides anew.
    """
    lowest, highest = pool.first_ranges.get(name, (0.0, 1.0))
    return lowest >= 0 and highest <= 1


def misfit(pool: pools.Pool, name: str) -> float:
    """Returns a value outside [0, 1] of a reward that does not fit."""
    lowest, highest = pool.first_ranges[name]
    return lowest if lowest < 0 else highest


def success_candidates(config: Config, pool: pools.Pool) -> np.ndarray:
    """Returns which rewards may be success, [F] bool: `success_reward` if it is given, else all that fit."""
    if config.success_reward is not None:
        return np.array([name == config.success_reward for name in config.rewards])
    return np.array([fits(pool, name) for name in config.rewards])


def check_candidates(config: Config, pool: pools.Pool) -> None:
    """Raises InputError when `success_reward`, or by default the first reward that gave any value, does not fit.

    One behind it may, but only the user knows whether that one tells right from wrong.
    """
    given = [name for name in config.rewards if name in pool.first_ranges]
    wanted = given[:1] if config.success_reward is None else [config.success_reward]
    for name in wanted:
        if not fits(pool, name):
            raise InputError(
                f"the reward {name} gave {misfit(pool, name):g}, but a success must lie in [0, 1]: "
                "name another with success_reward"
            )


def success_indices(verdicts: Verdicts, candidates: np.ndarray, *, tasks: int) -> np.ndarray:
    """Returns the reward that is success of each task, [B] int32: the first candidate that is not None for the task.

    A reward is None for a task if it is for all samples of the task, and a reward that a failure cost is not None. Of a
    task without any the index is the first candidate's, whose values there are NaN. `candidates` [F] bool.
    """
    given = np.isfinite(verdicts.rewards) | verdicts.lost
    applies = given.reshape(tasks, -1, given.shape[1]).any(axis=1) & candidates  # [B, F]
    found = np.where(applies.any(axis=1), applies.argmax(axis=1), candidates.argmax())
    return found.astype(np.int32)


def learnable(verdicts: Verdicts) -> np.ndarray:
    """The rewards [R, F] that are learned from: none of a row on which a grader failed, whose sum is not known.

    A reward that does not apply to a row leaves the row its others.
    """
    return np.where(verdicts.failed[:, None], np.float32(np.nan), verdicts.rewards)


def _start(shard: Any) -> int:
    return shard.index[0].start or 0


def any_process(flag: bool) -> bool:
    """Whether any process says so."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_columns(config: Config, tasks: table.TaskTable, source: str) -> None:
    """Raises InputError when a built-in reward has no ground truths to compare with, or some that mean nothing."""
    needy = [name for name in config.rewards if name in REWARDS]
    if needy and "answer" not in tasks.columns:
        raise InputError(
            f"the reward {needy[0]} needs ground truths but {source} has only the columns "
            f"{', '.join(tasks.columns) or '(none)'}: name theirs with tasks.answer_column"
        )
    if needy:
        rows = [int(row) for row in tasks.rows]
        only = len(needy) == len(config.rewards)
        ground_truth.check(tasks.columns["answer"], rows, source, several=set(needy) <= {"math"}, only=only)


@contextmanager
def on(mesh: Mesh, config: Config) -> Iterator[None]:
    """Computes on `mesh`; in float32, products are float32 on accelerators too, whose default is less."""
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
        yield


class Stopped(Exception):
    """A signal has come while something is done that the run which goes on from here does anew."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Sets a flag, which the value tells, on the signals of `signals.to_save`; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in signals.to_save()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
