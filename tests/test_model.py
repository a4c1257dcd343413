from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import mesh as meshes
from jaxrft.lm import attention, model
from jaxrft.types import InputError

# head_dim is not hidden_size / num_heads
CONFIG = model.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
POLICY = model.decoder(CONFIG)
ROWS, TIME = 4, 8


def random_params(config=CONFIG, seed=0):
    """Parameters whose norms and biases are random too, so that a wrong one shows."""
    key_init, key_noise = jax.random.split(jax.random.key(seed))
    params = model.init(key_init, config)
    keys = jax.random.split(key_noise, len(params))
    return {
        name: value + 0.1 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }


@pytest.fixture(scope="module")
def params():
    return random_params()


@jax.jit
def logits(params, tokens, positions, valid):
    return POLICY.unembed(params, POLICY.apply(params, tokens, positions, valid)[0])


def batch(seed=1):
    """Tokens [ROWS, TIME], their positions, all valid."""
    tokens = jax.random.randint(jax.random.key(seed), (ROWS, TIME), 0, CONFIG.vocab_size)
    return (
        tokens,
        jnp.broadcast_to(jnp.arange(TIME)[None], (ROWS, TIME)),
        jnp.ones((ROWS, TIME), bool),
    )


VARIANTS = [
    CONFIG,
    CONFIG._replace(tie_word_embeddings=True),
    CONFIG._replace(attention_bias=False, tie_word_embeddings=True),
    CONFIG._replace(output_bias=True, qk_norm=True),
    CONFIG._replace(lora=model.LoRA(3, 6.0, ("k", "o", "down"))),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_the_table_agrees_with_itself_and_with_the_rules(config):
    rows = model.table(config)
    params = jax.eval_shape(partial(model.init, config=config), jax.random.key(0))
    assert (
        len({row.name for row in rows}) == len({row.hf for row in rows}) == len(rows) == len(params)
    )
    sizes = {
        "vocab": {config.vocab_size},
        "embed": {config.hidden_size},
        "mlp": {config.intermediate_size},
        "layer": {config.num_layers},
        "heads": {config.num_heads},
        "kv_heads": {config.num_kv_heads},
        "head": {config.head_dim},
        "rank": {3},
    }
    for row in rows:
        assert len(row.shape) == len(row.axes), row
        assert set(row.axes) <= set(meshes.RULES), row
        assert all(size in sizes[axis] for size, axis in zip(row.shape, row.axes, strict=True)), row
        assert row.layered == ("{}" in row.hf) == (row.shape[0] == config.num_layers), row
        assert params[row.name].shape == row.shape and params[row.name].dtype == jnp.float32


def test_init_has_variance_one_over_fan_in():
    wide = CONFIG._replace(hidden_size=256)
    params = model.init(jax.random.key(0), wide)
    for row in model.table(wide):
        if row.fan_in is None:
            assert jnp.all(params[row.name] == row.constant)
        else:
            assert float(jnp.std(params[row.name])) == pytest.approx(row.fan_in**-0.5, rel=0.05), (
                row.name
            )


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, 4.0]])  # rms = sqrt(12.5)
    out = model.rms_norm(x, jnp.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(out, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)


def test_qk_norm_by_hand():
    """Queries and keys (3, 4), of rms sqrt(12.5), are scaled and then rotated, a quarter turn;
    values stay.
    """
    config = CONFIG._replace(
        hidden_size=2, num_heads=1, num_kv_heads=1, head_dim=2, attention_bias=False, qk_norm=True
    )
    identity = jnp.eye(2)[:, None]
    w = {
        "q": identity,
        "k": identity,
        "v": identity,
        "q_norm": jnp.array([1.0, 2.0]),
        "k_norm": jnp.array([1.0, 0.5]),
    }
    turn = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))  # cosine, sine
    q, k, v = model._project(config._replace(rms_norm_eps=0.0), w, jnp.array([[[3.0, 4.0]]]), turn)
    np.testing.assert_allclose(q.ravel(), [-8 / 12.5**0.5, 3 / 12.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(k.ravel(), [-2 / 12.5**0.5, 3 / 12.5**0.5], rtol=1e-6)
    np.testing.assert_array_equal(v.ravel(), [3.0, 4.0])


def test_rope_frequencies_by_hand():
    """Waves of 2 pi, 20 pi and 200 pi positions; of 100, those below 25 are kept and those above
    100 stretched by 8.

    The middle one turns 100 / 20 pi = 1.59155 times in 100, (1.59155 - 1) / (4 - 1) = 0.197183 of
    the way from 1 to 4: 0.197183 * 0.1 + 0.802817 * 0.1 / 8 = 0.0297535.
    """
    config = CONFIG._replace(head_dim=6, rope_theta=1000.0)
    frequencies = model.rope_frequencies(config)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01], rtol=1e-6)
    scaled = model.rope_frequencies(
        config._replace(rope_scaling=model.RopeScaling(8.0, 1.0, 4.0, 100))
    )
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [1.0, 0.0297535, 0.00125], rtol=1e-5)


def test_attention_by_hand():
    """The second query, two keys: scores ln 3 and 0 give weights 3/4 and 1/4; a later position
    weighs nothing.
    """
    keys = jnp.array([jnp.log(3.0), 0.0, 50.0]).reshape(1, 3, 1, 1)
    values = jnp.array([4.0, 8.0, 1000.0]).reshape(1, 3, 1, 1)
    source = attention.Cache(keys, values, jnp.array([[0, 1, 2]]))
    out = attention.attend(jnp.ones((1, 3, 1, 1)), source.positions, source)
    np.testing.assert_allclose(out.ravel()[1], 5.0, rtol=1e-6)


