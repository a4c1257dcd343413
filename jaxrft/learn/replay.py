"""Rollout replay: a ring buffer of the latest informative groups, to be trained on again.

Axis letters: C groups in the buffer, B groups trained on in a step, F of them fresh at least, M
rolled out, G rollouts a group, P prompt tokens, T completion tokens.

A step rolls out at least `fresh_needed` groups, joins them with groups drawn from the buffer, and
adds them to the buffer:

    batch, replayed = replay.draw(key, buffer, fresh, step)
    buffer = replay.add(buffer, fresh)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft import mesh as meshes
from jaxrft.learn import grpo, masked
from jaxrft.shapes import check_shapes
from jaxrft.types import Array, InputError, PyTree


class Groups(NamedTuple):
    """Groups of rollouts and all that the loss needs of them; the leading axis is B, M or C."""

    prompts: Array  # [B, P] int32, right-padded
    lengths: Array  # [B] int32, of the prompts
    tokens: Array  # [B, G, T] int32
    mask: Array  # [B, G, T] float32, 0 = leaves the loss
    logprobs: Array  # [B, G, T] float32, log mu, of the policy that sampled the tokens
    advantages: Array  # [B, G] float32
    rewards: Array  # [B, G] float32, 0 where not valid
    valid: Array  # [B, G] bool, whether the sample has a reward
    task: Array  # [B] int32
    step: Array  # [B] int32, 0 or more, in which the group was rolled out
    weights: Array | None = None  # [B, G, T] float32, of the tokens' losses; None = 1 each


class Buffer(NamedTuple):
    """The state of a replay: a ring, filled in the order of arrival."""

    groups: Groups  # [C, ...]; step -1 marks an empty slot
    # [] int32, the slot that is written next: the oldest group's once the ring is full
    next: Array


class Replay(NamedTuple):
    """A replay as pure functions; its state has fixed shapes and dtypes."""

    init: Callable[[Groups], Buffer]
    """(like) -> the empty buffer, for groups of the shapes of `like`, arrays or
    jax.ShapeDtypeStructs of any number.
    """
    add: Callable[[Buffer, Groups], Buffer]
    """(buffer, fresh [M]) -> the buffer with the informative ones, oldest out first. Drawn groups
    are in it already. Raises InputError for groups of other shapes than the buffer's."""
    draw: Callable[[Array, Buffer, Groups, Array], tuple[Groups, Array]]
    """(key, buffer, fresh [M], step) -> (groups [B], replayed [B] bool): the first of the fresh
    groups, then the drawn, as many as there are, B - F at most, none twice and none of this step. M
    = B is always enough, and so is M = fresh_needed; with fewer, what is missing is zeros: groups
    without a valid reward and without a token in the loss. Raises InputError for M < F, M > B or
    groups of other shapes than the buffer's."""
    fresh_needed: Callable[[Buffer, Array], Array]
    """(buffer, step) -> [] int32, how many fresh groups the batch of this step needs: F, or more,
    up to B, while the buffer is short."""


# draw -> weight [C], with which chances are in proportion, from (advantages [C, G]).
WEIGHTS: dict[str, Callable[[Array], Array]] = {
    "uniform": lambda advantages: jnp.ones(advantages.shape[0], jnp.float32),
    "advantage": lambda advantages: jnp.mean(jnp.abs(advantages), axis=1),
}


def ring(
    *,
    capacity: int,
    batch_size: int,
    fresh_fraction: float = 0.5,
    max_age: int | None = None,
    draw: str = "uniform",
) -> Replay:
    """Creates a replay of the last `capacity` informative groups [arXiv 2506.05316].

    Only groups that are `grpo.informative` and have a token in the loss enter the buffer.
    A step trains on B = `batch_size` groups, of which F = round(fresh_fraction * B) are fresh. The
    others are drawn without replacement from the groups that were rolled out 1 to `max_age` steps
    ago (None: no limit). They are drawn uniformly, or with chances in proportion to the group's
    mean |advantage| (`draw` "advantage").
    Deviations: while the buffer is short, the published code trains on fewer groups; here more
    fresh groups fill the batch. The published code stores groups twice; here no batch holds a group
    twice.

    Raises InputError for values that leave nothing to draw, or nothing fresh.
    """
    fresh = round(fresh_fraction * batch_size)
    if not 0 < fresh < batch_size:
        raise InputError(
            f"fresh_fraction {fresh_fraction} of batch_size {batch_size} is {fresh} fresh "
            "groups: choose it so that at least one group is fresh and one replayed"
        )
    if capacity < batch_size - fresh:
        raise InputError(
            f"capacity is {capacity}: it must be at least the "
            f"{batch_size - fresh} groups drawn in a step"
        )
    if max_age is not None and max_age < 1:
        raise InputError(f"max_age is {max_age}: it must be at least 1 step, or None for no limit")
    if draw not in WEIGHTS:
        raise InputError(f"draw is {draw!r}: choose one of {', '.join(WEIGHTS)}")
    return Replay(
        init=partial(_init, capacity),
        add=_add,
        draw=partial(_draw, batch_size, fresh, max_age, WEIGHTS[draw]),
        fresh_needed=partial(_fresh_needed, batch_size, fresh, max_age),
    )


