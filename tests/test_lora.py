"""Adapters: what they add, that all compute with the same numbers, and a run that trains them and
nothing else.
"""

import json
import shutil
from functools import partial

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxrft import mesh as meshes
from jaxrft.config import EvalConfig, LoRAConfig, TasksConfig
from jaxrft.learn import update
from jaxrft.lm import model, rollout, weights
from jaxrft.lm.policy import lora_config, open_model
from jaxrft.train import export
from jaxrft.train.evaluate import evaluate_policy
from jaxrft.train.loop import train
from jaxrft.types import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
BASE = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
CONFIG = BASE._replace(lora=model.LoRA(3, 6.0, TARGETS))
POLICY, PLAIN = model.decoder(CONFIG, remat="none"), model.decoder(BASE, remat="none")
TASKS, GROUP, TIME = 8, 2, 5
KEY = jax.random.key(0)


def random(rows, seed):
    """Every weight random, B of the adapters too."""
    rng = np.random.default_rng(seed)
    draws = {row.name: rng.normal(row.constant, 0.25, row.shape) for row in rows}
    return {name: jnp.asarray(value, jnp.float32) for name, value in draws.items()}


@pytest.fixture(scope="module")
def frozen():
    return random(model.base(CONFIG), 0)


@pytest.fixture(scope="module")
def adapters():
    return random(model.adapters(CONFIG), 1)


@pytest.fixture(scope="module")
def prompts():
    """Prompts [B, P] with ragged lengths [B] and ids [B]."""
    rng = np.random.default_rng(0)
    return (
        rng.integers(2, 32, (TASKS, 4), np.int32),
        rng.integers(1, 5, TASKS, np.int32),
        np.arange(TASKS, dtype=np.int32),
    )


def merge_all(config, params):
    """The float32 parameters of the base, with the adapters added, a layer at a time as the decoder
    does.
    """

    def merged(row):
        parts = model.weight_factors(params, row.name)
        layers = [
            tuple(part[layer] for part in parts)
            for layer in range(config.num_layers if row.layered else 0)
        ]
        if not layers:
            return jnp.asarray(parts[0], jnp.float32)
        return jnp.stack([model.merge_lora(config, layer, jnp.float32) for layer in layers])

    return {row.name: merged(row) for row in model.base(config)}


@pytest.fixture(scope="module")
def merged(frozen, adapters):
    return jax.jit(partial(merge_all, CONFIG))(frozen | adapters)


def assert_close(got, want, atol=1e-5):
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=atol)


# What adapters are


def test_a_merge_by_hand():
    """[[1, 2], [3, 4]] + 4 / 2 * [[1, 0], [2, 1]] [[3, 5], [0, 1]], in float32 whatever the weight
    is kept in.
    """
    config = BASE._replace(lora=model.LoRA(2, 4.0, ("gate",)))
    w, a, b = (
        jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        jnp.array([[1.0, 0.0], [2.0, 1.0]]),
        jnp.array([[3.0, 5.0], [0.0, 1.0]]),
    )
    np.testing.assert_array_equal(
        model.merge_lora(config, (w, a, b), jnp.float32), [[7.0, 12.0], [15.0, 26.0]]
    )
    small = b * 2**-9  # 3 + 2 * 6 / 512 lies between the bfloat16 numbers 3.015625 and 3.03125
    got = model.merge_lora(config, (w.astype(jnp.bfloat16), a, small), jnp.float32)
    assert got[1, 0] == 3 + 12 / 512 and got.dtype == jnp.float32
    assert model.merge_lora(config, (w,), jnp.bfloat16).dtype == jnp.bfloat16


