"""Writers of small data sets in the layouts that jaxrft.tasks reads."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_file(path, rows):
    """Rows as .jsonl, .json or .parquet, by the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_hub(cache, repository, files, readme=None, *, revision="main"):
    """A data set in the layout of the Hugging Face cache: files {path: rows}."""
    folder = cache / f"datasets--{repository.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    snapshot = folder / "snapshots" / commit
    for part in (snapshot, folder / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    for path, rows in files.items():
        write_file(snapshot / path, rows)
    if readme:
        (snapshot / "README.md").write_text(readme)
    (folder / "refs" / revision).write_text(commit)


def write_tfds(
    data_dir, name, rows, *, split="train", version="1.0.0", config=None, file_format="array_record"
):
    """A prepared TFDS data set with the features that the rows show."""
    import tensorflow_datasets as tfds

    def feature(values):
        values = [value for value in values if value is not None]
        if isinstance(values[0], dict):
            return {key: feature([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], list):
            return tfds.features.Sequence(feature([entry for value in values for entry in value]))
        kinds = {str: tfds.features.Text(), bool: np.bool_, int: np.int64, float: np.float64}
        return kinds[type(values[0])]

    def example(row):
        return {key: float("nan") if value is None else value for key, value in row.items()}

    class Writer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            features = tfds.features.FeaturesDict(
                {key: feature([row[key] for row in rows]) for key in rows[0]}
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(map(example, rows))

    Writer.name = name
    tfds.disable_progress_bar()
    Writer(data_dir=data_dir, file_format=file_format).download_and_prepare()
