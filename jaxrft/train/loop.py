"""The loop: select, roll out, grade, learn, report."""

import dataclasses
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrft import lifesigns
from jaxrft.config import Config
from jaxrft.host.checkpoint import Checkpoints
from jaxrft.host.multihost import any_process, broadcast_from_host0, on_host0
from jaxrft.host.stopping import Stopped, stop_signals
from jaxrft.lm import model
from jaxrft.lm.policy import LanguageModel, check_finite, export, export_merged
from jaxrft.report import log
from jaxrft.report.console import Display
from jaxrft.report.log import Reporter
from jaxrft.rewards.grading import Verdicts, open_rewards, rewards_by_name
from jaxrft.streams import STREAMS
from jaxrft.train import resample as batches
from jaxrft.train import step as steps
from jaxrft.train.devices import computing_on, open_mesh
from jaxrft.train.resume import open_folder, run_identity, with_template_date, write_records
from jaxrft.train.setup import measured_tasks, set_up
from jaxrft.train.state import TrainState, counter_metrics
from jaxrft.train.step import Run
from jaxrft.types import InputError

logger = logging.getLogger(__name__)


def train(config: Config, *, reward: Any = None) -> TrainState:
    """Trains `config.model` on `config.tasks`, or goes on where the run in `config.output_dir` stopped.

    `reward` takes the place of `config.rewards`: a function of TRL's signature at the top level of a module or script,
    or a dict of several by name. Returns the final state; the policy is exported to <output_dir>/policy, LoRA's
    adapters to <output_dir>/adapter as well. SIGTERM, SIGHUP and Ctrl-C save and return early. Raises InputError for
    mistakes in config or data, before anything of a run that is in the folder already is touched, and while another
    process uses the folder. While the disk is full a run goes on without checkpoints, or without metrics, and says so;
    raises InputError if it is still full at the end, or at a stop.
    """
    return advance(config, reward)[0]


def advance(config: Config, reward: Any = None) -> tuple[TrainState, bool]:
    """As `train`; and whether all is done, the evaluation and the export after the last step too."""
    functions = None if reward is None else rewards_by_name(reward)
    if functions is not None:
        config = dataclasses.replace(config, rewards=tuple(functions))
    mesh = open_mesh(config)
    with ExitStack() as stack:
        folder = stack.enter_context(open_folder(config))
        config = with_template_date(config)
        pool = stack.enter_context(open_rewards(config, functions))
        run, state = set_up(config, mesh, pool)
        stack.enter_context(computing_on(mesh, config))
        checkpoints = stack.enter_context(
            Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, identity=run_identity(run, state.params))
        )
        restored = checkpoints.restore(state)
        resumed, state = restored is not None, restored or state
        first = jax.process_index() == 0
        display = Display(config.steps, start=int(state.step), every=config.log_completions_steps, visible=first)
        stack.enter_context(display)
        report = log.Reporter(folder / "metrics.jsonl", display, start=int(state.step) if resumed else -1, write=first)
        if resumed:
            display.say(f"going on after step {int(state.step)} of the run in {folder}")
        stopped = stack.enter_context(stop_signals())
        stack.enter_context(lifesigns.watched(folder))
        state, stopping = loop(run, state, folder, checkpoints, report, stopped)
        if not stopping:
            display.say(export(config, run.lm, state.params, folder))
        on_host0(report.check_written)  # last, since nothing else depends on it
        return state, not stopping


