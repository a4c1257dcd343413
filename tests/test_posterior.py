import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.select import posterior
from jaxrft.types import Feedback

NAN = float("nan")


def feedback(ids, successes, trials):
    floats = [jnp.array(x, jnp.float32) for x in (successes, trials, [0.0] * len(ids))]
    return Feedback(jnp.array(ids, jnp.int32), *floats)


def test_update_by_hand():
    state = posterior.BetaState(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 4.0, 5.0]))
    implicit = jnp.array([0.25, NAN, 0.9])
    new = posterior.update(
        state, feedback([2], [6.0], [8.0]), implicit, decay=0.1, rho=0.5, num_generations=8
    )
    # task 0: 0.5 * 8 * 0.25 = 1 implicit success, 3 failures; 1: no evidence; 2: observed, full
    # counts whatever rho is
    assert np.allclose(new.alpha, [0.9 + 0.1 + 1, 0.9 * 2 + 0.1, 0.9 * 3 + 0.1 + 6])
    assert np.allclose(new.beta, [0.9 + 0.1 + 3, 0.9 * 4 + 0.1, 0.9 * 5 + 0.1 + 2])


def test_update_of_visited_tasks_by_hand():
    state = posterior.BetaState(jnp.array([1.0, 4.0, 3.0]), jnp.array([1.0, 4.0, 5.0]))
    new = posterior.update_visited(
        state, feedback([2, 0], [6.0, 5.0], [8.0, 0.0]), discount=0.25, prior=(1.0, 2.0)
    )
    assert new.alpha.tolist() == [1, 4, 0.25 * 3 + 0.75 + 6]
    assert new.beta.tolist() == [1, 4, 0.25 * 5 + 0.75 * 2 + 2]


def test_fractional_successes_keep_their_trials():
    state = posterior.init(2)
    new = posterior.update(
        state, feedback([1], [2.5], [7.0]), jnp.full(2, NAN), decay=0.0, rho=0.3, num_generations=8
    )
    assert np.allclose(new.alpha, [1, 3.5]) and np.allclose(new.beta, [1, 5.5])


def test_prior_per_task_is_what_a_full_decay_returns_to():
    prior = (jnp.array([2.0, 5.0]), 3.0)
    state = posterior.BetaState(jnp.array([9.0, 9.0]), jnp.array([9.0, 9.0]))
    nothing = feedback([0], [0.0], [0.0])
    new = posterior.update(
        state, nothing, jnp.full(2, NAN), decay=1.0, rho=0.5, num_generations=8, prior=prior
    )
    assert new.alpha.tolist() == [2, 5] and new.beta.tolist() == [3, 3]


def test_padding_changes_nothing_whatever_its_id():
    state, implicit = posterior.init(4), jnp.full(4, 0.5)
    options = dict(decay=0.1, rho=0.1, num_generations=8)
    real = posterior.update(state, feedback([2, 0], [6.0, 1.0], [8.0, 8.0]), implicit, **options)
    padded = feedback([2, 2, 0, 99, -1], [6.0, NAN, 1.0, 5.0, 5.0], [8.0, 0.0, 8.0, 0.0, 0.0])
    assert all(map(np.array_equal, real, posterior.update(state, padded, implicit, **options)))


def test_init_does_not_share_the_memory_of_the_prior():
    prior = jnp.array([2.0, 5.0])
    state = posterior.init(2, prior=(prior, prior))
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert prior.tolist() == [2, 5]


def test_mean_and_sample_agree():
    state = posterior.BetaState(jnp.full(512, 3.0), jnp.full(512, 1.0))
    assert np.allclose(posterior.mean(state), 0.75)
    draws = posterior.sample(jax.random.key(0), state)
    assert draws.shape == (512,) and abs(float(draws.mean()) - 0.75) < 0.04  # standard error 0.0086
