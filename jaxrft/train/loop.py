"""The loop over steps, and what it takes to start, stop and resume it."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from jaxrft.config import Config, SelectConfig
from jaxrft.host import heartbeat
from jaxrft.host.checkpoint import Checkpoints
from jaxrft.host.disk import write_arrays
from jaxrft.host.files import JSON
from jaxrft.host.multihost import any_process, broadcast_from_host0, on_host0
from jaxrft.host.stopping import Stopped, stop_signals
from jaxrft.learn.replay import Groups
from jaxrft.lm import model
from jaxrft.lm.policy import LanguageModel, check_finite, export_merged
from jaxrft.report.compilation import Compilations, counted_compilations
from jaxrft.report.completions import CompletionsLog
from jaxrft.report.console import Display, Sample
from jaxrft.report.log import Reporter, Timer
from jaxrft.report.selection import SelectionLog
from jaxrft.report.tracking import Tracking
from jaxrft.report.visits import Visits
from jaxrft.rewards.grading import open_rewards, rewards_by_name
from jaxrft.rewards.pool import Reward
from jaxrft.tasks.table import reference
from jaxrft.train.card import model_card
from jaxrft.train.collected import completion_rows, selection_entry
from jaxrft.train.devices import computing_on, open_mesh
from jaxrft.train.evaluate import Evaluate, compile_evaluation, open_held_out
from jaxrft.train.export import export
from jaxrft.train.resample import Batch, collect, learn
from jaxrft.train.resume import open_folder, run_identity, with_template_date, write_records
from jaxrft.train.setup import UNIFORM_HINT, open_run
from jaxrft.train.state import TrainState, counter_metrics
from jaxrft.train.step import Step, complete_batch
from jaxrft.train.summary import run_summary
from jaxrft.types import InputError

logger = logging.getLogger(__name__)

SHOWN = 4  # completions of a step that the console shows


# (step, its line of metrics.jsonl) -> ignored
OnStep = Callable[[int, dict[str, JSON]], object]


class StopTraining(Exception):
    """Ends a run after the current step, as if it were the last: `on_step` raises it."""


def train(
    config: Config,
    *,
    reward: Reward | dict[str, Reward] | None = None,
    on_step: OnStep | None = None,
) -> TrainState:
    """Trains `config.model` on `config.tasks`, or resumes the run in `config.output_dir`.

    `reward` takes the place of `config.rewards`: a function of TRL's signature at the top level of
    a module or script, or a dict of several by name. Returns the final state; the policy is
    exported to <output_dir>/policy, LoRA's adapters to <output_dir>/adapter as well.

    `on_step(step, metrics)` is called on the first process after each step and its evaluation, with
    the step's line of metrics.jsonl. If it raises `StopTraining`, the run ends there: the state is
    saved, and the policy exported. Anything else that it raises stops the run after saving the
    state, as a signal does, and is raised by `train`.

    SIGTERM, SIGHUP and Ctrl-C save and return early. While the disk is full, a run warns and goes
    on without checkpoints or metrics. Raises InputError for mistakes in config or data, before an
    existing run in the folder is changed; while another process uses the folder; and if the disk is
    still full at the end, or at a stop.
    """
    return advance(config, reward, on_step)[0]


def advance(
    config: Config,
    reward: Reward | dict[str, Reward] | None = None,
    on_step: OnStep | None = None,
) -> tuple[TrainState, bool]:
    """Trains as `train` does; also returns whether the run is complete, with its last evaluation
    and export.
    """
    functions = None if reward is None else rewards_by_name(reward)
    if functions is not None:
        config = replace(config, rewards=tuple(functions))
    mesh = open_mesh(config)
    with ExitStack() as stack:
        folder = stack.enter_context(open_folder(config))
        first_process = jax.process_index() == 0
        display = stack.enter_context(Display(config.steps, visible=first_process))
        compilations = stack.enter_context(counted_compilations(display))
        config = with_template_date(config)
        tracking = stack.enter_context(Tracking(config, folder))
        pool = stack.enter_context(open_rewards(config, functions))
        setup, table, constants, state = open_run(config, mesh, status=display.status)
        lm = setup.lm._replace(frozen=constants.frozen)
        step = Step(setup, table, constants, pool, Visits(table.domain, table.domains))
        held_out = open_held_out(config, setup.lm)
        evaluate = compile_evaluation(
            config, setup.lm, mesh, pool, sets=held_out, held=(state, constants)
        )
        stack.enter_context(computing_on(mesh, config))
        identity = run_identity(setup, table, constants.frozen or state.params)
        checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.keep_checkpoints, identity=identity
        )
        stack.enter_context(checkpoints)
        restored = checkpoints.restore(state)
        state = restored or state
        done = int(state.step)
        display.begin(done)
        display.header(run_summary(setup, constants, state))
        start = -1 if restored is None else done
        tracking.open(start)
        path = folder / "metrics.jsonl"
        report = Reporter(path, display, start=start, write=first_process, track=tracking.log)
        if restored is not None:
            all_done = ", whose steps are all done" if done >= config.steps else ""
            display.say(f"resuming after step {done} of the run in {folder}{all_done}")
        elif config.select == SelectConfig():
            display.say(UNIFORM_HINT)
        stopped = stack.enter_context(stop_signals())
        stack.enter_context(heartbeat.watched(folder))
        hooks = Hooks(
            step,
            lm,
            folder,
            checkpoints,
            report,
            evaluate,
            stopped,
            compilations,
            on_step,
            {name: len(tasks.lengths) for name, tasks in held_out.items()},
        )
        state = loop(step, state, report, hooks)
        if not hooks.stopping:
            _export(hooks, state)
        on_host0(report.check_written)  # last, since nothing else depends on it
        if hooks.raised is not None:
            raise hooks.raised
        return state, not hooks.stopping


def _export(hooks: "Hooks", state: TrainState) -> None:
    """Exports the trained policy into the folder of the run, and says where it is."""
    display = hooks.report.display
    display.status("exporting the policy")
    folder = hooks.folder
    where = export(
        hooks.config,
        hooks.lm,
        state.params,
        int(state.step),
        folder / "policy",
        adapter=folder / "adapter",
    )
    display.say(f"the trained policy is in {where}")
    if hooks.best_step:
        display.say(hooks.best_sentence())


def loop(step: Step, state: TrainState, report: Reporter, hooks: "Hooks") -> TrainState:
    """Runs the steps from the state's on, until all are done or something ends the run."""
    hooks.before_steps(state)
    for number in range(int(state.step) + 1, step.setup.config.steps + 1):
        if hooks.stopping or hooks.ended:
            break
        timer = Timer()
        # select, roll out, grade, score; once or in rounds
        batch, state = collect(step, state, timer)
        hooks.before_learning()
        state, metrics = learn(step, state, batch)
        report.flush()  # the step before, while the devices work at this one
        hooks.show(number, batch)
        timer.lap("report")
        jax.block_until_ready(state.step)
        timer.lap("learn")
        report.add(number, metrics | timer.metrics() | counter_metrics(state.counters))
        hooks.after_step(number, state, batch)
    report.flush()
    return state


