"""Evaluation on held-out tasks: greedy, avg@k and pass@k of success."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrft.config import Config
from jaxrft.host.multihost import any_process
from jaxrft.host.stopping import Stopped
from jaxrft.lm.policy import LanguageModel, compile_rollout, open_model
from jaxrft.rewards.grading import check_rewards, grade, open_rewards, trainer_state
from jaxrft.rewards.pool import Pool
from jaxrft.tasks import table
from jaxrft.tasks.load import open_tasks
from jaxrft.tasks.table import TaskTable, prompt_batch
from jaxrft.train.devices import computing_on, open_mesh
from jaxrft.train.resume import with_template_date
from jaxrft.types import InputError


def compile_evaluation(config: Config, lm: LanguageModel, mesh: Mesh, pool: Pool) -> Callable[..., dict[str, float]]:
    """The evaluation (params, step, stopped) -> metrics of every held-out set: eval/<name>/greedy, /avg@k and /pass@k.

    avg@k is the mean success of k samples a task, pass@k the share of tasks that one of k samples solves fully; a
    sample without a reward counts as failed, but a first batch without any, at step 0, is an InputError. Samples depend
    on the seed, the step and the task only. When `stopped` says so it raises Stopped, after the batch in hand. Raises
    InputError for sets that do not load.
    """
    sets = {tasks.title: open_tasks(tasks, config, lm.tokenizer) for tasks in config.evaluation.tasks}
    k = config.evaluation.num_samples
    greedy = compile_trials(config, lm, mesh, pool, use="eval", num_generations=1, greedy=True)
    sample = compile_trials(config, lm, mesh, pool, use="eval", num_generations=k) if k else None

    def evaluate(params: Any, step: int, stopped: Callable[[], bool] = lambda: False) -> dict[str, float]:
        metrics = {}
        for name, tasks in sets.items():
            ids = np.arange(len(tasks.lengths), dtype=np.int32)
            metrics[f"eval/{name}/greedy"] = float(greedy(params, step, tasks, ids, stopped).mean())
            if sample is not None:
                solved = sample(params, step, tasks, ids, stopped)
                metrics[f"eval/{name}/avg@{k}"] = float(solved.mean())
                metrics[f"eval/{name}/pass@{k}"] = float((solved.max(axis=1) >= 1.0).mean())
        return metrics

    return evaluate


def compile_trials(
    config: Config, lm: LanguageModel, mesh: Mesh, pool: Pool, **options: Any
) -> Callable[..., np.ndarray]:
    """The function (params, step, table, ids [n], stopped) -> success [n, samples]; options are `runtime.generator`'s.

    Tasks are rolled out in batches of one shape, of which the last is filled up and cut; raises Stopped before one.
    Rewards are told that `done` steps are done, `step` by default.
    """
    generate = compile_rollout(lm, config, mesh, **options)

    def successes(
        params: Any,
        step: int,
        tasks: TaskTable,
        ids: np.ndarray,
        stopped: Callable[[], bool],
        *,
        done: int | None = None,
    ) -> np.ndarray:
        widths, found = table.buckets(tasks.lengths)[-1:], []
        for start in range(0, len(ids), config.eval_batch_size):
            if any_process(stopped()):
                raise Stopped
            part = np.take(ids, range(start, start + config.eval_batch_size), mode="wrap")
            rollouts = generate(params, np.int32(step), *prompt_batch(tasks, part, widths, mesh), part)
            told = trainer_state(config, step if done is None else done)
            first = start == step == 0
            verdicts = grade(config, lm, rollouts, pool, tasks, part, trainer_state=told)
            verdicts = check_rewards(config, verdicts, pool, tasks=len(part), first=first)
            found.append(np.nan_to_num(verdicts.success).reshape(len(part), -1))
        return np.concatenate(found)[: len(ids)]

    return successes


def compile_pass_rates(config: Config, lm: LanguageModel, mesh: Mesh, pool: Pool) -> Callable[..., np.ndarray]:
    """The function (params, step, table, ids [n], stopped) -> pass rates [N] of a policy, by num_generations rollouts.

    Tasks other than `ids` have NaN. It raises Stopped between batches when `stopped`.
    """
    successes = compile_trials(config, lm, mesh, pool, use="measure")

    def measure(params: Any, step: int, tasks: TaskTable, ids: np.ndarray, stopped: Callable[[], bool]) -> np.ndarray:
        rates = np.full(len(tasks.lengths), np.nan, np.float32)
        rates[ids] = successes(params, step, tasks, ids, stopped, done=step - 1).mean(axis=1)
        return rates

    return measure


def evaluate_policy(config: Config) -> dict[str, float]:
    """Evaluates `config.model` on the held-out sets of the config; see `make` for what is measured."""
    if not config.evaluation.tasks:
        raise InputError("the config has no held-out tasks: name some in evaluation.tasks")
    mesh = open_mesh(config)
    config = with_template_date(config)
    with open_rewards(config) as pool:
        lm = open_model(config, mesh, trained=False)
        evaluate = compile_evaluation(config, lm, mesh, pool)
        with computing_on(mesh, config):
            return evaluate(lm.params, 0)