def test_fresh_adapters_are_those_of_peft():
    """A uniform between -+1 / sqrt(inputs), B zero; o's inputs are its heads."""
    wide = CONFIG._replace(hidden_size=64, intermediate_size=96, head_dim=16)
    fresh = jax.device_get(jax.jit(partial(model.draw, rows=model.adapters(wide)))(KEY))
    assert fresh.keys() == {f"{name}_lora_{factor}" for name in TARGETS for factor in "ab"}
    inputs = dict.fromkeys(TARGETS, 64) | {"o": 4 * 16, "down": 96}
    for name in TARGETS:
        a, b = (fresh[part] for part in model.adapter_names(name))
        bound = inputs[name] ** -0.5
        assert a.shape[-1] == b.shape[1] == 3 and not b.any()
        assert 0.95 * bound < np.abs(a).max() <= np.float32(bound)
        assert np.std(a) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_targets_alone_have_adapters():
    some = CONFIG._replace(lora=model.LoRA(2, 16.0, ("q", "down")))
    assert [row.name for row in model.adapters(some)] == [
        "q_lora_a",
        "q_lora_b",
        "down_lora_a",
        "down_lora_b",
    ]
    assert model.adapters(BASE) == () and model.table(BASE) == model.base(some)


# All compute with the same numbers


@pytest.fixture(scope="module")
def sampled(frozen, adapters, prompts):
    """A rollout with adapters, as runtime.generator does it."""

    @jax.jit
    def generate(params):
        options = {"num_generations": GROUP, "max_completion_length": TIME, "eos_ids": (0,)}
        return rollout.generate(POLICY, params, KEY, *prompts, **options)

    return generate(frozen | adapters)


@pytest.fixture(scope="module")
def batch(prompts, sampled):
    rng = np.random.default_rng(1)
    tokens, mask, logprobs = (
        x.reshape(TASKS, GROUP, TIME) for x in (sampled.tokens, sampled.mask, sampled.logprobs)
    )
    advantages = rng.normal(size=(TASKS, GROUP)).astype(np.float32)
    return jax.tree.map(np.asarray, update.Batch(*prompts[:2], tokens, mask, logprobs, advantages))


def test_rollout_learner_and_export_have_the_same_numbers(
    frozen, adapters, merged, prompts, sampled, tmp_path
):
    """To the last bit those of a plain decoder of the merged weights, so that ratios are as exact
    as without LoRA.
    """
    logprobs = {
        policy: jax.jit(partial(update.completion_logprobs, policy))(
            params, *prompts[:2], sampled.tokens
        )
        for policy, params in ((POLICY, frozen | adapters), (PLAIN, merged))
    }
    helpers.assert_same_bits(logprobs[POLICY], logprobs[PLAIN])
    assert_close(
        jnp.where(sampled.mask > 0, logprobs[POLICY][0] - sampled.logprobs, 0.0), 0.0, atol=1e-5
    )
    weights.save(tmp_path / "a", frozen | adapters, CONFIG, source=weights.hf_config(BASE))
    assert weights.read_config(tmp_path / "a") == BASE
    helpers.assert_same_bits(weights.load(tmp_path / "a", BASE), merged)


def make(policy, **sizes):
    sizes = {"mini_batch_size": TASKS, "micro_batch_size": TASKS * GROUP} | sizes
    return update.make(policy, **sizes, learning_rate=1e-3, max_grad_norm=1e9, kl_coef=0.1)


def gradient(state):
    """The gradient of the first update, from Adam's first moment (1 - 0.9) g."""
    return jax.tree.map(lambda x: x / 0.1, optax.tree_utils.tree_get(state, "mu"))


@pytest.fixture(scope="module")
def updated(frozen, adapters, batch):
    """(adapters, optimizer state, metrics) after an update; the frozen weights are the reference
    too.
    """
    learner = make(POLICY)
    return jax.jit(learner.step)(KEY, adapters, learner.init(adapters), batch, frozen, frozen)


