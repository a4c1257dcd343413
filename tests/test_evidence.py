from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.select import evidence
from jaxrft.types import Feedback, InputError, Tasks

NAN = float("nan")


def feedback(ids, pass_rates, trials=None):
    trials = jnp.full(len(ids), 8.0) if trials is None else jnp.array(trials, jnp.float32)
    rates = jnp.array(pass_rates, jnp.float32)
    return Feedback(jnp.array(ids, jnp.int32), rates * trials, trials, jnp.zeros(len(ids)))


@partial(jax.jit, static_argnames="momentum")
def update(state, tasks, feedback, *, momentum):
    return evidence.interpolation(momentum).update(state, tasks, feedback)


predict = jax.jit(evidence.interpolation().predict)


def run(references, *feedbacks, momentum=0.9):
    """Capability and prediction after the feedbacks."""
    tasks = Tasks(jnp.array(references, jnp.float32))
    state = evidence.interpolation(momentum).init(tasks, len(references))
    for each in feedbacks:
        state = update(state, tasks, each, momentum=momentum)
    return float(state.capability), np.asarray(predict(state, tasks))


def test_two_references_by_hand():
    references = [[0.2, 0.6], [0.0, 0.8], [0.5, 0.5], [0.9, 0.1]]
    # batch means 0.1 and 0.7, observed 0.4: half-way
    capability, pass_rate = run(references, feedback([0, 1], [0.3, 0.5]))
    assert capability == pytest.approx(0.3 / (0.6 + 1e-6), rel=1e-6)
    assert np.allclose(pass_rate, [0.4, 0.4, 0.5, 0.5], atol=1e-5)


def test_first_capability_is_unsmoothed_and_later_ones_are_smoothed():
    references = [[0.0, 0.5], [0.0, 0.5]]
    capability, pass_rate = run(
        references, feedback([0], [0.5]), feedback([1], [0.0]), momentum=0.75
    )
    assert capability == pytest.approx(0.75 * 0.5 / (0.5 + 1e-6), rel=1e-6)
    assert np.allclose(pass_rate, 0.375, atol=1e-5)


def test_published_epsilon_bounds_equal_references():
    capability, pass_rate = run([[0.5, 0.5], [0.0, 1.0]], feedback([0], [0.75]))
    assert capability == pytest.approx(0.25 / 1e-6)
    assert pass_rate.tolist() == [0.5, 1.0]  # clipped


def test_three_references_by_hand():
    references = [[0.0, 0.2, 0.8], [0.2, 0.4, 0.6], [0.1, 0.9, 0.3]]
    # batch means 0.1, 0.3, 0.7; observed 0.5 lies half-way in the second segment: c = 1.5
    capability, pass_rate = run(references, feedback([0, 1], [0.4, 0.6]))
    assert capability == pytest.approx(1.5, abs=1e-5)
    assert np.allclose(pass_rate, [0.5, 0.5, 0.6], atol=1e-5)
    # observed 0.2: half-way in the first, c = 0.5
    capability, pass_rate = run(references, feedback([0, 1], [0.1, 0.3]))
    assert capability == pytest.approx(0.5, abs=1e-5)
    assert np.allclose(pass_rate, [0.1, 0.3, 0.5], atol=1e-5)
    # observed 0.9: beyond the strongest the last segment goes on, c = 2.5, and the prediction is
    # clipped
    capability, pass_rate = run(references, feedback([0, 1], [0.9, 0.9]))
    assert capability == pytest.approx(2.5, abs=1e-5)
    assert np.allclose(pass_rate, [1.0, 0.7, 0.0], atol=1e-5)


def test_tasks_without_references_have_no_evidence():
    references = [[0.2, 0.6], [NAN, 0.9], [0.0, 0.8]]
    capability, pass_rate = run(references, feedback([0, 1], [0.4, 1.0]))
    assert capability == pytest.approx(0.2 / (0.4 + 1e-6), rel=1e-6)
    assert np.allclose(pass_rate, [0.4, NAN, 0.4], atol=1e-5, equal_nan=True)


def test_capability_is_nan_before_usable_feedback():
    references = [[0.2, 0.6], [NAN, 0.9], [0.0, 0.8]]
    capability, pass_rate = run(references, feedback([1], [1.0]), feedback([0], [NAN], [0.0]))
    assert np.isnan(capability) and np.isnan(pass_rate).all()
    real = run(references, feedback([0, 2], [0.5, 0.25]))
    padded = run(references, feedback([0, 0, 2, 9], [0.5, NAN, 0.25, 1.0], [8.0, 0.0, 8.0, 0.0]))
    assert real[0] == padded[0] and np.array_equal(real[1], padded[1], equal_nan=True)


