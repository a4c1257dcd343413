import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.select import Session, selectors, session
from jaxrft.select.dots import attention
from jaxrft.types import InputError, Projections, Tasks

TRUTH = np.linspace(0.0, 1.0, 12)


def run(of, steps):
    """The choices [steps, B] of a loop that knows nothing of JAX."""
    chosen = []
    for _ in range(steps):
        ids = of.next(3)
        assert isinstance(ids, np.ndarray)
        of.record(
            ids.tolist(),
            [round(8 * TRUTH[i]) for i in ids],
            [8] * len(ids),
            tokens=[100] * len(ids),
        )
        chosen.append(ids.tolist())
    return chosen


ADAPTIVE = selectors.adaptive(8)  # one for all, whose functions are compiled once


def make(seed=0):
    return Session(ADAPTIVE, len(TRUTH), seed)


def test_a_loaded_session_continues_as_the_saved_one(tmp_path):
    whole = run(make(), 12)
    first = make()
    assert run(first, 5) == whole[:5]
    np.savez(tmp_path / "state.npz", **first.state_dict())
    second = make(seed=7)
    second.load_state_dict(dict(np.load(tmp_path / "state.npz")))
    assert run(second, 7) == whole[5:]
    assert np.corrcoef(second.pass_rate(), TRUTH)[0, 1] > 0.8


def test_seeds_differ_and_tasks_may_say_more():
    assert run(make(), 2) != run(make(seed=1), 2)
    rates = np.stack([0.5 * TRUTH, TRUTH], axis=1).astype(np.float32)
    bots = Session(selectors.bots(8), Tasks(rates))
    run(bots, 3)
    assert bots.pass_rate().shape == (12,)


def test_feedback_may_be_recorded_late_in_any_order_and_in_parts():
    """The first two batches of an epoch share no task, so that it makes no difference here."""

    def learned(late):
        session = Session(selectors.retire(8), len(TRUTH), seed=3)
        first, second = session.next(3), session.next(3)
        for ids in (second[1:], first, second[:1]) if late else (first, second):
            session.record(ids, np.round(8 * TRUTH[ids]), [8] * len(ids))
        return session.pass_rate().tolist(), session.next(9).tolist()

    assert str(learned(late=True)) == str(learned(late=False))  # NaN is not equal to itself


def test_reference_set_is_due_every_reference_every_steps():
    near = np.stack([30 * TRUTH, 30 - 30 * TRUTH], axis=1).astype(np.float32)
    nothing = attention.Affine(np.ones(1), np.zeros(1))  # the projections are given
    predictor = attention.Params(*[attention.Tower(nothing, (), nothing)] * 2)
    dots = selectors.dots(8, predictor=predictor, calibration="plain", num_references=6)
    dots, asked = Session(dots, Tasks(projections=Projections(near, near))), []
    for _ in range(4):
        ids = dots.reference_set()
        asked.append(len(ids))
        if len(ids):
            dots.record(ids, 8 * TRUTH[ids], [8] * 6, reference=True)
        run(dots, 1)
    assert asked == [6, 0, 6, 0] and np.corrcoef(dots.pass_rate(), TRUTH)[0, 1] > 0.8
    assert make().reference_set().tolist() == []
    with pytest.raises(
        InputError, match="reference is True, but this selector has no reference sets: leave it out"
    ):
        make().record([0], [1], [8], reference=True)
    with pytest.raises(InputError, match="reference is 1: it must be True or False"):
        make().record([0], [1], [8], reference=1)


def test_state_of_another_selector_is_refused():
    with pytest.raises(InputError, match="another selector"):
        make().load_state_dict(Session(selectors.uniform(8), 12).state_dict())
    with pytest.raises(InputError, match="or other tasks"):
        make().load_state_dict(Session(selectors.adaptive(8), 13).state_dict())
    bots = Session(selectors.bots(8), Tasks(np.ones((12, 2), np.float32)))
    with pytest.raises(InputError, match="which this one has not: it is that of another selector"):
        Session(selectors.mopps(8), 12).load_state_dict(bots.state_dict())


@pytest.mark.parametrize(
    ("name", "tasks", "message"),
    [
        ("adaptive", Tasks(domain=np.arange(12) / 2), "domains are float64: number them from 0"),
        ("adaptive", Tasks(domain=np.ones((12, 2), int)), r"domains have shape \(12, 2\)"),
        (
            "adaptive",
            Tasks(domain=np.array(["a"] * 12)),
            "(?s)Tasks.domain is .*, not an array of numbers",
        ),
        ("adaptive", Tasks(embeddings=np.ones(12)), r"embeddings of shape \(12,\) for 12 tasks"),
        (
            "bots",
            Tasks([[0.1, 0.5], [0.2]]),
            "(?s)Tasks.reference_pass_rates is .*, not an array of numbers",
        ),
        (
            "bots",
            Tasks(np.full((12, 2), 0.5), domain=np.zeros(20, int)),
            r"have \[12, 20\] "
            r"rows: give one row "
            r"a task",
        ),
    ],
)
def test_tasks_that_are_no_tables_are_refused(name, tasks, message):
    with pytest.raises(InputError, match=message):
        Session(selectors.make(name, 8), tasks)


