"""Writes to disks that may be full, and reports that in one sentence."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.numpy

from jaxrft.host.files import replace_file
from jaxrft.types import InputError

DISK_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
RESUME_REMEDY = "put that right, and run the same command to resume from the newest checkpoint"


@contextmanager
def writing(place: Path, remedy: str = RESUME_REMEDY) -> Iterator[None]:
    """Raises InputError, with the remedy, for errors of the disk of a folder or file."""
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        # tensorstore and safetensors report a full disk in their text only.
        in_text = next((reason for reason in DISK_FULL if reason in str(error)), None)
        if reason := getattr(error, "strerror", None) or in_text:
            raise InputError(f"cannot write to {place} ({reason}): {remedy}") from error
        raise


def check_room(folder: Path, size: int) -> None:
    """Raises InputError when the disk of `folder`, which need not exist yet, has fewer than `size`
    free bytes.
    """
    with writing(folder):
        if shutil.disk_usage(folder.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a .safetensors file atomically; raises InputError when the disk is full."""
    with writing(path.parent):
        replace_file(path, safetensors.numpy.save(arrays))
