from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.select import drift, features, logit, population, selectors
from jaxrft.types import Feedback, InputError, Tasks


@cache
def program(batch_size, **options):
    """The first state of a table, and many choices from a state, each by a key, as programs."""
    selector = selectors.adaptive(16, **options)
    choose = jax.vmap(partial(selector.select, batch_size=batch_size), (0, None, None))
    return jax.jit(selector.init, static_argnums=1), jax.jit(lambda *arguments: choose(*arguments)[0].ids)


def keys(number):
    return jax.random.split(jax.random.key(0), number)


def floats(*values):
    return jnp.array(values, jnp.float32)


def test_moments_agree_with_draws():
    mean, variance = floats(-3.0, 0.0, 1.0), floats(1.0, 0.25, 4.0)
    found = logit.moments(mean, variance, num_generations=8)
    draws = np.random.default_rng(0).normal(np.array(mean), np.sqrt(variance), (200_000, 3))
    rates = 1 / (1 + np.exp(-draws))
    np.testing.assert_allclose(found.pass_rate, rates.mean(axis=0), atol=3e-3)
    np.testing.assert_allclose(found.variance, rates.var(axis=0), atol=3e-3)
    np.testing.assert_allclose(found.informative, (1 - rates**8 - (1 - rates) ** 8).mean(axis=0), atol=2e-2)
    certain = logit.moments(floats(0.0), floats(1e-8), num_generations=2)
    assert [float(x[0]) for x in certain] == pytest.approx([0.5, 0.0, 0.5], abs=1e-6)


def test_observation_by_hand():
    """The mode solves s - n p = (x - m) / v: with m = 0 and v = 1, p = 3/4 at x = ln 3 for s = 6 + ln 3 of n = 8."""
    log3 = float(np.log(3))
    mean, variance = logit.observe(floats(0.0), floats(1.0), floats(6 + log3), floats(8.0))
    assert float(mean[0]) == pytest.approx(log3, abs=1e-5)
    assert float(variance[0]) == pytest.approx(1 / (8 * 3 / 16 + 1), rel=1e-5)
    far, _ = logit.observe(floats(-8.0, 8.0), floats(25.0, 25.0), floats(16.0, 0.0), floats(16.0, 16.0))
    assert float(far[0]) > 2 and float(far[0]) == pytest.approx(-float(far[1]), abs=1e-4)


def test_surprise_by_hand():
    believed = logit.Moments(floats(0.5, 0.25), floats(0.0, 0.02), floats(0.0, 0.0))
    found = logit.surprise(believed, floats(8.0, 2.0), floats(8.0, 4.0))
    assert found.tolist() == pytest.approx([16 / 2.05, 1 / (4 * 3 / 16 + 12 * 0.02 + 0.05)])
    many = logit.moments(floats(-1.0), floats(0.8), num_generations=8)
    rng = np.random.default_rng(1)
    rates = 1 / (1 + np.exp(-rng.normal(-1.0, np.sqrt(0.8), 100_000)))
    drawn = jnp.array(rng.binomial(8, rates), jnp.float32)
    assert float(logit.surprise(many, drawn, jnp.float32(8)).mean()) == pytest.approx(1.0, abs=0.05)


def test_drift_follows_a_policy_that_learns_and_its_shares_the_tasks_that_do():
    """0.05 logits a step, tasks seen 10 steps ago; none, half or all of the movement is theirs."""
    nothing, every = jnp.zeros((8, 0)), jnp.ones(8, bool)

    @jax.jit
    def after(state, own):
        moved = jnp.tile(floats(10 * 0.05, 0.0), (8, 1))
        innovation = own * moved[:, 0] - moved @ drift.shares(state)
        state = drift.update(state, nothing, innovation, jnp.full(8, 0.1), moved, every, ~every)
        return drift.advance(state)

    def shares(own):
        state = drift.init(0)
        for _ in range(60):
            state = after(state, own)
        return float(drift.shares(state)[0])

    assert [shares(own) for own in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.5, 1], abs=0.05)
    state, still = drift.init(0), jnp.zeros((8, 2))
    update = jax.jit(drift.update)
    for step in range(80):
        error = 0.05 * step - state.position[0]
        state = update(state, nothing, error * jnp.ones(8), jnp.full(8, 0.5), still, every, ~every)
        assert step < 40 or abs(float(error)) < 0.1
        state = drift.advance(state)
    assert float(state.position[1]) == pytest.approx(0.05, abs=0.01)
    padded = update(state, nothing, jnp.full(8, 9.0), jnp.ones(8), still, ~every, ~every)
    np.testing.assert_allclose(padded.position, state.position)
    np.testing.assert_allclose(padded.covariance, state.covariance)