@dataclass(eq=False)
class Hooks:
    """Evaluates, shows, saves and stops, before, in and after a step."""

    step: Step
    lm: LanguageModel  # without its trained parameters
    folder: Path  # of the run
    checkpoints: Checkpoints
    report: Reporter
    evaluate: Evaluate
    stopped: Callable[[], bool]
    compilations: Compilations
    on_step: OnStep | None = None
    held_out: Mapping[str, int] = field(default_factory=dict)  # tasks of each held-out set
    stopping: bool = False  # by a signal or an error, to be resumed
    ended: bool = False  # before the last step of the config, and complete
    raised: BaseException | None = None  # by `on_step`
    recorded: bool = False  # whether the run's config is in its folder
    start: int = 0  # steps done when the process began

    def __post_init__(self) -> None:
        """Looks up the best policy so far."""
        self.config = self.step.setup.config
        self.completions = CompletionsLog(self.folder)
        self.best_metric = f"eval/{self.config.keep_best}"
        self.best, self.best_step, self.waited = json.loads(
            broadcast_from_host0(lambda: json.dumps(self._evaluations_so_far()))
        )

    def _evaluations_so_far(self) -> tuple[float, int, int]:
        """Returns the best value, its step, and the number of evaluations since then."""
        best, step = self.report.best(self.best_metric)
        return best, step, self.report.evaluations_after(step, self.best_metric)

    def before_steps(self, state: TrainState) -> None:
        """Evaluates the first policy, or one whose evaluation a signal prevented or interrupted."""
        self.start = int(state.step)
        self.selection = SelectionLog(self.folder, self.start)
        missed = self.report.write and not self.report.evaluated(self.start)
        if self._evaluation_due(self.start) and any_process(missed):
            self._evaluate(self.start, state)
        if any_process(self.stopped()):
            self._stop(self.start, state)
        elif self._out_of_patience():
            self._end(self.start)
        elif self.start < self.config.steps:
            self.report.display.status("first step")

    def before_learning(self) -> None:
        """Writes the run's config into its folder, once the first batch was rolled out and graded.

        A config whose first batch fails must not change the records of an existing run.
        """
        if not self.recorded and jax.process_index() == 0:
            write_records(
                self.folder,
                self.config,
                num_tasks=self.step.setup.num_tasks,
                held_out=self.held_out,
            )
        if not self.recorded:
            on_host0(lambda: self.completions.remove_after(self.start))
        self.recorded = True

    def show(self, number: int, batch: Batch) -> None:
        """Shows and saves completions every `log_completions_steps`, and names uninformative
        domains.
        """
        if is_due(number, self.config.log_completions_steps):
            self.report.display.completions(number, sample_rows(self.step, batch))
            rows = completion_rows(self.step, batch)
            self.completions.write(number, rows, self.config.rewards, process=jax.process_index())
        for sentence in self.step.visits.news():
            self.report.display.say(sentence)

    def after_step(self, number: int, state: TrainState, batch: Batch) -> None:
        """Evaluates and saves what is due, and stops or ends the run if there is a reason.

        Raises InputError after `max_skipped_updates` skipped updates in a row.
        """
        entry = selection_entry(self.step, number, state, batch)
        if self.report.write:
            self.selection.write(entry)
        if number == self.start + 1:
            self.report.display.status("")
            self.report.display.say(
                f"compiled until the end of the first step: {self.compilations}"
            )
        skipped = int(state.optimizer.skipped)
        if skipped >= self.config.max_skipped_updates:
            self.report.flush()
            stop_diverged(self.step, state, batch.groups, self.folder, self.checkpoints.newest)
        if self._evaluation_due(number) and not any_process(self.stopped()):
            self._evaluate(number, state)
        self._call(number)
        if number < self.config.steps and self._out_of_patience():
            self._end(number)
        stopping = any_process(self.stopped() or self.raised is not None)
        last = number == self.config.steps or stopping or self.ended
        # A state saved while updates are skipped would replace older, finite ones.
        if last or (is_due(number, self.config.save_steps) and not skipped):
            save_checkpoint(self.lm, self.checkpoints, self.report, state, must=last)
        if stopping:
            self._stop(number, state)

    def _call(self, number: int) -> None:
        """Calls `on_step` on the first process, and ends the run if it says so.

        What else it raises is kept until the state is saved.
        """
        if self.on_step is None:
            return
        self.report.flush()
        metrics = {name: value for name, value in self.report.newest.items() if name != "step"}
        ends = False
        if jax.process_index() == 0:
            try:
                self.on_step(number, metrics)
            except StopTraining as reason:
                ends = True
                self.report.display.say(f"on_step ends the run after step {number}: {reason}")
            except BaseException as error:
                self.raised = error
        self.ended = any_process(ends)

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return 0 < patience <= self.waited

    def _end(self, number: int) -> None:
        """Ends the run before its last step, and says why."""
        self.ended = True
        self.report.display.say(
            f"{self.config.keep_best} has not improved in {self.waited} evaluations since step "
            f"{self.best_step}: the run ends after step {number}"
        )

    def _evaluation_due(self, number: int) -> bool:
        every = self.config.eval_steps
        return every > 0 and (number in (0, self.config.steps) or is_due(number, every))

    def _evaluate(self, number: int, state: TrainState) -> None:
        """Evaluates the policy, and exports it if it is the best so far; a signal interrupts it."""
        with suppress(Stopped):
            params = model.all_params(state.params, self.lm.frozen)
            metrics = self.evaluate(params, number, self.stopped, self.report.display.status)
            self.report.add(number, metrics)
            self.report.display.status("")
            self.report.display.evaluation(number, _main_figures(self.config, metrics))
            value = metrics.get(self.best_metric, -math.inf)
            if number == 0 or self.config.keep_best is None:
                return
            self.waited = 0 if value > self.best else self.waited + 1
            self.report.flush()  # the model card reads the metrics
            if value > self.best and export_best(self.config, self.lm, state, self.folder):
                self.best = value
                self.best_step = number
                self.report.display.say(self.best_sentence("the best so far"))

    def best_sentence(self, which: str = "the best") -> str:
        """Says which policy is in <output_dir>/best."""
        return (
            f"{which} of {self.config.keep_best}, {self.best:.3f} at step {self.best_step}, is in "
            f"{self.folder / 'best'}"
        )

    def _stop(self, number: int, state: TrainState) -> None:
        """Saves the state, unless no step was done or it is saved, and says how to resume."""
        self.stopping = True
        newest = self.checkpoints.newest
        if number > self.start and newest != number:
            save_checkpoint(self.lm, self.checkpoints, self.report, state, must=True)
            newest = number
        reason = "a signal" if self.raised is None else f"on_step ({self.raised!r:.200})"
        checkpoint = "there is no checkpoint" if newest is None else f"checkpoint {newest} is saved"
        self.report.display.say(
            f"stopped by {reason} after step {number}; {checkpoint}. "
            "Run the same command to resume."
        )


