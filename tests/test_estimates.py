"""Estimates of held-out trials, by hand."""

from itertools import combinations

import numpy as np
import pytest

from jaxrft.config import Config, TasksConfig, pass_at
from jaxrft.stats import bootstrap_means
from jaxrft.train import estimates, figures
from jaxrft.train.estimates import Samples, Trials


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


def trials_of_two_tasks(domains=("test",)):
    samples = Samples(
        success=np.array([[1.0, 0.0], [0.5, 0.5]]),  # half a success solves nothing
        lengths=np.array([[3, 5], [4, 8]]),
        truncated=np.array([[False, False], [False, True]]),
        majority=np.array([[0.5], [0.5]]),
    )
    domain = np.arange(2) % len(domains)
    return Trials(np.array([1.0, 0.5]), samples, domain, domains, np.array([0, 2]))


def test_metrics_of_a_set_by_hand():
    trials = trials_of_two_tasks()
    assert estimates.metrics({"test": trials}) == {
        "eval/test/greedy": 0.75,
        "eval/test/avg@2": 0.5,
        "eval/test/pass@2": 0.5,
        "eval/test/pass@1": 0.25,
        "eval/test/maj@2": 0.5,
        "eval/test/mean_length": 5.0,
        "eval/test/median_length": 4.5,
        "eval/test/clipped_ratio": 0.25,
    }
    alone = trials._replace(samples=estimates.no_samples(2))
    assert estimates.metrics({"test": alone}) == {"eval/test/greedy": 0.75}
    without = trials._replace(samples=trials.samples._replace(majority=np.zeros((2, 0))))
    assert "eval/test/maj@2" not in estimates.metrics({"test": without})


def test_domains_have_greedy_and_avg_in_metrics_and_all_figures_in_intervals():
    trials = trials_of_two_tasks(("algebra", "geometry"))
    metrics = estimates.metrics({"test": trials})
    assert metrics["eval/test/algebra/greedy"] == 1.0
    assert metrics["eval/test/geometry/greedy"] == 0.5
    assert metrics["eval/test/algebra/avg@2"] == metrics["eval/test/geometry/avg@2"] == 0.5
    assert "eval/test/algebra/pass@2" not in metrics
    intervals = estimates.intervals({"test": trials})
    assert intervals["eval/test/algebra/pass@2"] == (1.0, 1.0, 1.0)
    assert intervals["eval/test/geometry/pass@2"] == (0.0, 0.0, 0.0)
    assert intervals["eval/test/geometry/mean_length"].mean == 6.0
    assert intervals["eval/test/pass@2"] == (0.5, 0.0, 1.0)


def test_table_of_figures_fits_80_columns():
    trials = trials_of_two_tasks(("Counting & Probability", "Intermediate Algebra"))
    sets = {"math500": trials._replace(num_dropped=3), "plain": trials_of_two_tasks()}
    config = Config("model", TasksConfig("a"), "run", max_completion_length=8, temperature=0.6)
    lines = figures.table(sets, estimates.intervals(sets), config)
    assert max(map(len, lines)) <= 80
    assert lines[:7] == [
        "math500: 2 tasks (3 left out), 2 samples each",
        "                      tasks greedy avg@2        95 % pass@2 maj@2 tokens cut",
        "all                       2  0.750 0.500 0.500-0.500  0.500 0.500      5 25%",
        "Counting & Probabili.     1  1.000 0.500 0.500-0.500  1.000 0.500      4  0%",
        "Intermediate Algebra      1  0.500 0.500 0.500-0.500  0.000 0.500      6 50%",
        "pass@1 0.250, pass@2 0.500",
        "tokens: mean 5, median 4; 25.0% of the samples cut at max_completion_length 8",
    ]
    alone = {"few": trials._replace(samples=estimates.no_samples(2))}
    lines = figures.table(alone, estimates.intervals(alone), config)
    assert lines[:3] == [
        "few: 2 tasks, greedy only",
        "                       tasks  greedy         95 %",
        "all                        2   0.750  0.500-1.000",
    ]


def test_k_of_pass_at_k_are_powers_of_two_and_the_number_of_samples():
    assert pass_at(8) == (8, 1, 2, 4)
    assert pass_at(6) == (6, 1, 2, 4)
    assert pass_at(1) == (1,)
    assert pass_at(0) == ()


def test_interval_over_tasks_is_that_of_a_binomial_share():
    """100 tasks of which 30 are solved: 0.3 +- 1.96 sqrt(0.21 / 100) = 0.3 +- 0.0898."""
    values = np.stack([np.arange(100) < 30, np.full(100, 0.5)], axis=1).astype(float)
    share, same = bootstrap_means(values)
    assert share.mean == 0.3 and same == (0.5, 0.5, 0.5)
    assert share.low == pytest.approx(0.21, abs=0.011)
    assert share.high == pytest.approx(0.39, abs=0.011)
