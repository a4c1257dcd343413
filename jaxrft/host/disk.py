"""Writes while the disk may be full: says so in one sentence."""

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
RESUME_REMEDY = "put that right, and the same command goes on from the newest checkpoint"


@contextmanager
def writing(place: Path, remedy: str = RESUME_REMEDY) -> Iterator[None]:
    """Raises InputError, with the remedy, for what the disk of a folder or file refuses to take or
    to give.
    """
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        # tensorstore and safetensors tell of a full disk in their text only.
        told = next((reason for reason in DISK_FULL if reason in str(error)), None)
        if reason := getattr(error, "strerror", None) or told:
            raise InputError(f"cannot write to {place} ({reason}): {remedy}") from error
        raise


def check_room(folder: Path, size: int) -> None:
    """Raises InputError when there are not `size` bytes left on the disk that `folder` is, or will
    be, on.
    """
    with writing(folder):
        if shutil.disk_usage(folder.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a .safetensors file that is at no time there in part; raises InputError when the disk
    is full.
    """
    with writing(path.parent):
        replace_file(path, safetensors.numpy.save(arrays))
