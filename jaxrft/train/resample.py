"""Fills the slots of a batch: with tasks that the selector chooses, reference groups, and tasks
chosen again.

A selector with a reference set (DOTS) has it rolled out before it chooses; its informative groups
nearest the target take slots of the batch, see `jaxrft.select.reference_groups`. Dynamic sampling
[arXiv 2503.14476] chooses and rolls out more tasks, in place of those whose groups are not
informative. Deviations: the size of a round is estimated from the share of informative groups so
far, in quarters of the batch and at most the whole batch; after the last round, groups that are not
informative keep their slots, so that the batch never shrinks. The selector is updated once a step,
by all groups, as the policy is updated once a step.
"""

from collections import Counter
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.learn import grpo
from jaxrft.learn.replay import Groups
from jaxrft.report.log import Timer
from jaxrft.rewards.grading import Rewards
from jaxrft.select import reference_groups
from jaxrft.streams import STREAMS
from jaxrft.train.setup import Setup
from jaxrft.train.state import TrainState
from jaxrft.train.step import Metrics, ScoredGroups, Step, widen
from jaxrft.types import Array, Choice, Feedback

SELECT = STREAMS.index("select")
REFERENCES = STREAMS.index("rollout of references")
RESAMPLE = STREAMS.index("resample")  # of the first round; later rounds have the numbers after it
PREDICTION = tuple(
    f"select/{name}" for name in ("brier", "pearson", "auc", "effective_group_ratio")
)


class ReferenceGroups(NamedTuple):
    """The groups of a reference set; none in a step without one."""

    ids: np.ndarray = np.zeros(0, np.int32)  # [K]
    # [K], distance of the pass rate to the target; infinite = not informative
    distance: np.ndarray = np.zeros(0, np.float32)
    parts: tuple[Groups, ...] = ()  # of several batches, [K] when concatenated
    metrics: Metrics = {}
    failures: Counter[str] = Counter()  # rewards lost, by kind

    def nearest(self) -> np.ndarray:
        """Returns the rows of the informative groups, those nearest the target first, [m] int."""
        order = np.argsort(self.distance, kind="stable")
        return order[: np.isfinite(self.distance).sum()]


class Slots(NamedTuple):
    """The number of slots to roll out, and the reference groups that fill the rest."""

    size: int
    fresh: int  # slots for the tasks that `select` chooses
    exclude: np.ndarray  # [size - fresh] int32, the tasks of the reference groups


class Round(NamedTuple):
    """Tasks of one choice, rolled out and graded."""

    choice: Choice  # [n]
    ids: np.ndarray  # [n] int32, on the host
    scored: ScoredGroups
    informative: np.ndarray  # [n] bool, on the host
    rewards: Rewards


class Batch(NamedTuple):
    """The groups that a step learns from, and all rounds of rollouts behind them."""

    groups: Groups  # [B]
    ids: np.ndarray  # [B] int32, their tasks; -1 = empty slot
    informative: np.ndarray  # [B] bool, successes not all equal
    rounds: tuple[Round, ...]
    metrics: Metrics
    # Informative groups without a slot: (groups in parts, mask of their rows).
    surplus: tuple[tuple[tuple[Groups, ...], np.ndarray], ...] = ()


def collect(step: Step, state: TrainState, timer: Timer) -> tuple[Batch, TrainState]:
    """Selects, rolls out, grades and scores, once or in rounds, until the batch is full."""
    selector = step.setup.selector
    references = ReferenceGroups()
    if selector.reference_every and int(state.step) % selector.reference_every == 0:
        references, state = roll_out_references(step, state)
        timer.lap("reference_set")
    slots = plan_slots(step, state, references)
    choice, state = step.select(state, batch_size=slots.fresh, exclude=slots.exclude, stream=SELECT)
    ids = np.asarray(choice.ids)
    timer.lap("select")
    first = roll_out(step, state, choice, ids, timer)
    batch = fill_slots(step, first, references, slots)
    if step.setup.config.dynamic_sampling:
        batch, state = resample(step, state, batch, references)
        timer.lap("resample")
    return batch, state


