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
    assert acquisition.nearest(jax.random.key(0), pass_rate, batch_size=1, target=0.9).tolist() == [2]


def test_softmax_draws_without_replacement_by_hand():
    score = jnp.log(jnp.array([1.0, 2.0, 5.0, 0.0]))
    keys = jax.random.split(jax.random.key(3), 4000)
    ids = jax.vmap(lambda key: acquisition.softmax(key, 0.5 * score, batch_size=3, temperature=0.5))(keys)
    assert all(sorted(row) == [0, 1, 2] for row in ids.tolist())
    found = Counter(map(tuple, ids[:, :2].tolist()))
    for first, second, chance in ((2, 1, 5 / 8 * 2 / 3), (1, 2, 2 / 8 * 5 / 6), (0, 1, 1 / 8 * 2 / 7)):
        assert found[first, second] / 4000 == pytest.approx(chance, abs=0.03)


def test_softmax_draws_every_order_as_often_as_it_should():
    """Pearson's statistic over the 24 orders of three of four tasks; 50 is its 99.9 % quantile."""
    weight, count = np.array([1.0, 2.0, 5.0, 0.5]), 20_000
    keys, score = jax.random.split(jax.random.key(4), count), 3 * jnp.log(jnp.array(weight, jnp.float32))
    ids = jax.vmap(lambda key: acquisition.softmax(key, score, batch_size=3, temperature=3.0))(keys)
    found, statistic = Counter(map(tuple, ids.tolist())), 0.0
    for a, b, c in itertools.permutations(range(4), 3):
        left = weight.sum() - weight[a]
        expected = count * weight[a] / weight.sum() * weight[b] / left * weight[c] / (left - weight[b])
        statistic += (found[a, b, c] - expected) ** 2 / expected
    assert statistic < 50


def test_softmax_over_a_sharded_table_is_the_same(mesh):
    score = jnp.linspace(-2, 2, 64)
    choose = jax.jit(lambda key, score: acquisition.softmax(key, score, batch_size=8))
    alone = choose(jax.random.key(2), score)
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score), alone)


def test_chance_of_an_informative_group_by_hand():
    assert acquisition.informative(jnp.array([0.0, 0.5, 0.9]), 2).tolist() == pytest.approx([0, 0.5, 0.18])
    state = BetaState(jnp.array([1.0, 2.0, 1e6]), jnp.array([1.0, 1.0, 1e6]))
    # Beta(1, 1), G = 2: 1 - 2 * 1/2 * 2/3; Beta(2, 1): 1 - 2/3 * 3/4 - 1/3 * 2/4; the last is p = 1/2
    found = acquisition.informative_beta(state, 2)
    assert found.tolist() == pytest.approx([1 / 3, 1 / 3, 0.5], abs=1e-6)
    assert float(acquisition.informative_beta(BetaState(jnp.array([1e6]), jnp.array([1.0])), 8)[0]) == pytest.approx(
        8e-6, rel=0.05
    )
    assert acquisition.signal(jnp.array([0.0, 0.25, 0.5])).tolist() == [0, 0.75, 1]


def test_per_token_and_cool_down_by_hand():
    utility = jnp.array([0.6, 0.6, 0.9, 0.3])
    assert acquisition.per_token(utility, jnp.array([10.0, 30.0, 0.0, NAN])).tolist() == pytest.approx(
        [0.06, 0.02, 0.045, 0.015]
    )
    assert acquisition.per_token(utility, jnp.zeros(4)).tolist() == utility.tolist()
    cooled = acquisition.cool_down(utility, jnp.array([9, 0, 2, 3]), steps=3)
    assert np.argsort(-cooled).tolist() == [0, 3, 2, 1]
    assert topk.largest(jax.random.key(0), cooled, batch_size=2).tolist() == [0, 3]


def test_softmax_draws_from_what_is_not_excluded_by_hand():
    score, exclude = jnp.log(jnp.array([1.0, 9.0, 2.0, 5.0])), jnp.arange(4) == 1
    keys = jax.random.split(jax.random.key(3), 4000)
    ids = jax.vmap(lambda key: acquisition.softmax(key, score, batch_size=1, exclude=exclude)[0])(keys)
    share = np.bincount(ids, minlength=4) / 4000
    assert share == pytest.approx(np.array([1, 0, 2, 5]) / 8, abs=0.03)


def test_epochs_go_by_the_least_visited_task_that_is_not_excluded():
    visits, exclude = jnp.array([0, 1, 2, 1, 3]), jnp.arange(5) == 0
    assert acquisition.epoch(visits).tolist() == [0, 1, 1, 1, 1]
    assert acquisition.epoch(visits, exclude=exclude).tolist() == [0, 0, 1, 0, 1]
    quota = topk.Quota(jnp.array([0, 0, 0, 1, 1]), jnp.array([1, 1, 0, 0, 0]))
    assert acquisition.epoch(visits, quota=quota).tolist() == [0, 1, 1, 0, 1]
    assert acquisition.epoch(visits, quota=quota, exclude=exclude).tolist() == [0, 0, 1, 0, 1]


