from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.select import adaptive, features, logit, selectors
from jaxrft.types import Feedback, InputError, Tasks


def keys(number):
    return jax.random.split(jax.random.key(0), number)


def floats(*values):
    return jnp.array(values, jnp.float32)


# What many small tests call is compiled once for each shape.
SELECTOR = selectors.adaptive(16)
update = jax.jit(SELECTOR.update)
moments = jax.jit(logit.moments, static_argnames="num_generations")
observe = jax.jit(logit.observe)


def test_moments_agree_with_draws():
    mean, variance = floats(-3.0, 0.0, 1.0), floats(1.0, 0.25, 4.0)
    found = moments(mean, variance, num_generations=8)
    draws = np.random.default_rng(0).normal(np.array(mean), np.sqrt(variance), (200_000, 3))
    rates = 1 / (1 + np.exp(-draws))
    np.testing.assert_allclose(found.pass_rate, rates.mean(axis=0), atol=3e-3)
    np.testing.assert_allclose(found.variance, rates.var(axis=0), atol=3e-3)
    np.testing.assert_allclose(
        found.informative, (1 - rates**8 - (1 - rates) ** 8).mean(axis=0), atol=2e-2
    )
    certain = moments(floats(0.0), floats(1e-8), num_generations=2)
    assert [float(x[0]) for x in certain] == pytest.approx([0.5, 0.0, 0.5], abs=1e-6)


def test_observation_by_hand():
    """The mode solves s - n p = (x - m) / v: with m = 0 and v = 1, p = 3/4 at x = ln 3 for s = 6 +
    ln 3 of n = 8.
    """
    log3 = float(np.log(3))
    mean, variance = observe(floats(0.0), floats(1.0), floats(6 + log3), floats(8.0))
    assert float(mean[0]) == pytest.approx(log3, abs=1e-5)
    assert float(variance[0]) == pytest.approx(1 / (8 * 3 / 16 + 1), rel=1e-5)
    far, _ = observe(floats(-8.0, 8.0), floats(25.0, 25.0), floats(16.0, 0.0), floats(16.0, 16.0))
    assert float(far[0]) > 2 and float(far[0]) == pytest.approx(-float(far[1]), abs=1e-4)


def test_squared_innovation_by_hand():
    believed = logit.Moments(floats(0.5, 0.25), floats(0.0, 0.02), floats(0.0, 0.0))
    found = logit.squared_innovation(believed, floats(8.0, 2.0), floats(8.0, 4.0))
    assert found.tolist() == pytest.approx([16 / 2, 1 / (4 * 3 / 16 + 12 * 0.02)])
    many = moments(floats(-1.0), floats(0.8), num_generations=8)
    rng = np.random.default_rng(1)
    rates = 1 / (1 + np.exp(-rng.normal(-1.0, np.sqrt(0.8), 100_000)))
    drawn = jnp.array(rng.binomial(8, rates), jnp.float32)
    assert float(logit.squared_innovation(many, drawn, jnp.float32(8)).mean()) == pytest.approx(
        1.0, abs=0.05
    )


LOG3 = float(np.log(3))
P = float(np.pi**2 / 3)


def test_first_update_by_hand():
    """The posterior mode of the logit is ln 3: q = 3/4, and s - 8 q = ln 3 / V with V = 2 pi^2 / 3.

    The information of the outcome is k = 8 * 3/16. Ability and offset have the same prior, so that
    each takes half.
    """
    successes = 6 + LOG3 / (2 * P)
    selector = selectors.adaptive(8)
    feedback = Feedback(jnp.array([1]), floats(successes), floats(8.0), floats(80.0))
    state = jax.jit(selector.update)(selector.init(Tasks(), 3), Tasks(), feedback)
    assert float(state.shared[0]) == pytest.approx(LOG3 / 2, rel=1e-5)
    assert state.mean.tolist() == pytest.approx([0, LOG3 / 2, 0], rel=1e-5)
    left = P / (1 + 1.5 * P)
    assert state.variance.tolist() == pytest.approx([0, left, 0], rel=1e-5)
    information = 1 / P + 1.5 / (1 + 1.5 * P)
    assert float(state.information[0, 0]) == pytest.approx(0.8 * information + 0.2 / P, rel=1e-5)
    assert float(state.spread) == pytest.approx((P + LOG3**2 / 4 + left) / 2, rel=1e-5)
    assert float(state.log_walk) == pytest.approx(np.log(P / 200))  # no task had been seen before
    assert state.visited.tolist() == [-1, 0, -1]
    assert int(state.step) == 1