def test_blocks_of_queries_change_no_number(monkeypatch):
    """Eight queries of two samples, whose keys are their prompt's and their own, in blocks of
    three.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    q, own, shared = (
        jax.random.normal(k, (r, 8, h, 4))
        for k, r, h in zip(keys, (2, 2, 1), (4, 2, 2), strict=True)
    )
    time = jnp.arange(8)[None]
    positions = jnp.concatenate([time + 5, time + 2])
    prompt = attention.Cache(shared, shared[::-1] + 1, jnp.where(time < 5, time, attention.PADDED))

    def gradient(queries):
        monkeypatch.setattr(attention, "QUERIES", queries)

        def loss(q, own):
            out = attention.attend(
                q, positions, attention.Cache(own, jnp.cos(own), positions), prompt
            )
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(q, own)

    chex.assert_trees_all_close(gradient(3), gradient(8), rtol=1e-7, atol=1e-6)


def test_a_later_token_changes_nothing_before_it(params):
    tokens, positions, valid = batch()
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % CONFIG.vocab_size)
    before, after = (
        logits(params, tokens, positions, valid),
        logits(params, changed, positions, valid),
    )
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("kind", [attention.LayerCache, attention.TpuLayerCache])
def test_cached_decode_equals_the_full_forward(params, kind):
    """Two prompts as prefix, two samples each decoded token by token from a cache."""
    policy = model.decoder(CONFIG, kind=kind)
    prompt, group = 5, 2
    tokens, positions, valid = batch()
    tokens = jnp.concatenate(
        [jnp.repeat(tokens[::group, :prompt], group, axis=0), tokens[:, prompt:]], axis=1
    )
    want = logits(params, tokens, positions, valid)

    first = (tokens[::group, :prompt], positions[::group, :prompt], valid[::group, :prompt])
    hidden, prefix = jax.jit(POLICY.apply)(params, *first)
    np.testing.assert_allclose(POLICY.unembed(params, hidden), want[::group, :prompt], atol=1e-4)
    cache = policy.init_cache(ROWS, TIME - prompt + 2)  # two slots more than are used
    prepared = jax.jit(policy.prepare_weights)(params), policy.prepare_prompts(prefix)
    step = jax.jit(policy.decode)
    for t in range(prompt, TIME):
        got, cache = step(*prepared, tokens[:, t], positions[:, t], jnp.int32(t - prompt), cache)
        np.testing.assert_allclose(got, want[:, t], atol=1e-4)


def test_left_padding_equals_right_padding(params):
    length = 5
    tokens, positions, valid = batch()
    want = logits(params, tokens, positions, valid)[:, :length]
    right = logits(params, tokens, positions, positions < length)
    left = TIME - length
    shifted = jnp.maximum(positions - left, 0)
    got = logits(params, jnp.roll(tokens, left, axis=1), shifted, positions >= left)
    np.testing.assert_allclose(right[:, :length], want, atol=1e-5)
    np.testing.assert_allclose(got[:, left:], want, atol=1e-5)
    assert np.all(np.isfinite(got))


@pytest.mark.slow
def test_sharded_forward_and_gradient_equal_one_device(mesh, params):
    tokens, positions, valid = batch()

    def loss(params, tokens, positions, valid):
        out = logits(params, tokens, positions, valid)
        return jnp.mean(jax.nn.logsumexp(out, axis=-1)), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    want_gradient, want = gradient(params, tokens, positions, valid)
    placed = jax.device_put(params, model.shardings(CONFIG, mesh))
    data = [
        meshes.from_host(mesh, np.asarray(x), "batch", None) for x in (tokens, positions, valid)
    ]
    with jax.set_mesh(mesh):
        got_gradient, got = gradient(placed, *data)
    # embed and heads are split
    assert len(placed["q"].addressable_shards[0].data.ravel()) == params["q"].size // 4
    assert got.sharding.shard_shape(got.shape) == (ROWS // 4, TIME, CONFIG.vocab_size // 2)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for name in params:
        np.testing.assert_allclose(got_gradient[name], want_gradient[name], atol=1e-5, err_msg=name)


def test_bfloat16_arithmetic_is_near_float32(params):
    arguments = (params, *batch())
    policy = model.decoder(CONFIG, dtype=jnp.bfloat16, remat="none")
    hidden, cache = jax.jit(policy.apply)(*arguments)
    out = policy.unembed(params, hidden)
    assert hidden.dtype == cache.keys.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    np.testing.assert_allclose(out, logits(*arguments), atol=0.2)


def test_a_mesh_that_does_not_divide_the_decoder_is_refused(mesh):
    with pytest.raises(InputError, match="num_key_value_heads 3 .*model=2.*multiple of 2"):
        model.shardings(CONFIG._replace(num_heads=6, num_kv_heads=3), mesh)


@pytest.mark.parametrize("remat", model.REMATS)
def test_rematerialization_changes_no_gradient(params, remat):
    """To the rounding of the order in which a compiler sums."""
    tokens = jnp.arange(24).reshape(2, 12) % CONFIG.vocab_size
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

    def gradient(remat):
        policy = model.decoder(CONFIG, remat=remat)

        def loss(params):
            hidden, _ = policy.apply(params, tokens, positions, positions >= 0)
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(gradient(remat), gradient("full"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "head_dim", "kind"),
    [
        ("tpu", 128, attention.TpuLayerCache),
        ("tpu", 64, attention.LayerCache),
        ("cpu", 128, attention.LayerCache),
        ("gpu", 128, attention.LayerCache),
    ],
)
def test_only_heads_that_fill_a_tpus_tiles_have_slots_before_head_dim(platform, head_dim, kind):
    assert attention.cache_of(platform, head_dim) is kind
