"""Rollout, update and step as they are measured: counts by hand, lengths from the sampler, the
turns of processes.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _run, _serve, _shape, _turns
from benchmarks._shape import Shape
from benchmarks._turns import Medians, Need
from jaxrft.errors import InputError
from jaxrft.lm.model import decoder

SMALL = Shape(
    layers=1,
    width=8,
    heads=2,
    kv_heads=1,
    mlp=16,
    vocabulary=96,
    prompts=2,
    prompt_length=3,
    group_size=2,
)


def test_operations_are_those_of_the_matrix_products():
    # A layer: q and o 8 x 8, k and v 8 x 4, three of 8 x 16. The logits: 96 x 8.
    assert SMALL.layer_weights == 2 * 64 + 2 * 32 + 3 * 128 == 576
    # Inputs: 2 prompts of 3 tokens, and 1 + 0 + 2 + 0 tokens of completions. Pairs of a query and a
    # key that it sees: 1 + 2 + 3 of each prompt; 4 behind the first; 4 + 5 behind the third.
    expected = 2 * 576 * (6 + 3) + 2 * 96 * 8 * (2 + 1 + 3 + 1) + 4 * 2 * 4 * (2 * 6 + 4 + 9)
    assert _shape.forward_flops(SMALL, (2, 1, 3, 1)) == expected
    assert _shape.update_flops(SMALL, (2, 1, 3, 1)) == 3 * expected


def test_bytes_are_weights_a_step_and_the_filled_cache():
    # Two steps read 576 + 96 * 8 weights. A position holds 4 keys and 4 values. Own positions read:
    # 1 of row 0 in step 1; 1 and 2 of row 2. The prompt of the first group is read in step 1, that
    # of the second in both. Three writes.
    numbers = 2 * 1344 + 8 * (1 + 1 + 2) + 8 * 3 * (1 + 2) + 8 * 3
    assert _shape.decode_bytes(SMALL, (2, 1, 3, 1)) == 4 * numbers


@pytest.mark.parametrize("flags", [["--threads", "0"], ["--heads", "3"], ["--vocabulary", "32"]])
def test_invalid_shape_is_one_sentence(flags, capsys):
    parser = argparse.ArgumentParser()
    _shape.add_flags(parser)
    with pytest.raises(SystemExit):
        _shape.from_flags(parser, parser.parse_args(flags))
    assert f"error: {flags[0][2:]} is " in capsys.readouterr().err


def test_forced_end_probability_keeps_the_ratios_of_other_tokens():
    logits = jnp.array([[1.0, 2.0, 0.0], [7.0, -1.0, 3.0]])
    policy = decoder(_run.model_config(SMALL))._replace(unembed=lambda params, hidden: hidden)
    forced = jax.nn.softmax(_run.force_ends(policy, 1, 0.25).unembed(None, logits))
    np.testing.assert_allclose(forced[:, 1], 0.25, rtol=1e-6)
    np.testing.assert_allclose(forced[:, 0] / forced[:, 2], np.exp([1.0, 4.0]), rtol=1e-5)
    never = jax.nn.softmax(_run.force_ends(policy, 1, 0).unembed(None, logits))
    np.testing.assert_array_equal(never[:, 1], 0)


TINY = Shape(
    layers=1, width=16, heads=2, kv_heads=1, mlp=16, vocabulary=96, prompts=8, prompt_length=8, group_size=4,  # noqa: E501
    new_tokens=12, mean_length=4,
)  # fmt: skip


def test_completions_of_fixed_lengths_never_end():
    with _run.open_step(TINY) as (step, state):
        stages = _run.Stages(step, state)
        assert stages.rollout()["seconds"] > 0
        assert stages.lengths() == [12] * 32


@pytest.mark.slow
def test_a_step_of_geometric_lengths_is_measured_stage_by_stage():
    with _run.open_step(dataclasses.replace(TINY, lengths="geometric")) as (step, state):
        stages = _run.Stages(step, state)
        measured = stages.full_step()
        found = stages.lengths()
        assert stages.learn()["seconds"] > 0
        assert int(stages.state.step) == 2
    assert list(measured) == ["seconds", *_run.STAGES]
    assert sum(measured[name] for name in _run.STAGES) == pytest.approx(measured["seconds"])
    # The mean of min(geometric, 12) is (1 - 0.75^12) / 0.25 = 3.87; that of 32 has a deviation
    # below 3.5 / sqrt(32).
    assert 2 < np.mean(found) < 6 and len({*found}) > 3


ANSWERS = """
import json, sys
print(json.dumps({"first": {"seconds": 3.0}, "lengths": [2, 1]}), flush=True)
for count, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": count + 1.0, "tokens": 3, "peak_bytes": 2**20}), flush=True)
"""


def test_processes_take_turns(tmp_path):
    command = [sys.executable, "-c", ANSWERS]
    workers = {
        name: _turns.Worker(name, command, dict(os.environ), tmp_path) for name in ("a", "b")
    }
    turns = _turns.take_turns(workers, 3)
    found = _turns.medians(workers["a"].about, turns["a"])
    assert found == Medians(2.0, 3, 1.0, 2**20, {}, (1.0, 2.0, 3.0))
    for worker in workers.values():
        worker.close()
        assert worker.process.returncode == 0


def test_a_process_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(_turns, "PATIENCE", 0.1)
    code = "import time; print('{}', flush=True); time.sleep(600)"
    worker = _turns.Worker("a", [sys.executable, "-c", code], dict(os.environ), tmp_path)
    worker.close()
    assert worker.process.returncode == -signal.SIGKILL


TERMINATED = """
import sys
import time
from contextlib import contextmanager
from benchmarks import _script

@contextmanager
def opened():
    try:
        yield
    finally:
        print("closed", flush=True)

def main(arguments):
    with opened():
        print("open", flush=True)  # and from here on a signal finds it so
        time.sleep(600)

_script.run(main)
"""


def test_a_measurement_that_is_terminated_closes_what_it_has_opened():
    command = [sys.executable, "-c", TERMINATED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_turns.ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.terminate()
        assert process.stdout.read() == "closed\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_a_process_that_ends_is_named(tmp_path):
    with pytest.raises(InputError, match="the process of a ended with 1"):
        _turns.Worker(
            "a", [sys.executable, "-c", "raise SystemExit(1)"], dict(os.environ), tmp_path
        )


def test_the_table_has_rates_and_ratios():
    first = Medians(2.0, 100, 1.0, 2**20, {"select": 0.5, "learn": 1.5}, (2.0,))
    second = Medians(4.0, 100, 3.0, 2**21, {}, (4.0,), computed=1.125)
    lines = _turns.table(
        {"ours": first, "base": second}, Need(30, 8), {"flops": 60.0, "bytes": 16.0}
    ).splitlines()
    assert lines[2] == "| ours | 2.000 | 50 | 1.00 | 25.0% | 25.0% | - | 1.0 s | 1 MiB |"
    assert lines[3] == "| base | 4.000 | 25 | 2.00 | 12.5% | 12.5% | 1.12 | 3.0 s | 2 MiB |"
    assert _turns.stage_table({"ours": first, "base": second}).splitlines()[2] == (
        "| ours | 0.500 s, 25% | 1.500 s, 75% |"
    )


def test_a_request_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    assert _turns.write_request(path, "learn", SMALL, [3, 2]) == str(path)
    assert _serve.read_request(path) == _serve.Request("learn", SMALL, (3, 2))
