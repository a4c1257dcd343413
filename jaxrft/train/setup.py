"""Builds the static setup of a run, its constants on the devices, and the first state.

`open_run` reads everything from disk and checks it. `lay_out` and `init` need no files: a dry run
calls them with descriptions (`jax.ShapeDtypeStruct`) in place of arrays.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.learn import replay, update
from jaxrft.learn.replay import Groups, Replay
from jaxrft.learn.update import Update
from jaxrft.lm.model import Params, Policy
from jaxrft.lm.policy import LanguageModel, learner_policy, open_model
from jaxrft.lm.segments import CompiledRollout, compile_rollout
from jaxrft.report.console import Status, no_status
from jaxrft.select import selectors
from jaxrft.select.base import Selector
from jaxrft.select.checks import check_batch, check_table
from jaxrft.select.dots.predictor import Predictor, selector_options
from jaxrft.tasks.embeddings import embedding_source, make_embedder
from jaxrft.tasks.open_sets import open_mixture, uses_embeddings
from jaxrft.tasks.projections import compile_projection, open_predictor
from jaxrft.tasks.table import TaskTable, batches, buckets
from jaxrft.train.devices import computing_on
from jaxrft.train.memory import choose_concurrent_rows, choose_remat, memory_to_plan
from jaxrft.train.state import TrainState, no_rollouts
from jaxrft.types import Array, InputError, Projections, PyTree, Tasks

Tree = TypeVar("Tree")

# Said at the start of a run whose config leaves `select` alone.
UNIFORM_HINT = (
    "select.name is uniform, every task equally often: adaptive learns which tasks are worth their "
    "rollouts and needs nothing, bots needs pass rates of reference policies; see docs/selectors.md"
)


@dataclass(frozen=True, eq=False)
class Setup:
    """What is static in a run: an argument of every jitted stage, hashed by identity.

    It holds no arrays; those that stay on the devices are the `Constants`.
    """

    config: Config
    mesh: meshes.AnyMesh
    lm: LanguageModel  # without its parameters
    selector: Selector
    predictor: Predictor | None  # of a selector that has one
    learner: Update
    replay: Replay | None
    num_tasks: int
    domains: tuple[str, ...]
    prompt_length: int  # tokens of the longest prompt, padded
    generate: CompiledRollout
    remat: str = "full"  # of the learner, one of `jaxrft.lm.model.REMATS`
    # NamedShardings in the tree of the state
    shardings: TrainState | None = None


class Constants(NamedTuple):
    """Arrays on the devices that no step changes: arguments of the jitted stages, never
    captured.
    """

    tasks: Tasks
    frozen: Params  # the base of LoRA, otherwise {}
    reference_params: Params | None  # of the reference policy of the KL; None = no KL
    nothing_excluded: Array  # [N] bool, False


class Opened(NamedTuple):
    """A run that is ready for its first step."""

    setup: Setup
    table: TaskTable  # of the tasks, on the host
    constants: Constants
    state: TrainState


def open_run(config: Config, mesh: Mesh, *, status: Status = no_status) -> Opened:
    """Reads and checks the policy, the tasks and the predictor of a run, and makes its first state.

    `status` is told what happens. Raises InputError for mistakes in config or data.
    """
    if config.select.name != "dots":  # which needs a predictor
        make_selector(config, None)  # raises errors before the policy is loaded
    status("loading the model")
    lm = open_model(config, mesh)
    status("reading the tasks")
    table = open_mixture(config, lm.tokenizer)
    if table.embeddings is None and uses_embeddings(config):
        table = with_policy_embeddings(config, mesh, lm, table, status=status)
    status("laying out the first state")
    predictor = open_predictor(config, table, mesh)
    check_table(task_arrays(table, predictor), len(table.lengths))
    setup, constants = lay_out(
        config,
        mesh,
        lm,
        table,
        predictor,
        put=meshes.place,
        call=lambda program, *arguments: program(*arguments),
        memory=memory_to_plan(mesh),
    )
    if setup.replay is not None:
        check_memory(setup)
    if constants.reference_params is lm.params:  # the state takes the memory of lm.params
        constants = constants._replace(reference_params=jax.tree.map(jnp.copy, lm.params))
    state = compile_init(setup)(lm.params, constants.tasks)
    return Opened(setup, table, constants, state)


def describe_run(
    config: Config,
    mesh: meshes.AnyMesh,
    lm: LanguageModel,
    table: TaskTable,
    predictor: Predictor | None,
    *,
    memory: int | None = None,
) -> Opened:
    """Returns the result of `open_run` with `jax.ShapeDtypeStruct`s in place of arrays.

    Those of `lm` are ShapeDtypeStructs already. `memory` is a device's, in bytes; None = that of
    the mesh's devices, if it has any.
    """
    setup, constants = lay_out(
        config,
        mesh,
        lm,
        table,
        predictor,
        put=meshes.describe,
        call=lambda program, *arguments: program.eval_shape(*arguments),
        memory=memory_to_plan(mesh) if memory is None else memory,
    )
    state = compile_init(setup).eval_shape(lm.params, constants.tasks)
    return Opened(setup, table, constants, state)


def lay_out(
    config: Config,
    mesh: meshes.AnyMesh,
    lm: LanguageModel,
    table: TaskTable,
    predictor: Predictor | None,
    *,
    put: Callable[..., object],
    call: Callable[..., Projections],
    memory: int | None,
) -> tuple[Setup, Constants]:
    """Builds the static setup of a run and its constants, whose reference parameters are those of
    `lm`.

    `put(x, sharding)` puts an array of the table on the devices and `call(program, *arguments)`
    runs a program; both may return `jax.ShapeDtypeStruct`s. Of the parameters of `lm` only the
    shapes are read. `memory` is a device's, in bytes.
    """
    num_tasks = len(table.lengths)
    check_batch(config.batch_size, num_tasks)
    put_rows = partial(meshes.place_table, mesh=mesh, num_tasks=num_tasks, put=put)
    tasks = put_rows(task_arrays(table, predictor))
    if predictor is not None:
        program = compile_projection(predictor, mesh, num_tasks)
        projections = call(program, predictor.params, put_rows(table.embeddings))
        tasks = tasks._replace(projections=projections)
    setup = Setup(
        config=config,
        mesh=mesh,
        lm=lm._replace(params=None, frozen={}),
        selector=make_selector(config, predictor),
        predictor=predictor,
        learner=make_learner(config, lm.policy),  # for the shapes of its state
        replay=make_replay(config),
        num_tasks=num_tasks,
        domains=table.domains,
        prompt_length=buckets(table.lengths)[-1],
        generate=compile_rollout(lm, config, mesh),
    )
    constants = Constants(
        tasks=tasks,
        frozen=lm.frozen,
        reference_params=(lm.frozen or lm.params) if config.kl_coef > 0 else None,
        nothing_excluded=put_rows(np.zeros(num_tasks, bool)),
    )
    return _fit_memory(setup, constants, lm, memory), constants


def _fit_memory(setup: Setup, constants: Constants, lm: LanguageModel, memory: int | None) -> Setup:
    """Chooses what a run recomputes and how many rows it decodes at once, by a device's memory."""
    config = setup.config
    mesh = setup.mesh
    state = describe_state(setup, lm.params, constants.tasks)
    held = (state, constants)
    remat = choose_remat(
        config,
        lm.config,
        mesh,
        setup.prompt_length,
        held=held,
        params=lm.params,
        memory=memory,
    )
    max_rows = choose_concurrent_rows(
        config,
        lm,
        mesh,
        setup.prompt_length,
        prompts=config.batch_size,
        num_generations=config.num_generations,
        held=held,
        memory=memory,
    )
    return dataclasses.replace(
        setup,
        learner=make_learner(config, learner_policy(config, lm, mesh, remat=remat)),
        remat=remat,
        shardings=jax.tree.map(lambda x: x.sharding, state),
        generate=compile_rollout(lm, config, mesh, max_rows=max_rows),
    )