def save_checkpoint(
    lm: LanguageModel, checkpoints: Checkpoints, report: Reporter, state: TrainState, *, must: bool
) -> None:
    """Saves the state. If that fails, raises InputError if it `must` be saved, and else warns.

    Metrics are written first, since a resumed run does not repeat the steps before its checkpoint.
    If they cannot be written, the state is saved nevertheless. Parameters that are not finite are
    not saved, since they would replace older, finite ones.
    """
    report.flush()
    try:
        check_finite(lm, state.params, step=int(state.step), newest=checkpoints.newest)
        checkpoints.save(state)
    except InputError as error:
        if must:
            raise
        if jax.process_index() == 0:
            logger.warning("step %d is not saved, and the run goes on: %s", int(state.step), error)


def export_best(config: Config, lm: LanguageModel, state: TrainState, folder: Path) -> bool:
    """Exports the policy to <folder>/best; warns and returns False if it cannot be written."""
    step = int(state.step)
    try:
        card = model_card(config, step, lm.folder, "best")
        export_merged(lm, state.params, folder / "best", step, card=card)
    except InputError as error:
        if jax.process_index() == 0:
            logger.warning(
                "the best policy, of step %d, is not exported, and the run goes on: %s",
                step,
                error,
            )
        return False
    return True


def stop_diverged(
    step: Step, state: TrainState, groups: Groups, folder: Path, newest: int | None
) -> NoReturn:
    """Writes the batch of the last step to `folder`, and raises InputError.

    `groups` are the fresh groups of that step, whose update was skipped as those before it;
    `newest` is the newest checkpoint.
    """
    # The replay has not changed since, so that the same groups are drawn again.
    drawn, replayed = jax.jit(complete_batch, static_argnums=0)(
        step.setup, state.replay, groups, state.step - 1
    )
    arrays = {
        name: x for name, x in (drawn._asdict() | {"replayed": replayed}).items() if x is not None
    }
    arrays = multihost_utils.process_allgather(arrays, tiled=True)
    path = folder / f"not-finite-{int(state.step)}.safetensors"
    on_host0(lambda: write_arrays(path, arrays))
    checkpoint = "there is no checkpoint"
    if newest is not None:
        checkpoint = f"the newest checkpoint is of step {newest}"
    raise InputError(
        f"the last {int(state.optimizer.skipped)} updates in a row, up to step {int(state.step)}, "
        f"were skipped, since their loss or gradient is not finite: {checkpoint}; lower the "
        f"learning_rate, or inspect the batch of the last step in {path}"
    )


