"""Data sets of the Hugging Face hub, read from its cache: parquet, JSON lines or JSON; no script of theirs is run."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from jaxrft.tasks import files
from jaxrft.types import InputError

SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}  # told by the names of files and folders

Splits = dict[str, list[str]]  # split -> its files, by their paths in the repository


def read(repository: str, *, split: str, subset: str | None = None) -> files.Columns:
    """The columns of a split of OWNER/NAME as it was last downloaded; `subset` is needed where there are several.

    Raises InputError when the data set is not in the cache, or the subset or the split is not there.
    """
    source, folder = f"hub:{repository}", _snapshot(repository)
    subsets = dict(_configured(folder)) or _found(folder)
    if not subsets:
        raise InputError(
            f"{source} is in the Hugging Face cache without {files.KINDS}: run `hf download --repo-type dataset "
            f"{repository}`, or choose another data set if its files are of other kinds"
        )
    default = next(iter(subsets)) if len(subsets) == 1 else "default"
    if (subset or default) not in subsets:
        said = f"no subset {subset!r}, only" if subset else "several subsets,"
        raise InputError(f"{source} has {said} {', '.join(subsets)}: set tasks.subset to one of them")
    splits = subsets[subset or default]
    if split not in splits:
        said = f"no split {split!r} in the Hugging Face cache, only {', '.join(splits)}"
        raise InputError(f"{source} has {said}: set tasks.split to one of them")
    return files.joined(files.read(folder / file) for file in splits[split])


def _snapshot(repository: str) -> Path:
    """The data set's folder in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except HFValidationError as error:
        raise InputError(f"tasks.source is 'hub:{repository}': write hub:OWNER/NAME") from error
    except LocalEntryNotFoundError as error:
        remedy = f"run `hf download --repo-type dataset {repository}`"
        raise InputError(f"hub:{repository} is not in the Hugging Face cache: {remedy}") from error


def _data_files(folder: Path, endings: tuple[str, ...] = files.ENDINGS) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in endings)


def _configured(folder: Path) -> Iterator[tuple[str, Splits]]:
    """The subsets of the header of README.md whose files are there; the one marked as default is called so too."""
    from huggingface_hub import metadata_load

    readme = folder / "README.md"
    header: Any = (metadata_load(readme) if readme.is_file() else None) or {}
    there = _data_files(folder)
    for config in header.get("configs", ()):
        base = PurePosixPath(config.get("data_dir", ""))
        splits = {
            split: [file for file in there if any(fnmatchcase(file, str(base / pattern)) for pattern in patterns)]
            for split, patterns in _patterns(config.get("data_files", "**"))
        }
        splits = {split: found for split, found in splits.items() if found}
        if splits:
            yield config.get("config_name", "default"), splits
            if config.get("default"):
                yield "default", splits


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """(split, patterns) of `data_files`: one pattern, several, {split: patterns} or a list of {split, path}."""
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files):
        pairs = [(entry.get("split", "train"), entry["path"]) for entry in data_files]
    else:
        pairs = [("train", data_files)]
    for split, paths in pairs:
        yield split, paths if isinstance(paths, list) else [paths]


def _found(folder: Path) -> dict[str, Splits]:
    """Subsets and splits by the names of files: [SUBSET/]SPLIT-00000-of-00001, [SUBSET/]SPLIT/0; else all is `train`.

    Only files of one kind, parquet rather than JSON lines and these rather than JSON; `data` names no subset.
    """
    kinds = [_data_files(folder, (ending,)) for ending in files.ENDINGS]
    subsets: dict[str, Splits] = {}
    for file in next(filter(None, kinds), ()):
        *folders, name = PurePosixPath(file).with_suffix("").parts
        folders = [part for part in folders if part != "data"]
        stem = re.sub(r"-\d+-of-\d+$", "", name)
        words = [word for word in re.split(r"[-._ ]", stem) if word in SPLITS]
        if words or stem != name:
            split = words[0] if words else stem
        elif folders and (folders[-1] in SPLITS or stem.isdigit()):
            split = folders.pop()
        else:
            split = "train"
        subsets.setdefault("/".join(folders) or "default", {}).setdefault(split, []).append(file)
    return subsets
