"""The random streams of a run, by number."""

import jax

from jaxrft.types import Array

# The random streams of a step; the last is that of a first refill, and those of others are the
# numbers behind it. None may go, or the numbers of those behind it change: "measure" is used by
# benchmarks alone.
STREAMS = (
    *(
        "select",
        "rollout",
        "learn",
        "eval",
        "init",
        "prepare",
        "replay",
        "measure",
        "probe",
        "rollout of a probe",
    ),
    "refill",
)


def stream_key(seed: int, step: Array | int, use: str | Array) -> Array:
    """Derives the random key of one stream at one step from the seed, so that no key is stored.

    `use` is the stream's name in STREAMS or its number.
    """
    number = STREAMS.index(use) if isinstance(use, str) else use
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)
