"""Says how an extra of this package is installed, in the way in which the package itself was.

The package is on no index, so that `pip install "jaxrft[tpu]"` would find nothing, or a stranger's.
"""

import json
import os
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from jaxrft.host import launch

_ROOT = Path(launch.__file__).parents[2]  # the folder that holds the package


def install_command(extra: str) -> str:
    """Returns the shell command that installs an extra, such as `pip install ".[tpu]"`.

    It names the folder of the repository, the archive or the repository's address that pip
    recorded (PEP 610) when it installed the package; the folder around the package, if that is a
    checkout that nobody installed; the bare name only if an index is where it came from.
    """
    if (_ROOT / "pyproject.toml").is_file():
        return f"pip install {_folder(_ROOT, extra)}"
    record = _direct_url()
    url = str(record.get("url", ""))
    if not url:
        return f"pip install {_quoted(f'jaxrft[{extra}]')}"
    if "dir_info" in record and url.startswith("file://"):
        return f"pip install {_folder(Path(url2pathname(urlsplit(url).path)), extra)}"
    prefix = ""
    vcs = record.get("vcs_info")
    if isinstance(vcs, dict):
        prefix = f"{vcs.get('vcs', 'git')}+"
        revision = vcs.get("requested_revision")
        url = f"{url}@{revision}" if revision else url
    return f"pip install {_quoted(f'jaxrft[{extra}] @ {prefix}{url}')}"


def _direct_url() -> dict[str, object]:
    """Reads what pip recorded about the source of the installed package; empty without a record."""
    try:
        text = metadata.distribution("jaxrft").read_text("direct_url.json")
        record = json.loads(text or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _folder(folder: Path, extra: str) -> str:
    """Formats a folder with an extra for pip: `.` where it is the current one."""
    here = os.path.realpath(folder) == os.path.realpath(os.curdir)
    return _quoted(f"{'.' if here else folder}[{extra}]")


def _quoted(text: str) -> str:
    """Quotes a text for a shell: in double quotes, as the documentation does, if they suffice."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
