"""The pass rates of a policy on every task, as a column of a parquet file that is itself a source
of tasks.

BOTS takes them as `tasks.pass_rate_columns`, the evidence of its reference policies.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import tyro
from jax.sharding import Mesh

from jaxrft.config import Config, TasksConfig
from jaxrft.fields import Checked, FilePath
from jaxrft.host.files import JSON
from jaxrft.host.multihost import any_process, on_host0
from jaxrft.host.stopping import stop_signals
from jaxrft.lm.policy import LanguageModel, fingerprint, open_model
from jaxrft.lm.segments import CompiledRollout, compile_rollout
from jaxrft.prepare import task_files
from jaxrft.prepare.journal import Journal, begun, journal_of, read_identity, unfinished
from jaxrft.prepare.task_files import TaskFile
from jaxrft.report.console import Display
from jaxrft.rewards.grading import check_rewards, grade_rollout, open_rewards, trainer_state
from jaxrft.rewards.pool import Pool
from jaxrft.tasks import table
from jaxrft.tasks.open_sets import check_columns, tokenize
from jaxrft.tasks.table import TaskTable, prompt_batch
from jaxrft.train.devices import computing_on, open_mesh
from jaxrft.train.memory import choose_concurrent_rows, memory_to_plan
from jaxrft.train.resume import with_template_date
from jaxrft.types import InputError

SUFFIX = "_pass_rate"
TRIALS = "_trials"
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the histogram
# Fields of the config that the pass rates depend on, apart from the model and the tasks.
SETTINGS = (
    "seed num_generations max_prompt_length max_completion_length temperature top_p top_k "
    "min_p repetition_penalty stop chat_template_date rewards reward_timeout reward_completions "
    "skip_special_tokens dtype batch_size"
).split()


@dataclass(frozen=True)
class Options(Checked):
    """The command line of `jaxrft prepare pass-rates`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: FilePath
    """Parquet file to write: the tasks with all columns of their source, and the new column. If it
    exists and has the same tasks, in any order, its other columns are kept. For a mixture, a folder
    for one file a set."""
    name: str | None = None
    """Name of the new column; <model>_pass_rate by default. <model>_trials next to it counts
    its samples.
    """
    overwrite: bool = False
    """Replace columns that the file has already."""
    merge: tuple[FilePath, ...] = ()
    """Join the columns of these files of the same tasks, without any rollout."""


class Counts(NamedTuple):
    """The results of rollouts of n tasks."""

    successes: np.ndarray  # [n] float64, 0..trials
    trials: np.ndarray  # [n] int64, samples that have a reward

    @property
    def rates(self) -> np.ndarray:
        """Computes pass rates [n]; 0 without any trial."""
        return self.successes / np.maximum(1, self.trials)


class Job(NamedTuple):
    """A set of tasks, and everything needed to roll them out."""

    config: Config
    mesh: Mesh
    lm: LanguageModel
    pool: Pool
    tasks: TasksConfig
    out: Path
    source: TaskFile  # all of the tasks
    table: TaskTable  # those that are not dropped
    parts: Sequence[np.ndarray]  # their ids in batches
    stopped: Callable[[], bool]  # whether a signal asks to stop


def run(options: Options) -> bool:
    """Measures pass rates, or merges files of them; returns whether all of it is done."""
    config = options.config
    out = Path(options.out)
    if not options.merge:
        return measure(config, out, name=options.name, overwrite=options.overwrite)
    if options.name is not None:
        raise InputError(
            f"--name {options.name} names a column to be measured, but --merge only joins "
            "files: leave it out"
        )
    merge(config, out, options.merge, overwrite=options.overwrite)
    return True


def merge(config: Config, out: Path, files: tuple[str, ...], *, overwrite: bool = False) -> None:
    """Adds the columns of `files` to those of the file `out`.

    A missing `out` begins with the config's tasks.
    """
    if len(config.task_sets) > 1:
        titles = ", ".join(tasks.title for tasks in config.task_sets)
        raise InputError(
            f"--merge joins files of one set, but tasks is a mixture of {titles}: "
            "give a config of one"
        )
    ((out, tasks),) = files_of(config, out).items()
    joined = open_target(task_files.load(tasks), tasks, out)
    for file in files:
        other = task_files.load(dataclasses.replace(tasks, source=file, limit=None))
        joined = task_files.join(joined, other, overwrite=overwrite)
    task_files.write(out, joined.table)


