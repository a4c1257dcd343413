"""The folder of compiled programs."""

from pathlib import Path

import helpers
import pytest

from jaxrft.config import MeshConfig
from jaxrft.host import compile_cache


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The environment of a user who has set nothing."""
    for name in (compile_cache.FOLDER, compile_cache.SHORTEST, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_the_folder_is_in_the_users_cache_folder(environment, tmp_path):
    assert compile_cache.folder().parent == tmp_path / ".cache/jaxrft/compiled"
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert compile_cache.folder().parent == tmp_path / "caches/jaxrft/compiled"
    # to be ignored, by the XDG base directory specification
    environment.setenv("XDG_CACHE_HOME", "relative")
    assert compile_cache.folder().parent == tmp_path / ".cache/jaxrft/compiled"


def test_another_processor_or_version_has_another_folder(environment):
    here = compile_cache.folder()
    assert here == compile_cache.folder()
    environment.setattr(compile_cache, "_processor", lambda: "Linux x86_64 flags: sse2")
    other = compile_cache.folder()
    environment.setattr(compile_cache.metadata, "version", lambda _: "0.0.1")
    assert len({here, other, compile_cache.folder()}) == 3


def test_a_folder_that_the_user_names_is_kept(environment, tmp_path):
    environment.setenv(compile_cache.FOLDER, str(tmp_path / "mine"))
    compile_cache.enable()
    assert compile_cache.os.environ[compile_cache.FOLDER] == str(tmp_path / "mine")


def test_a_folder_that_cannot_be_made_is_one_sentence(environment, tmp_path, caplog):
    (tmp_path / ".cache").write_text("a file")
    compile_cache.enable()
    assert compile_cache.FOLDER not in compile_cache.os.environ
    assert "cannot be kept for the next run" in caplog.text
    assert compile_cache.FOLDER in caplog.text


@pytest.mark.slow
def test_a_second_run_compiles_nothing_that_the_first_has_compiled(configure, tmp_path):
    config = helpers.write_config(
        tmp_path / "config.py", configure(tmp_path / "first", steps=1, mesh=MeshConfig())
    )
    variables = {compile_cache.FOLDER: tmp_path / "compiled", compile_cache.SHORTEST: 0}
    kept = []
    for name in ("first", "second"):
        code, _, errors = helpers.jaxrft(
            "train", config, "--output-dir", tmp_path / name, devices=1, **variables
        )
        assert code == 0, errors
        kept.append({path.name for path in Path(tmp_path / "compiled").glob("*-cache")})
    assert kept[0] == kept[1]
    assert kept[0]
    assert helpers.metrics(tmp_path / "first") == helpers.metrics(tmp_path / "second")
