"""Prepared data sets of TensorFlow Datasets, read without TensorFlow and without their builders'
code.

TFDS imports the module of any class that a data set names, and opens any path that it names. So
the metadata are checked first: they may name only TFDS' own features, and only files in the data
set's folder.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxrft.errors import shown
from jaxrft.host.files import inside, parse_json, read_json
from jaxrft.tasks.files import Columns, check_parquet
from jaxrft.tasks.memory import Budget, size_of
from jaxrft.types import InputError, Missing

FEATURES = {  # TFDS' own, by module
    "audio_feature": ("Audio",),
    "bounding_boxes": ("BBoxFeature",),
    "class_label_feature": ("ClassLabel",),
    "dataset_feature": ("Dataset",),
    "feature": ("Tensor",),  # as it was called in the first versions
    "features_dict": ("FeaturesDict",),
    "image_feature": ("Image",),
    "labeled_image": ("LabeledImage",),
    "scalar": ("Scalar",),
    "sequence_feature": ("Sequence",),
    "tensor_feature": ("Tensor",),
    "text_feature": ("Text",),
    "translation_feature": ("Translation", "TranslationVariableLanguages"),
    "video_feature": ("Video",),
}
CLASSES = {
    f"tensorflow_datasets.core.features.{module}.{name}"
    for module, names in FEATURES.items()
    for name in names
}
# of a feature as JSON, before and since TFDS 4.4
CLASS_KEYS = ("type", "python_class_name", "pythonClassName")
JSON_KEYS = ("json", "content")  # which may hold features as the text of JSON
FILE_KEYS = ("names_file", "labels", "vocab_file")  # arguments of features that name files to read
# in the names of files
SHARD = re.compile(r"\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}")


def read(
    name: str, *, split: str, data_dir: str | None = None, limit: int | None = None
) -> Columns:
    """Returns the columns of a split of NAME[/CONFIG][:VERSION], prepared in `data_dir` or in TFDS'
    default folder.

    Text is str, a sequence a list, nested features are dicts; of more than `limit` rows only the
    first. Raises InputError when the data set, the version or the split is not there, when it is
    damaged or names what is not its own, for rows that take more than half of the memory that is
    available, and for what only TensorFlow can read.
    """
    import tensorflow_datasets as tfds

    root = folder_of(data_dir)
    bare = name.partition(":")[0]
    folder = _version_folder(root, name)
    builder = builder_of(folder)
    if split not in builder.info.splits:
        names = ", ".join(builder.info.splits) or "none"
        raise InputError(
            f"tfds:{name} in {root} has no split {split!r}, only {names}: set "
            "tasks.split to one of these"
        )
    if not tfds.core.FileFormat.with_random_access() & builder.info.available_file_formats():
        raise InputError(
            f"tfds:{name} in {root} is in a file format that only TensorFlow reads: prepare it "
            "again with "
            f"`tfds build {bare} --file_format=array_record` where TensorFlow is installed"
        )
    features = builder.info.features
    with _reading(folder):
        try:
            rows = list(_rows(builder, folder, split, limit))
        except ImportError as error:
            raise InputError(
                f"tfds:{name} in {root} has features that only TensorFlow reads ({error})"
            ) from error
        # what array_record makes of a lost one
        if any(all(value is None for value in row.values()) for row in rows):
            raise ValueError("a record is lost")
    return {column: [row[column] for row in rows] for column in sorted(features)}


def builder_of(folder: Path) -> Any:
    """Opens TFDS' read-only builder of the version in a folder.

    Raises InputError for a damaged one.
    """
    import tensorflow_datasets as tfds

    with _reading(folder):
        _check_metadata(folder)
        return tfds.builder_from_directory(folder)


def _check_metadata(folder: Path) -> None:
    """Raises InputError for metadata that name a class which is not a feature of TFDS, or a file
    somewhere else.
    """
    info = read_json(folder / "dataset_info.json", dict)
    file = folder / "features.json"
    described = [info.get("features"), read_json(file, dict) if file.exists() else None]
    for name in _classes(described, folder):
        if name not in CLASSES:
            raise InputError(
                f"the data set in {folder} has features of the class {shown(name)}, which is not "
                "TFDS' own and would be imported: prepare it again with features of tfds.features"
            )
    splits = info.get("splits", [])
    names = [info.get("name"), *(entry.get(key) for entry in splits for key in FILE_NAMES)]
    for name in filter(None, names):
        _inside(folder, SHARD.sub("x", name))


# of a split, of which the names of its files are made
FILE_NAMES = ("name", "filepathTemplate", "filepath_template")


def _classes(value: object, folder: Path) -> Iterator[str]:
    """Yields the names of all classes in features as JSON; raises InputError where they name a file
    elsewhere.
    """
    if isinstance(value, list):
        for entry in value:
            yield from _classes(entry, folder)
    if not isinstance(value, dict):
        return
    for key, entry in value.items():
        _inside(folder, key)  # a feature's name becomes that of a file with its labels
        if key in CLASS_KEYS and isinstance(entry, str):
            yield entry
        elif key in FILE_KEYS and isinstance(entry, str):
            _inside(folder, entry)
        elif key in JSON_KEYS and isinstance(entry, str):
            yield from _classes(parse_json(entry, dict), folder)
        else:
            yield from _classes(entry, folder)


def _inside(folder: Path, name: object) -> None:
    """Raises InputError unless `name` is that of a file in the folder, without further places to
    fill in.
    """
    fits = name if isinstance(name, str) and not {"{", "}"} & set(name) else ""
    try:
        inside(folder, fits)
    except ValueError as error:
        raise InputError(
            f"the data set in {folder} names a file {shown(name)}, which is not in its folder: "
            "prepare it again"
        ) from error


def _rows(builder: Any, folder: Path, split: str, limit: int | None) -> Iterator[dict[str, object]]:
    """Yields the rows of a split as Python's values."""
    source = f"the split {split} of {folder}"
    for file in builder.info.splits[split].filepaths:
        if file.suffix == ".parquet" or ".parquet-" in file.name:
            check_parquet(Path(file))  # which TFDS reads as a whole
    budget = Budget(source)
    for row in islice(builder.as_data_source(split=split), limit):
        values = _python(row, builder.info.features)
        budget.take(size_of(values))
        yield values


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raises InputError for what TFDS, protobuf and array_record, whose errors are of every kind,
    cannot read.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the data set in {folder} is damaged ({reason}): delete it and prepare it again"
        ) from error


