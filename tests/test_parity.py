"""Our decoder and our folders against transformers and torch, on random small checkpoints."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrft.lm import embed, model, sampling, stop_strings, weights

tokenizers = pytest.importorskip("tokenizers")
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
EOS = [3, 5, 7]
# Of the four waves of head_dim 8 at rope_theta 5000 one is kept, two are in between and one is
# stretched.
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 0.1,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 64,
}


def rope(**scaling):
    """The keys of transformers' config classes."""
    if int(transformers.__version__.split(".")[0]) < 5:
        return {"rope_theta": 5000.0} | ({"rope_scaling": scaling} if scaling else {})
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0} | scaling}


QWEN2 = {"model_type": "qwen2"} | rope()
QWEN3 = {"model_type": "qwen3", "head_dim": 12} | rope()
LLAMA = {"model_type": "llama"} | rope(rope_type="llama3", **LLAMA3)


def write(folder, dtype, model_type, **changes):
    """A random checkpoint by transformers, norms and biases random too."""
    limit = changes.pop("max_shard_size", "1GB")
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **SHAPE | changes)
    )
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    lm.generation_config.eos_token_id = EOS
    lm.to(dtype).save_pretrained(folder, max_shard_size=limit)


def torch_logits(folder, tokens, **mask):
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        mask = {name: torch.tensor(value) for name, value in mask.items()}
        return lm(torch.tensor(tokens), **mask).logits.numpy(), lm.generation_config.eos_token_id


def our_logits(folder, tokens, lengths=None, prompt=None):
    """Logits [rows, time, V] of rows padded on the right; what follows a `prompt` is decoded from
    its cache.
    """
    config = weights.read_config(folder)
    params, policy = weights.load(folder, config), model.decoder(config)
    rows, time = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(time)[None], (rows, time))
    valid = positions < jnp.asarray([time] * rows if lengths is None else lengths)[:, None]
    batch = jnp.asarray(tokens), positions, valid

    @jax.jit
    def forward(batch):
        hidden, cache = policy.apply(params, *batch)
        return policy.unembed(params, hidden), cache

    if prompt is None:
        return forward(batch)[0]
    first, prefix = forward([x[:, :prompt] for x in batch])
    prepared = policy.prepare_weights(params), policy.prepare_prompts(prefix)
    decode = jax.jit(policy.decode)
    logits, cache = [first], policy.init_cache(rows, time - prompt)
    for t in range(prompt, time):
        found, cache = decode(
            *prepared, batch[0][:, t], positions[:, t], jnp.int32(t - prompt), cache
        )
        logits.append(found[:, None])
    return jnp.concatenate(logits, axis=1)


def adapted_logits(folder, adapter, tokens):
    """Logits of a checkpoint with an adapter on top, by peft."""
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return lm(torch.tensor(tokens)).logits.numpy()


def stored(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (3, 17))


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", QWEN2 | {"tie_word_embeddings": True}),
        ("float32", QWEN2 | {"tie_word_embeddings": False, "head_dim": 12}),
        ("bfloat16", QWEN2 | {"tie_word_embeddings": True, "max_shard_size": "20KB"}),
        ("bfloat16", QWEN2 | {"tie_word_embeddings": False}),
        ("float32", QWEN3 | {"tie_word_embeddings": True}),
        ("float32", QWEN3 | {"tie_word_embeddings": False, "attention_bias": True}),
        ("bfloat16", QWEN3 | {"tie_word_embeddings": False, "max_shard_size": "20KB"}),
        ("float32", LLAMA | {"tie_word_embeddings": True}),
        ("float32", LLAMA | {"tie_word_embeddings": False, "attention_bias": True}),
        ("bfloat16", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": None} | rope()),
    ],
)
def test_logits_and_folders_agree_with_transformers(dtype, changes, tokens, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    write(source, getattr(torch, dtype), **changes)
    want, _ = torch_logits(source, tokens)
    np.testing.assert_allclose(our_logits(source, tokens, prompt=9), want, atol=1e-4)
    lengths = [17, 5, 11]
    mask = np.arange(17)[None] < np.array(lengths)[:, None]
    padded, _ = torch_logits(source, tokens, attention_mask=mask.astype(int))
    np.testing.assert_allclose(our_logits(source, tokens, lengths)[mask], padded[mask], atol=1e-4)

    config = weights.read_config(source)
    assert (
        config.tie_word_embeddings == changes["tie_word_embeddings"] and config.rope_theta == 5000.0
    )
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


SMALL = model.ModelConfig(96, 32, 48, 2, 4, 2, head_dim=12, rope_theta=500.0)
PLAIN = SMALL._replace(attention_bias=False)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen2", SMALL._replace(tie_word_embeddings=True)),
        ("qwen2", SMALL),
        ("qwen3", PLAIN._replace(qk_norm=True)),
        ("qwen3", SMALL._replace(qk_norm=True, output_bias=True)),
        (
            "llama",
            PLAIN._replace(rope_scaling=model.RopeScaling(**LLAMA3), tie_word_embeddings=True),
        ),
        ("llama", SMALL._replace(output_bias=True)),
    ],
)
def test_a_decoder_made_here_opens_in_transformers(model_type, config, tokens, tmp_path):
    rows = model.table(config)
    keys = jax.random.split(jax.random.key(0), len(rows))
    params = {
        row.name: 0.3 * jax.random.normal(key, row.shape)
        for row, key in zip(rows, keys, strict=True)
    }
    keys = weights.hf_config(config, eos_token_id=EOS)
    assert keys["model_type"] == model_type
    weights.save(tmp_path / "a", params, config, source=keys)
    want, eos = torch_logits(tmp_path / "a", tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "a", tokens), want, atol=1e-4)
    assert eos == EOS


