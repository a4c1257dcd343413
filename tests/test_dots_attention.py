import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import mesh as meshes
from jaxrft.select.dots import attention
from jaxrft.types import InputError, Projections

NAN = float("nan")
VECTORS = dict(np.load(Path(__file__).parent / "vectors" / "dots.npz"))
QUERIES, REFERENCES, RATES = (
    jnp.array(VECTORS[name])
    for name in ("query_embeddings", "reference_embeddings", "reference_pass_rates")
)
CASES = (
    "plain_layers1_topk0",
    "platt_layers1_topk8",
    "temperature_layers1_topk0",
    "group_logit_temp_layers3_topk8",
)
WHOLE = CASES[-1]


def torch_state(case):
    """The torch-named parameters of a case of the published predictor."""
    return {
        name.split("/param/")[1]: x
        for name, x in VECTORS.items()
        if name.startswith(case + "/param/")
    }


def test_the_vectors_have_these_cases():
    assert {name.split("/")[0] for name in VECTORS if "/param/" in name} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_predictions_match_the_published_predictor(case):
    calibration, _, top_k = case.rsplit("_", 2)
    options = dict(calibration=calibration, top_k=int(top_k.removeprefix("topk")) or None)
    params = attention.params_from_torch(
        {f"regressor.{name}": x for name, x in torch_state(case).items()}
    )
    predict = jax.jit(
        lambda *arrays, temperature: attention.predict(*arrays, temperature=temperature, **options)
    )
    for temperature in ("1.0", "0.25"):
        found = predict(params, QUERIES, REFERENCES, RATES, temperature=float(temperature))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, VECTORS[f"{case}_tau{temperature}/prediction"], atol=1e-5)


def affine(weight, bias):
    return attention.Affine(jnp.array(weight, jnp.float32), jnp.array(bias, jnp.float32))


TOWER = attention.Tower(affine([1.0], [0.0]), (affine([[1.0]], [0.0]),), affine([1.0], [0.0]))


def test_every_calibration_by_hand():
    """Scores 0 and ln 3 weigh two references of 0.2 and 1 as 1/4 and 3/4: b = 0.8, logit ln 4."""
    group = (
        affine(np.zeros((2, 10)), np.zeros(10)),
        affine(np.zeros((10, 2)), [np.log(np.exp(2.0) - 1), 0.0]),
    )
    params = attention.Params(TOWER, TOWER, jnp.array(2.0), jnp.array(0.0), group)
    near = Projections(jnp.array([[1.0]]), jnp.array([[0.0], [np.log(3.0)]], jnp.float32))

    def found(calibration, **options):
        (rate,) = attention.predict_projected(
            params, near, jnp.array([0.2, 1.0]), calibration=calibration, **options
        )
        return float(rate)

    assert found("plain") == pytest.approx(0.8)
    assert found("platt") == pytest.approx(16 / 17)
    assert found("temperature") == pytest.approx(2 / 3)
    assert found("group_logit_temp") == pytest.approx(2 / 3)  # softplus(m_0) = 2, tanh(m_1) = 0
    assert found("plain", temperature=0.5) == pytest.approx(0.1 * 0.2 + 0.9)
    assert found("plain", top_k=1) == 1.0
    assert found("plain", top_k=7) == pytest.approx(0.8)


def test_every_parameter_of_a_tower_has_its_name_in_the_flax_module():
    tower = attention.params_from_torch(torch_state(WHOLE)).query
    named = attention.flax_params(tower)
    drawn = attention.Encoder((40, 40, 40)).init(jax.random.key(0), QUERIES)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(named, drawn)
    assert {id(x) for x in jax.tree.leaves(named)} == {id(x) for x in jax.tree.leaves(tower)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": jnp.ones((2, 3))},
            r"^reference has shape \(4, 5\): it must be \[R, h\], "
            r"here \[R, 3\]$",
        ),
        ({"query": jnp.ones(5)}, r"^query has shape \(5,\): it must be \[Q, h\]$"),
        ({"query": jnp.ones((2, 5), int)}, "^query is int32: its dtype must be float$"),
        (
            {"rates": jnp.ones(3)},
            r"^reference_pass_rates has shape \(3,\): it must be \[R\], "
            r"here \[4\]$",
        ),
        (
            {"rates": jnp.ones(4, complex)},
            "^reference_pass_rates is complex64: its dtype must be bool or",
        ),
    ],
)
def test_an_array_of_another_shape_or_dtype_is_named(change, message):
    arrays = {
        "query": jnp.ones((2, 5)),
        "reference": jnp.ones((4, 5)),
        "rates": jnp.ones(4),
    } | change
    params = attention.Params(TOWER, TOWER)
    with pytest.raises(InputError, match=message):
        attention.predict_projected(
            params,
            Projections(arrays["query"], arrays["reference"]),
            arrays["rates"],
            calibration="plain",
        )


