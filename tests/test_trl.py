"""notebooks/trl_grpo.py: TRL's trainer, run for real, with prompts that a session chooses; and
TRL's own rewards.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxrft.rewards import Pool
from jaxrft.select import Session

pytestmark = pytest.mark.parity
pytest.importorskip("trl")
FILE = Path(__file__).parents[1] / "notebooks/trl_grpo.py"


@pytest.fixture(scope="module")
def trained():
    """Of three steps: the ids that the session gave out, those that were rewarded, and what the
    example returns.
    """
    chosen, rewarded = [], []

    class Noting(Session):
        def next(self, batch_size):
            chosen.append(super().next(batch_size))
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
    # TRL's loader may be ahead
    for given, (ids, _, trials, _) in zip(chosen, rewarded, strict=False):
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

        def next(self, batch_size):
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


# TRL's reward -> where it is found by path, and its values for ROWS, by hand
THIRD = r"\frac{1}{3}"
ROWS = [  # completion, its tokens, solution
    (rf"<think>a third</think> \boxed{{{THIRD}}}", [1, 2, 3, 4], THIRD),
    (r"<think>a half</think> \boxed{\frac{1}{2}}", [5, 5, 5, 5, 5], THIRD),
    (rf"\boxed{{{THIRD}}}", [1, 2], THIRD),
    ("", list(range(8)), "no solution of mathematics"),
]
VALUES = {
    "accuracy_reward": ("trl.rewards:accuracy_reward", [1.0, 0.0, 1.0, None]),
    "reasoning_accuracy_reward": ("trl.rewards:reasoning_accuracy_reward", [1.0, 0.0, 0.0, 0.0]),
    "think_format_reward": ("trl.rewards:think_format_reward", [1.0, 1.0, 0.0, 0.0]),
    "get_soft_overlong_punishment": ("trl_rewards:overlong", [-0.5, -0.75, 0.0, -1.0]),
    "get_repetition_penalty_reward": ("trl_rewards:repetition", [0.0, -0.75, 0.0, 0.0]),
    # of n tokens, right: 1/2 + (1 + cos(n pi/8)) / 4; wrong: -1/2 - (1 + cos(n pi/8)) / 4
    "get_cosine_scaled_reward": (
        "trl_rewards:cosine",
        [0.75, -0.75 - 0.25 * np.cos(5 * np.pi / 8), 0.75 + 0.25 * np.cos(np.pi / 4), None],
    ),
}


@pytest.fixture(scope="module")
def graded():
    """Of ROWS, by each of TRL's rewards: from its path, and from the function itself."""
    import trl_rewards

    paths = [path for path, _ in VALUES.values()]
    functions = [
        getattr(trl_rewards, path.partition(":")[2].removesuffix("_reward")) for path in paths
    ]
    with Pool(
        [(str(i), reward) for i, reward in enumerate([*paths, *functions])], workers=1
    ) as pool:
        completions, ids, solutions = (list(column) for column in zip(*ROWS, strict=True))
        prompts = [[{"role": "user", "content": "q"}]] * len(ROWS)
        result = pool.grade(prompts, completions, {"solution": solutions}, completion_ids=ids)
    assert not any(result.failures.values())
    return dict(
        zip(VALUES, zip(result.rewards, result.rewards[len(VALUES) :], strict=False), strict=True)
    )


def test_all_rewards_of_trl_are_here():
    from trl import rewards

    assert {
        name for name in dir(rewards) if name.endswith("_reward") or name.startswith("get_")
    } == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_a_reward_of_trl_runs_unchanged(graded, name):
    for rewards in graded[name]:
        assert rewards == [
            None if value is None else pytest.approx(value) for value in VALUES[name][1]
        ]