def measure(config: Config, out: Path, *, name: str | None = None, overwrite: bool = False) -> bool:
    """Rolls `config.model` out on every task of `config.tasks` and writes its pass rates to the
    parquet file `out`.

    Of a mixture, `out` is a folder, in which each set gets a file, whatever its weight. A pass rate
    is the mean success of num_generations samples; those whose reward is lost do not count, and a
    task without any that does, or with too long a prompt, has none. Finished batches are recorded
    in a file .partial next to it: after a kill the same command resumes there, and its files equal
    those of an uninterrupted one. Returns False when SIGTERM or Ctrl-C ended it early, after the
    batch in hand. Raises InputError, before any rollout, for mistakes in config, data or `out`.
    """
    column = column_of(config.model) if name is None else name
    if config.success_reward is not None:  # the others do not matter here, and need not be graded
        config = dataclasses.replace(config, rewards=(config.success_reward,), reward_weights=None)
    mesh = open_mesh(config)
    files = files_of(config, out)
    config = with_template_date(config, partial(date_of_journals, files))
    sources = {file: task_files.load(tasks) for file, tasks in files.items()}
    for file, tasks in files.items():
        on_host0(partial(check, sources[file], tasks, file, column, overwrite))
    with ExitStack() as stack:
        pool = stack.enter_context(open_rewards(config))
        stack.enter_context(computing_on(mesh, config))
        lm = open_model(config, mesh, trained=False)
        stopped = stack.enter_context(stop_signals())
        jobs = []
        for file, tasks in files.items():
            rows = tokenize(sources[file].rows, tasks, config, lm.tokenizer)
            check_columns(config, rows, tasks.source)
            parts = table.batches(rows.lengths, config.batch_size)
            jobs.append(
                Job(config, mesh, lm, pool, tasks, file, sources[file], rows, parts, stopped)
            )
        if not all(measure_set(job, column) for job in jobs):
            return False
    # no earlier: a set without its journal would be refused
    for file in files if jax.process_index() == 0 else ():
        journal_of(file).unlink(missing_ok=True)
    return True


def date_of_journals(files: Iterable[Path]) -> str | None:
    """Reads the date of chat templates from the first of the files' journals that has one."""
    dates = [read_identity(journal_of(file)).get("chat_template_date") for file in files]
    return next((date for date in dates if date is not None), None)


def measure_set(job: Job, column: str) -> bool:
    """Measures one set and writes its file; returns False when a signal ended it early."""
    named = {"column": column} | identity(job)
    with ExitStack() as stack:
        journal = on_host0(
            lambda: stack.enter_context(
                Journal(journal_of(job.out), named, partial(is_result, job))
            )
        )
        visible = jax.process_index() == 0
        display = Display(len(job.table.lengths), visible=visible, unit=f"{job.tasks.title}, task")
        if not roll_out(job, journal, stack.enter_context(display)):
            display.say("stopped by a signal; run the same command to resume")
            return False
        counts = collect(job, journal)
        on_host0(partial(write, job, column, counts))
        if visible:
            show(display, f"{column} in {job.out}", counts)
    return True


def is_result(job: Job, number: int, result: JSON) -> bool:
    """Checks whether `result` can be what `roll_out` records of the batch `number`."""
    if not 0 <= number < len(job.parts):
        return False
    try:
        successes, trials = np.array(result, np.float64)
    except (OverflowError, TypeError, ValueError):
        return False
    fits = (
        (successes >= 0)
        & (successes <= trials)
        & (trials <= job.config.num_generations)
        & (trials % 1 == 0)
    )
    return fits.shape == (len(job.parts[number]),) and bool(fits.all())


