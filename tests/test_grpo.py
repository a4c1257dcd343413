import inspect
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrft.config import Config
from jaxrft.learn import grpo, masked, reward_shaping
from jaxrft.types import InputError

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
MAX_LENGTH = 32
GROUPS = hnp.arrays(
    np.float32, (4, 8), elements=st.integers(-8, 8).map(lambda k: np.float32(k / 4))
)
MASKS = hnp.arrays(np.bool_, (4, 8))
LOGPROBS = hnp.arrays(
    np.float32, (8, 12), elements=st.integers(-40, 0).map(lambda k: np.float32(k / 20))
)
ROWS = st.fixed_dictionaries(
    {
        "logprobs": LOGPROBS,
        "behavior_logprobs": LOGPROBS,
        "advantages": hnp.arrays(
            np.float32, (8, 12), elements=st.sampled_from(np.float32([-1.5, 0, 0.5]))
        ),
        "mask": hnp.arrays(np.bool_, (8, 12)),
    }
)


@pytest.fixture(scope="module")
def vectors():
    """The published implementation's inputs and outputs: 6 groups of 8, 20 tokens; its reduction is
    the token mean.
    """
    with np.load(Path(__file__).parent / "vectors" / "grpo.npz") as arrays:
        return {name: jnp.asarray(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def rows():
    """Log-probabilities far enough apart that both clips act; rows of different lengths, one
    empty.
    """
    rng = np.random.default_rng(0)
    behavior = rng.normal(-2, 1, (8, 12)).astype(np.float32)
    lengths = np.array([12, 3, 7, 1, 0, 9, 5, 12])
    return {
        "logprobs": jnp.asarray(behavior + rng.normal(0, 0.4, behavior.shape).astype(np.float32)),
        "behavior_logprobs": jnp.asarray(behavior),
        "advantages": jnp.asarray(
            np.repeat(rng.normal(0, 1, (8, 1)), 12, axis=1).astype(np.float32)
        ),
        "mask": jnp.asarray((np.arange(12) < lengths[:, None]).astype(np.float32)),
    }


@partial(jax.jit, static_argnames=("loss_type", "epsilon", "epsilon_high", "delta"))
def loss_and_gradient(
    arrays, *, normalizer=None, loss_type="dapo", epsilon=0.2, epsilon_high=None, delta=None
):
    def loss(logprobs):
        return grpo.policy_loss(
            **{**arrays, "logprobs": logprobs},
            loss_type=loss_type,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            delta=delta,
            normalizer=normalizer,
            max_completion_length=MAX_LENGTH,
        )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["logprobs"])
    return value, metrics, gradient


# ----------------------------------------------------------------------------------------------------  # noqa: E501
# advantages


def test_advantages_worked_by_hand():
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 4.0, 0.0]])
    # group: means 0.5 and 1, unbiased variances (4 * 0.25) / 3 = 1/3 and (9 + 3) / 3 = 4
    expected = np.array([[0.5, -0.5, -0.5, 0.5], [-1, -1, 3, -1]])
    group = expected / (np.array([[np.sqrt(1 / 3)], [2.0]]) + 1e-6)
    np.testing.assert_allclose(grpo.advantages(rewards), group, rtol=1e-6)
    np.testing.assert_allclose(grpo.advantages(rewards, scale_rewards="none"), expected, rtol=1e-6)
    # batch: mean 6/8, sum of squares 18, unbiased variance (18 - 8 * 0.5625) / 7
    batch = expected / (np.sqrt(13.5 / 7) + 1e-6)
    np.testing.assert_allclose(grpo.advantages(rewards, scale_rewards="batch"), batch, rtol=1e-6)


