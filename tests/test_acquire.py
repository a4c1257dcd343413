import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft import mesh as meshes
from jaxrft.select import acquire
from jaxrft.select.posterior import BetaState
from jaxrft.types import Tasks

NAN, INF = float("nan"), float("inf")
SIZES = (1, 5, 24)  # of batches from 24 tasks


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


def test_softmax_draws_every_order_as_often_as_it_should():
    """Pearson's statistic over the 24 orders of three of four tasks; 50 is its 99.9 % quantile."""
    weight, count = np.array([1.0, 2.0, 5.0, 0.5]), 20_000
    keys, score = jax.random.split(jax.random.key(4), count), 3 * jnp.log(jnp.array(weight, jnp.float32))
    ids = jax.vmap(lambda key: acquire.softmax(key, score, batch_size=3, temperature=3.0))(keys)
    found, statistic = Counter(map(tuple, ids.tolist())), 0.0
    for a, b, c in itertools.permutations(range(4), 3):
        left = weight.sum() - weight[a]
        expected = count * weight[a] / weight.sum() * weight[b] / left * weight[c] / (left - weight[b])
        statistic += (found[a, b, c] - expected) ** 2 / expected
    assert statistic < 50


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


def test_excluded_tasks_come_behind_nan():
    """Of six, -inf and inf are excluded, so that NaN comes before them."""
    score = jnp.array([NAN, INF, -INF, 2.0, NAN, 1.0])
    exclude = jnp.array([False, True, True, False, False, False])
    choose = jax.vmap(lambda key: acquire.smallest(key, score, batch_size=5, exclude=exclude))
    ids = choose(jax.random.split(jax.random.key(0), 200))
    assert set(map(tuple, ids[:, :2].tolist())) == {(5, 3)}
    assert set(map(tuple, ids[:, 2:4].tolist())) == {(0, 4), (4, 0)}
    last = Counter(ids[:, 4].tolist())  # 100 each, standard deviation 7
    assert set(last) == {1, 2} and abs(last[1] - 100) < 35


def test_what_is_not_excluded_is_drawn_as_if_there_were_nothing_else():
    """Pearson's statistic over the 20 pairs of five of eight tasks; 44 is its 99.9 % quantile."""
    exclude, count = jnp.isin(jnp.arange(8), jnp.array([0, 3, 4])), 10_000
    keys = jax.random.split(jax.random.key(6), count)
    ids = jax.vmap(lambda key: acquire.smallest(key, jnp.zeros(8), batch_size=2, exclude=exclude))(keys)
    found = Counter(map(tuple, ids.tolist()))
    pairs = [*itertools.permutations((1, 2, 5, 6, 7), 2)]
    assert set(found) <= set(pairs)
    assert sum((found[pair] - count / 20) ** 2 / (count / 20) for pair in pairs) < 44


def test_softmax_draws_from_what_is_not_excluded_by_hand():
    score, exclude = jnp.log(jnp.array([1.0, 9.0, 2.0, 5.0])), jnp.arange(4) == 1
    keys = jax.random.split(jax.random.key(3), 4000)
    ids = jax.vmap(lambda key: acquire.softmax(key, score, batch_size=1, exclude=exclude)[0])(keys)
    share = np.bincount(ids, minlength=4) / 4000
    assert share == pytest.approx(np.array([1, 0, 2, 5]) / 8, abs=0.03)


def test_epochs_go_by_the_least_visited_task_that_is_not_excluded():
    visits, exclude = jnp.array([0, 1, 2, 1, 3]), jnp.arange(5) == 0
    assert acquire.epoch(visits).tolist() == [0, 1, 1, 1, 1]
    assert acquire.epoch(visits, exclude=exclude).tolist() == [0, 0, 1, 0, 1]
    quota = acquire.Quota(jnp.array([0, 0, 0, 1, 1]), jnp.array([1, 1, 0, 0, 0]))
    assert acquire.epoch(visits, quota=quota).tolist() == [0, 1, 1, 0, 1]
    assert acquire.epoch(visits, quota=quota, exclude=exclude).tolist() == [0, 0, 1, 0, 1]


EXCLUDING = {
    size: jax.jit(lambda key, score, exclude, size=size: acquire.smallest(key, score, batch_size=size, exclude=exclude))
    for size in SIZES
}


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([*SIZES]),
    score=st.lists(st.sampled_from([*range(6), INF, -INF, NAN]), min_size=24, max_size=24).map(np.float32),
    exclude=st.lists(st.booleans(), min_size=24, max_size=24).map(np.array),
    seed=st.integers(0, 99),
)
def test_no_excluded_task_is_chosen_while_there_are_others(size, score, exclude, seed):
    ids = np.asarray(EXCLUDING[size](jax.random.key(seed), score, exclude))
    free = min(size, int((~exclude).sum()))
    assert len(set(ids.tolist())) == size
    assert not exclude[ids[:free]].any() and exclude[ids[free:]].all()
    assert np.array_equal(score[ids[:free]], np.sort(score[~exclude])[:free], equal_nan=True)


