"""What the machine can do at best: the rates of a large matrix product and of a copy, measured."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from benchmarks import _serve
from benchmarks._serve import Measured, Request, Subject

# Of the square matrices, and bytes copied: more than caches hold, and on an accelerator more than a
# call costs.
CPU = jax.default_backend() == "cpu"
SIZE = 2048 if CPU else 8192
COPIED = 2**28 if CPU else 2**30
LEAST = 0.5  # seconds


@contextmanager
def open_subject(request: Request) -> Iterator[Subject]:
    """Opens the measurement of both rates, in the dtype of the request."""
    dtype = jnp.dtype(request.shape.dtype)
    square = jnp.ones((SIZE, SIZE), dtype)
    long = jnp.ones(COPIED // dtype.itemsize, dtype)
    precision = "highest" if request.shape.dtype == "float32" else "default"
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    copy = jax.jit(jnp.negative)  # reads and writes every number; a copy alone would be left out

    def run() -> Measured:
        start = time.perf_counter()
        flops = 2 * SIZE**3 / seconds_each(lambda: product(square))
        bytes_moved = 2 * COPIED / seconds_each(lambda: copy(long))
        return {"seconds": time.perf_counter() - start, "flops": flops, "bytes": bytes_moved}

    yield Subject(run, lambda: [0])


def seconds_each(call: Callable[[], jax.Array]) -> float:
    """Returns the mean seconds of a call, over at least LEAST seconds; one before does not
    count.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < LEAST:
        jax.block_until_ready(call())
        count += 1
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    _serve.serve(open_subject)