def loop(
    run: Run, state: TrainState, folder: Path, checkpoints: Checkpoints, report: Reporter, stopped: Callable[[], bool]
) -> tuple[TrainState, bool]:
    """Steps from the state's on, until all are done or a signal comes; whether it was a signal."""
    config, frozen, display = run.config, run.lm.frozen, report.display
    programs = steps.compile_steps(run, state)
    deciding = f"eval/{config.keep_best}"
    best = float(broadcast_from_host0(lambda: repr(report.best(deciding))))

    def evaluate(step: int) -> None:
        nonlocal best
        with suppress(Stopped):
            found = run.evaluate(model.whole(state.params, frozen), step, stopped)
            report.add(step, found)
            display.evaluation(step, found)
            if step > 0 and found.get(deciding, -math.inf) > best and export_best(run.lm, state, folder):
                best = found[deciding]

    def evaluation_due(step: int) -> bool:
        return config.eval_steps > 0 and (step in (0, config.steps) or due(step, config.eval_steps))

    def measuring_due(done: int) -> bool:  # after a checkpoint, too, as in a run that goes on from it
        return due(done, run.selector.measure_every) or due(done, config.save_steps)

    def halt(step: int) -> None:
        if step > done and checkpoints.newest != step:
            save_checkpoint(run.lm, checkpoints, report, state, must=True)
        kept = "saved" if step > done else "and nothing is to be saved"
        display.say(f"stopped by a signal after step {step}, {kept}; the same command goes on from here")

    done = int(state.step)
    # A stop by a signal leaves out the evaluation that may have been due after its last step, or breaks it off.
    if evaluation_due(done) and any_process(report.write and not report.evaluated(done)):
        evaluate(done)
    if any_process(stopped()):
        halt(done)
        return state, True
    first, stopping = done + 1, False
    for step in range(first, config.steps + 1):
        if run.selector.measure and (step == first or measuring_due(step - 1)):
            try:
                run = run._replace(tasks=measured_tasks(run, state, step, stopped))
            except Stopped:
                stopping = True
                halt(step - 1)
                break
        timer, probed = log.Timer(), batches.Probed()
        if run.selector.reference_set and (step - 1) % run.selector.reference_every == 0:
            state, probed = batches.probe(run, programs, state, first=step == first)
            timer.lap("probe")
        filling = batches.fill(run, programs, state, probed)
        stream = STREAMS.index("select")
        choice, state = batches.choose(run, programs, state, filling.excluded, batch_size=filling.fresh, stream=stream)
        ids = np.asarray(choice.ids)
        timer.lap("select")
        rolled = batches.sample(run, programs, state, ids)
        timer.lap("rollout")
        verdicts = batches.verify(run, state, rolled, first=step == first)
        if step == first and jax.process_index() == 0:
            write_records(folder, config)  # no earlier: a mistake must not leave its mark on an existing run
        timer.lap("reward")
        judged = batches.judge(run, programs, state, rolled, verdicts)
        batch = batches.gather(run, programs, choice, judged, verdicts, probed, filling)
        if config.dynamic_sampling:
            state, batch = batches.refill(run, programs, state, batch, probed)
            timer.lap("refill")
        state, found = batches.learn(run, programs, state, batch)
        report.flush()  # the step before, while the device works at this one
        if due(step, config.log_completions_steps):
            display.completions(step, sample_rows(run, ids, verdicts))
        for sentence in run.visits.news() if run.visits is not None else ():
            display.say(sentence)
        timer.lap("report")
        jax.block_until_ready(state.step)
        timer.lap("learn")
        report.add(step, found | timer.metrics() | counter_metrics(state.tally))
        if int(state.optimizer.skipped) >= config.max_skipped_updates:
            report.flush()
            batches.stop_skipping(run, programs, state, batch.groups, folder, checkpoints.newest)
        if evaluation_due(step) and not any_process(stopped()):
            evaluate(step)
        stopping = any_process(stopped())
        last = step == config.steps or stopping
        # What is saved while updates are skipped would push out what was saved before that began.
        if last or (due(step, config.save_steps) and not state.optimizer.skipped):
            save_checkpoint(run.lm, checkpoints, report, state, must=last)
        if stopping:
            halt(step)
            break
    report.flush()
    return state, stopping


def save_checkpoint(
    lm: LanguageModel, checkpoints: Checkpoints, report: Reporter, state: TrainState, *, must: bool
) -> None:
    """Saves the state; unless it `must` be, a run goes on without, and says so, when the disk does not take it.

    Metrics come first, since a kill would lose the lines that a checkpoint has left behind, but do not have to be
    written: those that wait in memory are worth less than the state. Parameters that are not finite are not saved,
    since they would push out those that are.
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


def export_best(lm: LanguageModel, state: TrainState, folder: Path) -> bool:
    """Exports the policy to <folder>/best; False, and it is said, when the disk does not take it."""
    try:
        export_merged(lm, state.params, folder / "best")
    except InputError as error:
        if jax.process_index() == 0:
            logger.warning("the best policy, of step %d, is not kept, and the run goes on: %s", int(state.step), error)
        return False
    return True


def sample_rows(run: Run, ids: np.ndarray, verdicts: Verdicts, limit: int = 4) -> list[tuple[str, str, float]]:
    """(prompt, completion, success) of the first sample of a few tasks."""
    generations = run.config.num_generations
    firsts = [(row, text) for row, text in verdicts.samples if row % generations == 0][:limit]
    prompts = [run.table.prompts[ids[row // generations]] for row, _ in firsts]
    shown = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [(prompt, text, float(verdicts.success[row])) for prompt, (row, text) in zip(shown, firsts, strict=True)]


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 = never, happens after this one."""
    return every > 0 and step % every == 0
