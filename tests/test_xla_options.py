"""The options of XLA that the command line sets."""

from pathlib import Path

import pytest

from jaxrft.host import xla_options
from jaxrft.host.xla_options import OPTIONS, apply, apply_to, known_names

GPU = "--xla_gpu_deterministic_ops=true"
TPU = [option.name for option in OPTIONS if option.platform == "tpu"]
DOCS = Path(__file__).parent.parent / "docs/operations.md"


@pytest.fixture
def libtpu(tmp_path):
    """Writes a library that knows the given names; returns an environment that names it."""

    def write(*names):
        path = tmp_path / "libtpu.so"
        path.write_bytes(b"\x7fELF\0" + b"\0".join(name.encode() for name in names) + b"\0\xff")
        return {"TPU_LIBRARY_PATH": str(path)}

    return write


def test_tpus_get_their_options_behind_those_of_the_user(libtpu):
    environment = libtpu(*TPU) | {"LIBTPU_INIT_ARGS": "--xla_tpu_other=1"}
    apply(environment)
    given, *options = environment["LIBTPU_INIT_ARGS"].split()
    assert given == "--xla_tpu_other=1"
    assert options == [f"--{name}=true" for name in TPU]
    assert environment["XLA_FLAGS"] == GPU


@pytest.mark.parametrize("platforms", ["cpu", "cuda,cpu"])
def test_other_platforms_get_no_option_of_tpus(platforms, libtpu):
    environment = libtpu(*TPU) | {"JAX_PLATFORMS": platforms}
    apply(environment)
    assert "LIBTPU_INIT_ARGS" not in environment
    assert environment["XLA_FLAGS"] == GPU


def test_the_users_own_value_wins(libtpu):
    environment = libtpu(*TPU) | {
        "JAX_PLATFORMS": "tpu,cpu",
        "LIBTPU_INIT_ARGS": f"--{TPU[0]}=false",
    }
    environment["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=false"
    apply(environment)
    assert environment["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"
    words = environment["LIBTPU_INIT_ARGS"].split()
    assert words[0] == f"--{TPU[0]}=false" and len(words) == len(TPU)


def test_a_longer_name_of_the_users_does_not_stand_for_a_shorter_one(libtpu):
    short = "xla_tpu_enable_async_collective_fusion"
    environment = libtpu(*TPU) | {"LIBTPU_INIT_ARGS": f"--{short}_fuse_all_gather=false"}
    apply_to("tpu", environment)
    assert f"--{short}=true" in environment["LIBTPU_INIT_ARGS"].split()


def test_an_option_that_the_library_does_not_know_is_left_out(libtpu):
    environment = libtpu(TPU[1], f"{TPU[0]}_v2")
    apply_to("tpu", environment)
    assert environment["LIBTPU_INIT_ARGS"] == f"--{TPU[1]}=true"


@pytest.mark.parametrize("content", [None, b""])
def test_without_a_library_that_can_be_read_no_option_is_set(content, tmp_path):
    path = tmp_path / "libtpu.so"
    if content is not None:
        path.write_bytes(content)
    environment = {"TPU_LIBRARY_PATH": str(path)}
    apply_to("tpu", environment)
    assert "LIBTPU_INIT_ARGS" not in environment
    assert known_names(None, TPU) == set()


def test_options_are_set_once(libtpu):
    environment = libtpu(*TPU)
    apply(environment)
    before = dict(environment)
    apply(environment)
    assert environment == before


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_is_listed_in_the_docs(option):
    assert option.platform in xla_options.VARIABLES
    assert (
        f"| `{option.name}` | {option.value} | {option.platform.upper()} | {option.purpose} |"
    ) in DOCS.read_text()
