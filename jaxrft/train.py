"""The loop: select, roll out, verify, learn, report; and what it takes to start, stop and resume it."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrft import batches, changes, checkpoint, lifesigns, runtime, steps
from jaxrft import evaluate as evaluation
from jaxrft import mesh as meshes
from jaxrft.checkpoint import Checkpoints, RunState, open_folder, write_records
from jaxrft.config import Config
from jaxrft.lm import model
from jaxrft.report import log
from jaxrft.report.console import Display
from jaxrft.report.log import Reporter
from jaxrft.report.visits import Visits
from jaxrft.rewards.pool import Pool
from jaxrft.runtime import LanguageModel
from jaxrft.select.dots.predictor import predictor_digest
from jaxrft.steps import Run
from jaxrft.tasks import table
from jaxrft.tasks.projections import open_predictor
from jaxrft.tasks.table import TaskTable
from jaxrft.types import InputError, Tasks

logger = logging.getLogger(__name__)


def train(config: Config, *, reward: Any = None) -> RunState:
    """Trains `config.model` on `config.tasks`, or goes on where the run in `config.output_dir` stopped.

    `reward` takes the place of `config.rewards`: a function of TRL's signature at the top level of a module or script,
    or a dict of several by name. Returns the final state; the policy is exported to <output_dir>/policy, LoRA's
    adapters to <output_dir>/adapter as well. SIGTERM, SIGHUP and Ctrl-C save and return early. Raises InputError for
    mistakes in config or data, before anything of a run that is in the folder already is touched, and while another
    process uses the folder. While the disk is full a run goes on without checkpoints, or without metrics, and says so;
    raises InputError if it is still full at the end, or at a stop.
    """
    return advance(config, reward)[0]


def advance(config: Config, reward: Any = None) -> tuple[RunState, bool]:
    """As `train`; and whether all is done, the evaluation and the export after the last step too."""
    functions = None if reward is None else runtime.rewards_by_name(reward)
    if functions is not None:
        config = dataclasses.replace(config, rewards=tuple(functions))
    mesh = runtime.start(config)
    with ExitStack() as stack:
        folder = stack.enter_context(open_folder(config))
        config = runtime.dated(config)
        pool = stack.enter_context(runtime.open_rewards(config, functions))
        run, state = set_up(config, mesh, pool)
        stack.enter_context(runtime.on(mesh, config))
        checkpoints = stack.enter_context(
            Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, identity=identity(run, state.params))
        )
        restored = checkpoints.restore(state)
        resumed, state = restored is not None, restored or state
        first = jax.process_index() == 0
        display = Display(config.steps, start=int(state.step), every=config.log_completions_steps, visible=first)
        stack.enter_context(display)
        report = log.Reporter(folder / "metrics.jsonl", display, start=int(state.step) if resumed else -1, write=first)
        if resumed:
            display.say(f"going on after step {int(state.step)} of the run in {folder}")
        stopped = stack.enter_context(runtime.stop_signals())
        stack.enter_context(lifesigns.watched(folder))
        state, stopping = loop(run, state, folder, checkpoints, report, stopped)
        if not stopping:
            display.say(runtime.export(config, run.lm, state.params, folder))
        checkpoint.on_first(report.check_written)  # last, since nothing else depends on it
        return state, not stopping


def loop(
    run: Run, state: RunState, folder: Path, checkpoints: Checkpoints, report: Reporter, stopped: Callable[[], bool]
) -> tuple[RunState, bool]:
    """Steps from the state's on, until all are done or a signal comes; whether it was a signal."""
    config, frozen, display = run.config, run.lm.frozen, report.display
    programs = steps.compile_steps(run, state)
    deciding = f"eval/{config.keep_best}"
    best = float(checkpoint.told(lambda: repr(report.best(deciding))))

    def evaluate(step: int) -> None:
        nonlocal best
        with suppress(runtime.Stopped):
            found = run.evaluate(model.whole(state.params, frozen), step, stopped)
            report.add(step, found)
            display.evaluation(step, found)
            if step > 0 and found.get(deciding, -math.inf) > best and keep_best(run.lm, state, folder):
                best = found[deciding]

    def evaluation_due(step: int) -> bool:
        return config.eval_steps > 0 and (step in (0, config.steps) or due(step, config.eval_steps))

    def measuring_due(done: int) -> bool:  # after a checkpoint, too, as in a run that goes on from it
        return due(done, run.selector.measure_every) or due(done, config.save_steps)

    def halt(step: int) -> None:
        if step > done and checkpoints.newest != step:
            save(run.lm, checkpoints, report, state, must=True)
        kept = "saved" if step > done else "and nothing is to be saved"
        display.say(f"stopped by a signal after step {step}, {kept}; the same command goes on from here")

    done = int(state.step)
    # A stop by a signal leaves out the evaluation that may have been due after its last step, or breaks it off.
    if evaluation_due(done) and runtime.any_process(report.write and not report.evaluated(done)):
        evaluate(done)
    if runtime.any_process(stopped()):
        halt(done)
        return state, True
    first, stopping = done + 1, False
    for step in range(first, config.steps + 1):
        if run.selector.measure and (step == first or measuring_due(step - 1)):
            try:
                run = run._replace(tasks=measured(run, state, step, stopped))
            except runtime.Stopped:
                stopping = True
                halt(step - 1)
                break
        timer, probed = log.Timer(), batches.Probed()
        if run.selector.probe and (step - 1) % run.selector.probe_every == 0:
            state, probed = batches.probe(run, programs, state, first=step == first)
            timer.lap("probe")
        filling = batches.fill(run, programs, state, probed)
        stream = runtime.USES.index("select")
        choice, chosen = batches.choose(run, programs, state, filling.taken, count=filling.fresh, stream=stream)
        ids = np.asarray(choice.ids)
        timer.lap("select")
        rolled = batches.sample(run, programs, state, ids)
        timer.lap("rollout")
        verdicts = batches.verify(run, state, rolled, first=step == first)
        if step == first and jax.process_index() == 0:
            write_records(folder, config)  # no earlier: a mistake must not leave its mark on an existing run
        timer.lap("reward")
        judged = batches.judge(run, programs, state, rolled, verdicts)
        state = state._replace(selector=chosen)
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
        report.add(step, found | timer.metrics() | checkpoint.totals(state.tally))
        if int(state.optimizer.skipped) >= config.max_skipped_updates:
            report.flush()
            batches.stop_skipping(run, programs, state, batch.groups, folder, checkpoints.newest)
        if evaluation_due(step) and not runtime.any_process(stopped()):
            evaluate(step)
        stopping = runtime.any_process(stopped())
        last = step == config.steps or stopping
        # What is saved while updates are skipped would push out what was saved before that began.
        if last or (due(step, config.save_steps) and not state.optimizer.skipped):
            save(run.lm, checkpoints, report, state, must=last)
        if stopping:
            halt(step)
            break
    report.flush()
    return state, stopping


