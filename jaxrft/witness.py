"""Says which process of a run has gone when JAX ends the others: the child of one of them, which it outlives.

    python jaxrft/launch.py jaxrft.witness FOLDER OWN COUNT

JAX ends a process by SIGABRT and in words of its own: at once if the first of all dies, which coordinates them, and
half a minute after another has hung. Nothing in a process can answer that, but what it leaves on the standard input of
its witness tells how it ended. Where a witness dies with its process, as in a container, those of the others speak.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from jaxrft.host import signals
from jaxrft.host.files import read_regular, replace_file

OVER = "over"  # on standard input: the process ended by itself; anything else: by SIGABRT; nothing: it was killed
GONE, ENDED = "gone", "ended"  # the sign that a witness leaves of a process that was killed, and that JAX ended
MAX_BYTES = 100  # of a sign
SILENT = 12.0  # seconds without a new sign after which a process counts as gone


def gone(signs: Path, others: list[int]) -> list[int]:
    """Which of the `others` have gone, by their files in `signs`, which the living ones change again and again."""
    before = {index: _read(signs / f"{index}") for index in others}
    if found := [index for index, sign in before.items() if sign == GONE]:
        return found
    time.sleep(SILENT)
    after = {index: _read(signs / f"{index}") for index in others}
    return [index for index in others if after[index] == GONE or before[index] == after[index] not in ("", ENDED)]


def _read(sign: Path) -> str:
    with suppress(OSError):
        return read_regular(sign, MAX_BYTES, flags=os.O_RDONLY | os.O_NOFOLLOW).decode(errors="replace")
    return ""


def sentence(found: list[int], count: int) -> str:
    """What there is to say of it."""
    return (
        f"process {', '.join(map(str, found))} of {count} gives no sign of life any more: start all of them again, and "
        "the run goes on from the newest checkpoint"
    )


def main(folder: str, own: str, count: str) -> None:
    """Waits for the end of the process, and looks for a reason."""
    for number in signals.numbers():  # which schedulers send to all that a job has started
        signal.signal(number, signal.SIG_IGN)
    if (said := sys.stdin.read()) == OVER:
        return
    signs, number = Path(folder), int(count)
    with suppress(OSError):
        replace_file(signs / own, ENDED if said else GONE, durable=False)
    if found := gone(signs, [index for index in range(number) if index != int(own)]):
        with suppress(OSError):
            print(f"jaxrft: error: {sentence(found, number)}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
