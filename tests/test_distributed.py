"""Two processes of four devices each, joined by jax.distributed, against one of eight."""

import json
import socket
from collections import Counter
from pathlib import Path

import helpers
import numpy as np
import pytest

from jaxrft import train
from jaxrft.lm import weights


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pair(world, configure):
    """The folder of three steps by two processes, which each leave their parameters and what they graded in it."""
    folder = world / "pair"
    config = configure(folder, steps=3, distributed=True)
    path = helpers.write_config(world / "pair.py", config)
    address = f"localhost:{free_port()}"
    members = [
        helpers.start(
            *(Path(__file__).with_name("member.py"), path, world / f"params{index}.npz"),
            devices=4,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=2,
            JAX_PROCESS_ID=index,
            RECORD=world / f"graded{index}.txt",
        )
        for index in range(2)
    ]
    for code, _, errors in helpers.finish(*members):
        assert code == 0, errors
    return folder


def test_each_process_grades_its_own_completions(pair):
    graded = [(pair.parent / f"graded{index}.txt").read_text().splitlines() for index in range(2)]
    assert [len(lines) for lines in graded] == [3 * 8 * 4 // 2] * 2
    prompts = [Counter(line.split("=")[0] for line in lines) for lines in graded]
    assert set(sum(prompts, Counter()).values()) <= {4, 8, 12}  # whole groups, of one to three steps
    assert prompts[0] != prompts[1]


def test_processes_agree_with_each_other_and_with_one_process(pair, whole):
    first, second = (np.load(pair.parent / f"params{index}.npz") for index in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for line, other in zip(helpers.metrics(pair), helpers.metrics(whole[0])[:3], strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], abs=1e-4), name


def test_their_export_opens(pair):
    config = weights.read_config(pair / "policy")
    assert config == helpers.SHAPE
    params = weights.load(pair / "policy", config)
    first = np.load(pair.parent / "params0.npz")
    for name, value in params.items():
        np.testing.assert_array_equal(value, first[name], err_msg=name)


def test_their_checkpoint_goes_on_in_one_process(pair, configure, whole):
    assert json.loads((pair / "versions.json").read_text())["devices"].endswith("2 processes")
    state = train.train(configure(pair))
    helpers.assert_close(state, whole[1], atol=1e-3)
    assert [line["step"] for line in helpers.metrics(pair)] == [1, 2, 3, 4, 5, 6]