def sample_rows(step: Step, batch: Batch) -> list[Sample]:
    """Returns the first sample of a few tasks, with its success as reward."""
    first = batch.rounds[0]
    success = first.rewards.success
    valid = first.rewards.success_valid
    num_generations = step.setup.config.num_generations
    rows = []
    for row, text in first.rewards.samples:
        if row % num_generations == 0 and len(rows) < SHOWN:
            task = first.ids[row // num_generations]
            prompt = step.table.prompts[task]
            shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            reward = float(success[row]) if valid[row] else None
            rows.append(Sample(shown, text, reward, reference(step.table, task)))
    return rows


def is_due(number: int, every: int) -> bool:
    """Decides whether step `number` is a multiple of `every`; 0 = never."""
    return every > 0 and number % every == 0


def _main_figures(config: Config, metrics: dict[str, float]) -> dict[str, float]:
    """Selects the figures of an evaluation that the console shows: of whole sets, at their k."""
    shown = {
        f"eval/{tasks.title}/{kind}"
        for tasks in config.evaluation.tasks
        for k in [config.samples_of(tasks)]
        for kind in ("greedy", f"avg@{k}", f"pass@{k}", f"maj@{k}", "mean_length")
    }
    return {name: value for name, value in metrics.items() if name in shown}
