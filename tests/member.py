"""One process of several: trains by a config, then writes the parameters as its own devices hold them."""

import sys

import numpy as np

from jaxrft import config, train


def held(array):
    """The array put together from this process's devices; NaN where they hold nothing."""
    whole = np.full(array.shape, np.nan, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = shard.data
    return whole


if __name__ == "__main__":
    state = train.train(config.load(sys.argv[1]))
    np.savez(sys.argv[2], **{name: held(array) for name, array in state.params.items()})
