"""Estimates of held-out trials, by hand."""

from itertools import combinations

import numpy as np
import pytest

from jaxrft.config import EvalConfig
from jaxrft.stats import bootstrap_means
from jaxrft.train import estimates
from jaxrft.train.estimates import Trials


def test_pass_at_k_by_hand():
    """1 - C(4 - c, 2) / C(4, 2) for c = 0, 1, 3 of four samples: 0, 1 - 3/6, 1."""
    solved = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1]], bool)
    np.testing.assert_allclose(estimates.pass_at(solved, 2), [0, 0.5, 1])
    np.testing.assert_allclose(estimates.pass_at(solved, 1), [0, 0.25, 0.75])
    np.testing.assert_array_equal(estimates.pass_at(solved, 4), [0, 1, 1])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(k):
    solved = np.random.default_rng(0).random((20, 6)) < 0.3
    every = [solved[:, chosen].any(axis=1) for chosen in map(list, combinations(range(6), k))]
    np.testing.assert_allclose(estimates.pass_at(solved, k), np.mean(every, axis=0), atol=1e-12)


def test_metrics_of_a_set_by_hand():
    trials = Trials(
        greedy=np.array([1.0, 0.5]),
        samples=np.array([[1.0, 0.0], [0.5, 0.5]]),  # half a success solves nothing
        lengths=np.array([[3, 5], [4, 8]]),
    )
    assert estimates.metrics({"test": trials}, EvalConfig(num_samples=2).pass_at) == {
        "eval/test/greedy": 0.75,
        "eval/test/avg@2": 0.5,
        "eval/test/pass@2": 0.5,
        "eval/test/pass@1": 0.25,
        "eval/test/mean_length": 5.0,
    }
    alone = trials._replace(samples=np.zeros((2, 0)), lengths=np.zeros((2, 0)))
    assert estimates.metrics({"test": alone}, ()) == {"eval/test/greedy": 0.75}


def test_k_of_pass_at_k_are_powers_of_two_and_the_number_of_samples():
    assert EvalConfig(num_samples=8).pass_at == (8, 1, 2, 4)
    assert EvalConfig(num_samples=6).pass_at == (6, 1, 2, 4)
    assert EvalConfig(num_samples=1).pass_at == (1,)
    assert EvalConfig(num_samples=0).pass_at == ()


def test_interval_over_tasks_is_that_of_a_binomial_share():
    """100 tasks of which 30 are solved: 0.3 +- 1.96 sqrt(0.21 / 100) = 0.3 +- 0.0898."""
    values = np.stack([np.arange(100) < 30, np.full(100, 0.5)], axis=1).astype(float)
    share, same = bootstrap_means(values)
    assert share.mean == 0.3 and same == (0.5, 0.5, 0.5)
    assert share.low == pytest.approx(0.21, abs=0.011)
    assert share.high == pytest.approx(0.39, abs=0.011)
