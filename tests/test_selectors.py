import dataclasses
import doctest
import functools
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrft.select
from jaxrft import mesh as meshes
from jaxrft.config import SelectConfig
from jaxrft.host.checkpoint import Checkpoints
from jaxrft.select import evidence, selectors
from jaxrft.select.dots import attention
from jaxrft.select.retire import RetireState
from jaxrft.simulate.oracle import oracle, reveal
from jaxrft.train.state import Counters, TrainState
from jaxrft.types import Feedback, InputError, Projections, Tasks

N, B, G = 16, 4, 8
NAN = float("nan")
VECTORS = np.load(Path(__file__).parent / "vectors" / "bots.npz")
TRUTH = jnp.linspace(0.0, 1.0, N)
ATTENTION = np.load(Path(__file__).parent / "vectors" / "dots.npz")
PREDICTOR = attention.params_from_torch(
    {
        name.split("/param/")[1]: x
        for name, x in ATTENTION.items()
        if name.startswith("group_") and "/param/" in name
    }
)
EMBEDDINGS = jnp.array(ATTENTION["query_embeddings"])
TASKS = Tasks(
    jnp.stack([0.5 * TRUTH, 0.2 + 0.8 * TRUTH], axis=1).at[3].set(NAN),
    embeddings=EMBEDDINGS,
    projections=jax.jit(attention.project)(PREDICTOR, EMBEDDINGS, EMBEDDINGS),
    domain=jnp.arange(N) ** 2 % 3,  # 0 and 1, 6 and 10 tasks
)


def dots(g, **options):
    """A DOTS selector whose predictor is small and random."""
    return selectors.dots(g, predictor=PREDICTOR, num_references=6, **options)


def knowing(selector):
    """An oracle that knows TRUTH."""
    return selector._replace(
        init=lambda tasks, num_tasks: reveal(selector.init(tasks, num_tasks), TRUTH[:num_tasks])
    )


FACTORIES = selectors.SELECTORS | {"oracle": oracle}


# Every selector, by a factor of its numbers, which are swept.
CONTRACT = {
    "uniform": lambda x: selectors.uniform(G),
    "uniform-replacement": lambda x: selectors.uniform(
        G, order="replacement", balance="proportional"
    ),
    "uniform-sequential": lambda x: selectors.uniform(G, order="sequential", balance="equal"),
    "easy_to_hard": lambda x: selectors.easy_to_hard(G),
    "mopps": lambda x: selectors.mopps(
        G, candidates=2, balance="equal", discount=0.5 * x, target=0.5 * x, prior=(x, 1.0)
    ),
    "greso": lambda x: selectors.greso(
        G, explore=0.5 * x, explore_step=0.01 * x, zero_variance=0.25 * x
    ),
    "retire": lambda x: selectors.retire(G, retire_above=0.5 * x, review=0.3 * x),
    "retire-equal": lambda x: selectors.retire(
        G, retire_above=0.5 * x, review=0.3, balance="equal"
    ),
    "adaptive": lambda x: selectors.adaptive(G, kappa=0.3 * x, epsilon=0.1 * x),
    "adaptive-signal": lambda x: selectors.adaptive(
        G, kappa=0.3 * x, utility="signal", per_token=True, balance="equal"
    ),
    "dots": lambda x: dots(G, target=0.5 * x, temperature=1e-3 * x, attention_temperature=x),
    "dots-top-k": lambda x: dots(G, calibration="plain", top_k=3, balance="equal"),
    "oracle": lambda x: knowing(oracle(G, target=0.5 * x, tolerance=0.4 * x)),
    "bots-domains": lambda x: selectors.bots(
        G, momentum=0.9 * x, per_domain=True, balance="proportional"
    ),
    "bots": lambda x: selectors.bots(
        G, decay=0.1 * x, rho=0.1 * x, momentum=0.9 * x, target=0.5 * x, prior=(x, 1.0)
    ),
}
every_selector = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if "-" in name else name for name in CONTRACT],
)


def adaptive_and_dots_slow(names):
    """The names for parametrize; the two selectors that take longest to compile are slow."""
    slow = ("adaptive", "dots")
    return [pytest.param(x, marks=pytest.mark.slow) if x in slow else x for x in names]


@jax.jit
def feedback_of(ids):
    """Rollouts of a policy that solves what TRUTH says."""
    return Feedback(
        ids, jnp.round(TRUTH[ids] * G), jnp.full(ids.shape, float(G)), jnp.full(ids.shape, 100.0)
    )


def referenced(selector, state, tasks, key):
    """The state after a reference set, of a selector that has one."""
    if selector.reference_set is None:
        return state
    return update_references(selector, state, tasks, key)


@functools.partial(jax.jit, static_argnums=0)
def update_references(selector, state, tasks, key):
    """`referenced` of a selector with a reference set, compiled once for all tests."""
    ids = selector.reference_set(jax.random.fold_in(key, 1), state, tasks)
    return selector.update_references(state, tasks, feedback_of(ids))


def jitted(selector, **options):
    """`select` as training loops compile it."""
    return jax.jit(selector.select, static_argnames="batch_size", **options)


def choose(selector, tasks=TASKS, num_tasks=N, *, batch_size=B, **options):
    """The first choice."""
    state = selector.init(tasks, num_tasks)
    return selector.select(KEYS[0], state, tasks, batch_size=batch_size, **options)[0]


def stepper(selector):
    """(state, key, tasks) -> (state, choice): what a training loop does, rollouts aside."""

    def step(state, key, tasks=TASKS):
        state = referenced(selector, state, tasks, key)
        choice, state = selector.select(key, state, tasks, batch_size=B)
        return selector.update(state, tasks, feedback_of(choice.ids)), choice

    return step


def run(step, state, keys):
    """(state, choices [S, B]) after a Python loop over the keys [S]."""
    choices = []
    for key in keys:
        state, choice = step(state, key)
        choices.append(choice)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *choices)


