"""The batch of a step: which tasks are rolled out, what graders say of them, and what is learned from.

A selector that probes has tasks rolled out before it chooses; see `select.probes` for what becomes of their groups.
Dynamic sampling, arXiv 2503.14476, has more tasks rolled out after that, in place of those whose groups teach nothing.
Deviations: a refill has no more places than the batch, in quarters of it, as many as are needed at the share of
informative groups so far; and when there are to be no more of them, groups that teach nothing keep their places, so
that the batch never shrinks. The selector is told once a step, of all groups, as the policy moves once a step.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrft import mesh as meshes
from jaxrft.host.disk import write_arrays
from jaxrft.host.multihost import on_host0
from jaxrft.learn.replay import Groups
from jaxrft.lm import model
from jaxrft.rewards.grading import Verdicts, check_rewards, grade, learnable_rewards, trainer_state
from jaxrft.select import probes
from jaxrft.streams import STREAMS
from jaxrft.tasks import table
from jaxrft.tasks.table import prompt_batch
from jaxrft.train.state import TrainState
from jaxrft.train.step import Judged, Programs, Run
from jaxrft.types import Array, Choice, Feedback, InputError, Rollout


class Rolled(NamedTuple):
    """Rollouts of the tasks `ids`."""

    ids: np.ndarray  # [B]
    prompts: Any  # tokens [B, P] and lengths [B]
    rollouts: Rollout


class Probed(NamedTuple):
    """The probe of a step: which tasks it was and what came of them; in a step without one, nothing."""

    ids: np.ndarray = np.zeros(0, np.int32)  # [K]
    distance: np.ndarray = np.zeros(0, np.float32)  # [K], of pass rates to the target; infinite = teaches nothing
    parts: tuple[Groups, ...] = ()  # [K] together
    metrics: dict[str, Any] = {}
    failures: Counter[str] = Counter()  # rewards lost, by kind


class Filling(NamedTuple):
    """How the new groups of a batch come together."""

    places: int
    fresh: int  # of these, for tasks yet to be chosen
    excluded: np.ndarray  # [places - fresh] int32, the tasks of the probe whose groups have the others


class Chosen(NamedTuple):
    """Tasks that were chosen at once, and what came of them."""

    choice: Choice  # [n]
    feedback: Feedback  # [n]
    informative: Array  # [n] bool, successes not all equal
    teaches: np.ndarray  # [n] bool, the same on the host


class Batch(NamedTuple):
    """What a step learns from, and what it rolled out beside the probe in order to."""

    groups: Groups  # [B]
    ids: np.ndarray  # [B] int32, their tasks; -1 where there is none yet
    informative: np.ndarray  # [B] bool, successes not all equal
    chosen: tuple[Chosen, ...]
    metrics: dict[str, Any]
    left: tuple[tuple[tuple[Groups, ...], np.ndarray], ...] = ()  # parts of groups, and which would have taught


def choose(
    run: Run, programs: Programs, state: TrainState, excluded: np.ndarray, *, batch_size: int, stream: int
) -> tuple[Choice, TrainState]:
    """Chooses `batch_size` tasks, none of those `excluded` [m] while there are others."""
    number = len(run.table.lengths)
    mask = np.isin(np.arange(number), excluded)
    exclude = meshes.place_table(mask, run.mesh, number)
    choice, selector = programs.select(
        state.selector, state.step, run.tasks, exclude, np.int32(stream), batch_size=batch_size
    )
    return choice, state._replace(selector=selector)


def sample(run: Run, programs: Programs, state: TrainState, ids: np.ndarray, use: str = "rollout") -> Rolled:
    """Rolls out the tasks `ids` [B] and waits for it; `use` is the random stream."""
    prompts = prompt_batch(run.table, ids, table.buckets(run.table.lengths), run.mesh)
    where, stream = meshes.from_host(run.mesh, ids), np.int32(STREAMS.index(use))
    params = model.whole(state.params, run.lm.frozen)
    rollouts = programs.generate(params, state.step, *prompts, where, stream)
    jax.block_until_ready(rollouts.lengths)
    return Rolled(ids, prompts, rollouts)


def verify(run: Run, state: TrainState, rolled: Rolled, *, first: bool) -> Verdicts:
    """What graders say of rollouts; raises InputError when something is wrong with them in the `first` batch."""
    told = trainer_state(run.config, int(state.step))
    verdicts = grade(run.config, run.lm, rolled.rollouts, run.pool, run.table, rolled.ids, trainer_state=told)
    verdicts = check_rewards(run.config, verdicts, run.pool, tasks=len(rolled.ids), first=first)
    if run.visits is not None:
        run.visits.add(rolled.ids, verdicts.success)
    return verdicts


def judge(run: Run, programs: Programs, state: TrainState, rolled: Rolled, verdicts: Verdicts) -> Judged:
    """The groups of rollouts with what graders said of them, on the devices."""
    rewards = learnable_rewards(verdicts).reshape(len(rolled.ids), run.config.num_generations, -1)
    rewards = meshes.from_host(run.mesh, rewards, "batch", None, None)
    ids = meshes.from_host(run.mesh, rolled.ids)
    success_index = meshes.from_host(run.mesh, verdicts.success_index, "batch")
    return programs.judge(state.step, ids, rolled.prompts, rolled.rollouts, rewards, success_index)


def probe(run: Run, programs: Programs, state: TrainState, *, first: bool) -> tuple[TrainState, Probed]:
    """Rolls out the tasks that the selector wants to know about, a batch at a time, and tells it what came of them."""
    choice = programs.probe(state.selector, state.step, run.tasks)
    ids, size = np.asarray(choice.ids), run.config.batch_size
    judged, distances, failures = [], [], Counter()
    for part in np.split(ids, range(size, len(ids), size)):
        rolled = sample(run, programs, state, part, "rollout of a probe")
        verdicts = verify(run, state, rolled, first=first and not judged)
        judged.append(judge(run, programs, state, rolled, verdicts))
        distances.append(np.asarray(judged[-1].distance))
        failures.update(verdicts.failures)
    told = ((each.feedback, each.informative) for each in judged)
    state, found = _note(run, programs, state, choice, *told, reference=True)
    told = {name.replace("select/", "select/probes/"): found[name] for name in PREDICTION}
    parts = tuple(each.groups for each in judged)
    return state, Probed(ids, np.concatenate(distances), parts, told | {"select/probes": len(ids)}, failures)


PREDICTION = tuple(f"select/{name}" for name in ("brier", "pearson", "auc", "effective_group_ratio"))


def fill(run: Run, programs: Programs, state: TrainState, probed: Probed) -> Filling:
    """Which informative groups of the probe are trained on, and how many tasks are to be chosen beside them."""
    places, multiple = programs.size(state), meshes.shards(run.mesh, "batch")
    if not probed.parts:
        return Filling(places, places, probed.ids)
    best = _best(probed)
    fresh = probes.portions(places, multiple=multiple)[probes.portion(places, len(best), multiple=multiple)]
    return Filling(places, fresh, probed.ids[best[: places - fresh]])


def gather(
    run: Run, programs: Programs, choice: Choice, judged: Judged, verdicts: Verdicts, probed: Probed, filling: Filling
) -> Batch:
    """The batch of the tasks chosen and, in the places left for them, groups of the probe.

    With dynamic sampling those also take the places of groups that teach nothing.
    """
    chosen = Chosen(choice, judged.feedback, judged.informative, np.asarray(judged.informative))
    metrics = judged.metrics | probed.metrics
    metrics |= {f"rewards/{kind}": lost + probed.failures[kind] for kind, lost in verdicts.failures.items()}
    empty = 0, filling.places - filling.fresh
    ids = np.pad(np.asarray(choice.ids), empty, constant_values=-1)
    batch = Batch(judged.groups, ids, np.pad(chosen.teaches, empty), (chosen,), metrics)
    if not probed.parts:
        return batch
    free = np.arange(filling.fresh, filling.places)
    if run.config.dynamic_sampling:
        free = np.concatenate([free, np.flatnonzero(~chosen.teaches)])
    batch = _join(programs, batch, free, probed.ids, probed.parts, _best(probed))
    trained = int(np.isin(batch.ids, np.setdiff1d(probed.ids, choice.ids)).sum())
    return batch._replace(metrics=batch.metrics | {"select/probes/trained": trained})


def refill(run: Run, programs: Programs, state: TrainState, batch: Batch, probed: Probed) -> tuple[TrainState, Batch]:
    """Chooses and rolls out more tasks while groups of the batch teach nothing, and puts those that do in their places.

    No task is rolled out twice, so that one random stream serves all rollouts of a step.
    """
    before, lost = len(batch.left), Counter()
    for number in range(run.config.dynamic_sampling):
        rolled = np.unique(np.concatenate([probed.ids, *(np.asarray(each.choice.ids) for each in batch.chosen)]))
        count = _refill_size(run, batch, len(run.table.lengths) - len(rolled))
        if count == 0:
            break
        stream = STREAMS.index("refill") + number
        choice, state = choose(run, programs, state, rolled, batch_size=count, stream=stream)
        sampled = sample(run, programs, state, np.asarray(choice.ids))
        verdicts = verify(run, state, sampled, first=False)
        judged = judge(run, programs, state, sampled, verdicts)
        chosen = Chosen(choice, judged.feedback, judged.informative, np.asarray(judged.informative))
        lost.update(verdicts.failures)
        batch = batch._replace(chosen=(*batch.chosen, chosen))
        free, best = np.flatnonzero(~batch.informative), np.flatnonzero(chosen.teaches)
        batch = _join(programs, batch, free, sampled.ids, (judged.groups,), best)
    rejected = 1 - np.concatenate([each.teaches for each in batch.chosen]).mean()
    found = {
        "refills": len(batch.chosen) - 1,
        "rejected": rejected,
        "surplus": sum(int(which.sum()) for _, which in batch.left[before:]),
        "informative": batch.informative.mean(),
    }
    found = {f"dynamic_sampling/{name}": value for name, value in found.items()}
    found |= {f"rewards/{kind}": batch.metrics[f"rewards/{kind}"] + count for kind, count in lost.items()}
    return state, batch._replace(metrics=batch.metrics | found)


def _refill_size(run: Run, batch: Batch, others: int) -> int:
    """How many of the `others`, tasks not rolled out yet, the batch needs if as many teach as did so far; 0 = none.

    The sizes are those of `probes.portions`, each a compiled program.
    """
    sizes = probes.portions(len(batch.ids), multiple=meshes.shards(run.mesh, "batch"))
    sizes = [size for size in sizes if size <= others]
    if batch.informative.all() or not sizes:
        return 0
    teaches = np.concatenate([each.teaches for each in batch.chosen])
    wanted = (~batch.informative).sum() * len(teaches) / max(teaches.sum(), 1)
    return next((size for size in sizes if size >= wanted), sizes[-1])


def _best(probed: Probed) -> np.ndarray:
    """The informative groups of the probe, those nearest the target first, [m] int."""
    return np.argsort(probed.distance, kind="stable")[: np.isfinite(probed.distance).sum()]


def _join(
    programs: Programs, batch: Batch, free: np.ndarray, ids: np.ndarray, parts: tuple[Groups, ...], best: np.ndarray
) -> Batch:
    """The batch with groups of the `parts`, of tasks `ids`, in its `free` places: the first of the informative `best`.

    Those whose task is in the batch already are left, with those for which there is no place.
    """
    joins = best[~np.isin(ids[best], batch.ids)][: len(free)]
    left = np.setdiff1d(best, joins)
    if len(left):
        batch = batch._replace(left=(*batch.left, (parts, np.isin(np.arange(len(ids)), left))))
    if not len(joins):
        return batch
    places, rows = free[: len(joins)], np.arange(len(batch.ids), dtype=np.int32)
    rows[places] = batch.groups.step.shape[0] + joins
    tasks, informative = batch.ids.copy(), batch.informative.copy()
    tasks[places], informative[places] = ids[joins], True
    return batch._replace(groups=programs.join(batch.groups, parts, rows), ids=tasks, informative=informative)


def learn(run: Run, programs: Programs, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    """Tells the selector what came of its choices, and trains the policy on the batch.

    Informative groups for which the batch has no place go into the replay buffer, if there is one.
    """
    state, found = _note(run, programs, state, *_told(run, batch.chosen))
    state, of_update = programs.learn(state, batch.groups, run.reference, run.lm.frozen)
    if run.replay is not None:  # not before: it may be the buffer that this batch was drawn from
        for parts, which in batch.left:
            state = state._replace(replay=programs.store(state.replay, parts, which))
    return state, batch.metrics | found | of_update


def _told(run: Run, chosen: tuple[Chosen, ...]) -> tuple[Choice, tuple[Feedback, Array]]:
    """All that was chosen in a step, and (feedback, informative); after refills padded with the task N to one size."""
    parts = [(each.choice, (each.feedback, each.informative)) for each in chosen]
    if len(parts) == 1:
        return parts[0]
    size, number = (1 + run.config.dynamic_sampling) * run.config.batch_size, len(run.table.lengths)

    def pad(*parts: np.ndarray) -> Array:
        whole = np.concatenate(parts)
        nothing = number if whole.dtype == np.int32 else 0  # only ids are integers
        return meshes.from_host(run.mesh, np.pad(whole, (0, size - len(whole)), constant_values=nothing))

    return jax.tree.map(pad, *jax.device_get(parts))


def stop_skipping(
    run: Run, programs: Programs, state: TrainState, groups: Groups, folder: Path, saved: int | None
) -> NoReturn:
    """Raises InputError after the step with `groups`, whose last update was skipped as those before it.

    What that step learned from is in `folder` then; `saved` is the newest checkpoint.
    """
    drawn, replayed = programs.draw(state.replay, groups, state.step - 1)  # as nothing was added to the replay
    found = {name: x for name, x in (drawn._asdict() | {"replayed": replayed}).items() if x is not None}
    arrays = multihost_utils.process_allgather(found, tiled=True)
    path = folder / f"not-finite-{int(state.step)}.safetensors"
    on_host0(lambda: write_arrays(path, arrays))
    left = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
    raise InputError(
        f"step {int(state.step)} has the last of {int(state.optimizer.skipped)} updates in a row that were skipped, "
        f"their loss or gradient not being finite: its batch is in {path}, {left}; lower the learning_rate, or look "
        "for what is wrong with the batch"
    )


def _note(
    run: Run,
    programs: Programs,
    state: TrainState,
    choice: Choice,
    *parts: tuple[Feedback, Array],
    reference: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """Tells selector and tally what came of a choice; metrics of what was believed."""
    arguments = (state.selector, state.tally, state.step, run.tasks, choice)
    selector, tally, found = programs.note(*arguments, *parts, reference=reference)
    return state._replace(selector=selector, tally=tally), found
