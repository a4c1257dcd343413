"""Computes a policy's embeddings of the prompts of all tasks, for `tasks.embeddings`."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from safetensors.numpy import save

from jaxrft.config import Config
from jaxrft.fields import Checked, FilePath
from jaxrft.host import files
from jaxrft.host.files import JSON, short_digest
from jaxrft.host.multihost import any_process, on_host0
from jaxrft.host.stopping import stop_signals
from jaxrft.lm.policy import LanguageModel, open_model
from jaxrft.prepare.journal import (
    Journal,
    begun,
    journal_of,
    open_private,
    read_identity,
    replacing,
    unfinished,
    writing,
)
from jaxrft.report.console import Display
from jaxrft.tasks import embeddings, mixture, sources, table
from jaxrft.tasks.embeddings import embedding_source, make_embedder
from jaxrft.tasks.open_sets import tokenize
from jaxrft.tasks.table import TaskTable
from jaxrft.train.devices import computing_on, open_mesh
from jaxrft.train.resume import with_template_date
from jaxrft.types import InputError

# Fields of the config that the file depends on, apart from the model and the tasks.
SETTINGS = ("max_prompt_length", "chat_template_date", "batch_size")


@dataclass(frozen=True)
class Options(Checked):
    """The command line of `jaxrft prepare embeddings`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: FilePath
    """Safetensors file for the embeddings of the distinct prompts of all sets: `tasks.embeddings`
    of each.
    """
    file_dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers in the file, independent of the `dtype` of the arithmetic; float16 halves
    its size, at a relative error of 0.0005. On the devices they are float32."""
    overwrite: bool = False
    """Replace an existing file."""


class Job(NamedTuple):
    """Distinct prompts, and everything needed to embed them."""

    config: Config
    mesh: Mesh
    lm: LanguageModel
    source: dict[str, JSON]  # `Embeddings.source`
    out: Path
    dtype: np.dtype
    table: TaskTable  # of the prompts, longest first, so that batches follow each other in it
    digests: np.ndarray  # [M, 16] uint8, of the prompts
    stopped: Callable[[], bool]  # whether a signal asks to stop


def run(options: Options) -> bool:
    """Embeds the prompts of all sets of `config.tasks` with `config.model`; writes them to `out`.

    Batches are written to a file .partial.rows next to `out`, and recorded in .partial, as soon as
    they are done. After a kill the same command resumes there; the file equals that of an
    uninterrupted one. Returns True when all is done, False when SIGTERM or Ctrl-C ended it early,
    after the batch in hand. Raises InputError for mistakes in config, data or `out`.
    """
    config = replace(options.config, max_completion_length=1)  # nothing is completed
    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise InputError(f"--out is {out}: give the path of a .safetensors file")
    mesh = open_mesh(config)
    config = with_template_date(
        config, lambda: read_identity(journal_of(out)).get("chat_template_date")
    )
    on_host0(partial(check, out, options.overwrite))
    with ExitStack() as stack:
        stack.enter_context(computing_on(mesh, config))
        lm = open_model(config, mesh, trained=False)
        tasks = distinct(config, lm)
        stopped = stack.enter_context(stop_signals())
        source = embedding_source(lm, config, mesh)
        digests = embeddings.digests(tasks.prompts)
        job = Job(
            config, mesh, lm, source, out, np.dtype(options.file_dtype), tasks, digests, stopped
        )
        journal = on_host0(lambda: stack.enter_context(Journal(journal_of(out), identity(job))))
        visible = jax.process_index() == 0
        display = stack.enter_context(Display(len(digests), visible=visible, unit="prompt"))
        if not embed(job, journal, display):
            display.say("stopped by a signal; run the same command to resume")
            return False
        on_host0(partial(write, job))
        display.say(
            f"embeddings of {len(digests):,} prompts, width {lm.config.hidden_size:,}, in {out}"
        )
    for path in (rows_of(out), journal_of(out)) if visible else ():
        path.unlink(missing_ok=True)
    return True


def check(out: Path, overwrite: bool) -> None:
    """Raises InputError when `out` exists and is not to be replaced."""
    # With a journal next to it, it is of the same job: the process was killed between writing it
    # and removing the journal.
    if out.exists() and not overwrite and not begun(journal_of(out)):
        raise InputError(f"{out} exists already: give another --out, or --overwrite to replace it")


def rows_of(out: Path) -> Path:
    """Names the file that holds the rows [M, E] until `out` is complete: OUT.partial.rows."""
    return out.with_name(f"{out.name}.partial.rows")


def distinct(config: Config, lm: LanguageModel) -> TaskTable:
    """Reads and tokenizes the distinct prompts of all sets, longest first.

    Drops prompts that are empty or too long.
    """
    tables = {}
    for tasks in config.task_sets:
        rows = sources.load(replace(tasks, pass_rate_columns=()))._replace(
            reference_pass_rates=None
        )
        tables[tasks.title] = tokenize(rows, tasks, config, lm.tokenizer)
    mixed = mixture.mix(tables)
    firsts = np.sort(np.unique(embeddings.digests(mixed.prompts), axis=0, return_index=True)[1])
    return table.take(mixed, firsts[np.argsort(-mixed.lengths[firsts], kind="stable")])


def identity(job: Job) -> dict[str, JSON]:
    """Describes the job for its journal: everything that the content of the file depends on."""
    settings = {name: getattr(job.config, name) for name in SETTINGS}
    prompts = {
        "digest of the prompts": short_digest(job.digests.tobytes()),
        "dtype of the file": str(job.dtype),
    }
    return job.source | settings | prompts | table.identity(job.table)


def embed(job: Job, journal: Journal | None, display: Display) -> bool:
    """Embeds and writes the missing batches; returns False when a signal comes before the last."""
    batches = table.batches(job.table.lengths, job.config.batch_size)
    if journal is not None:
        drop_lost_batches(job, journal)
    missing = unfinished(journal, len(batches))
    if len(missing) < len(batches):
        display.say(
            f"resuming after {len(batches) - len(missing)} of {len(batches)} batches, in "
            f"{rows_of(job.out)}"
        )
    embedder = make_embedder(job.lm, job.config, job.mesh, job.table)
    for number in missing:
        if any_process(job.stopped()):
            return False
        rows = narrowed(embedder(batches[number]), job.dtype)
        if journal is not None:
            store(job, number, rows)
            journal.add(number, short_digest(rows.tobytes()))
            done = int(batches[number][-1]) + 1
            display.advance(done)
    return True


def narrowed(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts rows to the dtype of the file; raises InputError when any is not finite in it."""
    with np.errstate(over="ignore"):
        narrow = rows.astype(dtype)
    if not np.isfinite(rows).all():
        raise InputError(
            "the policy's hidden states are not finite: its weights are broken, "
            "give another --model"
        )
    if not np.isfinite(narrow).all():
        raise InputError(
            f"embeddings reach {np.abs(rows).max():g}, too large for {dtype}: "
            "give --file-dtype float32"
        )
    return narrow


