"""Predicts pass rates of tasks from those of similar ones, by attention between embeddings [arXiv
2506.05316].

With R reference tasks whose pass rates r are known,

    b_i = sum_j softmax_j(q(z_i) . k(z_j) / sqrt(h) / temperature) r_j,

calibrated. q and k are towers, LayerNorm -> (Linear -> GELU -> ...) -> Linear -> LayerNorm, of
width h. All products have full float32 precision, on accelerators too: the table is projected once,
so that speed is not at stake.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypedDict, Unpack, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxrft.errors import shown
from jaxrft.mesh import constrain
from jaxrft.select.checks import are_numbers, check_choice
from jaxrft.shapes import REAL, check_dtypes, check_shapes
from jaxrft.types import Array, InputError, Projections

Calibration = Literal["plain", "platt", "temperature", "group_logit_temp"]

NEEDS: dict[Calibration, tuple[str, ...]] = {  # fields of Params that a calibration uses
    "plain": (),
    "platt": ("scale", "shift"),
    "temperature": ("scale",),
    "group_logit_temp": ("group",),
}
PRECISION = jax.lax.Precision.HIGHEST
CLIP = 1e-4  # b is kept this far from 0 and 1 before its logit is taken
LAYER_NORM_EPSILON = 1e-5


class Affine(NamedTuple):
    """Parameters of a layer, x weight + bias; of a LayerNorm, the weight is the vector of its
    scales.
    """

    weight: Array  # [in, out], or [width] of a LayerNorm
    bias: Array  # [out]


class Tower(NamedTuple):
    """Parameters of an `Encoder`."""

    norm_in: Affine  # [E]
    layers: tuple[Affine, ...]  # [E, h], then [h, h]
    norm_out: Affine  # [h]


class Params(NamedTuple):
    """Parameters of the predictor; None for those that its calibration does not need."""

    query: Tower
    reference: Tower
    scale: Array | None = None  # [], of platt and temperature
    shift: Array | None = None  # [], of platt
    group: tuple[Affine, Affine] | None = None  # [2, 10] and [10, 2], of group_logit_temp


class Options(TypedDict, total=False):
    """Keyword arguments of `predict_projected`."""

    calibration: Calibration
    temperature: ArrayLike
    top_k: int | None


class LayerNorm(nn.Module):
    """Normalizes each row [width] to mean 0 and variance 1, then scales and shifts it.

    In place of Flax's own, whose gradient rounds differently: a predictor trained before is
    reproduced bit for bit.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes [Q, width] from [Q, width]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:])
        centered = x - x.mean(axis=1, keepdims=True)
        variance = (centered**2).mean(axis=1, keepdims=True)
        return centered * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale[None] + bias[None]


