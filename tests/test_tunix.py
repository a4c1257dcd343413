"""notebooks/tunix_grpo.py: its batches by themselves, and google-tunix's learner, run for real,
with them.
"""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrft.select import Session, selectors

FILE = Path(__file__).parents[1] / "notebooks/tunix_grpo.py"
COLUMNS = {"prompts": [f"p{i}" for i in range(6)], "answer": list("abcdef")}


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(FILE))


class Counting:
    """A session that gives out the tasks in order and keeps what it is told."""

    def __init__(self):
        self.batches, self.told = 0, []

    def next(self, batch_size):
        self.batches += 1
        return (np.arange(batch_size) + batch_size * (self.batches - 1)) % 6

    def record(self, ids, successes, trials):
        self.told.append((ids.tolist(), successes.tolist(), trials.tolist()))


def test_a_batch_holds_the_rows_of_the_tasks_chosen(example):
    first, second = example["Chosen"](Counting(), COLUMNS, 2, batch_size=2)
    assert first["prompts"].tolist() == ["p0", "p1"] and first["answer"].tolist() == ["a", "b"]
    assert second["task_id"].tolist() == [2, 3]


def test_rewards_of_rollouts_become_counts_of_tasks(example):
    session = Counting()
    chosen = example["Chosen"](session, COLUMNS, 1, batch_size=3)
    assert chosen.record(
        np.array([4, 4, 1, 1, 5, 5]), [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    ) == pytest.approx(1 / 3)
    assert session.told == [([1, 4, 5], [2.0, 1.0, 0.0], [2, 2, 2])]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_drawn_ahead_are_all_there_and_late_by_as_many(example, ahead):
    chosen = example["Chosen"](Counting(), COLUMNS, 8, batch_size=2)
    seen = []
    for batch in example["drawn_ahead"](chosen, ahead):
        chosen.record(batch["task_id"], [0.0, 1.0])
        seen.extend(batch["task_id"].tolist())
    assert seen == [*range(6), *range(6), *range(4)]
    assert chosen.late == ahead and chosen.waiting == 0


def test_feedback_in_parts_is_late_until_the_last_part(example):
    chosen = example["Chosen"](Counting(), COLUMNS, 2, batch_size=2)
    batches = iter(chosen)
    chosen.record(next(batches)["task_id"][:1], [1.0])
    next(batches)
    assert chosen.late == 1 and chosen.waiting == 3


def test_batches_that_tunix_skips_are_not_chosen(example):
    session = Counting()
    batches = list(example["Chosen"](session, COLUMNS, 3, batch_size=2, skipped=2))
    assert session.batches == 1 and len(batches) == 3


def test_a_session_takes_feedback_of_batches_drawn_ahead(example):
    session = Session(selectors.adaptive(2), 6)
    chosen = example["Chosen"](session, COLUMNS, 5, batch_size=2)
    for batch in example["drawn_ahead"](chosen, 2):
        chosen.record(np.repeat(batch["task_id"], 2), [1.0, 0.0, 0.0, 0.0])
    assert np.isfinite(session.pass_rate()).all()


@pytest.mark.parity
def test_tunix_trains_on_the_batches_and_rewards_what_was_chosen():
    pytest.importorskip("tunix")
    chosen, told = [], []

    class Noting(Session):
        def next(self, batch_size):
            chosen.append(super().next(batch_size))
            return chosen[-1]

        def record(self, ids, successes, trials, tokens=None, **options):
            told.append((ids, successes, trials))
            super().record(ids, successes, trials, tokens, **options)

    example = runpy.run_path(str(FILE))
    example["train"].__globals__["Session"] = Noting
    loose = {
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }  # tunix has threads of its own
    strict = {name: getattr(jax.config, name) for name in loose}
    for name in loose:
        jax.config.update(name, loose[name])
    try:
        shares, late = example["train"]("adaptive", 3)
    finally:
        for name in strict:
            jax.config.update(name, strict[name])
    assert late == 0 and len(chosen) == len(told) == len(shares) == 3
    for given, share, (ids, successes, trials) in zip(chosen, shares, told, strict=True):
        np.testing.assert_array_equal(ids, np.sort(given))
        assert (trials == 8).all()
        assert share == np.mean((successes > 0) & (successes < trials))
    assert max(shares) > 0
