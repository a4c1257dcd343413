"""`jaxrft train CONFIG --dry-run`: what would be trained on and how; nothing is written, nothing
trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from jaxrft import mesh as meshes
from jaxrft.config import Config, SelectConfig
from jaxrft.dry_run import bounds, counts, memory, programs, render, resolve, reward_check
from jaxrft.dry_run.chips import chip_of
from jaxrft.dry_run.render import Page
from jaxrft.fields import Checked
from jaxrft.host.checkpoint import size_of
from jaxrft.rewards.grading import open_rewards, trainer_state
from jaxrft.select import selectors
from jaxrft.tasks import mixture, table
from jaxrft.train.devices import check_mesh
from jaxrft.train.memory import bin_shapes, memory_to_plan
from jaxrft.train.resume import check_contents, check_settings, with_template_date
from jaxrft.train.setup import UNIFORM_HINT, Opened, describe_run
from jaxrft.types import Missing


@dataclass(frozen=True)
class Options(Checked):
    """The command line of `jaxrft train`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Show what would be trained on and how, and stop: nothing is written."""
    topology: str | None = None
    """In a dry run, compile the programs of a step for a slice of TPUs such as v5e:4x4, whose
    memory then is known; needs no TPU, but libtpu, which the extra `tpu` brings."""


EXAMPLES = 3  # prompts that are shown, and graded


def show(config: Config, topology: str | None = None) -> bool:
    """Prints the plan of a run; returns whether it could start.

    `topology`, such as v5e:4x4, has the programs compiled for that slice of TPUs; one that does not
    fit keeps the run from starting. Missing inputs (weights, tokenizer, data, modules of rewards,
    devices) are listed, and the rest is shown. Raises InputError for what could not be trained even
    with all of them.
    """
    check_contents(Path(config.output_dir), config.resume)
    config = with_template_date(config)
    check_settings(config)
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.model)
    mesh = (
        meshes.make(*sizes, devices=programs.devices(topology))
        if topology
        else meshes.abstract(*sizes)
    )
    check_mesh(config, mesh)
    inputs = resolve.resolve_inputs(config, mesh)
    pool = inputs.pool
    device_memory = _device_memory(mesh, topology)
    run = describe_run(config, mesh, inputs.lm, pool.table, inputs.predictor, memory=device_memory)
    page = Page()
    page.line("dry run: nothing is written, nothing is trained", "bold")
    missing_rewards = _show_inputs(page, config, inputs)
    _show_run(page, inputs, run)
    width = table.buckets(pool.table.lengths)[-1]
    render.memory_use(page, memory.parts(run, width, tasks=pool.complete))
    fits = True
    if topology:
        render.bounds(page, bounds.stages(run, width), topology)
        with programs.without_cache():
            compiled = programs.compiled(run, width, selects=pool.complete)
            fits = render.programs(page, compiled, topology)
    missing_devices = _missing_devices(config, mesh, topology)
    missing = [*inputs.missing, *missing_rewards, *missing_devices]
    render.missing(page, missing, fits=fits)
    return fits and not missing


def _device_memory(mesh: meshes.AnyMesh, topology: str | None) -> int | None:
    """Returns the bytes of a device that the run plans with; None if this machine lacks them."""
    if topology:
        return chip_of(topology).gib * 2**30
    return memory_to_plan(meshes.make()) if mesh.size == jax.device_count() else None


def _show_inputs(page: Page, config: Config, inputs: resolve.Inputs) -> list[str]:
    """Prints what would be trained on; returns what is missing for the rewards."""
    pool = inputs.pool
    has_tasks = any(task_set.table is not None for task_set in pool.sets)
    ids = np.linspace(0, len(pool.table.lengths) - 1, EXAMPLES).astype(int).tolist()
    render.sets(page, pool, inputs.held_out)
    if has_tasks:
        render.prompts(page, pool, mixture.duplicates(pool.table))
        render.pass_rates(page, pool.table, _policies(config, pool.table))
    if has_tasks and pool.tokenized:
        render.examples(page, pool.table, inputs.lm.tokenizer, ids)
    names = ", ".join(config.rewards)
    checks = []
    try:
        with open_rewards(config) as workers:
            if has_tasks:
                checks = reward_check.check_rewards(
                    config.rewards,
                    workers,
                    pool.table,
                    ids,
                    tokenizer=inputs.lm.tokenizer,
                    trainer_state=trainer_state(config, 0),
                )
    except Missing as missing:
        render.rewards(page, [], f"{names} cannot be loaded yet")
        return [str(missing)]
    lack = "have no ground truths" if has_tasks else "are missing"
    render.rewards(page, checks, "" if checks else f"{names} loaded, but the tasks {lack}")
    failures = [f"{check.name}: {check.failure}" for check in checks if check.failure]
    if failures and not any(check.applies for check in checks):
        return [f"a reward for any of the tasks that were tried; {'; '.join(failures)}"]
    return []


def _policies(config: Config, tasks: table.TaskTable) -> list[str]:
    """Names of the reference policies: their columns in the first set that has any, or numbers."""
    named = next(
        (tasks.pass_rate_columns for tasks in config.task_sets if tasks.pass_rate_columns), ()
    )
    rates = tasks.reference_pass_rates
    return list(named) or [
        f"reference {k + 1}" for k in range(0 if rates is None else rates.shape[1])
    ]


def _show_run(page: Page, inputs: resolve.Inputs, run: Opened) -> None:
    """Prints the policy, mesh, selector, steps, evaluations and checkpoints of the run."""
    config = run.setup.config
    shape = run.setup.lm.config
    mesh = run.setup.mesh
    trained = memory.number(run.state.params)
    frozen = memory.number(run.constants.frozen)
    source = "its files fit" if inputs.weights else "shape as published, no file of it is here"
    sides = " x ".join(f"{name} {mesh.shape[name]}" for name in meshes.AXES)
    fields = selectors.fields(config.select.name)
    settings = ", ".join(
        f"{name}={value}" for name, value in vars(config.select).items() if name in fields
    )
    doc = selectors.SELECTORS[config.select.name].__doc__ or ""
    summary = " ".join(doc.split("\n\n")[0].split())
    num_tasks = len(inputs.pool.table.lengths) if inputs.pool.complete else None
    held_out = [
        None if task_set.table is None else len(task_set.table.lengths)
        for task_set in inputs.held_out
    ]
    share = f"{counts.short(trained)} of them" if frozen else "all"
    page.heading("Run")
    page.pairs(
        [
            ("policy", f"{config.model}; {source}"),
            (
                "",
                f"{shape.num_layers} layers of width {shape.hidden_size:,}, {config.dtype} "
                "arithmetic",
            ),
            ("parameters", f"{counts.short(trained + frozen)}, {share} trained"),
            ("mesh", f"{sides} = {counts.number(mesh.size, 'device')}"),
            ("selector", f"{config.select.name}({settings}): {summary}"),
            *([("", UNIFORM_HINT)] if config.select == SelectConfig() else []),
            *render.embeddings(inputs.pool.table),
            *counts.run(config, num_tasks),
            *counts.decoding(run.setup.generate, config.batch_size),
            *counts.bins(bin_shapes(config, mesh, run.setup.prompt_length)),
            *counts.evaluations(config, held_out),
            *counts.checkpoints(config, size_of(run.state), 4 * (frozen or trained)),
        ]
    )


def _missing_devices(config: Config, mesh: meshes.AnyMesh, topology: str | None) -> list[str]:
    """Says which devices this machine lacks for the mesh, in one sentence or none.

    A topology, or a run on several machines, has devices that are not of this machine: it lacks
    none.
    """
    if topology or config.distributed or mesh.size == jax.device_count():
        return []
    wanted = counts.number(mesh.size, "device")
    present = counts.number(jax.device_count(), "device")
    return [
        f"a mesh of {wanted}, and this machine has {present}: start the run where they are, "
        "or change the mesh"
    ]
