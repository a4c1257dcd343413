"""Group-relative policy optimization: advantages, clipped objectives and the KL, as functions of
arrays.

Axis letters: B tasks, G rollouts a task, R = B * G rows, T completion tokens. Inputs are of any
dtype, float32 inside; a mask is 0 or 1, of any dtype. All functions raise InputError for arrays of
other shapes or other kinds of numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrft.learn import masked
from jaxrft.learn.losses import LOSS_TYPES as LOSS_TYPES
from jaxrft.learn.losses import Bounds, LossType
from jaxrft.shapes import REAL, check_same_shape, check_shapes
from jaxrft.types import Array, InputError

# Differences of log-probabilities are cut here, exp(20) = 5e8, so that no ratio is inf and 0 * inf
# never NaN.
MAX_LOG_RATIO = 20.0

# scale_rewards -> divisor [B, 1], [1, 1] or [] of the centered rewards [B, G], from (rewards,
# mask).
SCALES: dict[str, Callable[[Array, Array], Array]] = {
    "group": lambda rewards, mask: masked.std(rewards, mask, axis=1, keepdims=True) + 1e-6,
    "batch": lambda rewards, mask: masked.std(rewards, mask, keepdims=True) + 1e-6,
    "none": lambda rewards, mask: jnp.float32(1.0),
}


def rounding(magnitude: Array, num_terms: int = 1) -> Array:
    """Returns the most by which rounding lets two float32 sums differ that are equal in exact
    arithmetic.

    (n + 2) eps S for sums of n terms whose absolute values add up to `magnitude` S. A term, weight
    times reward, has three roundings of eps / 2: of the weight, of the reward and of their product.
    n - 1 additions have one each, of a partial sum of at most S. Together they are (n + 2) eps S /
    2 for either of the two sums. Shape of `magnitude`, float32.
    """
    return (num_terms + 2) * jnp.finfo(jnp.float32).eps * magnitude.astype(jnp.float32)


def informative(
    rewards: Array, mask: Array | None = None, *, tolerance: Array | None = None
) -> Array:
    """Checks whether the rewards of a group differ by more than their rounding.

    The test is max - min > tolerance, where the tolerance is the largest of `tolerance` [B, G] in
    the group. By default it is the `rounding` of |reward|, that of a sum of one term. A group with
    fewer than two rewards fails the test.

    `rewards` [B, G]; `mask` [B, G], 0 = no reward, whatever stands there. Returns [B] bool. The
    package has no other test of whether a group is informative. A NaN under mask 1 counts as a
    difference, so that it does not stay hidden.
    """
    rewards, mask = _rewards(rewards, mask)
    tolerance = rounding(jnp.abs(rewards)) if tolerance is None else tolerance
    check_same_shape(rewards=rewards, tolerance=tolerance)
    highest = jnp.max(rewards, axis=1, where=mask, initial=-jnp.inf)
    lowest = jnp.min(rewards, axis=1, where=mask, initial=jnp.inf)
    allowed = jnp.max(tolerance, axis=1, where=mask, initial=0.0)
    # Equal infinities have no difference, and what is infinite has no rounding.
    equal = (highest == lowest) | (
        highest - lowest <= jnp.where(jnp.isfinite(allowed), allowed, 0.0)
    )
    return (masked.count(mask, axis=1) >= 2) & ~equal


def leveled(rewards: Array, mask: Array, *, tolerance: Array) -> Array:
    """Sets all rewards [B, G] of a group that is not `informative` at `tolerance` to its maximum.

    The tolerance of a sum depends on its terms, which only the caller knows. After this function
    `informative` with its default tolerance gives the same result.
    """
    rewards, mask = _rewards(rewards, mask)
    highest = jnp.max(rewards, axis=1, where=mask, initial=-jnp.inf, keepdims=True)
    level = mask & ~informative(rewards, mask, tolerance=tolerance)[:, None]
    return jnp.where(level, highest, rewards)


def advantages(rewards: Array, *, scale_rewards: str = "group", mask: Array | None = None) -> Array:
    """Computes advantages A = (r - mean of the group) / (std + 1e-6).

    A is exactly 0 for a group that is not `informative`.

    Source: GRPO, arXiv 2402.03300; `scale_rewards` as in TRL: "group" divides by the group's
    unbiased std, "batch" by that of all the rewards of the batch, "none" by nothing. Deviation:
    rewards are equal if they differ by no more than their rounding, which (r - mean) / (std + 1e-6)
    turns into advantages of up to 0.056.

    `rewards` [B, G]; `mask` [B, G], 0 = no reward: that sample has advantage 0 and enters neither
    mean nor std, whatever stands there. A NaN under mask 1 spreads, so that it does not stay
    hidden. Returns [B, G] float32. Raises InputError for an unknown `scale_rewards`.
    """
    if scale_rewards not in SCALES:
        raise InputError(f"scale_rewards is {scale_rewards!r}: choose one of {', '.join(SCALES)}")
    rewards, mask = _rewards(rewards, mask)
    centered = rewards - masked.mean(rewards, mask, axis=1, keepdims=True)
    is_informative = mask & informative(rewards, mask)[:, None]
    return masked.zero(centered, is_informative) / SCALES[scale_rewards](rewards, mask)


def _rewards(rewards: Array, mask: Array | None) -> tuple[Array, Array]:
    """Converts rewards and their mask, both [B, G], to float32 and bool.

    Rewards are 0 where the mask is. The mask is all True by default.
    """
    check_shapes(rewards=(rewards, "BG", REAL), mask=(mask, "BG", REAL))
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask.astype(bool)
    return masked.zero(rewards, mask), mask


def normalizer(mask: Array, loss_type: str, max_completion_length: int | None = None) -> Array:
    """Computes the number that divides the loss of a batch.

    `policy_loss` takes it as `normalizer` for each micro-batch of the batch. grpo, gspo: rows;
    dapo, cispo: tokens; dr_grpo: rows x `max_completion_length`. Rows without a token do not count
    (in TRL they do), and an empty batch counts as one row of one token. `mask` [R, T] of the whole
    batch. Returns [] float32. Raises InputError for an unknown `loss_type`, or dr_grpo without
    `max_completion_length`.
    """
    check_shapes(mask=(mask, "RT", REAL))
    objective, length = _row_of(loss_type, max_completion_length)
    return objective.reduction.count(mask, length)


def _row_of(loss_type: str, max_completion_length: int | None) -> tuple[LossType, int]:
    """Looks up the row of a loss type in LOSS_TYPES.

    Also returns the constant length that the loss type divides by, 1 if it uses none.
    Raises InputError for an unknown loss type, or dr_grpo without `max_completion_length`.
    """
    if loss_type not in LOSS_TYPES:
        raise InputError(f"loss_type is {loss_type!r}: choose one of {', '.join(LOSS_TYPES)}")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise InputError(
            "loss_type 'dr_grpo' divides by a constant length, but "
            "max_completion_length is None: give it"
        )
    return LOSS_TYPES[loss_type], max_completion_length or 1


def _check_delta(delta: float | None, epsilon_high: float, loss_type: str) -> None:
    if delta is not None and (loss_type == "cispo" or delta <= 1.0 + epsilon_high):
        raise InputError(
            f"delta is {delta} with loss_type {loss_type}: it must be above 1 + epsilon_high = "
            f"{1.0 + epsilon_high}, and None with cispo"
        )


def policy_loss(
    logprobs: Array,
    behavior_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    proximal_logprobs: Array | None = None,
    weights: Array | None = None,
    sequences: Array | None = None,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    normalizer: Array | float | None = None,
    max_completion_length: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Computes the clipped policy objective, reduced to one number by `loss_type`.

    The objective is -min(r A, clip(r, c (1 - epsilon), c (1 + epsilon_high)) A) with r = pi / mu.
    The clip is centered on c = 1 (PPO, arXiv 1707.06347) or, with `proximal_logprobs` of the policy
    before the update, on c = pi_prox / mu (decoupled PPO, arXiv 2110.00641; the published code of
    arXiv 2506.05316). `epsilon_high` is `epsilon` unless given (clip-higher, arXiv 2503.14476).
    With `delta`, above 1 + epsilon_high, r A becomes min(r, c delta) A: two-sided clipping, arXiv
    2505.07291. `loss_type`: "grpo" means over each row, then over rows; "dapo" over all tokens;
    "dr_grpo" (arXiv 2503.20783) sums, divided by rows x `max_completion_length`; "gspo" (arXiv
    2507.18071) is "grpo" with the geometric mean of a row's r for all its tokens; "cispo" (arXiv
    2506.13585) means over all tokens of -sg(min(r, c (1 + epsilon_high))) A log pi. Deviations:
    log-ratios are cut to +-20. TRL's `epsilon_high` of cispo is our 1 + epsilon_high.

    Everything is [R, T], natural logarithms; `advantages` may also be [R, 1], one for a row:
    `a.reshape(-1, 1)`. Where `mask` is 0 nothing enters loss, gradient or metrics, whatever stands
    there. Gradient flows through `logprobs` only. `weights` multiply the token losses, for instance
    `importance_weights`. `sequences` [R, T] int32 is, where a row holds several sequences, the
    number of a token's sequence in its row, from 0 to T - 1. `normalizer` is `grpo.normalizer` of
    the whole batch when these rows are a part of it (by default they are all).

    Metrics are [] float32 and add up over micro-batches as the loss does; means over the batch's
    tokens with dapo and cispo, over rows of the mean over their tokens with the others:
    `clip_ratio/low_mean` (share with r below the range and A < 0, where the gradient is cut),
    `clip_ratio/high_mean` (above, and A > 0; with cispo any A but 0, where the weight is cut),
    `clip_ratio/delta_mean` (above c delta and A < 0; only with `delta`), `clip_ratio/region_mean`
    (any of these), and `approx_kl`, log mu - log pi (the k1 estimator of KL(mu || pi), which may be
    negative). Raises InputError for an unknown `loss_type`, dr_grpo without
    `max_completion_length`, and a `delta` that is not above 1 + epsilon_high or that has no
    meaning, with cispo.
    """
    check_shapes(
        mask=(mask, "RT", REAL),
        logprobs=(logprobs, "RT", float),
        behavior_logprobs=(behavior_logprobs, "RT", float),
        proximal_logprobs=(proximal_logprobs, "RT", float),
        weights=(weights, "RT", REAL),
        sequences=(sequences, "RT", int),
        advantages=(advantages, "R1" if jnp.shape(advantages)[1:] == (1,) else "RT", REAL),
    )
    proximal_logprobs = behavior_logprobs if proximal_logprobs is None else proximal_logprobs
    weights = jnp.ones(mask.shape, jnp.float32) if weights is None else weights
    objective, length = _row_of(loss_type, max_completion_length)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    _check_delta(delta, epsilon_high, loss_type)
    if sequences is not None and normalizer is None:
        raise InputError(
            "sequences without normalizer: give grpo.normalizer of the mask with one sequence a row"
        )
    reduction = objective.reduction
    total = (
        reduction.count(mask, length)
        if normalizer is None
        else jnp.asarray(normalizer, jnp.float32)
    )

    advantages = masked.zero(jnp.broadcast_to(advantages, mask.shape), mask)
    logprobs = masked.zero(logprobs, mask)
    behavior = jax.lax.stop_gradient(masked.zero(behavior_logprobs, mask))
    proximal = jax.lax.stop_gradient(masked.zero(proximal_logprobs, mask))
    ratio = jnp.exp(_cut(objective.log_ratio(logprobs - behavior, mask, sequences)))
    center = jnp.exp(_cut(objective.log_ratio(proximal - behavior, mask, sequences)))

    top = center * (jnp.inf if delta is None else delta)
    bounds = Bounds(center * (1.0 - epsilon), center * (1.0 + epsilon_high), top)
    token_losses, clipped = objective.losses(ratio, logprobs, advantages, bounds)
    token_losses = jax.lax.stop_gradient(masked.zero(weights, mask)) * token_losses

    metric_weights = reduction.metric_weights(mask, length, sequences)
    metrics = {
        "clip_ratio/low_mean": clipped.low,
        "clip_ratio/high_mean": clipped.high,
        "clip_ratio/region_mean": clipped.low | clipped.high | clipped.top,
        "approx_kl": -_cut(logprobs - behavior),
    }
    if delta is not None:
        metrics["clip_ratio/delta_mean"] = clipped.top
    loss = jnp.sum(reduction.weights(mask, length, sequences) * token_losses) / total
    return loss, {
        name: jnp.sum(metric_weights * x.astype(jnp.float32)) / total for name, x in metrics.items()
    }