def test_advantages_match_the_published_ones(vectors):
    advantages = grpo.advantages(vectors["rewards"].reshape(-1, int(vectors["group_size"])))
    ours = advantages.reshape(-1, 1) * vectors["mask"].astype(jnp.float32)
    np.testing.assert_allclose(ours, vectors["advantages"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale_rewards", list(grpo.SCALES))
def test_sample_without_reward_does_not_change_the_others(scale_rewards):
    rewards = jnp.array([[1.0, jnp.nan, 0.0, 2.0], [jnp.inf, 1.0, 3.0, 5.0]])
    mask = jnp.array([[1, 0, 1, 1], [0, 1, 1, 1]])
    ours = grpo.advantages(rewards, mask=mask, scale_rewards=scale_rewards)
    without = grpo.advantages(
        jnp.array([[1.0, 0.0, 2.0], [1.0, 3.0, 5.0]]), scale_rewards=scale_rewards
    )
    np.testing.assert_allclose(np.asarray(ours)[np.asarray(mask) > 0], without.ravel(), rtol=1e-6)
    assert not np.asarray(ours)[np.asarray(mask) == 0].any()


def test_informative_ignores_samples_without_reward():
    nan = jnp.nan
    rewards = jnp.array(
        [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1000001], [1.0, nan, 0.0], [1.0, nan, nan], [nan, nan, nan]]
    )
    np.testing.assert_array_equal(
        grpo.informative(rewards, ~jnp.isnan(rewards)), [False, True, True, False, False]
    )
    np.testing.assert_array_equal(grpo.informative(rewards[:2]), [False, True])


SPLITS = {  # weights, and two ways to get the same sum of them
    "0.9": ((0.1, 0.2, 0.7, 0.5, 0.3), ((0, 1, 1, 0, 0), (1, 0, 0, 1, 1))),
    "0.3": ((0.1, 0.2, 0.3), ((1, 1, 0), (0, 0, 1))),
    "1 in tenths": ((0.1,) * 10 + (1.0,), ((1,) * 10 + (0,), (0,) * 10 + (1,))),
    "0 between large terms": ((0.1, 0.2, -0.3, 7.1, -7.1), ((1, 1, 1, 0, 0), (0, 0, 0, 1, 1))),
    "0.4 minus": ((0.7, -0.3, 0.4), ((1, 1, 0), (0, 0, 1))),
}


def sums_of(weights, rows):
    """Sums [1, 2] in float32 as a run makes them, and their tolerance; without it, of the first
    that differ.
    """
    rewards, weights = jnp.array([rows], jnp.float32), jnp.array(weights, jnp.float32)
    total, _ = reward_shaping.total(rewards, jnp.ones(rewards.shape, bool), weights, success=0)
    return total, grpo.rounding(
        reward_shaping.magnitude(rewards, jnp.ones(rewards.shape, bool), weights), len(weights)
    )


@pytest.mark.parametrize("name", SPLITS)
def test_sums_that_are_equal_but_for_rounding_are_equal(name):
    """Of several weights, in tenths, and of terms that cancel; each of the sums is then the same
    number.
    """
    total, tolerance = sums_of(*SPLITS[name])
    mask = jnp.ones(total.shape, bool)
    assert not grpo.informative(total, tolerance=tolerance)[0]
    level = grpo.leveled(total, mask, tolerance=tolerance)
    assert level[0, 0] == level[0, 1] == total.max()
    assert not grpo.informative(level)[0] and not np.asarray(grpo.advantages(level)).any()


def test_rounding_worked_by_hand():
    """Two terms of 0.5: (2 + 2) eps 1; one reward of 8: 3 eps 8, which 2 ulp, 2 * 8 eps, are within
    and 4 are not.
    """
    eps = np.finfo(np.float32).eps
    assert (
        grpo.rounding(jnp.float32(1.0), 2) == 4 * eps
        and grpo.rounding(jnp.float32(8.0)) == 24 * eps
    )
    eight, ulp = np.float32(8.0), 8 * eps
    rewards = jnp.array([[eight, eight + 2 * ulp], [eight, eight + 4 * ulp], [0.0, 1e-30]])
    np.testing.assert_array_equal(grpo.informative(rewards), [False, True, True])
    assert grpo.informative(jnp.array([[jnp.inf, 0.0], [jnp.inf, jnp.inf]])).tolist() == [
        True,
        False,
    ]


def test_leveled_rewards_agree_at_the_default_tolerance():
    """Also by the default tolerance, which is never larger: leveling leaves informative groups."""
    rng = np.random.default_rng(0)
    rewards = jnp.asarray(rng.choice([0, 0.1, 0.2, 0.7, 1], (400, 4, 3)), jnp.float32)
    weights = jnp.array([0.3, 0.5, -0.2])
    total, exists = reward_shaping.total(rewards, jnp.ones(rewards.shape, bool), weights, success=0)
    tolerance = grpo.rounding(
        reward_shaping.magnitude(rewards, jnp.ones(rewards.shape, bool), weights), 3
    )
    informative = grpo.informative(total, exists, tolerance=tolerance)
    level = grpo.leveled(total, exists, tolerance=tolerance)
    np.testing.assert_array_equal(grpo.informative(level, exists), informative)
    np.testing.assert_array_equal(level[informative], total[informative])
    exact = np.round(10 * np.asarray(rewards) @ np.array([3, 5, -2])).astype(int)  # in hundredths
    np.testing.assert_array_equal(informative, exact.max(axis=1) != exact.min(axis=1))


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.sampled_from(list(grpo.SCALES)))
def test_eight_equal_rewards_give_exactly_zero(reward, scale_rewards):
    rewards = jnp.stack([jnp.full(8, reward, jnp.float32), jnp.arange(8.0)])
    assert not np.asarray(grpo.advantages(rewards, scale_rewards=scale_rewards))[0].any()