def test_a_feature_moves_its_own_tasks_and_a_jump_at_once():
    """Tasks 0..3 have the first feature, 4..7 the second; the first domain is 3 logits above what was predicted."""
    told, every, still = jnp.eye(2)[jnp.arange(8) // 4], jnp.ones(8, bool), jnp.zeros((8, 2))
    innovation, variance = jnp.where(told[:, 0] > 0, 3.0, 0.0), jnp.full(8, 0.5)
    start = drift.advance(drift.init(2))._replace(covariance=jnp.diag(floats(0.01, 0, 0.01, 0.01)))
    slow, fast = (
        jax.jit(drift.update)(start, told, innovation, variance, still, every, jumped)
        for jumped in (~every, told[:, 0] > 0)
    )
    assert abs(float(slow.position[2])) < 0.3 and float(fast.position[2]) > 2.5
    assert abs(float(fast.position[3])) < 0.2
    np.testing.assert_allclose(
        drift.moved(fast, told)[::4], [[fast.position[0], fast.position[2]], [fast.position[0], fast.position[3]]]
    )


def test_the_population_believes_features_that_have_predicted_first_visits():
    """Eight kinds of tasks, 3 apart; told by a feature, or by one that says nothing."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 8, 400)
    truth = floats(*(3.0 * (kinds % 3 - 1) + 0.5 * rng.normal(size=400)))

    fit, earn = jax.jit(population.fit), jax.jit(population.earn)

    def after(told):
        state, rate = population.init(8), jax.nn.sigmoid(truth)
        for step in range(1, 9):
            batch, seen = jnp.arange(16) + 16 * step, jnp.arange(400) < 16 * step
            state = fit(state, told, truth, jnp.full(400, 0.3), seen)
            state = earn(state, told[batch], 16 * rate[batch], jnp.full(16, 16.0), jnp.ones(16, bool))
        return state, float(jnp.mean((population.predict(state, told @ state.weights)[0][200:] - truth[200:]) ** 2))

    useful, near = after(jnp.eye(8)[kinds])
    useless, far = after(jnp.eye(8)[rng.permutation(kinds)])
    assert float(useful.odds) > 2 > -1 > float(useless.odds)
    assert near < 0.6 < 4 < far < 1.1 * float(truth.var())


def test_what_is_told_becomes_features_and_what_is_broken_a_sentence():
    tasks = Tasks(embeddings=jnp.array(np.random.default_rng(0).normal(size=(50, 40)), jnp.float32))
    told = features.describe(tasks._replace(domain=jnp.arange(50) % 3), 50)
    assert told.shape == (50, 48) and np.allclose((told[:, 16:] ** 2).sum(axis=1).mean(), 1, atol=1e-4)
    assert features.describe(Tasks(), 50).shape == (50, 1) and not features.describe(Tasks(), 50).any()
    assert not features.describe(Tasks(embeddings=jnp.ones((50, 4))), 50).any()
    selector = selectors.adaptive(8)
    with pytest.raises(InputError, match="embeddings of 1 tasks are not finite, first of task 7: leave"):
        selector.init(Tasks(embeddings=tasks.embeddings.at[7, 3].set(jnp.nan)), 50)
    with pytest.raises(InputError, match=r"domains have shape \(3,\): there must be one for each of 50 tasks"):
        selector.init(Tasks(domain=jnp.arange(3)), 50)


def play(selector, rates, steps, *, batch_size, seed=0, tasks=None):
    """(ids [steps, B], squared error [steps], groups that teach [steps, B]) with pass rates [steps, N]."""
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
    return jax.jit(lambda: jax.lax.scan(step, selector.init(tasks, rates.shape[1]), (keys, rates))[1])()


def logits(num_tasks, seed=0):
    return 2.5 * np.random.default_rng(seed).normal(size=num_tasks)


def sigmoid(x):
    return jnp.array(1 / (1 + np.exp(-x)), jnp.float32)


def test_it_finds_the_tasks_that_teach_and_knows_the_others():
    time = np.linspace(-2.5, 2.5, 200)[:, None]
    rates = sigmoid(1.2 * time + logits(200) - 1)
    ids, error, informative = play(selectors.adaptive(16), rates, 200, batch_size=16)
    uniform = float((1 - rates**16 - (1 - rates) ** 16).mean())
    assert uniform < 0.72 and float(informative.mean()) > 0.9
    assert float(error[30:].mean()) < 0.012
    assert len(np.unique(ids[-50:])) > 0.55 * 200


def test_domains_that_move_apart_are_told_apart():
    """One improves, one stands still, one gets worse, one jumps; nobody says which task belongs where."""
    u = np.linspace(0, 1, 200)
    path = np.stack([4 * u - 2, 0 * u, 2 - 4 * u, np.where(u < 0.5, -2, 2)], axis=1)  # [steps, 4]
    rates = sigmoid(path[:, np.arange(240) % 4] + logits(240, 1) - 1)
    _, error, informative = play(selectors.adaptive(16), rates, 200, batch_size=16)
    assert float(informative.mean()) > 0.88
    assert float(error[80:100].mean()) < 0.015 and float(error[160:].mean()) < 0.03  # before and after the jump


def test_nothing_to_know_is_no_harm():
    """Rewards of pure noise: every task is as good as any other, and all of them are looked at."""
    ids, error, _ = play(selectors.adaptive(16), jnp.full((120, 64), 0.5), 120, batch_size=8)
    assert float(error[20:].mean()) < 0.02
    assert np.bincount(np.ravel(ids), minlength=64).min() >= 4


def test_a_cool_down_keeps_chosen_tasks_away():
    ids, _, _ = play(
        selectors.adaptive(16, cool_down=3, floor=0.0), sigmoid(np.tile(logits(24), (40, 1))), 40, batch_size=4
    )
    assert all(not set(ids[t].tolist()) & set(ids[t - d].tolist()) for t in range(3, 40) for d in (1, 2))


def test_the_utility_is_the_one_asked_for():
    """Task 0 is 0.1 or 0.9, task 1 is 0.25: a group of either teaches, but 4 p (1 - p) is 0.36 and 0.75."""
    believed = logit.Moments(floats(0.5, 0.25), floats(0.16, 0.0), floats(0.9, 0.8))
    for utility, best in (("informative", 0), ("signal", 1)):
        selector = selectors.adaptive(16, utility=utility, price=0.0, floor=0.0)
        state = selector.init(Tasks(), 2)._replace(believed=believed, visited=jnp.zeros(2, jnp.int32))
        select = jax.jit(partial(selector.select, batch_size=1))
        assert select(jax.random.key(0), state, Tasks())[0].ids.tolist() == [best]


def test_per_token_a_long_task_has_to_be_worth_its_length():
    """Tasks 0 and 1 are worth 0.6 and 0.8; their rollouts took 10 and 20 tokens, or nobody knows."""
    believed = logit.Moments(floats(0.5, 0.5), floats(0.0, 0.0), floats(0.6, 0.8))
    selector = selectors.adaptive(4, price=0.0, floor=0.0, per_token=True)
    state = selector.init(Tasks(), 2)

    select, update = jax.jit(partial(selector.select, batch_size=1)), jax.jit(selector.update)

    def best(state):
        state = state._replace(believed=believed, visited=jnp.zeros(2, jnp.int32))
        return select(jax.random.key(0), state, Tasks())[0].ids.tolist()

    for tokens, expected in (((40.0, 80.0), [0]), ((0.0, 0.0), [1]), ((40.0, 0.0), [1]), ((0.0, 80.0), [1])):
        seen = Feedback(jnp.arange(2), floats(2.0, 2.0), floats(4.0, 4.0), floats(*tokens))
        assert best(update(state, Tasks(), seen)) == expected
    half = Feedback(jnp.array([1, 0]), floats(2.0, 0.0), floats(4.0, 0.0), floats(80.0, 0.0))  # the second is padding
    assert update(state, Tasks(), half).tokens.tolist() == [0, 20]


@pytest.mark.slow
def test_per_token_saves_tokens():
    """Alike but for their length: half of the tasks take four times the tokens of the others."""
    tokens = jnp.where(jnp.arange(128) % 2 == 0, 100.0, 400.0)
    rates = sigmoid(np.tile(logits(128, 3), (80, 1)))
    spent, taught = {}, {}
    for per_token in (False, True):
        selector = selectors.adaptive(16, per_token=per_token)

        def told(state, tasks, feedback, update=selector.update):
            return update(state, tasks, feedback._replace(tokens=feedback.trials * tokens[feedback.ids]))

        ids, _, informative = play(selector._replace(update=told), rates, 80, batch_size=8)
        spent[per_token], taught[per_token] = float(tokens[ids].sum()), float(informative.sum())
    assert taught[True] / spent[True] > 1.2 * taught[False] / spent[False]


def new_tasks(worth, **population):
    """How often each of 100 new tasks that are worth so much is chosen in 500 batches of 8, with a `population`."""
    init, choose = program(8, price=0.0, floor=0.0)
    believed = logit.Moments(jnp.full(100, 0.5), jnp.zeros(100), jnp.asarray(worth, jnp.float32))
    state = init(Tasks(), 100)._replace(believed=believed)
    state = state._replace(population=state.population._replace(**population))
    return np.bincount(np.ravel(choose(keys(500), state, Tasks())), minlength=100)


def test_new_tasks_are_any_that_may_teach_rather_than_the_likeliest():
    """All tasks are new, and half of the places are for these: for any but the last ten, though twenty seem best."""
    count = new_tasks(np.repeat([1.0, 0.6, 0.2], (20, 70, 10)))
    assert count[90:].sum() == 0
    assert count[20:90].sum() == pytest.approx(500 * 4 * 70 / 90, rel=0.05)


def test_new_tasks_are_the_likeliest_and_more_as_far_as_features_have_turned_out_right():
    """Worth 0.2 + 0.75 s * 0.8, or half of the best, in 8 (0.5 + 0.5 s) places; s is 0 where nothing is said."""
    worth = np.repeat([1.0, 0.79, 0.501, 0.2], (20, 40, 30, 10))
    rows = ((0, 30.0, 90, 4), (1, -30.0, 90, 4), (1, 0.0, 90, 6), (1, 1.5, 60, 7.27), (1, 30.0, 20, 8))
    for weight, odds, among, places in rows:
        count = new_tasks(worth, odds=jnp.float32(odds), weights=jnp.full(1, float(weight)))
        assert count[among:].sum() == 0
        assert count[20:among].sum() == pytest.approx(500 * places * (among - 20) / among, rel=0.05)


def test_a_domain_is_not_left_unseen_for_long():
    """Three domains; the floor goes to the task longest not visited of the one of which none has been since step 5."""
    domain = jnp.arange(12, dtype=jnp.int32) % 3
    visited = jnp.array([1, 2, 3, 9, 9, 4, 9, 9, 5, 9, 9, 5], jnp.int32)
    init, choose = program(2, floor=1.0)
    for tasks, stalest in ((Tasks(domain=domain), 2), (Tasks(), 0)):
        state = init(tasks, 12)._replace(visited=visited, step=jnp.int32(10))
        assert (choose(keys(50), state, tasks) == stalest).any(axis=1).all()


@pytest.mark.parametrize(
    ("floor", "jumps", "chance"), [(0.0, 0.0, 0), (0.0, 0.0125, 0.5), (0.3, 0.0125, 0.5), (0.7, 0.0125, 0.7)]
)
def test_after_a_jump_the_stalest_task_is_looked_at(floor, jumps, chance):
    """Batches of 4: one jump has 0.1 * 1 / 4 of the smoothed share, half of it later is a chance of a half."""
    visited = jnp.arange(64, dtype=jnp.int32)
    teaches = jnp.where(visited == 0, -6.0, 0.0)  # the stalest task has nothing else in its favour
    init, choose = program(4, floor=floor, price=0.0)
    state = init(Tasks(), 64)._replace(
        believed=logit.moments(teaches, jnp.full(64, 0.01), num_generations=16),
        visited=visited,
        step=jnp.int32(64),
        jumps=jnp.float32(jumps),
    )
    looked = (choose(keys(4000), state, Tasks()) == 0).any(axis=1)
    assert looked.mean() == pytest.approx(chance, abs=0.03)


@pytest.mark.parametrize(
    ("num_tasks", "rest", "places"), [(64, 0.0, 2.84), (64, 0.68, 0.92), (64, 0.8, 0.40), (1024, 0.0, 0.72)]
)
def test_what_is_not_known_raises_the_price_of_knowing(num_tasks, rest, places):
    """Of 8 tasks worth 1 some are given up for new ones worth 0.6, a quarter of the table with variance 0.08.

    64 tasks, other ones hopeless: choosing gains 0.725, and 0.0425 (4 * 16 * 0.08 / 4 * 1.3)^3 of 8 * 0.725 pays for
    2.84 places of 0.4. Other ones worth 0.68: the gain is 0.3, the variance counts for 0.3 / 0.25, not 1.3, and 0.154
    of 8 * 0.3 pays for 0.92. Worth 0.8: the gain is 0.225, the variance counts as it is, and 0.089 of 8 * 0.225 pays
    for 0.40. 1,024 tasks: an eighth of the variance counts, less than a group's; 0.0425 of 8 (1 - 0.158) pays for 0.72.
    """
    number = np.arange(num_tasks)
    seen = number < num_tasks * 3 // 4
    new = new_places(seen, np.where(seen, np.where(number < 8, 1.0, rest), 0.6))
    assert np.unique(new).tolist() == [int(places), int(places) + 1]
    assert new.mean() == pytest.approx(places, abs=0.03)


def new_places(seen, worth, domain=None, **options):
    """How many of 8 places tasks never visited have, of variance 0.08, in each of 1,000 batches."""
    tasks = Tasks(domain=None if domain is None else jnp.asarray(domain))
    init, choose = program(8, floor=0.0, **options)
    moments = (np.full(len(seen), 0.5), np.where(seen, 0.0, 0.08), worth)
    state = init(tasks, len(seen))._replace(
        believed=logit.Moments(*(jnp.asarray(x, jnp.float32) for x in moments)),
        visited=jnp.where(seen, 0, -1).astype(jnp.int32),
        step=jnp.int32(1),
    )
    return (~seen[choose(keys(1000), state, tasks)]).sum(axis=1)


def test_with_a_balance_choosing_gains_what_it_gains_within_the_domains():
    """Four places for 8 tasks worth 1 and 8 new ones worth 0.6, four for 48 worth 0.

    By chance they are worth 4 * 0.8, so that choosing gains 0.8 of 4, of which 0.0425 pay for 0.085 places of 0.4. Of
    the whole table, where chance is 8 * 0.2, it would pay for 0.255.
    """
    number = np.arange(64)
    worth = np.where(number < 8, 1.0, np.where(number < 16, 0.6, 0.0))
    new = new_places((number < 8) | (number >= 16), worth, domain=(number >= 16).astype(int), balance="equal")
    assert new.mean() == pytest.approx(0.085, abs=0.03)


@pytest.mark.parametrize(
    ("seen", "jumped", "jumps", "variance"),
    [(False, 4, 0.0, 1.015), (True, 1, 0.025, 1.015), (True, 2, 0.05, 25.0), (True, 4, 0.1, 25.0)],
)
def test_others_may_have_jumped_where_more_than_one_has_that_was_seen(seen, jumped, jumps, variance):
    """Some of four that are believed hopeless are solved; of a fifth that was visited once nobody knows any more."""
    visited = jnp.array([0 if seen else -1] * 4 + [0], jnp.int32)
    mean, known = jnp.full(5, -6.0), jnp.ones(5)
    selector = selectors.adaptive(16)
    state = selector.init(Tasks(), 5)._replace(
        mean=mean, variance=known, visited=visited, believed=logit.moments(mean, known, num_generations=16)
    )
    ids, trials = jnp.arange(4), jnp.full(4, 16.0)
    update = jax.jit(selector.update)
    after = update(state, Tasks(), Feedback(ids, jnp.where(ids < jumped, trials, 0), trials, trials))
    assert float(after.jumps) == pytest.approx(jumps)
    assert float(after.variance[4]) == pytest.approx(variance)
