from collections import deque
from functools import cache, partial

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft import mesh as meshes
from jaxrft.learn import grpo, replay
from jaxrft.learn.replay import Groups
from jaxrft.types import InputError

G, P, T = 3, 2, 4
ALIKE = (0.1, 0.1, 0.1)
DTYPES = {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32), jnp.dtype(jnp.bool_)}
HISTORIES = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12)


def make_groups(tasks, step, informative=None, scale=None):
    """Groups whose every number tells which task and step they are of; advantages of task i are
    +-scale[i] and 0.
    """
    tasks = np.asarray(tasks, np.int32)
    count = len(tasks)
    mark = (1000 * step + tasks).astype(np.float32)[:, None, None]
    rewards = np.broadcast_to(np.float32([0, 1, 0.5]), (count, G)).copy()
    if informative is not None:
        rewards[~np.asarray(informative)] = ALIKE
    scale = np.ones(count, np.float32) if scale is None else np.asarray(scale, np.float32)
    return Groups(
        prompts=jnp.asarray(np.broadcast_to(tasks[:, None], (count, P))),
        lengths=jnp.full(count, P, jnp.int32),
        tokens=jnp.asarray(np.broadcast_to(tasks[:, None, None], (count, G, T))),
        mask=jnp.ones((count, G, T), jnp.float32),
        logprobs=jnp.asarray(np.broadcast_to(-mark, (count, G, T))),
        advantages=jnp.asarray(scale[:, None] * np.float32([[1, -1, 0]])),
        rewards=jnp.asarray(rewards),
        valid=jnp.ones((count, G), bool),
        task=jnp.asarray(tasks),
        step=jnp.full(count, step, jnp.int32),
    )


@cache
def programs(**options):
    """(replay, its jitted draw and add) of batches of 4."""
    made = replay.ring(batch_size=4, **options)
    return made, jax.jit(made.draw), jax.jit(made.add, donate_argnums=0)


@cache
def compiled(function):
    return jax.jit(function)


def kept(buffer):
    """(task, step) of what is in the ring, oldest first."""
    capacity = len(buffer.groups.step)
    order = (int(buffer.next) + np.arange(capacity)) % capacity
    pairs = zip(
        np.asarray(buffer.groups.task)[order], np.asarray(buffer.groups.step)[order], strict=True
    )
    return [(int(task), int(step)) for task, step in pairs if step >= 0]


def names(groups):
    return list(zip(groups.task.tolist(), groups.step.tolist(), strict=True))


def filled(made, steps, **options):
    """A buffer after groups of tasks 10 * step + 0..3, a step each."""
    buffer = made.init(make_groups(range(4), 0))
    for step in steps:
        buffer = compiled(made.add)(
            buffer, make_groups(range(10 * step, 10 * step + 4), step, **options)
        )
    return buffer


# --------------------------------------------------------------------------------------------------
# worked by hand


def test_ring_drops_the_oldest_and_skips_uninformative_groups():
    made, _, add = programs(capacity=5)
    buffer = made.init(make_groups(range(4), 0))
    buffer = add(buffer, make_groups([1, 2, 3, 4], 0, informative=[True, False, True, True]))
    assert kept(buffer) == [(1, 0), (3, 0), (4, 0)] and int(buffer.next) == 3
    buffer = add(buffer, make_groups([5, 6, 7, 8], 1, informative=[False, True, True, True]))
    assert kept(buffer) == [(3, 0), (4, 0), (6, 1), (7, 1), (8, 1)] and int(buffer.next) == 1
    buffer = add(buffer, make_groups([9, 9, 9, 9], 2, informative=[False] * 4))
    assert kept(buffer) == [(3, 0), (4, 0), (6, 1), (7, 1), (8, 1)]


def test_ring_keeps_the_last_of_too_many_groups():
    made = replay.ring(capacity=2, batch_size=4)
    buffer = made.init(make_groups(range(4), 0))
    buffer = compiled(made.add)(buffer, make_groups([1, 2, 3, 4, 5], 7))
    assert kept(buffer) == [(4, 7), (5, 7)]


