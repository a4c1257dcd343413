"""Finds a model: a folder, or an id on the Hugging Face hub, whose files are in the cache of
huggingface_hub.
"""

import difflib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download

from jaxrft.lm import tensors, weights
from jaxrft.types import InputError, Missing

# owner/name[@revision]; no git name has a ".."
ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(?!.*\.\.)(\w[\w./-]*))?")
# The files that are read of a repository: no code, no pickles, no other formats of weights. Its
# README.md says under which license it is.
FILES = ["config.json", "*.safetensors", tensors.INDEX, *weights.TOKENIZER_FILES, "README.md"]
FOLDERS = ["*/*"]
PATTERNS = {"allow_patterns": FILES, "ignore_patterns": FOLDERS}


def find(model: str) -> Path:
    """Finds the folder of a model, and downloads it from the hub if it is not here.

    `model` is a folder, or the id of a repository on the hub, owner/name[@revision]. What is in the
    cache is used as it is: a branch may be older there than on the hub, and differ between hosts; a
    commit as revision is the same everywhere. All processes of a run may call this at once, because
    huggingface_hub locks each file that it downloads: one process of a host gets it while
    the others wait.
    Raises InputError, with the remedy, when there is no such folder or it cannot be downloaded.
    """
    folder = local(model)
    if folder is not None:
        return folder
    if not ID.fullmatch(model):
        raise InputError(
            f"no folder {model}{_nearest(model)}: give the folder of a Hugging Face checkpoint, "
            "or the id of one on the hub, such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    try:
        folder = snapshot(model, **PATTERNS)
        if _complete(folder):
            return folder
        reason = f"{folder} lacks config.json, safetensors or the tokenizer"
    except errors.LocalEntryNotFoundError:
        reason = "the hub is out of reach"
    except Exception as error:  # every other kind: the network's, the hub's, the disk's
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0]}"
    raise Missing(
        f"{model} is neither a folder{_nearest(model)} nor complete in the cache "
        f"{constants.HF_HUB_CACHE}, and cannot be downloaded ({reason}): check the name, or run "
        f"{download_command(model)} where there is a network, with the same HF_HOME, and "
        "HF_TOKEN if the model is gated"
    )


def local(model: str) -> Path | None:
    """Finds the folder of `model` on this machine; None if it would have to be downloaded."""
    if Path(model).is_dir():
        return _policy_of(Path(model))
    if not ID.fullmatch(model):
        return None
    folder = cached(model, **PATTERNS)
    return folder if folder is not None and _complete(folder) else None


def _policy_of(folder: Path) -> Path:
    """Returns the policy/ of a run's folder, and any other folder as it is.

    Raises InputError for a run without one.
    """
    records = (folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir()
    is_run = records and not any(folder.glob("model*.safetensors"))
    if not is_run or (folder / "policy").is_dir():
        return folder / "policy" if is_run else folder
    raise InputError(
        f"{folder} is the folder of a run that has no policy/ yet: run `jaxrft export {folder}`, "
        "which writes the policy of a checkpoint, and give the folder that it names"
    )


def cached(name: str, **options: Any) -> Path | None:
    """Finds the folder of a repository in the cache without a download, as `snapshot` names it.

    The folder may hold only a part of the repository. None if the cache holds nothing of it.
    """
    try:
        return snapshot(name, local_files_only=True, **options)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def snapshot(name: str, **options: Any) -> Path:
    """Downloads owner/name[@revision] into the cache and returns its folder there.

    `options` are those of `huggingface_hub.snapshot_download`.
    """
    repository, _, revision = name.partition("@")
    return Path(snapshot_download(repository, revision=revision or None, **options))


def download_command(name: str, *, flags: str = "") -> str:
    """Formats the command that downloads owner/name[@revision], in backquotes, for messages."""
    repository, _, revision = name.partition("@")
    return f"`hf download {flags}{repository}{f' --revision {revision}' if revision else ''}`"


def _complete(folder: Path) -> bool:
    """Checks whether a folder has config.json, tokenizer_config.json and all its safetensors.

    The cache may hold only a part of a repository.
    """
    index = folder / tensors.INDEX
    files = {"config.json", "tokenizer_config.json"}
    files |= tensors.files_of(index) if index.is_file() else {tensors.SINGLE}
    return all((folder / file).is_file() for file in files)


def _nearest(model: str) -> str:
    """Suggests a folder of nearly this name: ' (did you mean ...?)', or '' if there is none."""
    parent = Path(model).parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(model).name, names, n=1)
    return f" (did you mean {parent / near[0]}?)" if near else ""
