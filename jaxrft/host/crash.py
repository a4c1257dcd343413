"""Turns unexpected errors into one sentence, and writes their stack traces to files."""

import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from jaxrft import __version__
from jaxrft.errors import InputError
from jaxrft.host.installation import install_command

OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # platform of JAX -> extra of the package
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class Crash(Exception):
    """Reports a bug of jaxrft's: one sentence that names the error and the file of its stack
    trace.
    """


@contextmanager
def reported(folder: Path | None = None) -> Iterator[None]:
    """Raises a Crash in place of an unexpected error.

    The stack trace is written to `folder` if that is a folder which can be written to, else to the
    system's temporary folder. An InputError passes. Errors of the machine become one: too
    little memory, a file or disk that fails, an accelerator that does not start, a package that
    cannot be imported.
    """
    try:
        yield
    except (InputError, Crash):
        raise
    except Exception as error:
        if (sentence := no_bug(error)) is not None:
            raise InputError(sentence) from error
        raise Crash(_sentence(error, folder)) from error


def no_bug(error: Exception) -> str | None:
    """Returns the sentence for an error that the machine causes, not jaxrft; None for any other
    one.
    """
    reason = first_line(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    ):
        return (
            f"out of memory ({reason}): set remat to full, lower micro_batch_size, then "
            "batch_size or the lengths, or "
            "raise mesh.fsdp; `jaxrft train CONFIG --dry-run` shows the memory of each part"
        )
    if isinstance(error, RuntimeError) and "nable to initialize backend" in str(error):
        return (
            f"JAX finds no device ({reason}): set JAX_PLATFORMS to cpu, or install jax for "
            "the accelerator"
        )
    if platforms := _missing_platforms(error):
        return (
            f"JAX_PLATFORMS is {platforms}, but JAX finds no such device: set it to cpu, or "
            f"install jax for the accelerator{_extra_of(platforms)}"
        )
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError)
    ):
        return (
            f"the operating system reports an error ({reason}): correct its cause, and run the "
            "same command again"
        )
    if isinstance(error, ImportError) and not (error.name or "jaxrft").startswith("jaxrft"):
        return (
            f"the package {error.name} cannot be imported ({reason}): install jaxrft again, "
            "with its dependencies"
        )
    return None


def _missing_platforms(error: Exception) -> str:
    """Returns JAX_PLATFORMS if the error is JAX's for none of them being there, otherwise "".

    For a platform whose plugin is not installed that is an assertion without a message.
    """
    if not isinstance(error, AssertionError):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename).name if frames else ""
    return os.environ.get("JAX_PLATFORMS", "") if raised_in == "xla_bridge.py" else ""


def _extra_of(platforms: str) -> str:
    """Returns the command that installs jax for the first of the platforms, in parentheses."""
    extra = EXTRAS.get(platforms.split(",")[0])
    return f" ({install_command(extra)})" if extra else ""


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message, cut after 200 characters."""
    line = str(error).strip().split("\n")[0]
    line = line if len(line) <= 200 else f"{line[:200]}..."
    return f"{type(error).__name__}: {line}".removesuffix(": ")


def _sentence(error: Exception, folder: Path | None) -> str:
    trace = "".join(traceback.format_exception(error))
    for where in (folder, Path(tempfile.gettempdir())):
        if where is not None and (path := _write(where, trace)) is not None:
            return (
                f"{first_line(error)}: this is a bug of jaxrft; please report it with the "
                f"stack trace in {path}"
            )
    return (
        f"{first_line(error)}: this is a bug of jaxrft; please report it, its stack trace "
        f"cannot be written:\n{trace}"
    )


def _write(folder: Path, trace: str) -> Path | None:
    """Writes the stack trace to a new file of the folder; returns its path, or None when it cannot
    be written.
    """
    path = folder / f"jaxrft-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    head = f"jaxrft {__version__}, Python {sys.version}, {_versions()}\n{sys.argv}\n\n"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write((head + trace).encode(errors="backslashreplace"))
    except (OSError, ValueError):
        return None
    return path


def _versions() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in PACKAGES)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"
