import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._savings import ratio_interval
from jaxrft import stats
from jaxrft.report import metrics


def test_interval_of_a_mean_by_hand():
    # Standard error 1, t = 12.706 with one degree of freedom.
    assert stats.mean_interval([1.0, 3.0]) == pytest.approx((2.0, -10.706, 14.706), abs=1e-3)
    # Standard error 1 / sqrt(3), t = 4.30265 with two degrees of freedom.
    assert stats.mean_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-4
    )


def test_a_single_value_has_no_interval():
    mean, low, high = stats.mean_interval([4.0])
    assert mean == 4.0
    assert np.isnan(low) and np.isnan(high)


def test_interval_of_a_ratio_by_hand():
    assert ratio_interval([1.0, 2.0], [2.0, 4.0]) == pytest.approx((0.5, 0.5, 0.5))
    # A quarter of the resamples takes the first pair twice, ratio 0, and a quarter the second,
    # ratio 1.
    assert ratio_interval([0.0, 1.0], [1.0, 1.0]) == (0.5, 0.0, 1.0)


def test_mean_of_what_is_known():
    values = np.array([[1.0, np.nan], [3.0, np.nan]])
    np.testing.assert_array_equal(stats.known_mean(values, axis=0), [2.0, np.nan])
    assert stats.known_mean(values) == 2.0


def test_pearson_by_hand():
    # Centered: (-1, 0, 1) and (-1, 1, 0); 1 / sqrt(2 * 2).
    assert stats.pearson(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0])) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    x = rng.random(20)
    y = rng.random(20)
    assert stats.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.isnan(stats.pearson(x, np.full(20, 0.1)))
    assert np.isnan(stats.pearson(np.full(20, 0.1), y))


def test_auc_by_hand():
    # Of the four pairs two are in order and one is tied.
    score = np.array([0.9, 0.5, 0.5, 0.7])
    positive = np.array([True, True, False, False])
    assert stats.auc(score, positive) == pytest.approx(2.5 / 4)
    assert np.isnan(stats.auc(np.array([0.1, np.nan]), np.array([True, False])))


def test_auc_equals_that_of_the_training_step():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 4, 30) / 4
    positive = rng.random(30) < 0.5
    wanted = metrics.auc(jnp.array(score), jnp.array(positive), jnp.ones(30, bool))
    assert stats.auc(score, positive) == pytest.approx(float(wanted))
    assert np.isnan(stats.auc(score, positive | True))