def test_informative_compares_valid_samples_only():
    made = replay.ring(capacity=6, batch_size=4)
    groups = make_groups(range(6), 0)
    _ = None
    given = [
        ALIKE,
        (0.1, 0.1, 0.1000001),
        (0.3, _, 0.3),
        (_, 0.0, 1.0),
        (_, _, 1.0),
        (0.0, 1.0, 0.0),
    ]
    rewards, valid = helpers.masked_rewards(given)
    mask = groups.mask.at[5].set(0.0)  # every completion of the last one is left out of the loss
    changed = {"rewards": jnp.array(rewards), "valid": jnp.array(valid), "mask": mask}
    buffer = compiled(made.add)(made.init(groups), groups._replace(**changed))
    assert kept(buffer) == [(1, 0), (3, 0)]
    assert buffer.groups.valid.tolist()[:3] == [[True] * 3, [False, True, True], [False] * 3]


def test_group_without_valid_reward_is_not_stored():
    """Whatever stands where no reward is valid, and though the buffer has no group yet."""
    made, draw, add = programs(capacity=8)
    groups = make_groups(range(4), 0)
    empty = made.init(groups)
    assert not empty.groups.valid.any() and not any(
        np.asarray(x).any() for x in empty.groups.rewards
    )
    assert int(made.fresh_needed(empty, jnp.int32(1))) == 4
    for garbage in (0.0, 1.0, np.nan):
        rewards = groups.rewards.at[:, 0].set(garbage)
        buffer = add(
            made.init(groups), groups._replace(rewards=rewards, valid=jnp.zeros((4, G), bool))
        )
        assert kept(buffer) == [] and int(buffer.next) == 0
    fresh = make_groups(range(90, 94), 1)
    batch, replayed = draw(jax.random.key(0), empty, fresh, jnp.int32(1))
    assert not replayed.any()
    chex.assert_trees_all_equal(batch, fresh)


def test_batch_is_fresh_groups_then_drawn_groups():
    made, draw, _ = programs(capacity=8)
    buffer = filled(made, [0, 1])
    fresh = make_groups([90, 91], 2)
    batch, replayed = draw(jax.random.key(0), buffer, fresh, jnp.int32(2))
    assert replayed.tolist() == [False, False, True, True]
    assert names(batch)[:2] == [(90, 2), (91, 2)] and len(set(names(batch))) == 4
    for task, step in names(batch)[2:]:
        index = batch.task.tolist().index(task)
        expected = make_groups([task], step)
        jax.tree.map(
            lambda x, y, i=index: np.testing.assert_array_equal(x[i], y[0]), batch, expected
        )


def test_fresh_needed_grows_while_the_buffer_is_short():
    made, draw, add = programs(capacity=8)
    buffer = made.init(make_groups(range(4), 0))
    assert int(made.fresh_needed(buffer, jnp.int32(0))) == 4
    buffer = add(buffer, make_groups([1, 2, 3, 4], 0, informative=[False, False, True, False]))
    assert int(made.fresh_needed(buffer, jnp.int32(1))) == 3
    for count in (3, 4):
        batch, replayed = draw(
            jax.random.key(0), buffer, make_groups(range(90, 90 + count), 1), jnp.int32(1)
        )
        assert names(batch) == [(90, 1), (91, 1), (92, 1), (3, 0)] and replayed.tolist() == [
            False
        ] * 3 + [True]
    # one too few: to be seen
    batch, _ = draw(jax.random.key(0), buffer, make_groups([90, 91], 1), jnp.int32(1))
    assert (
        batch.valid.any(axis=1).tolist()
        == batch.mask.any(axis=(1, 2)).tolist()
        == [True, True, False, True]
    )
    assert not any(np.asarray(x)[2].any() for x in jax.tree.leaves(batch))


def test_groups_older_than_max_age_are_not_drawn():
    made, draw, _ = programs(capacity=8, max_age=2)
    buffer = filled(made, [3, 4])
    fresh = [3, 4, 5, 6, 7]
    assert [int(made.fresh_needed(buffer, jnp.int32(step))) for step in fresh] == [4, 2, 2, 2, 4]
    _, replayed = draw(jax.random.key(0), buffer, make_groups(range(4), 7), jnp.int32(7))
    assert not replayed.any()
    batch, _ = draw(jax.random.key(0), buffer, make_groups(range(2), 6), jnp.int32(6))
    assert batch.step.tolist() == [6, 6, 4, 4]


