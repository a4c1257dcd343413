import helpers
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrft.learn import reward_shaping

_ = None  # a reward that is not valid
WEIGHTS = jnp.array([1.0, 0.5, -2.0])
total = jax.jit(reward_shaping.total, static_argnames="success")


def test_a_sum_is_of_the_rewards_that_apply():
    """All three, two of them, the success alone; without a success there is no sum."""
    rewards = helpers.masked_rewards(
        [[[1.0, 2.0, 0.25], [1.0, _, 0.25], [1.0, _, _], [_, 2.0, 0.25], [_, _, _]]]
    )
    summed, exists = total(*rewards, WEIGHTS, success=0)
    np.testing.assert_allclose(summed, [[1.5, 0.5, 1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(exists, [[True, True, True, False, False]])
    summed, exists = total(*rewards, WEIGHTS, success=1)
    np.testing.assert_allclose(summed, [[1.5, 0.0, 0.0, 0.5, 0.0]])
    np.testing.assert_array_equal(exists, [[True, False, False, True, False]])


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float32, (2, 4, 3), elements=st.sampled_from(np.float32([-1, 0, 0.5, 2, np.nan]))
    ),
    hnp.arrays(bool, (2, 4, 3)),
    st.permutations(range(3)),
)
def test_the_order_of_the_rewards_does_not_matter(rewards, valid, order):
    """Nor what stands where a reward is not valid."""
    order = np.array(order)
    valid &= ~np.isnan(rewards)
    ours = total(rewards, valid, WEIGHTS, success=0)
    theirs = total(
        rewards[..., order], valid[..., order], WEIGHTS[order], success=int(np.argmin(order))
    )
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert np.isfinite(ours[0]).all()


def test_overlong_worked_by_hand():
    """Of at most 100 tokens the last 20 cost: nothing up to 80, half at 90, all at 100."""
    lengths = jnp.array([1, 80, 85, 90, 100], jnp.int32)
    limits = {"max_completion_length": 100, "overlong_buffer": 20}
    np.testing.assert_allclose(
        reward_shaping.overlong(lengths, **limits), [0, 0, -0.25, -0.5, -1], atol=1e-7
    )
    np.testing.assert_allclose(
        reward_shaping.overlong(lengths, **limits, overlong_penalty=0.4)[-2:],
        [-0.2, -0.4],
        rtol=1e-6,
    )
    whole = reward_shaping.overlong(lengths, max_completion_length=100, overlong_buffer=100)
    np.testing.assert_allclose(whole, [-0.01, -0.8, -0.85, -0.9, -1], rtol=1e-6)


def test_each_task_has_its_own_success():
    """Two tasks of two samples: of the first the first reward counts, of the second the other
    one.
    """
    rewards, valid = helpers.masked_rewards([[[1.0, _], [_, 1.0]], [[_, 0.5], [0.25, _]]])
    success = jnp.array([0, 1], jnp.int32)
    np.testing.assert_array_equal(
        reward_shaping.take_reward(rewards, success), [[1.0, 0.0], [0.5, 0.0]]
    )
    np.testing.assert_array_equal(
        reward_shaping.take_reward(valid, success), [[True, False], [True, False]]
    )
    summed, exists = reward_shaping.total(rewards, valid, jnp.array([1.0, 2.0]), success=success)
    np.testing.assert_array_equal(summed, [[1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(exists, [[True, False], [True, False]])


def test_the_magnitude_of_a_sum_is_that_of_its_terms_not_its_own():
    """1 - 2 * 0.5 = 0 has terms of 2 together; what does not apply adds nothing."""
    for garbage in (0.0, 7.0, np.nan, -np.inf):
        rewards = helpers.masked_rewards([[[1.0, _, 0.5], [_, 3.0, _]]], garbage=garbage)
        np.testing.assert_array_equal(reward_shaping.magnitude(*rewards, WEIGHTS), [[2.0, 1.5]])