def byte_offset(job: Job, number: int) -> int:
    """Computes the byte at which the rows of a batch begin in the file of rows."""
    return number * job.config.batch_size * job.lm.config.hidden_size * job.dtype.itemsize


def store(job: Job, number: int, rows: np.ndarray) -> None:
    """Writes the rows of a batch; when it returns, they outlast a kill or a loss of power."""
    path = rows_of(job.out)
    with writing(path), open_private(path, "r+b") as file:
        file.seek(byte_offset(job, number))
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


def drop_lost_batches(job: Job, journal: Journal) -> None:
    """Removes from `journal.done` the batches whose rows are not in the file of rows.

    A batch stays when the digest of its rows is the recorded one.
    """
    path = rows_of(job.out)
    content = b""
    if journal.done and path.exists():
        with writing(path):
            content = files.read_regular(path, flags=os.O_RDONLY | os.O_NOFOLLOW)
    for number, digest in list(journal.done.items()):
        if short_digest(content[byte_offset(job, number) : byte_offset(job, number + 1)]) != digest:
            del journal.done[number]


def write(job: Job) -> None:
    """Replaces the file `out`, atomically; equal rows make equal files."""
    with replacing(job.out) as file:
        shape = len(job.digests), job.lm.config.hidden_size
        rows = np.fromfile(rows_of(job.out), job.dtype, math.prod(shape)).reshape(shape)
        # One entry: safetensors would write several in another order each time.
        metadata = {embeddings.SOURCE: json.dumps(job.source)}
        file.write(save({embeddings.PROMPTS: job.digests, embeddings.ROWS: rows}, metadata))
