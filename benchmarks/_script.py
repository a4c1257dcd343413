"""How a measurement runs as a program."""

import argparse
import signal
import sys
from collections.abc import Callable

from jaxrft.errors import InputError, shown
from jaxrft.fields import INT32


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


def whole_number(name: str, least: int, most: int = INT32) -> Callable[[str], int]:
    """Returns the `type` of an argument of argparse, called `name`, that is a whole number in
    [least, most].
    """

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(
                f"{name} is {shown(number)}: it must be at least {least:,}"
            )
        if number > most:
            raise argparse.ArgumentTypeError(
                f"{name} is {shown(number)}: it must be at most {most:,}"
            )
        return number

    parse.__name__ = "whole number"  # which argparse puts into its message for a text that is none
    return parse