def test_a_group_is_not_drawn_in_its_own_step_even_if_it_was_added_before():
    made, draw, add = programs(capacity=8)
    fresh = make_groups(range(4), 5)
    batch, replayed = draw(jax.random.key(0), add(filled(made, []), fresh), fresh, jnp.int32(5))
    assert not replayed.any() and names(batch) == names(fresh)


@pytest.mark.parametrize("form", list(replay.WEIGHTS))
def test_draw_chances_follow_the_weights(form):
    """Mean |A| of tasks 0..3 is 2/3 (1, 1, 2, 4): a single draw takes them with chances 1/8, 1/8,
    1/4 and 1/2.
    """
    made = replay.ring(capacity=4, batch_size=4, fresh_fraction=0.75, draw=form)
    buffer = filled(made, [0], scale=[1, 1, 2, 4])
    keys = jax.random.split(jax.random.key(1), 4000)
    fresh = make_groups(range(90, 93), 1)
    drawn = jax.jit(jax.vmap(lambda key: made.draw(key, buffer, fresh, jnp.int32(1))[0].task[3]))(
        keys
    )
    expected = {"uniform": [0.25] * 4, "advantage": [1 / 8, 1 / 8, 1 / 4, 1 / 2]}[form]
    # over 3.5 deviations
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, expected, atol=0.03)


def test_zero_weight_groups_are_drawn_last():
    made, draw, _ = programs(capacity=8, draw="advantage")
    buffer = filled(made, [0], scale=[0, 0, 0, 1e-30])
    for seed in range(10):
        batch, replayed = draw(
            jax.random.key(seed), buffer, make_groups(range(90, 92), 1), jnp.int32(1)
        )
        assert replayed[2:].all() and 3 in batch.task[2:].tolist()


# ------------------------------------------------------------------------------------------------------  # noqa: E501
# properties


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    HISTORIES,
    st.sampled_from([None, 1, 3]),
    st.sampled_from(list(replay.WEIGHTS)),
    st.integers(0, 2**31 - 1),
)
def test_any_history_agrees_with_a_queue(history, max_age, form, seed):
    """No group twice nor of its own step or too old, oldest out first, batches whole, every place
    used.
    """
    made, draw, add = programs(capacity=6, max_age=max_age, draw=form)
    buffer, queue = made.init(make_groups(range(4), 0)), deque(maxlen=6)
    for step, informative in enumerate(history):
        fresh = make_groups(range(4), step, informative=informative)
        may = {pair for pair in queue if max_age is None or step - pair[1] <= max_age}
        assert int(made.fresh_needed(buffer, jnp.int32(step))) == 4 - min(2, len(may))
        key = jax.random.fold_in(jax.random.key(seed), step)
        batch, replayed = draw(key, buffer, fresh, jnp.int32(step))
        replayed, named = np.asarray(replayed), names(batch)
        assert len(set(named)) == 4 and replayed.sum() == min(2, len(may))
        assert {pair for pair, old in zip(named, replayed, strict=True) if old} <= may
        assert [pair for pair, old in zip(named, replayed, strict=True) if not old] == names(fresh)[
            : 4 - replayed.sum()
        ]
        assert all(
            np.isfinite(x).all()
            for x in (batch.advantages, batch.rewards, batch.mask, batch.logprobs)
        )
        buffer = add(buffer, fresh)
        queue.extend(pair for pair, good in zip(names(fresh), informative, strict=True) if good)
        assert kept(buffer) == list(queue)


# --------------------------------------------------------------------------------------------- jit,
# scan and meshes


def history(made, groups, key):
    """The last buffer and all batches of a scan over steps of `groups` [S, B, ...]."""

    def step(buffer, fresh):
        at = fresh.step[0]
        drawn = made.draw(jax.random.fold_in(key, at), buffer, fresh, at)
        return made.add(buffer, fresh), drawn

    return jax.lax.scan(step, made.init(jax.tree.map(lambda x: x[0], groups)), groups)


