"""Majority votes, by hand, and in the processes that grade."""

import numpy as np
import pytest

from jaxrft.config import VOTING, Config, TasksConfig, has_majority, success_rewards
from jaxrft.rewards import REWARDS, Pool, majority
from jaxrft.rewards.grading import Rewards, majority_name, majority_success, votes_by
from jaxrft.rewards.lookup import resolve


@pytest.mark.parametrize(
    ("answers", "successes", "expected"),
    [
        ("AAB", [1, 1, 0], 1.0),
        ("AABBB", [1, 1, 0, 0, 0], 0.0),
        ("AABBC", [1, 1, 0, 0, 0], 0.5),  # a tie of one that is right and one that is not
        ("ABC", [0, 1, 0], 1 / 3),
        ([None, None, "A", None], [0, 0, 1, 0], 1.0),  # samples without an answer do not vote
        ([None, None], [0, 0], 0.0),
        ("AA", [1, 0], 0.5),  # one whose grader failed
        ("AAAB", [0.5, 0.5, 0.5, 1], 0.5),
        ("", [], 0.0),
    ],
)
def test_majority_by_hand(answers, successes, expected):
    assert majority.majority(list(answers), successes) == pytest.approx(expected)


def test_answers_join_the_first_class_that_they_are_the_same_as():
    """1 and 3 differ by 2, and 2 is near both: it joins 1, which comes first."""
    answers = [1, 3, 2, 3, 3]
    successes = [1, 0, 1, 0, 0]
    near = lambda one, other: abs(one - other) <= 1  # noqa: E731
    assert majority.majority(answers, successes, near) == 0.0
    assert majority.majority(answers[:3], successes[:3], near) == 1.0


def test_answers_that_cost_too_much_to_compare_are_different(monkeypatch):
    monkeypatch.setattr(majority, "SECONDS", -1.0)
    assert majority.majority([1, 2, 2], [1, 0, 0], lambda one, other: True) == 0.0


@pytest.mark.parametrize(
    ("name", "completions", "successes", "expected"),
    [
        ("exact", [" 1", "1 ", "2"], [1, 1, 0], 1.0),
        ("number", ["It is 1,000.", "1000", "1 or 2"], [1, 1, 0], 1.0),
        ("gsm8k", ["#### 1,000", "so $1000.00", "7", "8"], [1, 1, 0, 0], 1.0),
        ("choice", ["Answer: B", r"\boxed{B}", "(A)", "A or B"], [1, 1, 0, 0], 1.0),
        ("math", [r"\boxed{\frac12}", r"\boxed{0.5}", r"\boxed{2}"], [1, 1, 0], 1.0),
        # 53+43 is not worked out: no vote for 96
        ("math", [r"\boxed{53+43}", r"\boxed{96}", r"\boxed{7}"], [0, 1, 0], 1 / 3),
        ("math", [r"\boxed{x+1}", r"\boxed{1+x}", r"\boxed{x}"], [1, 1, 0], 1.0),
    ],
)
def test_votes_of_each_reward(name, completions, successes, expected):
    vote = resolve(votes_by(name))
    keywords = {"successes": [successes], "truncated": [[False] * len(completions)]}
    assert vote([""], [completions], **keywords) == [pytest.approx(expected)]
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    assert vote([""], [messages], **keywords) == [pytest.approx(expected)]


def test_rewards_that_extract_an_answer_have_a_majority():
    for name in VOTING:
        assert name in REWARDS and callable(resolve(votes_by(name)))

    def votes(*rewards, **changes):
        config = Config("model", TasksConfig("a.jsonl"), "run", rewards=rewards, **changes)
        return has_majority(success_rewards(config))

    assert votes("math") and votes("gsm8k", "math")
    assert not votes("math", "code")
    assert votes("math", "my:format", success_reward="math")
    assert not votes("math", "my:format")


def test_majorities_of_a_rollout_are_counted_by_workers():
    """Three tasks of three samples; the success of the last one is by another reward."""
    texts = ["1", "1", "2", "3", "4", "4", "Answer: A", "B", "Answer: B"]
    success = np.array([[0, 0], [0, 0], [1, 0], [1, 0], [0, 0], [0, 0], [0, 0], [0, 1], [0, 1]])
    rewards = Rewards(
        success.astype(np.float32),
        np.ones((9, 2), bool),
        np.zeros((9, 2), bool),
        {},
        list(enumerate(texts)),
        np.zeros(9, bool),
        np.array([0, 0, 1], np.int32),
    )
    names = ("gsm8k", "choice")
    config = Config("model", TasksConfig("a.jsonl"), "run", rewards=names)
    votes = [(majority_name(name), votes_by(name)) for name in names]
    with Pool([(name, name) for name in names] + votes, workers=1) as pool:
        assert majority_success(config, rewards, pool).tolist() == [0.0, 0.0, 1.0]
        graded = pool.grade(["q"], ["1"], {"answer": ["1"]}, rewards=("gsm8k",))
        assert graded.rewards == [[1.0]]
        pool.begin(["q"], ["1"], {"answer": ["1"]}, rewards=("gsm8k",))
        with pytest.raises(ValueError, match="finish what was begun by other rewards"):
            pool.begin(["q"], ["1"], {"answer": ["1"]}, rewards=("choice",))
        assert pool.finish().rewards == [[1.0]]
