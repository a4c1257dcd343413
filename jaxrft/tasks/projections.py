"""Opens and checks the predictor of a run that selects by `dots`, and projects its tasks once."""

from collections.abc import Callable

import jax
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.select.dots import attention
from jaxrft.select.dots.predictor import Origin, Predictor, check_embeddings, load_predictor
from jaxrft.tasks.table import TaskTable
from jaxrft.types import InputError, Projections


def open_predictor(config: Config, tasks: TaskTable, mesh: meshes.AnyMesh) -> Predictor | None:
    """Opens the predictor that the config names, on the host; None for a selector that needs none.

    Raises InputError unless it was made for the embeddings of `tasks`, and the reference set fits
    tasks and mesh.
    """
    if config.select.name != "dots":
        return None
    check_reference_set(config, len(tasks.lengths), mesh)
    predictor = load_predictor(config.select.predictor or "")
    source = tasks.embedded_by or {}
    check_embeddings(predictor, Origin(source["model"], source["width"]))
    return predictor._replace(params=jax.tree.map(np.asarray, predictor.params))


def check_reference_set(config: Config, num_tasks: int, mesh: meshes.AnyMesh) -> None:
    """Raises InputError unless the reference set fits the number of tasks and divides over the
    mesh.
    """
    count = config.select.num_references
    if count > num_tasks:
        raise InputError(
            f"select.num_references is {count} but there are {num_tasks} tasks: "
            "lower it, or give more"
        )
    meshes.check_divides(mesh, "select.num_references", count, "batch")


def compile_projection(
    predictor: Predictor, mesh: meshes.AnyMesh, num_tasks: int
) -> Callable[[attention.Params, jax.Array], Projections]:
    """Returns the program (params, embeddings [N, E]) -> projections of the table, sharded over
    tasks.
    """
    rows = meshes.task_sharding(mesh, (num_tasks, predictor.embeddings.width), num_tasks)
    return jax.jit(attention.project_table, out_shardings=rows)
