"""Pass rates of tasks from those of similar ones: attention between frozen embeddings [arXiv 2506.05316].

With R reference tasks whose pass rates r are known,

    b_i = sum_j softmax_j(q(z_i) . k(z_j) / sqrt(h) / temperature) r_j,

calibrated. q and k are towers, LayerNorm -> (Linear -> GELU -> ...) -> Linear -> LayerNorm, of width h. Every product
is a full float32 one, on accelerators too: the table is projected once, so that speed is not at stake.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxrft.errors import shown
from jaxrft.mesh import constrain
from jaxrft.select.checks import are_numbers, check_choice
from jaxrft.types import Array, InputError, Projections

Calibration = Literal["plain", "platt", "temperature", "group_logit_temp"]

NEEDS: dict[Calibration, tuple[str, ...]] = {  # fields of Params that a calibration uses
    "plain": (),
    "platt": ("scale", "shift"),
    "temperature": ("scale",),
    "group_logit_temp": ("group",),
}
PRECISION = jax.lax.Precision.HIGHEST
CLIP = 1e-4  # b is kept so far from 0 and 1 before its logit is taken
LAYER_NORM_EPSILON = 1e-5


class Affine(NamedTuple):
    """x weight + bias: of a Linear with a matrix, of a LayerNorm with a vector of scales."""

    weight: Array  # [in, out], or [width] of a LayerNorm
    bias: Array  # [out]


class Tower(NamedTuple):
    """From an embedding to the space in which tasks are compared."""

    norm_in: Affine  # [E]
    layers: tuple[Affine, ...]  # [E, h], then [h, h]
    norm_out: Affine  # [h]


class Params(NamedTuple):
    """The predictor; None is what its calibration does not need."""

    query: Tower
    reference: Tower
    scale: Array | None = None  # [], of platt and temperature
    shift: Array | None = None  # [], of platt
    group: tuple[Affine, Affine] | None = None  # [2, 10] and [10, 2], of group_logit_temp


def params_from_torch(state_dict: Mapping[str, Any]) -> Params:
    """The predictor of a published checkpoint, from the arrays of its `model_state_dict`.

    Names may begin with "regressor."; a torch `weight` [out, in] is transposed. The number of layers and the
    calibration's parameters are read off the names.
    Raises InputError for a name or shape that is missing or wrong.
    """
    state = {name.removeprefix("regressor."): np.asarray(x, np.float32) for name, x in state_dict.items()}

    def affine(name: str) -> Affine:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" not in state:
                raise InputError(
                    f"the predictor's state has no {name}.{kind}: give the model_state_dict of a published checkpoint"
                )
        return Affine(jnp.asarray(state[f"{name}.weight"].T), jnp.asarray(state[f"{name}.bias"]))

    def tower(name: str) -> Tower:
        begin = f"sim_head.{name}."
        indices = sorted({int(key.removeprefix(begin).split(".")[0]) for key in state if key.startswith(begin)})
        if len(indices) < 3:
            raise InputError(
                f"the predictor's state has {len(indices)} parts of {begin}*: it must have a LayerNorm, Linears and a "
                "LayerNorm, as the model_state_dict of a published checkpoint"
            )
        norm_in, *layers, norm_out = (affine(f"{begin}{index}") for index in indices)
        widths = [norm_in.bias.size, *(layer.bias.size for layer in layers)]
        shapes = [(widths[0],), *zip(widths, widths[1:], strict=False), (widths[-1],)]
        for index, expected, part in zip(indices, shapes, (norm_in, *layers, norm_out), strict=True):
            if part.weight.shape != expected or part.bias.shape != expected[-1:]:
                raise InputError(
                    f"{begin}{index}.weight is {list(part.weight.T.shape)}: it must be {list(expected[::-1])}"
                )
        return Tower(norm_in, tuple(layers), norm_out)

    scale, shift = (jnp.asarray(state[x]).reshape(()) if x in state else None for x in ("scale", "res_scale"))
    group = (affine("mlp.0"), affine("mlp.2")) if "mlp.0.weight" in state else None
    return Params(tower("query_proj"), tower("ref_proj"), scale, shift, group)


def project(params: Params, query_embeddings: Array, reference_embeddings: Array) -> Projections:
    """q of embeddings [Q, E] and k of embeddings [R, E], float32: once for a frozen predictor.

    The whole table is projected as both, `project(params, embeddings, embeddings)`, for any of its tasks may become a
    reference. What is sharded over tasks stays so.
    Raises InputError for embeddings of another width than the predictor's.
    """
    for embeddings in (query_embeddings, reference_embeddings):
        width = params.query.norm_in.bias.shape[0]
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise InputError(f"embeddings have shape {embeddings.shape}: the predictor was trained on [N, {width}]")
    query, reference = tower(params.query, query_embeddings), tower(params.reference, reference_embeddings)
    return Projections(constrain(query, "task", None), constrain(reference, "task", None))


def predict(
    params: Params,
    query_embeddings: Array,
    reference_embeddings: Array,
    reference_pass_rates: Array,
    *,
    calibration: Calibration = "group_logit_temp",
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
) -> Array:
    """Pass rates [Q] of tasks with embeddings [Q, E], from R tasks [R, E] whose pass rates [R] are known.

    `project`, then `predict_projected`: the words of both hold here.
    """
    projections = project(params, query_embeddings, reference_embeddings)
    options: dict[str, Any] = {"calibration": calibration, "temperature": temperature, "top_k": top_k}
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
    """Pass rates [Q] of tasks projected to [Q, h], from R tasks projected to [R, h] whose pass rates [R] are known.

    With b as above and l = logit(clip(b, 1e-4, 1 - 1e-4)), the calibrations are `plain`: b; `platt`:
    sigmoid(scale l + shift); `temperature`: sigmoid(l / scale); `group_logit_temp`:
    sigmoid(l / clip(softplus(m_0), 1e-2, 10) + tanh(m_1)), m = MLP([mean(r), std(r)]) with the unbiased std.
    `temperature` > 0 divides the scores; `top_k` attends to so many most similar references only.
    Deviations: a reference whose pass rate is NaN counts as absent, and without any other the prediction is NaN; the
    std of a single reference is 0.
    Raises InputError for a calibration whose parameters the predictor does not have.
    """
    check_calibration(params, calibration)
    known = ~jnp.isnan(reference_pass_rates)  # [R]
    rates = jnp.where(known, reference_pass_rates, 0).astype(jnp.float32)
    scores = jnp.einsum("qh,rh->qr", *projections, precision=PRECISION)
    scores = scores / (math.sqrt(projections.query.shape[1]) * jnp.asarray(temperature, jnp.float32))
    scores = jnp.where(known[None], scores, -jnp.inf)
    if top_k is not None and top_k < rates.shape[0]:
        scores = jnp.where(_among_largest(scores, top_k), scores, -jnp.inf)
    average = jnp.matmul(jax.nn.softmax(scores, axis=1), rates, precision=PRECISION)
    return calibrate(params, average, rates, known, calibration)


def _among_largest(scores: Array, count: int) -> Array:
    """Which of scores [Q, R] are among the `count` largest of their row; of equal ones, the first.

    By bisection, bit after bit of the `count`-th largest: that runs on all cores of a CPU, where `top_k` uses one, and
    leaves a sharded table where it is.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(scores), jnp.int32)
    order = jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)  # [Q, R], integers in the order of the scores

    def enough(lowest: Array) -> Array:  # [Q] -> [Q] bool
        return (order >= lowest[:, None]).sum(axis=1, dtype=jnp.int16) >= count

    def refine(i: Array, lowest: Array) -> Array:
        raised = lowest + (np.int32(2**30) >> i)
        return jnp.where(enough(raised), raised, lowest)

    zero = jnp.zeros(order.shape[0], jnp.int32)
    lowest = jax.lax.fori_loop(0, 31, refine, jnp.where(enough(zero), zero, np.int32(-(2**31))))[:, None]
    above, level = order > lowest, order == lowest
    places = count - above.sum(axis=1, keepdims=True)
    first = jax.lax.cond(
        (level.sum(axis=1, keepdims=True) > places).any(), lambda: jnp.cumsum(level, axis=1) <= places, lambda: level
    )
    return above | (level & first)