def shapes(
    *, num_generations: int, prompt_length: int, completion_length: int, weighted: bool = False
) -> Groups:
    """Describes one group by jax.ShapeDtypeStructs, as `init` takes it.

    Its tokens have weights if `weighted`.
    """
    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    i32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    group = (1, num_generations)
    cells = (1, num_generations, completion_length)
    leaves: PyTree = {
        "prompts": i32((1, prompt_length)),
        "lengths": i32((1,)),
        "tokens": i32(cells),
        "mask": f32(cells),
        "logprobs": f32(cells),
        "advantages": f32(group),
        "rewards": f32(group),
        "valid": jax.ShapeDtypeStruct(group, jnp.bool_),
        "task": i32((1,)),
        "step": i32((1,)),
        "weights": f32(cells) if weighted else None,
    }
    return Groups(**leaves)


def _init(capacity: int, like: Groups) -> Buffer:
    """Allocates an empty ring of `capacity` groups of the shapes of `like`.

    Its dtypes are float32, int32 and bool, whatever floats and integers `like` has.
    """

    def zeros(x: Array) -> Array:
        return jnp.zeros((capacity, *x.shape[1:]), _dtype(x))

    groups = jax.tree.map(zeros, like)
    return Buffer(_lay(groups._replace(step=groups.step - 1)), jnp.zeros((), jnp.int32))


def _add(buffer: Buffer, groups: Groups) -> Buffer:
    """Writes the informative groups, in their order, over the oldest ones."""
    groups = _fitting(groups, buffer.groups)
    capacity = buffer.groups.step.shape[0]
    in_loss = jnp.any(groups.mask > 0, axis=(1, 2))
    informative = grpo.informative(groups.rewards, groups.valid) & in_loss
    order = jnp.cumsum(informative, dtype=jnp.int32) - 1  # [M], among the informative ones
    count = order[-1] + 1
    # a slot is written once, by the last of all groups that would
    stays = informative & (order >= count - capacity)
    slots = jnp.where(stays, (buffer.next + order) % capacity, capacity)
    written = jax.tree.map(
        lambda old, new: old.at[slots].set(new, mode="drop"), buffer.groups, groups
    )
    return Buffer(_lay(written), (buffer.next + count) % capacity)


def _draw(
    batch_size: int,
    least: int,
    max_age: int | None,
    weight: Callable[[Array], Array],
    key: Array,
    buffer: Buffer,
    fresh: Groups,
    step: Array,
) -> tuple[Groups, Array]:
    """Joins the first fresh groups with groups drawn from the buffer.

    At most `batch_size` - `least` groups are drawn. Returns (groups [B], replayed [B] bool), fresh
    groups first: `least` of them, and one more for every group that could not be drawn.
    """
    fresh = _fitting(fresh, buffer.groups)
    given = fresh.step.shape[0]
    if not least <= given <= batch_size:
        raise InputError(f"{given} fresh groups: there must be {least} to {batch_size}")
    eligible = _may_be_drawn(buffer, step, max_age)
    # The largest of log weight + Gumbel noise are a draw without replacement [arXiv 1903.06059].
    bounds = jnp.finfo(jnp.float32)
    weights = jnp.clip(weight(buffer.groups.advantages), bounds.tiny, bounds.max)
    score = jnp.log(weights) + jax.random.gumbel(key, eligible.shape, jnp.float32)
    # the best last
    slots = jax.lax.top_k(jnp.where(eligible, score, -jnp.inf), batch_size - least)[1][::-1]
    drawn = eligible[slots]  # [B - F]: False, then True

    def join(new: Array, old: Array) -> Array:
        new = jnp.pad(new, [(0, batch_size - given)] + [(0, 0)] * (new.ndim - 1))
        rest = jnp.where(drawn.reshape(-1, *(1,) * (old.ndim - 1)), old[slots], new[least:])
        return jnp.concatenate([new[:least], rest])

    return _lay(jax.tree.map(join, fresh, buffer.groups)), jnp.concatenate(
        [jnp.zeros(least, bool), drawn]
    )


