"""How a measurement runs as a program."""

import sys
from collections.abc import Callable

from jaxrft.errors import InputError


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the flags of the process; exits with 2 and one sentence after an InputError."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