@pytest.mark.parametrize("batch_size", [0, 13, 1.5, None, "3", True, np.ones(2)])
def test_invalid_batch_size_is_refused_and_changes_nothing(batch_size):
    session = untouched()
    before = session.state_dict()
    with pytest.raises(InputError, match="batch_size is "):
        session.next(batch_size)
    for name, value in session.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_batch_may_have_any_size():
    session = make()
    assert [len(session.next(size)) for size in (3, 12, 1)] == [3, 12, 1]


def test_tasks_may_be_lists():
    session = Session(selectors.bots(8), Tasks([[0.2, 0.5]] * 12))
    assert len(session.next(3)) == 3


@pytest.mark.parametrize(
    ("selector", "seed", "message"),
    [
        ("adaptive", 0, "'adaptive' is no selector: make one"),
        (None, "x", "seed is 'x'"),
        (None, 2**63, "64 bits"),
        (None, [1, 2], "seed is"),
        (None, True, "seed is True"),
        (None, -(2**63) - 1, "64 bits"),
        (selectors.Selector(None, None, None, None), 0, "is no selector: make one"),
    ],
)
def test_session_without_a_selector_is_refused(selector, seed, message):
    with pytest.raises(InputError, match=message):
        Session(selector or selectors.uniform(8), 12, seed)


@pytest.mark.parametrize(
    "tasks", [12.0, "12", None, [1, 2], True, -1, 0, 2**24 + 1, 10**400, np.ones((12, 2))]
)
def test_a_number_of_tasks_that_is_none_is_refused(tasks):
    with pytest.raises(
        InputError,
        match="the number of tasks is .*: it must be a whole number from 1 to "
        "16,777,216, or their Tasks",
    ):
        Session(selectors.uniform(8), tasks)


def test_numbers_of_other_libraries_are_numbers():
    session = Session(selectors.adaptive(8, epsilon=jnp.bfloat16(0.12)), np.int64(12), np.uint8(1))
    session.record(jnp.arange(2), jnp.array([1, 0], jnp.bfloat16), np.array([8, 8], np.uint8))
    session.record([], [], [])
    assert session.pass_rate()[0] > session.pass_rate()[1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (([0, 1], [1], [8, 8]), r"lengths \[2, 1, 2, 2\]"),
        (([0, 12], [1, 1], [8, 8]), "numbered from 0 to 11"),
        (([3, 3], [1, 1], [8, 8]), "comes once"),
        (([0, 1], [1, 9], [8, 8]), r"must be in \[0, trials\]"),
        (([0, 1], [1, float("nan")], [8, 8]), r"must be in \[0, trials\]"),
        (([0.0, 1.9], [1, 1], [8, 8]), r"ids are \[0.0, 1.9\]: tasks are numbered from 0 to 11"),
        (([True], [1], [8]), "numbered from 0 to 11"),
        (([2**32 + 3], [1], [8]), "numbered from 0 to 11"),
        (([0, 1], [[1], [1, 2]], [8, 8]), "successes are .*: give a list"),
        ((1, 0, 8), "ids are 1: give a list with one number a task"),
        (([0, 1], [[1], [1]], [8, 8]), "successes are .*: give a list"),
        (([0, 1], ["1", "1"], [8, 8]), "successes are .*: give a list"),
        (
            ([0, 1], [1, 1], [8, 8], [float("inf"), 1]),
            r"tokens are \[inf, 1.0\]: they are "
            r"numbers of 0 or more",
        ),
        (([0, 1], [1, 1], [8, 8], [-5, 1]), "numbers of 0 or more"),
        (([0, 1], [1, 1], [8, 8], [1e30, 1]), "numbers of 0 or more, at most 1e12"),
        (
            ([0, 1], [1, 1], [float("inf"), 8]),
            "trials are .inf, 8.0.: they must be 0, or positive, from 1e-12 to 1e12",
        ),
        (([0, 1], [1, 1], [1e39, 8]), "trials are .inf, 8.0.: they must be 0, or positive"),
        (([0, 1], [0, 1], [1e-45, 8]), "trials are .*: they must be 0, or positive"),
        (([0, 1], [0, 1], [-8, 8]), "trials are .-8.0, 8.0.: they must be 0, or positive"),
        (([0, 1], [1, 1], [float("nan"), 8]), "trials are .nan, 8.0.: they must be 0"),
        (
            ([0, 1], [-0.5, 1], [8, 8]),
            r"successes are .-0.5, 1.0. of .*: they must be in \[0, "
            r"trials\]",
        ),
        (([0, 1], [1, 1j], [8, 8]), "successes are .*: give a list"),
        (([0, 1], [1, 10**400], [8, 8]), "successes are .*: give a list"),
        (([0, 1], None, [8, 8]), "successes are None: give a list"),
        (([0, 1], [None, 1], [8, 8]), "successes are .None, 1.: give a list"),
        (([0, 1], "11", [8, 8]), "successes are '11': give a list"),
        (([-1, 1], [1, 1], [8, 8]), "numbered from 0 to 11"),
        (({0: 1}, [1], [8]), "ids are {0: 1}: give a list"),
        (([0, 1], [1, 1], [8, 8], "x"), "tokens are 'x': give a list"),
        (
            (list(range(1000)), [1] * 1000, [8] * 1000),
            r"ids are \[0, 1, .*\.\.\.: tasks are "
            r"numbered",
        ),
    ],
)
def test_invalid_record_is_refused(record, message):
    session = untouched()
    before = session.state_dict()
    with pytest.raises(InputError, match=message) as raised:
        session.record(*record)
    assert len(str(raised.value)) < 300
    for name, value in session.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@functools.cache