def known(
    selector, num_tasks, *, mean=0.0, variance=0.01, ability=0.0, step=10, visited=0, **changes
):
    """Returns a state in which every task was rolled out at the step `visited`, and the ability is
    known.
    """
    state = selector.init(Tasks(), num_tasks)
    return state._replace(
        shared=state.shared.at[0].set(ability),
        information=state.information.at[0, 0].set(1e6),
        mean=jnp.full(num_tasks, mean, jnp.float32),
        variance=jnp.full(num_tasks, variance, jnp.float32),
        visited=jnp.full(num_tasks, visited, jnp.int32),
        step=jnp.int32(step),
        **changes,
    )


@pytest.mark.parametrize("successes", [8.0, 12.0])
def test_walk_follows_the_likelihood_gradient(successes):
    """Variance 1 at the last rollouts, and 0.1 in each of ten steps since: half of the logit's is
    due to the walk.
    """
    before = known(SELECTOR, 1, variance=1.0, log_walk=jnp.log(jnp.float32(0.1)))
    feedback = Feedback(jnp.array([0]), floats(successes), floats(16.0), floats(0.0))
    after = update(before, Tasks(), feedback)
    variance = float(moments(floats(0.0), floats(2.0), num_generations=16).variance[0])
    from_belief = 16 * 15 * variance
    share = 0.5 * from_belief / (from_belief + 4)
    square = (successes - 8) ** 2 / (from_belief + 4)
    moved = share * (square - 1) / 2 / (1 + share**2 / 2)
    assert float(after.log_walk - before.log_walk) == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("ability", [-200.0, 200.0])
def test_beliefs_stay_finite_where_a_pass_rate_rounds_to_0_or_1(ability):
    before = known(SELECTOR, 2, variance=1e-6, ability=ability, log_walk=jnp.float32(-30.0))
    hits = 16.0 if ability > 0 else 0.0
    feedback = Feedback(jnp.array([0]), floats(hits), floats(16.0), floats(0.0))
    after = update(before, Tasks(), feedback)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_change_point_resets_the_belief_about_a_task():
    """Two tasks are believed hopeless and one is solved. The other, solved once in 16, keeps what
    was known.
    """
    before = known(SELECTOR, 2, mean=-4.0, variance=0.1, ability=1.0, step=1)
    feedback = Feedback(jnp.arange(2), floats(16.0, 1.0), floats(16.0, 16.0), floats(0.0, 0.0))
    after = update(before, Tasks(), feedback)
    assert after.mean[0] > 0 and after.variance[0] > 0.5
    assert -4 < after.mean[1] < -3.5 and after.variance[1] < 0.12


def test_rollouts_of_a_task_inform_the_embedding_weights_once():
    """Even a logit that is known tells no more of w than phi^2 / spread, since offsets differ."""
    tasks = Tasks(embeddings=floats([1.0], [-1.0], [1.0], [-1.0]))
    before = SELECTOR.init(tasks, 4)
    feedback = Feedback(jnp.array([0]), floats(8.0), floats(16.0), floats(0.0))
    after = before
    for _ in range(30):
        after = update(after, tasks, feedback)
    gained = after.information[1, 1] - before.information[1, 1]
    most = before.features[0, 0] ** 2 / after.spread
    assert 0.1 * most < gained < most


