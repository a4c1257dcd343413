"""What a selector is, and the checks that all of them make."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxrft.select.acquire import Balance
from jaxrft.types import Array, Choice, Feedback, InputError, Tasks


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


def check(name: str, value: ArrayLike, fits: Callable[[np.ndarray], Any], wanted: str) -> None:
    """Raises InputError unless `value` is numbers all of which `fits`; a tracer has no value to check."""
    if isinstance(value, Tracer):
        return
    found = np.asarray(value)
    if not are_numbers(found) or not np.all(fits(found)):
        raise InputError(f"{name} is {value}: it must be {wanted}")


def are_numbers(values: np.ndarray) -> bool:
    """Whether they are real numbers of any kind, bfloat16 and truth values among them."""
    kind = values.dtype
    return kind == np.bool_ or jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)


def is_whole(value: np.ndarray) -> bool:
    """Whether it is a single whole number."""
    return value.ndim == 0 and value.dtype.kind in "iu"


def check_count(name: str, value: Any, least: int = 1, wanted: str = "") -> None:
    """Raises InputError unless `value` is a whole number of at least `least`, which `wanted` may put otherwise."""
    check(name, value, lambda x: is_whole(x) and x >= least, f"a whole number, {wanted or f'at least {least}'}")


def check_belief(target: ArrayLike, prior: tuple[ArrayLike, ArrayLike]) -> None:
    """Raises InputError unless `target` is a pass rate apart from 0 and 1 and `prior` two positive numbers."""
    check("target", target, lambda x: (x > 0) & (x < 1), "in (0, 1)")
    for count in prior:
        check("prior", count, lambda x: (x > 0) & (x < np.inf), "two positive numbers")


def check_sizes(batch_size: int, num_generations: int) -> None:
    """Raises InputError unless both are whole numbers and at least 1."""
    for name, value in (("batch_size", batch_size), ("num_generations", num_generations)):
        check_count(name, value)


def check_table(batch_size: int, num_tasks: int) -> None:
    """Raises InputError for a table smaller than a batch, whose ids could not be distinct."""
    if num_tasks < batch_size:
        raise InputError(f"batch_size is {batch_size} but there are {num_tasks} tasks: give more tasks, or lower it")


def check_balance(balance: str, tasks: Tasks, num_tasks: int) -> None:
    """Raises InputError for a balance there is not, and for tasks without the domains that it needs."""
    if balance not in get_args(Balance):
        raise InputError(f"no balance {balance!r} of the domains: choose one of {', '.join(get_args(Balance))}")
    if balance != "none":
        count_domains(tasks, num_tasks)


def check_domains(domain: Array, num_tasks: int) -> None:
    """Raises InputError unless they are a whole number for each task."""
    if not jnp.issubdtype(domain.dtype, jnp.integer):
        raise InputError(f"domains are {domain.dtype}: number them from 0")
    if domain.shape != (num_tasks,):
        raise InputError(f"domains have shape {domain.shape}: there must be one for each of {num_tasks} tasks")


def count_domains(tasks: Tasks, num_tasks: int) -> int:
    """How many domains there are, numbered from 0; their bound `num_tasks` while a tracer hides them.

    Raises InputError for domains that are missing, not a whole number a task, or numbered from elsewhere.
    """
    domain = tasks.domain
    if domain is None:
        raise InputError(
            "nothing tells the tasks' domains that this selector is to keep apart: "
            "name their column in tasks.domain_column, or pass them in Tasks.domain"
        )
    check_domains(domain, num_tasks)
    if isinstance(domain, Tracer):
        return num_tasks
    with jax.ensure_compile_time_eval():  # on the device: a process may hold a part of the table only
        least, most = int(jnp.min(domain)), int(jnp.max(domain))
    if least < 0 or most >= num_tasks:
        raise InputError(f"domains are numbered from {least} to {most}: number them from 0, without leaving any out")
    return most + 1