# importance_sampling_correction -> log-weights [R, T] from (log pi - log nu [R, T], 0 under the
# mask).
CORRECTIONS: dict[str, Callable[[Array], Array]] = {
    "token": lambda log_ratio: log_ratio,
    "sequence": lambda log_ratio: jnp.broadcast_to(
        jnp.sum(log_ratio, axis=1, keepdims=True), log_ratio.shape
    ),
}


# importance_sampling_mode -> weights [R, T] from (ratios pi / nu [R, T], importance_sampling_cap).
MODES: dict[str, Callable[[Array, float], Array]] = {
    "truncate": lambda ratio, cap: jnp.minimum(ratio, cap),
    "mask": lambda ratio, cap: jnp.where(ratio > cap, 0.0, ratio),
}


def importance_weights(
    logprobs: Array,
    sampling_logprobs: Array,
    mask: Array,
    *,
    importance_sampling_correction: str,
    importance_sampling_cap: float = 2.0,
    importance_sampling_mode: str = "truncate",
) -> Array:
    """Computes pi / nu within a cap, where pi is the policy at the rollout and nu the distribution
    that tokens were sampled from.

    `importance_sampling_correction` "token": each token's own ratio; "sequence": the product of the
    row's ratios for all its tokens. `importance_sampling_mode` "truncate": min(ratio, cap),
    https://fengyao.notion.site/off-policy-rl; "mask": a ratio above the cap becomes 0, and the
    token, or the whole row, leaves the policy loss. It still counts in the loss's normalizer, and
    in KL and entropy. Source of "mask": TRL, whose default is a sequence mask at 3.0. Everything is
    [R, T], the result float32; what is under mask 0 changes nothing. Deviation: log-ratios are cut
    to +-20. Raises InputError for another correction or mode.
    """
    check_shapes(
        mask=(mask, "RT"),
        logprobs=(logprobs, "RT", float),
        sampling_logprobs=(sampling_logprobs, "RT", float),
    )
    if importance_sampling_correction not in CORRECTIONS:
        choices = ", ".join(CORRECTIONS)
        raise InputError(
            f"importance_sampling_correction is {importance_sampling_correction!r}: choose one "
            f"of {choices}"
        )
    if importance_sampling_mode not in MODES:
        choices = ", ".join(MODES)
        raise InputError(
            f"importance_sampling_mode is {importance_sampling_mode!r}: choose one of {choices}"
        )
    log_ratio = masked.zero(logprobs, mask) - masked.zero(sampling_logprobs, mask)
    ratio = jnp.exp(_cut(CORRECTIONS[importance_sampling_correction](log_ratio)))
    return MODES[importance_sampling_mode](ratio, importance_sampling_cap)