def test_batch_without_rollouts_changes_no_belief():
    before = known(SELECTOR, 2)
    padding = Feedback(jnp.zeros(2, int), floats(0.0, 0.0), floats(0.0, 0.0), floats(0.0, 0.0))
    after = update(before, Tasks(), padding)
    for new, old in zip(
        jax.tree.leaves(after._replace(spread=before.spread)), jax.tree.leaves(before), strict=True
    ):
        np.testing.assert_array_equal(new, old)


def test_domain_predicts_tasks_that_were_not_rolled_out():
    tasks = Tasks(domain=jnp.arange(40, dtype=jnp.int32) % 2)
    state = SELECTOR.init(tasks, 40)
    for step in range(4):
        ids = jnp.arange(4) + 4 * step
        state = update(
            state,
            tasks,
            Feedback(ids, jnp.where(ids % 2, 15.0, 1.0), jnp.full(4, 16.0), jnp.zeros(4)),
        )
    unseen = jax.jit(SELECTOR.pass_rate)(state, tasks)[20:]
    assert (unseen[::2] < 0.3).all() and (unseen[1::2] > 0.7).all()


def test_features_of_domains_and_embeddings_and_errors_for_broken_ones():
    tasks = Tasks(embeddings=jnp.array(np.random.default_rng(0).normal(size=(50, 40)), jnp.float32))
    describe = jax.jit(features.describe, static_argnums=1)
    features_of_tasks = describe(tasks._replace(domain=jnp.arange(50) % 3), 50)
    assert features_of_tasks.shape == (50, 48) and np.allclose(
        (features_of_tasks[:, 16:] ** 2).sum(axis=1).mean(), 1, atol=1e-4
    )
    untold = features.describe(Tasks(), 50)
    assert untold.shape == (50, 1) and not untold.any()
    assert not describe(Tasks(embeddings=jnp.ones((50, 4))), 50).any()
    broken = np.array(tasks.embeddings)
    broken[7, 3] = np.nan
    selector = selectors.adaptive(8)
    with pytest.raises(
        InputError, match="embeddings of 1 tasks are not finite, first of task 7: leave"
    ):
        selector.init(Tasks(embeddings=broken), 50)
    with pytest.raises(
        InputError,
        match=r"domains have shape \(3,\): there must be one for "
        r"each of 50 tasks",
    ):
        selector.init(Tasks(domain=jnp.arange(3)), 50)


def play(selector, rates, steps, *, batch_size, seed=0, tasks=None):
    """(ids [steps, B], squared error [steps], informative groups [steps, B]) at the pass rates
    [steps, N].
    """
    tasks = Tasks() if tasks is None else tasks
    group = 16

    def step(state, x):
        key, truth = x
        keys = jax.random.split(key)
        error = jnp.mean((selector.pass_rate(state, tasks) - truth) ** 2)
        choice, state = selector.select(keys[0], state, tasks, batch_size=batch_size)
        count = jnp.full(choice.ids.shape, float(group))
        hits = jax.random.uniform(keys[1], (*choice.ids.shape, group)) < truth[choice.ids][:, None]
        successes = hits.sum(axis=1).astype(jnp.float32)
        state = selector.update(state, tasks, Feedback(choice.ids, successes, count, count))
        return state, (choice.ids, error, (successes > 0) & (successes < group))

    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.jit(
        lambda: jax.lax.scan(step, selector.init(tasks, rates.shape[1]), (keys, rates))[1]
    )()


def logits(num_tasks, seed=0):
    return 2.5 * np.random.default_rng(seed).normal(size=num_tasks)


def sigmoid(x):
    return jnp.array(1 / (1 + np.exp(-x)), jnp.float32)


def test_finds_informative_tasks_and_estimates_all_pass_rates():
    time = np.linspace(-2.5, 2.5, 200)[:, None]
    rates = sigmoid(1.2 * time + logits(200) - 1)
    ids, error, informative = play(selectors.adaptive(16), rates, 200, batch_size=16)
    uniform = float((1 - rates**16 - (1 - rates) ** 16).mean())
    assert uniform < 0.72 and float(informative.mean()) > 0.9
    assert float(error[30:].mean()) < 0.012
    assert len(np.unique(ids[-50:])) > 0.55 * 200