def calibrate(params: Params, average: Array, rates: Array, known: Array, calibration: Calibration) -> Array:
    """Pass rates [Q] from averages b [Q] over references with pass rates [R], of which those `known` [R] count."""
    if calibration == "plain":
        return average
    parameters: Any = params  # none of those used is None
    logit = jax.scipy.special.logit(jnp.clip(average, CLIP, 1 - CLIP))
    if calibration == "platt":
        return jax.nn.sigmoid(parameters.scale * logit + parameters.shift)
    if calibration == "temperature":
        return jax.nn.sigmoid(logit / parameters.scale)
    count = known.sum().astype(jnp.float32)
    mean = rates.sum() / jnp.maximum(count, 1)
    squares = (jnp.where(known, rates - mean, 0) ** 2).sum()
    inner, outer = parameters.group
    summary = jnp.stack([mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1))])  # [2]
    sharpness, shift = linear(outer, jax.nn.relu(linear(inner, summary)))
    return jax.nn.sigmoid(logit / jnp.clip(jax.nn.softplus(sharpness), 1e-2, 10) + jnp.tanh(shift))


def check_calibration(params: Params, calibration: Calibration) -> None:
    """Raises InputError unless there is such a calibration and the predictor has its parameters."""
    if not isinstance(params, Params):
        raise InputError(
            f"predictor is {shown(params)}: it must be attention.Params, such as load_predictor(FILE).params holds"
        )
    check_choice("calibration", calibration, get_args(Calibration))
    missing = [name for name in NEEDS[calibration] if getattr(params, name) is None]
    if missing:
        raise InputError(
            f"the predictor was trained without the calibration {calibration} (it has no {' and no '.join(missing)}): "
            "choose the one it was trained with"
        )
    used = jax.tree.leaves([getattr(params, name) for name in NEEDS[calibration]])
    known = [x for x in used if not isinstance(x, Tracer)]
    if not all(are_numbers(np.asarray(x)) and np.isfinite(np.asarray(x, np.float32)).all() for x in known):
        raise InputError("the predictor holds numbers that are not finite: train it again")


def tower(params: Tower, x: Array, key: Array | None = None, dropout: float = 0.0) -> Array:
    """Embeddings [Q, E] -> [Q, h], float32; with a `key`, in training, each input of a later layer drops out."""
    x = layer_norm(params.norm_in, x.astype(jnp.float32))
    for index, layer in enumerate(params.layers):
        if index:
            x = jax.nn.gelu(x, approximate=False)
        if index and key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0)
        x = linear(layer, x)
    return layer_norm(params.norm_out, x)


def linear(params: Affine, x: Array) -> Array:
    """X [..., in] -> [..., out]."""
    product = jnp.matmul(x, params.weight, precision=PRECISION)
    return product + jnp.broadcast_to(params.bias, product.shape)


def layer_norm(params: Affine, x: Array) -> Array:
    """X [Q, width], each row with mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(axis=1, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(axis=1, keepdims=True) + LAYER_NORM_EPSILON)
    return normal * params.weight[None] + params.bias[None]
