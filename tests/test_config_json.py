"""What of a config.json is read, what is refused, and what an export says of its tensors."""

import json
import logging

import pytest

from jaxrft.lm import config_json, model, published, weights
from jaxrft.types import InputError

SHAPE = model.ModelConfig(
    64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, attention_bias=False
)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA = config_json.hf_config(SHAPE) | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}
QWEN2 = config_json.hf_config(SHAPE._replace(attention_bias=True))
BIG = 10**400
VALUES = (
    "null",
    '"x"',
    "-1",
    "5",
    "[]",
    "{}",
    "1e400",
    "true",
    "0",
    '["x"]',
    '{"a": {}}',
    f"{BIG}",
)


def read(folder, text):
    (folder / "config.json").write_text(text)
    return weights.read_config(folder)


@pytest.mark.parametrize("keys", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize(
    "key", sorted({*config_json.KINDS, *config_json.ROPE_KEYS, "is_causal", "pad_token_id"})
)
def test_value_of_any_type_is_taken_or_refused_in_one_sentence(key, keys, tmp_path):
    for value in VALUES:
        text = json.dumps(keys | {key: "@"}).replace('"@"', value)
        try:
            config = read(tmp_path, text)
        except InputError as error:
            assert key in str(error).replace("rope type", key) or "sliding window" in str(error)
            assert "config.json" in str(error) and "\n" not in str(error) and len(str(error)) < 400
        else:
            hash(config)
            assert (
                config.head_dim > 0
                and config.num_heads % config.num_kv_heads == 0
                and config.rope_theta > 0
            )


@pytest.mark.parametrize("key", sorted(config_json.ROPE_KINDS))
def test_setting_of_rotary_embeddings_of_any_type_is_taken_or_refused(key, tmp_path):
    for value in VALUES:
        rope = LLAMA3 | {"rope_type": "llama3", "rope_theta": 1e4, key: "@"}
        text = json.dumps(LLAMA | {"rope_scaling": rope}).replace('"@"', value)
        try:
            read(tmp_path, text)
        except InputError as error:
            assert "config.json" in str(error) and ("rope" in str(error) or key in str(error))
        else:
            assert value == "5" or (key, value) == ("type", '"x"')  # which rope_type goes before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "rope_theta is None: it must be a positive number$"),
        ({"layer_types": 5}, "layer_types is 5: it must be a list of strings or null$"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types names 1 layers, but num_hidden_layers is 2",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4 and num_key_value_heads 3: the first must be a multiple",
        ),
        ({"head_dim": 15}, "head_dim is 15: it must be even"),
        ({"hidden_size": True}, "hidden_size is True: it must be a positive whole number"),
        ({"eos_token_id": ["x"]}, r"eos_token_id is \['x'\]: it must be a token id"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type is 3: it must be a string"),
        (
            {"rope_scaling": {"rope_theta": 5e3}},
            "rope_theta is 10000.0, but rope_scaling.rope_theta 5000.0: keep one",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not",
        ),
        (
            {
                "rope_scaling": LLAMA3 | {"type": "llama3"},
                "rope_parameters": {"rope_type": "default"},
            },
            "rope_scaling and rope_parameters say different things: keep one",
        ),
        (
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1.0}},
            "low_freq_factor is 1.0 and high_freq_factor 1.0: the first must be the smaller",
        ),
        (
            {
                "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
                "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings 32 is not supported, only 64",
        ),
    ],
)
def test_wrong_value_is_named_with_its_key_and_what_it_must_be(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(tmp_path, json.dumps(LLAMA | change))


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("is_causal", True, False),
        ("use_bidirectional_attention", False, True),
        ("attn_logit_softcapping", None, 50.0),
        ("final_logit_softcapping", None, 30.0),
        ("logit_scale", 1.0, 0.0625),
        ("logits_scaling", 1, 8.0),
        ("embedding_multiplier", 1.0, 12.0),
        ("residual_multiplier", 1.0, 0.22),
        ("attention_multiplier", 0.25, 0.0625),
        ("query_pre_attn_scalar", 16, 256),
        ("partial_rotary_factor", 1.0, 0.75),
        ("rotary_pct", 1.0, 0.25),
        ("rope_interleaved", False, True),
        ("no_rope_layers", [1, 1], [1, 0]),
        ("qk_norm", False, True),
        ("use_qk_norm", None, True),
        ("qkv_bias", False, True),
        ("clip_qkv", None, 8.0),
        ("num_experts", 0, 8),
        ("num_local_experts", None, 8),
        ("mlp_bias", False, True),
        ("per_layer_config", None, {"0": {"head_dim": 8}}),
        ("norm_type", "RMSNorm", "layernorm"),
        ("hidden_activation", "silu", "gelu_pytorch_tanh"),
        ("activation", "swiglu", "geglu"),
        ("hidden_act", "silu", "swiglu"),
        ("position_embedding_type", "rope", "alibi"),
        ("attention_chunk_size", None, 8192),
        ("use_mrope", False, True),
        ("scale_emb", 1, 12),
        ("use_parallel_residual", False, True),
    ],
)
def test_keys_that_change_the_mathematics_are_refused_unless_they_change_nothing(
    key, same, other, tmp_path, caplog
):
    assert read(tmp_path, json.dumps(LLAMA | {key: same})) == SHAPE
    assert not caplog.records
    with pytest.raises(InputError, match=f"config.json: {key} .* is not supported, only "):
        read(tmp_path, json.dumps(LLAMA | {key: other}))


