"""Reads the embeddings of prompts that `jaxrft prepare embeddings` writes, by digests of the
prompts.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.host.files import JSON
from jaxrft.lm import embed
from jaxrft.lm.policy import LanguageModel, fingerprint
from jaxrft.lm.prompts import Prompt
from jaxrft.tasks.table import TaskTable, buckets, prompt_batch
from jaxrft.types import InputError, Missing

POOLING = "mean of the last hidden states"
DTYPES = ("float32", "float16")
# The content of a file: a digest of each prompt, its row, and, as JSON in the metadata, the source
# of the rows.
PROMPTS = "prompts"
ROWS = "embeddings"
SOURCE = "made_by"


class Embeddings(NamedTuple):
    """The content of a file; row i of both arrays is about prompt i."""

    prompts: np.ndarray  # [M, 16] uint8, distinct digests
    rows: np.ndarray  # [M, E] float32 or float16
    source: dict[str, JSON]  # model, pooling, width, dtype, "digest of the model's parameters"


def digests(prompts: Sequence[Prompt]) -> np.ndarray:
    """Computes a digest [N, 16] uint8 of each prompt, text or messages.

    It does not depend on the tokenizer.
    """
    texts = (json.dumps(prompt, sort_keys=True).encode() for prompt in prompts)
    return np.frombuffer(
        b"".join(hashlib.sha256(text).digest()[:16] for text in texts), np.uint8
    ).reshape(-1, 16)


def read(path: str | Path) -> Embeddings:
    """Reads the embeddings in a file; raises InputError for a missing file or other content."""
    if not Path(path).is_file():
        raise Missing(f"no file {path}: make it with {command(path)}")
    try:
        with safe_open(path, framework="numpy") as file:
            source = dict(json.loads((file.metadata() or {})[SOURCE]))
            content = Embeddings(file.get_tensor(PROMPTS), file.get_tensor(ROWS), source)
    except SafetensorError as error:
        raise InputError(
            f"{path} cannot be read as safetensors with the tensors {PROMPTS} and {ROWS} "
            f"({error}): make it with {command(path)}"
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} holds no embeddings of prompts: make it with {command(path)}"
        ) from error
    if (
        content.prompts.shape != (len(content.rows), 16)
        or content.rows.ndim != 2
        or str(content.rows.dtype) not in DTYPES
    ):
        raise InputError(
            f"{path} holds {ROWS} {content.rows.shape} of {content.rows.dtype} for {PROMPTS} "
            f"{content.prompts.shape}, but they must be [M, E] of {' or '.join(DTYPES)} for [M, "
            f"16]: make it with {command(path)}"
        )
    return content._replace(source=content.source | {"width": content.rows.shape[1]})


def of_prompts(
    embeddings: Embeddings, prompts: Sequence[Prompt], *, path: str | Path, name: str
) -> np.ndarray:
    """Looks up the embeddings [N, E] float32 of prompts.

    `path` is their file and `name` the set of the prompts, for errors. Raises InputError for
    prompts without a row, and for rows that are not finite.
    """
    row_of = {key.tobytes(): row for row, key in enumerate(embeddings.prompts)}
    at = np.array([row_of.get(key.tobytes(), -1) for key in digests(prompts)], np.int64)
    if (at < 0).any():
        raise InputError(
            f"{path} has no embedding for {(at < 0).sum()} of the {len(at)} tasks of {name}: "
            "make them with "
            f"{command(path)} --overwrite, with the tasks and the max_prompt_length of this run"
        )
    rows = embeddings.rows[at].astype(np.float32)
    if bad := int((~np.isfinite(rows)).any(axis=1).sum()):
        raise InputError(
            f"{path} has embeddings that are not finite for {bad} of the {len(at)} tasks of "
            f"{name}: make them again with {command(path)} --overwrite"
        )
    return rows


def command(path: str | Path) -> str:
    """Formats the command that makes the file."""
    return f"`jaxrft prepare embeddings CONFIG --out {path}`"


def make_embedder(
    lm: LanguageModel, config: Config, mesh: Mesh, tasks: TaskTable
) -> Callable[[np.ndarray], np.ndarray]:
    """Compiles the function (ids [<= B]) -> embeddings [<= B, D] float32 of those tasks.

    It returns them on every process. The policy embeds as it is loaded, with LoRA by its frozen
    weights: fresh adapters change nothing.
    """
    params = lm.frozen or lm.params
    widths = buckets(tasks.lengths)
    pooled = jax.jit(partial(embed.pooled, lm.policy), out_shardings=meshes.sharding(mesh))

    def of_batch(ids: np.ndarray) -> np.ndarray:
        filled = np.resize(ids, config.batch_size)  # the last batch is filled up with its own tasks
        return np.asarray(pooled(params, *prompt_batch(tasks, filled, widths, mesh)))[: len(ids)]

    return of_batch


def embedding_source(lm: LanguageModel, config: Config, mesh: Mesh) -> dict[str, JSON]:
    """Describes the policy that computes the embeddings; a digest stands for its parameters."""
    digest = fingerprint(lm.frozen or lm.params, mesh, dtype=config.dtype)
    shape = {"model": config.model, "pooling": POOLING, "width": lm.config.hidden_size}
    return shape | {"dtype": config.dtype, "digest of the model's parameters": digest}