@settings(max_examples=40, deadline=None)
@given(GROUPS, MASKS, st.integers(-64, 64), st.sampled_from(list(grpo.SCALES)))
def test_a_constant_shift_of_the_rewards_changes_nothing(rewards, mask, shift, scale_rewards):
    ours, shifted = (
        grpo.advantages(jnp.asarray(r), scale_rewards=scale_rewards, mask=jnp.asarray(mask))
        for r in (rewards, rewards + np.float32(shift / 4))
    )
    np.testing.assert_allclose(ours, shifted, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(GROUPS, MASKS, st.permutations(range(4)), st.sampled_from(list(grpo.SCALES)))
def test_groups_may_be_permuted(rewards, mask, order, scale_rewards):
    order = np.array(order)
    ours = grpo.advantages(
        jnp.asarray(rewards), scale_rewards=scale_rewards, mask=jnp.asarray(mask)
    )
    permuted = grpo.advantages(
        jnp.asarray(rewards[order]), scale_rewards=scale_rewards, mask=jnp.asarray(mask[order])
    )
    np.testing.assert_allclose(np.asarray(ours)[order], permuted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------  # noqa: E501
# policy loss


@pytest.mark.parametrize("epsilon", [0.2, 0.28])
@pytest.mark.parametrize("form", ["on", "replay"])
def test_loss_metrics_and_gradient_match_the_published_ones(vectors, form, epsilon):
    old = vectors["old_logprobs"]
    arrays = {name: vectors[name] for name in ("logprobs", "advantages", "mask")}
    arrays["behavior_logprobs"] = old if form == "on" else vectors["behaviour_logprobs"]
    if form == "replay":
        arrays["proximal_logprobs"] = old
    loss, metrics, gradient = loss_and_gradient(arrays, epsilon=epsilon)
    expected = {
        name: vectors[f"{form}_eps{epsilon}_{name}"]
        for name in ("loss", "clipfrac", "approx_kl", "grad")
    }
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-7)
    np.testing.assert_allclose(metrics["clip_ratio/region_mean"], expected["clipfrac"], atol=1e-7)
    np.testing.assert_allclose(metrics["approx_kl"], expected["approx_kl"], atol=1e-7)
    np.testing.assert_allclose(gradient, expected["grad"], atol=1e-8)


def test_loss_types_worked_by_hand():
    """Ratios 1, losses -A: rows of one, one, two and four tokens, whose numbers divide without
    rounding.
    """
    mask = jnp.array([[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    zeros, advantages = jnp.zeros((4, 4)), jnp.array([[6.0], [-2.0], [4.0], [-4.0]])
    rows, tokens = -6 + 2 - 4 + 4, -6 + 2 - 4 * 2 + 4 * 4
    expected = {"grpo": rows / 4, "dapo": tokens / 8, "dr_grpo": tokens / (4 * 8), "gspo": rows / 4}
    expected |= {"cispo": 0.0}  # log pi is 0
    counts = {"grpo": 4, "dapo": 8, "dr_grpo": 32, "gspo": 4, "cispo": 8}
    for loss_type in LOSS_TYPES:
        loss, _ = grpo.policy_loss(
            zeros, zeros, advantages, mask, loss_type=loss_type, max_completion_length=8
        )
        assert loss == expected[loss_type] and loss.dtype == jnp.float32
        assert grpo.normalizer(mask, loss_type, 8) == counts[loss_type]


def test_clips_worked_by_hand():
    """Ratios 0.5 and 2 with either sign of A: only moving further away is cut, each side by its own
    epsilon.
    """
    behavior = jnp.zeros((1, 4))
    logprobs = jnp.log(jnp.array([[0.5, 0.5, 2.0, 2.0]]))
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    arrays = {
        "logprobs": logprobs,
        "behavior_logprobs": behavior,
        "advantages": advantages,
        "mask": jnp.ones((1, 4)),
    }
    loss, metrics, gradient = loss_and_gradient(arrays, epsilon=0.2, epsilon_high=0.3)
    np.testing.assert_allclose(loss, -(0.5 - 0.8 + 1.3 - 2) / 4, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5 / 4, 0, 0, 2 / 4]], rtol=1e-6)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.25
    assert metrics["clip_ratio/region_mean"] == 0.5
    # Around an anchor twice as likely as the behavior, [1.6, 2.6], the ratio 2 is inside and 0.5
    # below.
    arrays["proximal_logprobs"] = jnp.log(jnp.full((1, 4), 2.0))
    loss, metrics, _ = loss_and_gradient(arrays, epsilon=0.2, epsilon_high=0.3)
    np.testing.assert_allclose(loss, -(0.5 - 1.6 + 2 - 2) / 4, rtol=1e-6)
    assert metrics["clip_ratio/low_mean"] == 0.25 and metrics["clip_ratio/high_mean"] == 0


def test_two_sided_clip_worked_by_hand():
    """Ratios 2 and 5 with either sign of A: with delta 4 a token with A < 0 costs 4 |A| at most,
    without gradient.
    """
    logprobs = jnp.log(jnp.array([[2.0, 2.0, 5.0, 5.0]]))
    arrays = {
        "logprobs": logprobs,
        "behavior_logprobs": jnp.zeros((1, 4)),
        "mask": jnp.ones((1, 4)),
    }
    arrays["advantages"] = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    loss, metrics, gradient = loss_and_gradient(arrays, epsilon=0.2, delta=4.0)
    np.testing.assert_allclose(loss, -(1.2 - 2 + 1.2 - 4) / 4, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 2 / 4, 0, 0]], rtol=1e-6)
    assert metrics["clip_ratio/high_mean"] == 0.5 and metrics["clip_ratio/delta_mean"] == 0.25
    assert metrics["clip_ratio/region_mean"] == 0.75
    loss, metrics, gradient = loss_and_gradient(arrays, epsilon=0.2)
    np.testing.assert_allclose(loss, -(1.2 - 2 + 1.2 - 5) / 4, rtol=1e-6)
    assert "clip_ratio/delta_mean" not in metrics
    # Around an anchor twice as likely as the behavior the bound is 8, and nothing with A < 0 is
    # cut.
    arrays["proximal_logprobs"] = jnp.log(jnp.full((1, 4), 2.0))
    _, metrics, _ = loss_and_gradient(arrays, epsilon=0.2, delta=4.0)
    assert metrics["clip_ratio/delta_mean"] == 0


