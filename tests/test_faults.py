"""A short one of the fault tests, `python -m tests.faults`."""

import helpers


def test_a_broken_run_ends_as_one_that_nobody_disturbs():
    options = ("--seconds", "90", "--faults", "3", "--per-run", "3", "--steps", "12", "--seed", "0")
    process = helpers.start("-m", "tests.faults", *options, "--kinds", "kill", "term", "exit")
    said, errors = process.communicate(timeout=900)
    assert process.returncode == 0 and "ends: as the undisturbed one" in said, said + errors
