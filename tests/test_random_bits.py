import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxrft.select.random_bits import beta_logit, random_bits, threefry

NUMBER = 20_000


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_matches_the_published_vectors(key, counter, expected):
    found = threefry(tuple(map(np.uint32, key)), *(np.full(3, x, np.uint32) for x in counter))
    assert [int(x[2]) for x in found] == list(expected)


def test_bits_of_some_counters_equal_those_of_all_for_any_key_type():
    counters = jnp.arange(100, dtype=jnp.uint32)
    key, few = jax.random.key(0, impl="rbg"), jnp.array([3, 70], jnp.uint32)
    every = random_bits(key, counters, np.uint32(1))
    assert all(
        np.array_equal(a, b[few])
        for a, b in zip(random_bits(key, few, np.uint32(1)), every, strict=True)
    )
    assert (
        len({int(x) for x in jnp.concatenate([*every, *random_bits(key, counters, np.uint32(2))])})
        == 400
    )


def test_logits_of_beta_draws_have_their_distribution():
    """By Kolmogorov and Smirnov, from nearly certain of nothing to nearly certain of everything."""
    sizes = [0.01, 0.3, 1.0, 1.5, 20.0, 1e3, 1e6]
    pairs = [(a, b) for a in sizes for b in sizes]
    alpha, beta = (jnp.repeat(jnp.array(x, jnp.float32), NUMBER) for x in zip(*pairs, strict=True))
    logits = np.asarray(beta_logit(jax.random.key(0), alpha, beta), np.float64).reshape(-1, NUMBER)
    assert np.isfinite(logits).all()
    chances = []
    for (a, b), x in zip(pairs, logits, strict=True):
        left, right = (
            special.betainc(a, b, special.expit(x)),
            1 - special.betainc(b, a, special.expit(-x)),
        )
        chances.append(stats.kstest(np.where(x < 0, left, right), "uniform").pvalue)
    assert min(chances) > 1e-4 and stats.kstest(chances, "uniform").pvalue > 1e-3


def test_invalid_parameters_draw_nan_without_delaying_others():
    alpha = jnp.array([1.0, jnp.nan, 0.0, -1.0, jnp.inf, 2.0])
    found = beta_logit(jax.random.key(0), alpha, jnp.ones(6))
    assert np.isnan(found).tolist() == [False, True, True, True, True, False]


def test_a_sharded_table_draws_the_same(mesh):
    alpha = jnp.linspace(0.1, 50, 64)
    alone = beta_logit(jax.random.key(0), alpha, alpha[::-1])
    with jax.set_mesh(mesh):
        rows = jax.device_put(alpha, jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        found = beta_logit(jax.random.key(0), rows, rows[::-1])
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