def save(lm: LanguageModel, checkpoints: Checkpoints, report: Reporter, state: RunState, *, must: bool) -> None:
    """Saves the state; unless it `must` be, a run goes on without, and says so, when the disk does not take it.

    Metrics come first, since a kill would lose the lines that a checkpoint has left behind, but do not have to be
    written: those that wait in memory are worth less than the state. Parameters that are not finite are not saved,
    since they would push out those that are.
    """
    report.flush()
    try:
        runtime.check_finite(lm, state.params, step=int(state.step), newest=checkpoints.newest)
        checkpoints.save(state)
    except InputError as error:
        if must:
            raise
        if jax.process_index() == 0:
            logger.warning("step %d is not saved, and the run goes on: %s", int(state.step), error)


def keep_best(lm: LanguageModel, state: RunState, folder: Path) -> bool:
    """Exports the policy to <folder>/best; False, and it is said, when the disk does not take it."""
    try:
        runtime.export_whole(lm, state.params, folder / "best")
    except InputError as error:
        if jax.process_index() == 0:
            logger.warning("the best policy, of step %d, is not kept, and the run goes on: %s", int(state.step), error)
        return False
    return True


def set_up(config: Config, mesh: Mesh, pool: Pool) -> tuple[Run, RunState]:
    """Opens and checks all that the run needs, and makes its first state."""
    if config.select.name != "dots":  # which needs a predictor
        steps.make_selector(config, config.batch_size, None)  # or its mistakes show only when the policy is loaded
    lm = runtime.open_model(config, mesh)
    rows = runtime.open_mixture(config, lm.tokenizer)
    if rows.embeddings is None and runtime.embeds(config):
        rows = embedded(config, mesh, lm, rows)
    run, state = steps.assemble(config, mesh, lm, rows, open_predictor(config, rows, mesh))
    return run._replace(
        pool=pool,
        visits=Visits(rows.domain, rows.domains),
        evaluate=evaluation.make(config, lm, mesh, pool),
        measure=evaluation.pass_rates(config, lm, mesh, pool),
    ), state