def write(job: Job, column: str, counts: Counts) -> None:
    """Adds the pass rates, null where there are no trials, and the trials to the columns of the
    file.
    """
    rates = pyarrow.array(counts.rates, mask=counts.trials == 0)
    columns = pyarrow.table({column: rates, trials_of(column): counts.trials})
    target = open_target(job.source, job.tasks, job.out)
    task_files.write(
        job.out, task_files.join(target, job.source._replace(table=columns), overwrite=True).table
    )


def files_of(config: Config, out: Path) -> dict[Path, TasksConfig]:
    """Assigns a file to each set: `out` itself to a single one, OUT/TITLE.parquet to several.

    The sets are read without their pass rates, which the file may not have yet. Raises InputError
    when `out` or a title does not fit.
    """
    one = len(config.task_sets) == 1
    if one != (out.suffix == ".parquet"):
        remedy = (
            "give the path of a .parquet file"
            if one
            else ("tasks is a mixture, so give a folder, for a file a set")
        )
        raise InputError(f"--out is {out}: {remedy}")
    for tasks in () if one else config.task_sets:
        if tasks.title != Path(tasks.title).name:
            raise InputError(
                f"the set {tasks.title!r} gives its name to a file, which cannot contain /: give "
                "it another `name`"
            )
    sets = [dataclasses.replace(tasks, pass_rate_columns=()) for tasks in config.task_sets]
    return {out if one else out / f"{tasks.title}.parquet": tasks for tasks in sets}


def column_of(model: str) -> str:
    """Names the column of a model's pass rates.

    It is named after the model's folder or hub id, or after the run whose `policy` the model is.
    """
    path = Path(model if Path(model).is_dir() else model.partition("@")[0]).absolute()
    return (path.parent.name if path.name == "policy" else path.name) + SUFFIX


def trials_of(column: str) -> str:
    """Names the column that counts the samples behind a column of pass rates."""
    return column.removesuffix(SUFFIX) + TRIALS


def open_target(source: TaskFile, tasks: TasksConfig, out: Path) -> TaskFile:
    """Reads the tasks that get new columns: those in the file `out` if it exists, else `source`."""
    return (
        task_files.load(dataclasses.replace(tasks, source=str(out), limit=None))
        if out.exists()
        else source
    )


def check(source: TaskFile, tasks: TasksConfig, out: Path, column: str, overwrite: bool) -> None:
    """Raises InputError when `out` holds other tasks, or one of the columns already."""
    target = open_target(source, tasks, out)
    task_files.matched(target, source)
    existing = [name for name in (column, trials_of(column)) if name in target.table.column_names]
    # With a journal next to it, they are of the same job: the process was killed between writing
    # them and removing the journal.
    if existing and not overwrite and not begun(journal_of(out)):
        raise InputError(
            f"{target.source} has a column {existing[0]} already: give another --name, or "
            "--overwrite to replace it"
        )


def identity(job: Job) -> dict[str, JSON]:
    """Describes the job for its journal: everything that the pass rates depend on."""
    settings = {name: getattr(job.config, name) for name in SETTINGS}
    shape = {f"model's {name}": value for name, value in job.lm.config._asdict().items()}
    weights = {
        "digest of the model's parameters": fingerprint(job.lm.params, job.mesh),
        "ends": job.lm.eos_ids,
    }
    return settings | shape | weights | table.identity(job.table)


def roll_out(job: Job, journal: Journal | None, display: Display) -> bool:
    """Rolls out the batches that the journal does not have yet.

    Returns False when a signal comes before the last one.
    """
    missing = unfinished(journal, len(job.parts))
    afresh = len(missing) == len(job.parts)
    max_rows = choose_concurrent_rows(
        job.config,
        job.lm,
        job.mesh,
        table.buckets(job.table.lengths)[-1],
        prompts=job.config.batch_size,
        num_generations=job.config.num_generations,
        held=job.lm.params,
        memory=memory_to_plan(job.mesh),
    )
    generate = compile_rollout(job.lm, job.config, job.mesh, use="prepare", max_rows=max_rows)
    progress = Progress(journal, display, [len(part) for part in job.parts])
    for count, number in enumerate(missing, 1):
        if any_process(job.stopped()):
            return False
        counts, tokens = roll_out_batch(
            job, generate, job.parts[number], first=afresh and count == 1
        )
        if journal is not None:
            journal.add(number, [entry.tolist() for entry in counts])
            progress.add(tokens)
    return True