def assert_equal(a, b, *, rtol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


KEYS = jax.random.split(jax.random.key(7), 10)


def test_the_contract_holds_every_selector():
    assert {name.split("-")[0] for name in CONTRACT} == {*FACTORIES}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """What is compiled here runs a few times only."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Compiled(NamedTuple):
    """A selector of the table, and its functions jitted, which all tests share."""

    selector: selectors.Selector
    state: Any
    step: Any
    traces: list  # one entry for each
    select: Any  # (key, state, tasks, batch_size=, exclude=) -> (choice, state)
    select_traces: list  # the batch size of each, and whether there was `exclude`
    pass_rate: Any  # (state, tasks) -> [N]


@functools.cache
def compiled(name):
    selector, traces, select_traces = CONTRACT[name](1.0), [], []

    def step(state, key):
        traces.append(name)
        return stepper(selector)(state, key)

    def select(key, state, tasks, *, batch_size, exclude=None):
        select_traces.append((batch_size, exclude is None))
        return selector.select(key, state, tasks, batch_size=batch_size, exclude=exclude)

    return Compiled(
        selector,
        selector.init(TASKS, N),
        jax.jit(step),
        traces,
        jax.jit(select, static_argnames="batch_size"),
        select_traces,
        jax.jit(selector.pass_rate),
    )


@every_selector
def test_a_step_is_traced_once_and_keeps_the_state_fixed(name):
    selector, state, step, traces, *_ = compiled(name)
    jax.tree.map(lambda x: x.weak_type and pytest.fail("weakly typed state"), state)
    others = len(traces)  # of tests that had the same step before, by states of their own
    middle, _ = run(step, state, KEYS[:4])
    traced = len(traces)
    after, choices = run(step, middle, KEYS[4:])
    assert traced - others <= 1 and len(traces) == traced
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shape(after) == shape(state)

    assert choices.ids.dtype == jnp.int32 and choices.ids.shape == (6, B)
    assert all(
        len(set(ids)) == B and 0 <= min(ids) and max(ids) < N for ids in choices.ids.tolist()
    )
    pass_rate = compiled(name).pass_rate
    assert pass_rate(after, TASKS).shape == (N,)
    believed = pass_rate(referenced(selector, middle, TASKS, KEYS[4]), TASKS)[choices.ids[0]]
    np.testing.assert_allclose(choices.pass_rate[0], believed, rtol=1e-6)


@pytest.mark.slow
def test_restored_state_continues_bit_for_bit(tmp_path):
    middle = {
        name: run(compiled(name).step, compiled(name).state, KEYS[:4])[0] for name in CONTRACT
    }
    straight = {name: run(compiled(name).step, middle[name], KEYS[4:6]) for name in CONTRACT}
    counters = Counters(jnp.zeros(N, jnp.int32), *jnp.zeros((2, 2), jnp.int32))
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, middle, None, counters)
    for _ in range(2):
        with Checkpoints(tmp_path / "checkpoints", keep=1, identity={}) as checkpoints:
            restored = checkpoints.restore(state)  # takes the memory of what was there
            if restored is None:
                checkpoints.save(state)
    state = restored
    for name, expected in straight.items():
        assert_equal(run(compiled(name).step, state.selector[name], KEYS[4:6]), expected)


@every_selector
def test_donated_state_is_reused_for_the_next_one(name):
    selector, state, *_ = compiled(name)
    expected = compiled(name).select(KEYS[0], state, TASKS, batch_size=B)
    given = selector.init(TASKS, N)
    memory = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(given)]
    choice, after = jitted(selector, donate_argnums=1)(KEYS[0], given, TASKS, batch_size=B)
    assert_equal((choice, after), expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    # nothing is copied
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)] == memory
    # which learn from rollouts alone
    if name.split("-")[0] in ("adaptive", "bots", "mopps", "dots"):
        assert_equal(after, state)


@pytest.mark.slow  # the quick test of excluded tasks has one state for two batch sizes
@every_selector
def test_no_state_depends_on_the_batch_size(name):
    """One state serves a batch, a smaller one and the whole table."""
    state = compiled(name).state
    for batch_size in (B, 1, N):
        choice, state = compiled(name).select(KEYS[0], state, TASKS, batch_size=batch_size)
        assert choice.ids.shape == choice.pass_rate.shape == (batch_size,)
        assert len(set(choice.ids.tolist())) == batch_size
    assert_equal(jax.tree.map(jnp.shape, state), jax.tree.map(jnp.shape, compiled(name).state))


@pytest.mark.slow
@every_selector
def test_eager_equals_jit(name):
    selector, state, step, *_ = compiled(name)
    assert_equal(run(stepper(selector), state, KEYS[:1]), run(step, state, KEYS[:1]), rtol=1e-6)


@pytest.mark.slow
@every_selector
def test_seeds_and_hyper_parameters_are_swept_by_a_factory_inside_vmap_and_steps_by_scan(name):
    def trial(x, keys):
        selector = CONTRACT[name](x)
        return jax.lax.scan(stepper(selector), selector.init(TASKS, N), keys)

    swept = jax.vmap(trial)(jnp.array([0.4, 1.0]), jnp.stack([KEYS[3:6], KEYS[:3]]))
    expected = run(compiled(name).step, compiled(name).state, KEYS[:3])
    assert_equal(jax.tree.map(lambda x: x[1], swept), expected, rtol=1e-6)


@every_selector
def test_excluded_tasks_come_last(name):
    """Of 16 tasks 12 are excluded, in any places."""
    selector, state, *_ = compiled(name)
    select = compiled(name).select
    for key in KEYS[:4]:
        exclude = jax.random.permutation(key, N) < N - B
        before = referenced(selector, state, TASKS, key)
        choice, _ = select(key, before, TASKS, batch_size=B, exclude=exclude)
        assert sorted(choice.ids.tolist()) == jnp.flatnonzero(~exclude).tolist()
        choice, _ = select(key, before, TASKS, batch_size=N - 2, exclude=exclude)  # too few others
        assert len(set(choice.ids.tolist())) == N - 2
        assert sorted(choice.ids[:B].tolist()) == jnp.flatnonzero(
            ~exclude
        ).tolist() or name.startswith("mopps")


@pytest.mark.slow
@every_selector
def test_a_mask_that_excludes_no_task_changes_no_bit(name, mesh):
    selector, state, *_ = compiled(name)
    select = jitted(selector)
    for key in KEYS[:3]:
        state = referenced(selector, state, TASKS, key)
        with jax.set_mesh(mesh):
            *given, mask = jax.tree.map(
                lambda x: jax.device_put(x, meshes.task_sharding(mesh, x.shape, N)),
                (state, TASKS, jnp.zeros(N, bool)),
            )
            choice, after = jax.device_get(select(key, *given, batch_size=B))
            masked = jax.device_get(select(key, *given, batch_size=B, exclude=mask))
        assert_equal(masked, (choice, after))
        state = late(name).updates["batch"](after, jax.device_get(feedback_of(choice.ids)))


BALANCED = {
    "uniform": selectors.uniform,
    "easy_to_hard": selectors.easy_to_hard,
    "mopps": functools.partial(selectors.mopps, candidates=2),
    "greso": selectors.greso,
    "retire": functools.partial(selectors.retire, retire_above=0.5, review=0.3),
    "bots": selectors.bots,
    "dots": dots,
    "adaptive": functools.partial(selectors.adaptive, epsilon=0.5),
    "oracle": lambda g, **options: knowing(oracle(g, **options)),
}


@pytest.mark.parametrize("name", adaptive_and_dots_slow(BALANCED))
def test_a_balanced_batch_has_as_many_tasks_of_each_domain(name):
    """Two domains, of 6 and of 10 tasks."""
    selector = BALANCED[name](G, balance="equal")
    state, select = selector.init(TASKS, N), jitted(selector)
    for key in KEYS:
        choice, state = select(key, state, TASKS, batch_size=B)
        assert np.bincount(TASKS.domain[choice.ids]).tolist() == [2, 2]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_balanced_epochs_advance_in_each_domain_separately(order):
    selector = selectors.uniform(G, order=order, balance="equal")
    state, select = selector.init(TASKS, N), jitted(selector)
    for key in KEYS:
        _, state = select(key, state, TASKS, batch_size=B)
        for domain in (0, 1):
            visits = state.visits[TASKS.domain == domain]
            assert int(visits.max() - visits.min()) <= 1
    assert [int(state.visits[TASKS.domain == domain].sum()) for domain in (0, 1)] == [20, 20]


# The utility is flat at its top: rounding, which differs between programs, decides which of two
# tasks comes first.
NEAR_TIES = "adaptive-signal"


@pytest.mark.slow
def test_beliefs_are_the_same_over_eight_devices_where_tasks_nearly_tie(mesh):
    selector = compiled(NEAR_TIES).selector
    feedback = feedback_of(jnp.arange(B))

    @jax.jit
    def believe(state, tasks):
        state = selector.update(state, tasks, feedback)
        return state, selector.pass_rate(state, tasks)

    state = selector.init(TASKS, N)
    expected = believe(state, TASKS)
    with jax.set_mesh(mesh):
        state, tasks = jax.tree.map(
            lambda x: jax.device_put(x, meshes.task_sharding(mesh, x.shape, N)), (state, TASKS)
        )
        result = believe(state, tasks)
    assert_equal(jax.device_get(result), jax.device_get(expected), rtol=1e-5)
    assert result[1].sharding.spec == jax.P(("data", "fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRACT)
def test_sharded_over_eight_devices_equals_unsharded(name, mesh):
    selector, state, step, *_ = compiled(name)
    expected = run(step, state, KEYS[:3])
    step = jax.jit(stepper(selector))
    with jax.set_mesh(mesh):
        state, tasks = jax.tree.map(
            lambda x: jax.device_put(x, meshes.task_sharding(mesh, x.shape, N)), (state, TASKS)
        )
        result = run(lambda state, key: step(state, key, tasks), state, KEYS[:3])
    assert_equal(jax.device_get(result), jax.device_get(expected), rtol=1e-5)
    tables = [x for x in jax.tree.leaves(result[0]) if x.shape == (N,)]
    assert tables and all(x.sharding.spec == jax.P(("data", "fsdp")) for x in tables)


def test_the_mesh_of_another_program_is_left_alone():
    selector = selectors.uniform(G)
    step, state = stepper(selector), selector.init(TASKS, N)
    expected = jax.jit(step)(state, KEYS[0])
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert_equal(jax.device_get(jax.jit(step)(state, KEYS[0])), jax.device_get(expected))


UNTRUE = [  # two rows each of ids, successes, trials, tokens
    ([9, 10], [NAN, 8.0], [8.0, NAN], [99.0, 99.0]),
    ([9, 10], [8.0, 1.0], [float("inf"), -1.0], [99.0, 99.0]),
    ([9, 10], [9.0, -1.0], [8.0, 8.0], [99.0, 99.0]),
    ([N, -1], [4.0, 4.0], [8.0, 8.0], [99.0, 99.0]),
    ([9, 10], [0.0, float("inf")], [1e-45, float("inf")], [NAN, 99.0]),
]


@every_selector
def test_padding_and_impossible_rows_change_nothing(name):
    for update in late(name).updates.values():
        check_inert(name, compiled(name).state, update)


def rows_of(ids, *counts):
    return Feedback(np.array(ids, np.int32), *(np.array(x, np.float32) for x in counts))


def mix(real, others):
    """The two rows of `others` after the first and after the last of `real`."""
    return jax.tree.map(lambda x, y: np.concatenate([x[:1], y[:1], x[1:], y[1:]]), real, others)


def check_inert(name, state, update):
    real = rows_of([1, 9, 3, 2], [2.0, 7, 0, 8], [8.0, 8, 8, 8], [10.0, 20, 30, 40])
    spoilt = rows_of([9, N], [NAN, 8.0], [0.0, 0.0], [99.0, 99.0])
    padded = mix(real, spoilt)
    expected = update(state, real)
    assert_equal(expected, update(state, padded), rtol=1e-6)
    for rows in UNTRUE:
        assert_equal(update(state, mix(real, rows_of(*rows))), expected, rtol=1e-6)
    believed = state.evidence if name.startswith("bots") else state
    after = update(state, padded._replace(trials=np.zeros(6, np.float32)))
    assert_equal(after.evidence if name.startswith("bots") else after, believed)


class Late(NamedTuple):
    """The updates of a selector, compiled apart from its choices, as in a loop that learns late."""

    updates: dict[str, Any]  # (state, feedback) -> state, by what the feedback is of
    traces: list[tuple[str, int]]  # what was compiled, for how many tasks


@functools.cache
def late(name):
    selector, traces = compiled(name).selector, []

    def updating(kind, function):
        def update(state, feedback):
            traces.append((kind, len(feedback.ids)))
            return function(state, TASKS, feedback)

        return jax.jit(update)

    updates = {"batch": updating("batch", selector.update)}
    if selector.update_references is not None:
        updates["references"] = updating("references", selector.update_references)
    return Late(updates, traces)


def choose_and_wait(name, state, key):
    """(state, what came of the choice): pairs of what it is of and the feedback, which nothing has
    learned yet.
    """
    selector, due = compiled(name).selector, []
    if selector.reference_set is not None:
        references = selector.reference_set(jax.random.fold_in(key, 1), state, TASKS)
        due.append(("references", jax.device_get(feedback_of(references))))
    choice, state = compiled(name).select(key, state, TASKS, batch_size=B)
    ids = choice.ids.tolist()
    assert choice.ids.dtype == jnp.int32 and len(set(ids)) == B and min(ids) >= 0 and max(ids) < N
    due.append(("batch", jax.device_get(feedback_of(choice.ids))))
    return state, due


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def is_known(old, new):
    """Whether an array of a state is finite, or NaN at most, where the first state has NaN."""
    old, new = np.asarray(old), np.asarray(new)
    return bool((np.isfinite(new) | np.isnan(new) & np.isnan(old).any()).all())


def learn(name, state, kind, feedback):
    """The state after feedback, checked: of the same shapes, finite, and of beliefs that are pass
    rates.
    """
    first = compiled(name).state
    state = late(name).updates[kind](state, feedback)
    assert shapes(state) == shapes(first)
    assert all(map(is_known, jax.tree.leaves(first), jax.tree.leaves(state)))
    believed = np.asarray(compiled(name).pass_rate(state, TASKS))
    assert not ((believed < 0) | (believed > 1)).any()
    return state


def assert_moved(name, state, learned):
    """What is believed of the tasks in the feedbacks `learned` is nearer to what was observed than
    at first.
    """
    first = compiled(name).state
    if name.startswith("dots"):
        latest = [feedback for kind, feedback in learned if kind == "references"][-1]
        pairs = zip(state.references.tolist(), state.reference_pass_rates.tolist(), strict=True)
        expected = zip(
            latest.ids.tolist(), (latest.successes / latest.trials).tolist(), strict=True
        )
        assert dict(pairs) == dict(expected)
    # the others believe nothing of a batch
    if name.startswith(("mopps", "retire", "bots", "adaptive")):
        ids = np.unique(np.concatenate([feedback.ids for _, feedback in learned]))
        observed = np.asarray(feedback_of(jnp.arange(N)).successes)[ids] / G
        pass_rates = [np.asarray(compiled(name).pass_rate(x, TASKS)) for x in (first, state)]
        errors = [np.abs(rates[ids] - observed) for rates in pass_rates]
        before, after = (float(np.nan_to_num(x, nan=0.5).mean()) for x in errors)
        assert after < before


@every_selector
@pytest.mark.parametrize("delay", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_feedback_may_come_late(name, delay):
    """Four steps late, five batches of 4 are chosen from 16 tasks before the first is learned: some
    tasks again.
    """
    state, waiting, learned = compiled(name).state, [], []
    for key in KEYS:
        state, due = choose_and_wait(name, state, key)
        waiting.append(due)
        if len(waiting) <= delay:
            continue
        for kind, feedback in waiting.pop(0):
            state = learn(name, state, kind, feedback)
            learned.append((kind, feedback))
    for kind, feedback in sum(waiting, start=[]):
        state = learn(name, state, kind, feedback)
        learned.append((kind, feedback))
    assert_moved(name, state, learned)
    traces = compiled(name).select_traces + late(name).traces
    assert len(traces) == len(set(traces))


def halves(feedback):
    """Half of the tasks, then the others."""
    half = len(feedback.ids) // 2
    return [jax.tree.map(lambda x: x[:half], feedback), jax.tree.map(lambda x: x[half:], feedback)]


def two_parts(feedback):
    """Three of each task's rollouts, the right ones first, then the others."""
    first = Feedback(
        feedback.ids,
        successes=np.minimum(feedback.successes, np.float32(3)),
        trials=np.full_like(feedback.trials, 3.0),
        tokens=np.float32(0.375) * feedback.tokens,
    )
    rest = [x - y for x, y in zip(feedback[1:], first[1:], strict=True)]
    return [first, Feedback(feedback.ids, *rest)]


BY_THE_LAST_PART = ("retire", "dots")  # whose belief is the last pass rate that was observed


@every_selector
@pytest.mark.parametrize("split", [pytest.param(halves, marks=pytest.mark.slow), two_parts])
def test_feedback_may_come_in_parts(name, split):
    state, learned = compiled(name).state, []
    for key in KEYS:
        state, due = choose_and_wait(name, state, key)
        learned += due
        for kind, feedback in due:
            for part in split(feedback):
                state = learn(name, state, kind, part)
    if split is halves or not name.startswith(BY_THE_LAST_PART):
        assert_moved(name, state, learned)
    traces = compiled(name).select_traces + late(name).traces
    assert len(traces) == len(set(traces))


@pytest.mark.parametrize("name", ["uniform", "easy_to_hard", "mopps", "retire", "oracle"])
def test_order_of_partial_feedback_does_not_matter(name):
    """Exactly, for what neither decays nor adapts by the step."""
    state, due = choose_and_wait(name, compiled(name).state, KEYS[0])
    kind, feedback = due[-1]
    whole = learn(name, state, kind, feedback)
    for parts in (halves(feedback), halves(feedback)[::-1]):
        after = state
        for part in parts:
            after = learn(name, after, kind, part)
        assert_equal(after, whole)


def test_every_update_is_one_step_of_decay():
    """By hand: 8 of 8 for task 0, then for task 1, where one update would have given both 9 of 10
    and one move.
    """
    feedback = feedback_of(jnp.array([0, 1]))._replace(successes=jnp.full(2, 8.0))
    bots = selectors.bots(G, decay=0.1, rho=0.0)
    greso = selectors.greso(G, explore_step=0.01)
    for selector in (bots, greso):
        state = selector.init(TASKS, N)
        update = jax.jit(selector.update)
        for part in halves(feedback):
            state = update(state, TASKS, part)
        if selector is bots:
            assert state.posterior.alpha[:3].tolist() == pytest.approx([0.9 * 9 + 0.1, 9, 1])
            assert state.posterior.beta[:3].tolist() == pytest.approx([1, 1, 1])
        else:
            assert state.streak[:3].tolist() == [1, 1, 0]
            assert state.explore.tolist() == pytest.approx([0.48, 0.52])


def test_rollouts_of_a_task_in_two_parts_are_two_visits_by_hand():
    """3 of 3, then 2 of 5, of one task: MoPPS halves what it knows before each, GRESO and retire go
    by the last.
    """
    parts = [
        Feedback(jnp.array([0]), *jnp.array([[s], [n], [1.0]])) for s, n in ((3.0, 3.0), (2.0, 5.0))
    ]
    believed = {}
    for name in ("mopps", "retire", "greso"):
        selector = selectors.make(name, G)
        state = selector.init(Tasks(), 2)
        for part in parts:
            state = selector.update(state, Tasks(), part)
        believed[name] = (
            state.streak[0] if name == "greso" else selector.pass_rate(state, Tasks())[0]
        )
    # alpha: 0.5 + 0.5 + 3 = 4, then 2 + 0.5 + 2 = 4.5; beta: 0.5 + 0.5 = 1, then 0.5 + 0.5 + 3 = 4.
    assert believed["mopps"] == pytest.approx(4.5 / 8.5)
    assert believed["retire"] == pytest.approx(0.4)
    assert believed["greso"] == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 1e-4), pytest.param(jnp.float64, 1e-6, marks=pytest.mark.slow)],
)
def test_bots_matches_the_published_estimator(dtype, tolerance):
    """Five runs of 24 updates each; the factory is built inside vmap, a run a row."""

    def trial(decay, rho, momentum, references, feedbacks):
        selector = selectors.bots(16, decay=decay, rho=rho, momentum=momentum)
        tasks = Tasks(references)
        model = evidence.interpolation(momentum)

        def step(state, feedback):
            state = selector.update(state, tasks, feedback)
            return state, (
                *state.posterior,
                state.evidence.capability,
                model.predict(state.evidence, tasks),
            )

        return jax.lax.scan(step, selector.init(tasks, 64), feedbacks)[1]

    def check():
        decay, rho, momentum, references, observed = (
            jnp.array(VECTORS[name], dtype)
            for name in ("decay", "rho", "momentum", "reference_pass_rates", "observed")
        )
        feedbacks = Feedback(
            jnp.array(VECTORS["ids"]), observed * 16, jnp.full_like(observed, 16), observed
        )
        *found, implicit = jax.jit(jax.vmap(trial))(decay, rho, momentum, references, feedbacks)
        assert all(x.dtype == dtype for x in found)
        steps = VECTORS["steps"]
        for name, x in zip(("alpha", "beta", "capability"), found, strict=True):
            x = x if name == "capability" else x[:, steps]
            np.testing.assert_allclose(
                x, VECTORS[name], rtol=tolerance, atol=tolerance, err_msg=name
            )
        chosen = np.zeros((5, len(steps), 64), bool)
        np.put_along_axis(chosen, VECTORS["ids"][:, steps], True, axis=2)
        np.testing.assert_allclose(
            np.where(chosen, 0, implicit[:, steps]),
            np.where(chosen, 0, VECTORS["implicit"]),
            atol=tolerance,
        )

    assert set(VECTORS["num_generations"].tolist()) == {16}
    with jax.enable_x64(dtype == jnp.float64):
        check()