def test_gspo_worked_by_hand():
    """Ratios 4 and 1 in a row of two tokens: sqrt(4 * 1) = 2 for both; a row of one token keeps its
    own, 0.5.
    """
    logprobs = jnp.log(jnp.array([[4.0, 1.0], [0.5, 7.0]]))
    arrays = {
        "logprobs": logprobs,
        "behavior_logprobs": jnp.zeros((2, 2)),
        "mask": jnp.array([[1, 1], [1, 0]]),
    }
    arrays["advantages"] = jnp.array([[-1.0], [3.0]])
    loss, metrics, gradient = loss_and_gradient(arrays, loss_type="gspo")
    np.testing.assert_allclose(loss, (2 - 3 * 0.5) / 2, rtol=1e-6)
    # d s / d log pi of one of two tokens is s / 2
    np.testing.assert_allclose(gradient, [[2 / 2 / 2, 2 / 2 / 2], [-3 * 0.5 / 2, 0]], rtol=1e-6)
    assert metrics["clip_ratio/region_mean"] == 0  # 2 with A < 0, 0.5 with A > 0
    np.testing.assert_allclose(metrics["approx_kl"], -(np.log(2) + np.log(0.5)) / 2, atol=1e-7)
    # With the other signs both rows are cut, whole: at 1.2 and at 0.8.
    loss, metrics, gradient = loss_and_gradient(
        {**arrays, "advantages": -arrays["advantages"]}, loss_type="gspo"
    )
    np.testing.assert_allclose(loss, (-1.2 + 3 * 0.8) / 2, rtol=1e-6)
    assert (
        not np.asarray(gradient).any()
        and metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.5
    )