class Encoder(nn.Module):
    """Maps embeddings [Q, E] to the space [Q, h] in which tasks are compared."""

    widths: tuple[int, ...]  # of the layers
    dropout: float = 0.0  # share of the inputs of every layer but the first, in training

    @nn.compact
    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Computes float32 [Q, h] from [Q, E]; drops units out if a `key` is given."""
        x = LayerNorm(name="norm_in")(x.astype(jnp.float32))
        for index, width in enumerate(self.widths):
            if index:
                x = nn.gelu(x, approximate=False)
            if index and key is not None:
                x = nn.Dropout(self.dropout, deterministic=False)(
                    x, rng=jax.random.fold_in(key, index)
                )
            x = nn.Dense(width, precision=PRECISION, name=f"layers_{index}")(x)
        return LayerNorm(name="norm_out")(x)


def encode(tower: Tower, x: Array, key: Array | None = None, *, dropout: float = 0.0) -> Array:
    """Applies an `Encoder` with the parameters of a tower: [Q, E] -> [Q, h]."""
    widths = tuple(layer.bias.size for layer in tower.layers)
    variables = {"params": flax_params(tower)}
    return Encoder(widths, dropout).apply(variables, x, key)  # pyright: ignore[reportReturnType]


def flax_params(tower: Tower) -> dict[str, dict[str, Array]]:
    """Returns the parameters of a tower by the names that `Encoder` gives them."""
    params = {f"layers_{index}": _dense_params(layer) for index, layer in enumerate(tower.layers)}
    for name in ("norm_in", "norm_out"):
        norm = getattr(tower, name)
        params[name] = {"scale": norm.weight, "bias": norm.bias}
    return params


def _dense_params(layer: Affine) -> dict[str, Array]:
    return {"kernel": layer.weight, "bias": layer.bias}


def project(params: Params, query_embeddings: Array, reference_embeddings: Array) -> Projections:
    """Computes q of embeddings [Q, E] and k of embeddings [R, E], float32: once for a frozen
    predictor.

    Arrays that are sharded over tasks stay so.
    Raises InputError for embeddings of another width than the predictor's.
    """
    width = params.query.norm_in.bias.shape[0]
    for embeddings in (query_embeddings, reference_embeddings):
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise InputError(
                f"embeddings have shape {embeddings.shape}: the predictor was "
                f"trained on [N, {width}]"
            )
    check_dtypes(REAL, query_embeddings=query_embeddings, reference_embeddings=reference_embeddings)
    query = encode(params.query, query_embeddings)
    reference = encode(params.reference, reference_embeddings)
    return Projections(constrain(query, "task", None), constrain(reference, "task", None))


def project_table(params: Params, embeddings: Array) -> Projections:
    """Projects the embeddings [N, E] of all tasks as queries and as references."""
    return project(params, embeddings, embeddings)


def predict(
    params: Params,
    query_embeddings: Array,
    reference_embeddings: Array,
    reference_pass_rates: Array,
    **options: Unpack[Options],
) -> Array:
    """Predicts pass rates [Q] of tasks with embeddings [Q, E], from R tasks [R, E] whose pass rates
    [R] are known.

    `project`, then `predict_projected`, whose options these are.
    """
    projections = project(params, query_embeddings, reference_embeddings)
    return predict_projected(params, projections, reference_pass_rates, **options)


def predict_projected(
    params: Params,
    projections: Projections,
    reference_pass_rates: Array,
    *,
    calibration: Calibration = "group_logit_temp",
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
) -> Array:
    """Predicts pass rates [Q] of tasks projected to [Q, h], from R tasks [R, h] whose pass rates
    [R] are known.

    With b as above and l = logit(clip(b, 1e-4, 1 - 1e-4)), the calibrations are `plain`: b;
    `platt`: sigmoid(scale l + shift); `temperature`: sigmoid(l / scale); `group_logit_temp`:
    sigmoid(l / clip(softplus(m_0), 1e-2, 10) + tanh(m_1)), m = MLP([mean(r), std(r)]) with the
    unbiased std. `temperature` > 0 divides the scores; `top_k` is the number of most similar
    references that are attended to. Deviations: a reference whose pass rate is NaN counts as
    absent, and without any other the prediction is NaN; the std of a single reference is 0. Raises
    InputError for a calibration whose parameters the predictor does not have.
    """
    check_calibration(params, calibration)
    query, reference = projections
    check_shapes(
        query=(query, "Qh", float),
        reference=(reference, "Rh", float),
        reference_pass_rates=(reference_pass_rates, "R", REAL),
    )
    known = ~jnp.isnan(reference_pass_rates)  # [R]
    rates = jnp.where(known, reference_pass_rates, 0).astype(jnp.float32)
    scores = jnp.einsum("qh,rh->qr", query, reference, precision=PRECISION)
    scores = scores / (math.sqrt(query.shape[1]) * jnp.asarray(temperature, jnp.float32))
    scores = jnp.where(known[None], scores, -jnp.inf)
    if top_k is not None and top_k < rates.shape[0]:
        scores = jnp.where(_among_largest(scores, top_k), scores, -jnp.inf)
    average = jnp.matmul(jax.nn.softmax(scores, axis=1), rates, precision=PRECISION)
    return calibrate(params, average, rates, known, calibration)


def _among_largest(scores: Array, count: int) -> Array:
    """Marks the `count` largest of scores [Q, R] in each row; of equal ones, the first.

    By bisection, bit after bit of the `count`-th largest: that runs on all cores of a CPU, where
    `top_k` uses one, and leaves a sharded table where it is.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(scores), jnp.int32)
    # [Q, R], integers in the order of the scores
    order = jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)

    def enough(lowest: Array) -> Array:  # [Q] -> [Q] bool
        return (order >= lowest[:, None]).sum(axis=1, dtype=jnp.int16) >= count

    def refine(i: Array, lowest: Array) -> Array:
        raised = lowest + (np.int32(2**30) >> i)
        return jnp.where(enough(raised), raised, lowest)

    zero = jnp.zeros(order.shape[0], jnp.int32)
    start = jnp.where(enough(zero), zero, np.int32(-(2**31)))
    lowest = jax.lax.fori_loop(0, 31, refine, start)[:, None]
    above = order > lowest
    tied = order == lowest
    slots = count - above.sum(axis=1, keepdims=True)
    too_many = (tied.sum(axis=1, keepdims=True) > slots).any()
    first = jax.lax.cond(too_many, lambda: jnp.cumsum(tied, axis=1) <= slots, lambda: tied)
    return above | (tied & first)


