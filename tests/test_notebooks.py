"""Every notebook runs from its first to its last cell, and its saved outputs can be read."""

import base64
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# of one machine, its folders and the addresses of its objects
OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|mnt|var|Users)/|<.* at 0x\w+>")
MOVES = re.compile(r"[\r\b]|\x1b\[[\d;]*[^\d;m]")  # of the cursor, as progress bars make
MOST_BYTES = 600_000


@pytest.mark.slow
@EACH
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """On a copy beside the configs, so that what it writes goes with the test."""
    for folder in ("configs", "notebooks"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    monkeypatch.setenv("XLA_FLAGS", flags)  # a reader has one device; the last one counts
    monkeypatch.setenv("JAXRFT_NOTEBOOK_STEPS", "8")
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    ).execute()


@EACH
def test_saved_outputs_are_of_one_execution_from_top_to_bottom(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, 1 + len(code))), (
        f"execute it again: jupyter execute --inplace notebooks/{path.name}"
    )
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}


@EACH
def test_saved_outputs_can_be_read(path):
    """Pictures, and texts that are of no one's machine."""
    assert path.stat().st_size < MOST_BYTES
    outputs = [
        out for cell in nbformat.read(path, as_version=4).cells for out in cell.get("outputs", ())
    ]
    texts = [
        text
        for output in outputs
        for text in (output.get("text"), *(output.get("data") or {}).values())
        if isinstance(text, str)
    ]
    pictures = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    assert pictures and all(base64.b64decode(x).startswith(b"\x89PNG") for x in pictures)
    for text in texts:
        if text not in pictures:
            assert not OF_A_MACHINE.search(text) and not MOVES.search(text), text[:1000]
