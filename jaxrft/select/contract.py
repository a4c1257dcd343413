"""What a selector is, and how a program keeps its state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxrft.types import Array, Choice, Feedback, Tasks


class Selector(NamedTuple):
    """Pure functions; their state is a pytree of NamedTuples, a fixed point of `update` in shape and dtype."""

    init: Callable[[Tasks, int], Any]  # (tasks, N) -> state
    select: Callable[[Array, Any, Tasks], tuple[Choice, Any]]  # (key, state, tasks)
    update: Callable[[Any, Tasks, Feedback], Any]  # -> state
    pass_rate: Callable[[Any, Tasks], Array]  # [N], what is believed of every task; NaN where nothing is
    probe: Callable[[Array, Any, Tasks], Array] | None = None  # ids [K] to roll out only in order to know, every
    probe_every: int = 0  # so many steps; their feedback goes through the same update
    measure: Callable[[Array, int], Array] | None = None  # (key, N) -> ids whose pass rates the caller puts into
    measure_every: int = 0  # Tasks.pass_rates, NaN for all others, every so many steps, by rollouts that nobody counts


Changed = dict[int, Array]  # leaves of a state by their number


def choosing(selector: Selector) -> Callable[[Array, Any, Tasks], tuple[Choice, Changed]]:
    """`select` for a program: (key, state, tasks) -> choice, and of the state only what it changes, for `merged`.

    A program copies what it returns as it came, and most of a state is not changed by choosing.
    """

    def choose(key: Array, state: Any, tasks: Tasks) -> tuple[Choice, Changed]:
        choice, after = selector.select(key, state, tasks)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
        return choice, {number: new for number, (old, new) in enumerate(pairs) if new is not old}

    return choose


def merged(state: Any, changed: Changed) -> Any:
    """The state with the leaves that have `changed`."""
    leaves, structure = jax.tree.flatten(state)
    return structure.unflatten(changed.get(number, leaf) for number, leaf in enumerate(leaves))