def test_bots_selects_informative_tasks_more_often_than_uniform():
    selector = selectors.bots(G)
    state, choices = jax.lax.scan(
        stepper(selector), selector.init(TASKS, N), jax.random.split(jax.random.key(3), 60)
    )
    assert float(jnp.abs(TRUTH[choices.ids[20:]] - 0.5).mean()) < 0.17  # uniform: 0.27
    assert np.corrcoef(selector.pass_rate(state, TASKS), TRUTH)[0, 1] > 0.9
    assert np.array_equal(
        selector.pass_rate(state, TASKS), state.posterior.alpha / sum(state.posterior)
    )


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("num_tasks", "batch_size"), [(10, 4), (7, 6), (5, 5), (9, 1)])
def test_epochs_visit_every_task_once_before_any_twice(order, num_tasks, batch_size):
    selector = selectors.uniform(G, order=order)
    select, state, ids = jitted(selector), selector.init(Tasks(), num_tasks), []
    for key in jax.random.split(jax.random.key(0), 12):
        choice, state = select(key, state, Tasks(), batch_size=batch_size)
        assert len(set(choice.ids.tolist())) == batch_size and np.isnan(choice.pass_rate).all()
        ids += choice.ids.tolist()
        visits = np.bincount(ids, minlength=num_tasks)
        assert np.array_equal(visits, state.visits) and visits.max() - visits.min() <= 1
    if order == "sequential":
        assert ids == [i % num_tasks for i in range(len(ids))]
    elif num_tasks > batch_size:
        assert ids[:num_tasks] != sorted(ids[:num_tasks])