def kl_k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """Computes the k3 estimator of KL(pi || pi_ref).

    k3 = exp(d) - d - 1 with d = log pi_ref - log pi, 0 or more. The value estimates KL(pi ||
    pi_ref), but the gradient does not: over samples of pi the mean of (1 - pi_ref / pi) grad log pi
    is the gradient of KL(pi_ref || pi). `kl_corrected` has that of KL(pi || pi_ref). Source:
    http://joschu.net/blog/kl-approx.html. Deviation: d is cut to +-20. `logprobs`, `ref_logprobs`
    and the result are [R, T]. It takes no mask: where padding may hold NaN put both through
    `masked.zero` first, or the NaN enters the gradient.
    """
    check_shapes(logprobs=(logprobs, "RT", float), ref_logprobs=(ref_logprobs, "RT", float))
    difference = _cut(ref_logprobs.astype(jnp.float32) - logprobs.astype(jnp.float32))
    return jnp.expm1(difference) - difference


def kl_corrected(logprobs: Array, ref_logprobs: Array, behavior_logprobs: Array) -> Array:
    """Computes pi / mu k3, an estimator of KL(pi || pi_ref) from tokens drawn from mu.

    Its gradient estimates the gradient of KL(pi || pi_ref). The mean over mu of pi / mu k3 is the
    mean of k3 over pi, as a function of pi: the ratio carries a gradient, and also where its value
    is 1. Source: DeepSeek-V3.2, arXiv 2512.02556, and TRL (`use_bias_correction_kl`, its default).
    Deviations: it is each token's own ratio with every loss type, where TRL takes the sequence's
    with its sequence-level loss; log-ratios are cut to +-20. The ratio is not clipped. Prefixes
    stay those that mu drew. Sampling by top_k, top_p, min_p and repetition_penalty is not corrected
    for, see `importance_weights`. Like `kl_k3` it takes no mask.
    """
    check_shapes(logprobs=(logprobs, "RT"), behavior_logprobs=(behavior_logprobs, "RT", float))
    behavior = jax.lax.stop_gradient(behavior_logprobs.astype(jnp.float32))
    ratio = jnp.exp(_cut(logprobs.astype(jnp.float32) - behavior))
    return ratio * kl_k3(logprobs, ref_logprobs)


# kl_estimator -> estimates [R, T] of KL(pi || pi_ref) from (log pi, log pi_ref, log mu), all [R,
# T].
KL_ESTIMATORS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "k3": lambda logprobs, ref_logprobs, behavior_logprobs: kl_k3(logprobs, ref_logprobs),
    "k3_corrected": kl_corrected,
}


def _cut(log_ratio: Array) -> Array:
    """Clips log-ratios to +-MAX_LOG_RATIO, so that exp of them is finite."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
