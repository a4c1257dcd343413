import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft.lm import sampling

TIED = (0.5, 0.2, 0.2, 0.1)
FALLING = (0.4, 0.3, 0.2, 0.1)


def kept(probabilities, **options):
    """The tokens that `truncate` leaves of a distribution."""
    logits = jnp.log(jnp.array([probabilities], jnp.float32))
    out = sampling.truncate(logits, **options)
    # what stays is not changed
    np.testing.assert_array_equal(out[jnp.isfinite(out)], logits[jnp.isfinite(out)])
    return np.flatnonzero(jnp.isfinite(out)[0]).tolist()


@pytest.mark.parametrize(
    ("probabilities", "options", "tokens"),
    [
        (FALLING, {}, [0, 1, 2, 3]),
        (FALLING, {"top_k": 1}, [0]),
        (FALLING, {"top_k": 3}, [0, 1, 2]),
        (FALLING, {"top_k": 9}, [0, 1, 2, 3]),
        (TIED, {"top_k": 2}, [0, 1, 2]),  # tied with the second
        (FALLING, {"top_p": 0.01}, [0]),  # one token stays
        (FALLING, {"top_p": 0.39}, [0]),
        (FALLING, {"top_p": 0.41}, [0, 1]),
        (FALLING, {"top_p": 0.71}, [0, 1, 2]),
        (FALLING, {"top_p": 0.95}, [0, 1, 2, 3]),
        (TIED, {"top_p": 0.6}, [0, 1, 2]),  # tied with the last one needed
        (FALLING[::-1], {"top_p": 0.41}, [2, 3]),
        (FALLING, {"top_p": 0.55}, [0, 1]),
        (FALLING, {"top_p": 0.55, "top_k": 2}, [0]),  # 4/7 of what top-k leaves is enough
        (FALLING, {"min_p": 0.6}, [0, 1]),  # 0.24 or more
        (FALLING, {"min_p": 0.2}, [0, 1, 2, 3]),  # 0.08
        (FALLING, {"min_p": 1.0}, [0]),
        (TIED, {"min_p": 0.39}, [0, 1, 2]),  # 0.195
        (FALLING, {"top_k": 3, "top_p": 0.8, "min_p": 0.4}, [0, 1, 2]),
        (FALLING, {"top_p": 0.41, "min_p": 0.4}, [0, 1]),
    ],
)
def test_truncation_by_hand(probabilities, options, tokens):
    assert kept(probabilities, **options) == tokens


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-6, 6), min_size=6, max_size=6),
    st.sampled_from([0.1, 0.37, 0.5, 0.83, 0.99]),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p):
    logits = np.array(logits, np.float32) / 2
    probability = np.exp(logits) / np.exp(logits).sum()
    stays = np.isfinite(sampling.truncate(jnp.asarray(logits[None]), top_p=top_p))[0]
    assert probability[stays].sum() >= top_p - 1e-6
    # the likeliest, and all of a tie
    assert probability[stays].min() > probability[~stays].max(initial=0.0)
    # without the last it falls short
    assert probability[stays & (logits > logits[stays].min())].sum() < top_p + 1e-6


def test_rows_are_truncated_apart():
    logits = jnp.log(jnp.array([FALLING, FALLING[::-1]], jnp.float32))
    np.testing.assert_array_equal(
        jnp.isfinite(sampling.truncate(logits, top_k=2)),
        [[True, True, False, False], [False, False, True, True]],
    )


def test_a_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits = jnp.array([[3.0, 3.0, -1.0, -1.0, 0.0]])
    seen = jnp.array([[True, False, True, False, True]])
    out = sampling.penalize(logits, seen, repetition_penalty=1.5)
    np.testing.assert_array_equal(out, [[2.0, 3.0, -1.5, -1.0, 0.0]])
    assert sampling.penalize(logits, None, repetition_penalty=1.5) is logits


def test_tokens_of_the_prompt_are_seen_without_its_padding_and_drawn_ones_are_added():
    prompts = jnp.array([[2, 2, 4], [1, 0, 0]])
    seen = sampling.tokens_seen(prompts, jnp.array([3, 1]), 5)
    np.testing.assert_array_equal(seen, [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]])
    seen = sampling.see(seen, jnp.array([0, 4]))
    np.testing.assert_array_equal(seen, [[1, 0, 1, 0, 1], [0, 1, 0, 0, 1]])
    assert sampling.see(None, jnp.array([0])) is None


def test_the_key_of_a_sample_depends_on_task_and_number_only():
    key = jax.random.key(3)
    keys = jax.random.key_data(sampling.row_keys(key, jnp.array([5, 9, 1]), 4))
    assert len(np.unique(keys, axis=0)) == 12
    alone = jax.random.key_data(sampling.row_keys(key, jnp.array([9]), 2))
    np.testing.assert_array_equal(keys[4:6], alone)
    other = jax.random.key_data(sampling.row_keys(jax.random.key(4), jnp.array([9]), 2))
    assert not np.any(np.all(other == alone, axis=1))


def test_draws_follow_the_distribution():
    """Pearson's chi-square over 20,000 draws: under 13.8, which 2 degrees of freedom exceed once in
    a thousand.
    """
    keys = sampling.row_keys(jax.random.key(0), jnp.arange(2000), 10)
    chances = np.array([0.6, 0.3, 0.0, 0.1])
    logits = jnp.broadcast_to(jnp.log(jnp.array(chances, jnp.float32))[None], (20_000, 4))
    draw = jax.jit(sampling.draw)
    zeros = np.zeros(len(keys), np.int32)
    first, second = draw(keys, zeros, logits), draw(keys, zeros + 1, logits)
    possible = chances > 0
    for tokens in (first, second):
        counts, expected = np.bincount(tokens, minlength=4), 20_000 * chances
        assert counts[2] == 0
        assert np.sum((counts - expected)[possible] ** 2 / expected[possible]) < 13.8
    # Steps are independent: equal tokens come with chance 0.36 + 0.09 + 0.01, give or take 4
    # standard deviations.
    assert np.mean(first == second) == pytest.approx(0.46, abs=4 * (0.46 * 0.54 / 20_000) ** 0.5)
    np.testing.assert_array_equal(first, draw(keys, zeros, logits))


def test_pick():
    table = jnp.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_array_equal(
        sampling.pick(table, jnp.array([[0, 2], [1, 1]])), [[0, 5], [7, 10]]
    )


def test_log_probabilities_are_those_of_the_softmax():
    # 16 and 8 in all; log 0 is no token
    odds = jnp.array([[1.0, 3.0, 0.0, 12.0], [2.0, 2.0, 4.0, 0.0]])
    found = sampling.log_probability(jnp.log(odds) + 100, jnp.array([1, 2]))
    np.testing.assert_allclose(found, np.log([3 / 16, 1 / 2]), rtol=1e-5)
    logits = jax.random.normal(jax.random.key(0), (64, 300)) * 5
    tokens = jnp.arange(64)
    expected = sampling.pick(jax.nn.log_softmax(logits), tokens)
    np.testing.assert_array_equal(sampling.log_probability(logits, tokens), expected)
