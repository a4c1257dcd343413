"""Random numbers for whole tables: as good as those of `jax.random`, and on CPUs many times
faster.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrft.mesh import shards, spec
from jaxrft.types import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
SMALLEST = np.float32(2**-24)
Pair = list[Array]  # of the two Gamma draws, [N] each
BOOST = np.uint32(2**32 - 1)  # counter of the words that no round uses


@jax.jit
def random_bits(key: Array, counter: Array, stream: Array | np.uint32) -> tuple[Array, Array]:
    """Draws two random uint32 for every `counter` [...] uint32 of a `stream`.

    On CPUs `jax.random.bits` is a loop of passes over the memory. This is a single pass, part of
    whatever it is used in. It computes the words of a few counters without those of the others.
    """
    keys = jax.random.bits(key, (2,), jnp.uint32)  # whatever kind of key it is
    return threefry((keys[0], keys[1]), counter, jnp.broadcast_to(stream, counter.shape))


def threefry(key: tuple[Array, Array], x: Array, y: Array) -> tuple[Array, Array]:
    """Applies Threefry-2x32-20 to the words x, y [...] uint32.

    [Salmon et al. 2011, doi 10.1145/2063384.2063405]
    """
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x = x + keys[0]
    y = y + keys[1]
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation)))
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def uniform(word: Array) -> Array:
    """Maps a random uint32 to a float32 in (0, 1), one of 2^23 that are equally far apart."""
    return (word >> np.uint32(9)).astype(jnp.float32) * (2 * SMALLEST) + SMALLEST


def normal(word: Array) -> Array:
    """Maps a random uint32 to a standard normal float32, by the inverse error function."""
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(2 * uniform(word) - 1)


@jax.jit
def beta_logit(key: Array, alpha: Array, beta: Array) -> Array:
    """Draws from Beta(alpha, beta) [N], and returns the logits [N], float32.

    A logit is log G(alpha) - log G(beta), where G are Gamma draws.

    Exact, by rejection [Marsaglia and Tsang 2000, doi 10.1145/358407.358414]: with d = a - 1/3, t =
    x / sqrt(9 d) for a normal x and h = 3 d (log(1 + t) - t + t^2 / 2 - t^3 / 3), which is their
    0.5 x^2 + d - d v + d log v without its cancellations, d (1 + t)^3 is accepted with chance
    exp(h) as a Gamma draw. Of a < 1, it is drawn for a + 1 and multiplied by U^(1/a). NaN where a
    parameter is not positive and finite. The same on any mesh.
    """
    counter = jnp.arange(alpha.shape[0], dtype=jnp.uint32)
    count = shards(jax.sharding.get_abstract_mesh(), "task")
    table = spec("task")
    if count == 1 or alpha.shape[0] % count:
        return _beta_logit(key, alpha, beta, counter)
    own = jax.shard_map(
        _beta_logit, in_specs=(PartitionSpec(), table, table, table), out_specs=table
    )
    return own(key, alpha, beta, counter)


def _beta_logit(key: Array, alpha: Array, beta: Array, counter: Array) -> Array:
    """Draws [N] by the words of these counters [N]: two tries of all, and more, apart, of those
    still without.
    """
    shapes = [
        jnp.where((x > 0) & (x < jnp.inf), x.astype(jnp.float32), jnp.nan) for x in (alpha, beta)
    ]
    raised = [jnp.where(x < 1, x + 1, x) - np.float32(1 / 3) for x in shapes]
    size = alpha.shape[0]
    few = -(-size // 128)  # one in two hundred at most, where a is near 1

    def again(state: tuple[Pair, Array]) -> tuple[Pair, Array]:
        tries, _ = state
        missing, rows = jax.lax.top_k(jnp.isnan(tries[0] + tries[1]).astype(jnp.float32), few)
        rows = jnp.where(missing > 0, rows, size)
        mine, d = (
            [x.at[rows].get(mode="fill", fill_value=1) for x in pair] for pair in (tries, raised)
        )

        def once_more(state: tuple[Pair, Array]) -> tuple[Pair, Array]:
            mine, number = state
            return _either(mine, _tries(key, d, counter[rows], number)), number + np.uint32(2)

        unfinished = lambda state: jnp.isnan(state[0][0] + state[0][1]).any()  # noqa: E731
        mine, _ = jax.lax.while_loop(unfinished, once_more, (mine, jnp.uint32(4)))
        tries = [x.at[rows].set(y, mode="drop") for x, y in zip(tries, mine, strict=True)]
        return tries, missing.min() > 0  # there may be more

    tries = _either(*(_tries(key, raised, counter, jnp.uint32(number)) for number in (0, 2)))
    begin = jnp.ones_like(counter[0], dtype=bool)  # of this shard, as what follows
    (first, second), _ = jax.lax.while_loop(lambda state: state[1], again, (tries, begin))
    boosts = [
        jnp.where(x < 1, jnp.log(uniform(word)) / x, 0)
        for x, word in zip(shapes, random_bits(key, counter, BOOST), strict=True)
    ]
    moved = 3 * (jnp.log1p(first) - jnp.log1p(second)) + boosts[0] - boosts[1]
    return jnp.log(raised[0] / raised[1]) + moved


def _either(first: Pair, second: Pair) -> Pair:
    """Takes the elements of the first, or of the second where those of the first are NaN."""
    return [jnp.where(jnp.isnan(x), y, x) for x, y in zip(first, second, strict=True)]


def _tries(key: Array, raised: Pair, counter: Array, number: Array) -> Pair:
    """Draws candidates t for both Gamma draws; NaN where rejected.

    The words are those of two streams, from `number` on. t is 0 where d is NaN, for which no
    candidate would ever be accepted.
    """

    def once(d: Array, number: Array) -> Array:
        first, second = random_bits(key, counter, number)
        t = normal(first) * jax.lax.rsqrt(9 * d)
        accepted = uniform(second) < jnp.exp(3 * d * _remainder(t))
        return jnp.where(jnp.isnan(d), 0, jnp.where(accepted, t, jnp.nan))

    return [once(raised[0], number), once(raised[1], number + np.uint32(1))]


def _remainder(t: Array) -> Array:
    """Computes log(1 + t) - t + t^2 / 2 - t^3 / 3, which is never above 0.

    It is -infinity for t <= -1.
    """
    series = jnp.zeros_like(t)
    for power in range(11, 3, -1):
        series = series * t + np.float32((-1) ** (power + 1) / power)
    direct = jnp.log(jnp.maximum(1 + t, 0)) - t * (1 - t * (1 / 2 - t / 3))
    return jnp.where(jnp.abs(t) < 0.15, series * t**4, direct)
