"""Training of the similarity predictor on the pass rates of other policies [arXiv 2506.05316]."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrft.select.checks import BELOW_ONE, check, check_count
from jaxrft.select.dots import attention
from jaxrft.select.dots.attention import Affine, Calibration, Params, Tower
from jaxrft.types import Array, InputError, Projections

GROUP_WIDTH = 10  # hidden units between (mean, std) of the references and the calibration


class Batch(NamedTuple):
    """Tasks of one policy: some are known, others to be told from them."""

    references: Array  # [R] int32
    queries: Array  # [Q] int32
    policy: Array  # [] int32


def initial(
    key: Array,
    embedding_width: int,
    *,
    calibration: Calibration = "group_logit_temp",
    width: int = 896,
    layers: int = 3,
) -> Params:
    """A predictor to train: Linears N(0, 1 / inputs), biases 0; a calibration that changes nothing.

    Raises InputError for a calibration that there is not.
    """
    key_query, key_reference, key_group = jax.random.split(key, 3)

    def linear(key: Array, inputs: int, outputs: int) -> Affine:
        return Affine(jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(float(inputs)), jnp.zeros(outputs))

    def norm(size: int) -> Affine:
        return Affine(jnp.ones(size), jnp.zeros(size))

    def tower(key: Array) -> Tower:
        sizes = [embedding_width, *[width] * layers]
        keys = jax.random.split(key, layers)
        inner = tuple(linear(*each) for each in zip(keys, sizes, sizes[1:], strict=False))
        return Tower(norm(embedding_width), inner, norm(width))

    scale = jnp.ones(()) if calibration in ("platt", "temperature") else None
    shift = jnp.zeros(()) if calibration == "platt" else None
    group = None
    if calibration == "group_logit_temp":
        one = jnp.array([jnp.log(jnp.expm1(1.0)), 0.0])  # softplus(m_0) = 1, tanh(m_1) = 0
        group = (linear(key_group, 2, GROUP_WIDTH), Affine(jnp.zeros((GROUP_WIDTH, 2)), one))
    params = Params(tower(key_query), tower(key_reference), scale, shift, group)
    attention.check_calibration(params, calibration)
    return params


def fit(
    key: Array,
    embeddings: Array,
    pass_rates: Array,
    *,
    calibration: Calibration = "group_logit_temp",
    width: int = 896,
    layers: int = 3,
    num_references: int = 256,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    dropout: float = 0.1,
    temperature: float = 1.0,
    top_k: int | None = None,
    report: Callable[[int, float], object] = lambda epoch, loss: None,
) -> tuple[Params, Array]:
    """A predictor trained on `pass_rates` [M, N] of M policies on tasks with `embeddings` [N, E]; losses [steps].

    Each step takes one policy, `num_references` random tasks of it as references and `batch_size` others to predict:
    binary cross-entropy -r log p - (1 - r) log(1 - p), Adam, learning rate falling linearly to 0 over
    `epochs` * M * N / batch_size steps, `dropout` between layers. NaN = unknown: such tasks are neither predicted nor
    attended to. `report` is told the number of each epoch that is over, and its mean loss. Deviations: a batch is of
    one policy and drawn afresh, so that an epoch is one in number only; no more than half of the tasks are references,
    and no task of a batch is predicted from itself.
    Raises InputError for shapes that do not fit, pass rates outside [0, 1], and a policy of which nothing is known.
    """
    sizes = {"width": width, "layers": layers, "top_k": 1 if top_k is None else top_k}
    sizes |= {"num_references": num_references, "epochs": epochs, "batch_size": batch_size}
    _check(embeddings, pass_rates, sizes, dropout)
    num_policies, num_tasks = pass_rates.shape
    references = min(num_references, num_tasks // 2)
    queries = min(batch_size, num_tasks - references)
    steps = -(-num_policies * num_tasks // queries)  # of an epoch
    sizes = {"references": references, "queries": queries, "steps": epochs * steps, "learning_rate": learning_rate}
    options = {"dropout": dropout, "calibration": calibration, "temperature": temperature, "top_k": top_k}
    key_init, key_steps = jax.random.split(key)
    params: Any = initial(key_init, embeddings.shape[1], calibration=calibration, width=width, layers=layers)
    carry, losses = (params, _adam(learning_rate, epochs * steps).init(params)), []
    table = jnp.asarray(embeddings, jnp.float32), jnp.asarray(pass_rates, jnp.float32)
    for epoch, keys in enumerate(jax.random.split(key_steps, (epochs, steps)), 1):
        carry, found = _train(carry, keys, *table, **sizes, **options)
        report(epoch, float(found.mean()))
        losses.append(found)
    return carry[0], jnp.concatenate(losses)


STATIC = ("references", "queries", "steps", "learning_rate", "dropout", "calibration", "temperature", "top_k")


@partial(jax.jit, static_argnames=STATIC)
def _train(
    carry: tuple[Params, Any],
    keys: Array,
    embeddings: Array,
    pass_rates: Array,
    *,
    references: int,
    queries: int,
    steps: int,
    learning_rate: float,
    **options: Any,
) -> tuple[tuple[Params, Any], Array]:
    """Parameters and moments after a step with each of `keys`, and the losses; `steps` is how many there are in all."""

    def step(carry: tuple[Params, Any], key: Array) -> tuple[tuple[Params, Any], Array]:
        params, moments = carry
        key_batch, key_dropout = jax.random.split(key)
        batch = draw(key_batch, pass_rates, references=references, queries=queries)
        value, slope = jax.value_and_grad(loss)(params, key_dropout, embeddings, pass_rates, batch, **options)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            change, moments = _adam(learning_rate, steps).update(slope, moments)
        return (jax.tree.map(jnp.add, params, change), moments), value

    return jax.lax.scan(step, carry, keys)


def _adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, whose learning rate falls linearly to 0."""
    return optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))


