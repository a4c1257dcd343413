"""`jaxrft` as one process of several, which then writes the parameters as its own devices hold them."""

import sys

import numpy as np

from jaxrft import cli, train

run = train.train


def held(array):
    """The array put together from this process's devices; NaN where they hold nothing."""
    whole = np.full(array.shape, np.nan, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def run_and_write(config):
    state = run(config)
    np.savez(sys.argv[1], **{name: held(array) for name, array in state.params.items()})
    return state


if __name__ == "__main__":
    train.train = run_and_write
    sys.exit(cli.main(sys.argv[2:]))