def init(setup: Setup, params: Params, tasks: Tasks) -> TrainState:
    """Makes the first state of a run; a pure function."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=setup.learner.init(params),
        selector=setup.selector.init(tasks, setup.num_tasks),
        replay=None if setup.replay is None else setup.replay.init(group_shapes(setup)),
        counters=no_rollouts(setup.num_tasks),
    )


def compile_init(setup: Setup) -> Callable[[Params, Tasks], TrainState]:
    """Compiles `init` into one program, which shards the state and donates the parameters."""
    return jax.jit(partial(init, setup), out_shardings=setup.shardings, donate_argnums=0)


def describe_state(setup: Setup, params: Params, tasks: Tasks) -> TrainState:
    """Describes the shapes and shardings of the state.

    A parameter's moments are sharded as the parameter. Arrays with a row for each task, or for each
    replayed group, are sharded over rows if the mesh divides their number. Everything else is
    replicated.
    """
    mesh = setup.mesh
    replicated = meshes.sharding(mesh)
    state = jax.eval_shape(partial(init, setup), params, tasks)

    def by_rows(tree: PyTree, rows: int) -> PyTree:
        return jax.tree.map(lambda x: meshes.task_sharding(mesh, x.shape, rows), tree)

    shardings: dict[str, PyTree] = {
        "step": replicated,
        "params": jax.tree.map(lambda x: x.sharding, params),
        "optimizer": update.optimizer_shardings(setup.learner, params, replicated),
        "selector": by_rows(state.selector, setup.num_tasks),
        "replay": by_rows(state.replay, setup.config.replay.capacity),
        "counters": by_rows(state.counters, setup.num_tasks),
    }
    return jax.tree.map(meshes.describe, state, TrainState(**shardings))


def task_arrays(table: TaskTable, predictor: Predictor | None) -> Tasks:
    """Returns the columns of the tasks that selectors read; with a predictor, embeddings are
    replaced by projections.
    """
    arrays: dict[str, PyTree] = {  # of numpy, which stand for those of JAX
        "reference_pass_rates": table.reference_pass_rates,
        "embeddings": table.embeddings if predictor is None else None,
        "domain": table.domain,
    }
    return Tasks(**arrays)


def make_selector(config: Config, predictor: Predictor | None) -> Selector:
    """Returns the selector of the config."""
    options = dataclasses.asdict(config.select)
    del options["embeddings"]  # which the tasks have
    if predictor is not None:
        options |= selector_options(predictor)
    return selectors.make(num_generations=config.num_generations, **options)


def make_replay(config: Config) -> Replay | None:
    """Returns the replay of the config, if it has one."""
    if config.replay.capacity == 0:
        return None
    return replay.ring(
        capacity=config.replay.capacity,
        batch_size=config.batch_size,
        fresh_fraction=config.replay.fresh_fraction,
        max_age=config.replay.max_age,
        draw=config.replay.draw,
    )


def group_shapes(setup: Setup) -> Groups:
    """Returns the shapes of a group at the longest prompt."""
    config = setup.config
    return replay.shapes(
        num_generations=config.num_generations,
        prompt_length=setup.prompt_length,
        completion_length=config.max_completion_length,
        weighted=config.importance_sampling_correction != "none",
    )


def check_memory(setup: Setup) -> None:
    """Raises InputError for a replay buffer that does not fit into the memory of a device."""
    assert setup.replay is not None and setup.shardings is not None
    capacity = setup.config.replay.capacity
    buffer = jax.eval_shape(setup.replay.init, group_shapes(setup))
    needed = meshes.on_device(jax.tree.map(meshes.describe, buffer, setup.shardings.replay))
    available = meshes.memory_of_a_device(setup.mesh)
    if available is not None and needed > available:
        raise InputError(
            f"replay.capacity is {capacity:,}: its groups take {needed / 2**30:,.1f} GiB of "
            f"each device, which has {available / 2**30:,.1f} GiB; lower it"
        )


def make_learner(config: Config, policy: Policy) -> Update:
    """Returns the training step of the config."""
    return update.make(
        policy,
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
        clip_center=config.replay.clip_center,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        learning_rate_schedule=config.learning_rate_schedule,
        num_updates=config.num_updates,
        min_learning_rate_ratio=config.min_learning_rate_ratio,
    )


def with_policy_embeddings(
    config: Config,
    mesh: Mesh,
    lm: LanguageModel,
    table: TaskTable,
    *,
    status: Status = no_status,
) -> TaskTable:
    """Embeds the tasks by the first policy of the run, with the same bits whenever it is resumed on
    this mesh.
    """
    num_tasks = len(table.lengths)
    embed = make_embedder(lm, config, mesh, table)
    embeddings = np.zeros((num_tasks, lm.config.hidden_size), np.float32)
    done = 0
    status("embedding the prompts")
    with computing_on(mesh, config):
        for ids in batches(table.lengths, config.batch_size):
            embeddings[ids] = embed(ids)
            done += len(ids)
            status("embedding the prompts", done, num_tasks)
        return table._replace(embeddings=embeddings, embedded_by=embedding_source(lm, config, mesh))
