"""The options of XLA that the command line sets, before a backend starts.

Imports only the standard library: XLA and libtpu read the variables when the first program is
compiled. A value that the user has set for the same option stays.

libtpu ends the process for an option that it does not know, and its options come and go. So an
option of it is set only if the library holds its name.
"""

import mmap
import re
from collections.abc import Iterable, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
LIBRARY = "TPU_LIBRARY_PATH"  # the variable that names another libtpu.so
MAXTEXT = "MaxText, benchmarks/xla_flags_library.py"
AXLEARN = "AXLearn, common/compiler_options.py"


class Option(NamedTuple):
    """An option of XLA."""

    name: str
    value: str
    platform: str  # a key of VARIABLES
    purpose: str
    source: str


OPTIONS = (
    Option(
        "xla_gpu_deterministic_ops",
        "true",
        "gpu",
        "a resumed run equals the other one bit for bit",
        "XLA",
    ),
    Option(
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        "tpu",
        "schedules products while data is on its way",
        AXLEARN,
    ),
    Option(
        "xla_enable_async_all_gather",
        "true",
        "tpu",
        "weights are gathered while products run",
        f"{MAXTEXT}; {AXLEARN} (v4, v6e)",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "tpu",
        "collectives and products are fused, and advance together",
        f"{MAXTEXT}; {AXLEARN} (v6e)",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "true",
        "tpu",
        "the same for gathering",
        f"{MAXTEXT}; {AXLEARN} (v6e)",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "tpu",
        "a collective spreads over several products",
        f"{MAXTEXT}; {AXLEARN} (v6e)",
    ),
    Option(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "tpu",
        "products and collectives share a core",
        f"{MAXTEXT}; {AXLEARN} (v6e)",
    ),
    Option(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        "tpu",
        "gradients are summed over `data` while the next layer's are computed",
        f"{MAXTEXT}; {AXLEARN} (several slices)",
    ),
    Option(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        "tpu",
        "the same for gradients of several sizes",
        f"{MAXTEXT}; {AXLEARN} (several slices)",
    ),
)


def apply(environment: MutableMapping[str, str]) -> None:
    """Sets the options of the platforms that JAX may use here."""
    apply_to("gpu", environment)  # every jaxlib knows them
    platforms = environment.get("JAX_PLATFORMS", "")
    if not platforms or "tpu" in platforms.split(","):
        apply_to("tpu", environment)


def apply_to(platform: str, environment: MutableMapping[str, str]) -> None:
    """Sets the options of a platform; those of TPUs as far as the libtpu that is installed knows
    them.
    """
    variable = VARIABLES[platform]
    given = environment.get(variable, "")
    names = {word.partition("=")[0].lstrip("-") for word in given.split()}
    missing = [
        option for option in OPTIONS if option.platform == platform and option.name not in names
    ]
    if platform == "tpu":
        known = known_names(library(environment), (option.name for option in missing))
        missing = [option for option in missing if option.name in known]
    if missing:
        environment[variable] = " ".join(
            [given, *(f"--{option.name}={option.value}" for option in missing)]
        ).strip()


def library(environment: MutableMapping[str, str]) -> Path | None:
    """Returns the file of libtpu; None = it is not installed."""
    if LIBRARY in environment:
        return Path(environment[LIBRARY])
    spec = find_spec("libtpu")
    return None if spec is None or spec.origin is None else Path(spec.origin).with_name("libtpu.so")


def known_names(path: Path | None, names: Iterable[str]) -> set[str]:
    """Returns those of the names of options that a library holds; none if it cannot be read."""
    wanted = {name.encode() for name in names}
    known = set()
    if path is None or not wanted:
        return known
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            for match in re.finditer(rb"xla_\w+", content):
                if match[0] in wanted:
                    known.add(match[0].decode())
                if len(known) == len(wanted):
                    break
    except (OSError, ValueError):  # ValueError: an empty file
        return set()
    return known