def rounds(selector, tasks, num_tasks, successes, steps):
    """The choices [steps, 2] and the last state when task i has successes[i] of G."""
    select, update, state, ids = (
        jitted(selector),
        jax.jit(selector.update),
        selector.init(tasks, num_tasks),
        [],
    )
    for key in jax.random.split(jax.random.key(5), steps):
        choice, state = select(key, state, tasks, batch_size=2)
        ids.append(choice.ids.tolist())
        count = jnp.full(len(choice.ids), float(G))
        state = update(
            state,
            tasks,
            Feedback(choice.ids, jnp.array(successes, jnp.float32)[choice.ids], count, count),
        )
    return ids, state


def test_easy_to_hard_orders_by_pass_rate_in_epochs():
    rates = jnp.array([[0.2], [0.9], [NAN], [0.5], [0.9]])
    ids, _ = rounds(selectors.easy_to_hard(G), Tasks(rates), 5, [4] * 5, 4)
    assert ids == [[1, 4], [3, 0], [2, 1], [4, 3]]


def test_mopps_updates_visited_tasks_only_and_selects_informative_ones():
    truth = [0, 0, 4, 4, 8, 8]
    ids, state = rounds(selectors.mopps(G), Tasks(), 6, truth, 30)
    assert np.isin(ids[10:], [2, 3]).mean() > 0.8
    assert selectors.mopps(G).pass_rate(state, Tasks())[2] == pytest.approx(0.5, abs=0.02)
    few, _ = rounds(selectors.mopps(G, candidates=1), Tasks(), 6, truth, 60)  # no choice: uniform
    assert np.bincount(np.ravel(few), minlength=6).min() > 10


