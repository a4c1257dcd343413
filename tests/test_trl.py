"""notebooks/trl_grpo.py: TRL's trainer, run for real, with prompts that a session chooses."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxrft.select import Session

pytestmark = pytest.mark.parity
pytest.importorskip("trl")
FILE = Path(__file__).parents[1] / "notebooks/trl_grpo.py"


@pytest.fixture(scope="module")
def trained():
    """Of three steps: the ids that the session gave out, those that were rewarded, and what the example returns."""
    chosen, rewarded = [], []

    class Noting(Session):
        def next(self):
            chosen.append(super().next())
            return chosen[-1]

        def record(self, ids, successes, trials, tokens=None):
            rewarded.append((ids, successes, trials, tokens))
            super().record(ids, successes, trials, tokens)

    example = runpy.run_path(str(FILE))
    example["train"].__globals__["Session"] = Noting
    shares = example["train"]("bots", 3)
    return chosen, rewarded, shares


def test_the_groups_that_are_rewarded_are_those_chosen(trained):
    chosen, rewarded, _ = trained
    assert len(rewarded) == 3
    for given, (ids, _, trials, _) in zip(chosen, rewarded, strict=False):  # TRL's loader may be ahead
        np.testing.assert_array_equal(ids, np.sort(given))
        assert (np.asarray(trials) == 8).all()


def test_the_session_is_told_what_the_rewards_say(trained):
    _, rewarded, shares = trained
    for share, (_, successes, trials, tokens) in zip(shares, rewarded, strict=True):
        assert share == np.mean((successes > 0) & (successes < trials))
        assert (trials <= tokens).all() and (tokens <= 9 * trials).all()
    assert max(shares) > 0


@pytest.mark.parametrize(("iterations", "parts"), [(1, 1), (2, 3)])
def test_a_batch_of_generations_is_chosen_once_and_drawn_for_every_pass(iterations, parts):
    class Counting:
        def __init__(self):
            self.batches = 0

        def next(self):
            self.batches += 1
            return np.arange(2) + 10 * self.batches

    class Args:
        num_generations, num_iterations, steps_per_generation = 4, iterations, parts
        max_steps, gradient_accumulation_steps, generation_batch_size = 6 * iterations * parts, 1, 8

    session = Counting()
    sampler = runpy.run_path(str(FILE))["Chosen"](session, Args)
    rows = np.array(list(sampler)).reshape(6, iterations * parts, 8)
    assert len(sampler) == rows.size and session.batches == 6
    assert (rows == (np.repeat([0, 1], 4) + 10 * np.arange(1, 7)[:, None])[:, None]).all()
