"""Evaluation on held-out tasks: greedy, avg@k, pass@k and maj@k of success, and lengths."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrft.config import (
    SAMPLING,
    Config,
    ReplayConfig,
    graded_by,
    has_majority,
    success_rewards,
)
from jaxrft.host.multihost import all_rows, any_process, broadcast_from_host0
from jaxrft.host.stopping import Stopped
from jaxrft.lm import model, weights
from jaxrft.lm.model import Params
from jaxrft.lm.policy import LanguageModel, check_length, make_policy, open_model
from jaxrft.lm.segments import compile_rollout
from jaxrft.report.compilation import counted_compilations
from jaxrft.report.console import Display, Status, no_status
from jaxrft.rewards.grading import (
    check_rewards,
    grade_rollout,
    majority_success,
    open_rewards,
    trainer_state,
)
from jaxrft.rewards.pool import Pool
from jaxrft.tasks import table
from jaxrft.tasks.open_sets import open_tasks
from jaxrft.tasks.table import TaskTable, prompt_batch
from jaxrft.train import estimates
from jaxrft.train.devices import computing_on, open_mesh
from jaxrft.train.export import open_checkpoint
from jaxrft.train.memory import choose_concurrent_rows, memory_to_plan
from jaxrft.train.resume import with_template_date
from jaxrft.types import InputError, PyTree

Which = int | Literal["newest"] | None  # checkpoint; None = `config.model` itself


class Measured(NamedTuple):
    """The trials of a policy."""

    config: Config  # with the date of chat templates
    folder: Path  # of the model
    checkpoint: int | None  # None = the model itself
    step: int  # of the draws
    trials: dict[str, estimates.Trials]
    metrics: dict[str, float]


class Evaluate(Protocol):
    """Measures a policy on every held-out set, as `estimates.metrics` says."""

    def __call__(
        self,
        params: Params,
        step: int,
        stopped: Callable[[], bool] = lambda: False,
        status: Status = no_status,
    ) -> dict[str, float]:
        """Returns the metrics after `step` steps; raises Stopped when `stopped()` is true.

        `status` is told the set, and how many rollouts of tasks are done, of all sets.
        """
        ...


class Measure(Protocol):
    """Rolls out the tasks of every held-out set and grades them."""

    def __call__(
        self,
        params: Params,
        step: int,
        stopped: Callable[[], bool] = lambda: False,
        status: Status = no_status,
    ) -> dict[str, estimates.Trials]:
        """Returns the trials of each set; see `Evaluate`."""
        ...


class RunTrials(Protocol):
    """Rolls out tasks of a table in batches of one shape and grades them."""

    def __call__(
        self,
        params: Params,
        step: int,
        tasks: TaskTable,
        graded_by: Config,
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
    ) -> estimates.Samples:
        """Returns the samples of all tasks; raises Stopped before a batch when `stopped()` is true.

        `progress` is told the number of tasks of each batch that is done, first of all 0.
        """
        ...


def open_held_out(config: Config, lm: LanguageModel) -> dict[str, TaskTable]:
    """Opens the held-out sets of the config, by name; raises InputError for those that do not
    load.
    """
    config = evaluation_config(config)
    return {
        tasks.title: open_tasks(tasks, graded_by(config, tasks), lm.tokenizer)
        for tasks in config.evaluation.tasks
    }


def compile_evaluation(
    config: Config,
    lm: LanguageModel,
    mesh: Mesh,
    pool: Pool,
    *,
    sets: Mapping[str, TaskTable],
    held: PyTree,
) -> Evaluate:
    """Returns the function that evaluates on the held-out `sets`.

    avg@k is the mean success of k samples a task, pass@k the estimated share of tasks that one of k
    samples solves fully, see `estimates.pass_at`, and maj@k the success of their majority, see
    `rewards.majority.majority`. The rest is as `compile_measure` says.
    """
    measure = compile_measure(config, lm, mesh, pool, sets=sets, held=held)

    def evaluate(
        params: Params,
        step: int,
        stopped: Callable[[], bool] = lambda: False,
        status: Status = no_status,
    ) -> dict[str, float]:
        return estimates.metrics(measure(params, step, stopped, status))

    return evaluate


def evaluation_config(config: Config) -> Config:
    """Returns the config whose sampling is that of evaluations."""
    given = {name: getattr(config.evaluation, name) for name in SAMPLING}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return config
    # what belongs to training, and may not fit another length
    unused = {"overlong_buffer": 0, "overlong_penalty": Config.overlong_penalty}
    return replace(config, replay=ReplayConfig(), **unused, **changes)


def compile_measure(
    config: Config,
    lm: LanguageModel,
    mesh: Mesh,
    pool: Pool,
    *,
    sets: Mapping[str, TaskTable],
    held: PyTree,
) -> Measure:
    """Returns the function that rolls out the held-out `sets`.

    `held` is everything that stays on the devices. Sampling is that of `config.evaluation`, or else
    of training. A set is graded by its own reward, if it has one. A sample without a reward counts
    as failed, but a first batch without any, at step 0, is an InputError. Samples depend on the
    seed, the step and the task only. A signal ends it after the current batch.
    """
    length = config.max_completion_length
    config = evaluation_config(config)
    if config.max_completion_length != length:
        check_length(config, weights.max_positions(lm.folder))
        lm = lm._replace(policy=make_policy(config, lm.config, mesh))
    held_out = [
        _HeldOut(each.title, sets[each.title], graded_by(config, each), config.samples_of(each))
        for each in config.evaluation.tasks
    ]
    longest = max((table.buckets(each.tasks.lengths)[-1] for each in held_out), default=0)

    def compile_k(num_generations: int, *, greedy: bool = False) -> RunTrials:
        max_rows = choose_concurrent_rows(
            config,
            lm,
            mesh,
            longest,
            prompts=config.eval_batch_size,
            num_generations=num_generations,
            held=held,
            memory=memory_to_plan(mesh),
        )
        return compile_trials(
            config,
            lm,
            mesh,
            pool,
            num_generations=num_generations,
            greedy=greedy,
            max_rows=max_rows,
        )

    greedy = compile_k(1, greedy=True)
    sampled = {k: compile_k(k) for k in {each.num_samples for each in held_out} - {0}}
    total = sum(len(each.tasks.lengths) * (1 + each.num_samples) for each in held_out)

    def measure(
        params: Params,
        step: int,
        stopped: Callable[[], bool] = lambda: False,
        status: Status = no_status,
    ) -> dict[str, estimates.Trials]:
        trials = {}
        done = 0  # completions of all trials

        def progress(name: str, samples: int, count: int) -> None:
            nonlocal done
            done += samples * count
            status(f"evaluating {name}", done, total)

        for each in held_out:
            arguments = (params, step, each.tasks, each.graded_by, stopped)
            best = greedy(*arguments, partial(progress, each.name, 1)).success[:, 0]
            samples = estimates.no_samples(len(best))
            if each.num_samples:
                count = partial(progress, each.name, each.num_samples)
                samples = sampled[each.num_samples](*arguments, count)
            trials[each.name] = estimates.Trials(
                best,
                samples,
                each.tasks.domain,
                each.tasks.domains,
                each.tasks.rows,
                sum(dropped.count for dropped in each.tasks.dropped),
            )
        return trials

    return measure


class _HeldOut(NamedTuple):
    """A held-out set."""

    name: str
    tasks: TaskTable
    graded_by: Config  # the config with the rewards of the set
    num_samples: int


def compile_trials(
    config: Config,
    lm: LanguageModel,
    mesh: Mesh,
    pool: Pool,
    *,
    num_generations: int,
    greedy: bool = False,
    max_rows: int | None = None,
) -> RunTrials:
    """Compiles rollouts of all tasks of a table, and returns the function that grades them.

    The last batch is padded by tasks of the first. At most `max_rows` completions are decoded at
    once, None for all.
    """
    generate = compile_rollout(
        lm,
        config,
        mesh,
        use="eval",
        num_generations=num_generations,
        greedy=greedy,
        max_rows=max_rows,
    )

    def run_trials(
        params: Params,
        step: int,
        tasks: TaskTable,
        graded_by: Config,
        stopped: Callable[[], bool],
        progress: Callable[[int], None],
    ) -> estimates.Samples:
        ids = np.arange(len(tasks.lengths), dtype=np.int32)
        widths = table.buckets(tasks.lengths)[-1:]
        votes = num_generations > 1 and has_majority(success_rewards(graded_by))
        batches = []
        progress(0)
        for start in range(0, len(ids), config.eval_batch_size):
            if any_process(stopped()):
                raise Stopped
            part = np.take(ids, range(start, start + config.eval_batch_size), mode="wrap")
            rollouts = generate(
                params, np.int32(step), *prompt_batch(tasks, part, widths, mesh), part
            )
            state = trainer_state(config, step)
            rewards = grade_rollout(graded_by, lm, rollouts, pool, tasks, part, trainer_state=state)
            first = start == step == 0
            rewards = check_rewards(graded_by, rewards, pool, num_tasks=len(part), first=first)
            samples = (rewards.success, all_rows(rollouts.lengths), rewards.truncated)
            majority = majority_success(graded_by, rewards, pool) if votes else np.zeros(0)
            batches.append([each.reshape(len(part), -1) for each in (*samples, majority)])
            progress(min(len(part), len(ids) - start))
        joined = (np.concatenate(values)[: len(ids)] for values in zip(*batches, strict=True))
        return estimates.Samples(*joined)

    return run_trials


def evaluate_policy(config: Config, checkpoint: Which = None) -> dict[str, float]:
    """Evaluates `config.model`, or a checkpoint of the run in `config.output_dir`, on the held-out
    sets of the config, as `compile_evaluation` says.
    """
    return measure_policy(config, checkpoint).metrics


def measure_policy(
    config: Config,
    checkpoint: Which = None,
    *,
    draws_of: Callable[[Config, Path], int] = lambda *_: 0,
) -> Measured:
    """Rolls out the held-out sets of the config under `config.model`, or a checkpoint of the run in
    `config.output_dir`.

    The draws are those of the checkpoint's step, else of `draws_of(config, folder)` of the model.
    Shows its progress on the standard error.
    """
    if not config.evaluation.tasks:
        raise InputError("the config has no held-out tasks: name some in evaluation.tasks")
    mesh = open_mesh(config)
    config = with_template_date(config)
    # the standard output is for the results
    display = Display(0, visible=jax.process_index() == 0, unit="completion", stream=sys.stderr)
    with display, counted_compilations(display), open_rewards(config) as pool:
        display.status("loading the model")
        number = None
        if checkpoint is None:
            lm = open_model(config, mesh, trained=False)
            folder = lm.folder
            step = int(broadcast_from_host0(lambda: str(draws_of(config, folder))))
        else:
            wanted = None if checkpoint == "newest" else checkpoint
            lm, step = open_checkpoint(config, mesh, wanted, dtype=jnp.dtype(config.dtype))
            number = step
        display.status("reading the tasks")
        sets = open_held_out(config, lm)
        measure = compile_measure(config, lm, mesh, pool, sets=sets, held=(lm.params, lm.frozen))
        with computing_on(mesh, config):
            params = model.all_params(lm.params, lm.frozen)
            trials = measure(params, step, status=display.count)
    metrics = estimates.metrics(trials)
    return Measured(config, lm.folder, number, step, trials, metrics)