def measured(run: Run, state: RunState, step: int, stopped: Callable[[], bool]) -> Tasks:
    """The tasks with pass rates of the policy that the state holds, of those tasks that the selector wants them of.

    Raises Stopped when `stopped`.
    """
    number, wanted = len(run.table.lengths), run.selector.measure
    assert wanted is not None
    ids = np.asarray(wanted(runtime.stream(run.config.seed, step, "measure"), number))
    rates = run.measure(model.whole(state.params, run.lm.frozen), step, run.table, ids, stopped)
    return run.tasks._replace(pass_rates=meshes.place_table(rates, run.mesh, number))


def embedded(config: Config, mesh: Mesh, lm: LanguageModel, rows: TaskTable) -> TaskTable:
    """The tasks with embeddings by the policy that the run starts from, the same bits at every start on this mesh."""
    number, embedder = len(rows.lengths), runtime.embedder(lm, config, mesh, rows)
    found = np.zeros((number, lm.config.hidden_size), np.float32)
    done, visible = 0, jax.process_index() == 0
    with runtime.on(mesh, config), Display(number, visible=visible, unit="embedding of prompt") as display:
        for ids in table.batches(rows.lengths, config.batch_size):
            found[ids] = embedder(ids)
            done += len(ids)
            display.advance(done, "")
        display.say(f"the policy's embeddings of {number:,} prompts are made")
        return rows._replace(embeddings=found, embedded_by=runtime.made_by(lm, config, mesh))


def identity(run: Run, params: Any) -> dict[str, Any]:
    """What a checkpoint of this run belongs to: the model as loaded, `params`, the tasks and their order, what is kept.

    See `changes` for what of the config is kept.
    """
    rates = run.table.reference_pass_rates
    shape = {f"model's {name}": value for name, value in run.lm.config._asdict().items()}
    if lora := run.lm.config.lora:  # then the weights below the adapters are not in the checkpoint
        shape |= {"model's lora": lora._asdict(), "model's dtype": run.config.dtype}
    shape["digest of the model's parameters"] = runtime.fingerprint(run.lm.frozen or params, run.mesh)
    if run.predictor is not None:
        shape["digest of the predictor"] = predictor_digest(run.predictor)
        shape["tasks of a probe"] = run.config.select.num_references
    return shape | {
        **table.identity(run.table),
        "digest of the domains": table.digest(run.table.domain.tobytes() + json.dumps(run.table.domains).encode()),
        "digest of the reference pass rates": None if rates is None else table.digest(rates.tobytes()),
        "digest of the embeddings": digest_of_embeddings(run),
        **changes.kept(run.config),
    }


def digest_of_embeddings(run: Run) -> str | None:
    """Of their values, or of the policy that makes them itself, as the values are to rounding the same on any mesh."""
    found, by = run.table.embeddings, run.table.embedded_by or {}
    if found is None:
        return None
    given = any(tasks.embeddings is not None for tasks in run.config.task_sets)
    return table.digest(found.tobytes()) if given else by["digest of the model's parameters"]


def sample_rows(run: Run, ids: np.ndarray, verdicts: runtime.Verdicts, limit: int = 4) -> list[tuple[str, str, float]]:
    """(prompt, completion, success) of the first sample of a few tasks."""
    generations = run.config.num_generations
    firsts = [(row, text) for row, text in verdicts.samples if row % generations == 0][:limit]
    prompts = [run.table.prompts[ids[row // generations]] for row, _ in firsts]
    shown = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [(prompt, text, float(verdicts.success[row])) for prompt, (row, text) in zip(shown, firsts, strict=True)]


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 = never, happens after this one."""
    return every > 0 and step % every == 0
