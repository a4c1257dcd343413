"""Reads and writes the config.json of Hugging Face folders: which keys are read, refused, or known
to be harmless.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxrft.host.files import JSON, UnreadableJSON, read_json
from jaxrft.lm.model import ModelConfig, RopeScaling
from jaxrft.types import InputError

CONFIG = "config.json"
STEP = "jaxrft_step"  # key of an exported policy: the step of its run
ADAPTER_CONFIG = "adapter_config.json"
MAX_SHOWN = 12  # keys that a warning names


class Family(NamedTuple):
    """What a `model_type` of transformers says about the decoder without spelling it out."""

    architecture: str
    qk_norm: bool
    # of queries, keys and values; None = the key attention_bias says so, of the output too
    attention_bias: bool | None
    num_key_value_heads: int | None  # where the key is absent; None = the number of heads
    head_dim: int | None  # likewise; None = hidden_size / heads


FAMILIES = {
    "qwen2": Family(
        "Qwen2ForCausalLM", False, attention_bias=True, num_key_value_heads=32, head_dim=None
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", True, attention_bias=None, num_key_value_heads=32, head_dim=128
    ),
    "llama": Family(
        "LlamaForCausalLM", False, attention_bias=None, num_key_value_heads=None, head_dim=None
    ),
}


# Types


class Kind(NamedTuple):
    """What a value of config.json must be."""

    accepts: Callable[[JSON], bool]
    name: str  # completes "it must be ..."


def _is_whole(value: JSON, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_number(value: JSON) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _is_token(value: JSON) -> bool:
    return _is_whole(value, 0)


def _is_tokens(value: JSON) -> bool:
    return value is None or all(map(_is_token, value if isinstance(value, list) else [value]))


def _or_null(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.accepts(value), f"{kind.name} or null")


SIZE = Kind(lambda value: _is_whole(value, 1), "a positive whole number")
# in float32 too
POSITIVE = Kind(lambda value: _is_number(value) and value > 1e-30, "a positive number")
NUMBER = Kind(_is_number, "a number")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
STRING = Kind(lambda value: isinstance(value, str), "a string")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
STRINGS = Kind(
    lambda value: isinstance(value, list) and all(map(STRING.accepts, value)), "a list of strings"
)
TOKENS = Kind(_is_tokens, "a token id, a whole number of 0 or more, a list of them, or null")

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What each key must be: those that are read, and those that transformers refuses to read in other
# types.
KINDS = dict.fromkeys(REQUIRED, SIZE) | {
    "model_type": STRING,
    "hidden_act": STRING,
    "head_dim": _or_null(SIZE),
    "num_key_value_heads": _or_null(SIZE),
    "rope_theta": POSITIVE,
    "rms_norm_eps": POSITIVE,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_sliding_window": _or_null(FLAG),
    "sliding_window": _or_null(SIZE),
    "max_window_layers": _or_null(
        Kind(lambda value: _is_whole(value, 0), "a whole number of 0 or more")
    ),
    "layer_types": _or_null(STRINGS),
    "max_position_embeddings": _or_null(SIZE),
    "eos_token_id": TOKENS,
    "bos_token_id": TOKENS,
    "architectures": _or_null(STRINGS),
    "quantization_config": _or_null(OBJECT),
    "initializer_range": NUMBER,
    "attention_dropout": _or_null(NUMBER),
    "use_cache": _or_null(FLAG),
}
ROPE_KINDS = {
    "rope_type": STRING,
    "type": STRING,
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": SIZE,
}
ROPE_KEYS = ("rope_scaling", "rope_parameters")

# Keys that change no number of a forward pass: notes, tokens, sampling, and how transformers
# computes or reports.
HARMLESS = {
    STEP,
    *(
        "_name_or_path name_or_path _model_name_or_path _commit_hash transformers_version "
        "architectures torch_dtype dtype initializer_range use_cache tokenizer_class prefix "
        "id2label label2id num_labels problem_type finetuning_task task_specific_params "
        "output_attentions output_hidden_states output_scores return_dict use_return_dict "
        "torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder "
        "is_llama_config _attn_implementation attn_implementation _attn_implementation_autoset "
        "_flash_attn_2_enabled _experts_implementation use_flash_attn use_flash_attention_2 "
        "gradient_checkpointing transformers.js_config unsloth_version unsloth_fixed "
        "model_max_length"
    ).split(),
    # of the texts in training; nothing computes with them
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    # Slices of products, whose sums are the products; transformers 5 no longer makes them.
    "pretraining_tp",
    # of texts and of sampling
    *(
        "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id "
        "mask_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length "
        "max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups "
        "diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty "
        "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
        "num_return_sequences return_dict_in_generate remove_invalid_values suppress_tokens "
        "begin_suppress_tokens exponential_decay_length_penalty epsilon_cutoff eta_cutoff"
    ).split(),
}
# Noise that transformers adds in training only, and that is never added here: silent where there is
# none.
DROPOUTS = frozenset(
    (
        "attention_dropout attn_pdrop resid_pdrop embd_pdrop dropout hidden_dropout "
        "residual_dropout attention_probs_dropout_prob hidden_dropout_prob activation_dropout "
        "layerdrop mlp_dropout embedding_dropout ffn_dropout attn_dropout classifier_dropout "
        "summary_first_dropout"
    ).split()
)


# Mathematics

_OFF = Kind(lambda value: not value, "False, 0 or null")
_ON = Kind(lambda value: value is True, "True")
_ONE = Kind(lambda value: value is None or value == 1, "1 or null")
_SILU = Kind(lambda value: value in ("silu", "swish", None), "'silu'")
# Of a whole MLP, which is down(silu(gate) up): the word for it is SwiGLU.
_SWIGLU = Kind(lambda value: _SILU.accepts(value) or value == "swiglu", "'silu', 'swiglu'")
_RMS = Kind(
    lambda value: value is None or re.sub("[^a-z]", "", str(value).lower()) in ("rms", "rmsnorm"),
    "'rmsnorm'",
)
_ROTARY = Kind(lambda value: value in ("rope", "rotary", None), "'rope'")
_ALL = Kind(
    lambda value: not value or (isinstance(value, list) and all(value)), "a list of ones, or null"
)

# Keys, most of other model types, that ask for mathematics which is not computed here, unless they
# have these values.
MATHEMATICS = {
    "hidden_act": _SILU,
    "mlp_bias": _OFF,
    # attention
    **dict.fromkeys(("is_causal", "causal"), _ON),
    **dict.fromkeys(("use_bidirectional_attention", "bidirectional", "use_bidirectional"), _OFF),
    **dict.fromkeys(
        ("add_cross_attention", "cross_attention_hidden_size", "is_encoder_decoder"), _OFF
    ),
    **dict.fromkeys(
        ("attention_chunk_size", "dual_chunk_attention_config", "num_kv_shared_layers"), _OFF
    ),
    **dict.fromkeys(
        ("attention_sinks", "use_attention_sinks", "use_sinks", "attn_temperature_tuning"), _OFF
    ),
    **dict.fromkeys(
        ("clip_qkv", "qkv_clip", "alibi", "use_alibi", "pruned_heads", "num_sink_tokens"), _OFF
    ),
    **dict.fromkeys(("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_cap"), _OFF),
    # positions
    **dict.fromkeys(("use_rope", "rope", "use_rotary_embeddings", "rope_is_neox_style"), _ON),
    **dict.fromkeys(
        ("rope_interleaved", "rope_interleave", "rotary_interleaved", "use_mrope"), _OFF
    ),
    **dict.fromkeys(("mrope_section", "no_rope_layer_interval", "nope_layer_interval"), _OFF),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_ratio"), _ONE),
    "no_rope_layers": _ALL,
    "position_embedding_type": _ROTARY,
    # scales
    **dict.fromkeys(("embedding_multiplier", "embedding_scale", "embed_scale", "scale_emb"), _ONE),
    **dict.fromkeys(
        ("residual_multiplier", "residual_scale", "key_multiplier", "mlp_multiplier"), _ONE
    ),
    **dict.fromkeys(("logits_scaling", "logit_scale", "logits_scale", "logit_multiplier"), _ONE),
    **dict.fromkeys(("lm_head_multiplier", "output_multiplier", "output_multiplier_scale"), _ONE),
    **dict.fromkeys(
        ("mup_width_multiplier", "width_multiplier", "mup_embeddings_multiplier"), _ONE
    ),
    **dict.fromkeys(
        ("scale_embeddings", "scale_embedding", "normalize_embedding", "use_mup", "mup_enabled"),
        _OFF,
    ),
    **dict.fromkeys(("scale_depth", "dim_model_base", "mup_denominator"), _OFF),
    **dict.fromkeys(
        ("final_logit_softcapping", "final_logit_softcap", "logit_softcap", "logits_soft_cap"), _OFF
    ),
    # layers
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _OFF
    ),
    **dict.fromkeys(
        (
            "use_parallel_residual",
            "parallel_residual",
            "parallel_attn",
            "post_norm",
            "use_post_norm",
        ),
        _OFF,
    ),
    **dict.fromkeys(
        ("norm_after", "apply_residual_connection_post_layernorm", "zero_centered_gamma"), _OFF
    ),
    **dict.fromkeys(
        ("use_bias", "bias", "add_bias_linear", "lm_head_bias", "per_layer_config"), _OFF
    ),
    **dict.fromkeys(
        ("norm_type", "normalization", "normalization_type", "layer_norm_type", "layernorm_type"),
        _RMS,
    ),
    **dict.fromkeys(("hidden_activation", "activation_function", "activation", "act_fn"), _SWIGLU),
}


def _mathematics(config: ModelConfig) -> dict[str, Kind]:
    """Returns `MATHEMATICS`, and the keys whose value depends on the decoder."""
    width = config.head_dim
    scale = Kind(
        lambda value: value is None or _near(value, width**-0.5),
        f"head_dim^-1/2, {width**-0.5:.6g}",
    )
    full = Kind(lambda value: value is None or value == width, f"head_dim, {width}")
    normed = Kind(lambda value: value is None or bool(value) == config.qk_norm, f"{config.qk_norm}")
    biased = Kind(
        lambda value: value is None or bool(value) == config.attention_bias,
        f"{config.attention_bias}",
    )
    context = config.rope_scaling and config.rope_scaling.original_max_position_embeddings
    stretched = Kind(
        lambda value: value is None or context in (None, value),
        f"{context}, as in the rope parameters,",
    )
    return MATHEMATICS | {
        **dict.fromkeys(("attention_multiplier", "attention_scale"), scale),
        **dict.fromkeys(
            ("query_pre_attn_scalar", "rotary_dim", "rotary_emb_dim", "rope_dim"), full
        ),
        **dict.fromkeys(
            ("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm", "query_key_norm"), normed
        ),
        **dict.fromkeys(("qkv_bias", "use_qkv_bias", "attention_qkv_bias", "add_qkv_bias"), biased),
        "original_max_position_embeddings": stretched,
    }


def _near(value: JSON, wanted: float) -> bool:
    return _is_number(value) and math.isclose(value, wanted, rel_tol=1e-4)


# Reading


def read(folder: Path) -> dict[str, JSON]:
    """Reads the keys of the config.json in `folder`; raises InputError without one, or for a value
    of a wrong type.
    """
    if not folder.is_dir():
        raise InputError(
            f"no folder {folder}: give the folder of a downloaded Hugging Face checkpoint"
        )
    path = folder / CONFIG
    if not path.is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{folder} holds adapters only: give the folder of a model with them merged, such "
            "as policy next to it"
        )
    if not path.is_file():
        if quantized := sorted(folder.glob("*.gguf")):
            raise InputError(
                f"{folder} has no {CONFIG}, only {quantized[0].name}, a quantized format that is "
                "not read: give the folder of the checkpoint that it was made from"
            )
        raise InputError(f"{folder} has no {CONFIG}: give the folder of a Hugging Face checkpoint")
    keys = read_object(path)
    _check_types(keys, path)
    return keys


def read_object(path: Path) -> dict[str, JSON]:
    """Reads the JSON object in a file of a checkpoint; raises InputError when it is something
    else.
    """
    try:
        return read_json(path, dict)
    except (OSError, UnreadableJSON) as error:
        raise InputError(
            f"{path} cannot be read: {error}: copy it again from the checkpoint"
        ) from error


def max_positions(folder: str | Path) -> int | None:
    """Returns the number of tokens, of prompt and completion, that a decoder was made for; None =
    not known.
    """
    return read(Path(folder)).get("max_position_embeddings")


def model_config(keys: Mapping[str, JSON], where: str | Path) -> ModelConfig:
    """Returns the shape of the decoder that the keys of a config.json describe.

    Absent keys have the defaults of transformers. Raises InputError, which begins with `where`, for
    a missing key, a value of a wrong type, and a decoder that `model.py` does not compute.
    """
    model_type = keys.get("model_type")
    if model_type not in tuple(FAMILIES):
        raise _unsupported(where, "model_type", model_type, ", ".join(map(repr, FAMILIES)))
    _check_types(keys, where)
    for name in REQUIRED:
        if name not in keys:
            raise _missing_key(where, name)
    family = FAMILIES[model_type]
    rope = _rope(keys, where)
    bias = keys.get("attention_bias", False)
    heads = keys["num_attention_heads"]
    config = ModelConfig(
        vocab_size=keys["vocab_size"],
        hidden_size=keys["hidden_size"],
        intermediate_size=keys["intermediate_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=keys.get("num_key_value_heads", family.num_key_value_heads) or heads,
        head_dim=keys.get("head_dim") or family.head_dim or keys["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta", keys.get("rope_theta", 10_000.0))),
        rms_norm_eps=keys.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=keys.get("tie_word_embeddings", False),
        attention_bias=bias if family.attention_bias is None else family.attention_bias,
        output_bias=bias and family.attention_bias is None,
        qk_norm=family.qk_norm,
        rope_scaling=_scaling(rope, where),
    )
    _check_shape(keys, config, where)
    _check_mathematics(keys, config, where)
    return config


def unread(keys: Mapping[str, JSON]) -> list[str]:
    """Returns the keys that are neither read nor known to be harmless, with their values, as a
    warning shows them.

    A key of `MATHEMATICS`, whose other values are refused, is known; a dropout of 0 drops nothing,
    and null says nothing. For the keys of rotary embeddings, those inside count.
    """
    family = FAMILIES[keys["model_type"]]
    known = (
        KINDS.keys() | HARMLESS | _mathematics(model_config(keys, CONFIG)).keys() | set(ROPE_KEYS)
    )
    idle = {"quantization_config", *DROPOUTS}  # known where they are false, 0, null or empty
    if family.architecture == "LlamaForCausalLM" and not keys.get("use_sliding_window"):
        idle.add("sliding_window")
    silent = known - idle
    unknown = {key: value for key, value in keys.items() if value is not None and key not in silent}
    unknown = {key: value for key, value in unknown.items() if value or key not in idle}
    own_names = {
        family.architecture.lower(),
        family.architecture.lower().replace("forcausallm", "model"),
    }
    if any(name.lower() not in own_names for name in keys.get("architectures") or ()):
        unknown["architectures"] = keys["architectures"]
    inside = RopeScaling._fields if _rope_type(_rope(keys, CONFIG)) == "llama3" else ()
    used = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *inside}
    for name in ROPE_KEYS:
        entries = (keys.get(name) or {}).items()
        unknown |= {
            f"{name}.{key}": value
            for key, value in entries
            if value is not None and key not in used
        }
    shown = [f"{key!r:.60} {value!r:.60}" for key, value in sorted(unknown.items())]
    more = len(shown) - MAX_SHOWN
    return shown if more <= 0 else [*shown[:MAX_SHOWN], f"and {more} more"]


def hf_config(config: ModelConfig, **extra: JSON) -> dict[str, JSON]:
    """Returns the config.json of a decoder made here, in the keys of transformers 4, which
    transformers 5 reads too.

    `extra` adds keys such as eos_token_id and max_position_embeddings. Raises InputError if no
    family has this shape.
    """
    keys = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
    }
    if config.output_bias:
        keys["attention_bias"] = True
    if config.rope_scaling is not None:
        keys["rope_scaling"] = {"rope_type": "llama3"} | config.rope_scaling._asdict()
    for name, family in FAMILIES.items():
        named = {"architectures": [family.architecture], "model_type": name} | keys
        if model_config(named, name) == config:
            return named | extra
    shape = ", ".join(
        f"{name}={getattr(config, name)}" for name in ("attention_bias", "output_bias", "qk_norm")
    )
    raise InputError(f"{shape} fits none of the model types {', '.join(FAMILIES)}")


# Keys that say where the files of a folder come from, how their numbers are stored, or which code
# belongs to them.
ORIGIN = frozenset(
    (
        "_name_or_path name_or_path _model_name_or_path _commit_hash auto_map "
        "transformers.js_config quantization_config quantization compression_config "
        "unsloth_version unsloth_fixed"
    ).split()
)


def export_keys(keys: Mapping[str, JSON], config: ModelConfig, dtype: str) -> dict[str, JSON]:
    """Returns the keys of a config.json for tensors of `dtype` written here, from those of the
    source's.

    The rule: what describes the decoder stays, what describes other files goes (`ORIGIN`), and
    architectures, dtype and tie_word_embeddings are those of the tensors written.
    transformers_version stays, as the keys keep its dialect.
    """
    exported = {key: value for key, value in keys.items() if key not in ORIGIN}
    dtypes = {"torch_dtype", "dtype"} & exported.keys() or {"torch_dtype"}
    exported |= dict.fromkeys(dtypes, dtype)
    exported["architectures"] = [FAMILIES[keys["model_type"]].architecture]
    if config.tie_word_embeddings != exported.get("tie_word_embeddings", False):
        exported["tie_word_embeddings"] = config.tie_word_embeddings
    return exported


def write(path: Path, value: Mapping[str, JSON]) -> None:
    """Writes a JSON file of a checkpoint."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Checks