@pytest.mark.parametrize("top_k", [None, 8])
def test_an_unknown_reference_counts_as_absent(top_k):
    params = attention.params_from_torch(torch_state(WHOLE))
    predict = jax.jit(functools.partial(attention.predict, params, QUERIES, top_k=top_k))
    expected = predict(REFERENCES[2:], RATES[2:])
    np.testing.assert_allclose(predict(REFERENCES, RATES.at[:2].set(NAN)), expected, rtol=1e-5)
    assert np.isnan(predict(REFERENCES, RATES * NAN)).all()
    assert np.isfinite(predict(REFERENCES, (RATES * NAN).at[3].set(0.5))).all()


def test_projected_once_it_predicts_the_same_also_from_half_precision():
    params = attention.params_from_torch(torch_state(WHOLE))
    expected = attention.predict(params, QUERIES, REFERENCES, RATES)
    near = attention.project(params, QUERIES.astype(jnp.float16), REFERENCES)
    assert near.query.dtype == near.reference.dtype == jnp.float32
    np.testing.assert_allclose(
        attention.predict_projected(params, near, RATES), expected, atol=1e-3
    )


@pytest.mark.parametrize("top_k", [None, 8])
def test_a_sharded_table_is_projected_and_predicted_the_same_and_not_gathered(mesh, top_k):
    params = attention.params_from_torch(torch_state(WHOLE))
    embeddings = jnp.tile(QUERIES, (64, 1)) * jnp.linspace(0.5, 2, 1024)[:, None]  # [1024, 48]
    ids = jnp.arange(0, 24 * 40, 40)

    def predict(params, table, rates):
        near = Projections(table.query, table.reference[ids])
        return attention.predict_projected(params, near, rates, top_k=top_k)

    project, predict = jax.jit(lambda params, x: attention.project(params, x, x)), jax.jit(predict)
    expected = predict(params, project(params, embeddings), RATES)
    with jax.set_mesh(mesh):
        table = project(params, meshes.from_host(mesh, np.asarray(embeddings), "task", None))
        rows = meshes.sharding(mesh, "task", None)
        assert all(x.sharding.is_equivalent_to(rows, 2) for x in table)
        found = predict(params, table, RATES)
        program = predict.lower(params, table, RATES).compile().as_text()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert "f32[256,24]" in program  # scores of a shard
    assert "f32[1024," not in program


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, r"has 0 parts of sim_head.query_proj.\*: .* model_state_dict"),
        (
            lambda state: {k: x for k, x in state.items() if k != "sim_head.ref_proj.4.bias"},
            "has no .*ref_proj.4.bias",
        ),
        (
            lambda state: {k: x for k, x in state.items() if k != "mlp.2.weight"},
            "has no mlp.2.weight",
        ),
        (
            lambda state: state | {"sim_head.query_proj.4.weight": np.zeros((40, 39))},
            r"query_proj.4.weight is \[40, 39\]: it must be \[40, 40\]",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        attention.params_from_torch(change(torch_state(WHOLE)))


def test_embeddings_of_another_model_are_refused():
    params = attention.params_from_torch(torch_state(WHOLE))
    with pytest.raises(
        InputError,
        match=r"shape \(16, 40\): the predictor was trained on \[N, "
        r"48\]",
    ):
        attention.project(params, QUERIES[:, :40], REFERENCES)
