"""Data sets of the Hugging Face hub as parquet, JSON lines or JSON; no script of theirs is run."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from jaxrft.lm.hub import ID, cached, download_command, snapshot
from jaxrft.tasks import files
from jaxrft.types import InputError, Missing

# names of splits in the names of files and folders
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}

Splits = dict[str, list[str]]  # split -> its files, by their paths in the repository


def read(
    name: str, *, split: str, subset: str | None = None, limit: int | None = None
) -> files.Columns:
    """Reads the columns of a split of OWNER/NAME[@REVISION], at most `limit` rows.

    `subset` is needed where there are several. What is in the cache of huggingface_hub is used as
    it is; the data set is downloaded if nothing of it is there. Raises InputError, with the remedy,
    when that fails, or the subset, the split or a part of it is not there.
    """
    command = download_command(name, flags="--repo-type dataset ")
    folder = _snapshot(name, command)
    subsets = _declared_splits(folder, name) or _inferred_splits(folder)
    if not subsets:
        kinds = (
            f"{files.KINDS}: run {command}, or choose another data set if its files are of "
            "other kinds"
        )
        raise Missing(f"hub:{name} is in the Hugging Face cache without {kinds}")
    default = next(iter(subsets)) if len(subsets) == 1 else "default"
    if (subset or default) not in subsets:
        said = f"no subset {subset!r}, only" if subset else "several subsets,"
        raise InputError(
            f"hub:{name} has {said} {', '.join(subsets)}: set tasks.subset to one of them"
        )
    splits = subsets[subset or default]
    if split not in splits:
        said = f"no split {split!r}, only {', '.join(splits)}: set tasks.split to one of them"
        raise InputError(f"hub:{name} in the Hugging Face cache has {said}, or run {command}")
    for file in splits[split]:
        shard = re.fullmatch(r"(.*-)\d+-of-(\d+)\.\w+", file)
        if shard and sum(other.startswith(shard[1]) for other in splits[split]) < int(shard[2]):
            raise Missing(
                f"hub:{name} is incomplete in the Hugging Face cache, next to {file}: run {command}"
            )
    return files.concatenate(list(_first(folder, splits[split], limit)))


def _first(
    folder: Path, names: list[str], limit: int | None
) -> Iterator[tuple[files.Columns, int]]:
    """Yields the columns of one file after the other and the number of their rows, until there are
    `limit` rows.
    """
    remaining = limit
    for name in names:
        columns = files.read(folder / name, remaining)
        count = len(next(iter(columns.values()), ()))
        yield columns, count
        if remaining is not None:
            remaining -= count
            if remaining <= 0:
                return


def _snapshot(name: str, command: str) -> Path:
    """Finds the folder of the data set in the cache, or downloads the data set into it.

    Raises InputError, with the remedy, when neither succeeds.
    """
    from huggingface_hub import errors

    if not ID.fullmatch(name):
        raise InputError(
            f"tasks.source is 'hub:{name}': write hub:OWNER/NAME or hub:OWNER/NAME@REVISION"
        )
    options: Any = {
        "repo_type": "dataset",
        "allow_patterns": ["README.md", *(f"*{ending}" for ending in files.ENDINGS)],
    }
    try:
        return cached(name, **options) or snapshot(name, **options)
    except Exception as error:  # the network's, the hub's, the disk's
        out_of_reach = isinstance(error, errors.LocalEntryNotFoundError)
        reason = (
            "the hub is out of reach"
            if out_of_reach
            else (f"{type(error).__name__}: {error}").partition("\n")[0]
        )
        raise Missing(
            f"hub:{name} is not in the Hugging Face cache and cannot be downloaded ({reason}): "
            f"check the name, or run {command} where there is a network, with the same HF_HOME, "
            "and HF_TOKEN if it is gated"
        ) from error


def _data_files(folder: Path, endings: tuple[str, ...] = files.ENDINGS) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in endings
    )


def _declared_splits(folder: Path, name: str) -> dict[str, Splits]:
    """Collects what `_configured` yields; raises InputError for a header of another form."""
    from yaml import YAMLError

    try:
        return dict(_configured(folder))
    except (YAMLError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"hub:{name}: its README.md does not declare subsets and splits as the hub's do "
            f"({reason}): download its files and name one of them as tasks.source"
        ) from error


def _configured(folder: Path) -> Iterator[tuple[str, Splits]]:
    """Yields the subsets in the header of README.md whose files are there, with their splits.

    The subset that is marked as default is yielded a second time under the name "default".
    """
    from huggingface_hub import metadata_load

    readme = folder / "README.md"
    header = (metadata_load(readme) if readme.is_file() else None) or {}
    paths = _data_files(folder)
    for config in header.get("configs", ()):
        base = PurePosixPath(config.get("data_dir", ""))
        splits = {
            split: [
                file
                for file in paths
                if any(fnmatchcase(file, str(base / pattern)) for pattern in patterns)
            ]
            for split, patterns in _patterns(config.get("data_files", "**"))
        }
        splits = {split: names for split, names in splits.items() if names}
        if splits:
            yield config.get("config_name", "default"), splits
            if config.get("default"):
                yield "default", splits


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Yields (split, patterns) of `data_files`.

    It is one pattern, several, {split: patterns} or a list of {split, path}.
    """
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files):
        pairs = [(entry.get("split", "train"), entry["path"]) for entry in data_files]
    else:
        pairs = [("train", data_files)]
    for split, paths in pairs:
        yield split, paths if isinstance(paths, list) else [paths]


def _inferred_splits(folder: Path) -> dict[str, Splits]:
    """Infers subsets and splits from the names of files.

    A file [SUBSET/]NAME is of the split that a word of its name says, such as test, or else of
    what comes before -00000-of-00001 in it. A file [SUBSET/]SPLIT/NAME is of the split SPLIT if
    that is such a word or NAME is a number. All others are of `train`. Only files of one kind
    count: parquet, else JSON lines, else JSON. A folder `data` names no subset.
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