def test_unread_keys_are_named_in_one_warning(tmp_path, caplog):
    keys = {
        "flux_capacity": 1.21,
        "attention_dropout": 0.1,
        "auto_map": {"AutoModel": "x.Y"},
        "sliding_window": 4096,
    }
    keys |= {"architectures": ["LlamaForSequenceClassification"], "resid_pdrop": 0.0, "empty": None}
    keys |= {
        "rope_parameters": {"rope_theta": 1e4, "factor": 4.0},
        "quantization_config": {"quant_method": "gptq"},
    }
    for _ in range(2):
        assert read(tmp_path, json.dumps(LLAMA | keys)) == SHAPE
    (record,) = caplog.records
    names = (
        "flux_capacity' 1.21",
        "attention_dropout",
        "auto_map",
        "sliding_window",
        "architectures",
        "quantization",
    )
    assert all(name in record.getMessage() for name in (*names, "rope_parameters.factor"))
    assert "resid_pdrop" not in record.getMessage() and "empty" not in record.getMessage()
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()


def test_many_unread_keys_are_counted(tmp_path, caplog):
    read(tmp_path, json.dumps(LLAMA | {f"new\n{i}": "y" * 1000 for i in range(1000)}))
    (record,) = caplog.records
    assert "and 988 more" in record.getMessage() and len(record.getMessage()) < 2500
    assert "\n" not in record.getMessage()


# Of the configs of the hub, what they say beside the shape.
SMOLLM2 = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"dtype": {"q4": "q4"}},
}
QWEN25 = {
    "use_mrope": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 2,
}
QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_window_layers": 28,
    "sliding_window": None,
}
VICUNA = {"max_sequence_length": 2048, "pad_token_id": 0}
LLAMA31 = {"pretraining_tp": 1, "attention_dropout": 0.0, "mlp_bias": False, "eos_token_id": [1, 2]}
ALL = {"bos_token_id": 0, "pad_token_id": None, "initializer_range": 0.02, "use_cache": True}
ALL |= {"transformers_version": "4.51.0", "_name_or_path": "x", "max_position_embeddings": 8192}


@pytest.mark.parametrize("keys", [LLAMA | SMOLLM2, QWEN2 | QWEN25, LLAMA | LLAMA31, LLAMA | VICUNA])
def test_published_configs_are_read_without_a_warning(keys):
    assert config_json.unread(keys | ALL) == []


def test_configs_of_published_shapes_are_read_without_a_warning():
    assert {
        name: config_json.unread(keys | ALL) for name, keys in published._MODELS.items()
    } == dict.fromkeys(published._MODELS, [])
    qwen3 = published.keys("Qwen/Qwen3-0.6B")
    assert qwen3 is not None and config_json.unread(qwen3 | QWEN3) == []


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {}),
        ({"auto_map": {"AutoConfig": "a.B"}, "_name_or_path": "/home/x"}, {}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
        (
            {"dtype": "bfloat16", "transformers_version": "5.0"},
            {"dtype": "float16", "transformers_version": "5.0"},
        ),
        ({"architectures": ["MyForCausalLM"]}, {}),
        ({"transformers.js_config": {}, "unsloth_version": "1"}, {}),
        ({"pad_token_id": 3, "note": "kept"}, {"pad_token_id": 3, "note": "kept"}),
    ],
)
def test_exported_keys_describe_the_tensors_written(keys, kept):
    source = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | keys
    described = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    dtype = {} if "dtype" in kept else {"torch_dtype": "float16"}
    assert config_json.export_keys(source, SHAPE, "float16") == described | dtype | kept


@pytest.mark.parametrize("text", ["", "null", "5", "{", "[" * 100_000, '{"a": NaN}', "\udcff"])
def test_file_that_is_no_json_object_is_named_with_the_reason(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        InputError, match="config.json cannot be read: it .*: copy it again"
    ) as caught:
        config_json.read(tmp_path)
    assert len(str(caught.value)) < 400
