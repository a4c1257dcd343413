"""The loop: select, roll out, verify, learn, report; and what it takes to start, stop and resume it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrft import checkpoint, runtime
from jaxrft import evaluate as evaluation
from jaxrft import mesh as meshes
from jaxrft.checkpoint import Checkpoints, RunState, Tally, open_folder, write_records
from jaxrft.config import Config
from jaxrft.learn import grpo, update
from jaxrft.lm import weights
from jaxrft.report import log, metrics
from jaxrft.report.console import Display
from jaxrft.report.log import Reporter
from jaxrft.rewards.pool import Pool
from jaxrft.runtime import LanguageModel
from jaxrft.select import selectors
from jaxrft.select.selectors import Selector
from jaxrft.tasks import table
from jaxrft.tasks.table import TaskTable
from jaxrft.types import Array, Choice, Feedback, InputError, Rollout, Tasks


class Run(NamedTuple):
    """All that a run is made of, beside its state."""

    config: Config
    mesh: Mesh
    lm: LanguageModel
    table: TaskTable  # of the tasks, on the host
    tasks: Tasks  # on the devices
    selector: Selector
    learner: update.Update
    pool: Pool
    evaluate: Callable[[Any, int], dict[str, float]]
    reference: Any  # parameters of the policy that the KL is taken to; None = no KL


def train(config: Config, *, reward: Any = None) -> RunState:
    """Trains `config.model` on `config.tasks`, or goes on where the run in `config.output_dir` stopped.

    `reward` takes the place of `config.rewards`: a function of TRL's signature at the top level of a module or script,
    or a dict of several by name. Returns the final state; the policy is exported to <output_dir>/policy. SIGTERM and
    Ctrl-C save and return early. Raises InputError for mistakes in config or data, before anything of a run that is in
    the folder already is touched, and when the disk is full.
    """
    functions = None if reward is None else runtime.rewards_by_name(reward)
    if functions is not None:
        config = dataclasses.replace(config, rewards=tuple(functions))
    mesh = runtime.start(config)
    folder = open_folder(config)
    with ExitStack() as stack:
        pool = stack.enter_context(runtime.open_rewards(config, functions))
        run, state = set_up(config, mesh, pool)
        stack.enter_context(runtime.on(mesh, config))
        checkpoints = stack.enter_context(
            Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, identity=identity(run))
        )
        resumed = checkpoints.latest() is not None
        state = checkpoints.restore(state) if resumed else state
        first = jax.process_index() == 0
        display = Display(config.steps, start=int(state.step), every=config.log_completions_steps, visible=first)
        stack.enter_context(display)
        report = log.Reporter(folder / "metrics.jsonl", display, start=int(state.step) if resumed else -1, write=first)
        if resumed:
            display.say(f"going on after step {int(state.step)} of the run in {folder}")
        stopped = stack.enter_context(runtime.stop_signals())
        state = loop(run, state, folder, checkpoints, report, stopped)
        if int(state.step) >= config.steps:
            weights.save(folder / "policy", state.params, run.lm.config, source=run.lm.folder)
            display.say(f"the trained policy is in {folder / 'policy'}")
        return state


def loop(
    run: Run, state: RunState, folder: Path, checkpoints: Checkpoints, report: Reporter, stopped: Callable[[], bool]
) -> RunState:
    """Steps from the state's on, until all are done or a signal comes."""
    config, mesh, display = run.config, run.mesh, report.display
    select, generate, learn = compile_steps(run, state)
    widths = table.buckets(run.table.lengths)

    def evaluate(step: int) -> None:
        found = run.evaluate(state.params, step)
        report.add(step, found)
        display.evaluation(step, found)

    def evaluation_due(step: int) -> bool:
        return config.eval_steps > 0 and (step in (0, config.steps) or due(step, config.eval_steps))

    done = int(state.step)
    # A stop by a signal leaves out the evaluation that may have been due after its last step.
    if evaluation_due(done) and runtime.any_process(report.write and not report.evaluated(done)):
        evaluate(done)
    first = done + 1
    for step in range(first, config.steps + 1):
        timer = log.Timer()
        choice, chosen = select(state.selector, state.step, run.tasks)
        ids = np.asarray(choice.ids)
        timer.lap("select")
        prompts = runtime.prompt_batch(run.table, ids, widths, mesh)
        rollouts = generate(state.params, state.step, *prompts, choice.ids)
        jax.block_until_ready(rollouts.lengths)
        timer.lap("rollout")
        verdicts = runtime.verify(rollouts, run.pool, run.lm.tokenizer, run.table, ids)
        verdicts = runtime.check_verdicts(config, verdicts, first=step == first)
        if step == first and jax.process_index() == 0:
            write_records(folder, config)  # no earlier: a mistake must not leave its mark on an existing run
        timer.lap("reward")
        rewards = verdicts.rewards.reshape(len(ids), config.num_generations, -1)
        rewards = meshes.from_host(mesh, rewards, "batch", None, None)
        state, found = learn(state._replace(selector=chosen), run.tasks, choice, prompts, rollouts, rewards)
        report.flush()  # the step before, while the device works at this one
        if due(step, config.log_completions_steps):
            display.completions(step, sample_rows(run, ids, verdicts))
        timer.lap("report")
        jax.block_until_ready(state.step)
        timer.lap("learn")
        check_finite(step, found, checkpoints.latest())
        found |= {f"rewards/{kind}": lost for kind, lost in verdicts.failures.items()}
        report.add(step, found | timer.metrics() | {"num_tokens": checkpoint.total(state.tally)})
        stopping = runtime.any_process(stopped())
        if evaluation_due(step) and not stopping:
            evaluate(step)
        if step == config.steps or stopping or due(step, config.save_steps):
            report.flush()  # before the checkpoint, or a kill between the two would lose the line
            checkpoints.save(state)
        if stopping:
            display.say(f"stopped by a signal after step {step}, saved; the same command goes on from here")
            break
    report.flush()
    return state


