"""Evaluation on held-out tasks: greedy, avg@k and pass@k of success."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrft import runtime
from jaxrft.config import Config
from jaxrft.rewards.pool import Pool
from jaxrft.runtime import LanguageModel
from jaxrft.tasks import table
from jaxrft.tasks.table import TaskTable
from jaxrft.types import InputError


def make(config: Config, lm: LanguageModel, mesh: Mesh, pool: Pool) -> Callable[..., dict[str, float]]:
    """The evaluation (params, step, stopped) -> metrics of every held-out set: eval/<name>/greedy, /avg@k and /pass@k.

    avg@k is the mean success of k samples a task, pass@k the share of tasks that one of k samples solves fully; a
    sample without a reward counts as failed, but a first batch without any, at step 0, is an InputError. Samples depend
    on the seed, the step and the task only. When `stopped` says so it raises Stopped, after the batch in hand. Raises
    InputError for sets that do not load.
    """
    sets = {tasks.title: runtime.open_tasks(tasks, config, lm.tokenizer) for tasks in config.evaluation.tasks}
    k = config.evaluation.num_samples
    greedy = trials(config, lm, mesh, pool, use="eval", num_generations=1, greedy=True)
    sample = trials(config, lm, mesh, pool, use="eval", num_generations=k) if k else None

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


def trials(config: Config, lm: LanguageModel, mesh: Mesh, pool: Pool, **options: Any) -> Callable[..., np.ndarray]:
    """The function (params, step, table, ids [n], stopped) -> success [n, samples]; options are `runtime.generator`'s.

    Tasks are rolled out in batches of one shape, of which the last is filled up and cut; raises Stopped before one.
    Rewards are told that `done` steps are done, `step` by default.
    """
    generate = runtime.generator(lm, config, mesh, **options)

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
            if runtime.any_process(stopped()):
                raise runtime.Stopped
            part = np.take(ids, range(start, start + config.eval_batch_size), mode="wrap")
            rollouts = generate(params, np.int32(step), *runtime.prompt_batch(tasks, part, widths, mesh), part)
            told = runtime.trainer_state(config, step if done is None else done)
            first = start == step == 0
            verdicts = runtime.verify(config, lm, rollouts, pool, tasks, part, trainer_state=told)
            verdicts = runtime.check_verdicts(config, verdicts, pool, tasks=len(part), first=first)
            found.append(np.nan_to_num(verdicts.success).reshape(len(part), -1))
        return np.concatenate(found)[: len(ids)]

    return successes


def pass_rates(config: Config, lm: LanguageModel, mesh: Mesh, pool: Pool) -> Callable[..., np.ndarray]:
    """The function (params, step, table, ids [n], stopped) -> pass rates [N] of a policy, by num_generations rollouts.

    Tasks other than `ids` have NaN. It raises Stopped between batches when `stopped`.
    """
    successes = trials(config, lm, mesh, pool, use="measure")

    def measure(params: Any, step: int, tasks: TaskTable, ids: np.ndarray, stopped: Callable[[], bool]) -> np.ndarray:
        rates = np.full(len(tasks.lengths), np.nan, np.float32)
        rates[ids] = successes(params, step, tasks, ids, stopped, done=step - 1).mean(axis=1)
        return rates

    return measure


def run(config: Config) -> dict[str, float]:
    """Evaluates `config.model` on the held-out sets of the config; see `make` for what is measured."""
    if not config.evaluation.tasks:
        raise InputError("the config has no held-out tasks: name some in evaluation.tasks")
    mesh = runtime.start(config)
    config = runtime.dated(config)
    with runtime.open_rewards(config) as pool:
        lm = runtime.open_model(config, mesh, trained=False)
        evaluate = make(config, lm, mesh, pool)
        with runtime.on(mesh, config):
            return evaluate(lm.params, 0)
