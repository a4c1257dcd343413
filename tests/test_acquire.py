from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import mesh as meshes
from jaxrft.select import acquire
from jaxrft.select.posterior import BetaState

NAN, INF = float("nan"), float("inf")


def test_nearest_by_hand():
    pass_rate = jnp.array([0.0, 0.45, 1.0, 0.6, NAN, 0.52])
    ids = acquire.nearest(jax.random.key(0), pass_rate, batch_size=3)
    assert ids.dtype == jnp.int32 and ids.tolist() == [5, 1, 3]
    assert acquire.nearest(jax.random.key(0), pass_rate, batch_size=1, target=0.9).tolist() == [2]


@pytest.mark.parametrize("nan", [NAN, -NAN])
def test_nan_is_chosen_last_and_then_at_random(nan):
    score = jnp.array([nan, INF, nan, -INF])
    ids = jax.vmap(lambda key: acquire.smallest(key, score, batch_size=3))(jax.random.split(jax.random.key(0), 32))
    assert set(map(tuple, ids[:, :2].tolist())) == {(3, 1)}
    assert set(ids[:, 2].tolist()) == {0, 2}


def test_ties_are_broken_evenly_by_the_key():
    keys = jax.random.split(jax.random.key(1), 600)
    ids = jax.vmap(lambda key: acquire.smallest(key, jnp.zeros(6), batch_size=2))(keys)
    counts = Counter(ids.ravel().tolist())  # 200 each, standard deviation 11.5
    assert set(counts) == set(range(6)) and max(abs(count - 200) for count in counts.values()) < 60


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "best-in-one-shard"])
@pytest.mark.parametrize(("num_tasks", "batch_size"), [(64, 8), (64, 40), (62, 8)])
def test_top_k_is_exact_and_the_same_on_a_mesh(mesh, num_tasks, batch_size, crowded):
    score = np.random.default_rng(0).integers(0, 12, num_tasks)
    score = jnp.array(np.sort(score) if crowded else score, jnp.float32).at[3].set(NAN)
    choose = jax.jit(lambda key, score: acquire.smallest(key, score, batch_size=batch_size))
    alone = choose(jax.random.key(2), score)
    assert np.array_equal(score[alone], np.sort(score)[:batch_size])
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score), alone)


def test_a_sharded_table_is_not_gathered(mesh):
    score = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=meshes.sharding(mesh, "task"))
    with jax.set_mesh(mesh):
        choose = jax.jit(lambda key, score: acquire.smallest(key, score, batch_size=8))
        program = choose.lower(jax.eval_shape(jax.random.key, 0), score).compile().as_text()
    assert "f32[1024]" in program  # a shard
    assert "f32[4096]" not in program and "f32[4,1024]" not in program


def test_softmax_draws_without_replacement_by_hand():
    score = jnp.log(jnp.array([1.0, 2.0, 5.0, 0.0]))
    keys = jax.random.split(jax.random.key(3), 4000)
    ids = jax.vmap(lambda key: acquire.softmax(key, 0.5 * score, batch_size=3, temperature=0.5))(keys)
    assert all(sorted(row) == [0, 1, 2] for row in ids.tolist())
    found = Counter(map(tuple, ids[:, :2].tolist()))
    for first, second, chance in ((2, 1, 5 / 8 * 2 / 3), (1, 2, 2 / 8 * 5 / 6), (0, 1, 1 / 8 * 2 / 7)):
        assert found[first, second] / 4000 == pytest.approx(chance, abs=0.03)


def test_softmax_over_a_sharded_table_is_the_same(mesh):
    score = jnp.linspace(-2, 2, 64)
    choose = jax.jit(lambda key, score: acquire.softmax(key, score, batch_size=8))
    alone = choose(jax.random.key(2), score)
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score), alone)


def test_chance_of_an_informative_group_by_hand():
    assert acquire.informative(jnp.array([0.0, 0.5, 0.9]), 2).tolist() == pytest.approx([0, 0.5, 0.18])
    state = BetaState(jnp.array([1.0, 2.0, 1e6]), jnp.array([1.0, 1.0, 1e6]))
    # Beta(1, 1), G = 2: 1 - 2 * 1/2 * 2/3; Beta(2, 1): 1 - 2/3 * 3/4 - 1/3 * 2/4; the last is p = 1/2
    found = acquire.informative_beta(state, 2)
    assert found.tolist() == pytest.approx([1 / 3, 1 / 3, 0.5], abs=1e-6)
    assert float(acquire.informative_beta(BetaState(jnp.array([1e6]), jnp.array([1.0])), 8)[0]) == pytest.approx(
        8e-6, rel=0.05
    )
    assert acquire.signal(jnp.array([0.0, 0.25, 0.5])).tolist() == [0, 0.75, 1]


def test_per_token_and_cool_down_by_hand():
    utility = jnp.array([0.6, 0.6, 0.9, 0.3])
    assert acquire.per_token(utility, jnp.array([10.0, 30.0, 0.0, NAN])).tolist() == pytest.approx(
        [0.06, 0.02, 0.045, 0.015]
    )
    assert acquire.per_token(utility, jnp.zeros(4)).tolist() == utility.tolist()
    cooled = acquire.cool_down(utility, jnp.array([9, 0, 2, 3]), steps=3)
    assert np.argsort(-cooled).tolist() == [0, 3, 2, 1]
    assert acquire.largest(jax.random.key(0), cooled, batch_size=2).tolist() == [0, 3]


def test_the_curious_ranking_gets_as_many_places_as_the_price_pays_for():
    utility, interest = jnp.array([0.9, 0.8, 0.5, 0.1, 0.1]), jnp.array([0.0, 0.1, 0.0, 1.0, 0.5])

    def chosen(price):
        options = dict(batch_size=3, weight=2.0, price=price)
        return sorted(acquire.priced(jax.random.key(0), utility, interest, **options).tolist())

    # best 0, 1, 2: 2.2. Curious 3, 4, 1: one place leaves 0.1 + 0.9 + 0.8, two 0.1 + 0.1 + 0.9, three 0.1 + 0.1 + 0.8.
    assert [chosen(price) for price in (0.0, 0.1, 0.2, 0.4, 0.51, 1.0)] == [
        [0, 1, 2],
        [0, 1, 2],
        [0, 1, 3],
        [0, 1, 3],
        [0, 3, 4],
        [1, 3, 4],
    ]
