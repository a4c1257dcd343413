import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft import mesh as meshes
from jaxrft.select import topk
from jaxrft.types import InputError, Tasks

NAN, INF = float("nan"), float("inf")
SIZES = (1, 5, 24)  # of batches from 24 tasks


@pytest.mark.parametrize("nan", [NAN, -NAN])
def test_nan_is_chosen_last_and_then_at_random(nan):
    score = jnp.array([nan, INF, nan, -INF])
    ids = jax.vmap(lambda key: topk.smallest(key, score, batch_size=3))(
        jax.random.split(jax.random.key(0), 32)
    )
    assert set(map(tuple, ids[:, :2].tolist())) == {(3, 1)}
    assert set(ids[:, 2].tolist()) == {0, 2}


def test_ties_are_broken_evenly_by_the_key():
    keys = jax.random.split(jax.random.key(1), 600)
    ids = jax.vmap(lambda key: topk.smallest(key, jnp.zeros(6), batch_size=2))(keys)
    counts = Counter(ids.ravel().tolist())  # 200 each, standard deviation 11.5
    assert set(counts) == set(range(6)) and max(abs(count - 200) for count in counts.values()) < 60


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "best-in-one-shard"])
@pytest.mark.parametrize(("num_tasks", "batch_size"), [(64, 8), (64, 40), (62, 8)])
def test_top_k_is_exact_and_the_same_on_a_mesh(mesh, num_tasks, batch_size, crowded):
    score = np.random.default_rng(0).integers(0, 12, num_tasks)
    score = jnp.array(np.sort(score) if crowded else score, jnp.float32).at[3].set(NAN)
    choose = jax.jit(lambda key, score: topk.smallest(key, score, batch_size=batch_size))
    alone = choose(jax.random.key(2), score)
    assert np.array_equal(score[alone], np.sort(score)[:batch_size])
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score), alone)


def test_a_sharded_table_is_not_gathered(mesh):
    score = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=meshes.sharding(mesh, "task"))
    with jax.set_mesh(mesh):
        choose = jax.jit(lambda key, score: topk.smallest(key, score, batch_size=8))
        program = choose.lower(jax.eval_shape(jax.random.key, 0), score).compile().as_text()
    assert "f32[1024]" in program  # a shard
    assert "f32[4096]" not in program and "f32[4,1024]" not in program


def test_excluded_tasks_sort_after_nan():
    """Of six, -inf and inf are excluded, so that NaN comes before them."""
    score = jnp.array([NAN, INF, -INF, 2.0, NAN, 1.0])
    exclude = jnp.array([False, True, True, False, False, False])
    choose = jax.vmap(lambda key: topk.smallest(key, score, batch_size=5, exclude=exclude))
    ids = choose(jax.random.split(jax.random.key(0), 200))
    assert set(map(tuple, ids[:, :2].tolist())) == {(5, 3)}
    assert set(map(tuple, ids[:, 2:4].tolist())) == {(0, 4), (4, 0)}
    last = Counter(ids[:, 4].tolist())  # 100 each, standard deviation 7
    assert set(last) == {1, 2} and abs(last[1] - 100) < 35


def test_exclusion_leaves_the_draw_among_other_tasks_unchanged():
    """Pearson's statistic over the 20 pairs of five of eight tasks; 44 is its 99.9 % quantile."""
    exclude, count = jnp.isin(jnp.arange(8), jnp.array([0, 3, 4])), 10_000
    keys = jax.random.split(jax.random.key(6), count)
    ids = jax.vmap(lambda key: topk.smallest(key, jnp.zeros(8), batch_size=2, exclude=exclude))(
        keys
    )
    found = Counter(map(tuple, ids.tolist()))
    pairs = [*itertools.permutations((1, 2, 5, 6, 7), 2)]
    assert set(found) <= set(pairs)
    assert sum((found[pair] - count / 20) ** 2 / (count / 20) for pair in pairs) < 44


