"""Trains the similarity predictor on the pass rates of other policies [arXiv 2506.05316]."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxrft.select.checks import BELOW_ONE, check, check_count
from jaxrft.select.dots import attention
from jaxrft.select.dots.attention import Affine, Calibration, Params, Tower
from jaxrft.shapes import REAL, check_dtypes
from jaxrft.types import Array, InputError, Projections

GROUP_WIDTH = 10  # hidden units between (mean, std) of the references and the calibration


class Batch(NamedTuple):
    """Tasks of one policy: the references, and the tasks that are predicted from them."""

    references: Array  # [R] int32
    queries: Array  # [Q] int32
    policy: Array  # [] int32


class Carry(NamedTuple):
    """Parameters under training, and the state of the optimizer."""

    params: Params
    optimizer: optax.OptState


def initial(
    key: Array,
    embedding_width: int,
    *,
    calibration: Calibration = "group_logit_temp",
    width: int = 896,
    layers: int = 3,
) -> Params:
    """Draws the parameters of a new predictor: weights N(0, 1 / inputs), biases 0.

    The calibration starts as one that changes nothing.
    Raises InputError for a calibration that there is not.
    """
    key_query, key_reference, key_group = jax.random.split(key, 3)
    widths = (embedding_width, *[width] * layers)
    scale = jnp.ones(()) if calibration in ("platt", "temperature") else None
    shift = jnp.zeros(()) if calibration == "platt" else None
    group = None
    if calibration == "group_logit_temp":
        identity = jnp.array([jnp.log(jnp.expm1(1.0)), 0.0])  # softplus(m_0) = 1, tanh(m_1) = 0
        outer = Affine(jnp.zeros((GROUP_WIDTH, 2)), identity)
        group = (_initial_layer(key_group, 2, GROUP_WIDTH), outer)
    query = _initial_tower(key_query, widths)
    params = Params(query, _initial_tower(key_reference, widths), scale, shift, group)
    attention.check_calibration(params, calibration)
    return params


def _initial_tower(key: Array, widths: tuple[int, ...]) -> Tower:
    """Draws the parameters of a tower from embeddings [widths[0]] through layers of the other
    widths.
    """
    keys = jax.random.split(key, len(widths) - 1)
    layers = tuple(_initial_layer(*each) for each in zip(keys, widths, widths[1:], strict=False))
    norm_in, norm_out = (
        Affine(jnp.ones(width), jnp.zeros(width)) for width in (widths[0], widths[-1])
    )
    return Tower(norm_in, layers, norm_out)


def _initial_layer(key: Array, inputs: int, outputs: int) -> Affine:
    """Draws the weight [inputs, outputs] of a layer."""
    return Affine(
        jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(float(inputs)), jnp.zeros(outputs)
    )


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
    """Trains a predictor on `pass_rates` [M, N] of M policies on tasks with `embeddings` [N, E].

    Returns its parameters, and the losses [steps]. Each step takes one policy, `num_references`
    random tasks of it as references and `batch_size` others to predict: binary cross-entropy -r log
    p - (1 - r) log(1 - p), Adam, learning rate falling linearly to 0 over `epochs` * M * N /
    batch_size steps, `dropout` between layers. NaN = unknown: such tasks are neither predicted nor
    attended to. `report` is called after each epoch with its number and its mean loss. Deviations:
    a batch is of one policy and drawn afresh, so that an epoch is one in number only; no more than
    half of the tasks are references, and no task of a batch is predicted from itself. Raises
    InputError for shapes that do not fit, pass rates outside [0, 1], and a policy without a known
    pass rate.
    """
    sizes = {"width": width, "layers": layers, "top_k": 1 if top_k is None else top_k}
    sizes |= {"num_references": num_references, "epochs": epochs, "batch_size": batch_size}
    _check(embeddings, pass_rates, sizes, dropout)
    num_policies, num_tasks = pass_rates.shape
    references = min(num_references, num_tasks // 2)
    queries = min(batch_size, num_tasks - references)
    steps = -(-num_policies * num_tasks // queries)  # of an epoch
    train = partial(
        _train,
        embeddings=jnp.asarray(embeddings, jnp.float32),
        pass_rates=jnp.asarray(pass_rates, jnp.float32),
        references=references,
        queries=queries,
        steps=epochs * steps,
        learning_rate=learning_rate,
        dropout=dropout,
        calibration=calibration,
        temperature=temperature,
        top_k=top_k,
    )
    key_init, key_steps = jax.random.split(key)
    params = initial(
        key_init, embeddings.shape[1], calibration=calibration, width=width, layers=layers
    )
    carry = Carry(params, _adam(learning_rate, epochs * steps).init(params))  # pyright: ignore[reportArgumentType]
    losses = []
    for epoch, keys in enumerate(jax.random.split(key_steps, (epochs, steps)), 1):
        carry, epoch_losses = train(carry, keys)
        report(epoch, float(epoch_losses.mean()))
        losses.append(epoch_losses)
    return carry.params, jnp.concatenate(losses)


STATIC = (
    "references",
    "queries",
    "steps",
    "learning_rate",
    "dropout",
    "calibration",
    "temperature",
    "top_k",
)


@partial(jax.jit, static_argnames=STATIC)
def _train(
    carry: Carry,
    keys: Array,
    *,
    embeddings: Array,
    pass_rates: Array,
    references: int,
    queries: int,
    steps: int,
    learning_rate: float,
    dropout: float,
    **options: Unpack[attention.Options],
) -> tuple[Carry, Array]:
    """Takes a step with each of `keys` and returns the losses of all; `steps` is the number in the
    whole training.
    """
    optimizer = _adam(learning_rate, steps)

    def step(carry: Carry, key: Array) -> tuple[Carry, Array]:
        key_batch, key_dropout = jax.random.split(key)
        batch = draw(key_batch, pass_rates, references=references, queries=queries)
        differentiate = jax.value_and_grad(partial(loss, dropout=dropout, **options))
        value, gradient = differentiate(carry.params, key_dropout, embeddings, pass_rates, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            change, state = optimizer.update(gradient, carry.optimizer)
        return Carry(jax.tree.map(jnp.add, carry.params, change), state), value

    return jax.lax.scan(step, carry, keys)


def _adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns Adam with a learning rate that falls linearly to 0."""
    return optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))