@pytest.mark.slow
def test_domains_with_different_trends_are_distinguished():
    """One improves, one stands still, one gets worse, one jumps; nobody says which task belongs
    where.
    """
    u = np.linspace(0, 1, 200)
    path = np.stack([4 * u - 2, 0 * u, 2 - 4 * u, np.where(u < 0.5, -2, 2)], axis=1)  # [steps, 4]
    rates = sigmoid(path[:, np.arange(240) % 4] + logits(240, 1) - 1)
    _, error, informative = play(selectors.adaptive(16), rates, 200, batch_size=16)
    assert float(informative.mean()) > 0.88
    # before and after the jump
    assert float(error[80:100].mean()) < 0.015 and float(error[160:].mean()) < 0.03


def test_matches_uniform_where_no_task_differs():
    """Rewards of pure noise: every task is as good as any other, and all of them are looked at."""
    ids, error, _ = play(selectors.adaptive(16), jnp.full((120, 64), 0.5), 120, batch_size=8)
    assert float(error[20:].mean()) < 0.02
    assert np.bincount(np.ravel(ids), minlength=64).min() >= 4


def choices(selector, state, *, batch_size, number=4000):
    """Returns the ids [number, B] of as many choices from one state."""
    choose = jax.vmap(partial(selector.select, batch_size=batch_size), (0, None, None))
    return jax.jit(choose)(keys(number), state, Tasks())[0].ids


def greedy(**options):
    return selectors.adaptive(16, kappa=0.0, epsilon=0.0, **options)


def test_utility_option_decides_the_ranking(monkeypatch):
    """Task 0 is 0.1 or 0.9, task 1 is 0.25: a group of either is informative, but 4 p (1 - p) is
    0.36 and 0.75.
    """
    monkeypatch.setattr(adaptive, "MOST_EXPLORATION", 0.0)
    monkeypatch.setattr(adaptive, "NEW_TOLERANCE", 0.0)
    believed = logit.Moments(floats(0.5, 0.25), floats(0.16, 0.0), floats(0.9, 0.8))
    monkeypatch.setattr(logit, "moments", lambda *arguments, **options: believed)
    for utility, best in (("informative", 0), ("signal", 1)):
        selector = greedy(utility=utility)
        assert np.unique(
            choices(selector, selector.init(Tasks(), 2), batch_size=1, number=9)
        ).tolist() == [best]


def test_per_token_divides_the_utility_by_the_length(monkeypatch):
    """Tasks 0 and 1 are worth 0.6 and 0.8; their rollouts took 10 and 20 tokens, or nobody
    knows.
    """
    monkeypatch.setattr(adaptive, "MOST_EXPLORATION", 0.0)
    selector = greedy(per_token=True)
    state = selector.init(Tasks(), 2)
    update_tokens = jax.jit(selector.update)
    rows = (((40.0, 80.0), 0), ((0.0, 0.0), 1), ((40.0, 0.0), 1), ((0.0, 80.0), 1))
    states = [
        update_tokens(
            state,
            Tasks(),
            Feedback(jnp.arange(2), floats(2.0, 2.0), floats(4.0, 4.0), floats(*tokens)),
        )
        for tokens, _ in rows
    ]
    # the second is padding
    half = Feedback(jnp.array([1, 0]), floats(2.0, 0.0), floats(4.0, 0.0), floats(80.0, 0.0))
    assert update_tokens(state, Tasks(), half).tokens.tolist() == [0, 20]
    believed = logit.Moments(floats(0.5, 0.5), floats(0.0, 0.0), floats(0.6, 0.8))
    monkeypatch.setattr(logit, "moments", lambda *arguments, **options: believed)
    for state, (_, best) in zip(states, rows, strict=True):
        assert np.unique(choices(selector, state, batch_size=1, number=9)).tolist() == [best]


