"""A selector for other people's loops: plain numbers in and out, whatever framework trains the policy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.select.contract import Selector, are_numbers, check, choosing, is_whole, merged
from jaxrft.types import Array, Feedback, InputError, Projections, Tasks

PROBE = 2**32 - 1  # far from what selectors split off their key: jax.random.split(key)[i] is fold_in(key, i)


class Session:
    """Holds a selector's state between the steps of a loop: `next`, roll out, `record`; for `dots`, `probe` before.

    >>> from jaxrft.select import selectors
    >>> session = Session(selectors.adaptive(batch_size=2, num_generations=4), 6)
    >>> ids = session.next()
    >>> session.record(ids, successes=[4, 1], trials=[4, 4])
    >>> len(ids), session.pass_rate().shape
    (2, (6,))

    `tasks` is their number, or the `Tasks` that say something about each. The same seed, selector and records make the
    same choices; a session that loads another's `state_dict` continues as it would have.
    """

    def __init__(self, selector: Selector, tasks: Tasks | int, seed: int = 0):
        """Raises InputError for a selector that asks for what `tasks` do not say, or for more tasks than there are."""
        if not isinstance(selector, Selector):
            raise InputError(f"{selector!r} is no selector: make one, as with selectors.adaptive(16, 8)")
        check("seed", seed, lambda x: is_whole(x) and x < 2**63, "a whole number of 64 bits")
        if isinstance(tasks, Tasks):
            self._tasks = _arrays(tasks)
            self._number = _number(self._tasks)
        else:
            check("the number of tasks", tasks, is_whole, "a whole number, or their Tasks")
            self._tasks, self._number = Tasks(), int(tasks)
        self._seed, self._step = int(seed), 0
        self._state = selector.init(self._tasks, self._number)
        self._select, self._update = jax.jit(choosing(selector)), jax.jit(selector.update)
        self._probe = selector.probe and jax.jit(selector.probe)
        self._probe_every = selector.probe_every
        self._pass_rate = selector.pass_rate

    def probe(self) -> np.ndarray:
        """Ids of tasks to roll out and `record` before the `next` ones, only in order to know; often none.

        Only a selector that probes (`dots`) ever asks for any, and then every `probe_every` steps.
        """
        if self._probe is None or self._step % self._probe_every:
            return np.zeros(0, np.int32)
        key = jax.random.fold_in(self._key(), PROBE)
        return np.asarray(self._probe(key, self._state, self._tasks))

    def next(self) -> np.ndarray:
        """Ids [B] of the tasks to roll out next."""
        choice, changed = self._select(self._key(), self._state, self._tasks)
        self._state = merged(self._state, changed)
        self._step += 1
        return np.asarray(choice.ids)

    def record(
        self,
        ids: Sequence[int] | np.ndarray,
        successes: Sequence[float] | np.ndarray,
        trials: Sequence[float] | np.ndarray,
        tokens: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Tells the selector what came of the tasks `ids`: `successes` of `trials` rollouts each, fractions allowed.

        `tokens`: completion tokens of each task's rollouts. `trials` of 0 marks a task of which nothing is known.
        Raises InputError for lengths that differ, ids that are no task's or come twice, successes outside [0, trials]
        and tokens that cannot be. Another number of tasks than before compiles the update again.
        """
        tasks = _column("ids", ids)
        spent = np.zeros(len(tasks)) if tokens is None else tokens
        given = {"successes": successes, "trials": trials, "tokens": spent}
        columns = [_column(name, values).astype(np.float32) for name, values in given.items()]
        self._check(tasks, *columns)
        feedback = Feedback(*map(jnp.asarray, (tasks.astype(np.int32), *columns)))
        self._state = self._update(self._state, self._tasks, feedback)

    def pass_rate(self) -> np.ndarray:
        """Pass rates [N] that the selector believes the tasks to have; NaN where it believes nothing."""
        return np.asarray(self._pass_rate(self._state, self._tasks))

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as a flat dictionary of numpy arrays, for numpy.savez or safetensors.numpy.save_file."""
        leaves = jax.tree_util.tree_flatten_with_path(self._state)[0]
        named = {"state" + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return named | {"step": np.asarray(self._step), "seed": np.asarray(self._seed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where the session that gave `state` stood.

        Raises InputError for the state of another selector, or of another number of tasks.
        """
        expected = self.state_dict()
        if others := state.keys() - expected.keys():
            raise InputError(
                f"the state has {min(map(str, others))!r}, which this one has not: it is that of another selector"
            )
        for name, value in expected.items():
            if name not in state:
                raise InputError(f"the state has no {name!r}: it is that of another selector")
            found = np.asarray(state[name])
            if found.shape != value.shape or found.dtype.kind != value.dtype.kind:
                had, has = (f"{x.dtype}{list(x.shape)}" for x in (found, value))
                raise InputError(
                    f"{name!r} of the state is {had} and not {has}: it is of another selector or other tasks"
                )
        leaves, structure = jax.tree.flatten(self._state)
        names = [name for name in expected if name.startswith("state")]
        self._state = jax.tree.unflatten(
            structure, [jnp.asarray(state[name], leaf.dtype) for name, leaf in zip(names, leaves, strict=True)]
        )
        self._step, self._seed = int(state["step"]), int(state["seed"])

    def _key(self) -> Array:
        """The random key of this step."""
        return jax.random.fold_in(jax.random.key(self._seed), self._step)

    def _check(self, ids: np.ndarray, successes: np.ndarray, trials: np.ndarray, tokens: np.ndarray) -> None:
        """Raises InputError for the first thing that cannot be recorded."""
        lengths = [len(x) for x in (ids, successes, trials, tokens)]
        if len(set(lengths)) > 1:
            raise InputError(
                f"ids, successes, trials and tokens have lengths {lengths}: they must have one entry a task"
            )
        if len(ids) and ids.dtype.kind not in "iu" or ((ids < 0) | (ids >= self._number)).any():
            raise InputError(f"ids are {ids.tolist()}: tasks are numbered from 0 to {self._number - 1}")
        if len(np.unique(ids)) < len(ids):
            raise InputError(f"ids are {ids.tolist()}: a task comes once, with the sum over its rollouts")
        if not ((successes >= 0) & (successes <= trials) & np.isfinite(trials)).all():
            raise InputError(f"successes are {successes.tolist()} of {trials.tolist()} trials: they lie in [0, trials]")
        if not ((tokens >= 0) & np.isfinite(tokens)).all():
            raise InputError(f"tokens are {tokens.tolist()}: they are numbers of 0 or more")