def test_cispo_worked_by_hand():
    """Weights min(r, 1.5) = 0.5, 1.5, 1.5 with logarithms of 2 pi = r: every token has a
    gradient.
    """
    ratios = np.array([[0.5, 2.0, 3.0]])
    arrays = {
        "logprobs": jnp.log(ratios / 2).astype(jnp.float32),
        "behavior_logprobs": jnp.full((1, 3), -np.log(2.0)),
    }
    arrays |= {"advantages": jnp.array([[1.0, 2.0, -1.0]]), "mask": jnp.ones((1, 3))}
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    loss, metrics, gradient = loss_and_gradient(arrays, loss_type="cispo", epsilon_high=0.5)
    want = -(0.5 * np.log(0.25) + 1.5 * 2 * np.log(1.0) - 1.5 * np.log(1.5)) / 3
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5 / 3, -3.0 / 3, 1.5 / 3]], rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_ratio/high_mean"], 2 / 3, rtol=1e-6)
    assert metrics["clip_ratio/low_mean"] == 0


def test_importance_weights_worked_by_hand():
    """Ratios 0.5 and 3 in one row, 1.5 and garbage in another, at most 2."""
    drawn_from = jnp.log(jnp.array([[0.5, 0.25], [0.5, 0.1]]))
    logprobs = jnp.log(jnp.array([[0.25, 0.75], [0.75, jnp.nan]]))
    mask = jnp.array([[1, 1], [1, 0]])
    of = partial(grpo.importance_weights, logprobs, drawn_from, mask, importance_sampling_cap=2.0)
    inside = np.asarray(mask, bool)
    np.testing.assert_allclose(
        of(importance_sampling_correction="token")[inside], [0.5, 2.0, 1.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        of(importance_sampling_correction="sequence")[inside], [1.5, 1.5, 1.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        of(importance_sampling_correction="sequence", importance_sampling_cap=1.2), 1.2
    )


def test_masked_importance_weights_worked_by_hand():
    """Ratios 0.5 and 3 in one row, together 1.5; 4 and garbage in another: 0 above the cap,
    themselves at it.
    """
    drawn_from = jnp.log(jnp.array([[0.5, 0.25], [0.2, 0.1]]))
    logprobs = jnp.log(jnp.array([[0.25, 0.75], [0.8, jnp.nan]]))
    mask = jnp.array([[1, 1], [1, 0]])
    of = partial(
        grpo.importance_weights, logprobs, drawn_from, mask, importance_sampling_mode="mask"
    )
    inside = np.asarray(mask, bool)
    token = of(importance_sampling_correction="token", importance_sampling_cap=2.0)
    np.testing.assert_allclose(token[inside], [0.5, 0.0, 0.0], rtol=1e-6)
    sequence = of(importance_sampling_correction="sequence", importance_sampling_cap=3.0)
    np.testing.assert_allclose(sequence, [[1.5, 1.5], [0.0, 0.0]], rtol=1e-6)
    one = jnp.zeros((1, 2))
    at_the_cap = {"importance_sampling_mode": "mask", "importance_sampling_cap": 1.0}
    same = grpo.importance_weights(
        one, one, one + 1, importance_sampling_correction="token", **at_the_cap
    )
    np.testing.assert_array_equal(same, 1.0)


def test_masked_row_leaves_the_loss_but_counts_in_the_normalizer(rows):
    """As in TRL: the others' losses are not scaled up."""
    weights = jnp.ones((8, 12)).at[0].set(0.0)
    loss, _, gradient = loss_and_gradient({**rows, "weights": weights})
    whole = grpo.normalizer(rows["mask"], "dapo")
    kept = {name: x[1:] for name, x in rows.items()}
    want, _, others = loss_and_gradient(kept, normalizer=whole)
    assert_close((loss, gradient[1:]), (want, others))
    assert not np.asarray(gradient[0]).any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_multiply_token_losses_as_advantages_do(rows, loss_type):
    """Whatever the objective, for weights above 0; garbage under the mask does not leak."""
    weights = jnp.exp(rows["advantages"]) + 0.1 * jnp.arange(12.0)[None]
    loss, metrics, gradient = loss_and_gradient({**rows, "weights": weights}, loss_type=loss_type)
    scaled = loss_and_gradient(
        {**rows, "advantages": weights * rows["advantages"]}, loss_type=loss_type
    )
    assert_close((loss, metrics, gradient), scaled)
    dirty = {**rows, "weights": jnp.where(rows["mask"] > 0, weights, jnp.nan)}
    chex.assert_trees_all_equal(
        (loss, metrics, gradient), loss_and_gradient(dirty, loss_type=loss_type)
    )


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from(LOSS_TYPES), st.permutations(range(8)))
def test_rows_may_be_permuted(arrays, loss_type, order):
    loss, metrics, gradient = loss_and_gradient(arrays, loss_type=loss_type)
    permuted = loss_and_gradient(
        {name: x[np.array(order)] for name, x in arrays.items()}, loss_type=loss_type
    )
    assert_close(permuted, (loss, metrics, gradient[np.array(order)]))


@settings(max_examples=20, deadline=None)
@given(
    ROWS,
    GROUPS,
    st.integers(-64, 64),
    st.sampled_from(LOSS_TYPES),
    st.sampled_from(list(grpo.SCALES)),
)
def test_a_constant_shift_of_the_rewards_changes_no_loss(
    arrays, rewards, shift, loss_type, scale_rewards
):
    def loss(rewards):
        found = grpo.advantages(jnp.asarray(rewards[:2, :4]), scale_rewards=scale_rewards).reshape(
            -1, 1
        )
        return loss_and_gradient({**arrays, "advantages": found}, loss_type=loss_type)

    (ours, _, gradient), (shifted, _, other) = loss(rewards), loss(rewards + np.float32(shift / 4))
    np.testing.assert_allclose(ours, shifted, atol=2e-3)
    np.testing.assert_allclose(gradient, other, atol=2e-3)


def test_on_policy_gradient_is_the_policy_gradient_even_if_the_behavior_is_traced(rows):
    arrays = {name: rows[name] for name in ("logprobs", "advantages", "mask")}
    gradient = jax.grad(
        lambda logprobs: grpo.policy_loss(
            **{**arrays, "logprobs": logprobs, "behavior_logprobs": logprobs}
        )[0]
    )
    expected = -rows["advantages"] * rows["mask"] / rows["mask"].sum()
    np.testing.assert_allclose(gradient(rows["logprobs"]), expected, rtol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_values_change_nothing(rows, loss_type, garbage):
    hidden = rows["mask"] == 0
    arrays = {**rows, "proximal_logprobs": rows["behavior_logprobs"] + 0.1}
    clean = loss_and_gradient(arrays, loss_type=loss_type)
    for name in ("logprobs", "behavior_logprobs", "advantages", "proximal_logprobs"):
        dirty = {**arrays, name: jnp.where(hidden, garbage, arrays[name])}
        chex.assert_trees_all_equal(clean, loss_and_gradient(dirty, loss_type=loss_type))
    assert not np.asarray(clean[2])[np.asarray(hidden)].any()


def assert_close(ours, theirs):
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from(LOSS_TYPES))
def test_padding_changes_nothing(arrays, loss_type):
    """More columns and more empty rows: the same loss, metrics and gradient."""
    loss, metrics, gradient = loss_and_gradient(arrays, loss_type=loss_type)
    padded = {name: np.pad(x, ((0, 3), (0, 4))) for name, x in arrays.items()}
    assert_close(
        loss_and_gradient(padded, loss_type=loss_type),
        (loss, metrics, np.pad(gradient, ((0, 3), (0, 4)))),
    )


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from(LOSS_TYPES), st.sampled_from([2, 4]))
def test_micro_batches_add_up(arrays, loss_type, parts):
    total = grpo.normalizer(arrays["mask"], loss_type, MAX_LENGTH)
    split = [
        loss_and_gradient(
            {k: np.split(x, parts)[i] for k, x in arrays.items()},
            loss_type=loss_type,
            normalizer=total,
        )
        for i in range(parts)
    ]
    losses, metrics, gradients = zip(*split, strict=True)
    summed = (
        sum(losses),
        jax.tree.map(lambda *parts: sum(parts), *metrics),
        np.concatenate(gradients),
    )
    assert_close(summed, loss_and_gradient(arrays, loss_type=loss_type))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_metrics_are_averages_of_any_loss_type(rows, loss_type):
    """All tokens of all rows cut: the share is 1, however long the constant length is."""
    arrays = {**rows, "logprobs": rows["behavior_logprobs"] + 1.0, "advantages": jnp.ones((8, 1))}
    _, metrics, _ = loss_and_gradient(arrays, loss_type=loss_type)
    np.testing.assert_allclose(metrics["clip_ratio/high_mean"], 1, rtol=1e-6)
    np.testing.assert_allclose(metrics["approx_kl"], -1, rtol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_tokens_and_no_advantages_give_zero_and_no_gradient(rows, loss_type):
    far = {**rows, "logprobs": rows["logprobs"] + 1000.0, "advantages": jnp.zeros((8, 1))}
    empty = {**rows, "mask": jnp.zeros((8, 12))}
    for arrays in (far, empty):
        loss, _, gradient = loss_and_gradient(arrays, loss_type=loss_type)
        assert loss == 0 and not np.asarray(gradient).any()


def test_an_advantage_per_row_serves_all_its_tokens(rows):
    per_row = {**rows, "advantages": rows["advantages"][:, :1]}
    assert_close(loss_and_gradient(per_row), loss_and_gradient(rows))


def test_float32_inside(rows):
    half = {name: x.astype(jnp.bfloat16) for name, x in rows.items()}
    loss, metrics, gradient = loss_and_gradient(half)
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype(jnp.float32)}
    assert gradient.dtype == jnp.bfloat16
    upcast = {name: x.astype(jnp.float32) for name, x in half.items()}
    np.testing.assert_allclose(loss, loss_and_gradient(upcast)[0], rtol=1e-6)


