"""Joins the processes of a run, and broadcasts from process 0."""

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrft.host import signals
from jaxrft.types import InputError

T = TypeVar("T")


def on_host0(function: Callable[[], T]) -> T | None:
    """Calls `function` on process 0, and returns its result there, None on the others.

    The others do not call it. An InputError that it raises is raised on all processes.
    """
    result = None
    mistake = ""
    if jax.process_index() == 0:
        try:
            result = function()
        except InputError as error:
            mistake = str(error)
    if jax.process_count() > 1:
        mistake = broadcast_text(mistake)
    if mistake:
        raise InputError(mistake)
    return result


def broadcast_from_host0(function: Callable[[], str]) -> str:
    """Calls `function` on process 0, and returns its text on all processes."""
    text = on_host0(function) or ""
    return text if jax.process_count() == 1 else broadcast_text(text)


def broadcast_text(text: str) -> str:
    """Broadcasts the `text` of process 0 to all processes."""
    data = text.encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    size = max(1024, 1 << length.bit_length())  # few programs, each a shape
    sent = np.frombuffer(data[:size].ljust(size, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes()[:length].decode()


# Seconds without a heartbeat after which JAX aborts all processes. A process sends one every half
# of that. So a dead process may be noticed after half of it already, and by then the others must
# have named it and ended.
HEARTBEAT_TIMEOUT = 60


def join_processes() -> None:
    """Joins the other processes of the run; raises InputError when the environment does not name
    them.
    """
    address, count, index = map(
        os.environ.get, ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    jax.config.update("jax_enable_preemption_service", False)  # which would keep SIGTERM to itself
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, IndexError) as error:  # an address without a port is an IndexError
        raise InputError(
            f"distributed is True, but JAX_COORDINATOR_ADDRESS is {address}, JAX_NUM_PROCESSES "
            f"{count} and JAX_PROCESS_ID {index} ({error}): set them to, for example, "
            "localhost:1234, 2 and 0 to 1, outside of TPU pods and SLURM jobs"
        ) from error
    if jax.process_index() == 0:
        signals.leave_last()


def all_rows(x: jax.Array) -> np.ndarray:
    """Returns an array that processes share by rows, all of it on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def any_process(flag: bool) -> bool:
    """Checks whether `flag` is True on any process; all of them must call it."""
    return (
        flag
        if jax.process_count() == 1
        else bool(multihost_utils.process_allgather(np.array(flag)).any())
    )
