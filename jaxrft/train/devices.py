"""The devices of a run: joins the processes, lays out the mesh, computes on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.host import libtpu
from jaxrft.host.multihost import join_processes
from jaxrft.types import InputError


def open_mesh(config: Config) -> Mesh:
    """Joins the other processes if there are any, and lays out the mesh."""
    if config.distributed and not jax.distributed.is_initialized():
        join_processes()
    with libtpu.quiet():
        mesh = meshes.make(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    check_mesh(config, mesh)
    return mesh


# Properties of the config that check_mesh reads -> the field to change.
MESH_FIELDS = {
    "tasks_per_update": "mini_batch_size",
    "rows_per_micro_batch": "micro_batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "fresh_batch_size": "batch_size x replay.fresh_fraction",
}


def check_mesh(config: Config, mesh: meshes.AnyMesh) -> None:
    """Raises InputError for batches that the mesh does not divide."""
    count = meshes.shards(mesh, "batch")
    rows = config.rows_per_micro_batch
    for name in ("batch_size", *MESH_FIELDS):
        what = MESH_FIELDS.get(name, name)
        meshes.check_divides(mesh, what, getattr(config, name), "batch")
    groups = rows // config.num_generations
    if groups >= count and config.tasks_per_update % groups == 0 and groups % count == 0:
        return
    if groups < count and config.num_generations % (rows // count) == 0:
        return
    raise InputError(
        f"micro_batch_size {rows} does not divide over data x fsdp = {count} devices: choose a "
        f"multiple of {count * config.num_generations} rows, or {count} times a divisor of "
        f"num_generations {config.num_generations}"
    )


@contextmanager
def computing_on(mesh: Mesh, config: Config) -> Iterator[None]:
    """Sets the ambient mesh; with dtype float32 also the precision of products on accelerators,
    whose default is lower.
    """
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"),
    ):
        yield
