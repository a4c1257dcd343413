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
BOOST = np.uint32(2**32 - 1)  # stream of random bits that no round of rejection uses


@jax.jit
def random_bits(key: Array, counter: Array, stream: Array | np.uint32) -> tuple[Array, Array]:
    """Draws two random uint32 for every `counter` [...] uint32 of a `stream`.

    On CPUs `jax.random.bits` is a loop of passes over the memory. This is a single pass, which XLA
    fuses with its consumer. The bits of a few counters are computed without those of the others.
    """
    keys = jax.random.bits(key, (2,), jnp.uint32)  # whatever kind of key it is
    return threefry((keys[0], keys[1]), counter, jnp.broadcast_to(stream, counter.shape))


def threefry(key: tuple[Array, Array], x: Array, y: Array) -> tuple[Array, Array]:
    """Applies Threefry-2x32-20 to x, y [...] uint32.

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


def uniform(bits: Array) -> Array:
    """Maps a random uint32 to a float32 in (0, 1), one of 2^23 that are equally far apart."""
    return (bits >> np.uint32(9)).astype(jnp.float32) * (2 * SMALLEST) + SMALLEST


def normal(bits: Array) -> Array:
    """Maps a random uint32 to a standard normal float32, by the inverse error function."""
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(2 * uniform(bits) - 1)


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
    draw_shards = jax.shard_map(
        _beta_logit, in_specs=(PartitionSpec(), table, table, table), out_specs=table
    )
    return draw_shards(key, alpha, beta, counter)


def _beta_logit(key: Array, alpha: Array, beta: Array, counter: Array) -> Array:
    """Draws [N] by the random bits of these counters [N].

    All rows have two rounds of rejection sampling; rows still without a draw are gathered for more.
    """
    shapes = [
        jnp.where((x > 0) & (x < jnp.inf), x.astype(jnp.float32), jnp.nan) for x in (alpha, beta)
    ]
    raised = [jnp.where(x < 1, x + 1, x) - np.float32(1 / 3) for x in shapes]
    size = alpha.shape[0]
    few = -(-size // 128)  # at most one row in two hundred is left, where a is near 1

    def finish_some(state: tuple[Pair, Array]) -> tuple[Pair, Array]:
        draws, _ = state
        missing, rows = jax.lax.top_k(jnp.isnan(draws[0] + draws[1]).astype(jnp.float32), few)
        rows = jnp.where(missing > 0, rows, size)
        row_draws, d = (
            [x.at[rows].get(mode="fill", fill_value=1) for x in pair] for pair in (draws, raised)
        )

        def propose_again(state: tuple[Pair, Array]) -> tuple[Pair, Array]:
            row_draws, stream = state
            proposals = _propose(key, d, counter[rows], stream)
            return _fill_nan(row_draws, proposals), stream + np.uint32(2)

        unfinished = lambda state: jnp.isnan(state[0][0] + state[0][1]).any()  # noqa: E731
        row_draws, _ = jax.lax.while_loop(unfinished, propose_again, (row_draws, jnp.uint32(4)))
        draws = [x.at[rows].set(y, mode="drop") for x, y in zip(draws, row_draws, strict=True)]
        return draws, missing.min() > 0  # there may be more

    draws = _fill_nan(*(_propose(key, raised, counter, jnp.uint32(stream)) for stream in (0, 2)))
    is_first = jnp.ones_like(counter[0], dtype=bool)  # sharded as the loop's own result
    (first, second), _ = jax.lax.while_loop(lambda state: state[1], finish_some, (draws, is_first))
    boosts = [
        jnp.where(x < 1, jnp.log(uniform(bits)) / x, 0)
        for x, bits in zip(shapes, random_bits(key, counter, BOOST), strict=True)
    ]
    difference = 3 * (jnp.log1p(first) - jnp.log1p(second)) + boosts[0] - boosts[1]
    return jnp.log(raised[0] / raised[1]) + difference


def _fill_nan(first: Pair, second: Pair) -> Pair:
    """Takes the elements of the first, or of the second where those of the first are NaN."""
    return [jnp.where(jnp.isnan(x), y, x) for x, y in zip(first, second, strict=True)]


def _propose(key: Array, raised: Pair, counter: Array, stream: Array) -> Pair:
    """Draws proposals t for both Gamma draws; NaN where rejected.

    The random bits are those of `stream` and of the one after it. t is 0 where d is NaN, for which
    no proposal would ever be accepted.
    """

    def propose(d: Array, stream: Array) -> Array:
        first, second = random_bits(key, counter, stream)
        t = normal(first) * jax.lax.rsqrt(9 * d)
        accepted = uniform(second) < jnp.exp(3 * d * _remainder(t))
        return jnp.where(jnp.isnan(d), 0, jnp.where(accepted, t, jnp.nan))

    return [propose(raised[0], stream), propose(raised[1], stream + np.uint32(1))]


def _remainder(t: Array) -> Array:
    """Computes log(1 + t) - t + t^2 / 2 - t^3 / 3, which is never above 0.

    It is -infinity for t <= -1.
    """
    series = jnp.zeros_like(t)
    for power in range(11, 3, -1):
        series = series * t + np.float32((-1) ** (power + 1) / power)
    direct = jnp.log(jnp.maximum(1 + t, 0)) - t * (1 - t * (1 / 2 - t / 3))
    return jnp.where(jnp.abs(t) < 0.15, series * t**4, direct)