def draw(key: Array, pass_rates: Array, *, references: int, queries: int) -> Batch:
    """Draws a policy of `pass_rates` [M, N], uniformly, and distinct tasks of it; those unknown
    come last.
    """
    key_policy, key_tasks = jax.random.split(key)
    num_policies, num_tasks = pass_rates.shape
    policy = jax.random.randint(key_policy, (), 0, num_policies)
    unknown = jnp.isnan(pass_rates[policy]).astype(jnp.float32)
    order = jnp.argsort(jax.random.uniform(key_tasks, (num_tasks,)) + unknown)
    return Batch(order[:references], order[references : references + queries], policy)


def loss(
    params: Params,
    key: Array,
    embeddings: Array,
    pass_rates: Array,
    batch: Batch,
    *,
    dropout: float,
    **options: Unpack[attention.Options],
) -> Array:
    """Computes the mean binary cross-entropy of a batch, against rates that may be fractions."""
    key_query, key_reference = jax.random.split(key)
    rates = pass_rates[batch.policy]
    projections = Projections(
        attention.encode(params.query, embeddings[batch.queries], key_query, dropout=dropout),
        attention.encode(
            params.reference, embeddings[batch.references], key_reference, dropout=dropout
        ),
    )
    predicted = attention.predict_projected(params, projections, rates[batch.references], **options)
    predicted = jnp.clip(predicted, attention.CLIP, 1 - attention.CLIP)
    known = ~jnp.isnan(rates[batch.queries])
    # NaN would spread into the gradient, even with a weight of 0
    observed = jnp.where(known, rates[batch.queries], 0)
    entropy = -observed * jnp.log(predicted) - (1 - observed) * jnp.log1p(-predicted)
    return jnp.where(known, entropy, 0).sum() / jnp.maximum(known.sum(), 1).astype(jnp.float32)


def _check(embeddings: Array, pass_rates: Array, sizes: dict[str, int], dropout: float) -> None:
    """Raises InputError for data that a predictor cannot be trained on."""
    for name, value in sizes.items():
        check_count(name, value)
    check("dropout", dropout, BELOW_ONE)
    if embeddings.ndim != 2 or pass_rates.ndim != 2 or embeddings.shape[0] != pass_rates.shape[1]:
        raise InputError(
            f"embeddings {embeddings.shape} and pass rates {pass_rates.shape} do not fit: "
            "they must be [N, E] and [M, N], a column of M policies' pass rates for each of N tasks"
        )
    check_dtypes(REAL, embeddings=embeddings, pass_rates=pass_rates)
    if embeddings.shape[0] < 2:
        raise InputError("there is one task: a predictor compares tasks, so give at least 2")
    if ((pass_rates < 0) | (pass_rates > 1)).any():
        raise InputError(
            "a pass rate lies outside [0, 1]: give the share of rollouts that "
            "solved the task, or NaN"
        )
    unknown = jnp.isnan(pass_rates).all(axis=1)
    if unknown.any():
        raise InputError(f"policy {int(unknown.argmax())} has no known pass rate: leave it out")
