import json
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

NAMES = {"names_file": "/etc/passwd"}
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
            message = {
                "role": features.Text(),
                "content": features.Text(),
                "meta": {"id": np.int64},
            }
            kinds = {
                "text": features.Text(),
                "bytes": features.Tensor(shape=(), dtype=np.object_),
                "number": np.float32,
                "count": np.int64,
                "truth": np.bool_,
                "label": features.ClassLabel(names=["even", "odd"]),
                "words": features.Sequence(features.Text()),
                "matrix": features.Tensor(shape=(2, 2), dtype=np.float32),
                "nested": {
                    "inner": {"text": features.Text()},
                    "numbers": features.Sequence(np.int64),
                },
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
    expected = [
        {**row, "number": 0.5, "label": 1, "matrix": [[1.0, 0.0], [0.0, 1.0]]} for row in rows
    ]
    assert [
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    ] == expected
    assert type(columns["truth"][0]) is bool and type(columns["count"][0]) is int


def test_the_newest_version_and_the_only_config_are_the_default(tmp_path):
    for number, version in enumerate(("9.0.0", "10.0.0", "2.0.0")):
        writers.write_tfds(tmp_path, "sums", ROWS[number:], version=version)
    writers.write_tfds(tmp_path, "products", ROWS[:1], config="small")
    count = {
        name: len(read(name, split="train", data_dir=str(tmp_path))["prompt"])
        for name in (
            "sums",
            "sums:9.0.0",
            "sums:2.0.0",
            "products",
            "products/small",
            "products/small:1.0.0",
        )
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
        (
            "tfds:../sums",
            "train",
            r"tasks.source is 'tfds:../sums': write "
            r"tfds:NAME\[/CONFIG\]\[:VERSION\]",
        ),
        ("tfds:sums/..", "train", "tasks.source is 'tfds:sums/..': write tfds:NAME"),
        (
            "tfds:su",
            "train",
            "tfds:su is not prepared in .*: set tasks.data_dir .* `jaxrft prepare dataset su "
            "--file",
        ),
        ("tfds:su", "train", "`tfds build su --file_format=array_record`"),
        (
            "tfds:sums:3.0.0",
            "train",
            "tfds:sums:3.0.0 is not prepared in .*, only 1.0.0: write one of these",
        ),
        (
            "tfds:sums",
            "test",
            "tfds:sums in .* has no split 'test', only train: set tasks.split to one of these",
        ),
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


TEXT = "tensorflow_datasets.core.features.text_feature.Text"
NESTED = {
    "featuresDict": {
        "features": {"prompt": {"sequence": {"feature": {"python_class_name": "evil.Feature"}}}}
    }
}
FOREIGN = {
    "legacy": {"type": "evil.Feature", "content": {}},
    "legacy, nested": {
        "type": "x.Sequence",
        "content": {"feature": {"type": "evil.Feature", "content": {}}},
    },
    "nested": {
        "pythonClassName": TEXT.replace("text_feature.Text", "features_dict.FeaturesDict"),
        **NESTED,
    },
    "text of JSON": {
        "pythonClassName": TEXT,
        "jsonFeature": {"json": '{"a": {"type": "evil.Feature", "content": {}}}'},
    },
    "text of protocol": {
        "type": TEXT,
        "content": '{"feature": {"pythonClassName": "evil.Feature"}}',
        "proto_cls": "tensorflow_datasets.Sequence",
    },
    "module of TFDS": {
        "pythonClassName": "tensorflow_datasets.scripts.cli.main.Feature",
        "text": {},
    },
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_a_class_that_is_not_of_tfds_is_never_imported(tmp_path, monkeypatch, name, file):
    writers.write_tfds(tmp_path, "sums", ROWS)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "sums" / "1.0.0"
    content = (
        FOREIGN[name] if file == "features.json" else {**info_of(folder), "features": FOREIGN[name]}
    )
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(
        InputError, match="features of the class '.*', which is not TFDS' own .*: prepare"
    ) as raised:
        read("sums", split="train", data_dir=str(tmp_path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "imported").exists() and "evil" not in sys.modules


def info_of(folder):
    return json.loads((folder / "dataset_info.json").read_text())


def test_the_module_that_a_data_set_says_it_is_from_is_not_imported(tmp_path, monkeypatch):
    writers.write_tfds(tmp_path, "sums", ROWS)
    (tmp_path / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "sums" / "1.0.0"
    (folder / "dataset_info.json").write_text(json.dumps({**info_of(folder), "moduleName": "evil"}))
    assert len(read("sums", split="train", data_dir=str(tmp_path))["prompt"]) == 4
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../sums"},
        {"name": "/etc/sums"},
        {"template": "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"},
        {"template": "{SPLIT.__class__}"},
        {"template": "{SPLIT:>999999999999}"},
        {"split": "../train"},
    ],
)
def test_files_of_a_data_set_lie_in_its_folder(tmp_path, change):
    writers.write_tfds(tmp_path, "sums", ROWS)
    folder = tmp_path / "sums" / "1.0.0"
    info = info_of(folder)
    info["name"] = change.get("name", info["name"])
    info["splits"][0]["name"] = change.get("split", "train")
    info["splits"][0]["filepathTemplate"] = change.get(
        "template", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        InputError, match="names a file .*, which is not in its folder: prepare it again"
    ):
        read("sums", split="train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "feature",
    [
        {"../../names": {"type": TEXT, "content": {}}},
        {
            "label": {
                "type": TEXT.replace("text_feature.Text", "class_label_feature.ClassLabel"),
                "content": NAMES,
            }
        },
    ],
)
def test_labels_are_read_from_its_folder_only(tmp_path, feature):
    writers.write_tfds(tmp_path, "sums", ROWS)
    features = {
        "type": TEXT.replace("text_feature.Text", "features_dict.FeaturesDict"),
        "content": feature,
    }
    (tmp_path / "sums" / "1.0.0" / "features.json").write_text(json.dumps(features))
    with pytest.raises(
        InputError, match="names a file .*, which is not in its folder: prepare it again"
    ):
        read("sums", split="train", data_dir=str(tmp_path))


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_rows_that_take_more_than_memory_are_refused(tmp_path, monkeypatch, file_format):
    writers.write_tfds(tmp_path, "sums", [{"prompt": "x" * 100_000}] * 60, file_format=file_format)
    monkeypatch.setattr("jaxrft.tasks.memory.available", lambda: 10_000_000)
    with pytest.raises(
        InputError, match="unpacks to more than 0.00 GiB, half of the memory .*: lower tasks.limit"
    ):
        read("sums", split="train", data_dir=str(tmp_path))
    if file_format == "array_record":
        assert len(read("sums", split="train", data_dir=str(tmp_path), limit=20)["prompt"]) == 20


@pytest.mark.parametrize(
    "file", ["dataset_info.json", "features.json", "sums-train.array_record-00000-of-00001"]
)
@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"{}", None]
)
def test_a_damaged_data_set_is_reported(tmp_path, file, damage):
    writers.write_tfds(tmp_path, "sums", ROWS)
    path = tmp_path / "sums" / "1.0.0" / file
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(InputError, match="sums.*prepare") as raised:
        tasks.load(TasksConfig(source="tfds:sums", data_dir=str(tmp_path)))
    assert "\n" not in str(raised.value)
