"""The similarity predictor of a run that selects by `dots`: opened and checked, the tasks projected once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.select.dots import attention
from jaxrft.select.dots.predictor import Origin, Predictor, check_embeddings, load_predictor
from jaxrft.tasks.table import TaskTable
from jaxrft.types import InputError, Projections


def open_predictor(config: Config, tasks: TaskTable, mesh: meshes.AnyMesh) -> Predictor | None:
    """The predictor that the config asks for, on the host; None for a selector that needs none.

    Raises InputError unless it was made for the embeddings of `tasks`, and its probes fit the tasks and the mesh.
    """
    if config.select.name != "dots":
        return None
    check_reference_set(config, len(tasks.lengths), mesh)
    found, by = load_predictor(config.select.predictor or ""), tasks.embedded_by or {}
    check_embeddings(found, Origin(by["model"], by["width"]))
    return found._replace(params=jax.tree.map(np.asarray, found.params))


def check_reference_set(config: Config, num_tasks: int, mesh: meshes.AnyMesh) -> None:
    """Raises InputError for probes of more tasks than there are, or of so many that the mesh does not divide them."""
    count = config.select.num_references
    if count > num_tasks:
        raise InputError(f"select.num_references is {count} but there are {num_tasks} tasks: lower it, or give more")
    meshes.check_divides(mesh, "select.num_references", count, "batch")


def project_table(predictor: Predictor, tasks: TaskTable, mesh: meshes.AnyMesh, *, described: bool) -> Projections:
    """The whole table as the predictor sees it, on the mesh, sharded over tasks; or its description."""
    shape = (len(tasks.lengths), predictor.embeddings.width)
    both = jax.eval_shape(_both, predictor.params, jax.ShapeDtypeStruct(shape, jnp.float32))
    where: Any = jax.tree.map(lambda x: meshes.task_sharding(mesh, x.shape, shape[0]), both)
    if described:
        return jax.tree.map(meshes.describe, both, where)
    rows = meshes.place(tasks.embeddings, meshes.task_sharding(mesh, shape, shape[0]))
    return jax.jit(_both, out_shardings=where)(predictor.params, rows)


def _both(params: attention.Params, embeddings: jax.Array) -> Projections:
    return attention.project(params, embeddings, embeddings)
