"""A short one of the fault tests, `python -m tests.faults`."""

import helpers
import pytest


@pytest.mark.slow
def test_a_broken_run_ends_as_one_that_nobody_disturbs(tmp_path):
    options = (
        "--seconds 600 --faults 2 --per-run 2 --steps 8 --eval-steps 0 --seed 27 "
        "--kinds term tear exit"
    )
    process = helpers.start(
        "-m", "tests.faults", *options.split(), JAX_COMPILATION_CACHE_DIR=tmp_path
    )
    said, errors = process.communicate(timeout=900)
    assert process.returncode == 0 and "ends: as the undisturbed one" in said, said + errors