def draw(key: Array, pass_rates: Array, *, references: int, queries: int) -> Batch:
    """A policy of `pass_rates` [M, N], uniformly, and distinct tasks of it; those unknown come last."""
    key_policy, key_tasks = jax.random.split(key)
    num_policies, num_tasks = pass_rates.shape
    policy = jax.random.randint(key_policy, (), 0, num_policies)
    order = jnp.argsort(jax.random.uniform(key_tasks, (num_tasks,)) + jnp.isnan(pass_rates[policy]).astype(jnp.float32))
    return Batch(order[:references], order[references : references + queries], policy)


def loss(
    params: Params,
    key: Array,
    embeddings: Array,
    pass_rates: Array,
    batch: Batch,
    *,
    dropout: float,
    **options: Any,
) -> Array:
    """Mean binary cross-entropy of a batch, against rates that may be fractions; `options` of `predict_projected`."""
    key_query, key_reference = jax.random.split(key)
    rates = pass_rates[batch.policy]
    near = Projections(
        attention.tower(params.query, embeddings[batch.queries], key_query, dropout),
        attention.tower(params.reference, embeddings[batch.references], key_reference, dropout),
    )
    found = attention.predict_projected(params, near, rates[batch.references], **options)
    found = jnp.clip(found, attention.CLIP, 1 - attention.CLIP)
    known = ~jnp.isnan(rates[batch.queries])
    wanted = jnp.where(known, rates[batch.queries], 0)  # or the slope of what does not count would be NaN
    entropy = -wanted * jnp.log(found) - (1 - wanted) * jnp.log1p(-found)
    return jnp.where(known, entropy, 0).sum() / jnp.maximum(known.sum(), 1).astype(jnp.float32)


def _check(embeddings: Array, pass_rates: Array, sizes: dict[str, int], dropout: float) -> None:
    """Raises InputError for what nothing can be trained on."""
    for name, value in sizes.items():
        check_count(name, value)
    check("dropout", dropout, BELOW_ONE)
    if embeddings.ndim != 2 or pass_rates.ndim != 2 or embeddings.shape[0] != pass_rates.shape[1]:
        raise InputError(
            f"embeddings {embeddings.shape} and pass rates {pass_rates.shape} do not fit: "
            "they must be [N, E] and [M, N], a column of M policies' pass rates for each of N tasks"
        )
    if embeddings.shape[0] < 2:
        raise InputError("there is one task: a predictor tells tasks from other tasks, so give at least 2")
    if ((pass_rates < 0) | (pass_rates > 1)).any():
        raise InputError("a pass rate lies outside [0, 1]: give the share of rollouts that solved the task, or NaN")
    unknown = jnp.isnan(pass_rates).all(axis=1)
    if unknown.any():
        raise InputError(f"policy {int(unknown.argmax())} has no known pass rate: leave it out")
