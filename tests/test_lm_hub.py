"""Models by name, from folders and from a cache of huggingface_hub; nothing here has a network."""

import json
import os

import helpers
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from jaxrft.lm import hub, weights
from jaxrft.train.loop import train
from jaxrft.types import InputError

COMMIT, OLDER = "8" * 40, "7" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; huggingface_hub reads its environment once, when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, folder, commit=COMMIT, *, branch="main", without=()):
    """Adds the files of a folder to the cache as owner/tiny, in its layout: links in snapshots to
    blobs.
    """
    repository = cache / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    for path in (repository / "blobs", repository / "refs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    for path in folder.iterdir():
        if path.name not in without:
            blob = f"{commit}-{path.name}"
            (repository / "blobs" / blob).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.join("../../blobs", blob))
    return snapshot


@pytest.fixture
def policy(world):
    return world / "policy"


def test_a_folder_is_itself(policy):
    assert hub.find(str(policy)) == hub.local(str(policy)) == policy


def test_an_id_is_found_in_the_cache_by_branch_and_by_commit(cache, policy):
    snapshot, older = put(cache, policy), put(cache, policy, OLDER, branch="v1")
    assert (
        hub.find("owner/tiny")
        == hub.find("owner/tiny@main")
        == hub.find(f"owner/tiny@{COMMIT}")
        == snapshot
    )
    assert hub.find("owner/tiny@v1") == hub.find(f"owner/tiny@{OLDER}") == older
    assert hub.local("owner/tiny@v2") is None


def test_an_absent_id_is_reported_with_the_remedy(cache):
    assert hub.local("owner/tiny") is None
    with pytest.raises(
        InputError, match="^owner/tiny is neither .*`hf download owner/tiny` .*HF_HOME.*HF_TOKEN"
    ) as caught:
        hub.find("owner/tiny")
    assert str(cache) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="`hf download owner/tiny --revision v1`"):
        hub.find("owner/tiny@v1")


@pytest.mark.parametrize("lost", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_part_of_a_repository_does_not_count(lost, cache, policy):
    snapshot = put(cache, policy, without=[lost])
    assert hub.local("owner/tiny") is None
    with pytest.raises(InputError, match=f"{snapshot} lacks"):
        hub.find("owner/tiny")


def test_all_files_of_an_index_count(cache, policy, tmp_path):
    config = weights.read_config(policy)
    weights.save(
        tmp_path / "split", weights.load(policy, config), config, source=policy, max_shard_size=5000
    )
    last = max(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    put(cache, tmp_path / "split", without=[last])
    assert hub.local("owner/tiny") is None
    snapshot = put(cache, tmp_path / "split", OLDER)
    assert hub.local("owner/tiny") == snapshot


@pytest.mark.parametrize(
    "name", ["polcy", "./polcy", "runs/../polcy", "/nowhere/at/all", "a/b/c", "a/b@../refs"]
)
def test_a_path_that_is_no_id_is_reported_as_a_folder(name):
    with pytest.raises(
        InputError, match=f"^no folder {name}: give the folder of a Hugging Face checkpoint"
    ):
        hub.find(name)


def test_a_misspelt_folder_gets_a_suggestion(policy, monkeypatch):
    with pytest.raises(InputError, match=rf"no folder {policy}x \(did you mean {policy}\?\): give"):
        hub.find(f"{policy}x")
    monkeypatch.chdir(policy.parent.parent)
    name = f"{policy.parent.name}/polcy"  # as an id is spelt
    with pytest.raises(
        InputError,
        match=rf"{name} is neither a folder \(did you mean "
        rf"{policy.parent.name}/policy\?\)",
    ):
        hub.find(name)


def test_only_what_is_read_is_downloaded():
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    files += [
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
    ]
    others = [
        "pytorch_model.bin",
        "modeling.py",
        "original/model.safetensors",
        "model.gguf",
        "x.pkl",
    ]
    assert (
        list(
            filter_repo_objects(
                files + others, allow_patterns=hub.FILES, ignore_patterns=hub.FOLDERS
            )
        )
        == files
    )


@pytest.mark.slow
def test_a_run_from_the_cache_is_one_from_its_folder(cache, policy, configure, whole, tmp_path):
    put(cache, policy)
    train(configure(tmp_path / "run", model="owner/tiny", steps=1))
    assert helpers.metrics(tmp_path / "run") == helpers.metrics(whole[0])[:1]
    exported, same = tmp_path / "run/policy", whole[0] / "policy"
    assert {path.name for path in exported.iterdir()} == {path.name for path in same.iterdir()}
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (exported, same))
    assert (ours.pop("jaxrft_step"), theirs.pop("jaxrft_step")) == (1, 6) and ours == theirs
    assert (exported / "tokenizer.json").read_bytes() == (same / "tokenizer.json").read_bytes()
    for name in ("config.json", "tokenizer.json"):
        assert not (exported / name).is_symlink()
