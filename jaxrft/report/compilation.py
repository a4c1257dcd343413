"""Counts what XLA compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from jaxrft.report.console import Display

# Names of JAX's own events. The first comes right before a program is compiled.
# With a cache the second is also the time to look a program up in it.
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
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
def counted_compilations(display: Display | None = None) -> Iterator[Compilations]:
    """Counts the programs that are compiled within the block; the display shows their names."""
    counts = Compilations()

    def note_duration(event: str, duration_secs: float, **metadata: str | int) -> None:
        program = str(metadata.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        if event == LOWERED and display is not None:
            display.compiling(program)
        if event == COMPILED:
            counts.programs += 1
            counts.seconds += duration_secs
            if display is not None:
                display.compiled(program, duration_secs)

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