def test_greso_skips_by_the_length_of_the_streak():
    """Task 0 is never, 1 always solved; with a frozen base of 1/2 they come ever more rarely."""
    selector = selectors.greso(G, explore_step=0.0)
    ids, state = rounds(selector, Tasks(), 6, [0, 8, 4, 4, 4, 4], 60)
    visits = np.bincount(np.ravel(ids), minlength=6)
    assert visits[:2].max() <= 10 and visits[2:].min() >= 22
    assert state.streak.tolist() == [-visits[0], visits[1], 0, 0, 0, 0]
    assert int(state.passes.max() - state.passes.min()) <= 1 and int(state.passes.min()) > 22


def test_greso_moves_its_bases_by_hand():
    # put up with: 0.2 easy, 0.4 hard
    selector = selectors.greso(4, explore_step=0.1, zero_variance=0.6)
    state = selector.init(Tasks(), 8)
    ids, count = jnp.arange(4), jnp.full(4, 4.0)
    state = selector.update(
        state, Tasks(), Feedback(ids, jnp.array([4.0, 0.0, 2.0, 1.5]), count, count)
    )
    assert (
        state.explore.tolist() == pytest.approx([0.4, 0.6])
        and state.streak.tolist() == [1, -1] + [0] * 6
    )
    state = selector.update(
        state, Tasks(), Feedback(ids, jnp.array([4.0, 4.0, 0.0, 0.0]), count, count)
    )
    assert (
        state.explore.tolist() == pytest.approx([0.3, 0.5])
        and state.streak.tolist() == [2, 1, -1, -1] + [0] * 4
    )


def test_retire_leaves_mastered_tasks_out_by_hand():
    """Tasks 0 and 3 are always solved, task 1 in 7 of 8 rollouts, which is 0.875 and not yet
    0.9.
    """
    selector = selectors.retire(G, review=0.0)
    ids, state = rounds(selector, Tasks(), 6, [8, 7, 4, 8, 0, 4], 7)
    assert sorted(np.ravel(ids[:3]).tolist()) == [0, 1, 2, 3, 4, 5]  # the first epoch, of all
    assert sorted(np.ravel(ids[3:5]).tolist()) == sorted(np.ravel(ids[5:]).tolist()) == [1, 2, 4, 5]
    assert state.last_pass_rate.tolist() == [1.0, 0.875, 0.5, 1.0, 0.0, 0.5]
    # the retired ones keep pace with the epoch that began last
    assert state.epochs.tolist() == [2, 3, 3, 2, 3, 3]


def test_retire_fills_a_batch_up_with_retired_tasks_and_lets_them_come_back():
    selector = selectors.retire(G, review=0.0)
    select = jitted(selector)
    state = RetireState(jnp.array([1.0, 0.9, NAN, 0.5, 0.0]), jnp.array([1, 3, 5, 5, 6], jnp.int32))
    choice, after = select(KEYS[0], state, Tasks(), batch_size=2)
    assert sorted(choice.ids.tolist()) == [2, 3] and after.epochs.tolist() == [5, 5, 6, 6, 6]
    choice, after = select(KEYS[0], state, Tasks(), batch_size=4)
    assert sorted(choice.ids.tolist()[:3]) == [2, 3, 4] and choice.ids.tolist()[3] in (0, 1)
    choice, after = select(
        KEYS[0], state, Tasks(), batch_size=2, exclude=jnp.array([0, 0, 1, 1, 0], bool)
    )
    assert choice.ids.tolist()[0] == 4 and choice.ids.tolist()[1] in (0, 1)


