import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gradients


def test_group_norms_by_hand():
    """Orthogonal gradients with |s|^2 = 3 and every other reward 1: A = +-1/2, so that |g|^2 = G *
    3 / 4 / G^2.
    """
    rewards = jnp.arange(32, dtype=jnp.float32) % 2
    norms = jax.jit(gradients.group_norms)(3.0 * jnp.eye(32), rewards)
    np.testing.assert_allclose(norms, 0.75 / np.array(gradients.GROUPS), rtol=1e-6)


@pytest.fixture(scope="module")
def found():
    return gradients.measure(tasks=40, samples=32)


@pytest.mark.slow
def test_rewards_that_do_not_depend_on_the_completions_obey_the_theorem(found):
    """For each size of a group: over the tasks the shares follow theirs, and their means agree."""
    theirs = np.stack(
        [gradients.theorem(found.pass_rates, size) for size in gradients.GROUPS], axis=1
    )
    ours = gradients.shares(found)["coins"]
    # of larger groups there are 2 and 1 a task
    assert (gradients.correlations(found, ours)[:3] > 0.7).all()
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), rtol=0.25)


@pytest.mark.slow
def test_gradients_of_real_rewards_are_larger_and_follow_it_roughly(found):
    ours = gradients.shares(found)
    assert (gradients.correlations(found, ours["the task's rewards"]) > 0.3).all()
    assert (ours["the task's rewards"].mean(axis=0) > ours["coins"].mean(axis=0)).all()


@pytest.mark.slow
def test_gradients_prints_a_table_and_draws(found, tmp_path):
    assert "| theorem | 0.0 to 0.2 |" in gradients.table(found)
    gradients.draw(found, str(tmp_path / "gradients.png"))
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
