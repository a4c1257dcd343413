"""Which tensors a folder holds under which names, and what of them is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrft.lm import hub, model, tensors, weights
from jaxrft.types import InputError

TIED = model.ModelConfig(
    64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, tie_word_embeddings=True
)
LAYER = "model.layers.0.mlp.up_proj"
INT8 = np.zeros((48, 32), np.int8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    random = np.random.default_rng(0)
    params = {
        row.name: random.normal(size=row.shape).astype(np.float32) for row in model.table(TIED)
    }
    folder = tmp_path_factory.mktemp("tensors") / "checkpoint"
    weights.save(folder, params, TIED, source=weights.hf_config(TIED))
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def write(folder, stored, file="model.safetensors"):
    save_file(
        {name: np.ascontiguousarray(x) for name, x in stored.items()},
        folder / file,
        metadata={"format": "pt"},
    )


def load(folder):
    config = weights.read_config(folder)
    return weights.load(folder, config)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: f"_orig_mod.{name.removeprefix('model.')}",
        lambda name: f"model.{name}",  # of a trainer that calls the decoder its model
        lambda name: f"actor.{name}",
        lambda name: f"policy.module.pretrained_model.{name.removeprefix('model.')}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._fsdp_wrapped_module."),
        lambda name: name.replace("model.embed_tokens", "lm_head"),  # tied, it is the same tensor
    ],
)
def test_names_that_follow_one_rule_are_loaded(rename, checkpoint, copied):
    write(copied, {rename(name): x for name, x in load_file(copied / "model.safetensors").items()})
    assert_equal(load(copied), load(checkpoint))


def some(change):
    """Renames half of the tensors."""
    return lambda stored: {
        change(name) if i % 2 else name: x for i, (name, x) in enumerate(sorted(stored.items()))
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            some(lambda name: f"_orig_mod.{name}"),
            "tensors of two kinds of names, _orig_mod.model.* and model",
        ),
        (some(lambda name: name.removeprefix("model.")), "tensors of two kinds of names, "),
        (
            lambda s: s | {f"{LAYER}._orig_mod.weight": INT8},
            f"the tensor {LAYER}.weight twice, as .*_orig_mod",
        ),
        (
            lambda s: s | {f"{LAYER}.lora_A.default.weight": INT8},
            "adapters of peft that are not merged: merge them",
        ),
        (
            lambda s: {f"base_model.model.{n}": x for n, x in s.items()},
            "adapters of peft that are not merged",
        ),
        (
            lambda s: {n.replace(".weight", ".base_layer.weight"): x for n, x in s.items()},
            "adapters of peft",
        ),
        (lambda s: {"layers.0.attention.wq.weight": INT8}, "in the format of Meta's releases"),
        (lambda s: {f"language_model.{n}": x for n, x in s.items()}, "more than a decoder of text"),
        (lambda s: s | {"score.weight": INT8}, "a model that gives scores"),
        (
            some(lambda name: f"actor.{name}"),
            "no tensor model.layers.0.input_layernorm.weight.*, but actor.model.",
        ),
        (
            lambda s: {f"{p}.{n}": x for n, x in s.items() for p in ("actor", "ref")},
            "but actor.model.embed_tokens",
        ),
        (lambda s: s | {"": INT8}, "a tensor of a name that no decoder has, '': copy"),
        (lambda s: s | {"a\n\x1b[2J": INT8}, r"a tensor of a name that no decoder has, 'a\\n"),
        (
            lambda s: s | {"x" * 10_000: INT8},
            "a tensor of a name that no decoder has, 'x{99}: copy",
        ),
        (
            lambda s: s | {"critic.model.norm.weight": s["model.norm.weight"]},
            "critic.model.norm.weight does not belong",
        ),
    ],
)
def test_foreign_names_are_refused_with_their_origin(change, message, copied):
    write(copied, change(load_file(copied / "model.safetensors")))
    with pytest.raises(InputError, match=message) as caught:
        load(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def quantize(*names, method=None, dtype=np.int32):
    """Adds tensors of these ends to those of a layer, and the method to config.json."""

    def change(folder):
        stored = load_file(folder / "model.safetensors")
        write(folder, stored | {f"{LAYER}.{name}": np.zeros(4, dtype) for name in names})
        if method is not None:
            keys = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps(keys | {"quantization_config": {"quant_method": method}})
            )

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            quantize("qweight", "qzeros", "scales", "g_idx", method="gptq"),
            "quantized by gptq .*dtype I32",
        ),
        (
            quantize("qweight", "qzeros", "scales", method="awq"),
            "quantized by awq .* give the checkpoint that it was",
        ),
        (quantize("qweight", "qzeros"), "quantized by GPTQ or AWQ"),
        (
            quantize("weight.absmax", method="bitsandbytes", dtype=np.uint8),
            r"quantized by bitsandbytes.*\.dequantize\(",
        ),
        (
            quantize("SCB", dtype=np.float32),
            "quantized by bitsandbytes .*only quantized checkpoints have.*dequantize",
        ),
        (
            quantize("weight_scale_inv", method="fp8", dtype=np.float32),
            "quantized by fp8 .*FineGrainedFP8Config",
        ),
        (
            quantize("weight_packed", method="compressed-tensors"),
            "quantized by compressed-tensors .*OUT",
        ),
        (
            quantize("weight_blocks", "weight_scales", dtype=np.uint8),
            "quantized by mxfp4 .*Mxfp4Config",
        ),
        (quantize("weight_scale", dtype=np.int8), "quantized by compressed-tensors .*dtype I8"),
        (quantize("W_q", dtype=np.uint8), "quantized by HQQ"),
        (
            quantize("strange", method=5, dtype=np.uint8),
            "strange is of dtype U8, but only F32, BF16, F16 are read",
        ),
    ],
)
def test_quantized_checkpoints_are_refused_with_their_method(change, message, copied):
    change(copied)
    with pytest.raises(InputError, match=message) as caught:
        load(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def test_eight_bit_floats_are_refused_as_fp8(copied):
    stored = load_file(copied / "model.safetensors")
    sizes = {
        name: ("F8_E4M3" if name.endswith("up_proj.weight") else "F32", x)
        for name, x in stored.items()
    }
    header, start = {}, 0
    for name, (dtype, x) in sizes.items():
        end = start + x.size * (1 if dtype == "F8_E4M3" else 4)
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    (copied / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(start)
    )
    with pytest.raises(
        InputError, match="is quantized by fp8 .*up_proj.weight is of dtype F8_E4M3"
    ):
        load(copied)


@pytest.mark.parametrize(
    "name", ["model.gguf", "pytorch_model.bin", "consolidated.00.pth", "model.onnx"]
)
def test_other_formats_are_refused_by_name(name, copied):
    (copied / "model.safetensors").rename(copied / name)
    with pytest.raises(
        InputError, match=f"has {name}, but only safetensors are read: .*(transformers|gguf_file)"
    ):
        load(copied)
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match="has no config.json"):
        load(copied)


# Indices


def index(folder, weight_map):
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def split(folder):
    """Two files of a checkpoint, and what its index says of them."""
    stored = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    parts = {
        "model-00001-of-00002.safetensors": stored[:9],
        "model-00002-of-00002.safetensors": stored[9:],
    }
    for file, part in parts.items():
        write(folder, dict(part), file)
    return {name: file for file, part in parts.items() for name, _ in part}


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "",
        "C:\\x.safetensors",
        "a\0b",
        "..\\b.safetensors",
    ],
)
def test_index_names_files_of_its_own_folder_only(name, copied):
    names = split(copied)
    index(copied, names | {LAYER + ".weight": name})
    for use in (load, lambda folder: weights.check(folder, TIED), hub._complete):
        with pytest.raises(
            InputError, match="index.json names a file that is elsewhere, .*: copy it again"
        ):
            use(copied)


@pytest.mark.parametrize("value", [None, [], {}, 5, {"a": 5}, {"a": None}, "x"])
def test_index_of_another_type_is_refused(value, copied):
    (copied / "model.safetensors").unlink()
    index(copied, value)
    with pytest.raises(InputError, match="index.json does not say which tensors are where"):
        load(copied)


@pytest.mark.parametrize(
    "name", ["x" * 5000 + ".safetensors", "\ud800.safetensors", "none.safetensors"]
)
def test_index_that_names_a_file_that_is_not_there_is_refused(name, copied):
    index(copied, split(copied) | {LAYER + ".weight": name})
    with pytest.raises(InputError, match="which its model.safetensors.index.json names: copy"):
        load(copied)


def test_tensor_in_two_files_is_refused(checkpoint, copied):
    names = split(copied)
    index(copied, names)
    assert_equal(load(copied), load(checkpoint))
    second = "model-00002-of-00002.safetensors"
    first = min(names)
    write(copied, load_file(copied / second) | {first: np.zeros(3, np.float32)}, second)
    with pytest.raises(
        InputError, match=f"the tensor {first} twice, in model-00001.* and in {second}"
    ):
        load(copied)


def test_two_checkpoints_in_a_folder_are_refused(checkpoint, copied):
    index(copied, split(copied))
    shutil.copy(checkpoint / "model.safetensors", copied)
    with pytest.raises(
        InputError, match="holds two checkpoints, model.safetensors and the files of"
    ):
        load(copied)
    for file in copied.glob("model-*"):
        file.unlink()
    index(copied, {"a": "model.safetensors"})
    assert_equal(load(copied), load(checkpoint))
    (copied / "adapter_config.json").write_text("{}")
    write(copied, {"a": INT8}, tensors.ADAPTER)
    with pytest.raises(InputError, match="holds a model and adapters next to it"):
        load(copied)


def test_other_safetensors_of_a_folder_are_named_once(copied, caplog):
    write(copied, {"a": INT8}, "consolidated.safetensors")
    for _ in range(2):
        load(copied)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "has safetensors that are not read: consolidated.safetensors"
    )
