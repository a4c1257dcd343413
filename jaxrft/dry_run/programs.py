"""Compiles the programs of a step for TPUs that this machine need not have, and reports the memory
and arithmetic that the compiler counts.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from jaxrft import mesh as meshes
from jaxrft.dry_run import memory
from jaxrft.dry_run.chips import CHIPS
from jaxrft.host import libtpu, xla_options
from jaxrft.host.installation import install_command
from jaxrft.lm import model
from jaxrft.lm.model import Policy
from jaxrft.lm.rollout import Decoding, Inputs
from jaxrft.lm.segments import Batch
from jaxrft.train import step as steps
from jaxrft.train.devices import computing_on
from jaxrft.train.setup import Opened, Setup, Tree
from jaxrft.types import Feedback, InputError, Missing, PyTree

# libtpu then neither looks for the slice that it is in, nor for other programs that use the chips.
COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

COUNT = jax.ShapeDtypeStruct((), jnp.int32)


class Compiled(NamedTuple):
    """What the compiler reports of a program, per chip."""

    name: str
    seconds: float  # that it took to compile
    temporaries: int  # bytes
    peak: int  # bytes, with the state that stays on the chip
    flops: float  # the bodies of loops counted once
    failure: str = ""  # why it does not compile
    outputs: PyTree = None  # descriptions of what it returns


def devices(topology: str) -> list[Any]:
    """Describes the chips of a slice of TPUs such as v5e:4x4.

    Raises InputError if there is no such slice, and if the TPU compiler is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+x\d+(?:x\d+)?)", topology)
    if not match or match[1] not in CHIPS:
        raise InputError(
            f"topology is {topology!r}: give one of {', '.join(CHIPS)} with its "
            "sides, such as v5e:4x4"
        )
    os.environ |= COMPILER_ONLY
    xla_options.apply_to("tpu", os.environ)  # the programs are to be those of a run on TPUs
    from jax.experimental import topologies

    sides = [int(side) for side in match[2].split("x")]
    host = tuple(min(2, side) for side in sides[:2])
    options = {"chip_config_name": "megacore"} if match[1] == "v4" else {}
    try:
        with libtpu.quiet():
            described = topologies.get_topology_desc(
                topology, platform="tpu", chips_per_host_bounds=(*host, 1), **options
            )
    # RuntimeError without libtpu, XLA's error for a size that does not exist
    except Exception as error:
        reason = str(error).splitlines()[0]
        if "not installed" in reason:
            raise Missing(
                f"--topology needs the TPU compiler libtpu: {install_command('tpu')}"
            ) from error
        raise InputError(
            f"there is no topology {topology} ({reason}): give a size such as v5e:4x4"
        ) from error
    return list(described.devices)


@contextmanager
def without_cache() -> Iterator[None]:
    """Compiles without JAX's cache of programs, from which a compiler that has no device cannot
    read.
    """
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether it uses one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def compiled(run: Opened, prompt_length: int, *, selects: bool = True) -> Iterator[Compiled]:
    """Compiles the stages of a described run one by one; without `selects`, not those of the
    selector.
    """
    setup, _, constants, state = run
    config = setup.config
    mesh = setup.mesh
    assert isinstance(mesh, Mesh), "an abstract mesh has no devices to compile for"
    tasks = constants.tasks
    # with LoRA the frozen parameters are the reference
    resident = (state, tasks, constants.frozen or constants.reference_params)
    batch_size = config.batch_size

    array = partial(meshes.describe_array, mesh)
    feedback = partial(_feedback, mesh)
    shard = partial(_shard, mesh)
    with computing_on(mesh, config):
        stream = jax.ShapeDtypeStruct((), jnp.int32)
        prompts = (
            array((batch_size, prompt_length), jnp.int32, "batch"),
            array((batch_size,), jnp.int32, "batch"),
        )
        rewards = array(
            (batch_size, config.num_generations, len(config.rewards)), jnp.float32, "batch"
        )
        valid = array(rewards.shape, jnp.bool_, "batch")
        success_index = array((batch_size,), jnp.int32, "batch")
        draw = (setup, state.selector, state.step, tasks)
        select = (*draw, constants.nothing_excluded, stream)
        choice = shard(steps.select_tasks.eval_shape(*select, batch_size=batch_size)[0])
        params = model.all_params(state.params, constants.frozen)
        stop = shard(setup.generate.stop)
        start = Batch(params, state.step, *prompts, choice.ids, stream, stop)
        rollout = setup.generate.eval_shape(start)
        score = (setup, state.step, choice.ids, prompts, rollout, rewards, valid, success_index)
        groups = shard(steps.score_groups.eval_shape(*score).groups, "batch")
        update = (setup, state.selector, state.counters, state.step, tasks)
        learned = steps.without_tasks(state)
        learn = (setup, learned, groups, constants.reference_params, constants.frozen)
        if selects and setup.selector.reference_set is not None:
            references = shard(steps.draw_reference_set.eval_shape(*draw))
            full, rest = divmod(references.ids.size, batch_size)
            batches = map(feedback, [batch_size] * full + [rest] * (rest > 0))
            yield _compile("references", steps.draw_reference_set, draw, resident)
            yield _compile(
                "predict",
                steps.update_selector_state,
                (*update, references, *batches),
                resident,
                is_reference_set=True,
            )
        if selects:
            yield _compile("select", steps.select_tasks, select, resident, batch_size=batch_size)
        yield from _rollout(setup, start, (resident, prompts))
        if selects:
            yield _compile(
                "update selector",
                steps.update_selector_state,
                (*update, choice, feedback(batch_size)),
                resident,
            )
        yield _compile("learn", steps.update_policy, learn, (resident, groups))


