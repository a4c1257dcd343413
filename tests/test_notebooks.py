"""Every notebook runs from its first to its last cell, as its reader would run it."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """On a copy beside the configs, so that what it writes goes with the test."""
    for folder in ("configs", "notebooks"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    monkeypatch.delenv("XLA_FLAGS")  # a reader has one device
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "clear the outputs before committing"
    )
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    ).execute()
