"""The command that installs an extra fits the way in which the package was installed."""

from pathlib import Path

import pytest

from jaxrft.host import installation
from jaxrft.host.installation import install_command

ROOT = Path(__file__).parents[1]


def test_a_checkout_is_installed_from_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert install_command("tpu") == 'pip install ".[tpu]"'
    monkeypatch.chdir(tmp_path)
    assert install_command("tpu") == f'pip install "{ROOT}[tpu]"'


@pytest.mark.parametrize(
    ("record", "command"),
    [
        ({"url": "file:///home/me/my%20rft", "dir_info": {}}, '"/home/me/my rft[tpu]"'),
        (
            {"url": "file:///tmp/jaxrft-0.2.0-py3-none-any.whl", "archive_info": {}},
            '"jaxrft[tpu] @ file:///tmp/jaxrft-0.2.0-py3-none-any.whl"',
        ),
        (
            {
                "url": "https://example.org/jaxrft",
                "vcs_info": {"vcs": "git", "requested_revision": "main"},
            },
            '"jaxrft[tpu] @ git+https://example.org/jaxrft@main"',
        ),
        ({}, '"jaxrft[tpu]"'),
    ],
    ids=["folder", "wheel", "git", "index"],
)
def test_an_installed_package_is_installed_again_from_its_source(
    monkeypatch, tmp_path, record, command
):
    monkeypatch.setattr(installation, "_ROOT", tmp_path)
    monkeypatch.setattr(installation, "_direct_url", lambda: record)
    assert install_command("tpu") == f"pip install {command}"


def test_a_folder_that_a_shell_would_expand_is_quoted(monkeypatch, tmp_path):
    folder = tmp_path / "a$b"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    monkeypatch.setattr(installation, "_ROOT", folder)
    assert install_command("tpu") == f"pip install '{folder}[tpu]'"
