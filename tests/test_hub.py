import pytest
import writers

from jaxrft import tasks
from jaxrft.config import TasksConfig
from jaxrft.tasks.hub import read
from jaxrft.types import InputError

HEADER = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test-*]
- config_name: socratic
  data_dir: socratic
  data_files: {train: "train-*"}
- config_name: flat
  data_files: "flat/*.jsonl"
---
# A data set
"""
PARQUET = {
    f"{name}-00000-of-00001.parquet" for name in ("main/train", "main/test", "socratic/train")
}
# Files of a repository; (subset, split) -> which of them are read.
LAYOUTS = {
    "data": (
        {
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        },
        {
            (None, "train"): [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
            ],
            ("default", "test"): ["data/test-00000-of-00001.parquet"],
        },
    ),
    "subsets": (
        PARQUET,
        {
            ("main", "test"): ["main/test-00000-of-00001.parquet"],
            ("socratic", "train"): ["socratic/train-00000-of-00001.parquet"],
        },
    ),
    "top": (
        {"train.parquet", "math_test.parquet", "more.json"},
        {(None, "train"): ["train.parquet"], (None, "test"): ["math_test.parquet"]},
    ),
    "folders": (
        {
            "main/train/0000.parquet",
            "main/test/0000.parquet",
            "main/hard/0000.parquet",
            "other/train/a_1.5k.parquet",
        },
        {
            ("main", "train"): ["main/train/0000.parquet"],
            ("main", "hard"): ["main/hard/0000.parquet"],
            ("other", "train"): ["other/train/a_1.5k.parquet"],
        },
    ),
    "splits of other names": (
        {"data/math-00000-of-00001.parquet", "data/code-00000-of-00001.parquet"},
        {
            (None, "math"): ["data/math-00000-of-00001.parquet"],
            (None, "code"): ["data/code-00000-of-00001.parquet"],
        },
    ),
    "JSON lines": ({"data/train.jsonl", "info.json"}, {(None, "train"): ["data/train.jsonl"]}),
    "JSON": ({"deepscaler.json"}, {(None, "train"): ["deepscaler.json"]}),
    "header": (
        PARQUET | {"flat/a.jsonl", "flat/b.jsonl", "flat/c.txt"},
        {
            (None, "train"): ["main/train-00000-of-00001.parquet"],
            ("main", "test"): ["main/test-00000-of-00001.parquet"],
            ("socratic", "train"): ["socratic/train-00000-of-00001.parquet"],
            ("flat", "train"): ["flat/a.jsonl", "flat/b.jsonl"],
        },
    ),
    "header without its files": (
        {"else/train.parquet"},
        {("else", "train"): ["else/train.parquet"]},
    ),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subsets_and_splits_are_found_in_every_layout(cache, layout):
    paths, wanted = LAYOUTS[layout]
    readme = HEADER if "header" in layout else "---\nlicense: mit\n---\n"
    writers.write_hub(cache, "someone/sums", {path: [{"prompt": path}] for path in paths}, readme)
    for (subset, split), found in wanted.items():
        assert read("someone/sums", subset=subset, split=split) == {"prompt": found}


def test_a_revision_may_be_asked_for(cache):
    for revision in ("main", "v1"):
        writers.write_hub(
            cache, "someone/sums", {"train.jsonl": [{"prompt": revision}]}, revision=revision
        )
    assert read("someone/sums@v1", split="train") == {"prompt": ["v1"]}
    assert read("someone/sums", split="train") == {"prompt": ["main"]}


def test_files_of_a_split_are_joined_with_none_for_columns_that_one_lacks(cache):
    parts = {
        "train-0-of-2.parquet": [{"prompt": "a", "x": 1}],
        "train-1-of-2.parquet": [{"prompt": "b"}] * 2,
    }
    writers.write_hub(cache, "someone/sums", parts)
    assert read("someone/sums", split="train") == {"prompt": ["a", "b", "b"], "x": [1, None, None]}


def test_gsm8k_by_its_id(cache):
    row = {"question": "How many?", "answer": "5.\n#### 1,005"}
    writers.write_hub(cache, "openai/gsm8k", {path: [row] for path in PARQUET}, HEADER)
    rows = tasks.load(TasksConfig(source="hub:openai/gsm8k", subset="main", split="test"))
    assert rows.prompts == [[{"role": "user", "content": "How many?"}]] and rows.columns[
        "answer"
    ] == ["1005"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("hub:", {}, "tasks.source is 'hub:': write hub:OWNER/NAME"),
        ("hub:gsm8k", {}, "tasks.source is 'hub:gsm8k': write hub:OWNER/NAME"),
        ("hub:a b/c", {}, "tasks.source is 'hub:a b/c': write hub:OWNER/NAME"),
        ("hub:a/sums@..", {}, "tasks.source is 'hub:a/sums@..': write hub:OWNER/NAME"),
        (
            "hub:a/sums@../refs/main",
            {},
            "tasks.source is 'hub:a/sums@../refs/main': write hub:OWNER/NAME",
        ),
        (
            "hub:a/b",
            {},
            "hub:a/b is not in the .* cannot be downloaded .*`hf download --repo-type dataset a/b`",
        ),
        ("hub:a/b@v1", {}, "`hf download --repo-type dataset a/b --revision v1`"),
        (
            "hub:a/sums",
            {},
            "hub:a/sums has several subsets, main, socratic: set tasks.subset to one of them",
        ),
        (
            "hub:a/sums",
            {"subset": "man"},
            "hub:a/sums has no subset 'man', only main, socratic: set tasks.subset to",
        ),
        (
            "hub:a/sums",
            {"subset": "main", "split": "val"},
            "no split 'val', only test, train: .*, or run `hf download",
        ),
        (
            "hub:a/part",
            {},
            "hub:a/part is incomplete in the .* cache, next to "
            "train-00001-of-00003.parquet: run `hf",
        ),
        (
            "hub:a/script",
            {},
            "hub:a/script is in the Hugging Face cache without a .parquet, "
            ".jsonl or .json file: run",
        ),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(cache, source, options, message):
    writers.write_hub(cache, "a/sums", {path: [{"prompt": "1"}] for path in PARQUET})
    writers.write_hub(
        cache, "a/part", {f"train-0000{n}-of-00003.parquet": [{"prompt": "1"}] for n in (1, 2)}
    )
    writers.write_hub(cache, "a/script", {}, "A README without a header")
    with pytest.raises(InputError, match=message) as raised:
        tasks.load(TasksConfig(source=source, **options))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "header",
    [
        "configs: [}",
        "configs: 3",
        "configs: [main]",
        "configs: [{data_files: [{split: test}]}]",
        "a: !!python/tuple []",
    ]
    + ["configs: [{data_files: 3}]", "configs: [{data_dir: 3}]", "configs: [{config_name: [a]}]"],
)
def test_an_invalid_header_is_reported(cache, header):
    writers.write_hub(
        cache, "someone/sums", {"train.jsonl": [{"prompt": "1"}]}, f"---\n{header}\n---\n"
    )
    with pytest.raises(InputError, match="hub:someone/sums: .*README.md .*download") as raised:
        read("someone/sums", split="train")
    assert "\n" not in str(raised.value)
