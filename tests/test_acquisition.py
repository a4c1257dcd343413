import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.select import acquisition, topk
from jaxrft.select.posterior import BetaState
from jaxrft.types import InputError, Tasks

NAN, INF = float("nan"), float("inf")


def test_nearest_by_hand():
    pass_rate = jnp.array([0.0, 0.45, 1.0, 0.6, NAN, 0.52])
    ids = acquisition.nearest(jax.random.key(0), pass_rate, batch_size=3)
    assert ids.dtype == jnp.int32 and ids.tolist() == [5, 1, 3]
    assert acquisition.nearest(jax.random.key(0), pass_rate, batch_size=1, target=0.9).tolist() == [
        2
    ]


def draws(keys, score, **options):
    """Returns the ids [K, B] that softmax draws by each of the keys [K]."""
    return jax.jit(jax.vmap(lambda key: acquisition.softmax(key, score, **options)))(keys)


def test_softmax_draws_without_replacement_by_hand():
    score = jnp.log(jnp.array([1.0, 2.0, 5.0, 0.0]))
    keys = jax.random.split(jax.random.key(3), 4000)
    ids = draws(keys, 0.5 * score, batch_size=3, temperature=0.5)
    assert all(sorted(row) == [0, 1, 2] for row in ids.tolist())
    found = Counter(map(tuple, ids[:, :2].tolist()))
    for first, second, chance in (
        (2, 1, 5 / 8 * 2 / 3),
        (1, 2, 2 / 8 * 5 / 6),
        (0, 1, 1 / 8 * 2 / 7),
    ):
        assert found[first, second] / 4000 == pytest.approx(chance, abs=0.03)


def test_softmax_draws_every_order_as_often_as_it_should():
    """Pearson's statistic over the 24 orders of three of four tasks; 50 is its 99.9 % quantile."""
    weight, count = np.array([1.0, 2.0, 5.0, 0.5]), 20_000
    keys, score = (
        jax.random.split(jax.random.key(4), count),
        3 * jnp.log(jnp.array(weight, jnp.float32)),
    )
    ids = draws(keys, score, batch_size=3, temperature=3.0)
    found, statistic = Counter(map(tuple, ids.tolist())), 0.0
    for a, b, c in itertools.permutations(range(4), 3):
        left = weight.sum() - weight[a]
        expected = (
            count * weight[a] / weight.sum() * weight[b] / left * weight[c] / (left - weight[b])
        )
        statistic += (found[a, b, c] - expected) ** 2 / expected
    assert statistic < 50


def test_softmax_over_a_sharded_table_is_the_same(mesh):
    score = jnp.linspace(-2, 2, 64)
    choose = jax.jit(lambda key, score: acquisition.softmax(key, score, batch_size=8))
    alone = choose(jax.random.key(2), score)
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score), alone)


def test_chance_of_an_informative_group_by_hand():
    assert acquisition.informative(jnp.array([0.0, 0.5, 0.9]), 2).tolist() == pytest.approx(
        [0, 0.5, 0.18]
    )
    state = BetaState(jnp.array([1.0, 2.0, 1e6]), jnp.array([1.0, 1.0, 1e6]))
    # Beta(1, 1), G = 2: 1 - 2 * 1/2 * 2/3; Beta(2, 1): 1 - 2/3 * 3/4 - 1/3 * 2/4; the last is p =
    # 1/2
    found = acquisition.informative_beta(state, 2)
    assert found.tolist() == pytest.approx([1 / 3, 1 / 3, 0.5], abs=1e-6)
    assert float(
        acquisition.informative_beta(BetaState(jnp.array([1e6]), jnp.array([1.0])), 8)[0]
    ) == pytest.approx(8e-6, rel=0.05)
    assert acquisition.signal(jnp.array([0.0, 0.25, 0.5])).tolist() == [0, 0.75, 1]


def test_per_token_and_cool_down_by_hand():
    utility = jnp.array([0.6, 0.6, 0.9, 0.3])
    assert acquisition.per_token(
        utility, jnp.array([10.0, 30.0, 0.0, NAN])
    ).tolist() == pytest.approx([0.06, 0.02, 0.045, 0.015])
    assert acquisition.per_token(utility, jnp.zeros(4)).tolist() == utility.tolist()
    cooled = acquisition.cool_down(utility, jnp.array([9, 0, 2, 3]), steps=3)
    assert np.argsort(-cooled).tolist() == [0, 3, 2, 1]
    assert topk.largest(jax.random.key(0), cooled, batch_size=2).tolist() == [0, 3]


def test_softmax_draws_tasks_that_are_not_excluded_by_hand():
    score, exclude = jnp.log(jnp.array([1.0, 9.0, 2.0, 5.0])), jnp.arange(4) == 1
    keys = jax.random.split(jax.random.key(3), 4000)
    ids = draws(keys, score, batch_size=1, exclude=exclude)[:, 0]
    share = np.bincount(ids, minlength=4) / 4000
    assert share == pytest.approx(np.array([1, 0, 2, 5]) / 8, abs=0.03)


def test_epochs_go_by_the_least_visited_task_that_is_not_excluded():
    visits, exclude = jnp.array([0, 1, 2, 1, 3]), jnp.arange(5) == 0
    assert acquisition.epoch(visits).tolist() == [0, 1, 1, 1, 1]
    assert acquisition.epoch(visits, exclude=exclude).tolist() == [0, 0, 1, 0, 1]
    quota = topk.Quota(jnp.array([0, 0, 0, 1, 1]), jnp.array([1, 1, 0, 0, 0]))
    assert acquisition.epoch(visits, quota=quota).tolist() == [0, 1, 1, 0, 1]
    assert acquisition.epoch(visits, quota=quota, exclude=exclude).tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("balance", [pytest.param("proportional", marks=pytest.mark.slow), "equal"])
def test_quotas_over_a_sharded_table_are_the_same(mesh, balance):
    rng = np.random.default_rng(0)
    score, domain = (
        jnp.array(rng.integers(0, 9, 64), jnp.float32),
        jnp.array(np.sort(rng.integers(0, 4, 64) ** 2)),
    )
    choose = jax.jit(
        lambda key, score, domain: acquisition.softmax(
            key,
            score,
            batch_size=10,
            quota=topk.quota(key, Tasks(domain=domain), batch_size=10, balance=balance),
        )
    )
    alone = choose(jax.random.key(2), score, domain)
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score, domain), alone)


FLOATS, INTS = jnp.zeros(4), jnp.zeros(4, int)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: acquisition.nearest(KEY, INTS, batch_size=1),
            "pass_rate is int32: its dtype must be float",
        ),
        (
            lambda: acquisition.softmax(KEY, FLOATS[None], batch_size=1),
            r"score has shape \(1, "
            r"4\): it must be \[N\]",
        ),
        (lambda: acquisition.informative(INTS, 8), "pass_rate is int32"),
        (lambda: acquisition.signal(INTS), "pass_rate is int32"),
        (
            lambda: acquisition.informative_beta(BetaState(FLOATS, FLOATS[1:]), 8),
            r"beta has shape \(3,\).*here \[4\]",
        ),
        (lambda: acquisition.thompson(KEY, BetaState(FLOATS, INTS), batch_size=1), "beta is int32"),
        (lambda: acquisition.per_token(FLOATS, FLOATS[1:]), r"tokens has shape \(3,\)"),
        (lambda: acquisition.cool_down(FLOATS, FLOATS[1:], steps=1), r"since has shape \(3,\)"),
        (lambda: acquisition.epoch(FLOATS), "visits is float32: its dtype must be int"),
    ],
)
def test_an_argument_of_another_shape_or_dtype_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
