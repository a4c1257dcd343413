"""Saves all completions of some steps, a parquet file a step, in the run's folder."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrft.host.files import replacing
from jaxrft.lm.prompts import Prompt

logger = logging.getLogger(__name__)

FOLDER = "completions"
_NAME = re.compile(r"step-(\d{8})\.(\d+)\.parquet")


class Rows(NamedTuple):
    """Completions that were graded; n rows."""

    prompts: Sequence[Prompt]  # [n]
    completions: Sequence[str]  # [n]
    task_ids: Sequence[int]  # [n], numbers in the table of tasks
    domains: Sequence[str]  # [n]
    rewards: np.ndarray  # [n, F] float32
    valid: np.ndarray  # [n, F] bool, whether the reward applies and no grader failed
    success: np.ndarray  # [n] float32, NaN where there is none
    advantages: np.ndarray  # [n] float32


def text_of(prompt: Prompt) -> str:
    """Returns a prompt as text; of messages, a paragraph each that begins with the role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def table(step: int, rows: Rows, names: Sequence[str]) -> pa.Table:
    """Makes the table of the rows of a step; a reward that is not valid is null.

    The columns are step, task_id, domain, prompt, completion, success, advantage and a
    rewards/NAME for each of the `names` [F], as in metrics.jsonl.
    """
    count = len(rows.completions)
    columns = {
        "step": pa.array(np.full(count, step, np.int32)),
        "task_id": pa.array(np.asarray(rows.task_ids, np.int32)),
        "domain": pa.array(list(rows.domains), pa.string()),
        "prompt": pa.array([_unicode(text_of(prompt)) for prompt in rows.prompts], pa.string()),
        "completion": pa.array([_unicode(text) for text in rows.completions], pa.string()),
        "success": pa.array(rows.success, pa.float32(), mask=np.isnan(rows.success)),
        "advantage": pa.array(rows.advantages, pa.float32()),
    }
    for index, name in enumerate(names):
        mask = ~rows.valid[:, index]
        columns[f"rewards/{name}"] = pa.array(rows.rewards[:, index], pa.float32(), mask=mask)
    return pa.table(columns)


def _unicode(text: str) -> str:
    """Replaces halves of surrogate pairs, which parquet cannot hold."""
    return text.encode(errors="replace").decode()


class CompletionsLog:
    """Writes the completions of steps, each process those that it graded; a file a process.

    A step that is repeated replaces its file. A file that cannot be written, as on a full disk, is
    left out; the first is a warning.
    """

    def __init__(self, folder: Path) -> None:
        """Writes nothing yet; `folder` is the run's."""
        self.folder = folder / FOLDER
        self.failed = False

    def remove_after(self, step: int) -> None:
        """Removes the files of later steps than `step`, which a resumed run repeats."""
        for path in saved(self.folder.parent):
            if step_of(path) > step:
                path.unlink(missing_ok=True)

    def write(
        self, step: int, rounds: Sequence[Rows], names: Sequence[str], *, process: int = 0
    ) -> None:
        """Writes the file of a step that has one or more rounds of rollouts."""
        content = pa.concat_tables([table(step, rows, names) for rows in rounds])
        try:
            self.folder.mkdir(exist_ok=True)
            with replacing(
                self.folder / f"step-{step:08}.{process}.parquet", durable=False
            ) as file:
                pq.write_table(content, file, compression="zstd")
        except OSError as error:
            if not self.failed:
                logger.warning(
                    "the completions of step %d are not saved, and the run goes on: cannot write "
                    "to %s (%s)",
                    step,
                    self.folder,
                    error.strerror or error,
                )
            self.failed = True


def saved(run: Path) -> list[Path]:
    """Lists the files of completions of a run, in the order of their steps."""
    folder = run / FOLDER
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [folder / name for name in names if _NAME.fullmatch(name)]


def step_of(path: Path) -> int:
    """Returns the step of a file that `saved` lists."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