EXCLUDING = {
    size: jax.jit(
        lambda key, score, exclude, size=size: topk.smallest(
            key, score, batch_size=size, exclude=exclude
        )
    )
    for size in SIZES
}


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([*SIZES]),
    score=st.lists(st.sampled_from([*range(6), INF, -INF, NAN]), min_size=24, max_size=24).map(
        np.float32
    ),
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
    score, domain = (
        jnp.array(rng.integers(0, 12, 64), jnp.float32).at[3].set(NAN),
        jnp.array(rng.integers(0, 3, 64)),
    )
    exclude = jnp.array(rng.random(64) < 0.5)

    @jax.jit
    def choose(key, score, exclude):
        tasks = Tasks(domain=domain)
        quota = topk.quota(key, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        return topk.smallest(key, score, batch_size=batch_size, quota=quota, exclude=exclude)

    alone = choose(jax.random.key(2), score, exclude)
    assert (~exclude[alone]).sum() == min(batch_size, int((~exclude).sum()))
    with jax.set_mesh(mesh):
        assert np.array_equal(choose(jax.random.key(2), score, exclude), alone)


def slots(key, domain, batch_size, balance):
    return topk.quota(
        key, Tasks(domain=jnp.asarray(domain)), batch_size=batch_size, balance=balance
    ).slots


def test_quotas_by_hand():
    # 1, 2 and 5 tasks
    domain, keys = jnp.array([2, 1, 2, 0, 2, 1, 2, 2]), jax.random.split(jax.random.key(0), 400)
    assert topk.quota(keys[0], Tasks(domain=domain), batch_size=4, balance="none") is None
    found = {
        (balance, size): jax.jit(
            jax.vmap(lambda key, b=balance, s=size: slots(key, domain, s, b)[:3])
        )(keys)
        for balance in ("equal", "proportional")
        for size in (4, 6, 8)
    }
    # small domains are rolled out whole
    assert set(map(tuple, found["equal", 6].tolist())) == {(1, 2, 3)}
    assert set(map(tuple, found["equal", 4].tolist())) == {(1, 2, 1), (1, 1, 2)}
    assert found["equal", 4].mean(axis=0).tolist() == pytest.approx([1, 1.5, 1.5], abs=0.1)
    assert set(map(tuple, found["proportional", 4].tolist())) == {(0, 1, 3), (1, 1, 2)}
    assert found["proportional", 4].mean(axis=0).tolist() == pytest.approx([0.5, 1, 2.5], abs=0.1)
    assert set(map(tuple, found["proportional", 6].tolist())) == {(0, 2, 4), (1, 1, 4), (1, 2, 3)}
    assert found["proportional", 6].mean(axis=0).tolist() == pytest.approx(
        [0.75, 1.5, 3.75], abs=0.1
    )
    assert all(
        set(map(tuple, found[balance, 8].tolist())) == {(1, 2, 5)}
        for balance in ("equal", "proportional")
    )


def test_quotas_among_candidates_count_candidates_only():
    domain, among = jnp.array([0, 0, 0, 3, 3, 3]), jnp.array([5, 1, 2])
    quota = topk.quota(
        jax.random.key(0), Tasks(domain=domain), batch_size=2, balance="equal", among=among
    )
    assert quota.domain.tolist() == [3, 0, 0] and quota.slots.tolist() == [1, 0, 0, 1, 0, 0]


def test_quotas_of_a_large_table_do_not_overflow():
    domain = jnp.arange(3_000_000) % 3
    found = slots(jax.random.key(0), domain, 1000, "proportional")
    assert sorted(found[:3].tolist()) == [333, 333, 334] and int(found.sum()) == 1000


def quota_of(key, domain, exclude, **options):
    return topk.quota(key, Tasks(domain=domain), exclude=exclude, **options)


CHOOSE = {
    (balance, size): jax.jit(
        lambda key, score, domain, exclude=None, balance=balance, size=size: (
            (quota := quota_of(key, domain, exclude, batch_size=size, balance=balance)).slots,
            topk.smallest(key, score, batch_size=size, quota=quota, exclude=exclude),
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
    score=st.lists(st.sampled_from([*range(6), INF, NAN]), min_size=24, max_size=24).map(
        np.float32
    ),
    seed=st.integers(0, 99),
)
def test_quotas_hold_whatever_the_domains_and_scores(balance, size, domain, score, seed):
    quota_slots, ids = map(np.asarray, CHOOSE[balance, size](jax.random.key(seed), score, domain))
    tasks = np.bincount(domain, minlength=24)
    assert len(set(ids.tolist())) == size == quota_slots.sum()
    assert (
        np.array_equal(np.bincount(domain[ids], minlength=24), quota_slots)
        and (quota_slots <= tasks).all()
    )
    # smallest first, NaN last
    assert np.array_equal(np.sort(score[ids]), score[ids], equal_nan=True)
    for each in np.flatnonzero(quota_slots):
        best = np.sort(score[domain == each])[: quota_slots[each]]
        assert np.array_equal(score[ids][domain[ids] == each], best, equal_nan=True)
    if balance == "proportional":
        assert (np.abs(quota_slots - size * tasks / 24) < 1).all()
    else:  # a domain with more to give has at most one place less than any other
        assert (quota_slots[quota_slots < tasks] >= quota_slots.max() - 1).all()


@settings(max_examples=60, deadline=None)
@given(
    choose=st.sampled_from([*CHOOSE]),
    domain=st.lists(st.integers(0, 5), min_size=24, max_size=24).map(np.array),
    score=st.lists(st.sampled_from([*range(6), INF, NAN]), min_size=24, max_size=24).map(
        np.float32
    ),
    exclude=st.lists(st.booleans(), min_size=24, max_size=24).map(np.array),
    seed=st.integers(0, 99),
)
def test_quotas_count_tasks_that_are_not_excluded(choose, domain, score, exclude, seed):
    _, size = choose
    quota_slots, ids = map(np.asarray, CHOOSE[choose](jax.random.key(seed), score, domain, exclude))
    free = np.bincount(domain[~exclude], minlength=24)
    chosen = ids[: min(size, free.sum())]
    assert len(set(ids.tolist())) == size and len(chosen) == quota_slots.sum()
    assert (
        (quota_slots <= free).all()
        and not exclude[chosen].any()
        and exclude[ids[len(chosen) :]].all()
    )
    assert np.array_equal(np.bincount(domain[chosen], minlength=24), quota_slots)
    for each in np.flatnonzero(quota_slots):
        best = np.sort(score[(domain == each) & ~exclude])[: quota_slots[each]]
        assert np.array_equal(score[chosen][domain[chosen] == each], best, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": jnp.zeros(3, bool)},
            r"exclude has shape \(3,\): it must be \[N\], here "
            r"\[4\]",
        ),
        ({"exclude": jnp.zeros(4)}, "exclude is float32: its dtype must be bool"),
        ({"quota": topk.Quota(jnp.zeros(3, int), jnp.ones(3, int))}, r"domain has shape \(3,\)"),
        ({"score": jnp.zeros((4, 1))}, r"score has shape \(4, 1\): it must be \[N\]"),
        ({"score": jnp.zeros(4, complex)}, "score is complex64"),
    ],
)
def test_an_argument_of_another_shape_or_dtype_is_named(options, message):
    options = {"score": jnp.zeros(4), "batch_size": 2} | options
    with pytest.raises(InputError, match=message):
        topk.smallest(jax.random.key(0), **options)
