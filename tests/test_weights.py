import functools
import json
import shutil
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrft.config import EvalConfig, LoRAConfig
from jaxrft.lm import model, weights
from jaxrft.lm.policy import LanguageModel
from jaxrft.prepare import embeddings, pass_rates
from jaxrft.train.evaluate import evaluate_policy
from jaxrft.train.loop import save_checkpoint, train
from jaxrft.train.state import TrainState
from jaxrft.types import InputError

CONFIG = model.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=5000.0,
    rms_norm_eps=1e-5,
)
TIED = CONFIG._replace(tie_word_embeddings=True)
PLAIN = CONFIG._replace(attention_bias=False)
QWEN3 = PLAIN._replace(qk_norm=True, tie_word_embeddings=True)
LLAMA = PLAIN._replace(rope_scaling=model.RopeScaling(32.0, 1.0, 4.0, 8192))


def random_params(config):
    """Every weight random, norms and biases too."""
    rows = model.table(config)
    keys = jax.random.split(jax.random.key(0), len(rows))
    return {
        row.name: jax.random.normal(key, row.shape) for row, key in zip(rows, keys, strict=True)
    }


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def checkpoint(params, tmp_path_factory):
    """A float32 checkpoint in one file; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    weights.save(folder, params, CONFIG, source=weights.hf_config(CONFIG, eos_token_id=[1, 2]))
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize(
    "config", [CONFIG, TIED, QWEN3, LLAMA, LLAMA._replace(attention_bias=True, output_bias=True)]
)
def test_load_of_save_is_the_same_bit_for_bit(config, tmp_path):
    params = random_params(config)
    weights.save(tmp_path / "a", params, config, source=weights.hf_config(config))
    assert weights.read_config(tmp_path / "a") == config
    assert_equal(weights.load(tmp_path / "a", config), params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_layout_is_that_of_hugging_face(checkpoint, params):
    """y = x W^T with W [out, in]; query head h is rows h * head_dim on, and of o_proj the
    columns.
    """
    stored = load_file(checkpoint / "model.safetensors")
    np.testing.assert_array_equal(
        stored["model.layers.1.self_attn.q_proj.weight"][18], params["q"][1, :, 1, 2]
    )
    np.testing.assert_array_equal(
        stored["model.layers.1.self_attn.q_proj.bias"][18], params["q_bias"][1, 1, 2]
    )
    np.testing.assert_array_equal(
        stored["model.layers.0.self_attn.o_proj.weight"][:, 18], params["o"][0, 1, 2]
    )
    np.testing.assert_array_equal(
        stored["model.layers.1.mlp.gate_proj.weight"], params["gate"][1].T
    )
    np.testing.assert_array_equal(stored["lm_head.weight"], params["unembed"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_files_are_rounded_once(dtype, params, tmp_path):
    weights.save(tmp_path / "a", params, CONFIG, source=weights.hf_config(CONFIG), dtype=dtype)
    keys = json.loads((tmp_path / "a/config.json").read_text())
    assert keys["torch_dtype"] == np.dtype(dtype).name and "dtype" not in keys
    rounded = {name: value.astype(dtype) for name, value in params.items()}
    assert_equal(weights.load(tmp_path / "a", CONFIG, dtype=dtype), rounded)
    wide = {name: value.astype(jnp.float32) for name, value in rounded.items()}
    assert_equal(weights.load(tmp_path / "a", CONFIG), wide)


def test_several_files_and_their_index(params, tmp_path):
    limit = 20_000
    weights.save(
        tmp_path / "a", params, CONFIG, source=weights.hf_config(CONFIG), max_shard_size=limit
    )
    index = json.loads((tmp_path / "a" / weights.INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in params.values())
    for file in files:
        held = load_file(tmp_path / "a" / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= limit
        assert all(index["weight_map"][name] == file for name in held)
        with safe_open(tmp_path / "a" / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert_equal(weights.load(tmp_path / "a", CONFIG), params)


def test_sharded_parameters_load_and_save_like_replicated_ones(
    mesh, checkpoint, params, tmp_path, monkeypatch
):
    read, elements = weights._read_layer, []

    def counted(*arguments):
        block = read(*arguments)
        elements.append(block.size)
        return block

    monkeypatch.setattr(weights, "_read_layer", counted)
    sharded = weights.load(checkpoint, CONFIG, mesh=mesh)
    # each block once, not once a device
    assert sum(elements) == sum(value.size for value in params.values())
    assert_equal(sharded, params)
    for name, sharding in model.shardings(CONFIG, mesh).items():
        assert sharded[name].sharding.is_equivalent_to(sharding, sharded[name].ndim), name
    weights.save(tmp_path / "a", sharded, CONFIG, source=checkpoint)
    assert_equal(weights.load(tmp_path / "a", CONFIG), params)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bfloat16_checkpoint_is_never_float32_on_the_host(sharded, mesh, tmp_path, monkeypatch):
    """Memory for two blocks of the largest weight, while one is read and one is placed; half of
    what float32 takes.
    """
    config = CONFIG._replace(vocab_size=4096, hidden_size=256, intermediate_size=512)
    rows = model.table(config)
    ones = {row.name: np.ones(row.shape, jnp.bfloat16) for row in rows}
    weights.save(tmp_path / "a", ones, config, source=weights.hf_config(config), dtype=jnp.bfloat16)
    load = functools.partial(
        weights.load, tmp_path / "a", config, mesh=mesh if sharded else None, dtype=jnp.bfloat16
    )
    load()  # what Python keeps of a first time is not the weights'
    read, blocks = weights._read_layer, []

    def noted(*arguments):
        block = read(*arguments)
        blocks.append((block.dtype, block.size))
        return block

    monkeypatch.setattr(weights, "_read_layer", noted)
    tracemalloc.start()
    params = load()
    # JAX on a CPU keeps blocks that happen to be aligned
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(value.dtype == jnp.bfloat16 and jnp.all(value == 1) for value in params.values())
    assert {dtype for dtype, _ in blocks} == {np.dtype(jnp.bfloat16)}
    assert sum(size for _, size in blocks) == sum(value.size for value in params.values())
    assert peak - held < 2.5 * max(value.nbytes for value in params.values())


def test_the_files_of_the_source_go_along(checkpoint, copied, params, tmp_path):
    (copied / "tokenizer.json").write_text("{}")
    (copied / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (copied / "notes.txt").write_text("not part of a checkpoint")
    weights.save(tmp_path / "a", params, CONFIG, source=copied)
    (copied / "tokenizer_config.json").write_text(
        '{"eos_token": "a", "auto_map": {"AutoTokenizer": ["x.Y", null]}}'
    )
    weights.save(tmp_path / "b", params, CONFIG, source=copied)
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text()) == {"eos_token": "a"}
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "a/generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads(
        (checkpoint / "config.json").read_text()
    )


def test_a_checkpoint_is_replaced_even_by_itself(copied, params):
    doubled = {name: 2 * value for name, value in params.items()}
    (copied / "old.txt").write_text("of the checkpoint before")
    weights.save(copied, doubled, CONFIG, source=copied)
    assert_equal(weights.load(copied, CONFIG), doubled)
    assert {path.name for path in copied.parent.iterdir()} == {"copy"} and not (
        copied / "old.txt"
    ).exists()


def test_a_failed_save_leaves_the_checkpoint_before(copied, params, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(InputError, match="cannot write .*copy.*No space left.*disk with room"):
        weights.save(copied, params, CONFIG, source=copied)
    assert_equal(weights.load(copied, CONFIG), params)
    assert {path.name for path in copied.parent.iterdir()} == {"copy"}


def test_a_save_killed_between_its_renames_is_put_right(copied, params):
    copied.rename(copied.with_name(".copy.old"))
    with pytest.raises(KeyError), weights._replacing(copied):
        raise KeyError
    assert_equal(weights.load(copied, CONFIG), params)


@pytest.mark.parametrize("kind", ["new", "old"])
def test_leftovers_that_are_links_are_not_followed(kind, copied, params, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (copied.parent / f".{copied.name}.{kind}").symlink_to(precious)
    weights.save(copied, params, CONFIG, source=copied)
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert not list(copied.parent.glob(f".{copied.name}.*"))


def test_other_folders_are_never_replaced(checkpoint, params, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not a checkpoint"):
        weights.save(tmp_path, params, CONFIG, source=checkpoint)
    with pytest.raises(InputError, match="exists and is not a checkpoint"):
        weights.save(tmp_path / "thesis.tex", params, CONFIG, source=checkpoint)
    with pytest.raises(InputError, match="cannot write .*thesis.tex"):
        weights.save(tmp_path / "thesis.tex" / "a", params, CONFIG, source=checkpoint)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_config_of_another_model_is_not_saved(params, tmp_path):
    with pytest.raises(InputError, match="another model's"):
        weights.save(tmp_path / "a", params, CONFIG, source=weights.hf_config(TIED))
    assert not (tmp_path / "a").exists()


def test_redundant_tensors_of_checkpoints_are_ignored(tmp_path):
    params = random_params(TIED)
    weights.save(tmp_path / "a", params, TIED, source=weights.hf_config(TIED))
    change_tensors(
        tmp_path / "a",
        lambda stored: stored | {"lm_head.weight": stored["model.embed_tokens.weight"]},
    )
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    change_tensors(tmp_path / "a", lambda stored: stored | buffer)
    assert_equal(weights.load(tmp_path / "a", TIED), params)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_unequal_output_weights_of_a_tied_checkpoint_are_not_tied_and_named_once(
    dtype, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(weights, "BLOCK", 7 * 32)  # several blocks, the last not full
    params = random_params(TIED)
    weights.save(tmp_path / "a", params, TIED, source=weights.hf_config(TIED), dtype=dtype)
    same = load_file(tmp_path / "a/model.safetensors")["model.embed_tokens.weight"]
    other = same.copy()
    other[-1, -1] += 1
    change_tensors(
        tmp_path / "a", lambda stored: stored | {"lm_head.weight": same.astype(np.float32)}
    )
    assert weights.read_config(tmp_path / "a") == TIED and not caplog.records
    change_tensors(tmp_path / "a", lambda stored: stored | {"lm_head.weight": other})
    for _ in range(2):
        config = weights.read_config(tmp_path / "a")
    assert config == CONFIG._replace(tie_word_embeddings=False)
    (record,) = caplog.records
    assert (
        "lm_head.weight differs from model.embed_tokens.weight: they are not tied"
    ) in record.getMessage()
    loaded = weights.load(tmp_path / "a", config, dtype=dtype)
    np.testing.assert_array_equal(loaded["unembed"], other)
    weights.save(tmp_path / "b", loaded, config, source=tmp_path / "a", dtype=dtype)
    assert json.loads((tmp_path / "b/config.json").read_text())["tie_word_embeddings"] is False
    assert weights.read_config(tmp_path / "b") == config
    assert_equal(weights.load(tmp_path / "b", config, dtype=dtype), loaded)


# Values that are not finite


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("name", "bad", "told"),
    [
        ("model.norm.weight", [np.nan], "tensor model.norm.weight has 1 of 32 values"),
        (
            UP := "model.layers.1.mlp.up_proj.weight",
            [np.inf, -np.inf, np.nan],
            f"tensor {UP} has 3 of 1536 values",
        ),
        ("model.layers.0.self_attn.q_proj.bias", [-np.inf], "q_proj.bias has 1 of 64 values"),
        ("lm_head.weight", [np.nan] * 5, "tensor lm_head.weight has 5 of 2048 values"),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name_and_number(
    name, bad, told, sharded, mesh, copied
):
    def spoil(stored):
        stored[name].flat[-len(bad) :] = bad
        return stored

    change_tensors(copied, spoil)
    with pytest.raises(
        InputError, match=f"{told} that are not finite in float32: its weights are broken"
    ):
        weights.load(copied, CONFIG, mesh=mesh if sharded else None)


def test_weights_that_a_narrow_dtype_cannot_hold_are_refused(copied):
    change_tensors(
        copied, lambda stored: {name: np.full_like(x, 1e5) for name, x in stored.items()}
    )
    weights.load(copied, CONFIG)
    with pytest.raises(InputError, match=r"not finite in float16, and \d+ more tensors have some"):
        weights.load(copied, CONFIG, dtype=jnp.float16)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("gate", np.nan, np.float32),
        ("final_norm", -np.inf, np.float32),
        ("q_bias", 1e5, np.float16),
    ],
)
def test_weights_that_are_not_finite_are_not_exported(
    name, value, dtype, sharded, mesh, copied, params
):
    bad = params | {name: params[name].at[0].set(value)}
    if sharded:
        where = model.shardings(CONFIG, mesh)
        bad = {name: jax.device_put(x, where[name]) for name, x in bad.items()}
    with pytest.raises(
        InputError,
        match="the policy is not exported: tensor model.* values that are not finite in float",
    ):
        weights.save(copied, bad, CONFIG, source=copied, dtype=dtype)
    assert_equal(weights.load(copied, CONFIG), params)
    assert {path.name for path in copied.parent.iterdir()} == {"copy"}


@pytest.fixture(scope="module")
def broken(world, tmp_path_factory):
    """The folder of a policy with a NaN in a norm."""
    folder = shutil.copytree(world / "policy", tmp_path_factory.mktemp("broken") / "policy")
    change_tensors(
        folder, lambda stored: stored | {"model.norm.weight": np.full(16, np.nan, np.float32)}
    )
    return str(folder)


@pytest.mark.parametrize(
    "command", ["train", "train with adapters", "eval", "pass-rates", "embeddings"]
)
def test_no_command_computes_with_weights_that_are_not_finite(command, broken, configure, tmp_path):
    config = configure(tmp_path / "run", model=broken)
    adapted = replace(config, lora=LoRAConfig(rank=2))
    held_out = replace(config, evaluation=EvalConfig((config.task_sets[0],), num_samples=0))
    commands = {
        "train": lambda: train(config),
        "train with adapters": lambda: train(adapted),
        "eval": lambda: evaluate_policy(held_out),
        "pass-rates": lambda: pass_rates.run(
            pass_rates.Options(config, str(tmp_path / "a.parquet"))
        ),
        "embeddings": lambda: embeddings.run(
            embeddings.Options(config, str(tmp_path / "a.safetensors"))
        ),
    }
    with pytest.raises(
        InputError,
        match=r"policy: tensor model.norm.weight has 16 of 16 "
        r"values that are not finite",
    ):
        commands[command]()
    assert not list(tmp_path.glob("a.*"))


class Saved:
    """Stands for the checkpoints of a run."""

    newest = 3

    def __init__(self):
        self.states = []

    def save(self, state):
        self.states.append(state)


class Metrics:
    """Stands for the metrics of a run."""

    def flush(self):
        pass

    def check_written(self):
        pass


@pytest.mark.parametrize("lora", [None, model.LoRA(2, 4.0, ("gate",))])
def test_parameters_that_are_not_finite_push_out_no_checkpoint(lora, tmp_path, caplog):
    config = CONFIG._replace(lora=lora)
    name = "gate" if lora is None else "gate_lora_b"
    params = {
        row.name: jnp.ones(row.shape) for row in (model.adapters(config) or model.base(config))
    }
    lm = LanguageModel(config, None, None, {}, None, (1,), tmp_path)
    state = TrainState(np.int32(6), params, None, None, None, None)
    bad = state._replace(params=params | {name: params[name].at[1, 0].set(jnp.inf)})
    saved = Saved()
    save_checkpoint(lm, saved, Metrics(), state, must=True)
    save_checkpoint(lm, saved, Metrics(), bad, must=False)
    assert saved.states == [state] and "step 6 is not saved, and the run goes on" in caplog.text
    with pytest.raises(
        InputError,
        match="after step 6 tensor .*gate_proj.* not finite .* newest checkpoint is of step 3",
    ):
        save_checkpoint(lm, saved, Metrics(), bad, must=True)
    assert saved.states == [state]


# config.json

V4 = {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"}
V5 = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}


def keys_of(extra, without=()):
    known = weights.hf_config(CONFIG)
    return {
        key: value
        for key, value in known.items()
        if key not in ("rope_theta", "torch_dtype", *without)
    } | extra


def write_config(folder, keys):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (keys_of(V4), {"rope_theta": 1e6}),
        (keys_of(V5), {"rope_theta": 1e6}),
        (keys_of({}), {"rope_theta": 10_000.0}),
        (keys_of(V4, without=["head_dim"]), {"rope_theta": 1e6, "head_dim": 8}),
        (
            keys_of(V4 | {"head_dim": None, "num_key_value_heads": None}),
            {"head_dim": 8, "num_kv_heads": 4},
        ),
        (keys_of(V4, without=["tie_word_embeddings", "rms_norm_eps"]), {"rms_norm_eps": 1e-6}),
        (keys_of(V4 | {"use_sliding_window": False, "sliding_window": 4096}), {}),
        (
            keys_of(
                V4 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}
            ),
            {},
        ),
        (keys_of(V5 | {"layer_types": ["full_attention"] * 2}), {}),
    ],
)
def test_the_config_keys_of_transformers_4_and_5(keys, wanted, tmp_path):
    config = weights.read_config(write_config(tmp_path, keys))
    assert config == CONFIG._replace(**{"rope_theta": config.rope_theta} | wanted)
    assert isinstance(config.rope_theta, float)


QWEN3_0_6B = {  # as published, without what no family reads
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "bfloat16"},
        {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "dtype": "bfloat16"},
    ],
)
def test_qwen3_as_published(keys):
    config = weights.model_config(QWEN3_0_6B | keys, "Qwen3-0.6B")
    tied = {"tie_word_embeddings": True, "attention_bias": False, "qk_norm": True}
    assert config == model.ModelConfig(
        151936, 1024, 3072, 28, 16, 8, head_dim=128, rope_theta=1e6, **tied
    )


@pytest.mark.parametrize(
    "keys",
    [
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
            "torch_dtype": "bfloat16",
        },
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {
            "rope_parameters": LLAMA3 | {"rope_theta": 500000.0, "rope_type": "llama3"},
            "dtype": "bfloat16",
        },
    ],
)
def test_llama_as_published(keys):
    config = weights.model_config(LLAMA_3_2_1B | keys, "Llama-3.2-1B")
    assert config == model.ModelConfig(
        *(128256, 2048, 8192, 16, 32, 8),
        head_dim=64,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        rope_scaling=model.RopeScaling(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )


@pytest.mark.parametrize("keys", [V4, V5])
def test_a_saved_config_keeps_its_keys_and_names_the_new_dtype(keys, params, tmp_path):
    config = CONFIG._replace(rope_theta=1e6)
    source = write_config(tmp_path / "source", keys_of(keys | {"eos_token_id": [1, 2]}))
    weights.save(tmp_path / "a", params, config, source=source)
    saved = json.loads((tmp_path / "a/config.json").read_text())
    named = "torch_dtype" if "torch_dtype" in keys else "dtype"
    assert saved == keys_of(keys | {"eos_token_id": [1, 2], named: "float32"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            keys_of({"model_type": "mistral"}),
            "model_type 'mistral' is not supported, only 'qwen2', 'qwen3', 'llama'",
        ),
        (
            keys_of({"model_type": "llama", "mlp_bias": True}),
            "mlp_bias True is not supported, only False",
        ),
        (
            keys_of({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            "no key 'low_freq_factor'",
        ),
        (
            keys_of({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
            "rope type 'by layer'",
        ),
        (keys_of({}, without=["model_type"]), "model_type None"),
        (keys_of({"hidden_act": "gelu"}), "hidden_act 'gelu' is not supported, only 'silu'"),
        (
            keys_of({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
            "rope type 'yarn' is not supported",
        ),
        (
            keys_of({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}),
            "rope type 'linear'",
        ),
        (keys_of({"use_sliding_window": True, "max_window_layers": 1}), "sliding window"),
        (keys_of({"layer_types": ["full_attention", "sliding_attention"]}), "sliding window"),
        (keys_of({}, without=["vocab_size"]), "no key 'vocab_size'"),
        (keys_of({"rope_scaling": "yarn"}), "rope type 'yarn' is not supported"),
        (keys_of({"hidden_size": "64"}), "hidden_size is '64': it must be a positive whole number"),
        (
            keys_of({"num_attention_heads": None}),
            "num_attention_heads is None: it must be a positive whole number",
        ),
        (
            keys_of({"num_hidden_layers": 0}),
            "num_hidden_layers is 0: it must be a positive whole number",
        ),
    ],
)
def test_configs_that_cannot_be_computed_are_refused(keys, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        weights.read_config(write_config(tmp_path, keys))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_shape_of_no_family_gets_no_config():
    with pytest.raises(
        InputError,
        match="attention_bias=True, output_bias=False, qk_norm=True fits none of .* llama",
    ):
        weights.hf_config(CONFIG._replace(qk_norm=True))


# Broken checkpoints


def change_tensors(folder, change):
    save_file(
        change(load_file(folder / "model.safetensors")),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def without(name):
    return lambda folder: change_tensors(
        folder, lambda stored: {k: v for k, v in stored.items() if k != name}
    )


def with_(name, tensor):
    return lambda folder: change_tensors(folder, lambda stored: stored | {name: tensor})


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_a_file(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / weights.INDEX).write_text(json.dumps(index))


def lose_the_map(folder):
    (folder / "model.safetensors").unlink()
    (folder / weights.INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder .*copy"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json cannot be read: it is not JSON",
        ),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "config.json cannot be read: it holds a list, not an obj.*: copy",
        ),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "holds adapters only: give",
        ),
        (
            lose_the_map,
            "model.safetensors.index.json does not say which tensors are where: copy it again",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (only_bin, "pytorch_model.bin, but only safetensors are read"),
        (cut, "model.safetensors is broken"),
        (lose_a_file, "no model-00001-of-00002.safetensors"),
        (without(UP), f"no tensor {UP}"),
        (without("lm_head.weight"), "no tensor lm_head.weight"),
        (
            with_(UP, np.zeros((32, 48), np.float32)),
            rf"{UP} has shape \(32, 48\), but .* \(48, "
            r"32\)",
        ),
        (with_(UP, np.zeros((48, 32), np.int8)), f"{UP} is of dtype I8, but only F32"),
        (
            with_("model.layers.2.mlp.up_proj.weight", np.zeros(1, np.float32)),
            "layers.2.* does not belong to the decoder",
        ),
    ],
)
def test_broken_checkpoints_are_refused_in_one_sentence(damage, message, copied):
    damage(copied)
    with pytest.raises(InputError, match=message) as caught:
        weights.load(copied, weights.read_config(copied))
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)
