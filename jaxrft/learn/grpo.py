"""Group-relative policy optimisation: advantages, clipped objectives and the KL, as functions of arrays.

Axis letters: B tasks, G rollouts a task, R = B * G rows, T completion tokens. Inputs are of any dtype, float32 inside;
a mask is 0 or 1, of any dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.learn import masked
from jaxrft.types import Array, InputError

# Differences of log-probabilities are cut here, exp(20) = 5e8, so that no ratio is inf and 0 * inf never NaN.
MAX_LOG_RATIO = 20.0

# scale_rewards -> divisor [B, 1], [1, 1] or [] of the centred rewards [B, G], from (rewards, mask).
SCALES: dict[str, Callable[[Array, Array], Array]] = {
    "group": lambda rewards, mask: masked.std(rewards, mask, axis=1, keepdims=True) + 1e-6,
    "batch": lambda rewards, mask: masked.std(rewards, mask, keepdims=True) + 1e-6,
    "none": lambda rewards, mask: jnp.float32(1.0),
}


def informative(rewards: Array, mask: Array | None = None) -> Array:
    """Whether the rewards of a group are not all equal, tested exactly; False with fewer than two rewards.

    `rewards` [B, G]; `mask` [B, G], 0 = no reward, whatever stands there. Returns [B] bool.
    """
    rewards, mask = _rewards(rewards, mask)
    highest = jnp.max(rewards, axis=1, where=mask, initial=-jnp.inf)
    lowest = jnp.min(rewards, axis=1, where=mask, initial=jnp.inf)
    return (masked.count(mask, axis=1) >= 2) & (highest != lowest)


def advantages(rewards: Array, *, scale_rewards: str = "group", mask: Array | None = None) -> Array:
    """A = (r - mean of the group) / (std + 1e-6), exactly 0 for a group whose rewards are all equal.

    Source: GRPO, arXiv 2402.03300; `scale_rewards` as in TRL: "group" divides by the group's unbiased std, "batch" by
    that of all the rewards of the batch, "none" by nothing. Deviation: equality of the rewards is tested exactly, since
    (r - mean) / (std + 1e-6) turns the rounding of eight equal rewards into advantages of up to 0.056.

    `rewards` [B, G]; `mask` [B, G], 0 = no reward: that sample has advantage 0 and enters neither mean nor std,
    whatever stands there. A NaN under mask 1 does spread, to be seen. Returns [B, G] float32.
    Raises InputError for an unknown `scale_rewards`.
    """
    if scale_rewards not in SCALES:
        raise InputError(f"scale_rewards is {scale_rewards!r}: choose one of {', '.join(SCALES)}")
    rewards, mask = _rewards(rewards, mask)
    centred = rewards - masked.mean(rewards, mask, axis=1, keepdims=True)
    teaches = mask & informative(rewards, mask)[:, None]
    return masked.zero(centred, teaches) / SCALES[scale_rewards](rewards, mask)


def _rewards(rewards: Array, mask: Array | None) -> tuple[Array, Array]:
    """Rewards [B, G] in float32, 0 where the mask hides them, and the mask [B, G] as bool, all True by default."""
    masked.same_shape(rewards, rank=2)
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask.astype(bool)
    return masked.zero(rewards, mask), mask


class Reduction(NamedTuple):
    """How losses and metrics of tokens [R, T] become one number: sum(weights * x) / count.

    Each is a function of (mask [R, T], max_completion_length). Weights of a row depend on that row only, and only the
    count on the batch, so that micro-batches divided by the batch's count add up to the batch.
    """

    weights: Callable[[Array, int], Array]  # [R, T], of the token losses
    metric_weights: Callable[[Array, int], Array]  # [R, T], such that the metric of a constant is that constant
    count: Callable[[Array, int], Array]  # [], of the whole batch


def _each_token(mask: Array, length: int) -> Array:
    """1 for every token. [R, T]."""
    return mask.astype(jnp.float32)


def _share_of_row(mask: Array, length: int) -> Array:
    """1 / (tokens of the row) for every token. [R, T]."""
    return _each_token(mask, length) / jnp.maximum(masked.count(mask, axis=1, keepdims=True), 1.0)


def _tokens(mask: Array) -> Array:
    """How many tokens there are, at least 1. []."""
    return jnp.maximum(masked.count(mask), 1.0)


def _rows(mask: Array) -> Array:
    """How many rows have a token at all, at least 1. []."""
    return jnp.maximum(masked.count(jnp.any(mask.astype(bool), axis=1)), 1.0)


# loss_type -> weights of token losses, weights of metrics, what both are divided by.
REDUCTIONS: dict[str, Reduction] = {
    "grpo": Reduction(_share_of_row, _share_of_row, lambda mask, length: _rows(mask)),
    "dapo": Reduction(_each_token, _each_token, lambda mask, length: _tokens(mask)),
    "dr_grpo": Reduction(
        _each_token,
        lambda mask, length: length * _share_of_row(mask, length),
        lambda mask, length: length * _rows(mask),
    ),
}


def normaliser(mask: Array, loss_type: str, max_completion_length: int | None = None) -> Array:
    """What the loss of a batch is divided by: `policy_loss` of each of its micro-batches wants this number.

    grpo: rows; dapo: tokens; dr_grpo: rows x `max_completion_length`. Rows without a token do not count (in TRL they
    do), and an empty batch counts as one row of one token. `mask` [R, T] of the whole batch. Returns [] float32.
    Raises InputError for an unknown `loss_type`, or dr_grpo without `max_completion_length`.
    """
    masked.same_shape(mask, rank=2)
    reduction, length = _reduction(loss_type, max_completion_length)
    return reduction.count(mask, length)


def _reduction(loss_type: str, max_completion_length: int | None) -> tuple[Reduction, int]:
    """The reduction of a loss type and its constant length, 1 where none is used."""
    if loss_type not in REDUCTIONS:
        raise InputError(f"loss_type is {loss_type!r}: choose one of {', '.join(REDUCTIONS)}")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise InputError("loss_type 'dr_grpo' divides by a constant length, but max_completion_length is None: give it")
    return REDUCTIONS[loss_type], max_completion_length or 1


def policy_loss(
    logprobs: Array,
    behaviour_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    anchor_logprobs: Array | None = None,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    normaliser: Array | float | None = None,
    max_completion_length: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Clipped objective -min(r A, clip(r, c (1 - epsilon), c (1 + epsilon_high)) A), r = pi / mu, reduced by loss type.

    The clip is centred on c = 1 (PPO, arXiv 1707.06347; the paper's form of replay) or, with `anchor_logprobs` of the
    policy before the update, on c = anchor / mu (the published replay of arXiv 2506.05316). `epsilon_high` is `epsilon`
    unless given (clip-higher, arXiv 2503.14476). `loss_type`: "grpo" means over each row, then over rows; "dapo" over
    all tokens; "dr_grpo" (arXiv 2503.20783) sums, divided by rows x `max_completion_length`.
    Deviation: log-ratios are cut to +-20.

    Everything is [R, T], natural logarithms; `advantages` may also be [R, 1], one for a row: `a.reshape(-1, 1)`. Where
    `mask` is 0 nothing enters loss, gradient or metrics, whatever stands there. Gradient flows through `logprobs` only.
    `normaliser` is `grpo.normaliser` of the whole batch when these rows are a part of it (by default they are all).

    Metrics are [] float32 and add up over micro-batches as the loss does; means over the batch's tokens with dapo, over
    rows of the mean over their tokens with grpo and dr_grpo: `clip_ratio/low_mean` (share with r below the range and
    A < 0, where the gradient is cut), `clip_ratio/high_mean` (above, and A > 0), `clip_ratio/region_mean` (either), and
    `approx_kl`, log mu - log pi (the k1 estimator of KL(mu || pi), which may be negative).
    Raises InputError for an unknown `loss_type`, or dr_grpo without `max_completion_length`.
    """
    anchor_logprobs = behaviour_logprobs if anchor_logprobs is None else anchor_logprobs
    masked.same_shape(logprobs, behaviour_logprobs, anchor_logprobs, mask, rank=2)
    if advantages.shape not in (mask.shape, (mask.shape[0], 1)):
        raise ValueError(f"advantages {advantages.shape} must be [R, T] or [R, 1] for a mask {mask.shape}")
    reduction, length = _reduction(loss_type, max_completion_length)
    total = reduction.count(mask, length) if normaliser is None else jnp.asarray(normaliser, jnp.float32)

    advantages = masked.zero(jnp.broadcast_to(advantages, mask.shape), mask)
    behaviour = jax.lax.stop_gradient(masked.zero(behaviour_logprobs, mask))
    anchor = jax.lax.stop_gradient(masked.zero(anchor_logprobs, mask))
    log_ratio = _cut(masked.zero(logprobs, mask) - behaviour)
    ratio = jnp.exp(log_ratio)
    centre = jnp.exp(_cut(anchor - behaviour))

    low = centre * (1.0 - epsilon)
    high = centre * (1.0 + (epsilon if epsilon_high is None else epsilon_high))
    cut_low = (ratio < low) & (advantages < 0)
    cut_high = (ratio > high) & (advantages > 0)
    losses = -advantages * jnp.where(cut_low, low, jnp.where(cut_high, high, ratio))

    loss = jnp.sum(reduction.weights(mask, length) * losses) / total
    metric_weights = reduction.metric_weights(mask, length)
    metrics = {
        "clip_ratio/low_mean": cut_low,
        "clip_ratio/high_mean": cut_high,
        "clip_ratio/region_mean": cut_low | cut_high,
        "approx_kl": -log_ratio,
    }
    return loss, {name: jnp.sum(metric_weights * x.astype(jnp.float32)) / total for name, x in metrics.items()}


def kl_k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """exp(d) - d - 1 with d = log pi_ref - log pi: the k3 estimator of KL(pi || pi_ref), 0 or more.

    Source: http://joschu.net/blog/kl-approx.html. Deviation: d is cut to +-20. `logprobs`, `ref_logprobs` and the
    result are [R, T]. It knows no mask: where padding may hold NaN put both through `masked.zero` first, or the NaN
    enters the gradient.
    """
    masked.same_shape(logprobs, ref_logprobs, rank=2)
    difference = _cut(ref_logprobs.astype(jnp.float32) - logprobs.astype(jnp.float32))
    return jnp.expm1(difference) - difference


def _cut(log_ratio: Array) -> Array:
    """Log-ratios within what exp can bear."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