def calibrate(
    params: Params, average: Array, rates: Array, known: Array, calibration: Calibration
) -> Array:
    """Computes pass rates [Q] from averages b [Q] over references with pass rates [R], of which
    `known` [R] count.
    """
    if calibration == "plain":
        return jnp.clip(average, 0, 1)  # of rates 1 it may be rounded to 1.0000001
    logit = jax.scipy.special.logit(jnp.clip(average, CLIP, 1 - CLIP))
    if calibration == "platt":
        return jax.nn.sigmoid(params.scale * logit + params.shift)  # pyright: ignore
    if calibration == "temperature":
        return jax.nn.sigmoid(logit / params.scale)  # pyright: ignore[reportOperatorIssue]
    count = known.sum().astype(jnp.float32)
    mean = rates.sum() / jnp.maximum(count, 1)
    squares = (jnp.where(known, rates - mean, 0) ** 2).sum()
    summary = jnp.stack([mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1))])  # [2]
    inner, outer = params.group  # pyright: ignore[reportGeneralTypeIssues]
    sharpness, shift = _linear(outer, jax.nn.relu(_linear(inner, summary)))
    return jax.nn.sigmoid(logit / jnp.clip(jax.nn.softplus(sharpness), 1e-2, 10) + jnp.tanh(shift))


def _linear(layer: Affine, x: Array) -> Array:
    """Applies a layer to [in]; returns [out]."""
    dense = nn.Dense(layer.bias.size, precision=PRECISION)
    return dense.apply({"params": _dense_params(layer)}, x)  # pyright: ignore[reportReturnType]


def check_calibration(params: Params, calibration: Calibration) -> None:
    """Raises InputError unless there is such a calibration and the predictor has its parameters."""
    if not isinstance(params, Params):
        raise InputError(
            f"predictor is {shown(params)}: it must be attention.Params, such as "
            "load_predictor(FILE).params holds"
        )
    check_choice("calibration", calibration, get_args(Calibration))
    missing = [name for name in NEEDS[calibration] if getattr(params, name) is None]
    if missing:
        raise InputError(
            f"the predictor was trained without the calibration {calibration} (it has no "
            f"{' and no '.join(missing)}): choose the one it was trained with"
        )
    used = jax.tree.leaves([getattr(params, name) for name in NEEDS[calibration]])
    arrays = [np.asarray(x) for x in used if not isinstance(x, Tracer)]
    if not all(are_numbers(x) and np.isfinite(x.astype(np.float32)).all() for x in arrays):
        raise InputError("the predictor holds numbers that are not finite: train it again")


def params_from_torch(state_dict: Mapping[str, ArrayLike]) -> Params:
    """Reads the predictor of a published checkpoint from the arrays of its `model_state_dict`.

    Names may begin with "regressor."; a torch `weight` [out, in] is transposed. The number of
    layers and the calibration's parameters are read off the names. Raises InputError for a name or
    shape that is missing or wrong.
    """
    state = {
        name.removeprefix("regressor."): np.asarray(x, np.float32) for name, x in state_dict.items()
    }
    scale, shift = (
        jnp.asarray(state[name]).reshape(()) if name in state else None
        for name in ("scale", "res_scale")
    )
    group = None
    if "mlp.0.weight" in state:
        group = (_affine_from_torch(state, "mlp.0"), _affine_from_torch(state, "mlp.2"))
    query = _tower_from_torch(state, "sim_head.query_proj.")
    return Params(query, _tower_from_torch(state, "sim_head.ref_proj."), scale, shift, group)


def _tower_from_torch(state: dict[str, np.ndarray], begin: str) -> Tower:
    """Reads the tower whose arrays have names that begin with `begin`."""
    indices = sorted(
        {int(name.removeprefix(begin).split(".")[0]) for name in state if name.startswith(begin)}
    )
    if len(indices) < 3:
        raise InputError(
            f"the predictor's state has {len(indices)} parts of {begin}*: it must have a "
            "LayerNorm, Linears and a "
            "LayerNorm, as the model_state_dict of a published checkpoint"
        )
    norm_in, *layers, norm_out = (_affine_from_torch(state, f"{begin}{index}") for index in indices)
    widths = [norm_in.bias.size, *(layer.bias.size for layer in layers)]
    shapes = [(widths[0],), *zip(widths, widths[1:], strict=False), (widths[-1],)]
    for index, expected, part in zip(indices, shapes, (norm_in, *layers, norm_out), strict=True):
        if part.weight.shape != expected or part.bias.shape != expected[-1:]:
            raise InputError(
                f"{begin}{index}.weight is {list(part.weight.T.shape)}: it must "
                f"be {list(expected[::-1])}"
            )
    return Tower(norm_in, tuple(layers), norm_out)


def _affine_from_torch(state: dict[str, np.ndarray], name: str) -> Affine:
    """Reads the layer called `name`."""
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" not in state:
            raise InputError(
                f"the predictor's state has no {name}.{kind}: give the model_state_dict of a "
                "published checkpoint"
            )
    return Affine(jnp.asarray(state[f"{name}.weight"].T), jnp.asarray(state[f"{name}.bias"]))
