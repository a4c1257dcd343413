import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# compiling is most of what the tests take
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Threads of the CPU client. A virtual device that waits in a collective keeps one, and may wait in
# several collectives at once. With only as many threads as devices, all can wait for different
# ones; XLA aborts the process after 40 s.
os.environ.setdefault("PJRT_NPROC", "64")
# The second as jaxrft.cli sets it: flags are a part of the key of a compiled program, which must
# not depend on whether a test has called the command line before.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true"
# another jaxlib may not know the flag and would abort, as libtpu does
if metadata.version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # which take two thirds of the time to compile
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# A program that one process has compiled serves the others: workers and the processes that tests
# start inherit the folder. Whoever names one has it filled for the next run of the tests, too.
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
if PROGRAMS not in os.environ:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="jaxrft-programs-")
    atexit.register(shutil.rmtree, os.environ[PROGRAMS], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# A job in the background and one under nohup ignore these, and so would all processes that tests
# start and signal. A handler that does nothing ignores them for this process alone.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# benchmarks/ is in no wheel. Last, so that an installed jaxrft is tested, and not the folder of
# that name.
sys.path.append(str(Path(__file__).parents[1]))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# of the 65,530 memory maps that Linux gives a process; a compiled program takes three, and those of
# test_selectors.py take 33,000
MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def bounded_programs():
    """Forgets compiled programs when a file is done and they are many: XLA aborts where it gets no
    map.
    """
    yield
    with contextlib.suppress(OSError):
        if Path("/proc/self/maps").read_bytes().count(b"\n") > MAPS:
            jax.clear_caches()


@pytest.fixture(scope="session")
def mesh():
    """The 2 x 2 x 2 mesh of the sharding tests."""
    from jaxrft import mesh as meshes

    return meshes.make(2, 2, 2)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a random policy and tasks for it."""
    import helpers

    folder = tmp_path_factory.mktemp("world")
    helpers.write_policy(folder / "policy")
    helpers.write_rows(folder / "tasks.jsonl", helpers.task_rows())
    return folder


@pytest.fixture(scope="session")
def configure(world):
    """(output_dir, **changes) -> the config of a short run."""
    import functools

    import helpers

    return functools.partial(helpers.make_config, str(world / "policy"), str(world / "tasks.jsonl"))


@pytest.fixture(scope="session")
def whole(world, configure):
    """(folder, final state) of six steps without interruption; leave the folder as it is."""
    from jaxrft.train import train

    return world / "whole", train(configure(world / "whole"))
