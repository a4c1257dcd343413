"""Defines what a selector is: pure functions over a state, which is a pytree of NamedTuples.

`select` needs to know the batch size when it is compiled, and may give its new state the memory of
the old one:

    jax.jit(selector.select, static_argnames="batch_size", donate_argnums=1)
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from jaxrft.mesh import constrain
from jaxrft.select import topk
from jaxrft.select.checks import check_feedback, check_select
from jaxrft.types import Array, Choice, Feedback, Tasks

State = TypeVar("State")
NewState = TypeVar("NewState", covariant=True)
AnyState = TypeVar("AnyState", contravariant=True)


class Init(Protocol[NewState]):
    """Returns the first state for a table of N tasks."""

    def __call__(self, tasks: Tasks, num_tasks: int) -> NewState: ...  # noqa: D102


class Select(Protocol[State]):
    """Chooses the tasks of a batch; those of the mask `exclude` [N] only where there are too few
    others.
    """

    def __call__(  # noqa: D102
        self,
        key: Array,
        state: State,
        tasks: Tasks,
        *,
        batch_size: int,
        exclude: Array | None = None,
    ) -> tuple[Choice, State]: ...


class Update(Protocol[State]):
    """Returns the state after feedback, with the shapes and dtypes of the old one.

    Feedback may come steps late, in any order and in parts, on tasks that have been chosen again
    meanwhile. Every call is one step of what decays or adapts by the step, and one visit of its
    tasks, as `Session.record` says.
    """

    def __call__(self, state: State, tasks: Tasks, feedback: Feedback) -> State: ...  # noqa: D102


class PassRate(Protocol[AnyState]):
    """Returns the pass rates [N] that are believed; NaN where there is no belief."""

    def __call__(self, state: AnyState, tasks: Tasks) -> Array: ...  # noqa: D102


class ReferenceSet(Protocol[AnyState]):
    """Draws the ids [K] of tasks from whose pass rates all others are predicted."""

    def __call__(self, key: Array, state: AnyState, tasks: Tasks) -> Array: ...  # noqa: D102


class Selector(NamedTuple, Generic[State]):
    """Chooses tasks, and updates its beliefs by their rollouts."""

    init: Init[State]
    select: Select[State]
    update: Update[State]
    pass_rate: PassRate[State]
    # rolled out every `reference_every` steps, before `select`
    reference_set: ReferenceSet[State] | None = None
    # takes their feedback, which `update` never sees
    update_references: Update[State] | None = None
    reference_every: int = 0


class Visited(Protocol):
    """A state that counts how often each task has been chosen."""

    @property
    def visits(self) -> Array: ...  # noqa: D102

    def _replace(self, *, visits: Array) -> Self: ...


Counting = TypeVar("Counting", bound=Visited)
# (state, quota, exclude) -> [N]
Score = Callable[[Counting, topk.Quota | None, Array | None], Array]


def select_smallest(
    score: Score[Counting], pass_rate: PassRate[Counting], balance: topk.Balance
) -> Select[Counting]:
    """Returns a `select` that takes the smallest scores, ties at random, and counts the visits of
    each task.
    """

    def select(
        key: Array, state: Counting, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, Counting]:
        batch_size = check_select(key, state.visits, tasks, batch_size=batch_size, exclude=exclude)
        key_quota, key_tie = jax.random.split(key)
        quota = topk.quota(
            key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude
        )
        scores = score(state, quota, exclude)
        ids = topk.smallest(key_tie, scores, batch_size=batch_size, quota=quota, exclude=exclude)
        visits = constrain(state.visits.at[ids].add(1), "task")
        return Choice(ids, pass_rate(state, tasks)[ids]), state._replace(visits=visits)

    return select


def ignore_feedback(state: State, tasks: Tasks, feedback: Feedback) -> State:
    """Returns the state as it is: the `update` of a selector that learns nothing."""
    check_feedback(feedback)
    return state


def no_pass_rate(state: Visited, tasks: Tasks) -> Array:
    """Returns a pass rate of NaN for every task: the `pass_rate` of a selector that believes
    nothing.
    """
    return no_belief(state.visits)


def no_belief(table: Array) -> Array:
    """Returns a pass rate of NaN for every row of the table, [N]."""
    return jnp.full(table.shape[:1], jnp.nan, jnp.float32)