def _column(name: str, values: Any) -> np.ndarray:
    """The numbers given for each task [n]."""
    found = _array(values)
    if found is None or found.ndim != 1 or not are_numbers(found):
        raise InputError(f"{name} are {values!r}: give a list with one number a task")
    return found


def _array(values: Any) -> np.ndarray | None:
    """An array of whatever somebody's loop has; None where numpy can make none of it."""
    try:
        return np.asarray(values)
    except (RuntimeError, TypeError, ValueError):  # rows that differ in length; torch's gradients and bfloat16
        return None


def _arrays(tasks: Tasks) -> Tasks:
    """The tasks with arrays for what lists there are."""

    def array(name: str, value: Any) -> Any:
        if value is None or isinstance(value, jax.Array | Projections):
            return jax.tree.map(jnp.asarray, value)
        found = _array(value)
        if found is None or not are_numbers(found):
            raise InputError(f"Tasks.{name} is no table of numbers: give an array with one row a task")
        return jnp.asarray(found)

    return Tasks(**{name: array(name, value) for name, value in tasks._asdict().items()})


def _number(tasks: Tasks) -> int:
    """How many tasks there are."""
    rows = {len(x) if x.ndim else 0 for x in jax.tree.leaves(tasks)}
    if not rows:
        raise InputError("Tasks() says nothing, not even how many tasks there are: give their number instead")
    if len(rows) > 1:
        raise InputError(f"the tables of Tasks have {sorted(rows)} rows: give one row a task in each")
    return rows.pop()