def test_reactivated_task_joins_the_current_epoch():
    selector = selectors.retire(G, review=0.0)
    select = jitted(selector)
    state = RetireState(jnp.array([1.0, 0.9, NAN, 0.5, 0.0]), jnp.array([5, 5, 6, 6, 6], jnp.int32))
    state = selector.update(
        state, Tasks(), Feedback(jnp.array([0]), *jnp.array([[7.0], [8.0], [1.0]]))
    )
    for key in KEYS:
        choice, middle = select(key, state, Tasks(), batch_size=2)
        first, other = choice.ids.tolist()
        assert first == 0 and other in (2, 3, 4)
        choice, after = select(key, middle, Tasks(), batch_size=3)
        assert sorted(choice.ids.tolist()) == sorted({0, 2, 3, 4} - {other})
        assert after.epochs.tolist() == [7, 6, 7, 7, 7]


def test_retire_reviews_a_share_of_the_slots():
    """Of 4 places 0.3 are 1.2: one, and a second one with chance 0.2. A retired task is reviewed
    once an epoch.
    """
    selector = selectors.retire(G, review=0.3)
    state = RetireState(
        jnp.where(jnp.arange(N) < 8, 1.0, 0.5), jnp.zeros(N, jnp.int32).at[:2].set(3)
    )
    choose = jax.jit(
        jax.vmap(lambda key: selector.select(key, state, Tasks(), batch_size=B)[0].ids)
    )
    ids = np.asarray(choose(jax.random.split(jax.random.key(0), 2000)))
    places, count = np.unique((ids < 8).sum(axis=1), return_counts=True)
    assert places.tolist() == [1, 2] and count[1] / 2000 == pytest.approx(0.2, abs=0.03)
    chosen = np.bincount(ids.ravel(), minlength=N)
    assert chosen[:2].tolist() == [0, 0]  # which were reviewed in this epoch
    assert chosen[2:8] / 2000 == pytest.approx(np.full(6, 0.2), abs=0.04)
    assert chosen[8:] / 2000 == pytest.approx(np.full(8, 0.35), abs=0.05)


@functools.cache
def retiring():
    """(key, state, exclude, review) -> (ids [B], state), compiled once for all tables."""

    def select(key, state, exclude, review):
        choice, after = selectors.retire(G, review=review).select(
            key, state, Tasks(), batch_size=B, exclude=exclude
        )
        return choice.ids, after

    return jax.jit(select)