def _check_types(keys: Mapping[str, JSON], where: str | Path) -> None:
    for key, kind in KINDS.items():
        if key in keys and not kind.accepts(keys[key]):
            raise _wrong(where, key, keys[key], kind)
    for key, value in keys.items():
        # -1, of old versions, is none
        if key.endswith("_token_id") and not TOKENS.accepts(value) and value != -1:
            raise _wrong(where, key, value, TOKENS)


def _check_shape(keys: Mapping[str, JSON], config: ModelConfig, where: str | Path) -> None:
    """Raises InputError for sizes that do not fit together."""
    if config.head_dim % 2 or config.head_dim == 0:
        raise InputError(f"{where}: head_dim is {config.head_dim}: it must be even, and at least 2")
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"{where}: num_attention_heads is {config.num_heads} and num_key_value_heads "
            f"{config.num_kv_heads}: the first must be a multiple of the second"
        )
    layers = keys.get("layer_types")
    if layers is not None and len(layers) != config.num_layers:
        raise InputError(
            f"{where}: layer_types names {len(layers)} layers, but num_hidden_layers is "
            f"{config.num_layers}"
        )


def _check_mathematics(keys: Mapping[str, JSON], config: ModelConfig, where: str | Path) -> None:
    """Raises InputError for values that ask for another forward pass than that of `model.py`."""
    if _slides(keys):
        raise InputError(
            f"{where}: attention with a sliding window is not supported, only full attention"
        )
    for key, kind in _mathematics(config).items():
        if key in keys and not kind.accepts(keys[key]):
            raise _unsupported(where, key, keys[key], kind.name)