def priced_batches(*, keys=4000, interest=(0.0, 0.1, 0.0, 1.0, 0.5), **options):
    """The share of keys with which `acquisition.priced` chooses each batch of 3 from five tasks."""
    utility, interest = jnp.array([0.9, 0.8, 0.5, 0.1, 0.1]), jnp.array(interest)
    choose = jax.vmap(
        lambda key: jnp.sort(acquisition.priced(key, utility, interest, batch_size=3, weight=2.0, **options))
    )
    batches, count = np.unique(choose(jax.random.split(jax.random.key(0), keys)), axis=0, return_counts=True)
    return {tuple(batch): n / keys for batch, n in zip(batches.tolist(), count.tolist(), strict=True)}


BATCHES = ((0, 1, 2), (0, 1, 3), (0, 3, 4), (1, 3, 4))  # with 0, 1, 2, 3 places for the curious ranking 3, 4, 1


@pytest.mark.parametrize(
    ("price", "shares"),
    # The best, 0, 1 and 2, have 2.2. One place leaves 0.1 + 0.9 + 0.8, two 0.1 + 0.1 + 0.9, three 0.1 + 0.1 + 0.8:
    # the first costs 0.4, the second 0.7 more, the third 0.1 more.
    [
        (0.0, (1, 0, 0, 0)),
        (0.1, (0.18 / 0.4, 0.22 / 0.4, 0, 0)),
        (0.2, (0, 0.66 / 0.7, 0.04 / 0.7, 0)),
        (0.4, (0, 0.22 / 0.7, 0.48 / 0.7, 0)),
        (0.51, (0, 0, 0.078 / 0.1, 0.022 / 0.1)),
        (1.0, (0, 0, 0, 1)),
    ],
)
def test_the_curious_ranking_gets_as_many_places_as_the_price_pays_for(price, shares):
    found = priced_batches(price=price)
    assert set(found) == {batch for batch, share in zip(BATCHES, shares, strict=True) if share}
    assert [found.get(batch, 0) for batch in BATCHES] == pytest.approx(shares, abs=0.03)


def test_a_place_for_one_of_the_best_costs_less_than_nothing():
    """The curious ranking is 0, 3, 4: one place leaves 0.9 + 0.9 + 0.8, two 0.9 + 0.1 + 0.9. Of 0.25 + 0.4, 0.7."""
    found = priced_batches(price=0.25 / 2.2, interest=(1.0, 0.0, 0.0, 0.9, 0.8))
    assert found == pytest.approx({(0, 1, 2): 0.05 / 0.7, (0, 1, 3): 0.65 / 0.7}, abs=0.03)


@pytest.mark.parametrize(
    ("price", "chance", "places"),
    # The best have 2.2, by chance three of 0.48 have 1.44: 0.76 to spend where one place costs 0.4 and two 1.1.
    [
        (0.0, 0.48, 0),
        (0.25, 0.48, 0.19 / 0.4),
        (0.5, 0.48, 0.38 / 0.4),
        (1.0, 0.48, 1 + 0.36 / 0.7),
        (1.0, 0.9, 0),
        (lambda gain: gain, 0.48, 0.76 * 0.76 / 2.2 / 0.4),  # 0.76 is the share 0.76 / 2.2 of the sum
        (lambda gain: gain + 1, 0.9, 0),
    ],
)
def test_the_price_is_a_share_of_what_is_above_chance(price, chance, places):
    found = priced_batches(price=price, chance=chance)  # chance can be better than the best: nothing to pay with
    assert sum(BATCHES.index(batch) * share for batch, share in found.items()) == pytest.approx(places, abs=0.03)


def test_tasks_that_come_first_have_their_places_at_any_price_and_count_in_it():
    def found(price, *first):
        return priced_batches(price=price, first=jnp.array([*first, 5]))

    assert found(0.0, 4) == {(0, 1, 4): 1}
    assert found(0.0, 2, 4) == {(0, 2, 4): 1}
    # 4 costs 0.4 of 0.88, then 3 would cost 0.7.
    assert found(0.4, 4) == pytest.approx({(0, 1, 4): 0.22 / 0.7, (0, 3, 4): 0.48 / 0.7}, abs=0.03)
    assert found(0.5, 4) == {(0, 3, 4): 1}