def _fresh_needed(
    batch_size: int, least: int, max_age: int | None, buffer: Buffer, step: Array
) -> Array:
    """Counts the fresh groups that a batch needs, at least `least`. [] int32.

    They fill all slots for which the buffer has no group to draw.
    """
    return jnp.maximum(
        batch_size - jnp.sum(_may_be_drawn(buffer, step, max_age), dtype=jnp.int32), least
    )


def _may_be_drawn(buffer: Buffer, step: Array, max_age: int | None) -> Array:
    """Finds the groups that may be drawn. [C] bool.

    These are the groups rolled out before `step`, and at most `max_age` steps before it.
    """
    rolled_out = buffer.groups.step
    is_recent = True if max_age is None else step - rolled_out <= max_age
    return (rolled_out >= 0) & (rolled_out < step) & is_recent


def _dtype(x: Array) -> jnp.dtype:
    """Returns float32 for floats, int32 for integers, bool for masks."""
    if x.dtype == jnp.bool_:
        return jnp.dtype(jnp.bool_)
    return jnp.dtype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _fitting(groups: Groups, like: Groups) -> Groups:
    """Returns the groups in the buffer's dtypes.

    Raises InputError for a field whose kind of number or whose shape, the number of groups aside,
    is another than the buffer's.
    """
    for name, new, old in zip(Groups._fields, groups, like, strict=True):
        wanted = None if old is None else (groups.step.shape[0], *old.shape[1:])
        given = None if new is None else new.shape
        if given != wanted:
            raise InputError(f"{name} has shape {given}: the buffer has {wanted}")
        if new is not None and old is not None and _dtype(new) != old.dtype:
            raise InputError(f"{name} has dtype {new.dtype}: the buffer has {old.dtype}")
    return jax.tree.map(lambda x: x.astype(_dtype(x)), groups)


def _lay(groups: Groups) -> Groups:
    """Shards over groups, if the mesh divides their number."""
    if groups.step.shape[0] % meshes.shards(jax.sharding.get_abstract_mesh(), "batch"):
        return groups
    return jax.tree.map(lambda x: meshes.constrain(x, "batch", *(None,) * (x.ndim - 1)), groups)


def metrics(groups: Groups, replayed: Array, step: Array) -> dict[str, Array]:
    """Computes `replay/fraction` and `replay/age` of the batch [B] of a step. Both are [] float32.

    The fraction is the share of groups that are `replayed` [B] bool. The age is the mean of their
    steps since the rollout, NaN if no group is replayed.
    """
    check_shapes(replayed=(replayed, "B", bool), step_of_groups=(groups.step, "B"))
    count = masked.count(replayed)
    ages = masked.zero(step - groups.step, replayed)
    return {"replay/fraction": count / replayed.shape[0], "replay/age": jnp.sum(ages) / count}


def effective_sample_size(moments: Array) -> Array:
    """Computes the effective share (sum w)^2 / (n sum w^2) of n tokens from `weight_moments` [3].

    It is in (0, 1]. Source: Kong, "A note on importance sampling using standardized weights", 1992.
    1 if all ratios are equal, 1 / n if one token has all the weight, NaN without tokens. Moments of
    parts of a batch may be added, or averaged.
    """
    check_shapes(moments=(moments, "3"))
    count, total, squares = moments
    return total**2 / (count * squares)


def weight_moments(logprobs: Array, behavior_logprobs: Array, mask: Array) -> Array:
    """Computes n, sum w and sum w^2 of w = pi / mu over the n tokens of the mask. [3] float32.

    Everything is [R, T]; what is under mask 0 changes nothing. Log-ratios are cut to +-20, as in
    `grpo.policy_loss`.
    """
    check_shapes(
        mask=(mask, "RT"),
        logprobs=(logprobs, "RT", float),
        behavior_logprobs=(behavior_logprobs, "RT", float),
    )
    log_ratio = masked.zero(logprobs, mask) - masked.zero(behavior_logprobs, mask)
    cut = jnp.clip(log_ratio, -grpo.MAX_LOG_RATIO, grpo.MAX_LOG_RATIO)
    weights = masked.zero(jnp.exp(cut), mask)
    return jnp.stack([masked.count(mask), jnp.sum(weights), jnp.sum(weights**2)])
