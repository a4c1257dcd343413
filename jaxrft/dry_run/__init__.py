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
from jaxrft.config import Config
from jaxrft.dry_run import bounds, counts, found, graded, memory, page, programs
from jaxrft.dry_run.chips import chip_of
from jaxrft.dry_run.page import Page
from jaxrft.fields import Checked
from jaxrft.host.checkpoint import size_of
from jaxrft.rewards.grading import open_rewards, trainer_state
from jaxrft.select import selectors
from jaxrft.tasks import mixture, table
from jaxrft.train.devices import check_mesh
from jaxrft.train.memory import bin_shape, memory_to_plan
from jaxrft.train.resume import check_contents, with_template_date
from jaxrft.train.setup import Opened, describe_run
from jaxrft.types import Missing


@dataclass(frozen=True)
class Options(Checked):
    """The command line of `jaxrft train`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Show what would be trained on and how, and stop: nothing is written."""
    topology: str | None = None
    """In a dry run, compile the programs of a step for a slice of TPUs such as v5e:4x4, whose
    memory then is known; needs no TPU, but libtpu: pip install "jaxrft[tpu]"."""


EXAMPLES = 3  # prompts that are shown, and graded


def show(config: Config, topology: str | None = None) -> None:
    """Prints the plan of a run; `topology`, such as v5e:4x4, has its programs compiled for that
    slice of TPUs.

    What is not here yet (weights, tokenizer, data, modules of rewards, devices) is listed and the
    rest is shown. Raises InputError for what could not be trained even if all were here.
    """
    check_contents(Path(config.output_dir), config.resume)
    config = with_template_date(config)
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.model)
    mesh = (
        meshes.make(*sizes, devices=programs.devices(topology))
        if topology
        else meshes.abstract(*sizes)
    )
    check_mesh(config, mesh)
    here = found.look(config, mesh)
    memory_here = _memory(mesh, topology)
    run = describe_run(config, mesh, here.lm, here.pool.table, here.predictor, memory=memory_here)
    out = Page()
    out.line("dry run: nothing is written, nothing is trained", "bold")
    ungraded = _what(out, config, here)
    _how(out, here, run)
    width = table.buckets(here.pool.table.lengths)[-1]
    page.memories(out, memory.parts(run, width, tasks=here.pool.whole))
    if topology:
        page.bounds(out, bounds.stages(run, width), topology)
        page.programs(out, programs.compiled(run, width, selects=here.pool.whole), topology)
    page.ending(out, [*here.missing, *ungraded, *_too_few_devices(config, mesh, topology)])


def _memory(mesh: meshes.AnyMesh, topology: str | None) -> int | None:
    """Returns the bytes of a device that the run plans with; None if they are not here."""
    if topology:
        return chip_of(topology).gib * 2**30
    return memory_to_plan(meshes.make()) if mesh.size == jax.device_count() else None


def _what(out: Page, config: Config, here: found.Found) -> list[str]:
    """Prints what would be trained on; returns what is missing for the rewards."""
    pool = here.pool
    any_here = any(each.table is not None for each in here.pool.sets)
    ids = np.linspace(0, len(pool.table.lengths) - 1, EXAMPLES).astype(int).tolist()
    page.sets(out, pool, here.held_out)
    if any_here:
        page.prompts(out, pool, mixture.duplicates(pool.table))
        page.pass_rates(out, pool.table, _policies(config, pool.table))
    if any_here and pool.tokenized:
        page.examples(out, pool.table, here.lm.tokenizer, ids)
    try:
        with open_rewards(config) as workers:
            told = trainer_state(config, 0)
            text = here.lm.tokenizer
            trials = (
                graded.trials(
                    config.rewards, workers, pool.table, ids, text=text, trainer_state=told
                )
                if any_here
                else []
            )
    except Missing as missing:
        page.rewards(out, [], f"{', '.join(config.rewards)} cannot be loaded yet")
        return [str(missing)]
    untried = (
        f"{', '.join(config.rewards)} loaded, but the tasks "
        f"{'have no ground truths' if any_here else 'are not here'}"
    )
    page.rewards(out, trials, "" if trials else untried)
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


def _how(out: Page, here: found.Found, run: Opened) -> None:
    """Prints how it would be trained: policy, mesh, selector, steps, evaluations, checkpoints."""
    config = run.setup.config
    shape = run.setup.lm.config
    mesh = run.setup.mesh
    trained = memory.number(run.state.params)
    frozen = memory.number(run.constants.frozen)
    known = "its files fit" if here.weights else "shape as published, no file of it is here"
    sides = " x ".join(f"{name} {mesh.shape[name]}" for name in meshes.AXES)
    own = selectors.fields(config.select.name)
    settings = ", ".join(
        f"{name}={value}" for name, value in vars(config.select).items() if name in own
    )
    doc = selectors.SELECTORS[config.select.name].__doc__ or ""
    told = " ".join(doc.split("\n\n")[0].split())
    held_out = [None if each.table is None else len(each.table.lengths) for each in here.held_out]
    share = f"{counts.short(trained)} of them" if frozen else "all"
    out.heading("Run")
    out.pairs(
        [
            ("policy", f"{config.model}; {known}"),
            (
                "",
                f"{shape.num_layers} layers of width {shape.hidden_size:,}, {config.dtype} "
                "arithmetic",
            ),
            ("parameters", f"{counts.short(trained + frozen)}, {share} trained"),
            ("mesh", f"{sides} = {counts.number(mesh.size, 'device')}"),
            ("selector", f"{config.select.name}({settings}): {told}"),
            *page.embeddings(here.pool.table),
            *counts.run(config, len(here.pool.table.lengths) if here.pool.whole else None),
            *counts.decoding(run.setup.generate, config.batch_size),
            *counts.bins(bin_shape(config, mesh, run.setup.prompt_length)),
            *counts.evaluations(config, held_out),
            *counts.checkpoints(config, size_of(run.state), 4 * (frozen or trained)),
        ]
    )


def _too_few_devices(config: Config, mesh: meshes.AnyMesh, topology: str | None) -> list[str]:
    """Says which devices this machine lacks for the mesh, in one sentence or none.

    Nothing is said of a topology or of a run on several machines, whose devices are not known here.
    """
    if topology or config.distributed or mesh.size == jax.device_count():
        return []
    wanted = counts.number(mesh.size, "device")
    seen = counts.number(jax.device_count(), "device")
    return [
        f"a mesh of {wanted}, and this machine has {seen}: start the run where they are, "
        "or change the mesh"
    ]
