"""Says which process of a run has gone when JAX ends the others: the child of one of them, which it outlives.

    python -m jaxrft.witness FOLDER OWN COUNT

JAX ends a process by SIGABRT and in words of its own: at once if the first of all dies, which coordinates them, and
half a minute after another has hung. Nothing in a process can answer that. A word on standard input says that the
process ended by itself.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

GONE = "gone"  # the sign that a witness leaves when its process has died
SILENT = 12.0  # seconds without a new sign after which a process counts as gone


def gone(signs: Path, count: int, *, dead: int | None = None) -> list[int]:
    """Which of the processes have gone, by their files in `signs`, which the living ones change again and again.

    `dead`: this one has, and says so; of the others only those that went before it are named.
    """
    before = {index: _read(signs / f"{index}") for index in range(count) if index != dead}
    if found := [index for index, sign in before.items() if sign == GONE]:
        return found
    if dead is not None:
        with suppress(OSError):
            (signs / f"{dead}").write_text(GONE, encoding="utf-8")
    time.sleep(SILENT)
    return [index for index, sign in before.items() if sign and sign == _read(signs / f"{index}")]


def _read(sign: Path) -> str:
    with suppress(OSError):
        return sign.read_text(encoding="utf-8")
    return ""


def sentence(found: list[int], count: int) -> str:
    """What there is to say of it."""
    return (
        f"process {', '.join(map(str, found))} of {count} gives no sign of life any more: start all of them again, and "
        "the run goes on from the newest checkpoint"
    )


def main(folder: str, own: str, count: str) -> None:
    """Waits for the end of the process, and looks for a reason."""
    if not sys.stdin.read() and (found := gone(Path(folder), int(count), dead=int(own))):
        print(f"jaxrft: error: {sentence(found, int(count))}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
