"""Our decoder and our folders against transformers and torch, on random small checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrft.lm import model, weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
if int(transformers.__version__.split(".")[0]) < 5:
    ROPE = {"rope_theta": 5000.0}
EOS = [3, 5, 7]


def write(folder, dtype, **changes):
    """A random Qwen2 checkpoint by transformers, norms and biases random too."""
    limit = changes.pop("max_shard_size", "1GB")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPE | ROPE | changes)
    lm = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    lm.generation_config.eos_token_id = EOS
    lm.to(dtype).save_pretrained(folder, max_shard_size=limit)


def torch_logits(folder, tokens):
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return lm(torch.tensor(tokens)).logits.numpy(), lm.generation_config.eos_token_id


def our_logits(folder, tokens):
    config = weights.read_config(folder)
    params, policy = weights.load(folder, config), model.decoder(config)
    rows, time = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(time)[None], (rows, time))
    forward = jax.jit(lambda *x: policy.unembed(params, policy.apply(params, *x)[0]))
    return forward(jnp.asarray(tokens), positions, jnp.ones((rows, time), bool))


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (3, 17))


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {"tie_word_embeddings": True}),
        ("float32", {"tie_word_embeddings": False, "head_dim": 12}),
        ("bfloat16", {"tie_word_embeddings": True, "max_shard_size": "20KB"}),
        ("bfloat16", {"tie_word_embeddings": False}),
    ],
)
def test_logits_and_folders_agree_with_transformers(dtype, changes, tokens, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    write(source, getattr(torch, dtype), **changes)
    want, _ = torch_logits(source, tokens)
    np.testing.assert_allclose(our_logits(source, tokens), want, atol=1e-4)

    config = weights.read_config(source)
    assert config.tie_word_embeddings == changes["tie_word_embeddings"] and config.rope_theta == 5000.0
    params = weights.load(source, config)
    weights.save(saved, params, config, source=source, dtype=dtype, max_shard_size=15_000)
    assert len(list(saved.glob("*.safetensors"))) > 1
    before, after = stored(source), stored(saved)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    again, eos = torch_logits(saved, tokens)
    np.testing.assert_array_equal(again, want)
    assert eos == EOS
    keys = json.loads((source / "config.json").read_text())
    assert keys == json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_made_here_opens_in_transformers(tied, tokens, tmp_path):
    config = model.ModelConfig(96, 32, 48, 2, 4, 2, head_dim=12, rope_theta=500.0, tie_word_embeddings=tied)
    rows = model.table(config)
    keys = jax.random.split(jax.random.key(0), len(rows))
    params = {row.name: 0.3 * jax.random.normal(key, row.shape) for row, key in zip(rows, keys, strict=True)}
    weights.save(tmp_path / "a", params, config, source=weights.hf_config(config, eos_token_id=EOS))
    want, eos = torch_logits(tmp_path / "a", tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "a", tokens), want, atol=1e-4)
    assert eos == EOS