@jax.jit
def choices_by_epsilon(state, epsilon):
    """Returns the ids [4000, 4] of choices, compiled once for every epsilon."""
    return choices(selectors.adaptive(16, kappa=0.0, epsilon=epsilon), state, batch_size=4)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7, 1.0])
def test_epsilon_is_the_share_of_slots_for_the_stalest_tasks(epsilon):
    """Of 64 tasks all known, 0 and 1 were never rolled out and 2 to 7 long ago; these eight have no
    chance of an informative group.
    """
    number = jnp.arange(64)
    state = known(
        SELECTOR, 64, variance=1e-6, step=100, log_walk=jnp.float32(-30.0), spread=jnp.float32(1e-6)
    )
    state = state._replace(
        visited=jnp.where(number < 2, -1, jnp.where(number < 8, number, 90)).astype(jnp.int32),
        mean=jnp.where(number < 8, -8.0, 0.0),
        shared=state.shared.at[0].set(0.0),
    )
    count = (choices_by_epsilon(state, epsilon) < 8).sum(axis=1)
    assert count.mean() == pytest.approx(4 * epsilon, abs=0.03)
    one = choices_by_epsilon(state, 0.25)
    assert set(one[one < 8].tolist()) == {0, 1}


def test_among_nearly_equal_tasks_the_stalest_are_chosen():
    """With G = 2 the utility is 2 p (1 - p), and 3/4 of the least of the two best is as good: 3/4 *
    0.48 = 0.36.

    It is 0.5, 0.48, 0.42, 0.32.
    """
    rates = np.array([0.5, 0.4, 0.3, 0.2])
    selector = selectors.adaptive(2, kappa=0.0, epsilon=0.0)
    state = known(selector, 4, variance=1e-6, log_walk=jnp.float32(-30.0))
    state = state._replace(
        mean=jnp.asarray(np.log(rates / (1 - rates)), jnp.float32),
        visited=jnp.array([9, 8, 7, 1], jnp.int32),
    )
    assert np.unique(choices(selector, state, batch_size=2, number=9)).tolist() == [1, 2]


@jax.jit
def greedy_choices(state):
    """Returns the ids [4000, 8] of choices without a share for revisits."""
    return choices(greedy(), state, batch_size=8)


@pytest.mark.parametrize("variance", [0.1, 1.0, 25.0])
def test_exploration_share_is_the_unknown_share_of_the_table(variance):
    """48 tasks are known to be 1/2; the logit of 16 has a variance. A uniform pass rate has
    1/12.
    """
    number = jnp.arange(64)
    state = known(SELECTOR, 64, variance=1e-6, step=1, log_walk=jnp.float32(-30.0))
    state = state._replace(
        variance=jnp.where(number < 16, variance, 1e-6), mean=jnp.where(number < 16, -2.0, 0.0)
    )
    each = float(moments(floats(-2.0), floats(variance), num_generations=16).variance[0])
    count = (greedy_choices(state) < 16).sum(axis=1)
    assert count.mean() == pytest.approx(8 * min(12 * each / 4, 0.5), abs=0.03)


@pytest.mark.slow
def test_per_token_saves_tokens():
    """Alike but for their length: half of the tasks take four times the tokens of the others."""
    tokens = jnp.where(jnp.arange(128) % 2 == 0, 100.0, 400.0)
    rates = sigmoid(np.tile(logits(128, 3), (80, 1)))
    spent, taught = {}, {}
    for per_token in (False, True):
        selector = selectors.adaptive(16, per_token=per_token)

        def update_with_tokens(state, tasks, feedback, update=selector.update):
            return update(
                state, tasks, feedback._replace(tokens=feedback.trials * tokens[feedback.ids])
            )

        ids, _, informative = play(
            selector._replace(update=update_with_tokens), rates, 80, batch_size=8
        )
        spent[per_token], taught[per_token] = float(tokens[ids].sum()), float(informative.sum())
    assert taught[True] / spent[True] > 1.2 * taught[False] / spent[False]
