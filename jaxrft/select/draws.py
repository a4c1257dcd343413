"""Random numbers for whole tables: as good as those of `jax.random`, and on CPUs many times faster."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.types import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
SMALLEST = np.float32(2**-24)
BOOST = np.uint32(2**32 - 1)  # counter of the words that no round uses


@jax.jit
def words(key: Array, counter: Array, stream: Array | np.uint32) -> tuple[Array, Array]:
    """Two random uint32 for every `counter` [...] uint32 of a `stream`.

    On CPUs `jax.random.bits` is a loop of passes over the memory. This is a single one, part of whatever it is used in,
    and tells the words of a few counters without those of the others.
    """
    keys = jax.random.bits(key, (2,), jnp.uint32)  # whatever kind of key it is
    return threefry((keys[0], keys[1]), counter, jnp.broadcast_to(stream, counter.shape))


def threefry(key: tuple[Array, Array], x: Array, y: Array) -> tuple[Array, Array]:
    """Threefry-2x32-20 of the words x, y [...] uint32 [Salmon et al. 2011, doi 10.1145/2063384.2063405]."""
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x, y = x + keys[0], y + keys[1]
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation)))
        x, y = x + keys[(block + 1) % 3], y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def uniform(word: Array) -> Array:
    """Float32 in (0, 1), all of 2^23 equally far apart."""
    return (word >> np.uint32(9)).astype(jnp.float32) * (2 * SMALLEST) + SMALLEST


def normal(word: Array) -> Array:
    """Float32, standard normal."""
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(2 * uniform(word) - 1)


@jax.jit
def beta_logit(key: Array, alpha: Array, beta: Array) -> Array:
    """Logits [N], float32, of draws from Beta(alpha, beta) [N]: log G(alpha) - log G(beta), G Gamma draws.

    Exact, by rejection [Marsaglia and Tsang 2000, doi 10.1145/358407.358414]: with d = a - 1/3, t = x / sqrt(9 d) for a
    normal x and h = 3 d (log(1 + t) - t + t^2 / 2 - t^3 / 3), which is their 0.5 x^2 + d - d v + d log v without its
    cancellations, d (1 + t)^3 is accepted with chance exp(h) as a Gamma draw. Of a < 1, it is drawn for a + 1 and
    multiplied by U^(1/a). What was not accepted is tried again, all tasks side by side, some five times.
    NaN where a parameter is not positive and finite.
    """
    counter = jax.lax.iota(jnp.uint32, alpha.size).reshape(alpha.shape)
    shapes = [jnp.where((x > 0) & (x < jnp.inf), x.astype(jnp.float32), jnp.nan) for x in (alpha, beta)]
    raised = [jnp.where(x < 1, x + 1, x) - np.float32(1 / 3) for x in shapes]

    def once(d: Array, number: Array) -> Array:  # -> t, NaN where rejected
        first, second = words(key, counter, number)
        t = normal(first) * jax.lax.rsqrt(9 * d)
        return jnp.where(uniform(second) < jnp.exp(3 * d * _remainder(t)), t, jnp.nan)

    def again(tries: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        first, second, number = tries
        first = jnp.where(jnp.isnan(first), once(raised[0], number), first)
        second = jnp.where(jnp.isnan(second), once(raised[1], number + np.uint32(1)), second)
        return first, second, number + np.uint32(2)

    nothing = jnp.full_like(raised[0], jnp.nan)
    possible = ~jnp.isnan(raised[0] + raised[1])
    first, second, _ = jax.lax.while_loop(
        lambda tries: (jnp.isnan(tries[0] + tries[1]) & possible).any(), again, (nothing, nothing, jnp.uint32(0))
    )
    boosts = [
        jnp.where(x < 1, jnp.log(uniform(word)) / x, 0)
        for x, word in zip(shapes, words(key, counter, BOOST), strict=True)
    ]
    moved = 3 * (jnp.log1p(first) - jnp.log1p(second)) + boosts[0] - boosts[1]
    return jnp.log(raised[0] / raised[1]) + moved


def _remainder(t: Array) -> Array:
    """log(1 + t) - t + t^2 / 2 - t^3 / 3, never above 0, and -infinity from t = -1 down."""
    series = jnp.zeros_like(t)
    for power in range(11, 3, -1):
        series = series * t + np.float32((-1) ** (power + 1) / power)
    direct = jnp.log(jnp.maximum(1 + t, 0)) - t * (1 - t * (1 / 2 - t / 3))
    return jnp.where(jnp.abs(t) < 0.15, series * t**4, direct)
