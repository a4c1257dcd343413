"""The device mesh and the one table from logical axes to mesh axes."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxrft.types import InputError, PyTree

AXES = ("data", "fsdp", "model")

AnyMesh = Mesh | AbstractMesh

# Logical axis -> mesh axes. A mesh axis serves one dimension of an array; the first to ask gets it,
# so that "embed" shards a parameter over `fsdp` but an activation, whose "batch" comes first, not
# again.
RULES: dict[str, tuple[str, ...]] = {
    "task": ("data", "fsdp"),  # N, tasks in the table
    "batch": ("data", "fsdp"),  # B prompts or R rows
    "embed": ("fsdp",),
    "vocab": ("model",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "mlp": ("model",),
    "layer": (),
    "head": (),
    "rank": (),
    "time": (),
}


def make(
    data: int = -1, fsdp: int = 1, model: int = 1, *, devices: list[Any] | None = None
) -> Mesh:
    """Builds a mesh of axes (data, fsdp, model).

    One size may be -1: it becomes the number of devices divided by the other sizes.
    Raises InputError when the sizes do not multiply to the number of devices.
    """
    sizes = _sizes(
        data, fsdp, model, count=len(devices) if devices is not None else jax.device_count()
    )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def abstract(data: int = -1, fsdp: int = 1, model: int = 1) -> AbstractMesh:
    """Builds a mesh without devices, which is enough for shapes and shardings.

    The sizes need not fit the devices of this machine. A size of -1 becomes their number divided by
    the other sizes, rounded down, at least 1.
    Raises InputError for other sizes below 1, and for more than one -1.
    """
    given = math.prod(size for size in (data, fsdp, model) if size > 0)
    count = given * max(1, jax.device_count() // given) if -1 in (data, fsdp, model) else given
    return AbstractMesh(
        _sizes(data, fsdp, model, count=count), AXES, axis_types=(AxisType.Auto,) * 3
    )


def _sizes(*sizes: int, count: int) -> tuple[int, ...]:
    """Replaces a size of -1 so that the product of the sizes is `count`, the number of devices.

    Raises InputError for other sizes below 1, for more than one -1, and if none gives `count`.
    """
    named = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(
            f"mesh {named}: sizes are positive and at most one may be -1, which takes the "
            "remaining devices"
        )
    known = math.prod(size for size in sizes if size != -1)
    if count % known or (-1 not in sizes and known != count):
        raise InputError(
            f"mesh {named} does not divide the {count} devices: make the product "
            f"of the sizes {count}"
        )
    return tuple(count // known if size == -1 else size for size in sizes)


def platform(mesh: AnyMesh) -> str:
    """Returns the platform of a mesh's devices, such as "tpu"; of a mesh without devices, that of
    this process.
    """
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def memory_of_a_device(mesh: AnyMesh) -> int | None:
    """Returns the bytes that a device of this process has; None where that is not known.

    Devices that are processors share the memory of their host.
    """
    if not isinstance(mesh, Mesh):
        return None
    device, *others = mesh.local_devices
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 + len(others))
    except (AttributeError, ValueError, OSError):
        return None


def spec(*axes: str | None, exclude: tuple[str, ...] = ()) -> PartitionSpec:
    """Maps the logical names of an array's dimensions to mesh axes by RULES; None is not sharded.

    Mesh axes in `exclude` are not used.
    """
    used = set(exclude)
    parts = []
    for axis in axes:
        free = tuple(name for name in (RULES[axis] if axis else ()) if name not in used)
        used.update(free)
        parts.append(free or None)
    return PartitionSpec(*parts)


def shards(mesh: AnyMesh | None, axis: str) -> int:
    """Counts the shards of a logical axis on `mesh`; 1 unless the mesh has the axes AXES."""
    return (
        math.prod(mesh.shape[name] for name in RULES[axis])
        if mesh is not None and is_ours(mesh)
        else 1
    )


def is_ours(mesh: AnyMesh) -> bool:
    """Checks whether a mesh has the axes AXES.

    The empty ambient mesh of JAX has none of them, and a mesh of another program may have others.
    """
    return set(AXES) <= set(mesh.axis_names)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shards `x` by the names of its dimensions on the ambient mesh (`jax.set_mesh`), if there is
    one of AXES.

    Inside of `jax.shard_map`, only over the axes that are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_ours(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes, exclude=mesh.manual_axes))


def sharding(mesh: AnyMesh, *axes: str | None) -> NamedSharding:
    """Builds the sharding on `mesh` of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, spec(*axes))


def task_sharding(mesh: AnyMesh, shape: tuple[int, ...], num_tasks: int) -> NamedSharding:
    """Shards over tasks what has a row a task, if the mesh divides their number; replicates
    everything else.
    """
    rows = shape[:1] == (num_tasks,) and num_tasks % shards(mesh, "task") == 0
    return sharding(mesh, *(("task",) + (None,) * (len(shape) - 1) if rows else ()))


def check_divides(mesh: AnyMesh, what: str, size: int, axis: str) -> None:
    """Raises InputError unless `mesh` splits `size` of `what` evenly along the logical axis
    `axis`.
    """
    count = shards(mesh, axis)
    if size % count:
        names = " x ".join(f"{name}={mesh.shape[name]}" for name in RULES[axis])
        raise InputError(
            f"{what} {size} does not divide over the mesh axes {names}: choose a "
            f"multiple of {count}"
        )


def place(x: Any, where: NamedSharding) -> jax.Array:
    """Puts a host array, which every process holds, onto devices by the sharding `where`."""
    return jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index])


def describe(
    x: np.ndarray | jax.Array | jax.ShapeDtypeStruct, where: NamedSharding
) -> jax.ShapeDtypeStruct:
    """Describes the array that `place` would return, without allocating it.

    `x` may be a description itself.
    """
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def from_host(mesh: AnyMesh, x: np.ndarray, *axes: str | None) -> jax.Array:
    """Puts a host array, which every process holds, onto `mesh`, sharded by its logical axes."""
    return place(x, sharding(mesh, *axes))


def on_device(tree: PyTree) -> int:
    """Computes the bytes that each device holds of a pytree of arrays with shardings, or of their
    descriptions.
    """
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def describe_array(
    mesh: AnyMesh, shape: tuple[int, ...], dtype: DTypeLike, *axes: str | None
) -> jax.ShapeDtypeStruct:
    """Describes an array whose dimensions have these logical names."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, *axes))


def place_table(
    tree: PyTree, mesh: AnyMesh, num_tasks: int, *, put: Callable[..., object] = place
) -> PyTree:
    """Puts a pytree of host arrays onto `mesh`, those with a row a task sharded over tasks; `put`
    may be `describe`.
    """
    return jax.tree.map(
        lambda x: put(np.asarray(x), task_sharding(mesh, np.shape(x), num_tasks)), tree
    )