@settings(max_examples=100, deadline=None)
@given(
    rates=st.lists(st.sampled_from([NAN, 0.0, 0.5, 0.875, 0.95, 1.0]), min_size=N, max_size=N),
    epochs=st.lists(st.integers(0, 3), min_size=N, max_size=N),
    excluded=st.lists(st.booleans(), min_size=N, max_size=N),
    review=st.sampled_from([0.0, 0.1, 0.5, 0.6, 1.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_retired_task_comes_for_review_or_where_too_few_are_active(
    rates, epochs, excluded, review, seed
):
    state = RetireState(jnp.array(rates, jnp.float32), jnp.array(epochs, jnp.int32))
    exclude = np.array(excluded)
    ids, after = retiring()(jax.random.key(seed), state, jnp.array(exclude), jnp.float32(review))
    chosen = np.isin(np.arange(N), ids)
    retired = np.array(rates) >= 0.9
    may_come = retired & ~exclude
    active = ~retired & ~exclude
    assert chosen.sum() == B
    least = np.floor(review * B)
    most = np.ceil(review * B)
    missing = max(0, B - active.sum())
    count = (chosen & may_come).sum()
    assert (
        min(may_come.sum(), max(least, missing)) <= count <= min(may_come.sum(), max(most, missing))
    )
    assert (chosen & exclude).sum() == max(0, B - may_come.sum() - active.sum())
    if chosen[active].any() and not chosen[active].all():
        assert np.array(epochs)[active & chosen].max() <= np.array(epochs)[active & ~chosen].min()
    grown = np.asarray(after.epochs) - np.array(epochs) - chosen
    assert (grown >= 0).all() and (grown[~retired] == 0).all()


def test_oracle_selects_by_the_revealed_pass_rates():
    def choose(state, *rates, batch_size=2):
        return oracle(G).select(
            KEYS[0], reveal(state, jnp.array(rates)), Tasks(), batch_size=batch_size
        )

    choice, state = choose(oracle(G).init(Tasks(), 5), 0.1, 0.45, NAN, 0.6, 1.0)
    assert sorted(choice.ids.tolist()) == [1, 3]
    assert sorted(choice.pass_rate.tolist()) == pytest.approx([0.45, 0.6])
    # 0 and 2 are within the tolerance and have not been chosen yet, unlike 1; then 1, then the
    # nearest, 3.
    choice, state = choose(state, 0.2, 0.5, 0.8, 0.95, 1.0)
    assert sorted(choice.ids.tolist()) == [0, 2]
    choice, _ = choose(state, 0.2, 0.5, 0.8, 0.95, 1.0, batch_size=4)
    assert choice.ids.tolist()[2:] in ([0, 3], [1, 3], [2, 3])


def test_make_gives_a_factory_its_own_fields_only():
    fields = dataclasses.asdict(SelectConfig())
    del fields["embeddings"]  # of the tasks
    assert selectors.make(**fields | {"name": "uniform"}, num_generations=G).reference_set is None
    selector = selectors.make("bots", G, prior=(2.0, 6.0), order="sequential")
    assert np.allclose(selector.pass_rate(selector.init(TASKS, N), TASKS), 0.25)


def test_the_configuration_has_the_same_defaults():
    fields = dataclasses.asdict(SelectConfig())
    for name, factory in selectors.SELECTORS.items():
        for parameter in inspect.signature(factory).parameters.values():
            if parameter.name in fields and parameter.default is not parameter.empty:
                assert fields[parameter.name] == parameter.default, f"{name}.{parameter.name}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selectors.make("bot", G), "no selector 'bot': did you mean bots?"),
        (lambda: selectors.make("random", G), r"no selector 'random'.*\(uniform, .*bots"),
        (lambda: selectors.make(["bots"], G), r"no selector \['bots'\]: did you mean uniform?"),
        (lambda: selectors.make(None, G), "no selector None"),
        (
            lambda: selectors.bots(G, balance="equla"),
            r"no balance 'equla' of the domains: did "
            r"you mean equal\?",
        ),
        (lambda: selectors.bots(G, per_domain="x"), "per_domain is 'x': it must be True or False"),
        (lambda: selectors.bots(G, prior=5), "prior is 5: it must be two positive numbers"),
        (
            lambda: selectors.bots(G, momentum=1 - 1e-9),
            r"momentum is 0.99\d*: it must be in \[0, 1\) as a float32 too",
        ),
        (
            lambda: selectors.adaptive(G, kappa=float("inf")),
            "kappa is inf: it must be 0 or more, at most",
        ),
        (lambda: dots(G, calibration=None), "no calibration None: choose one of plain"),
        (lambda: selectors.dots(G, predictor="x"), "predictor is 'x': it must be attention.Params"),
        (
            lambda: selectors.make("bots", G, decya=0.5),
            "no selector has a field 'decya': did you mean decay?",
        ),
        (lambda: selectors.uniform(G, order="epochs"), "no order 'epochs'.*shuffled"),
        (lambda: selectors.bots(G, decay=1.5), r"decay is 1.5: it must be in \[0, 1\]"),
        (lambda: selectors.bots(G, rho=-0.1), "rho is -0.1"),
        (lambda: selectors.bots(G, momentum=1.0), "momentum is 1.0"),
        (lambda: selectors.bots(G, target=NAN), "target is nan"),
        (lambda: selectors.bots(G, prior=(1.0, 0.0)), "prior is 0.0"),
        (lambda: choose(selectors.bots(G), batch_size=0), "batch_size is 0"),
        (
            lambda: jax.jit(selectors.bots(G).select)(
                KEYS[0], selectors.bots(G).init(TASKS, N), TASKS, batch_size=B
            ),
            r"batch_size is .*: name it in jax.jit\(..., static_argnames='batch_size'\)",
        ),
        (
            lambda: choose(selectors.bots(G), exclude=jnp.zeros(3, bool)),
            r"exclude has shape "
            r"\(3,\): it must be "
            r"\[N\]",
        ),
        (
            lambda: choose(selectors.bots(G), exclude=jnp.zeros(N)),
            "exclude is float32: its dtype must be bool",
        ),
        (
            lambda: choose(selectors.bots(G), exclude=True),
            r"exclude is True: it must be an "
            r"array \[N\]",
        ),
        (lambda: selectors.uniform(0), "num_generations is 0"),
        (lambda: selectors.mopps(G, discount=2.0), "discount is 2.0"),
        (
            lambda: selectors.mopps(G, candidates=0),
            "candidates is 0: it must be a whole number, at least 1",
        ),
        (
            lambda: selectors.mopps(G, candidates=1.5),
            "candidates is 1.5: it must be a whole number",
        ),
        (lambda: selectors.greso(G, explore=1.0), "explore is 1.0"),
        (lambda: selectors.greso(G, zero_variance=-1.0), "zero_variance is -1.0"),
        (
            lambda: selectors.retire(G, retire_above=0.0),
            r"retire_above is 0.0: it must be in "
            r"\(0, 1\]",
        ),
        (lambda: selectors.retire(G, review=1.5), r"review is 1.5: it must be in \[0, 1\]"),
        (lambda: selectors.adaptive(G, epsilon=1.5), "epsilon is 1.5"),
        (lambda: selectors.adaptive(G, kappa=-1.0), "kappa is -1.0"),
        (lambda: selectors.adaptive(G, utility="gain"), "no utility 'gain'.*informative, signal"),
        (
            lambda: choose(selectors.adaptive(G), Tasks(), 3),
            "batch_size is 4 but there are 3 tasks",
        ),
        (
            lambda: selectors.make("dots", G),
            "the selector dots needs `predictor`, the parameters of a similarity predictor",
        ),
        (
            lambda: dots(G, reference_every=0),
            "reference_every is 0: it must be a whole number, at least 1",
        ),
        (lambda: dots(G, temperature=0.0), "temperature is 0.0: it must be positive"),
        (lambda: dots(G, top_k=0), "top_k is 0: it must be a whole number, at least 1, or None"),
        (lambda: dots(G, top_k=1.5), "top_k is 1.5: it must be a whole number"),
        (
            lambda: dots(G, calibration="platt"),
            "without the calibration platt .it has no scale and no shift",
        ),
        (
            lambda: dots(G, calibration="isotonic"),
            "no calibration 'isotonic': choose one of plain, platt",
        ),
        (
            lambda: dots(G).init(Tasks(embeddings=EMBEDDINGS), N),
            "set Tasks.projections to attention.pro",
        ),
        (lambda: dots(G).init(TASKS, N + 1), "projections have 16 rows but there are 17 tasks"),
        (
            lambda: selectors.bots(G, balance="even").init(TASKS, N),
            "no balance 'even' of the domains.*proportional",
        ),
        (
            lambda: selectors.uniform(G, balance="equal").init(Tasks(), N),
            "set tasks.domain_column, or pass them in Tasks.domain",
        ),
        (lambda: oracle(G, tolerance=1.0), "tolerance is 1.0"),
        (lambda: selectors.easy_to_hard(G).init(Tasks(), N), "tasks.pass_rate_columns"),
        (lambda: choose(selectors.uniform(G), Tasks(), 3), "batch_size is 4 but there are 3 tasks"),
        (lambda: choose(selectors.mopps(G), Tasks(), 3), "batch_size is 4 but there are 3 tasks"),
        (
            lambda: selectors.bots(G).init(Tasks(), N),
            "tasks.pass_rate_columns, or choose select.name uniform",
        ),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(call, message):
    with pytest.raises(InputError, match=message):
        call()


class Unprintable:
    """Something that nothing can be made of."""

    def __array__(self, *args, **kwargs):
        raise KeyError("array")

    def __repr__(self):
        raise RuntimeError("repr")


ODD = [
    *(
        "x",
        "",
        "nome",
        b"x",
        None,
        NAN,
        float("inf"),
        -float("inf"),
        -1,
        -1e-9,
        True,
        False,
        10**400,
        10**5000,
        2**63,
    ),
    *(
        [],
        [1, 2],
        [[1], [2, 3]],
        (1, 2, 3),
        ("a", "b"),
        (NAN, 1),
        (1e-30, 1),
        (1, 1e30),
        ([1], [2, 3]),
        {},
        {"a": 1},
    ),
    *(
        1j,
        1e-45,
        1e39,
        1 - 1e-9,
        2.5,
        np.array("x"),
        np.array([0.5]),
        np.ones((N, 2)),
        -np.ones(N),
        np.bool_(True),
    ),
    *(
        np.datetime64("2020-01-01"),
        jnp.bool_(False),
        jax.random.key(0),
        iter([1]),
        object(),
        Unprintable(),
        len,
    ),
]


@pytest.mark.parametrize("name", FACTORIES)
def test_meaningless_argument_is_refused_by_name(name):
    factory, given = FACTORIES[name], {"num_generations": G}
    given |= {"predictor": PREDICTOR} if name == "dots" else {}
    for argument in inspect.signature(factory).parameters:
        for value in ODD:
            try:
                selector = factory(**given | {argument: value})
            except InputError as error:
                text = str(error)
                assert (
                    text.startswith((f"{argument} is ", f"no {argument} "))
                    and len(text) < 220
                    and "\n" not in text
                )
                continue
            assert means_something(selector, argument, value), (argument, value)


def means_something(selector, argument, value):
    """Whether an argument of that name may be what it was taken to be."""
    # two numbers, for all tasks or for each; how many there are is known to `init` only
    if argument == "prior":
        try:
            rates = selector.pass_rate(selector.init(TASKS, N), TASKS)
        except InputError as error:
            return str(error).startswith("prior has shape")
        return bool(((rates > 0) & (rates < 1)).all())
    if argument in ("per_domain", "per_token"):
        return np.asarray(value).dtype == bool
    if argument == "top_k" and value is None:
        return True
    return not isinstance(value, bool) and np.shape(value) == () and 0 <= float(value) <= 1e12


@pytest.mark.parametrize(
    "number", [np.float64, np.float32, jnp.float32, jnp.bfloat16, np.array, jnp.array]
)
def test_numbers_of_numpy_and_jax_are_numbers(number):
    selector = selectors.bots(jnp.int32(G), target=number(0.5), prior=(number(2.0), np.full(N, 6)))
    assert np.allclose(selector.pass_rate(selector.init(TASKS, np.int64(N)), TASKS), 0.25)
    assert choose(selector, batch_size=np.int64(B)).ids.shape == (B,)


EXTREME = {
    "mopps": {"prior": (1e-12, 1e12), "discount": 1.0, "target": 1e-12},
    "bots": {
        "prior": (np.full(N, 1e12), 1e-12),
        "decay": 1.0,
        "rho": 1.0,
        "momentum": 0.999,
        "target": 0.999,
    },
    "retire": {"retire_above": 1e-12, "review": 1.0},
    "dots": {"predictor": PREDICTOR, "temperature": 1e-12, "attention_temperature": 1e12},
    "adaptive": {"kappa": 1e12, "epsilon": 1.0},
}


@pytest.mark.parametrize("name", adaptive_and_dots_slow(EXTREME))
def test_beliefs_stay_in_range_at_the_limits_of_accepted_arguments(name):
    selector = selectors.SELECTORS[name](2**24, **EXTREME[name])
    state = selector.init(TASKS, N)
    select, update = jitted(selector), jax.jit(selector.update)
    for key in KEYS[:3]:
        state = referenced(selector, state, TASKS, key)
        choice, state = select(key, state, TASKS, batch_size=B)
        assert len(set(choice.ids.tolist())) == B
        state = update(
            state,
            TASKS,
            feedback_of(choice.ids)._replace(trials=jnp.array([1e12, 1e12, 1e-12, 1e12])),
        )
    believed = selector.pass_rate(state, TASKS)
    assert (((believed >= 0) & (believed <= 1)) | (jnp.isnan(believed) & (name == "retire"))).all()


TABLES = {
    "reference_pass_rates": [
        np.ones(N),
        np.ones((N + 1, 2)),
        np.full((N, 2), 1.5),
        np.full((N, 2), "a"),
        [[0.5] * 2] * N,
    ]
    + [
        np.full((N, 2), -0.1),
        np.full((N, 2), 1j),
        np.full((N, 2), None),
        np.full((N, 2), np.inf),
        np.ones((N, 0)),
    ],
    "embeddings": [
        np.ones(N),
        np.ones((N, 2, 2)),
        np.full((N, 2), NAN),
        np.full((N, 2), np.inf),
        np.full((N, 2), 1e30),
    ]
    + [
        np.full((N, 2), np.inf, np.float16),
        np.full((N, 2), 1e300),
        np.ones((N - 1, 2)),
        np.full((N, 2), "a"),
        np.ones((N, 0)),
        "x",
        5,
    ],
    "domain": [
        np.ones(N),
        np.full(N, N),
        np.full(N, -1),
        np.full(N, 2**40),
        np.zeros((N, 1), int),
        np.full(N, True),
    ]
    + [np.zeros(N - 1, int), np.array(["a"] * N), 0, np.full(N, 2**64 - 1, np.uint64), [0] * N],
    "projections": [
        np.ones((N, 2)),
        (np.ones((N, 2)), np.ones((N, 2))),
        Projections(np.ones((N, 2)), np.ones((N, 3))),
    ]
    + [
        Projections(*[np.ones(N)] * 2),
        Projections(*[np.full((N, 2), NAN)] * 2),
        Projections(*[np.ones((3, 2))] * 2),
        5,
    ]
    + [Projections(None, None), Projections(np.ones((N, 2)), "x")],
}


@pytest.mark.parametrize("field", Tasks._fields)
def test_every_selector_refuses_invalid_task_tables(field):
    for name in ("uniform", "adaptive", "mopps", "bots"):
        selector = selectors.make(name, G)
        for value in TABLES[field]:
            with pytest.raises(InputError) as raised:
                selector.init(TASKS._replace(**{field: value}), N)
            text = str(raised.value)
            assert (
                field.split("_")[0].rstrip("s") in text and "\n" not in text and len(text) < 300
            ), text
        for tasks in (None, 5, {}, (), np.ones((N, 2))):
            with pytest.raises(
                InputError, match="the tasks are .*: give them as jaxrft.types.Tasks"
            ):
                selector.init(tasks, N)
        for count in (None, "x", 1.5, 0, -3, True, 2**24 + 1, [N], 10**400):
            with pytest.raises(InputError, match="the number of tasks is"):
                selector.init(Tasks(), count)


@every_selector
def test_an_argument_of_another_shape_or_dtype_is_named(name):
    """Of arrays and of tracers alike."""
    selector, state, *_ = compiled(name)
    feedback = feedback_of(jnp.arange(B))
    rates = TASKS.reference_pass_rates

    def select(key=KEYS[0], tasks=TASKS, **options):
        jax.eval_shape(
            functools.partial(selector.select, batch_size=B, **options), key, state, tasks
        )

    def update(**changes):
        jax.eval_shape(selector.update, state, TASKS, feedback._replace(**changes))

    for call, message in (
        (lambda: select(key=KEYS), r"key has shape \(10,\): it must be \[\]"),
        (lambda: select(key=jnp.zeros(2)), "key is .*: give one key, such as jax.random.key"),
        (
            lambda: select(exclude=jnp.zeros(N - 1, bool)),
            r"exclude has shape \(15,\): it must "
            rf"be \[N\], here \[{N}\]",
        ),
        (lambda: select(exclude=jnp.zeros(N, int)), "exclude is int32: its dtype must be bool"),
        (
            lambda: select(tasks=TASKS._replace(domain=TASKS.domain[1:])),
            r"domain has shape "
            r"\(15,\): it must be "
            r"\[N\]",
        ),
        (
            lambda: select(tasks=TASKS._replace(reference_pass_rates=rates[1:])),
            r"reference_pass_rates has shape \(15",
        ),
        (lambda: update(ids=feedback.trials), "ids is float32: its dtype must be int"),
        (
            lambda: update(successes=feedback.successes.astype(complex)),
            "successes is complex64: its dtype must be bool or int",
        ),
        (
            lambda: update(tokens=feedback.tokens[1:]),
            "tokens have shapes .*: give one entry a task in each",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_feedback_of_shapes_that_differ_is_refused():
    selector = selectors.mopps(G)
    state, ids = selector.init(Tasks(), N), jnp.arange(B)
    for wrong in (jnp.ones(B - 1), jnp.ones((B, 1)), jnp.ones(())):
        with pytest.raises(InputError, match="have shapes .*: give one entry a task in each"):
            selector.update(state, Tasks(), Feedback(ids, wrong, jnp.ones(B), jnp.ones(B)))


def test_documentation_runs():
    assert doctest.testmod(jaxrft.select).failed == 0
