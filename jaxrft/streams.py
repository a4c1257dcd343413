"""The random streams of a run, by number."""

import jax

from jaxrft.types import Array

# The random streams of a step. The last is that of the first round of resampling; later rounds have
# the numbers after it. None may be removed, since the numbers after it would change: "measure" is
# used by benchmarks alone.
STREAMS = (
    "select",
    "rollout",
    "learn",
    "eval",
    "init",
    "prepare",
    "replay",
    "measure",
    "reference set",
    "rollout of references",
    "resample",
)


def stream_key(seed: int, step: Array | int, use: str | Array) -> Array:
    """Derives the random key of one stream at one step from the seed, so that no key is stored.

    `use` is the stream's name in STREAMS or its number.
    """
    number = STREAMS.index(use) if isinstance(use, str) else use
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)
