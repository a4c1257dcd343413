"""Keeps libtpu quiet on machines that have it installed and have no TPU.

There it names all that is missing, before it reads the variables that set how much it logs.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxrft.host import stderr, xla_options

# Variables that libtpu reads: who sets one wants to see what it prints.
ASKED = ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL")
DEVICES = ("accel*", "vfio/[0-9]*")  # files in /dev of TPUs that are attached
NOISE = re.compile(
    rb"Failed to find host bounds for accelerator type"
    rb"|WARNING: (Logging before InitGoogle|could not determine TPU)"
    rb"|^[IWEF]\d{4} .* (common_lib|libtpu_\w+|tpu_\w+)\.cc:\d+\]"
    rb"|^=== Source Location Trace: ==="
    rb"|^learning/\S+\.cc:\d+$"
)


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what libtpu prints within the block; what others print comes afterwards.

    Nothing is held back where a TPU is attached, where libtpu is not installed, and where the user
    has set one of the variables ASKED.
    """
    if not _is_noisy():
        yield
        return
    with stderr.held_back() as held:
        yield
    stderr.write(without_noise(held.printed))


def without_noise(printed: bytes) -> bytes:
    """Returns the lines that are not libtpu's."""
    lines = printed.splitlines(keepends=True)
    return b"".join(line for line in lines if not NOISE.search(line.rstrip()))


def _is_noisy() -> bool:
    if any(name in os.environ for name in ASKED) or xla_options.library(os.environ) is None:
        return False
    return not any(any(Path("/dev").glob(pattern)) for pattern in DEVICES)
