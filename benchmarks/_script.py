"""How a measurement runs as a program."""

import signal
import sys
from collections.abc import Callable

from jaxrft.errors import InputError


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the flags of the process; exits with 2 and one sentence after an
    InputError.

    SIGTERM raises SystemExit, so that what `main` has opened is closed: processes, and the worktree
    of a commit.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _leave(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the cleaning up
    sys.exit(128 + number)
