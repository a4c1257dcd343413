"""The batch of a step: which tasks are rolled out, what graders say of them, and what is learned from.

A selector that probes has tasks rolled out before it chooses; see `select.probes` for what becomes of their groups.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrft import checkpoint, runtime
from jaxrft import mesh as meshes
from jaxrft.checkpoint import RunState
from jaxrft.learn.replay import Groups
from jaxrft.lm import model
from jaxrft.runtime import Verdicts
from jaxrft.select import probes
from jaxrft.steps import Judged, Programs, Run
from jaxrft.tasks import table
from jaxrft.types import Choice, InputError, Rollout


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

    fresh: int  # tasks to choose and roll out
    rows: np.ndarray  # [m] int32, the groups of the probe that join theirs
    taken: np.ndarray | None = None  # [m] int32, the tasks of these; None for none


def sample(run: Run, programs: Programs, state: RunState, ids: np.ndarray, use: str = "rollout") -> Rolled:
    """Rolls out the tasks `ids` [B] and waits for it; `use` is the random stream."""
    prompts = runtime.prompt_batch(run.table, ids, table.buckets(run.table.lengths), run.mesh)
    where, stream = meshes.from_host(run.mesh, ids), np.int32(runtime.USES.index(use))
    params = model.whole(state.params, run.lm.frozen)
    rollouts = programs.generate(params, state.step, *prompts, where, stream)
    jax.block_until_ready(rollouts.lengths)
    return Rolled(ids, prompts, rollouts)


def verify(run: Run, rolled: Rolled, *, first: bool) -> Verdicts:
    """What graders say of rollouts; raises InputError when something is wrong with them in the `first` batch."""
    verdicts = runtime.verify(rolled.rollouts, run.pool, run.lm.tokenizer, run.table, rolled.ids)
    return runtime.check_verdicts(run.config, verdicts, first=first)


def judge(run: Run, programs: Programs, state: RunState, rolled: Rolled, verdicts: Verdicts) -> Judged:
    """The groups of rollouts with what graders said of them, on the devices."""
    rewards = runtime.learnable(verdicts).reshape(len(rolled.ids), run.config.num_generations, -1)
    rewards = meshes.from_host(run.mesh, rewards, "batch", None, None)
    ids = meshes.from_host(run.mesh, rolled.ids)
    return programs.judge(state.step, ids, rolled.prompts, rolled.rollouts, rewards)


def probe(run: Run, programs: Programs, state: RunState, *, first: bool) -> tuple[RunState, Probed]:
    """Rolls out the tasks that the selector wants to know about, a batch at a time, and tells it what came of them."""
    choice = programs.probe(state.selector, state.step, run.tasks)
    ids, size = np.asarray(choice.ids), run.config.batch_size
    judged, distances, failures = [], [], Counter()
    for part in np.split(ids, range(size, len(ids), size)):
        rolled = sample(run, programs, state, part, "rollout of a probe")
        verdicts = verify(run, rolled, first=first and not judged)
        judged.append(judge(run, programs, state, rolled, verdicts))
        distances.append(_distance(run, verdicts))
        failures.update(verdicts.failures)
    state, found = _note(run, programs, state, choice, judged)
    told = {name.replace("select/", "select/probes/"): found[name] for name in PREDICTION}
    parts = tuple(each.groups for each in judged)
    return state, Probed(ids, np.concatenate(distances), parts, told | {"select/probes": len(ids)}, failures)


PREDICTION = tuple(f"select/{name}" for name in ("brier", "pearson", "auc", "effective_group_ratio"))


def _distance(run: Run, verdicts: Verdicts) -> np.ndarray:
    """How far from the target the pass rate of each group is, [B]; infinite where successes are all equal."""
    success = runtime.learnable(verdicts)[:, runtime.success_index(run.config)]
    success = success.reshape(-1, run.config.num_generations)
    known = np.isfinite(success)
    rate = np.where(known, success, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    differ = np.where(known, success, np.inf).min(axis=1) < np.where(known, success, -np.inf).max(axis=1)
    return np.where(differ, np.abs(rate - run.config.select.target), np.inf)


def fill(run: Run, programs: Programs, state: RunState, probed: Probed) -> Filling:
    """Which informative groups of the probe are trained on, and how many tasks are to be chosen beside them."""
    places, multiple = programs.size(state), meshes.shards(run.mesh, "batch")
    informative = int(np.isfinite(probed.distance).sum())
    fresh = probes.portions(places, multiple=multiple)[probes.portion(places, informative, multiple=multiple)]
    rows = np.argsort(probed.distance, kind="stable")[: places - fresh].astype(np.int32)
    return Filling(fresh, rows, probed.ids[rows] if len(rows) else None)


def learn(
    run: Run, programs: Programs, state: RunState, choice: Choice, judged: Judged, probed: Probed, filling: Filling
) -> tuple[RunState, dict[str, Any]]:
    """Tells the selector what came of its choice, and trains the policy on it and on what the probe has to give.

    Informative groups of the probe for which the batch has no place go into the replay buffer, if there is one.
    """
    state, found = _note(run, programs, state, choice, [judged])
    groups = fresh(programs, judged, probed, filling)
    state, of_update = programs.learn(state, groups, run.reference, run.lm.frozen)
    if run.replay is not None and probed.parts:  # not before: it may be the buffer that this batch was drawn from
        left = np.ones(len(probed.ids), bool)
        left[filling.rows] = False
        state = state._replace(replay=programs.store(state.replay, probed.parts, left))
    trained = {"select/probes/trained": len(filling.rows)} if probed.parts else {}
    return state, judged.metrics | found | probed.metrics | trained | of_update


def fresh(programs: Programs, judged: Judged, probed: Probed, filling: Filling) -> Groups:
    """The new groups that a step learns from."""
    return programs.join(judged.groups, probed.parts, filling.rows) if len(filling.rows) else judged.groups


def stop_skipping(
    run: Run, programs: Programs, state: RunState, groups: Groups, folder: Path, saved: int | None
) -> NoReturn:
    """Raises InputError after the step with `groups`, whose last update was skipped as those before it.

    What that step learned from is in `folder` then; `saved` is the newest checkpoint.
    """
    drawn, replayed = programs.draw(state.replay, groups, state.step - 1)  # as nothing was added to the replay
    found = {name: x for name, x in (drawn._asdict() | {"replayed": replayed}).items() if x is not None}
    arrays = multihost_utils.process_allgather(found, tiled=True)
    path = folder / f"not-finite-{int(state.step)}.safetensors"
    checkpoint.on_first(lambda: checkpoint.write_arrays(path, arrays))
    left = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
    raise InputError(
        f"step {int(state.step)} has the last of {int(state.optimizer.skipped)} updates in a row that were skipped, "
        f"their loss or gradient not being finite: its batch is in {path}, {left}; lower the learning_rate, or look "
        "for what is wrong with the batch"
    )


def _note(
    run: Run, programs: Programs, state: RunState, choice: Choice, judged: list[Judged]
) -> tuple[RunState, dict[str, Any]]:
    """Tells selector and tally what came of a choice; metrics of what was believed."""
    parts = ((each.feedback, each.informative) for each in judged)
    selector, tally, found = programs.note(state.selector, state.tally, state.step, run.tasks, choice, *parts)
    return state._replace(selector=selector, tally=tally), found