# ------------------------------------------------------------------------------------------------
# KL, errors, config


def test_k3_matches_the_published_one_and_is_finite(vectors):
    ours = grpo.kl_k3(vectors["logprobs"], vectors["ref_logprobs"])
    np.testing.assert_allclose(ours, vectors["k3_kl"], atol=1e-6)
    # log 2 - log 1: 2 - log 2 - 1
    np.testing.assert_allclose(
        grpo.kl_k3(jnp.zeros((1, 1)), jnp.log(jnp.full((1, 1), 2.0))), 1 - np.log(2), rtol=1e-6
    )
    logprobs, mask = jnp.array([[-jnp.inf, -1.0]]), jnp.array([[0, 1]])
    value, gradient = jax.value_and_grad(
        lambda x: masked.mean(grpo.kl_k3(x, jnp.zeros((1, 2))), mask)
    )(logprobs)
    np.testing.assert_allclose(value, np.e - 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 1 - np.e]], rtol=1e-6)


def categorical(seed):
    """Logits of a policy, a reference and a sampler of other chances over five tokens."""
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, (3, 5)), jnp.float32)


def enumerated(estimator, logits, sampler):
    """The gradient of an estimator's mean over the tokens that the sampler draws, by enumeration,
    and its value.
    """
    _, ref, _ = categorical(0)

    def mean(logits):
        logprobs, reference, behavior = (
            jax.nn.log_softmax(x)[None] for x in (logits, ref, sampler)
        )
        estimates = grpo.KL_ESTIMATORS[estimator](logprobs, reference, behavior)
        return jnp.sum(jnp.exp(jax.lax.stop_gradient(behavior)) * estimates)

    return jax.value_and_grad(mean)(logits)