def test_domains_have_capabilities_of_their_own_by_hand():
    model = evidence.interpolation(0.75, per_domain=True)
    tasks = Tasks(jnp.array([[0.0, 1.0]] * 6), domain=jnp.array([0, 0, 1, 1, 2, 2]))
    state = model.init(tasks, 6)
    update_domains, predict = jax.jit(model.update), jax.jit(model.predict)
    assert state.domains.shape == (3,) and np.isnan(predict(state, tasks)).all()
    # the batch's mean is 0.5, one task more of each domain: (0.2 + 0.4 + 0.5) / 3, (0.9 + 0.5) / 2;
    # none of the last
    state = update_domains(state, tasks, feedback([0, 1, 2], [0.2, 0.4, 0.9]))
    assert np.allclose(predict(state, tasks), [1.1 / 3] * 2 + [0.7] * 2 + [0.5] * 2, atol=1e-5)
    # domains without tasks in the batch keep theirs, but for the one that never had any: 0.75 * 0.5
    # + 0.25 * 0.1
    state = update_domains(state, tasks, feedback([1, 0], [0.1, 0.1]))
    first = 0.75 * 1.1 / 3 + 0.25 * 0.1
    assert np.allclose(predict(state, tasks), [first] * 2 + [0.7] * 2 + [0.4] * 2, atol=1e-5)


def test_one_domain_is_the_common_capability():
    references = [[0.2, 0.6, 0.9], [0.0, 0.3, 0.8], [NAN, 0.5, 0.5], [0.1, 0.2, 0.7]]
    batches = feedback([0, 1, 2], [0.4, 0.1, 0.5]), feedback([3, 1], [0.9, 0.8])
    common, expected = run(references, *batches)
    model, tasks = (
        evidence.interpolation(per_domain=True),
        Tasks(jnp.array(references), domain=jnp.zeros(4, jnp.int32)),
    )
    state = model.init(tasks, 4)
    for each in batches:
        state = jax.jit(model.update)(state, tasks, each)
    assert state.domains.tolist() == pytest.approx([common]) and float(state.capability) == common
    np.testing.assert_allclose(model.predict(state, tasks), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (None, "set tasks.domain_column, or pass them in Tasks.domain"),
        ([0, 1], r"domains have shape \(2,\): there must be one for each of 3 tasks"),
        ([0, -1, 1], "domains are numbered from -1 to 1: number them from 0"),
        ([0, 3, 1], "domains are numbered from 0 to 3"),
    ],
)
def test_invalid_domains_are_named(domain, message):
    tasks = Tasks(jnp.full((3, 2), 0.5), domain=None if domain is None else jnp.array(domain))
    with pytest.raises(InputError, match=message):
        evidence.interpolation(per_domain=True).init(tasks, 3)


def test_none_has_no_evidence():
    model = evidence.none()
    state = model.init(Tasks(), 3)
    state = model.update(state, Tasks(), feedback([0], [1.0]))
    assert np.isnan(model.predict(state, Tasks())).tolist() == [True] * 3


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, r"tasks.pass_rate_columns, or choose select.name uniform"),
        (
            [[NAN, 0.5], [0.5, NAN], [NAN, NAN]],
            r"tasks.pass_rate_columns, or choose "
            r"select.name uniform",
        ),
        ([[0.0, 0.5], [0.5, 1.2], [0.1, 0.2]], r"task 1, column 1 is 1\.2"),
        ([[0.0, 0.5], [0.5, 1.0], [-0.5, NAN]], r"task 2, column 0 is -0\.5"),
        ([[0.5], [0.5], [0.5]], r"shape \(3, 1\).*at least 2 reference policies"),
        ([[0.5, 0.5]], r"shape \(1, 2\).*\[3, K\]"),
    ],
)
def test_invalid_references_are_named(references, message):
    tasks = Tasks(None if references is None else jnp.array(references))
    with pytest.raises(InputError, match=message):
        evidence.interpolation().init(tasks, 3)


def test_checks_skip_tracers_and_reach_constants_inside_a_trace():
    bad = jnp.array([[0.0, 1.2]])
    init = evidence.interpolation().init
    assert np.isnan(jax.jit(lambda tasks: init(tasks, 1).capability)(Tasks(bad)))
    with pytest.raises(InputError, match="is 1.2"):
        jax.jit(lambda: init(Tasks(bad), 1))()