@pytest.mark.parametrize("batch_size", [8, 40])
@pytest.mark.parametrize("balance", ["none", "equal"])
def test_excluded_tasks_of_a_sharded_table_are_the_same(mesh, balance, batch_size):
    rng = np.random.default_rng(0)
    score, domain = jnp.array(rng.integers(0, 12, 64), jnp.float32).at[3].set(NAN), jnp.array(rng.integers(0, 3, 64))
    exclude = jnp.array(rng.random(64) < 0.5)

    @jax.jit
    def choose(key, score, exclude):
        tasks = Tasks(domain=domain)
        quota = acquire.quota(key, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        return acquire.smallest(key, score, batch_size=batch_size, quota=quota, exclude=exclude)

    alone = choose(jax.random.key(2), score, exclude)
    assert (~exclude[alone]).sum() == min(batch_size, int((~exclude).sum()))
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score, exclude), alone)


def priced_batches(*, keys=4000, interest=(0.0, 0.1, 0.0, 1.0, 0.5), **options):
    """The share of keys with which `acquire.priced` chooses each batch of 3 from five tasks."""
    utility, interest = jnp.array([0.9, 0.8, 0.5, 0.1, 0.1]), jnp.array(interest)
    choose = jax.vmap(lambda key: jnp.sort(acquire.priced(key, utility, interest, batch_size=3, weight=2.0, **options)))
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
        return sorted(acquire.priced(jax.random.key(0), utility, interest, **options).tolist())

    assert [chosen(alike) for alike in (0.0, 0.02, 0.04, 0.1)] == [[0, 1], [0, 1], [1, 2], [2, 3]]
    assert chosen(0.1, first=jnp.zeros(1, int)) == [0, 3]
    quota = acquire.Quota(jnp.array([0, 0, 0, 1, 1]), jnp.array([1, 1, 0, 0, 0]))
    assert chosen(0.04, quota=quota) == [1, 3]  # 4 is not like 3, its domain's best, and 2 not like 0, its own's
    assert chosen(0.06, quota=quota) == [2, 3]


def places(key, domain, batch_size, balance):
    return acquire.quota(key, Tasks(domain=jnp.asarray(domain)), batch_size=batch_size, balance=balance).places


def test_quotas_by_hand():
    domain, keys = jnp.array([2, 1, 2, 0, 2, 1, 2, 2]), jax.random.split(jax.random.key(0), 400)  # 1, 2 and 5 tasks
    assert acquire.quota(keys[0], Tasks(domain=domain), batch_size=4, balance="none") is None
    found = {
        (balance, size): jax.vmap(lambda key, b=balance, s=size: places(key, domain, s, b))(keys)[:, :3]
        for balance in ("equal", "proportional")
        for size in (4, 6, 8)
    }
    assert set(map(tuple, found["equal", 6].tolist())) == {(1, 2, 3)}  # small domains are rolled out whole
    assert set(map(tuple, found["equal", 4].tolist())) == {(1, 2, 1), (1, 1, 2)}
    assert found["equal", 4].mean(axis=0).tolist() == pytest.approx([1, 1.5, 1.5], abs=0.1)
    assert set(map(tuple, found["proportional", 4].tolist())) == {(0, 1, 3), (1, 1, 2)}
    assert found["proportional", 4].mean(axis=0).tolist() == pytest.approx([0.5, 1, 2.5], abs=0.1)
    assert set(map(tuple, found["proportional", 6].tolist())) == {(0, 2, 4), (1, 1, 4), (1, 2, 3)}
    assert found["proportional", 6].mean(axis=0).tolist() == pytest.approx([0.75, 1.5, 3.75], abs=0.1)
    assert all(set(map(tuple, found[balance, 8].tolist())) == {(1, 2, 5)} for balance in ("equal", "proportional"))


def test_quotas_among_candidates_count_these_alone():
    domain, among = jnp.array([0, 0, 0, 3, 3, 3]), jnp.array([5, 1, 2])
    quota = acquire.quota(jax.random.key(0), Tasks(domain=domain), batch_size=2, balance="equal", among=among)
    assert quota.domain.tolist() == [3, 0, 0] and quota.places.tolist() == [1, 0, 0, 1, 0, 0]


def test_places_of_a_large_table_do_not_overflow():
    domain = jnp.arange(3_000_000) % 3
    found = places(jax.random.key(0), domain, 1000, "proportional")
    assert sorted(found[:3].tolist()) == [333, 333, 334] and int(found.sum()) == 1000


def quota_of(key, domain, exclude, **options):
    return acquire.quota(key, Tasks(domain=domain), exclude=exclude, **options)


CHOOSE = {
    (balance, size): jax.jit(
        lambda key, score, domain, exclude=None, balance=balance, size=size: (
            (quota := quota_of(key, domain, exclude, batch_size=size, balance=balance)).places,
            acquire.smallest(key, score, batch_size=size, quota=quota, exclude=exclude),
        )
    )
    for balance in ("proportional", "equal")
    for size in SIZES
}