def test_of_utilities_that_are_alike_the_preferred_are_taken():
    utility, preference = jnp.array([0.9, 0.88, 0.85, 0.8, 0.4]), jnp.array([0.0, 1.0, 5.0, 9.0, 9.0])
    interest = jnp.array([0.0, 0.0, 0.0, 0.0, 1.0])  # more than a price of 0 pays for

    def chosen(alike, **options):
        options = dict(batch_size=2, weight=1.0, price=0.0, preference=preference, alike=alike) | options
        return sorted(acquisition.priced(jax.random.key(0), utility, interest, **options).tolist())

    assert [chosen(alike) for alike in (0.0, 0.02, 0.04, 0.1)] == [[0, 1], [0, 1], [1, 2], [2, 3]]
    assert chosen(0.1, first=jnp.zeros(1, int)) == [0, 3]
    quota = topk.Quota(jnp.array([0, 0, 0, 1, 1]), jnp.array([1, 1, 0, 0, 0]))
    assert chosen(0.04, quota=quota) == [1, 3]  # 4 is not like 3, its domain's best, and 2 not like 0, its own's
    assert chosen(0.06, quota=quota) == [2, 3]


@pytest.mark.parametrize("balance", ["proportional", "equal"])
def test_quotas_over_a_sharded_table_are_the_same(mesh, balance):
    rng = np.random.default_rng(0)
    score, domain = jnp.array(rng.integers(0, 9, 64), jnp.float32), jnp.array(np.sort(rng.integers(0, 4, 64) ** 2))
    choose = jax.jit(
        lambda key, score, domain: acquisition.softmax(
            key, score, batch_size=10, quota=topk.quota(key, Tasks(domain=domain), batch_size=10, balance=balance)
        )
    )
    alone = choose(jax.random.key(2), score, domain)
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score, domain), alone)


def test_what_chance_is_worth_by_hand():
    """Two places among 0.9, 0.8 and 0.7, one among 0.1 and 0.2, none for a task that is excluded."""
    utility = jnp.array([0.9, 0.8, 0.7, 0.1, 0.2, 0.6])
    quota = topk.Quota(jnp.array([0, 0, 0, 1, 1, 2]), jnp.array([2, 1, 0]))
    exclude = jnp.arange(6) == 5
    assert float(acquisition.by_chance(utility)) == pytest.approx(3.3 / 6)
    assert float(acquisition.by_chance(utility, exclude=exclude)) == pytest.approx(2.7 / 5)
    assert float(acquisition.by_chance(utility, quota)) == pytest.approx((2 * 0.8 + 0.15) / 3)
    one = quota._replace(domain=quota.domain.at[5].set(1))
    assert float(acquisition.by_chance(utility, one, exclude)) == pytest.approx((2 * 0.8 + 0.15) / 3)


def test_the_curious_ranking_keeps_to_the_quota():
    utility, interest = jnp.array([0.9, 0.8, 0.7, 0.1, 0.2]), jnp.array([0.0, 0.0, 0.0, 1.0, 0.5])
    quota = topk.Quota(jnp.array([0, 0, 0, 1, 1]), jnp.array([2, 1, 0, 0, 0]))
    options = dict(batch_size=3, weight=2.0, quota=quota)
    for price, chosen in ((0.0, [0, 1, 4]), (0.2, [0, 1, 3])):
        assert (
            sorted(acquisition.priced(jax.random.key(0), utility, interest, price=price, **options).tolist()) == chosen
        )
    # 2 costs 0.1 of 1.9: it has the place of 1, the least of the best in its domain, not that of 4.
    interest = jnp.array([0.0, 0.0, 0.5, 0.0, 0.0])
    for price, chosen in ((0.0, [0, 1, 4]), (0.06, [0, 2, 4])):
        assert (
            sorted(acquisition.priced(jax.random.key(0), utility, interest, price=price, **options).tolist()) == chosen
        )


FLOATS, INTS = jnp.zeros(4), jnp.zeros(4, int)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: acquisition.nearest(KEY, INTS, batch_size=1), "pass_rate is int32: its dtype must be float"),
        (lambda: acquisition.softmax(KEY, FLOATS[None], batch_size=1), r"score has shape \(1, 4\): it must be \[N\]"),
        (lambda: acquisition.informative(INTS, 8), "pass_rate is int32"),
        (lambda: acquisition.signal(INTS), "pass_rate is int32"),
        (lambda: acquisition.informative_beta(BetaState(FLOATS, FLOATS[1:]), 8), r"beta has shape \(3,\).*here \[4\]"),
        (lambda: acquisition.thompson(KEY, BetaState(FLOATS, INTS), batch_size=1), "beta is int32"),
        (lambda: acquisition.per_token(FLOATS, FLOATS[1:]), r"tokens has shape \(3,\)"),
        (lambda: acquisition.cool_down(FLOATS, FLOATS[1:], steps=1), r"since has shape \(3,\)"),
        (lambda: acquisition.epoch(FLOATS), "visits is float32: its dtype must be int"),
        (lambda: acquisition.by_chance(FLOATS, exclude=FLOATS[1:] > 0), r"exclude has shape \(3,\)"),
        (
            lambda: acquisition.priced(KEY, FLOATS, FLOATS[1:], batch_size=1, weight=1.0, price=0.0),
            r"interest has shape \(3,\): it must be \[N\], here \[4\]",
        ),
    ],
)
def test_an_argument_of_another_shape_or_dtype_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
