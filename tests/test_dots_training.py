import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.select.dots import attention, training
from jaxrft.types import InputError

NAN = float("nan")


def quadrants(num_tasks=160, num_policies=8):
    """Embeddings [N, 6] on a circle, with noise, whose quadrants take turns at being easy; pass
    rates [M, N] of 16.
    """
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, num_tasks)
    noise = 0.3 * rng.normal(size=(num_tasks, 4))
    ability = np.linspace(-2, 2, num_policies)[:, None]
    rates = rng.binomial(16, 1 / (1 + np.exp(2.5 * np.sign(np.sin(2 * angle)) - ability))) / 16
    return np.column_stack([np.cos(angle), np.sin(angle), noise]).astype(np.float32), rates.astype(
        np.float32
    )


@pytest.mark.slow
def test_predictor_generalizes_to_new_tasks_and_policies():
    embeddings, rates = quadrants()
    seen, new, references, policy = slice(0, 120), slice(120, None), slice(0, 40), rates[3]
    options = dict(width=32, layers=2, num_references=40, batch_size=60, learning_rate=3e-3)
    params, losses = training.fit(
        jax.random.key(0), embeddings[seen], np.delete(rates, 3, axis=0)[:, seen], **options
    )
    assert losses.shape == (20 * 7 * 120 // 60,) and losses[-30:].mean() < losses[:30].mean() - 0.1
    found = jax.jit(attention.predict)(
        params, *map(jnp.array, (embeddings[new], embeddings[references], policy[:40]))
    )
    line = np.column_stack([embeddings, np.ones(160)])
    ridge = np.linalg.solve(
        line[references].T @ line[references] + np.eye(7), line[references].T @ policy[references]
    )
    score = lambda x: np.corrcoef(x, policy[new])[0, 1]  # noqa: E731
    assert score(found) > 0.7 > score(line[new] @ ridge) + 0.4


def test_all_epochs_are_one_trace(monkeypatch):
    embeddings, rates = quadrants(24, 3)
    epochs = []
    monkeypatch.setattr(training, "draw", chex.assert_max_traces(training.draw, n=1))
    options = dict(width=4, layers=1, num_references=7, batch_size=11, epochs=3)
    training.fit(
        jax.random.key(0),
        embeddings,
        rates,
        report=lambda epoch, loss: epochs.append(epoch),
        **options,
    )
    assert epochs == [1, 2, 3]


def test_batch_has_distinct_tasks_and_unknown_ones_last():
    rates = jnp.full((3, 10), 0.5).at[1, 3:].set(NAN)
    draw = jax.jit(jax.vmap(lambda key: training.draw(key, rates, references=2, queries=5)))
    batch = draw(jax.random.split(jax.random.key(0), 60))
    drawn = np.concatenate([batch.references, batch.queries], axis=1)
    assert all(len(set(row)) == 7 for row in drawn.tolist())
    assert set(batch.policy.tolist()) == {0, 1, 2} and set(drawn[batch.policy != 1].ravel()) == {
        *range(10)
    }
    assert all(set(row[:3]) == {0, 1, 2} for row in drawn[batch.policy == 1].tolist())


def test_the_loss_by_hand():
    """References of 0.25 alone predict 0.25, whatever they resemble; what is unknown does not
    count.
    """
    rates = jnp.array([[0.25, 0.25, 1.0, 0.5, NAN]])
    options = {"calibration": "plain", "width": 4, "layers": 2}
    params = jax.jit(lambda key: training.initial(key, 3, **options))(jax.random.key(0))
    batch = training.Batch(jnp.array([0, 1]), jnp.array([2, 3, 4]), jnp.array(0))
    embeddings = jax.random.normal(jax.random.key(1), (5, 3))
    loss = functools.partial(training.loss, dropout=0.5, calibration="plain")
    found, slope = jax.jit(jax.value_and_grad(loss))(
        params, jax.random.key(2), embeddings, rates, batch
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert float(found) == pytest.approx(
        -(np.log(0.25) + 0.5 * np.log(0.25) + 0.5 * np.log(0.75)) / 2
    )


def test_a_new_calibration_changes_nothing():
    x, rates = jax.random.normal(jax.random.key(1), (6, 3)), jnp.linspace(0.1, 0.9, 6)

    @jax.jit
    def found():
        calibrations = ("plain", "platt", "temperature", "group_logit_temp")
        fresh = [
            training.initial(jax.random.key(0), 3, calibration=each, width=4, layers=2)
            for each in calibrations
        ]
        return [
            attention.predict(p, x, x, rates, calibration=c)
            for p, c in zip(fresh, calibrations, strict=True)
        ]

    plain, *others = found()
    np.testing.assert_allclose(others, [plain] * 3, rtol=1e-5)


def test_dropout_is_between_layers():
    one = attention.Affine(jnp.ones(8), jnp.zeros(8))
    # gelu(1) = 0.8413, which drops out or stays
    ones = attention.Affine(jnp.zeros((8, 8)), jnp.ones(8))
    tower = attention.Tower(one, (ones, attention.Affine(jnp.eye(8), jnp.zeros(8))), one)
    x, key = jnp.zeros((200, 8)), jax.random.key(0)
    assert np.allclose(attention.encode(tower, x), 0, atol=1e-4)  # all inputs alike
    half = attention.encode(tower, x, key, dropout=0.5)
    assert abs(float((half > 0).mean()) - 0.5) < 0.05  # those kept stand above the row's mean
    assert np.array_equal(attention.encode(tower, x, key, dropout=0.0), attention.encode(tower, x))


@pytest.mark.parametrize(
    ("embeddings", "rates", "options", "message"),
    [
        (
            (4, 3),
            np.full((2, 5), 0.5),
            {},
            r"embeddings \(4, 3\) and pass rates \(2, 5\) do "
            r"not fit",
        ),
        ((1, 3), np.full((2, 1), 0.5), {}, "there is one task"),
        ((4, 3), np.full((2, 4), 1.5), {}, r"outside \[0, 1\]"),
        (
            (4, 3),
            np.array([[0.5] * 4, [NAN] * 4]),
            {},
            "policy 1 has no known pass rate: leave it out",
        ),
        ((4, 3), np.full((2, 4), 0.5), {"dropout": 1.0}, r"dropout is 1.0: it must be in \[0, 1\)"),
        (
            (4, 3),
            np.full((2, 4), 1j),
            {},
            "pass_rates is complex128: its dtype must be bool or int or float",
        ),
        (
            (4, 3),
            np.full((2, 4), 0.5),
            {"layers": 0},
            "layers is 0: it must be a whole number, at least 1",
        ),
        ((4, 3), np.full((2, 4), 0.5), {"calibration": "isotonic"}, "no calibration 'isotonic'"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(embeddings, rates, options, message):
    with pytest.raises(InputError, match=message):
        training.fit(jax.random.key(0), np.zeros(embeddings, np.float32), rates, **options)
