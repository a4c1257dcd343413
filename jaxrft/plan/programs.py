"""The programs of a step compiled for TPUs that are not here: what memory and arithmetic the compiler counts."""

import os
import re
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.lm import model
from jaxrft.plan import memory
from jaxrft.train import step as steps
from jaxrft.train.devices import computing_on
from jaxrft.train.state import TrainState
from jaxrft.train.step import Run
from jaxrft.types import Feedback, InputError, Missing

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB a chip
# libtpu then neither looks for the slice that it is in, nor for other programs that use the chips.
COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Compiled(NamedTuple):
    """What the compiler says of a program, per chip."""

    name: str
    seconds: float  # that it took to compile
    temporaries: int  # bytes
    peak: int  # bytes, with all that stays on the chip meanwhile
    flops: float  # the bodies of loops counted once
    failure: str = ""  # why it does not compile


def devices(topology: str) -> list[Any]:
    """Descriptions of the chips of a slice such as v5e:4x4; raises InputError if there is no such or no compiler."""
    found = re.fullmatch(r"(\w+):(\d+x\d+(?:x\d+)?)", topology)
    if not found or found[1] not in HBM:
        raise InputError(f"topology is {topology!r}: give one of {', '.join(HBM)} with its sides, such as v5e:4x4")
    os.environ |= COMPILER_ONLY
    from jax.experimental import topologies

    sides = [int(side) for side in found[2].split("x")]
    host = tuple(min(2, side) for side in sides[:2])
    options = {"chip_config_name": "megacore"} if found[1] == "v4" else {}
    try:
        described = topologies.get_topology_desc(topology, platform="tpu", chips_per_host_bounds=(*host, 1), **options)
    except Exception as error:  # RuntimeError without libtpu, XLA's own error for a size that is none
        reason = str(error).splitlines()[0]
        if "not installed" in reason:
            raise Missing('--topology needs the TPU compiler libtpu: pip install "jaxrft[tpu]"') from error
        raise InputError(f"there is no topology {topology} ({reason}): give a size such as v5e:4x4") from error
    return list(described.devices)


def compiled(run: Run, state: TrainState, prompt_length: int, *, selects: bool = True) -> Iterator[Compiled]:
    """Compiles the programs of a described run, one after the other; without `selects`, not that of the selector."""
    programs = steps.compile_steps(run, state)
    config, mesh, i32 = run.config, run.mesh, jnp.int32
    stays = state, run.tasks, run.lm.frozen or run.reference  # with LoRA these two are one

    def array(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.sharding(mesh, *axes))

    def told(count: int) -> Any:
        numbers = array((count,), jnp.float32)
        return Feedback(array((count,), i32), numbers, numbers, numbers), array((count,), jnp.bool_)

    with computing_on(mesh, config):
        stream = jax.ShapeDtypeStruct((), i32)
        probe = (state.selector, state.step, run.tasks)
        number = len(run.table.lengths)
        exclude = meshes.place_table(np.zeros(number, bool), mesh, number, put=meshes.describe)
        select = (*probe, exclude, stream)
        choice, _ = jax.eval_shape(partial(programs.select, batch_size=config.batch_size), *select)
        prompts = array((config.batch_size, prompt_length), i32, "batch"), array((config.batch_size,), i32, "batch")
        generate = (model.whole(state.params, run.lm.frozen), state.step, *prompts, choice.ids, stream)
        rollouts = jax.eval_shape(programs.generate, *generate)
        rewards = array((config.batch_size, config.num_generations, len(config.rewards)), jnp.float32, "batch")
        success = array((config.batch_size,), i32, "batch")
        judged = jax.eval_shape(programs.judge, state.step, choice.ids, prompts, rollouts, rewards, success)
        note = (state.selector, state.tally, state.step, run.tasks)
        learn = (state, judged.groups, run.reference, run.lm.frozen)
        if selects and run.selector.reference_set is not None:
            probed = jax.eval_shape(programs.probe, *probe)
            whole, part = divmod(probed.ids.size, config.batch_size)
            parts = map(told, [config.batch_size] * whole + [part] * (part > 0))
            yield _compile("probe", programs.probe, probe, stays)
            yield _compile("predict", programs.note, (*note, probed, *parts), stays, reference=True)
        if selects:
            yield _compile("select", programs.select, select, stays, batch_size=config.batch_size)
        yield _compile("generate", programs.generate, generate, (stays, prompts))
        if selects:
            yield _compile("note", programs.note, (*note, choice, told(config.batch_size)), stays)
        yield _compile("learn", programs.learn, learn, (stays, judged.groups))


def _compile(name: str, program: Any, arguments: Any, held: Any, **static: Any) -> Compiled:
    """Compiles one program that runs while `held`, its arguments among it, is on the chips."""
    start = time.perf_counter()
    try:
        done = program.lower(*arguments, **static).compile()
    except jax.errors.JaxRuntimeError as error:
        kind, _, reason = str(error).partition(": ")
        if kind != "RESOURCE_EXHAUSTED":
            raise
        return Compiled(name, time.perf_counter() - start, 0, 0, 0.0, reason.splitlines()[0])
    used, cost = done.memory_analysis(), done.cost_analysis()
    new = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    seconds = time.perf_counter() - start
    return Compiled(name, seconds, used.temp_size_in_bytes, memory.on_device(held) + new, cost.get("flops", 0.0))
