"""What a TPU chip has and can do at most, by its generation."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Memory and peak rates of a chip."""

    gib: int  # of memory
    flops: float  # operations a second in bfloat16
    memory: float  # bytes a second between the chip and its memory
    interconnect: float  # bytes a second that leave the chip by all its links


# "How to Scale Your Model", part 2, "Specific numbers for our chips"
# (https://jax-ml.github.io/scaling-book/tpus): a link's one-way rate times 6 links of a torus in
# three dimensions (v4, v5p), 4 of one in two (v5e, v6e). The memory is what a program can use of
# it.
CHIPS = {
    "v4": Chip(32, 2.75e14, 1.2e12, 6 * 4.5e10),
    "v5e": Chip(16, 1.97e14, 8.1e11, 4 * 5e10),
    "v5p": Chip(95, 4.59e14, 2.8e12, 6 * 1e11),
    "v6e": Chip(32, 9.2e14, 1.6e12, 4 * 1e11),
}


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as v5e:4x4."""
    return CHIPS[topology.partition(":")[0]]
