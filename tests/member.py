"""`jaxrft` as one process of several, which then writes the parameters as its own devices hold
them.

And `read`: how many elements of them it read from the checkpoint.
"""

import sys

import numpy as np

from jaxrft import cli
from jaxrft.lm import weights
from jaxrft.train import loop

run, read_layer = loop.advance, weights._read_layer
read = []


def held(array):
    """The array put together from this process's devices; NaN where they hold nothing."""
    whole = np.full(array.shape, np.nan, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def note_and_read(*arguments):
    block = read_layer(*arguments)
    read.append(block.size)
    return block


def run_and_write(config):
    weights._read_layer = note_and_read
    state, finished = run(config)
    np.savez(
        sys.argv[1], read=sum(read), **{name: held(array) for name, array in state.params.items()}
    )
    return state, finished


if __name__ == "__main__":
    loop.advance = run_and_write
    sys.exit(cli.main(sys.argv[2:]))