def roll_out_batch(
    job: Job, generate: CompiledRollout, part: np.ndarray, *, first: bool
) -> tuple[Counts, int]:
    """Rolls out and grades the tasks in `part` [<= B]; also counts the tokens sampled.

    Raises InputError in the `first` batch for mistakes that show in its rewards.
    """
    config = job.config
    tasks = job.table
    ids = np.resize(part, config.batch_size)  # the last batch is filled up with its own tasks
    prompts = prompt_batch(tasks, ids, table.buckets(tasks.lengths), job.mesh)
    rollouts = generate(job.lm.params, np.int32(0), *prompts, tasks.rows[ids])
    state = trainer_state(config, 0)
    rewards = grade_rollout(config, job.lm, rollouts, job.pool, tasks, ids, trainer_state=state)
    rewards = check_rewards(config, rewards, job.pool, num_tasks=len(ids), first=first)
    success = rewards.success.reshape(len(ids), -1)[: len(part)].astype(np.float64)  # [<= B, G]
    valid = rewards.success_valid.reshape(len(ids), -1)[: len(part)]
    counts = Counts(success.sum(axis=1), valid.sum(axis=1))
    return counts, int(jnp.sum(rollouts.lengths))


def collect(job: Job, journal: Journal | None) -> Counts:
    """Collects the counts of all rows of the source from the journal of process 0.

    Rows that were not rolled out have zeros, as have all rows on other processes.
    """
    number = len(job.source.keys)
    counts = Counts(np.zeros(number, np.float64), np.zeros(number, np.int64))
    for batch, entries in journal.done.items() if journal is not None else ():
        for total, entry in zip(counts, entries, strict=True):
            total[job.table.rows[job.parts[batch]]] = entry
    return counts


class Progress:
    """Shows the progress of process 0."""

    def __init__(self, journal: Journal | None, display: Display, sizes: list[int]):
        """Starts with what the journal has of the batches, which have these `sizes`."""
        self.journal = journal
        self.display = display
        self.sizes = sizes
        self.count = 0
        self.tokens = 0
        self.begin = 0.0
        if journal is not None and journal.done:
            display.say(
                f"resuming after {len(journal.done)} of {len(sizes)} batches, recorded in "
                f"{journal.path}"
            )

    def add(self, tokens: int) -> None:
        """Shows the progress after one more batch, for which `tokens` tokens were sampled."""
        assert self.journal is not None
        successes, trials = (
            sum(map(sum, entries)) for entries in zip(*self.journal.done.values(), strict=True)
        )
        done = sum(self.sizes[number] for number in self.journal.done)
        numbers = [f"mean {successes / max(1, trials):.3f}"]
        if self.count == 0:  # its time includes compilation
            self.begin = time.monotonic()
        else:
            self.tokens += tokens
            seconds = time.monotonic() - self.begin
            numbers.append(f"{self.tokens / seconds:,.0f} tokens/s")
        self.display.advance(done, *numbers)
        self.count += 1


def show(display: Display, title: str, counts: Counts) -> None:
    """Shows the mean and a histogram of the pass rates."""
    rates = counts.rates[counts.trials > 0]  # not empty, or the first batch would have been refused
    inner = np.histogram(rates[(rates > 0) & (rates < 1)], EDGES)[0].tolist()
    ranges = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(EDGES)]
    bars = {
        "0": int((rates == 0).sum()),
        **dict(zip(ranges, inner, strict=True)),
        "1": int((rates == 1).sum()),
    }
    between = np.mean((rates > 0) & (rates < 1))
    display.say(
        f"{title}: mean {rates.mean():.3f} over {len(rates)} tasks, {between:.0%} of "
        "them between 0 and 1"
    )
    display.histogram(bars | {"unknown": int((counts.trials == 0).sum())})
