import math

import pytest

from jaxrft.lm import model, published, weights

# As the safetensors of each model count them.
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-Math-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_table_of_weights_counts_the_published_parameters(name, count):
    keys = published.keys(name)
    assert keys is not None
    rows = model.table(weights.model_config(keys, name))
    assert sum(math.prod(row.shape) for row in rows) == count


def test_every_published_model_has_all_keys():
    for name, keys in published._MODELS.items():
        config = weights.model_config(keys, name)
        assert weights.model_config(weights.hf_config(config), name) == config
        assert keys["architectures"] == [weights.FAMILIES[keys["model_type"]].architecture]
        assert keys["max_position_embeddings"] >= 4096, name


def test_published_families_have_their_constants():
    theta = {name: keys["rope_theta"] for name, keys in published._MODELS.items()}
    assert (
        theta["Qwen/Qwen2.5-7B"] == theta["Qwen/Qwen3-8B"] == 1e6
        and theta["Qwen/Qwen2.5-Math-7B"] == 1e4
    )
    keys = published.keys("meta-llama/Llama-3.2-1B-Instruct@main")
    assert keys is not None and keys["rope_scaling"]["factor"] == 32.0
    assert published.keys("Qwen/Qwen2.5-0.5") is None
    keys["rope_theta"] = 0.0
    assert published.keys("meta-llama/Llama-3.2-1B-Instruct")["rope_theta"] == 5e5