def compile_steps(run: Run, state: RunState) -> tuple[Callable, Callable, Callable]:
    """The programs of a step, select, generate and learn: they keep the state's shardings and reuse its memory."""
    config, mesh = run.config, run.mesh
    everywhere = meshes.sharding(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    reward_weights = np.array(config.reward_weights or [1.0] * len(config.rewards), np.float32)[None, None]

    def select(selector_state: Any, step: Array, tasks: Tasks) -> tuple[Choice, Any]:
        return run.selector.select(runtime.stream(config.seed, step, "select"), selector_state, tasks)

    def learn(
        state: RunState, tasks: Tasks, choice: Choice, prompts: Any, rollouts: Rollout, rewards: Array, ref: Any
    ) -> tuple[RunState, dict[str, Array]]:
        """Updates selector and policy; rewards [B, G, F], NaN = none."""
        groups = rewards.shape[:2]
        valid = jnp.all(jnp.isfinite(rewards), axis=-1)
        total = jnp.sum(jnp.where(valid[..., None], rewards, 0.0) * reward_weights, axis=-1)
        success = jnp.where(valid, rewards[..., runtime.success_index(config)], 0.0)
        trials = jnp.sum(valid, axis=1, dtype=jnp.float32)
        spent = jnp.sum(rollouts.lengths.reshape(groups), axis=1)
        feedback = Feedback(choice.ids, jnp.sum(success, axis=1), trials, spent.astype(jnp.float32))
        last = jnp.take_along_axis(rollouts.tokens, rollouts.lengths[:, None] - 1, axis=1)
        truncated = ~jnp.any(last == jnp.asarray(run.lm.eos_ids, jnp.int32)[None], axis=1)
        leaves = truncated.reshape(groups) if config.mask_truncated_completions else jnp.zeros(groups, bool)
        batch = update.Batch(
            *prompts,
            tokens=rollouts.tokens.reshape(*groups, -1),
            mask=jnp.where((valid & ~leaves)[..., None], rollouts.mask.reshape(*groups, -1), 0.0),
            logprobs=rollouts.logprobs.reshape(*groups, -1),
            advantages=grpo.advantages(total, scale_rewards=config.scale_rewards, mask=valid),
        )
        key = runtime.stream(config.seed, state.step, "learn")
        params, optimizer, found = run.learner.step(key, state.params, state.optimizer, batch, ref)
        tally = checkpoint.count(state.tally, choice.ids, state.step + 1, jnp.sum(spent))
        found |= metrics.rewards(rewards, config.rewards, total, valid, grpo.informative(total, valid))
        found |= metrics.completions(rollouts, truncated)
        informative = grpo.informative(success, valid)
        found |= metrics.selection(choice, feedback, informative, tally.last_seen)
        found |= metrics.by_domain(informative, choice, tasks, run.table.domains)
        selector = run.selector.update(state.selector, tasks, feedback)
        return RunState(state.step + 1, params, optimizer, selector, state.replay, tally), found

    learn = jax.jit(learn, donate_argnums=0, out_shardings=(shardings, everywhere))
    return (
        jax.jit(select, out_shardings=(everywhere, shardings.selector)),
        runtime.generator(run.lm, config, mesh),
        lambda *arguments: learn(*arguments, ref=run.reference),
    )


def set_up(config: Config, mesh: Mesh, pool: Pool) -> tuple[Run, RunState]:
    """Opens and checks all that the run needs, and makes its first state."""
    lm = runtime.open_model(config, mesh)
    rows = runtime.open_mixture(config, lm.tokenizer)
    number = len(rows.lengths)
    selector = selectors.make(
        batch_size=config.batch_size, num_generations=config.num_generations, **dataclasses.asdict(config.select)
    )
    tasks = Tasks(rows.reference_pass_rates, domain=rows.domain)  # pyright: ignore[reportArgumentType]
    selector_state = selector.init(tasks, number)
    learner = make_learner(config, lm)
    everywhere = meshes.sharding(mesh)
    shardings = update.optimizer_shardings(learner, lm.params, everywhere)
    state = RunState(
        step=meshes.place(np.int32(0), everywhere),
        params=lm.params,
        optimizer=jax.jit(learner.init, out_shardings=shardings)(lm.params),
        selector=meshes.place_table(selector_state, mesh, number),
        replay=None,
        tally=meshes.place_table(Tally._make((np.full(number, -1, np.int32), np.zeros(2, np.int32))), mesh, number),
    )
    return Run(
        config,
        mesh,
        lm._replace(params=None),  # the state's from now on, which each step gives new memory
        rows,
        meshes.place_table(tasks, mesh, number),
        selector,
        learner,
        pool,
        evaluation.make(config, lm, mesh, pool),
        reference=jax.tree.map(jnp.copy, lm.params) if config.kl_coef > 0 else None,
    ), state


def make_learner(config: Config, lm: LanguageModel) -> update.Update:
    """The training step of the config."""
    return update.make(
        lm.policy,
        mini_batch_size=config.tasks_per_update,
        micro_batch_size=config.rows_per_micro_batch,
        num_iterations=config.num_iterations,
        loss_type=config.loss_type,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint of this run belongs to: the model's shape, the tasks and their order, the selector."""

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:12]

    answers, rates = run.table.columns.get("answer"), run.table.reference_pass_rates
    shape = {f"model's {name}": value for name, value in run.lm.config._asdict().items()}
    return shape | {
        "number of tasks": len(run.table.lengths),
        "digest of the tasks": digest(run.table.tokens.tobytes() + run.table.lengths.tobytes()),
        "digest of the ground truths": None if answers is None else digest(json.dumps(answers, default=str).encode()),
        "digest of the domains": digest(run.table.domain.tobytes() + json.dumps(run.table.domains).encode()),
        "digest of the reference pass rates": None if rates is None else digest(rates.tobytes()),
        "selector": run.config.select.name,
    }


def check_finite(step: int, found: dict[str, Array], saved: int | None) -> None:
    """Raises InputError, before anything of it is saved, when an update has gone wrong."""
    values = {name: float(found[name]) for name in ("policy_loss", "grad_norm")}
    if not np.isfinite(list(values.values())).all():
        numbers = ", ".join(f"{name} {value:g}" for name, value in values.items())
        left = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
        raise InputError(f"step {step} has diverged ({numbers}) and is not saved, {left}: lower the learning_rate")


def sample_rows(run: Run, ids: np.ndarray, verdicts: runtime.Verdicts, limit: int = 4) -> list[tuple[str, str, float]]:
    """(prompt, completion, success) of the first sample of a few tasks."""
    success = verdicts.rewards[:, runtime.success_index(run.config)]
    generations = run.config.num_generations
    firsts = [(row, text) for row, text in verdicts.samples if row % generations == 0][:limit]
    prompts = [run.table.prompts[ids[row // generations]] for row, _ in firsts]
    shown = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [(prompt, text, float(success[row])) for prompt, (row, text) in zip(shown, firsts, strict=True)]


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 = never, happens after this one."""
    return every > 0 and step % every == 0