def _feedback(mesh: Mesh, count: int) -> tuple[Feedback, jax.ShapeDtypeStruct]:
    """Describes the feedback of `count` tasks, and which groups are informative."""
    ids = meshes.describe_array(mesh, (count,), jnp.int32)
    numbers = meshes.describe_array(mesh, (count,), jnp.float32)
    informative = meshes.describe_array(mesh, (count,), jnp.bool_)
    return Feedback(ids, numbers, numbers, numbers), informative  # pyright: ignore[reportArgumentType]


def _shard(mesh: Mesh, tree: Tree, *axes: str) -> Tree:
    """Describes arrays sharded by logical axes, as the stages shard what they return."""
    return jax.tree.map(lambda x: meshes.describe(x, meshes.sharding(mesh, *axes)), tree)


def _rollout(setup: Setup, batch: Batch, held: PyTree) -> Iterator[Compiled]:
    """Compiles the programs of a rollout at its largest."""
    generate = setup.generate
    if generate.waits(batch.prompts.shape[0]):
        yield from _rollout_that_waits(setup, batch, held)
        return
    prefill = _compile("prefill", generate.start, (batch,), held)
    yield prefill
    if prefill.failure:
        return
    length = generate.cache_lengths[-1]
    grids = generate.grids(batch.prompts.shape[0])
    inputs, state = decode_arguments(setup.lm.policy, prefill.outputs, length)
    held = (held, inputs, state)
    yield _compile("decode", generate.decode, (inputs, state), held, length=length, grids=grids)
    if len(grids) > 1:
        yield _compile(
            "compact",
            generate.compact,
            (inputs._replace(weights=()), state, None, COUNT),
            held,
            now=grids[0],
            smaller=grids[1],
            length=length,
        )


def _rollout_that_waits(setup: Setup, batch: Batch, held: PyTree) -> Iterator[Compiled]:
    """Compiles the programs of a rollout of which some prompts wait."""
    generate = setup.generate
    prompts = batch.prompts.shape[0]
    length = generate.cache_lengths[-1]
    grids = generate.grids(prompts)
    weights = _compile("lay out weights", generate.prepare_weights, (batch.params,), held)
    yield weights
    held = (held, weights.outputs)
    entering = generate.entering(prompts)
    prefill = _compile("prefill", generate.admit, (batch, COUNT), held, count=entering)
    yield prefill
    if weights.failure or prefill.failure:
        return
    entrants = prefill.outputs
    empty = _compile("empty", generate.empty, ((), entrants), held, full=grids[0])
    sizes = (
        prompts * generate.settings.num_generations,
        grids[0].rows * generate.shards,
        generate.settings.max_completion_length,
    )
    left = _compile("nothing left", generate.nothing_left, sizes, held).outputs
    inputs, state = decode_arguments(setup.lm.policy, empty.outputs, length)
    rows = (inputs._replace(stop=batch.stop), state)
    enter = _compile(
        "enter",
        generate.enter,
        (*rows, left, COUNT, entrants, COUNT),
        (held, entrants, rows, left),
        full=grids[0],
        half=grids[1],
        length=length,
    )
    yield enter
    if enter.failure:
        return
    inputs, state, left = enter.outputs
    inputs = inputs._replace(weights=weights.outputs)
    held = (held, inputs.prompts, state, left)
    yield _compile("decode", generate.decode, (inputs, state), held, length=length, grids=grids)


def decode_arguments(
    policy: Policy, started: tuple[Inputs, Decoding], length: int
) -> tuple[Inputs, Decoding]:
    """Describes the arguments of a decode segment with a cache of `length` slots.

    `started` describes the result of `rollout.start`.
    """
    inputs, state = started
    grown = jax.eval_shape(lambda cache: policy.resize_cache(cache, length, 0), state.cache)
    cache = jax.tree.map(lambda x, before: meshes.describe(x, before.sharding), grown, state.cache)
    return inputs, state._replace(cache=cache)


def _compile(name: str, program: Any, arguments: tuple, held: PyTree, **static: object) -> Compiled:
    """Compiles a program that runs while the arrays `held`, its arguments included, are on the
    chips.
    """
    start = time.perf_counter()
    try:
        done = program.lower(*arguments, **static).compile()
    except jax.errors.JaxRuntimeError as error:
        kind, _, reason = str(error).partition(": ")
        if kind != "RESOURCE_EXHAUSTED":
            raise
        return Compiled(name, time.perf_counter() - start, 0, 0, 0.0, reason.splitlines()[0])
    used = done.memory_analysis()
    cost = done.cost_analysis()
    new = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    seconds = time.perf_counter() - start
    outputs = jax.tree.map(meshes.describe, done.out_info, done.output_shardings)
    peak = memory.on_device(held) + new
    return Compiled(
        name, seconds, used.temp_size_in_bytes, peak, cost.get("flops", 0.0), outputs=outputs
    )
