"""Two real processes, joined by jax.distributed, against one."""

import json
import signal
import time
from collections import Counter
from pathlib import Path

import helpers
import numpy as np
import pytest

from jaxrft import cli
from jaxrft.config import MeshConfig
from jaxrft.host import heartbeat, multihost
from jaxrft.lm import weights
from jaxrft.train.loop import train

MEMBER = Path(__file__).with_name("member.py")


def start_pair(folder, *flags, devices, only_second=()):
    """Starts `jaxrft train` in two processes, which leave in `folder` what they graded and their
    parameters.
    """
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{helpers.free_port()}",
        "JAX_NUM_PROCESSES": 2,
    }
    return [
        helpers.start(
            *(
                MEMBER,
                folder / f"params{index}.npz",
                "train",
                *flags,
                "--distributed",
                *(only_second if index else ()),
            ),
            devices=devices,
            JAX_PROCESS_ID=index,
            RECORD=folder / f"graded{index}.txt",
            **variables,
        )
        for index in range(2)
    ]


def graded(folder, index):
    """How often a process graded which completion of which prompt."""
    record = folder / f"graded{index}.txt"
    return Counter(record.read_text().splitlines() if record.exists() else ())


def assert_same_metrics(lines, others):
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"select/auc"}:  # which jumps where beliefs tie but for rounding
            assert line[name] == pytest.approx(other[name], abs=1e-4), name


@pytest.fixture(scope="module")
def shards(tmp_path_factory, configure):
    """The folder of two steps by two processes of four devices, which hold a shard of the rows
    each, and `alone` by one of eight.

    Half of the prompts wait, and a shard waits for the fuller one.
    """
    folder = tmp_path_factory.mktemp("shards")
    changes = {
        "steps": 2,
        "mesh": MeshConfig(data=2, fsdp=2, model=2),
        "max_completion_length": 80,
        "max_concurrent_rows": 32,
        "batch_size": 16,
    }
    paths = [
        helpers.write_config(folder / f"{name}.py", configure(folder / name, **changes))
        for name in ("alone", "pair")
    ]
    alone = helpers.start("-m", "jaxrft", "train", paths[0], RECORD=folder / "graded.txt")
    for code, _, errors in helpers.finish(alone, *start_pair(folder, paths[1], devices=4)):
        assert code == 0, errors
    return folder


@pytest.mark.slow
def test_each_process_grades_its_own_half(shards):
    first, second = graded(shards, 0), graded(shards, 1)
    assert first.total() == second.total() == 2 * 16 * 4 // 2 and first != second
    assert first + second == graded(shards, "")


@pytest.mark.slow
def test_the_steps_of_two_processes_are_those_of_one(shards):
    first, second = (np.load(shards / f"params{index}.npz") for index in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert_same_metrics(helpers.metrics(shards / "pair"), helpers.metrics(shards / "alone"))
    assert all(line["rollout/segments"] > 3 for line in helpers.metrics(shards / "pair"))


@pytest.fixture(scope="module")
def halves(tmp_path_factory, configure):
    """The folder of three steps by two processes that hold half of the model each, and its run."""
    folder = tmp_path_factory.mktemp("halves")
    config = configure(folder / "run", steps=3, mesh=MeshConfig(data=1, fsdp=1, model=2))
    for code, _, errors in helpers.finish(
        *start_pair(folder, helpers.write_config(folder / "config.py", config), devices=1)
    ):
        assert code == 0, errors
    return folder


@pytest.mark.slow
def test_of_rows_that_both_hold_the_first_process_grades_all(halves):
    assert graded(halves, 0).total() == 3 * 8 * 4 and not graded(halves, 1)


@pytest.mark.slow
def test_halves_of_a_model_make_the_steps_of_a_whole(halves, whole):
    assert_same_metrics(helpers.metrics(halves / "run"), helpers.metrics(whole[0])[:3])


@pytest.mark.slow
def test_a_process_reads_only_what_it_holds(halves):
    for index in range(2):
        params = dict(np.load(halves / f"params{index}.npz"))
        assert params.pop("read") == sum(np.isfinite(value).sum() for value in params.values())


@pytest.mark.slow
def test_their_export_opens(halves):
    assert weights.read_config(halves / "run/policy") == helpers.SHAPE
    first, second = (np.load(halves / f"params{index}.npz") for index in range(2))
    assert any(np.isnan(first[name]).any() for name in first)
    for name, value in weights.load(halves / "run/policy", helpers.SHAPE).items():
        # the one that is held
        np.testing.assert_array_equal(value, np.fmax(first[name], second[name]), err_msg=name)


@pytest.mark.slow
def test_their_checkpoint_goes_on_in_one_process(halves, configure, whole):
    assert json.loads((halves / "run/versions.json").read_text())["devices"].endswith("2 processes")
    state = train(configure(halves / "run"))
    helpers.assert_close(state, whole[1], atol=1e-3)
    assert [line["step"] for line in helpers.metrics(halves / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_both(configure, tmp_path):
    path = helpers.write_config(
        tmp_path / "config.py", configure(tmp_path / "run", mesh=MeshConfig())
    )
    begin = time.monotonic()
    mistake = ("--tasks.source", tmp_path / "absent.jsonl")
    first, second = helpers.finish(*start_pair(tmp_path, path, devices=1, only_second=mistake))
    assert time.monotonic() - begin < 100
    assert first[0] != 0
    assert second[0] == 2 and "jaxrft: error: no file" in second[2] and "Traceback" not in second[2]


def test_a_process_has_named_a_dead_one_and_ended_before_jax_aborts_it():
    """A dead process is missed after half of the timeout at the earliest."""
    to_notice = 10  # seconds, on a busy machine
    assert to_notice + heartbeat.SILENT + cli.GRACE < multihost.HEARTBEAT_TIMEOUT / 2


@pytest.mark.slow
def test_a_process_that_dies_is_named_by_the_other_and_both_go_on(configure, tmp_path):
    """The first while they grade the second step, the second while they grade the third; the same
    commands then make the steps that were left.

    Without the first one, which coordinates them, JAX ends the other.
    """
    config = configure(
        tmp_path / "run", mesh=MeshConfig(), steps=3, save_steps=1, rewards=("graders:starts",)
    )
    path = helpers.write_config(tmp_path / "config.py", config)
    for dying, saved in ((0, 1), (1, 2)):
        pair = start_pair(tmp_path, path, devices=1)
        while not (tmp_path / f"run/checkpoints/{saved}").exists() and pair[0].poll() is None:
            time.sleep(0.05)
        pair[dying].kill()
        begin = time.monotonic()
        ends = helpers.finish(*pair)
        assert time.monotonic() - begin < 60
        code, _, errors = ends[1 - dying]
        assert code == (2 if dying else -signal.SIGABRT), ends
        assert f"jaxrft: error: process {dying} of 2 gives no sign of life any more" in errors, ends
        assert "Traceback" not in errors
        assert "sign of life" not in ends[dying][2]
    for code, _, errors in helpers.finish(*start_pair(tmp_path, path, devices=1)):
        assert code == 0, errors
    assert [line["step"] for line in helpers.metrics(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run/.alive").exists()