def untouched():
    """A session that every mistake leaves as it is."""
    return make()


STATE = "state.posterior.alpha"
DAMAGED = {
    "nothing": (
        lambda state: None,
        "the state is None: give what state_dict.. of a session returned",
    ),
    "a list": (
        lambda state: list(state.items()),
        r"the state is \[.*: give what state_dict.. "
        r"of a session returned",
    ),
    "text": (lambda state: "state.npz", "the state is 'state.npz': give what"),
    "empty": (lambda state: {}, "the state has no 'seed': it is that of another selector"),
    "less": (
        lambda state: without(state, "step"),
        "the state has no 'step': it is that of another selector",
    ),
    "more": (lambda state: state | {5: 1}, "the state has '5', which this one has not"),
    "NaN": (
        lambda state: state | {STATE: np.full(12, np.nan, np.float32)},
        f"'{STATE}' of the state holds numbers",
    ),
    "inf": (
        lambda state: state | {STATE: np.full(12, np.inf, np.float32)},
        f"'{STATE}' of the state holds numbers",
    ),
    "1e300": (
        lambda state: state | {STATE: np.full(12, 1e300)},
        f"'{STATE}' of the state holds numbers",
    ),
    "negative": (
        lambda state: state | {STATE: np.full(12, -0.5, np.float32)},
        "holds beliefs that are no pass rates",
    ),
    "shape": (
        lambda state: state | {STATE: np.ones(13, np.float32)},
        r"is float32\[13\] and "
        r"not float32\[12\]",
    ),
    "kind": (
        lambda state: state | {STATE: np.ones(12, int)},
        r"is int64\[12\] and not "
        r"float32\[12\]",
    ),
    "ragged": (
        lambda state: state | {STATE: [[1], [1, 2]]},
        r"is \[\[1\], \[1, 2\]\] and not "
        r"float32\[12\]",
    ),
    "no number": (
        lambda state: state | {"step": None},
        r"'step' of the state is None and not "
        r"int64\[\]",
    ),
    "step": (
        lambda state: state | {"step": np.asarray(-1)},
        "'step' of the state is .*-1.*: it must be a whole number",
    ),
    "late": (
        lambda state: state | {"step": np.asarray(2**40)},
        "'step' of the state is .*: it must be at most 2147483647",
    ),
}


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("name", DAMAGED)
def test_invalid_state_is_refused_and_changes_nothing(name):
    damage, message = DAMAGED[name]
    session = Session(selectors.mopps(8), 12, seed=3)
    before = session.state_dict()
    with pytest.raises(InputError, match=message) as raised:
        session.load_state_dict(damage(session.state_dict()))
    assert "\n" not in str(raised.value)
    for key, value in session.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_unknown_entries_of_a_state_load_as_nan():
    bots = Session(selectors.bots(8), Tasks(np.full((12, 2), 0.5)))
    assert np.isnan(bots.state_dict()["state.evidence.capability"])
    bots.load_state_dict(bots.state_dict())
    bots.record([0], [4], [8])
    bots.load_state_dict(Session(selectors.bots(8), Tasks(np.full((12, 2), 0.5))).state_dict())
    assert np.isnan(bots.state_dict()["state.evidence.capability"])


def test_documentation_runs():
    assert doctest.testmod(session).failed == 0
    with pytest.raises(InputError, match="give their number instead"):
        Session(selectors.uniform(8), Tasks())


def test_reference_set_and_choice_have_different_keys():
    """What a selector splits off its key are the fold-ins of the key with 0, 1, 2, ..."""
    key = jax.random.key(3)
    assert (jax.random.split(key)[0] == jax.random.fold_in(key, 0)).all()
    own = jax.random.fold_in(key, session.REFERENCES)
    assert not any((own == part).all() for part in jax.random.split(key, 1000))