def many_steps(batch_size):
    rng = np.random.default_rng(0)
    steps = [
        make_groups(
            range(batch_size),
            step,
            informative=rng.random(batch_size) < 0.6,
            scale=rng.random(batch_size),
        )
        for step in range(6)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *steps)


@pytest.mark.parametrize(  # a multiple of the 8 devices, and not
    "capacity", [16, pytest.param(15, marks=pytest.mark.slow)]
)
def test_on_a_mesh_the_same_bit_for_bit(capacity):
    made = replay.ring(capacity=capacity, batch_size=8, draw="advantage")
    groups, key = many_steps(8), jax.random.key(3)
    alone = jax.jit(partial(history, made))(groups, key)
    mesh = meshes.make(4, 2, 1)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda x: meshes.from_host(mesh, np.asarray(x), None, "batch"), groups
        )
        buffer, (batches, replayed) = jax.jit(partial(history, made))(spread, key)
        if capacity == 16:
            rows = meshes.sharding(mesh, "batch", None, None)
            added = jax.jit(made.add)(buffer, jax.tree.map(lambda x: x[0], spread)).groups.tokens
            assert added.sharding.is_equivalent_to(rows, added.ndim)
    chex.assert_trees_all_equal((buffer, (batches, replayed)), alone)
    assert replayed.sum() > 8


def test_one_trace_and_a_state_that_keeps_its_shapes_and_dtypes():
    made = replay.ring(capacity=6, batch_size=4)

    @partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(buffer, fresh, at):
        drawn, _ = made.draw(jax.random.fold_in(jax.random.key(0), at), buffer, fresh, at)
        return made.add(buffer, fresh), drawn

    buffer = made.init(make_groups(range(4), 0))
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), buffer)
    for at in range(4):
        buffer, batch = step(buffer, make_groups(range(4), at), jnp.int32(at))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), buffer) == before
    assert {x.dtype for x in jax.tree.leaves((buffer, batch))} == DTYPES


def test_buffer_stores_float32_int32_and_bool():
    made = replay.ring(capacity=6, batch_size=4)
    shorter = {"float32": jnp.bfloat16, "int32": jnp.int16, "bool": jnp.bool_}
    half = jax.tree.map(lambda x: x.astype(shorter[x.dtype.name]), make_groups(range(4), 1))
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), half)
    buffer = compiled(made.add)(made.init(described), half)
    batch, _ = compiled(made.draw)(jax.random.key(0), buffer, half, jnp.int32(2))
    assert {x.dtype for x in jax.tree.leaves((buffer, batch))} == DTYPES
    assert kept(buffer) == [(i, 1) for i in range(4)]


# ------------------------------------------------------------------------------------------- clip
# forms and metrics


def test_both_clip_centers_worked_by_hand():
    """mu = 1, before the update 2, now 2.2 and 2.6, A = 1: the range around the behavior policy
    ends at 1.2, that around the proximal policy at 2.4.
    """
    mu, proximal = jnp.zeros((1, 2)), jnp.log(jnp.full((1, 2), 2.0))
    now = jnp.log(jnp.array([[2.2, 2.6]]))
    loss = partial(
        grpo.policy_loss, behavior_logprobs=mu, advantages=jnp.ones((1, 1)), mask=jnp.ones((1, 2))
    )
    behavior_gradient = jax.grad(lambda x: loss(x)[0])(now)
    np.testing.assert_allclose(loss(now)[0], -1.2, rtol=1e-6)
    np.testing.assert_allclose(behavior_gradient, [[0, 0]])
    around_proximal = partial(loss, proximal_logprobs=proximal)
    proximal_gradient = jax.grad(lambda x: around_proximal(x)[0])(now)
    np.testing.assert_allclose(around_proximal(now)[0], -(2.2 + 2.4) / 2, rtol=1e-6)
    np.testing.assert_allclose(proximal_gradient, [[-2.2 / 2, 0]], rtol=1e-6)