def folder_of(data_dir: str | None) -> Path:
    """Resolves the folder of prepared data sets: `data_dir`, or TFDS' default."""
    return (
        Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
        .expanduser()
        .absolute()
    )


def _version_folder(root: Path, name: str) -> Path:
    """Finds the folder ROOT/NAME[/CONFIG]/VERSION.

    By default it is that of the only config, in its newest version.
    """
    match = re.fullmatch(r"(\w+)(?:/(\w[\w.-]*))?(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise InputError(f"tasks.source is 'tfds:{name}': write tfds:NAME[/CONFIG][:VERSION]")
    dataset, config, version = match.groups()
    folder = root / dataset / (config or "")
    configs = sorted(path.name for path in folder.glob("*") if _versions(path))
    if not _versions(folder) and len(configs) > 1:
        raise InputError(
            f"tfds:{name} in {root} has the configs {', '.join(configs)}: write tfds:{name}/CONFIG"
        )
    if not _versions(folder) and configs:
        folder = folder / configs[0]
    versions = _versions(folder)
    if not versions:
        raise Missing(
            f"tfds:{name} is not prepared in {root}: set tasks.data_dir to where it is, or "
            f"prepare it with `jaxrft prepare dataset {dataset} --file FILE`, and where jaxrft "
            f"knows no such set with `tfds build {dataset} --file_format=array_record`"
        )
    if version and version not in versions:
        raise InputError(
            f"tfds:{name} is not prepared in {root}, only {', '.join(versions)}: write one of these"
        )
    return folder / (version or versions[-1])


def _versions(folder: Path) -> list[str]:
    """Lists the complete versions in a folder, oldest first.

    A version is complete when it has the file dataset_info.json.
    """
    complete = [info.parent.name for info in folder.glob("*/dataset_info.json")]
    numbers = [name for name in complete if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return sorted(numbers, key=lambda number: [int(part) for part in number.split(".")])


def _python(value: Any, feature: object) -> Any:
    """Converts a row, or a part of it, to str, numbers, lists and dicts.

    Bytes that are not UTF-8 stay bytes.
    """
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        # TFDS keeps no order
        return {name: _python(value[name], feature[name]) for name in sorted(feature)}
    # a sequence of dicts is a dict of sequences
    if isinstance(feature, features.Sequence) and isinstance(value, dict):
        names = sorted(value)
        inner = cast(features.FeaturesDict, feature.feature)
        parts = [_python(value[name], features.Sequence(inner[name])) for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)]
    if isinstance(feature, features.Sequence):
        return [_python(entry, feature.feature) for entry in value]
    return _plain(value)


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