@settings(max_examples=40, deadline=None)
@given(
    balance=st.sampled_from(["proportional", "equal"]),
    size=st.sampled_from(SIZES),
    domain=st.lists(st.integers(0, 5), min_size=24, max_size=24).map(np.array),
    score=st.lists(st.sampled_from([*range(6), INF, NAN]), min_size=24, max_size=24).map(np.float32),
    seed=st.integers(0, 99),
)
def test_quotas_hold_whatever_the_domains_and_scores(balance, size, domain, score, seed):
    given_places, ids = map(np.asarray, CHOOSE[balance, size](jax.random.key(seed), score, domain))
    tasks = np.bincount(domain, minlength=24)
    assert len(set(ids.tolist())) == size == given_places.sum()
    assert np.array_equal(np.bincount(domain[ids], minlength=24), given_places) and (given_places <= tasks).all()
    assert np.array_equal(np.sort(score[ids]), score[ids], equal_nan=True)  # smallest first, NaN last
    for each in np.flatnonzero(given_places):
        best = np.sort(score[domain == each])[: given_places[each]]
        assert np.array_equal(score[ids][domain[ids] == each], best, equal_nan=True)
    if balance == "proportional":
        assert (np.abs(given_places - size * tasks / 24) < 1).all()
    else:  # a domain with more to give has at most one place less than any other
        assert (given_places[given_places < tasks] >= given_places.max() - 1).all()


@settings(max_examples=60, deadline=None)
@given(
    choose=st.sampled_from([*CHOOSE]),
    domain=st.lists(st.integers(0, 5), min_size=24, max_size=24).map(np.array),
    score=st.lists(st.sampled_from([*range(6), INF, NAN]), min_size=24, max_size=24).map(np.float32),
    exclude=st.lists(st.booleans(), min_size=24, max_size=24).map(np.array),
    seed=st.integers(0, 99),
)
def test_quotas_count_what_is_not_excluded(choose, domain, score, exclude, seed):
    _, size = choose
    given_places, ids = map(np.asarray, CHOOSE[choose](jax.random.key(seed), score, domain, exclude))
    free = np.bincount(domain[~exclude], minlength=24)
    chosen = ids[: min(size, free.sum())]
    assert len(set(ids.tolist())) == size and len(chosen) == given_places.sum()
    assert (given_places <= free).all() and not exclude[chosen].any() and exclude[ids[len(chosen) :]].all()
    assert np.array_equal(np.bincount(domain[chosen], minlength=24), given_places)
    for each in np.flatnonzero(given_places):
        best = np.sort(score[(domain == each) & ~exclude])[: given_places[each]]
        assert np.array_equal(score[chosen][domain[chosen] == each], best, equal_nan=True)


@pytest.mark.parametrize("balance", ["proportional", "equal"])
def test_quotas_over_a_sharded_table_are_the_same(mesh, balance):
    rng = np.random.default_rng(0)
    score, domain = jnp.array(rng.integers(0, 9, 64), jnp.float32), jnp.array(np.sort(rng.integers(0, 4, 64) ** 2))
    choose = jax.jit(
        lambda key, score, domain: acquire.softmax(
            key, score, batch_size=10, quota=acquire.quota(key, Tasks(domain=domain), batch_size=10, balance=balance)
        )
    )
    alone = choose(jax.random.key(2), score, domain)
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score, domain), alone)


def test_what_chance_is_worth_by_hand():
    """Two places among 0.9, 0.8 and 0.7, one among 0.1 and 0.2, none for a task that is excluded."""
    utility = jnp.array([0.9, 0.8, 0.7, 0.1, 0.2, 0.6])
    quota = acquire.Quota(jnp.array([0, 0, 0, 1, 1, 2]), jnp.array([2, 1, 0]))
    exclude = jnp.arange(6) == 5
    assert float(acquire.by_chance(utility)) == pytest.approx(3.3 / 6)
    assert float(acquire.by_chance(utility, exclude=exclude)) == pytest.approx(2.7 / 5)
    assert float(acquire.by_chance(utility, quota)) == pytest.approx((2 * 0.8 + 0.15) / 3)
    one = quota._replace(domain=quota.domain.at[5].set(1))
    assert float(acquire.by_chance(utility, one, exclude)) == pytest.approx((2 * 0.8 + 0.15) / 3)


def test_the_curious_ranking_keeps_to_the_quota():
    utility, interest = jnp.array([0.9, 0.8, 0.7, 0.1, 0.2]), jnp.array([0.0, 0.0, 0.0, 1.0, 0.5])
    quota = acquire.Quota(jnp.array([0, 0, 0, 1, 1]), jnp.array([2, 1, 0, 0, 0]))
    options = dict(batch_size=3, weight=2.0, quota=quota)
    for price, chosen in ((0.0, [0, 1, 4]), (0.2, [0, 1, 3])):
        assert sorted(acquire.priced(jax.random.key(0), utility, interest, price=price, **options).tolist()) == chosen
    # 2 costs 0.1 of 1.9: it has the place of 1, the least of the best in its domain, not that of 4.
    interest = jnp.array([0.0, 0.0, 0.5, 0.0, 0.0])
    for price, chosen in ((0.0, [0, 1, 4]), (0.06, [0, 2, 4])):
        assert sorted(acquire.priced(jax.random.key(0), utility, interest, price=price, **options).tolist()) == chosen