def _slides(keys: Mapping[str, JSON]) -> bool:
    """Computes whether any layer attends through a sliding window, by the defaults of
    transformers.
    """
    if keys.get("layer_types"):
        return any(kind not in ("full_attention", "attention") for kind in keys["layer_types"])
    windowed = bool(keys.get("use_sliding_window")) and keys.get("sliding_window", 4096) is not None
    return windowed and (keys.get("max_window_layers", 28) or 0) < keys.get("num_hidden_layers", 0)


def _rope(keys: Mapping[str, JSON], where: str | Path) -> dict[str, JSON]:
    """Returns the settings of rotary embeddings, {} for none but rope_theta.

    Raises InputError for values of a wrong type, for kinds that are not supported, and for
    contradictions.
    """
    described = {name: keys[name] for name in ROPE_KEYS if keys.get(name) is not None}
    for name, rope in described.items():
        if isinstance(rope, str) or (
            isinstance(rope, dict) and any(isinstance(x, dict) for x in rope.values())
        ):
            raise _unsupported(where, "rope type", _rope_type(rope), "'default', 'llama3'")
        if not isinstance(rope, dict):
            raise _wrong(where, name, rope, _or_null(OBJECT))
        for key, kind in ROPE_KINDS.items():
            if key in rope and not kind.accepts(rope[key]):
                raise _wrong(where, f"{name}.{key}", rope[key], kind)
        if _rope_type(rope) not in ("default", "llama3"):
            raise _unsupported(where, "rope type", _rope_type(rope), "'default', 'llama3'")
        for key in ("partial_rotary_factor", "mrope_section"):
            if not MATHEMATICS[key].accepts(rope.get(key)):
                raise _unsupported(where, f"{name}.{key}", rope[key], MATHEMATICS[key].name)
        theta = keys.get("rope_theta")
        if theta is not None and rope.get("rope_theta", theta) != theta:
            raise InputError(
                f"{where}: rope_theta is {theta}, but {name}.rope_theta "
                f"{rope['rope_theta']}: keep one"
            )
    both = [_settings(rope) for rope in described.values() if rope]
    if len(both) == 2 and both[0] != both[1]:
        raise InputError(
            f"{where}: {' and '.join(ROPE_KEYS)} say different things: keep one of them"
        )
    return next((rope for rope in described.values() if rope), {})


