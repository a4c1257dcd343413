"""Renders chat templates, which are foreign code, in a process with bounds on time, memory and
output.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from jaxrft.types import InputError

# of processor time for a batch; a published template takes below a millisecond a prompt
SECONDS = 10.0
BATCH = 256  # prompts
MEMORY = 512 << 20  # bytes
_WORKER = Path(__file__).with_name("template_worker.py")
# environment variables that a Python may need to start
_PASSED_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")


class Request(NamedTuple):
    """One prompt to render."""

    template: int  # index into the templates
    messages: list[dict[str, object]]
    variables: dict[str, object]  # other ones that the template may use
    generate: bool  # whether to end with the header of an answer


class Answer(NamedTuple):
    """The answer to a request; `failure` and `refusal` are empty when there is a text."""

    text: str = ""
    failure: str = ""  # how the template broke, a phrase
    refusal: str = ""  # what the template says against the messages
    # with the first answer about a template, the variables that it looks at
    reads: tuple[str, ...] | None = None


def render(requests: Sequence[Request], templates: Sequence[str], date: str) -> Generator[Answer]:
    """Renders the requests in order; `date` is today's for templates, in ISO form.

    Templates are run as transformers runs them, in jinja2's immutable sandbox, by a fresh process
    without the environment, the current directory or the memory of this one. After a template has
    used up SECONDS or has ended its process, the answer to its request is the last one. Raises
    TypeError for messages with values that JSON has not.
    """
    lines = [json.dumps(request._asdict()).encode() + b"\n" for request in requests]
    with _worker(_greeting(templates, date), lines) as process:
        assert process.stdout is not None
        for _ in requests:
            line = process.stdout.readline()
            if not line.endswith(b"\n"):
                yield Answer(failure=_death(process))
                return
            answer = json.loads(line)
            reads = answer.get("reads")
            yield Answer(
                answer.get("text", ""),
                answer.get("failed", ""),
                answer.get("refused", ""),
                None if reads is None else tuple(reads),
            )


def _greeting(templates: Sequence[str], date: str) -> dict[str, object]:
    """Returns the first message to the process; `path` holds the folders of jinja2 and of what it
    imports.
    """
    packages = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = [
        str(Path(spec.origin).parent.parent)
        for spec in packages
        if spec is not None and spec.origin
    ]
    bounds = {"seconds": SECONDS, "memory": MEMORY, "batch": BATCH}
    return {
        "path": list(dict.fromkeys(folders)),
        "date": date,
        "templates": list(templates),
        **bounds,
    }


@contextmanager
def _worker(
    greeting: dict[str, object], lines: Iterable[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the process and a thread that writes to it, and ends both with the context."""
    try:
        # -I: neither the current directory nor PYTHON* variables; -S: no start-up files of
        # site-packages.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ},
            cwd="/",
            start_new_session=True,  # Ctrl-C does not reach it
        )
    except OSError as error:
        raise InputError(
            f"the process that renders chat templates cannot be started: {error}"
        ) from error
    assert process.stdin is not None
    writer = threading.Thread(target=_write, args=(process.stdin, greeting, lines), daemon=True)
    with process:
        try:
            writer.start()
            yield process
        finally:
            process.kill()
            writer.join()


def _write(file: IO[bytes], greeting: dict[str, object], lines: Iterable[bytes]) -> None:
    with suppress(OSError), file:  # a process that ended shows when it does not answer
        file.write(json.dumps(greeting).encode() + b"\n")
        file.writelines(lines)


def _death(process: subprocess.Popen[bytes]) -> str:
    """Returns how the process ended, as a phrase about the template."""
    code = process.wait()
    if code == -signal.SIGPROF:
        return f"it takes more than {SECONDS:g} s of processor time for {BATCH} prompts"
    return f"its process ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}"
