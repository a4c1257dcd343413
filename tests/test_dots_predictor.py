import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrft.select.dots import attention, training
from jaxrft.select.dots.predictor import (
    FORMAT,
    Origin,
    Predictor,
    check_embeddings,
    load_predictor,
    save_predictor,
)
from jaxrft.types import InputError


def predictor(calibration="group_logit_temp", **changes):
    params = training.initial(jax.random.key(0), 5, calibration=calibration, width=4, layers=2)
    return Predictor(params, calibration, 0.25, None, Origin("tiny", 5))._replace(**changes)


@pytest.mark.parametrize("calibration", attention.NEEDS)
def test_saved_predictor_loads_unchanged(tmp_path, calibration):
    written = predictor(calibration, top_k=3)
    save_predictor(tmp_path / "p.safetensors", written)
    read = load_predictor(tmp_path / "p.safetensors")
    assert (
        jax.tree.structure(read.params) == jax.tree.structure(written.params)
        and read[1:] == written[1:]
    )
    assert all(map(np.array_equal, jax.tree.leaves(read.params), jax.tree.leaves(written.params)))
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_tensors_have_readable_names_and_nothing_that_is_not_used(tmp_path):
    path, written = tmp_path / "p.safetensors", predictor("plain")
    save_predictor(path, written._replace(params=written.params._replace(scale=jnp.ones(()))))
    tensors = load_file(path)
    assert tensors["query.layers.1.weight"].shape == (4, 4) and tensors[
        "reference.norm_in.bias"
    ].shape == (5,)
    assert not {name for name in tensors if not name.startswith(("query.", "reference."))}


def damage(path, *, tensors=None, metadata=None):
    """Writes the predictor's file with some tensors and metadata changed, those that are None
    removed.
    """
    settings = {
        "calibration": "platt",
        "temperature": 1.0,
        "top_k": None,
        "embeddings": {"model": "m", "width": 5},
    }
    save_predictor(path, predictor("platt"))
    whole = load_file(path) | (tensors or {})
    whole = {name: x for name, x in whole.items() if x is not None}
    save_file(
        whole,
        path,
        metadata={"format": FORMAT, "settings": json.dumps(settings)} | (metadata or {}),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"scale": None}}, r"the tensor scale is absent, it must be \[\]"),
        (
            {"tensors": {"other": np.ones(2, np.float32)}},
            r"the tensor other is \[2\], it must "
            r"be absent",
        ),
        (
            {"tensors": {"query.layers.1.weight": np.ones((4, 3), np.float32)}},
            r"is \[4, 3\], "
            r"it must be \[4, 4\]",
        ),
        ({"tensors": {"query.norm_out.bias": None}}, "it must be"),
        (
            {"tensors": {"shift": np.array(np.nan, np.float32)}},
            "the tensor shift holds numbers that are not finite",
        ),
        ({"metadata": {"settings": "{}"}}, "its settings {} are not those of a predictor"),
        ({"metadata": {"settings": "{"}}, "cannot be read as a predictor"),
        (
            {"metadata": {"format": "jaxrft predictor 9"}},
            "holds jaxrft predictor 9, not a jaxrft predictor 1",
        ),
        ({"metadata": {"format": "pt"}}, "holds pt, not a jaxrft predictor 1"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, changes, message):
    damage(tmp_path / "p.safetensors", **changes)
    with pytest.raises(InputError, match=message) as error:
        load_predictor(tmp_path / "p.safetensors")
    assert "p.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_missing_file_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("nothing of the kind")
    save_file({"x": np.ones(2)}, tmp_path / "other.safetensors")
    for name, message in {
        "absent": "no file .*absent",
        "text": "cannot be read as a predictor",
        "other": "holds something else, not",
    }.items():
        with pytest.raises(InputError, match=message):
            load_predictor(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("p.npz", {}, "a name that ends in .safetensors"),
        ("no/p.safetensors", {}, "cannot write .* a folder where you may write"),
        ("p.safetensors", {"temperature": 0.0}, "settings .* are not those of a predictor"),
        ("p.safetensors", {"calibration": "platt"}, r"the tensor scale is absent, it must be \[\]"),
        (
            "p.safetensors",
            {"embeddings": Origin("tiny", 6)},
            r"query.layers.0.weight is \[5, "
            r"4\], it must be \[6, 4\]",
        ),
    ],
)
def test_invalid_predictor_is_not_saved(tmp_path, name, changes, message):
    with pytest.raises(InputError, match=message):
        save_predictor(tmp_path / name, predictor()._replace(**changes))
    assert not os.listdir(tmp_path)


def test_embeddings_of_another_model_are_refused():
    check_embeddings(predictor(), Origin("tiny", 5))
    with pytest.raises(
        InputError,
        match=r"trained on embeddings by tiny \(width 5\), but these are by big "
        r"\(width 7\)",
    ):
        check_embeddings(predictor(), Origin("big", 7))