def _settings(rope: Mapping[str, JSON]) -> dict[str, JSON]:
    """Returns the settings of rotary embeddings but for rope_theta, each under one spelling."""
    settings = {
        key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")
    }
    return settings | {"rope_type": _rope_type(rope)}


def _rope_type(rope: str | Mapping[str, JSON]) -> str:
    """Returns the kind of rotary embeddings; transformers 5 may give each kind of layer its own,
    unlike any family.
    """
    if isinstance(rope, str):
        return rope
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "by layer"
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: Mapping[str, JSON], where: str | Path) -> RopeScaling | None:
    """Returns the settings of llama3, the only kind that has any; raises InputError where they make
    no sense.
    """
    if _rope_type(rope) != "llama3":
        return None
    for name in RopeScaling._fields:
        if name not in rope:
            raise _missing_key(where, name)
    scaling = RopeScaling(*(rope[name] for name in RopeScaling._fields))
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise InputError(
            f"{where}: low_freq_factor is {scaling.low_freq_factor} and high_freq_factor "
            f"{scaling.high_freq_factor}: the first must be the smaller one"
        )
    return scaling


def _wrong(where: str | Path, key: str, value: JSON, kind: Kind) -> InputError:
    return InputError(f"{where}: {key} is {value!r:.100}: it must be {kind.name}")


def _missing_key(where: str | Path, key: str) -> InputError:
    return InputError(f"{where} has no key {key!r}: copy it again from the checkpoint")


def _unsupported(where: str | Path, key: str, value: JSON, only: str) -> InputError:
    return InputError(f"{where}: {key} {value!r:.100} is not supported, only {only}")