@pytest.mark.parametrize(
    ("model_type", "theta", "scaling"),
    [
        ("qwen2", 10_000.0, {}),
        ("qwen3", 1_000_000.0, {}),
        (
            "llama",
            500_000.0,
            LLAMA3
            | {"factor": 32.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        ),
    ],
)
def test_the_rope_frequencies_are_those_of_transformers(model_type, theta, scaling):
    keys = SHAPE | {"model_type": model_type, "head_dim": 128, "rope_theta": theta}
    if scaling:
        keys["rope_scaling"] = {"rope_type": "llama3"} | scaling
    lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**keys))
    ours = model.rope_frequencies(weights.model_config(keys, "keys"))
    np.testing.assert_allclose(ours, lm.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize("model_type", weights.FAMILIES)
def test_absent_keys_are_read_as_transformers_reads_them(model_type):
    keys = {
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 4096,
        "intermediate_size": 48,
    }
    keys |= {"num_hidden_layers": 1, "num_attention_heads": 64}
    theirs, ours = transformers.AutoConfig.for_model(**keys), weights.model_config(keys, "keys")
    lm = transformers.AutoModelForCausalLM.from_config(theirs)
    assert {row.hf.format(0): weights._stored_shape(row) for row in model.table(ours)} == {
        name: tuple(parameter.shape) for name, parameter in lm.named_parameters()
    }
    assert (
        ours.rms_norm_eps == theirs.rms_norm_eps
        and ours.tie_word_embeddings == theirs.tie_word_embeddings
    )
    np.testing.assert_allclose(
        model.rope_frequencies(ours), lm.model.rotary_emb.inv_freq.numpy(), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        (QWEN2, ("q", "k", "v", "o", "gate", "up", "down")),
        (QWEN3, ("v", "o")),
        (LLAMA, ("q", "down")),
    ],
)
def test_a_merged_policy_is_its_base_with_its_adapter(changes, targets, tokens, tmp_path):
    """In transformers and peft, of adapters that are far from fresh; and peft makes the very same
    kind of adapter.
    """
    base, merged, adapter = (tmp_path / name for name in ("base", "merged", "adapter"))
    write(base, torch.float32, **changes)
    config = weights.read_config(base)._replace(lora=model.LoRA(4, 6.0, targets))
    frozen, fresh = (
        weights.load(base, config),
        model.draw(jax.random.key(0), model.adapters(config)),
    )
    noise = model.draw(
        jax.random.key(1), tuple(row._replace(fan_in=4) for row in model.adapters(config))
    )
    params = frozen | {name: value + noise[name] for name, value in fresh.items()}
    weights.save(merged, params, config, source=base)
    weights.save_adapters(adapter, params, config, source=str(base))
    want = adapted_logits(base, adapter, tokens)
    np.testing.assert_allclose(torch_logits(merged, tokens)[0], want, atol=1e-4)
    np.testing.assert_allclose(our_logits(merged, tokens), want, atol=1e-4)
    assert np.abs(want - torch_logits(base, tokens)[0]).max() > 0.1

    peft, lm = pytest.importorskip("peft"), transformers.AutoModelForCausalLM.from_pretrained(base)
    names = [f"{name}_proj" for name in targets]
    theirs = peft.get_peft_model(
        lm, peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "theirs")
    shapes = [
        {name: x.shape for name, x in stored(folder).items()}
        for folder in (adapter, tmp_path / "theirs")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("changes", [QWEN2, QWEN3, LLAMA])
def test_the_mean_of_the_last_hidden_states_is_that_of_transformers(changes, tokens, tmp_path):
    write(tmp_path, torch.float32, **changes)
    lengths = np.array([len(tokens[0]) - 3 * i for i in range(len(tokens))], np.int32)
    lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = [
            lm(torch.tensor(row[None, :length]), output_hidden_states=True)
            .hidden_states[-1][0]
            .mean(0)
            .numpy()
            for row, length in zip(tokens, lengths, strict=True)
        ]
    config = weights.read_config(tmp_path)
    pooled = jax.jit(partial(embed.pooled, model.decoder(config)))
    ours = pooled(weights.load(tmp_path, config), jnp.asarray(tokens), jnp.asarray(lengths))
    np.testing.assert_allclose(ours, np.array(want), atol=1e-4)


@pytest.mark.parametrize("greedy", [False, True])
def test_the_distribution_drawn_from_is_that_of_the_logits_processors(greedy):
    """In the order in which `generate` of transformers applies them."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, (16, 96)).astype(np.float32)
    prompts = random.integers(0, 96, (16, 12)).astype(np.int32)
    options = {"top_k": 40, "top_p": 0.97, "min_p": 0.01, "temperature": 1.7}
    shared = {"repetition_penalty": 1.3}
    lm = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen2", **SHAPE)
    )
    chain = lm._get_logits_processor(
        transformers.GenerationConfig(
            do_sample=not greedy, **({} if greedy else options), **shared
        ),
        input_ids_seq_length=12,
        device="cpu",
    )
    want = torch.softmax(chain(torch.tensor(prompts), torch.tensor(logits)), dim=-1).numpy()
    seen = sampling.tokens_seen(jnp.asarray(prompts), jnp.full(16, 12), 96)
    found = sampling.penalize(jnp.asarray(logits), seen, **shared)
    if not greedy:
        temperature = options.pop("temperature")
        found = sampling.truncate(found / temperature, **options)
        assert 1 < np.isfinite(found).sum(axis=1).min() < 40
    np.testing.assert_allclose(jax.nn.softmax(found), want, atol=1e-6)


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_is_that_of_transformers(min_p):
    logits = np.random.default_rng(1).normal(0, 2, (64, 50)).astype(np.float32)
    want = transformers.MinPLogitsWarper(min_p)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(sampling.truncate(jnp.asarray(logits), min_p=min_p), want)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    random = np.random.default_rng(2)
    logits = random.normal(0, 2, (8, 50)).astype(np.float32)
    tokens = random.integers(0, 50, (8, 20)).astype(np.int32)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    want = processor(torch.tensor(tokens, dtype=torch.int64), torch.tensor(logits)).numpy()
    seen = sampling.tokens_seen(jnp.asarray(tokens), jnp.full(8, 20), 50)
    found = sampling.penalize(jnp.asarray(logits), seen, repetition_penalty=penalty)
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_stop_strings_end_where_those_of_transformers_do():
    """Of random tokens, one after another."""
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, show_progress=False)
    tokens.train_from_iterator(["abab baab\n\nabba é", "b\nab a\nbab"], trainer)
    text = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens)
    stop = ("ab\n", "baab", "é", "a b")
    matcher = stop_strings.of_tokenizer(text, len(text), stop)
    criteria = transformers.StopStringCriteria(text, list(stop))
    rows = np.random.default_rng(3).integers(0, len(text), (200, 8))
    states = np.zeros(200, np.int32)
    running = np.ones(200, bool)
    count = 0
    for time in range(8):
        states = np.asarray(stop_strings.advance(matcher, states, rows[:, time]))
        ended = states == matcher.moves.shape[1] - 1
        want = criteria(torch.tensor(rows[:, : time + 1]), None).numpy()
        np.testing.assert_array_equal(ended[running], want[running])
        count += ended[running].sum()
        running &= ~ended
    assert 20 < count < 200
