"""Summarizes a run in a few lines, for the console."""

import jax

from jaxrft.config import Config
from jaxrft.train.setup import Constants, Setup
from jaxrft.train.state import TrainState


def run_summary(setup: Setup, constants: Constants, state: TrainState) -> dict[str, str]:
    """Names what a run trains, on which tasks and devices, and where it writes."""
    config = setup.config
    return {
        "model": f"{config.model}, {_parameters(config, constants, state)}",
        "tasks": f"{setup.num_tasks:,} from {', '.join(x.source for x in config.task_sets)}",
        "a step": (
            f"{config.batch_size} tasks x {config.num_generations} completions, "
            f"selected by {config.select.name}"
        ),
        **_evaluation(config),
        "devices": _devices(setup),
        "folder": config.output_dir,
    }


def _parameters(config: Config, constants: Constants, state: TrainState) -> str:
    trained = _count(state.params)
    if constants.frozen:
        total = _count(constants.frozen)
        return f"{total:,} parameters in {config.dtype}, and {trained:,} of adapters"
    return f"{trained:,} parameters, computing in {config.dtype}"


def _count(params: object) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _evaluation(config: Config) -> dict[str, str]:
    sets = config.evaluation.tasks
    if not sets or not config.eval_steps:
        return {}
    names = ", ".join(tasks.source for tasks in sets)
    return {"evaluation": f"every {config.eval_steps} steps, on {names}"}


def _devices(setup: Setup) -> str:
    sizes = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} {kind}{hosts}, mesh {sizes}"