def learn(step: Step, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Updates the selector by the feedback of all rounds, and the policy by the batch."""
    choice, feedback = all_feedback(step.setup, batch.rounds)
    state, selector_metrics = step.update_selector(state, choice, feedback)
    state, update_metrics = step.learn(state, batch.groups, batch.surplus)
    return state, batch.metrics | selector_metrics | update_metrics


def roll_out(
    step: Step, state: TrainState, choice: Choice, ids: np.ndarray, timer: Timer | None = None
) -> Round:
    """Rolls out, grades and scores the tasks of a choice."""
    rolled = step.roll_out(state, ids)
    if timer is not None:
        timer.lap("rollout")
    rewards = step.grade(rolled)
    if timer is not None:
        timer.lap("reward")
    scored = step.score(state, rolled, rewards)
    return Round(choice, ids, scored, np.asarray(scored.informative), rewards)


def roll_out_references(step: Step, state: TrainState) -> tuple[ReferenceGroups, TrainState]:
    """Rolls out the reference set, a batch at a time, and updates the selector by its feedback."""
    choice = step.reference_set(state)
    ids = np.asarray(choice.ids)
    size = step.setup.config.batch_size
    scored = []
    failures = Counter()
    for part in np.split(ids, range(size, len(ids), size)):
        rolled = step.roll_out(state, part, stream=REFERENCES)
        rewards = step.grade(rolled)
        scored.append(step.score(state, rolled, rewards))
        failures.update(rewards.failures)
    feedback = [(each.feedback, each.informative) for each in scored]
    state, measured = step.update_selector(state, choice, *feedback, is_reference_set=True)
    metrics = {name.replace("select/", "select/references/"): measured[name] for name in PREDICTION}
    references = ReferenceGroups(
        ids=ids,
        distance=np.concatenate([np.asarray(each.distance) for each in scored]),
        parts=tuple(each.groups for each in scored),
        metrics=metrics | {"select/references": len(ids)},
        failures=failures,
    )
    return references, state


def plan_slots(step: Step, state: TrainState, references: ReferenceGroups) -> Slots:
    """Decides which reference groups are trained on, and how many tasks fill the other slots."""
    size = step.num_fresh(state)
    if not references.parts:
        return Slots(size, size, references.ids)
    multiple = meshes.shards(step.setup.mesh, "batch")
    nearest = references.nearest()
    sizes = reference_groups.batch_sizes(size, multiple=multiple)
    fresh = sizes[reference_groups.batch_size_index(size, len(nearest), multiple=multiple)]
    return Slots(size, fresh, references.ids[nearest[: size - fresh]])


def fill_slots(step: Step, first: Round, references: ReferenceGroups, slots: Slots) -> Batch:
    """Makes a batch of the chosen tasks and, in the other slots, reference groups.

    With dynamic sampling, reference groups also take the slots of groups that are not informative.
    """
    metrics = first.scored.metrics | references.metrics
    for kind, lost in first.rewards.failures.items():
        metrics[f"rewards/{kind}"] = lost + references.failures[kind]
    empty = (0, slots.size - slots.fresh)
    batch = Batch(
        groups=first.scored.groups,
        ids=np.pad(first.ids, empty, constant_values=-1),
        informative=np.pad(first.informative, empty),
        rounds=(first,),
        metrics=metrics,
    )
    if not references.parts:
        return batch
    open_slots = np.arange(slots.fresh, slots.size)
    if step.setup.config.dynamic_sampling:
        open_slots = np.concatenate([open_slots, np.flatnonzero(~first.informative)])
    batch = put_groups(
        step.setup, batch, open_slots, references.ids, references.parts, references.nearest()
    )
    trained = int(np.isin(batch.ids, np.setdiff1d(references.ids, first.ids)).sum())
    return batch._replace(metrics=batch.metrics | {"select/references/trained": trained})


def resample(
    step: Step, state: TrainState, batch: Batch, references: ReferenceGroups
) -> tuple[Batch, TrainState]:
    """Chooses and rolls out more tasks while groups of the batch are not informative, and replaces
    those groups by informative ones.

    No task is rolled out twice, so that all rollouts of a step use one random stream.
    """
    setup = step.setup
    surplus_before = len(batch.surplus)
    failures = Counter()
    for number in range(setup.config.dynamic_sampling):
        rolled = np.unique(np.concatenate([references.ids, *(each.ids for each in batch.rounds)]))
        count = round_size(setup, batch, setup.num_tasks - len(rolled))
        if count == 0:
            break
        choice, state = step.select(
            state, batch_size=count, exclude=rolled, stream=RESAMPLE + number
        )
        more = roll_out(step, state, choice, np.asarray(choice.ids))
        failures.update(more.rewards.failures)
        batch = batch._replace(rounds=(*batch.rounds, more))
        open_slots = np.flatnonzero(~batch.informative)
        informative = np.flatnonzero(more.informative)
        batch = put_groups(setup, batch, open_slots, more.ids, (more.scored.groups,), informative)
    all_informative = np.concatenate([each.informative for each in batch.rounds])
    metrics = {
        "dynamic_sampling/resamples": len(batch.rounds) - 1,
        "dynamic_sampling/rejected": 1 - all_informative.mean(),
        "dynamic_sampling/surplus": sum(
            int(rows.sum()) for _, rows in batch.surplus[surplus_before:]
        ),
        "dynamic_sampling/informative": batch.informative.mean(),
    }
    for kind, lost in failures.items():
        metrics[f"rewards/{kind}"] = batch.metrics[f"rewards/{kind}"] + lost
    return batch._replace(metrics=batch.metrics | metrics), state


def round_size(setup: Setup, batch: Batch, num_others: int) -> int:
    """Estimates how many of the tasks not rolled out yet, `num_others`, the batch needs; 0 = none.

    The estimate is the number of open slots over the share of informative groups so far. It is
    rounded up to the `reference_groups.batch_sizes`, each a compiled program.
    """
    sizes = reference_groups.batch_sizes(
        len(batch.ids), multiple=meshes.shards(setup.mesh, "batch")
    )
    sizes = [size for size in sizes if size <= num_others]
    if batch.informative.all() or not sizes:
        return 0
    informative = np.concatenate([each.informative for each in batch.rounds])
    wanted = (~batch.informative).sum() * len(informative) / max(informative.sum(), 1)
    return next((size for size in sizes if size >= wanted), sizes[-1])


def put_groups(
    setup: Setup,
    batch: Batch,
    open_slots: np.ndarray,
    ids: np.ndarray,
    parts: tuple[Groups, ...],
    informative: np.ndarray,
) -> Batch:
    """Puts groups into the open slots of the batch.

    The groups are the rows `informative` [m] of the concatenated `parts`, of tasks `ids`, in this
    order. Groups whose task is in the batch already, and those without a slot, become surplus.
    """
    joining = informative[~np.isin(ids[informative], batch.ids)][: len(open_slots)]
    surplus = np.setdiff1d(informative, joining)
    if len(surplus):
        surplus_rows = np.isin(np.arange(len(ids)), surplus)
        batch = batch._replace(surplus=(*batch.surplus, (parts, surplus_rows)))
    if not len(joining):
        return batch
    slots = open_slots[: len(joining)]
    rows = np.arange(len(batch.ids), dtype=np.int32)
    rows[slots] = batch.groups.step.shape[0] + joining
    tasks = batch.ids.copy()
    tasks[slots] = ids[joining]
    is_informative = batch.informative.copy()
    is_informative[slots] = True
    groups = take_groups(setup, batch.groups, parts, rows)
    return batch._replace(groups=groups, ids=tasks, informative=is_informative)


@partial(jax.jit, static_argnums=0)
def take_groups(setup: Setup, groups: Groups, others: tuple[Groups, ...], rows: Array) -> Groups:
    """Takes the `rows` [B] of `groups` followed by the others, as one batch."""
    parts = (groups, *others)
    width = max(each.prompts.shape[1] for each in parts)
    joined = jax.tree.map(
        lambda *x: jnp.concatenate(x)[rows], *(widen(each, width) for each in parts)
    )
    advantages = grpo.advantages(
        joined.rewards, scale_rewards=setup.config.scale_rewards, mask=joined.valid
    )
    sharding = meshes.sharding(setup.mesh, "batch")
    return jax.lax.with_sharding_constraint(joined._replace(advantages=advantages), sharding)


def all_feedback(setup: Setup, rounds: tuple[Round, ...]) -> tuple[Choice, tuple[Feedback, Array]]:
    """Joins all rounds of a step: which tasks were chosen, their feedback, and whether each group
    is informative.

    Where there are several rounds, the arrays are padded to one size, whatever their number. The
    padding has the id N, behind the table, which the selector ignores.
    """
    parts = [(each.choice, (each.scored.feedback, each.scored.informative)) for each in rounds]
    if len(parts) == 1:
        return parts[0]
    size = (1 + setup.config.dynamic_sampling) * setup.config.batch_size

    def pad(*columns: np.ndarray) -> Array:
        column = np.concatenate(columns)
        padding = setup.num_tasks if column.dtype == np.int32 else 0  # only ids are integers
        missing = (0, size - len(column))
        return meshes.from_host(setup.mesh, np.pad(column, missing, constant_values=padding))

    return jax.tree.map(pad, *jax.device_get(parts))
