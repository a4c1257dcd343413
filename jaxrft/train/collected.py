"""What the files of a run keep of the batch of a step."""

import jax
import numpy as np

from jaxrft.host.files import JSON
from jaxrft.host.multihost import all_rows
from jaxrft.report import selection
from jaxrft.report.completions import Rows
from jaxrft.train.resample import Batch, Round
from jaxrft.train.state import TrainState
from jaxrft.train.step import Step


def completion_rows(step: Step, batch: Batch) -> list[Rows]:
    """Collects the completions that this process graded, of each round of a step.

    All processes must call it.
    """
    return [_round_rows(step, each) for each in batch.rounds]


def _round_rows(step: Step, collected: Round) -> Rows:
    rewards = collected.rewards
    rows = np.array([row for row, _ in rewards.samples], int)
    ids = collected.ids[rows // step.setup.config.num_generations]
    success = np.where(rewards.success_valid, rewards.success, np.nan)
    advantages = all_rows(collected.scored.groups.advantages).reshape(-1)
    return Rows(
        prompts=[step.table.prompts[i] for i in ids],
        completions=[text for _, text in rewards.samples],
        task_ids=ids.tolist(),
        domains=[step.table.domains[i] for i in step.table.domain[ids]],
        rewards=rewards.rewards[rows],
        valid=(rewards.valid & ~rewards.lost)[rows],
        success=success[rows],
        advantages=advantages[rows],
    )


def selection_entry(step: Step, number: int, state: TrainState, batch: Batch) -> dict[str, JSON]:
    """Returns the line of step `number` in selection.jsonl; all processes must call it."""
    feedback = jax.device_get([each.scored.feedback for each in batch.rounds])
    chosen = selection.Chosen(
        pass_rate=np.concatenate([np.asarray(each.choice.pass_rate) for each in batch.rounds]),
        successes=np.concatenate([each.successes for each in feedback]),
        trials=np.concatenate([each.trials for each in feedback]),
        domain=np.concatenate([step.table.domain[each.ids] for each in batch.rounds]),
    )
    entry = selection.record(number, chosen, step.table.domains)
    if selection.is_drawn(number, step.setup.config.steps):
        entry["belief"] = np.asarray(step.belief(state)).tolist()
    return entry
