from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.select import selectors
from jaxrft.select.dots import attention
from jaxrft.types import Feedback, Projections, Tasks

# Four clusters of tasks that only resemble their like; a predictor that says their mean.
CLUSTER = np.arange(64) % 4
CLUSTERS = jnp.array(20 * np.eye(4, dtype=np.float32)[CLUSTER])
TASKS = Tasks(projections=Projections(CLUSTERS, CLUSTERS))
TRUTH = jnp.array([0.0, 0.5, 0.9, 1.0])[CLUSTER]
UNUSED = attention.Affine(jnp.ones(1), jnp.zeros(1))
# what it projects is given
PREDICTOR = attention.Params(*[attention.Tower(UNUSED, (), UNUSED)] * 2)


def dots(**options):
    return selectors.dots(8, predictor=PREDICTOR, calibration="plain", **options)


def rolled_out(ids, rates):
    count = jnp.full(len(ids), 8.0)
    return Feedback(jnp.asarray(ids), 8 * jnp.asarray(rates, jnp.float32), count, count)


def test_a_reference_set_is_uniform_and_distinct():
    selector = dots(num_references=8)
    state = selector.init(TASKS, 64)
    ids = jax.vmap(lambda key: selector.reference_set(key, state, TASKS))(
        jax.random.split(jax.random.key(0), 400)
    )
    assert ids.shape == (400, 8) and all(len(set(row)) == 8 for row in ids.tolist())
    counts = Counter(ids.ravel().tolist())  # 50 each, standard deviation 6.6
    assert set(counts) == set(range(64)) and max(abs(count - 50) for count in counts.values()) < 30
    everything = dots()
    assert sorted(
        everything.reference_set(jax.random.key(0), everything.init(TASKS, 64), TASKS).tolist()
    ) == [*range(64)]
    assert (selector.reference_every, dots(reference_every=5).reference_every) == (2, 5)


def test_references_predict_all_tasks_and_those_near_the_target_are_chosen():
    selector = dots(num_references=24)
    state = selector.init(TASKS, 64)
    first, _ = selector.select(jax.random.key(0), state, TASKS, batch_size=4)
    assert np.isnan(first.pass_rate).all() and len(set(first.ids.tolist())) == 4
    ids = selector.reference_set(jax.random.key(1), state, TASKS)
    state = selector.update_references(state, TASKS, rolled_out(ids, TRUTH[ids]))
    np.testing.assert_allclose(selector.pass_rate(state, TASKS), TRUTH, atol=1e-5)
    choice, state = selector.select(jax.random.key(2), state, TASKS, batch_size=4)
    assert (CLUSTER[choice.ids] == 1).all() and np.allclose(choice.pass_rate, 0.5)
    # What was chosen is no sample of the table: its outcome is no reference, though later it may be
    # one.
    after = selector.update(state, TASKS, rolled_out(choice.ids, jnp.zeros(4)))
    assert np.array_equal(after.predicted, state.predicted)
    assert np.array_equal(after.references, state.references)
    again = selector.update_references(after, TASKS, rolled_out(choice.ids, jnp.zeros(4)))
    assert float(again.predicted[1]) < 0.45


def test_parts_of_a_reference_set_replace_the_oldest_references_by_hand():
    selector = dots(num_references=4)
    update, state = jax.jit(selector.update_references), selector.init(TASKS, 64)
    state = update(state, TASKS, rolled_out([5, 2], [0.25, 1.0]))
    assert state.references.tolist() == [5, 2, 0, 0]
    np.testing.assert_array_equal(state.reference_pass_rates, [0.25, 1.0, np.nan, np.nan])
    # 0 and 3 resemble neither
    np.testing.assert_allclose(state.predicted[:4], [0.625, 0.25, 1.0, 0.625], atol=1e-5)
    state = update(state, TASKS, rolled_out([9, 5, 7], [0.75, 0.5, 0.0]))
    assert state.references.tolist() == [9, 5, 7, 2]
    assert state.reference_pass_rates.tolist() == [0.75, 0.5, 0.0, 1.0]
    np.testing.assert_allclose(state.predicted[:4], [0.5625, 0.625, 1.0, 0.0], atol=1e-5)


def test_a_task_is_chosen_with_the_published_chance():
    """P(i) = exp(-|p_i - target| / temperature) / sum."""
    selector = dots(target=0.3, temperature=0.05)
    predicted = jnp.array([0.3, 0.35, 0.2, 0.9, 0.31])
    state = selector.init(Tasks(projections=Projections(CLUSTERS[:5], CLUSTERS[:5])), 5)._replace(
        predicted=predicted
    )
    draw = jax.jit(jax.vmap(lambda key: selector.select(key, state, TASKS, batch_size=1)[0].ids[0]))
    share = np.bincount(draw(jax.random.split(jax.random.key(3), 4000)), minlength=5) / 4000
    weight = np.exp([0.0, -1.0, -2.0, -12.0, -0.2])
    assert share == pytest.approx(weight / weight.sum(), abs=0.03)
