"""Counts what XLA compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

# Names of JAX's own events. With a cache the first is also the time to look a program up in it.
COMPILED = "/jax/core/compile/backend_compile_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclass
class Compilations:
    """The programs that were compiled so far."""

    programs: int = 0
    cached: int = 0  # those that an earlier run had compiled
    seconds: float = 0.0

    def __str__(self) -> str:
        """Returns a clause such as "12 programs in 20.3 s, 5 of them kept from an earlier run"."""
        cached = f", {self.cached} of them kept from an earlier run" if self.cached else ""
        return f"{self.programs} programs in {self.seconds:.1f} s{cached}"


@contextmanager
def counted_compilations() -> Iterator[Compilations]:
    """Counts the programs that are compiled within the block."""
    counts = Compilations()

    def note_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            counts.programs += 1
            counts.seconds += duration_secs

    def note_event(event: str, **_: str | int) -> None:
        if event == CACHE_HIT:
            counts.cached += 1

    jax.monitoring.register_event_duration_secs_listener(note_duration)
    jax.monitoring.register_event_listener(note_event)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(note_duration)
        jax.monitoring.unregister_event_listener(note_event)
