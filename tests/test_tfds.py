import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import writers

from jaxrft import tasks
from jaxrft.config import TasksConfig
from jaxrft.tasks.tfds import read
from jaxrft.types import InputError

ROWS = [{"prompt": f"1 + {n} =", "answer": str(1 + n)} for n in (20, 3, 100, 4)]


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_rows_come_in_order_as_python_values(tmp_path, file_format):
    features = tfds.features
    rows = [
        {
            "text": "π",
            "bytes": b"\xff",
            "number": np.float32(0.5),
            "count": 3,
            "truth": True,
            "label": "odd",
            "words": ["a", "b"][:n],
            "matrix": np.eye(2, dtype=np.float32),
            "nested": {"inner": {"text": "x"}, "numbers": [1, 2]},
            "messages": [{"role": "user", "content": "1", "meta": {"id": 7}}] * n,
            "dataset": [{"text": "y"}] * n,
        }
        for n in (2, 0)
    ]

    class Kinds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            message = {"role": features.Text(), "content": features.Text(), "meta": {"id": np.int64}}
            kinds = {
                "text": features.Text(),
                "bytes": features.Tensor(shape=(), dtype=np.object_),
                "number": np.float32,
                "count": np.int64,
                "truth": np.bool_,
                "label": features.ClassLabel(names=["even", "odd"]),
                "words": features.Sequence(features.Text()),
                "matrix": features.Tensor(shape=(2, 2), dtype=np.float32),
                "nested": {"inner": {"text": features.Text()}, "numbers": features.Sequence(np.int64)},
                "messages": features.Sequence(message),
                "dataset": features.Dataset({"text": features.Text()}),
            }
            features_ = features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=features_, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    Kinds(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    columns = read("kinds", split="train", data_dir=str(tmp_path))
    expected = [{**row, "number": 0.5, "label": 1, "matrix": [[1.0, 0.0], [0.0, 1.0]]} for row in rows]
    assert [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] == expected
    assert type(columns["truth"][0]) is bool and type(columns["count"][0]) is int


def test_the_newest_version_and_the_only_config_are_the_default(tmp_path):
    for number, version in enumerate(("9.0.0", "10.0.0", "2.0.0")):
        writers.write_tfds(tmp_path, "sums", ROWS[number:], version=version)
    writers.write_tfds(tmp_path, "products", ROWS[:1], config="small")
    count = {
        name: len(read(name, split="train", data_dir=str(tmp_path))["prompt"])
        for name in ("sums", "sums:9.0.0", "sums:2.0.0", "products", "products/small", "products/small:1.0.0")
    }
    assert list(count.values()) == [3, 4, 2, 1, 1, 1]


def test_tfds_own_folder_is_the_default(tmp_path, monkeypatch):
    writers.write_tfds(tmp_path, "sums", ROWS)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert tasks.load(TasksConfig(source="tfds:sums", limit=2)).prompts == ["1 + 20 =", "1 + 3 ="]


def test_tensorflow_is_not_imported_and_nothing_is_printed(tmp_path):
    writers.write_tfds(tmp_path, "sums", ROWS)
    program = (
        "import sys; from jaxrft.tasks.tfds import read; import jaxrft.tasks; "
        f"assert len(read('sums', split='train', data_dir={str(tmp_path)!r})['answer']) == 4; "
        "assert not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("tfds:", "train", "tasks.source is 'tfds:': write tfds:NAME"),
        ("tfds:../sums", "train", r"tasks.source is 'tfds:../sums': write tfds:NAME\[/CONFIG\]\[:VERSION\]"),
        ("tfds:sums/..", "train", "tasks.source is 'tfds:sums/..': write tfds:NAME"),
        (
            "tfds:su",
            "train",
            "tfds:su is not prepared in .*: set tasks.data_dir .* `jaxrft prepare dataset su --file",
        ),
        ("tfds:su", "train", "`tfds build su --file_format=array_record`"),
        ("tfds:sums:3.0.0", "train", "tfds:sums:3.0.0 is not prepared in .*, only 1.0.0: write one of these"),
        ("tfds:sums", "test", "tfds:sums in .* has no split 'test', only train: set tasks.split to one of these"),
        ("tfds:products", "train", "has the configs large, small: write tfds:products/CONFIG"),
        (
            "tfds:records",
            "train",
            "only TensorFlow reads: prepare it again with `tfds build records --file_format",
        ),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(tmp_path, source, split, message):
    writers.write_tfds(tmp_path, "sums", ROWS)
    (tmp_path / "sums" / "incomplete.ABC_3.0.0").mkdir()
    for config in ("small", "large"):
        writers.write_tfds(tmp_path, "products", ROWS, config=config)
    writers.write_tfds(tmp_path, "records", ROWS)
    info = tmp_path / "records" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=message) as raised:
        tasks.load(TasksConfig(source=source, split=split, data_dir=str(tmp_path)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "sums-train.array_record-00000-of-00001"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"{}", None])
def test_a_damaged_data_set_is_told(tmp_path, file, damage):
    writers.write_tfds(tmp_path, "sums", ROWS)
    path = tmp_path / "sums" / "1.0.0" / file
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(InputError, match="sums.*prepare") as raised:
        tasks.load(TasksConfig(source="tfds:sums", data_dir=str(tmp_path)))
    assert "\n" not in str(raised.value)
