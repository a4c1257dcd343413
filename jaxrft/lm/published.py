"""Well-known models of the Hugging Face hub as their config.json describes them, for plans without
their weights.
"""


def keys(model: str) -> dict[str, object] | None:
    """Looks up the keys of a well-known model's config.json that this package reads.

    `model` is its id on the hub, owner/name[@revision]. None if the model is not known.
    `weights.model_config` turns them into a shape. They have no tokens and templates.
    """
    keys = _MODELS.get(model.partition("@")[0])
    return None if keys is None else dict(keys)


_SHARED = {"hidden_act": "silu", "torch_dtype": "bfloat16"}
_QWEN = _SHARED | {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}
_QWEN2 = _QWEN | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_QWEN3 = _QWEN | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
_QWEN3 |= {"attention_bias": False, "head_dim": 128}
_LLAMA = _SHARED | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_LLAMA |= {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "attention_bias": False, "mlp_bias": False}


def _shape(
    layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, *, tied: bool
) -> dict:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def _context(length: int) -> dict:
    return {"max_position_embeddings": length}


def _long_context(factor: float) -> dict:
    scaling = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _context(131072) | {"rope_scaling": {"rope_type": "llama3", "factor": factor} | scaling}


_QWEN2_05B = _QWEN2 | _shape(24, 896, 4864, 14, 2, 151936, tied=True)
_QWEN2_15B = _QWEN2 | _shape(28, 1536, 8960, 12, 2, 151936, tied=True)
_QWEN2_3B = _QWEN2 | _shape(36, 2048, 11008, 16, 2, 151936, tied=True)
_QWEN2_7B = _QWEN2 | _shape(28, 3584, 18944, 28, 4, 152064, tied=False)
_QWEN3_06B = _QWEN3 | _shape(28, 1024, 3072, 16, 8, 151936, tied=True)
_QWEN3_17B = _QWEN3 | _shape(28, 2048, 6144, 16, 8, 151936, tied=True)
_QWEN3_4B = _QWEN3 | _shape(36, 2560, 9728, 32, 8, 151936, tied=True)
_QWEN3_8B = _QWEN3 | _shape(36, 4096, 12288, 32, 8, 151936, tied=False)
_LLAMA_1B = (
    _LLAMA
    | _shape(16, 2048, 8192, 32, 8, 128256, tied=True)
    | {"head_dim": 64}
    | _long_context(32.0)
)
_LLAMA_3B = (
    _LLAMA
    | _shape(28, 3072, 8192, 24, 8, 128256, tied=True)
    | {"head_dim": 128}
    | _long_context(32.0)
)
_LLAMA_8B = _LLAMA | _shape(32, 4096, 14336, 32, 8, 128256, tied=False) | _long_context(8.0)
_SMOL = _shape(30, 576, 1536, 9, 3, 49152, tied=True) | {"head_dim": 64, "rope_theta": 1e5}
_MATH = {"rope_theta": 1e4} | _context(4096)

_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _LLAMA | _SMOL | _context(8192),
    "Qwen/Qwen2.5-0.5B": _QWEN2_05B | _context(32768),
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_05B | _context(32768),
    "Qwen/Qwen2.5-1.5B": _QWEN2_15B | _context(131072),
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_15B | _context(32768),
    "Qwen/Qwen2.5-3B": _QWEN2_3B | _context(32768),
    "Qwen/Qwen2.5-3B-Instruct": _QWEN2_3B | _context(32768),
    "Qwen/Qwen2.5-7B": _QWEN2_7B | _context(131072),
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B | _context(32768),
    "Qwen/Qwen2.5-Math-1.5B": _QWEN2_15B | _MATH,
    "Qwen/Qwen2.5-Math-1.5B-Instruct": _QWEN2_15B | _MATH,
    "Qwen/Qwen2.5-Math-7B": _QWEN2_7B | _MATH,
    "Qwen/Qwen2.5-Math-7B-Instruct": _QWEN2_7B | _MATH,
    "Qwen/Qwen3-0.6B": _QWEN3_06B | _context(40960),
    "Qwen/Qwen3-0.6B-Base": _QWEN3_06B | _context(32768),
    "Qwen/Qwen3-1.7B": _QWEN3_17B | _context(40960),
    "Qwen/Qwen3-1.7B-Base": _QWEN3_17B | _context(32768),
    "Qwen/Qwen3-4B": _QWEN3_4B | _context(40960),
    "Qwen/Qwen3-4B-Base": _QWEN3_4B | _context(32768),
    "Qwen/Qwen3-8B": _QWEN3_8B | _context(40960),
    "Qwen/Qwen3-8B-Base": _QWEN3_8B | _context(32768),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
}