def test_clip_centers_agree_on_fresh_groups():
    rng = np.random.default_rng(0)
    now, mu = (jnp.asarray(rng.normal(-1, 0.3, (4, 6)), jnp.float32) for _ in range(2))
    arrays = {"behavior_logprobs": mu, "advantages": jnp.ones((4, 1)), "mask": jnp.ones((4, 6))}
    one, other = (
        grpo.policy_loss(now, **arrays),
        grpo.policy_loss(now, **arrays, proximal_logprobs=mu),
    )
    chex.assert_trees_all_equal(one, other)


def test_metrics_worked_by_hand():
    groups = make_groups(range(4), 9)._replace(step=jnp.array([9, 9, 8, 3], jnp.int32))
    found = replay.metrics(groups, jnp.array([False, False, True, True]), jnp.int32(9))
    assert found["replay/fraction"] == 0.5 and found["replay/age"] == (1 + 6) / 2
    found = replay.metrics(groups, jnp.zeros(4, bool), jnp.int32(9))
    assert found["replay/fraction"] == 0 and np.isnan(found["replay/age"])
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.float32)}


def test_effective_sample_size_worked_by_hand():
    """Ratios 1, 1, 4 and a fourth under the mask: 36 / (3 * 18)."""
    mask = jnp.array([[1, 1], [1, 0]])
    behavior = jnp.array([[-1.0, -2.0], [-3.0, jnp.nan]])
    logprobs = behavior + jnp.log(jnp.array([[1.0, 1.0], [4.0, 9.0]]))
    moments = jax.jit(replay.weight_moments)(logprobs, behavior, mask)
    np.testing.assert_allclose(moments, [3, 6, 18], rtol=1e-6)
    np.testing.assert_allclose(replay.effective_sample_size(moments), 36 / 54, rtol=1e-6)
    np.testing.assert_allclose(replay.effective_sample_size(moments / 3), 36 / 54, rtol=1e-6)
    parts = sum(
        replay.weight_moments(*(x[i : i + 1] for x in (logprobs, behavior, mask))) for i in range(2)
    )
    np.testing.assert_allclose(parts, moments, rtol=1e-6)
    assert np.isnan(
        replay.effective_sample_size(replay.weight_moments(logprobs, behavior, jnp.zeros((2, 2))))
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=6).map(
        lambda x: (x + [0.0] * 6)[:6]
    )
)
def test_effective_sample_size_lies_between_one_token_and_all(log_ratios):
    row = jnp.array([log_ratios], jnp.float32)
    moments = replay.weight_moments(row, jnp.zeros_like(row), jnp.ones_like(row))
    assert 1 / 6 - 1e-6 <= float(replay.effective_sample_size(moments)) <= 1 + 1e-6


# ---------------------------------------------------------------------------------------------------------  # noqa: E501
# mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 1}, "capacity is 1: it must be at least the 2 groups"),
        (
            {"capacity": 8, "fresh_fraction": 1.0},
            "fresh_fraction 1.0 of batch_size 4 is 4 fresh groups",
        ),
        ({"capacity": 8, "fresh_fraction": 0.1}, "is 0 fresh groups"),
        ({"capacity": 8, "max_age": 0}, "max_age is 0"),
        ({"capacity": 8, "draw": "oldest"}, "draw is 'oldest': choose one of uniform, advantage"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(options, message):
    with pytest.raises(InputError, match=message):
        replay.ring(batch_size=4, **options)


def test_groups_of_another_shape_are_refused():
    made = replay.ring(capacity=8, batch_size=4)
    buffer, groups = filled(made, []), make_groups(range(4), 0)
    with pytest.raises(
        ValueError, match=r"tokens has shape \(4, 1, 4\): the buffer has \(4, 3, 4\)"
    ):
        made.add(buffer, groups._replace(tokens=groups.tokens[:, :1]))
    for wrong in (1, 5):
        with pytest.raises(ValueError, match=f"{wrong} fresh groups: there must be 2 to 4"):
            made.draw(jax.random.key(0), buffer, make_groups(range(wrong), 1), jnp.int32(1))