@pytest.mark.slow
def test_the_gradient_of_adapters_follows_from_that_of_the_weight(
    frozen, adapters, merged, batch, updated
):
    """dA = alpha / rank dW B^T and dB = alpha / rank A^T dW, here by dW of a plain decoder of the
    merged weights.
    """
    learner = make(PLAIN)
    _, state, metrics = jax.jit(learner.step)(KEY, merged, learner.init(merged), batch, frozen)
    got, plain = gradient(updated[1]), gradient(state)
    assert got.keys() == adapters.keys()
    for name in TARGETS:
        a, b = (adapters[part] for part in model.adapter_names(name))
        rank, layers = 3, BASE.num_layers
        flat = plain[name].reshape(layers, a[0].size // rank, -1)  # [L, in, out]
        want_a = 2.0 * jnp.einsum("lio,lro->lir", flat, b.reshape(layers, rank, -1))
        want_b = 2.0 * jnp.einsum("lio,lir->lro", flat, a.reshape(layers, -1, rank))
        assert_close(
            [got[f"{name}_lora_a"], got[f"{name}_lora_b"]],
            [want_a.reshape(a.shape), want_b.reshape(b.shape)],
        )
    for name in metrics.keys() - {"grad_norm"}:
        assert_close(updated[2][name], metrics[name])
    assert metrics["kl"] > 0 and abs(metrics["approx_kl"]) < 1e-6


@pytest.mark.slow
def test_an_update_is_the_same_on_the_mesh(mesh, frozen, adapters, batch, updated):
    learner, where = make(POLICY, micro_batch_size=4), model.shardings(CONFIG, mesh)
    base, placed = (
        {name: jax.device_put(x, where[name]) for name, x in tree.items()}
        for tree in (frozen, adapters)
    )
    # embed over fsdp
    assert placed["q_lora_a"].sharding.shard_shape(placed["q_lora_a"].shape) == (2, 8, 3)
    # heads over model
    assert placed["q_lora_b"].sharding.shard_shape(placed["q_lora_b"].shape) == (2, 3, 2, 8)
    shardings = update.optimizer_shardings(learner, placed, meshes.sharding(mesh))
    state = jax.jit(learner.init, out_shardings=shardings)(placed)
    batch = jax.tree.map(
        lambda x: meshes.from_host(mesh, x, "batch", *(None,) * (x.ndim - 1)), batch
    )
    with jax.set_mesh(mesh):
        got = jax.jit(learner.step)(KEY, placed, state, batch, base, base)
    assert_close(got[0], updated[0], atol=1e-4)  # Adam's first step divides by the gradient
    assert_close(gradient(got[1]), gradient(updated[1]))
    others = [
        {name: x for name, x in each.items() if name != "update/utilization"}
        for each in (got[2], updated[2])
    ]
    assert_close(*others)


# Files


def test_adapters_are_stored_as_peft_does(adapters, tmp_path):
    """lora_A [rank, in] and lora_B [out, rank]; head h is entries h * head_dim on."""
    weights.save_adapters(tmp_path / "a", adapters, CONFIG, source="some/model@v2")
    stored, layer = (
        load_file(tmp_path / "a/adapter_model.safetensors"),
        "base_model.model.model.layers.1.",
    )
    assert len(stored) == 2 * 2 * len(TARGETS)
    np.testing.assert_array_equal(
        stored[layer + "self_attn.q_proj.lora_A.weight"], adapters["q_lora_a"][1].T
    )
    np.testing.assert_array_equal(
        stored[layer + "self_attn.q_proj.lora_B.weight"][10], adapters["q_lora_b"][1, :, 1, 2]
    )
    np.testing.assert_array_equal(
        stored[layer + "self_attn.o_proj.lora_A.weight"][:, 10], adapters["o_lora_a"][1, 1, 2]
    )
    np.testing.assert_array_equal(
        stored[layer + "mlp.down_proj.lora_B.weight"], adapters["down_lora_b"][1].T
    )
    keys = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (keys["r"], keys["lora_alpha"]) == (3, 6)
    assert (keys["base_model_name_or_path"], keys["revision"]) == ("some/model", "v2")
    names = ("down", "gate", "k", "o", "q", "up", "v")
    assert keys["target_modules"] == [f"{name}_proj" for name in names]


# Runs


@pytest.fixture(scope="module")
def configured(configure):
    """(output_dir, **changes) -> a short run with adapters, whose base is bfloat16."""
    return partial(configure, lora=LoRAConfig(rank=2, alpha=4.0), dtype="bfloat16", kl_coef=0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, configured):
    """(folder, final state) of six steps; leave the folder as it is."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return folder, train(configured(folder))


@pytest.mark.slow
def test_a_run_trains_adapters_and_nothing_else(trained, world, configured):
    folder, state = trained
    shape = helpers.SHAPE._replace(lora=lora_config(configured(folder)))
    assert state.params.keys() == {row.name for row in model.adapters(shape)}
    assert all(leaf.dtype == jnp.float32 and leaf.any() for leaf in state.params.values())
    lines = helpers.metrics(folder)
    assert lines[0]["kl"] == 0.0 and lines[-1]["kl"] > 0
    assert lines[-1]["reward"] > lines[0]["reward"]
    base = weights.load(world / "policy", helpers.SHAPE, dtype=jnp.bfloat16)
    want = merge_all(shape, base | jax.tree.map(np.asarray, state.params))
    assert_close(weights.load(folder / "policy", helpers.SHAPE), want, atol=1e-6)
    assert not np.array_equal(want["gate"], base["gate"]) and np.array_equal(
        want["embed"], base["embed"]
    )


@pytest.mark.slow
def test_exported_checkpoint_has_the_policy_and_the_adapters_of_the_end(trained, tmp_path):
    folder, _ = trained
    export.main(export.Options(str(folder), out=str(tmp_path / "new")))
    merged = (tmp_path / "new/model.safetensors").read_bytes()
    assert merged == (folder / "policy/model.safetensors").read_bytes()
    assert "library_name: peft\n" in (tmp_path / "new/adapter/README.md").read_text()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "new/adapter" / name).read_bytes() == (
            folder / "adapter" / name
        ).read_bytes()


@pytest.mark.slow
def test_checkpoint_of_adapters_is_refused_on_another_base(trained, tmp_path, world):
    folder, _ = trained
    other = helpers.write_policy(tmp_path / "other", spread=0.5)
    with pytest.raises(InputError, match="the adapters in .* are of another model than"):
        export.main(export.Options(str(folder), model=other))


@pytest.mark.slow
def test_the_merged_policy_is_evaluated_as_any_other(
    trained, world, configured, configure, tmp_path
):
    held_out = EvalConfig(
        (TasksConfig(str(world / "tasks.jsonl"), name="held_out"),), num_samples=0
    )
    policy = {"model": str(trained[0] / "policy"), "evaluation": held_out}
    found = evaluate_policy(configure(tmp_path, **policy))
    assert (
        found == evaluate_policy(configured(tmp_path, **policy))
        and found["eval/held_out/greedy"] > 0
    )


@pytest.mark.slow
def test_a_run_goes_on_as_if_nothing_had_happened(trained, configured, tmp_path):
    folder, state = trained
    again = shutil.copytree(folder, tmp_path / "again")
    for path in (again / "checkpoints/6", again / "policy", again / "adapter"):
        shutil.rmtree(path)  # as a kill after the checkpoint of step 3 leaves it
    helpers.assert_same_bits(train(configured(again)), state)
    assert helpers.metrics(again) == helpers.metrics(folder)
    for file in ("policy/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"lora": LoRAConfig(rank=3, alpha=4.0)},
            "its model's lora is rank 2, .* this run's is rank 3",
        ),
        (
            {"lora": LoRAConfig(), "kl_coef": 0.0},
            "its model's lora is rank 2, .* this run's is None",
        ),
        ({"dtype": "float32"}, "its model's dtype is 'bfloat16', this run's is 'float32'"),
    ],
)
def test_a_checkpoint_belongs_to_its_adapters(trained, configured, changes, told):
    with pytest.raises(InputError, match=told):
        train(configured(trained[0], **changes))


@pytest.mark.slow
def test_a_checkpoint_belongs_to_the_weights_below_its_adapters(
    trained, world, configured, tmp_path
):
    other = shutil.copytree(world / "policy", tmp_path / "other")
    params = weights.load(other, helpers.SHAPE)
    weights.save(other, params | {"up": params["up"] + 1.0}, helpers.SHAPE, source=other)
    with pytest.raises(
        InputError, match="its digest of the model's parameters is .* choose another output_dir"
    ):
        train(configured(trained[0], model=str(other)))


def test_a_base_in_bfloat16_has_no_float32_copy(configured, mesh, tmp_path):
    lm = open_model(configured(tmp_path), mesh)
    assert lm.frozen.keys() == {row.name for row in model.base(helpers.SHAPE)}
    assert all(leaf.dtype == jnp.bfloat16 for leaf in lm.frozen.values())
    assert all(leaf.dtype == jnp.float32 for leaf in lm.params.values())
