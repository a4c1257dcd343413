"""A selector for the training loops of other libraries: plain numbers in and out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.errors import shown
from jaxrft.select.base import Selector
from jaxrft.select.checks import (
    COUNTED,
    NOT_NEGATIVE,
    POSITIVE,
    are_numbers,
    as_array,
    check_count,
    check_flag,
)
from jaxrft.types import Array, Feedback, InputError, Projections, Tasks

# no index that selectors use themselves: jax.random.split(key)[i] is fold_in(key, i)
REFERENCES = 2**32 - 1


class Session:
    """Holds a selector's state between the steps of a loop: `next`, roll out, `record`.

    With `dots`, roll out and record the `reference_set` before.

    >>> from jaxrft.select import selectors
    >>> session = Session(selectors.adaptive(num_generations=4), 6)
    >>> ids = session.next(batch_size=2)
    >>> session.record(ids, successes=[4, 1], trials=[4, 4])
    >>> len(ids), session.pass_rate().shape
    (2, (6,))

    A loop that rolls out ahead records late, in any order and in parts, as `record` says.

    `tasks` is the number of tasks, or their table `Tasks`. The same seed, selector and records make
    the same choices. A session that loads the `state_dict` of another one continues like it.
    """

    def __init__(self, selector: Selector, tasks: Tasks | int, seed: int = 0):
        """Raises InputError for `tasks` without the columns that the selector needs."""
        functions = selector[:4] if isinstance(selector, Selector) else ()
        if not functions or not all(map(callable, functions)):
            raise InputError(
                f"{shown(selector)} is no selector: make one, as with selectors.adaptive(8)"
            )
        self._seed = check_count(
            "seed", seed, -(2**63), most=2**63 - 1, wanted="a whole number of 64 bits"
        )
        self._step = 0
        if isinstance(tasks, Tasks):
            tables = _arrays(tasks)
            self._number = _number(tables)
        else:
            tables = Tasks()
            wanted = f"a whole number from 1 to {COUNTED:,}, or their Tasks"
            self._number = check_count("the number of tasks", tasks, most=COUNTED, wanted=wanted)
        self._state = selector.init(tables, self._number)
        self._tasks = jax.tree.map(jnp.asarray, tables)
        named = self._named_state().items()
        self._unknown = {name for name, x in named if x.dtype.kind == "f" and np.isnan(x).any()}
        self._select = jax.jit(selector.select, static_argnames="batch_size")
        self._update = jax.jit(selector.update)
        self._reference_set = selector.reference_set and jax.jit(selector.reference_set)
        self._update_references = selector.update_references and jax.jit(selector.update_references)
        self._reference_every = selector.reference_every
        self._pass_rate = selector.pass_rate

    def reference_set(self) -> np.ndarray:
        """Returns the ids [K] of tasks to roll out and `record` before the call of `next`.

        Only `dots` has reference sets, every `reference_every` steps. In other steps there are no
        ids.
        """
        if self._reference_set is None or self._step % self._reference_every:
            return np.zeros(0, np.int32)
        key = jax.random.fold_in(self._key(), REFERENCES)
        return np.asarray(self._reference_set(key, self._state, self._tasks))

    def next(self, batch_size: int) -> np.ndarray:
        """Returns the ids [B] of the tasks to roll out next; each batch size compiles the choice
        again.

        Raises InputError for a batch size that is no whole number from 1 to the number of tasks.
        """
        batch_size = check_count("batch_size", batch_size)
        choice, self._state = self._select(
            self._key(), self._state, self._tasks, batch_size=batch_size
        )
        self._step += 1
        return np.asarray(choice.ids)

    def record(
        self,
        ids: Sequence[int] | np.ndarray,
        successes: Sequence[float] | np.ndarray,
        trials: Sequence[float] | np.ndarray,
        tokens: Sequence[float] | np.ndarray | None = None,
        *,
        reference: bool = False,
    ) -> None:
        """Updates the selector by the rollouts of the tasks `ids`: `successes` of `trials` each,
        fractions allowed.

        `tokens`: completion tokens of each task's rollouts. `trials` of 0 marks a task without
        rollouts. `reference`: the tasks are a `reference_set`. Another number of tasks than
        before compiles the update again.

        Feedback may come any number of steps late, in another order than the choices, and in parts:

        >>> from jaxrft.select import selectors
        >>> session = Session(selectors.mopps(num_generations=4), 6)
        >>> first, second = session.next(batch_size=2), session.next(batch_size=2)
        >>> session.record(second, successes=[4, 1], trials=[4, 4])
        >>> session.record(first[:1], successes=[2], trials=[4])
        >>> session.record(first[1:], successes=[0], trials=[4])

        Every call is one step of what a selector does by the step: `bots` decays all evidence and
        adds implicit evidence of all other tasks, `greso` moves its two chances, and `adaptive`
        adds the variance of its random walk. So a batch in two calls is two steps. `mopps`,
        `retire` and the streaks of `greso` change with the recorded tasks only. Every call is one
        visit of its tasks. If a task's rollouts come in two calls, `mopps` discounts twice, `greso`
        counts two visits, and `retire` goes by the pass rate of the last call. So give those of a
        task together. A task that was chosen again before it was recorded takes both records. A
        choice that is never recorded has no effect on later choices.

        Raises InputError for lengths that differ, ids that are no task's or come twice, successes
        outside [0, trials], invalid tokens, and references of a selector without reference sets.
        """
        tasks = _column("ids", ids)
        spent = np.zeros(len(tasks)) if tokens is None else tokens
        given = {"successes": successes, "trials": trials, "tokens": spent}
        with np.errstate(over="ignore"):
            columns = [_column(name, values).astype(np.float32) for name, values in given.items()]
        self._check(tasks, *columns)
        feedback = Feedback(*map(jnp.asarray, (tasks.astype(np.int32), *columns)))
        update = self._update_references if check_flag("reference", reference) else self._update
        if update is None:
            raise InputError(
                "reference is True, but this selector has no reference sets: leave it out"
            )
        self._state = update(self._state, self._tasks, feedback)

    def pass_rate(self) -> np.ndarray:
        """Computes the pass rates [N] that the selector believes; NaN where there is no belief."""
        return np.asarray(self._pass_rate(self._state, self._tasks))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Collects the state in a flat dictionary of numpy arrays.

        numpy.savez and safetensors.numpy.save_file take it.
        """
        return self._named_state() | {
            "step": np.asarray(self._step),
            "seed": np.asarray(self._seed),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continues from the state of another session.

        Raises InputError, and stays as it is, for the state of another selector or of another
        number of tasks, and for one with numbers that no session has.
        """
        if not isinstance(state, Mapping):
            raise InputError(
                f"the state is {shown(state)}: give what state_dict() of a session returned"
            )
        expected = self.state_dict()
        if others := state.keys() - expected.keys():
            raise InputError(
                f"the state has {shown(min(map(str, others)))}, which this one has not: it is "
                "that of another selector"
            )
        if missing := expected.keys() - state.keys():
            raise InputError(f"the state has no {min(missing)!r}: it is that of another selector")
        loaded = {name: self._leaf(name, state[name], value) for name, value in expected.items()}
        step = check_count("'step' of the state", loaded.pop("step"), 0)
        seed = int(loaded.pop("seed"))
        leaves, structure = jax.tree.flatten(self._state)
        pairs = zip(loaded.values(), leaves, strict=True)
        candidate = jax.tree.unflatten(
            structure, [jnp.asarray(value, leaf.dtype) for value, leaf in pairs]
        )
        believed = np.asarray(self._pass_rate(candidate, self._tasks))
        if ((believed < 0) | (believed > 1)).any():
            raise InputError(
                "the state holds beliefs that are no pass rates in [0, 1]: it was "
                "damaged, save it again"
            )
        self._state = candidate
        self._step = step
        self._seed = seed

    def _named_state(self) -> dict[str, np.ndarray]:
        """Returns the leaves of the selector's state by their names."""
        leaves = jax.tree_util.tree_flatten_with_path(self._state)[0]
        return {"state" + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def _leaf(self, name: str, value: object, like: np.ndarray) -> np.ndarray:
        """Returns one entry of a state to load; raises InputError unless it can take the place of
        `like`.

        NaN, which is unknown, is taken only where a new session has it.
        """
        array = as_array(value)
        if array is None or array.shape != like.shape or array.dtype.kind != like.dtype.kind:
            description = shown(value)
            if array is not None and are_numbers(array):
                description = f"{array.dtype}{list(array.shape)}"
            raise InputError(
                f"{name!r} of the state is {description} and not {like.dtype}{list(like.shape)}: "
                "it is of another selector or other tasks"
            )
        with np.errstate(over="ignore"):
            converted = array.astype(like.dtype)
        is_float = like.dtype.kind == "f"
        infinite = is_float and np.isinf(converted).any()
        unknown = is_float and np.isnan(converted).any() and name not in self._unknown
        if infinite or unknown or (like.dtype.kind == "i" and (converted != array).any()):
            raise InputError(
                f"{name!r} of the state holds numbers that no session has: it was "
                "damaged, save it again"
            )
        return converted

    def _key(self) -> Array:
        """Derives the random key of this step from the seed."""
        return jax.random.fold_in(jax.random.key(self._seed), self._step)

    def _check(
        self, ids: np.ndarray, successes: np.ndarray, trials: np.ndarray, tokens: np.ndarray
    ) -> None:
        """Raises InputError for the first invalid column of a record."""
        lengths = [len(x) for x in (ids, successes, trials, tokens)]
        if len(set(lengths)) > 1:
            raise InputError(
                f"ids, successes, trials and tokens have lengths {lengths}: they must have one "
                "entry a task"
            )
        if len(ids) and ids.dtype.kind not in "iu" or ((ids < 0) | (ids >= self._number)).any():
            raise InputError(
                f"ids are {shown(ids.tolist())}: tasks are numbered from 0 to {self._number - 1}"
            )
        if len(np.unique(ids)) < len(ids):
            raise InputError(
                f"ids are {shown(ids.tolist())}: a task comes once, with the sum over its rollouts"
            )
        if not ((trials == 0) | POSITIVE.fits(trials)).all():
            raise InputError(
                f"trials are {shown(trials.tolist())}: they must be 0, or {POSITIVE.wanted}"
            )
        if not ((successes >= 0) & (successes <= trials)).all():
            counts = f"{shown(successes.tolist())} of {shown(trials.tolist())} trials"
            raise InputError(f"successes are {counts}: they must be in [0, trials]")
        if not NOT_NEGATIVE.fits(tokens).all():
            raise InputError(
                f"tokens are {shown(tokens.tolist())}: they are numbers of {NOT_NEGATIVE.wanted}"
            )


def _column(name: str, values: object) -> np.ndarray:
    """Converts the numbers given for each task to an array [n]."""
    column = as_array(values)
    if column is None or column.ndim != 1 or not are_numbers(column):
        raise InputError(f"{name} are {shown(values)}: give a list with one number a task")
    return column


def _arrays(tasks: Tasks) -> Tasks:
    """Converts the lists among the columns of the tasks to numpy arrays, for `checks` to see."""

    def array(name: str, value: object) -> Any:
        if value is None or isinstance(value, jax.Array | np.ndarray):
            return value
        if isinstance(value, Projections):
            return Projections(*(array(name, part) for part in value))
        column = as_array(value)
        if column is None or not are_numbers(column):
            raise InputError(
                f"Tasks.{name} is {shown(value)}, not an array of numbers: give an array with "
                "one row a task"
            )
        return column

    return Tasks(**{name: array(name, value) for name, value in tasks._asdict().items()})


def _number(tasks: Tasks) -> int:
    """Returns how many tasks there are."""
    rows = {len(x) if x.ndim else 0 for x in jax.tree.leaves(tasks)}
    if not rows:
        raise InputError(
            "Tasks() has no columns, and the number of tasks is unknown: give their number instead"
        )
    if len(rows) > 1:
        raise InputError(
            f"the tables of Tasks have {sorted(rows)} rows: give one row a task in each"
        )
    return rows.pop()
