"""Prepared data sets of TensorFlow Datasets, read without TensorFlow and without their builders' code."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxrft.tasks.files import Columns
from jaxrft.types import InputError, Missing


def read(name: str, *, split: str, data_dir: str | None = None) -> Columns:
    """The columns of a split of NAME[/CONFIG][:VERSION], prepared in `data_dir` or in TFDS' default folder.

    Text is str, a sequence a list, nested features are dicts. Raises InputError when the data set, the version or the
    split is not there, when it is damaged, and for what only TensorFlow can read.
    """
    import tensorflow_datasets as tfds

    root = folder_of(data_dir)
    bare = name.partition(":")[0]
    folder = _version_folder(root, name)
    builder = builder_of(folder)
    if split not in builder.info.splits:
        there = ", ".join(builder.info.splits) or "none"
        raise InputError(f"tfds:{name} in {root} has no split {split!r}, only {there}: set tasks.split to one of these")
    if not tfds.core.FileFormat.with_random_access() & builder.info.available_file_formats():
        raise InputError(
            f"tfds:{name} in {root} is in a file format that only TensorFlow reads: prepare it again with "
            f"`tfds build {bare} --file_format=array_record` where TensorFlow is installed"
        )
    features = builder.info.features
    with _reading(folder):
        try:
            rows = [_python(row, features) for row in builder.as_data_source(split=split)]
        except ImportError as error:
            raise InputError(f"tfds:{name} in {root} has features that only TensorFlow reads ({error})") from error
        if any(all(value is None for value in row.values()) for row in rows):  # what array_record makes of a lost one
            raise ValueError("a record is lost")
    return {column: [row[column] for row in rows] for column in sorted(features)}


def builder_of(folder: Path) -> Any:
    """TFDS' read-only builder of the version in a folder; raises InputError for one that is damaged."""
    import tensorflow_datasets as tfds

    with _reading(folder):
        return tfds.builder_from_directory(folder)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raises InputError for what TFDS, protobuf and array_record, whose errors are of every kind, cannot read."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the data set in {folder} is damaged ({reason}): delete it and prepare it again") from error


def folder_of(data_dir: str | None) -> Path:
    """The folder of prepared data sets: `data_dir`, or TFDS' default."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser().absolute()


def _version_folder(root: Path, name: str) -> Path:
    """ROOT/NAME[/CONFIG]/VERSION; by default the only config, in its newest version."""
    asked = re.fullmatch(r"(\w+)(?:/(\w[\w.-]*))?(?::(\d+\.\d+\.\d+))?", name)
    if not asked:
        raise InputError(f"tasks.source is 'tfds:{name}': write tfds:NAME[/CONFIG][:VERSION]")
    dataset, config, version = asked.groups()
    folder = root / dataset / (config or "")
    configs = sorted(path.name for path in folder.glob("*") if _versions(path))
    if not _versions(folder) and len(configs) > 1:
        raise InputError(f"tfds:{name} in {root} has the configs {', '.join(configs)}: write tfds:{name}/CONFIG")
    if not _versions(folder) and configs:
        folder = folder / configs[0]
    versions = _versions(folder)
    if not versions:
        raise Missing(
            f"tfds:{name} is not prepared in {root}: set tasks.data_dir to where it is, or prepare it with `jaxrft "
            f"prepare dataset {dataset} --file FILE`, and where jaxrft knows no such set with `tfds build {dataset} "
            "--file_format=array_record`"
        )
    if version and version not in versions:
        raise InputError(f"tfds:{name} is not prepared in {root}, only {', '.join(versions)}: write one of these")
    return folder / (version or versions[-1])


def _versions(folder: Path) -> list[str]:
    """The versions in a folder, oldest first; one is whole when it says what it holds."""
    whole = [info.parent.name for info in folder.glob("*/dataset_info.json")]
    numbers = [name for name in whole if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return sorted(numbers, key=lambda number: [int(part) for part in number.split(".")])


def _python(value: Any, feature: Any) -> Any:
    """A row, or a part of it, as str, numbers, lists and dicts; bytes that are not UTF-8 stay bytes."""
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        return {name: _python(value[name], feature[name]) for name in sorted(feature)}  # TFDS keeps no order
    if isinstance(feature, features.Sequence) and isinstance(value, dict):  # a sequence of dicts is a dict of sequences
        names, inner = sorted(value), cast(features.FeaturesDict, feature.feature)
        parts = [_python(value[name], features.Sequence(inner[name])) for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)]
    if isinstance(feature, features.Sequence):
        return [_python(entry, feature.feature) for entry in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