def kl(first, second):
    """KL of two categorical distributions by their logits."""
    first, second = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.sum(jnp.exp(first) * (first - second))


def test_gradient_of_k3_is_that_of_the_reverse_kl():
    """By enumeration: its value is KL(pi || ref), its gradient that of KL(ref || pi)."""
    logits, ref, _ = categorical(0)
    value, gradient = enumerated("k3", logits, logits)
    np.testing.assert_allclose(value, kl(logits, ref), atol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: kl(ref, x))(logits), atol=1e-6)
    assert np.abs(gradient - jax.grad(kl)(logits, ref)).max() > 0.05


@pytest.mark.parametrize("sampler", [0, 1, 2])
def test_the_corrected_estimate_has_the_value_and_gradient_of_the_kl(sampler):
    """On-policy, and for tokens drawn from the reference or from a third policy."""
    logits, ref, _ = categorical(0)
    value, gradient = enumerated("k3_corrected", logits, categorical(0)[sampler])
    np.testing.assert_allclose(value, kl(logits, ref), atol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(kl)(logits, ref), atol=1e-6)


def test_the_corrected_estimate_worked_by_hand():
    """pi = 1/2, ref = 1/4, mu = 1/8: d = -log 2, k3 = 1/2 + log 2 - 1, times 4; its slope 4 (k3 + 1
    - 1/2).
    """
    logprobs, reference, behavior = (jnp.log(jnp.full((1, 1), x)) for x in (0.5, 0.25, 0.125))
    k3 = np.log(2) - 0.5
    value, slope = jax.value_and_grad(lambda x: grpo.kl_corrected(x, reference, behavior).sum())(
        logprobs
    )
    np.testing.assert_allclose(value, 4 * k3, rtol=1e-6)
    np.testing.assert_allclose(slope, [[4 * (k3 + 0.5)]], rtol=1e-6)
    assert jax.grad(lambda mu: grpo.kl_corrected(logprobs, reference, mu).sum())(behavior) == 0
    assert np.isfinite(grpo.kl_corrected(logprobs, reference, behavior - 1000.0))


