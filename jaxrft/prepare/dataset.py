"""The command: jaxrft prepare dataset [NAME --file FILE ...]: published files become a TFDS data
set.

It is written without TensorFlow, as array_record, and read by any TFDS too.
"""

import contextlib
import difflib
import io
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tensorflow_datasets as tfds
import tyro

from jaxrft import flags
from jaxrft.fields import Checked, FilePath
from jaxrft.host.disk import writing
from jaxrft.host.files import JSON
from jaxrft.prepare.recipes import RECIPES, Recipe, Task, as_text
from jaxrft.tasks import files
from jaxrft.tasks.tfds import builder_of, folder_of
from jaxrft.types import InputError

logger = logging.getLogger(__name__)

VERSION = "1.0.0"  # raise it when a recipe yields other tasks


@dataclass(frozen=True)
class Options(Checked):
    """Makes a TFDS data set of the files of a published one; without NAME, lists those that it
    knows.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the data set."""
    file: tuple[FilePath, ...] = ()
    """Downloaded files of the data set, one or several."""
    split: str = "train"
    """Name of the split that the files become; splits of other names stay as they are."""
    data_dir: FilePath | None = None
    """Folder for prepared data sets; TFDS' default otherwise."""


def main(arguments: list[str], prog: str) -> int:
    """Parses, prepares and prints; returns the exit code. Raises InputError for a mistake of the
    user's.
    """
    options = flags.parse(Options, arguments, prog)
    if options.name is None:
        sets = [
            f"{name}\n  {recipe.about}\n  files: {recipe.files}" for name, recipe in RECIPES.items()
        ]
        print(
            "\n".join(
                [
                    f"usage: {prog} NAME --file FILE [FILE ...] [--split SPLIT] [--data-dir DIR]",
                    "",
                    *sets,
                ]
            )
        )
        return 0
    folder = prepare(options.name, options.file, split=options.split, data_dir=options.data_dir)
    source = f"--tasks.source tfds:{options.name}"
    if options.split != "train":
        source += f" --tasks.split {options.split}"
    if options.data_dir is not None:
        source += f" --tasks.data-dir {options.data_dir}"
    print(f"{options.name} is in {folder}: train on it with {source}")
    return 0


def prepare(
    name: str, paths: Iterable[str], *, split: str = "train", data_dir: str | None = None
) -> Path:
    """Adds a split, made of the rows of the files one after the other, to the data set `name`;
    returns its folder.

    A kill leaves either all of the split or none of it. Raises InputError for a data
    set without a recipe, a file that does not follow it, and a split that is there already.
    """
    recipe = _recipe(name)
    sources = [Path(path) for path in paths]
    if not sources:
        raise InputError(f"no files of {name} given: add --file, {recipe.files}")
    if not re.fullmatch(r"\w+", split) or split == "all":  # of which TFDS makes something else
        raise InputError(
            f"--split is {split!r}: a split is called by a word, such as train or test, but not all"
        )
    folder = folder_of(data_dir) / name / VERSION
    existing = builder_of(folder) if (folder / "dataset_info.json").is_file() else None
    if existing is not None and split in existing.info.splits:
        raise InputError(
            f"{folder} has a split {split} already: choose another --split or "
            "--data-dir, or delete it"
        )
    with writing(folder, "choose another --data-dir"), contextlib.ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder.parents[1])
        )
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # TFDS tells of a download
        tfds.disable_progress_bar()
        builder = Builder(name, recipe, tasks(recipe, sources), split, data_dir=scratch)
        builder.download_and_prepare()
        _move(Path(builder.data_path), folder, builder, existing)
    return folder


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(RECIPES)}"
        raise InputError(f"no data set {name!r} can be prepared: {hint}")
    return RECIPES[name]


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One split of a recipe's data set, in the order of its files."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self, name: str, recipe: Recipe, examples: Iterable[Task], split: str, *, data_dir: str
    ):
        """Sets up the builder of DATA_DIR/NAME/VERSION, whose split `split` holds `examples`."""
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]  # TFDS takes that of the class otherwise
        self.recipe = recipe
        self.examples = examples
        self.split = split
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        kinds = {str: tfds.features.Text(), float: np.float32}
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {
            "prompt": tfds.features.Sequence(message),
            "answer": tfds.features.Text(),
            **{name: kinds[kind] for name, kind in self.recipe.columns.items()},
        }
        description = f"{self.recipe.about}. Files: {self.recipe.files}."
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(
            builder=self, description=description, features=features, disable_shuffling=True
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, Task]]]:
        return {self.split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Task]]:
        yield from enumerate(self.examples)


def tasks(recipe: Recipe, paths: Iterable[Path]) -> Iterator[Task]:
    """Yields the tasks in the files, with messages as prompts.

    Leaves out tasks without an answer, and logs their number. Raises InputError for the first row
    that does not follow the recipe, and when no task has an answer.
    """
    kept = 0
    left_out = 0
    for path in paths:
        for number, row in enumerate(files.entries(path, recipe.reads), 1):
            task = _task(recipe, row, f"{path} row {number}")
            if task["answer"]:
                kept += 1
                yield task
            else:
                left_out += 1
    if not kept:
        raise InputError(f"{', '.join(map(str, paths))}: no row has an answer; give {recipe.files}")
    logger.info(
        "%d tasks%s", kept, f", {left_out} more left out: they have no answer" if left_out else ""
    )


def _task(recipe: Recipe, row: object, where: str) -> Task:
    try:
        task = recipe.task(row)
        prompt = task["prompt"]
        if not prompt:
            raise ValueError("the prompt is empty")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": message["role"], "content": message["content"]} for message in messages]
        rest = {
            name: _value(task[name], kind)
            for name, kind in {"answer": str, **recipe.columns}.items()
        }
    except KeyError as error:
        raise InputError(f"{where} has no {error.args[0]}: give {recipe.files}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{where} is {files.shown(row)}, no such task ({error}): give {recipe.files}"
        ) from error
    return {"prompt": prompt, **rest}


def _value(value: JSON, kind: type) -> str | float:
    return as_text(value) if kind is str else math.nan if value is None else float(value)


def _move(
    new: Path, folder: Path, builder: Builder, existing: tfds.core.DatasetBuilder | None
) -> None:
    """Moves a finished split into its folder; the file that lists the splits is replaced last."""
    if existing is None:
        new.rename(folder)
        return
    info = builder.info
    info.set_splits(tfds.core.SplitDict([*existing.info.splits.values(), *info.splits.values()]))
    info.write_to_directory(new)
    for file in new.glob(f"*-{builder.split}.*"):
        os.replace(file, folder / file.name)
    os.replace(new / "dataset_info.json", folder / "dataset_info.json")
