"""Names the folder in which JAX keeps compiled programs, so that the next run need not compile them
again.

Imports only the standard library: JAX reads the setting when it is imported.
"""

import hashlib
import logging
import os
import platform
from importlib import metadata
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


logger = logging.getLogger(__name__)


def enable() -> None:
    """Has JAX keep compiled programs in the user's cache folder, unless its own variable names
    another one.

    Programs that take less than a tenth of a second to compile are not kept. Warns if that folder
    cannot be made.
    """
    if FOLDER in os.environ:
        return
    try:
        path = folder()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        logger.warning(
            "compiled programs cannot be kept for the next run (%s): set %s to a folder that "
            "can be written to",
            error,
            FOLDER,
        )
        return
    os.environ[FOLDER] = str(path)
    os.environ.setdefault(SHORTEST, "0.1")


def folder() -> Path:
    """Returns <cache folder of the user>/jaxrft/compiled/<version of jaxlib>-<digest of the
    processor>.

    The processor is part of the name because a home may be shared by machines of several kinds, and
    code compiled for one of them may hold instructions that another does not have.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(caches) if os.path.isabs(caches) else Path.home() / ".cache"
    digest = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return root / "jaxrft" / "compiled" / f"{metadata.version('jaxlib')}-{digest}"


def _processor() -> str:
    """Identifies the processor: the kind of machine, and the instructions that Linux lists."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    features = next(
        (line for line in lines if line.lower().startswith(("flags", "features"))),
        platform.processor(),
    )
    return f"{platform.system()} {platform.machine()} {features}"