def test_mistakes_name_the_choices(rows):
    with pytest.raises(InputError, match="loss_type is 'ppo'.*grpo, dapo, dr_grpo, gspo, cispo"):
        grpo.policy_loss(**rows, loss_type="ppo")
    with pytest.raises(InputError, match="delta is 1.2 .*it must be above 1 . epsilon_high = 1.2"):
        grpo.policy_loss(**rows, delta=1.2)
    with pytest.raises(InputError, match="delta is 9.0 .* None with cispo"):
        grpo.policy_loss(**rows, delta=9.0, loss_type="cispo")
    with pytest.raises(
        InputError, match="importance_sampling_correction is 'row': choose one of token, sequence"
    ):
        where = [rows[name] for name in ("logprobs", "behavior_logprobs", "mask")]
        grpo.importance_weights(*where, importance_sampling_correction="row")
    with pytest.raises(
        InputError, match="importance_sampling_mode is 'drop': choose one of truncate, mask"
    ):
        grpo.importance_weights(
            *where, importance_sampling_correction="token", importance_sampling_mode="drop"
        )
    with pytest.raises(InputError, match="max_completion_length is None"):
        grpo.normalizer(rows["mask"], "dr_grpo")
    with pytest.raises(InputError, match="scale_rewards is 'std'.*group, batch, none"):
        grpo.advantages(jnp.zeros((2, 4)), scale_rewards="std")
    with pytest.raises(ValueError):
        grpo.advantages(jnp.zeros(8))
    with pytest.raises(ValueError):
        grpo.policy_loss(**{**rows, "advantages": rows["advantages"][:, 0]})
    with pytest.raises(ValueError):
        grpo.policy_loss(**{**rows, "mask": rows["mask"][:, 1:]})
    with pytest.raises(ValueError):
        grpo.policy_loss(**rows, weights=jnp.ones((8, 1)))


@pytest.mark.parametrize("function", [grpo.advantages, grpo.policy_loss])
def test_defaults_are_the_configs(function):
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    shared = {"scale_rewards", "loss_type", "epsilon", "epsilon_high", "delta"} & set(defaults)
    assert shared and all(defaults[name] == getattr(Config, name) for name in shared)
