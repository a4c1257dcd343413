"""Packing: completions of many lengths behind their prompts, in bins of one or two fixed shapes.

The cost of a pass over a batch then follows its tokens, not its longest completion. A bin is a row
of slots. It holds completions of one or more groups, and the prompt of each of these groups once,
ahead of the group's first completion:

    prompt of group 3 | completion | completion | prompt of group 8 | completion | free

A completion of n tokens takes n slots. The first reads the prompt's last token again, and slot i
predicts token i. The prompt takes a slot less than it has tokens. Segments keep completions apart,
see `jaxrft.lm.attention.Segments`.

Axis letters: B groups, G samples a group, R = B * G samples, P prompt tokens, T completion tokens,
C slots of a bin.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.lm.attention import Segments
from jaxrft.shapes import check_shapes
from jaxrft.types import Array

# A bin holds enough completions of full length that the prompt is at most 1 / PROMPT_SHARE of them,
# since a group in several bins has its prompt computed in each. Attention's cost grows with the
# length of a bin, so that it has at most MAX_BIN_SLOTS, unless one completion needs more.
PROMPT_SHARE = 16
MAX_BIN_SLOTS = 8192

# The number of slots that a device computes at a time. It is at most 1 / ROUND_SHARE of the
# device's samples, since the bins of the last round may be empty.
MAX_ROUND_SLOTS = 8192
MIN_ROUND_SLOTS = 1024
ROUND_SHARE = 64

# Where completions may be longer than LONG, those up to 1 / SHORT_SHARE of the longest have bins of
# their own: in shorter bins attention costs less. Each shape is a program within the update's.
LONG = 512
SHORT_SHARE = 4


class Shape(NamedTuple):
    """The static sizes of a packing."""

    length: int  # slots of a bin
    bins_per_round: int  # bins that are computed at a time, on all devices


class Packing(NamedTuple):
    """The slots of every sample of a batch. Slots are counted through all bins."""

    # [R] int32, ascending; the first slot of a sample, or of its group's prompt if that lies ahead
    # of it
    start: Array
    sample: Array  # [R] int32, the number of the sample
    prompt: Array  # [R] int32, slots of the prompt ahead of it, 0 = none
    prompt_start: Array  # [R] int32, the first slot of its group's prompt
    size: Array  # [R] int32, slots of the sample itself
    count: Array  # [] int32, bins


class Bins(NamedTuple):
    """M of the bins; `time` and `sample` of a slot without a completion are undefined."""

    tokens: Array  # [M, C] int32, to be read
    positions: Array  # [M, C] int32, in the sequence
    valid: Array  # [M, C] bool, whether the slot is in use
    segments: Segments  # a prompt's number is negative, a completion's is its first slot in the bin
    predicts: Array  # [M, C] bool, whether the slot predicts a token
    sample: Array  # [M, C] int32, 0 to R - 1
    time: Array  # [M, C] int32, 0 to T - 1, of the token that is predicted


def choose_shape(
    *,
    prompt_length: int,
    completion_length: int,
    num_generations: int,
    rows: int,
    samples: int,
    shards: int,
) -> Shape:
    """Chooses the shape of bins for `samples` samples, of which `rows` of full length fit into
    memory.

    Groups of `num_generations`; `shards` devices share the bins.
    """
    device_rows = max(1, rows // shards)
    device_samples = max(1, samples // shards)
    per_bin = 1  # completions of full length
    for more in range(2, min(num_generations, device_rows) + 1):
        enough = per_bin * completion_length >= PROMPT_SHARE * prompt_length
        if enough or prompt_length + more * completion_length > MAX_BIN_SLOTS:
            break
        if num_generations % more == 0:
            per_bin = more
    length = prompt_length - 1 + per_bin * completion_length
    share = device_samples // (per_bin * ROUND_SHARE)
    wanted = max(MIN_ROUND_SLOTS // length, min(MAX_ROUND_SLOTS // length, share), 1)
    most = min(wanted, max(1, device_rows // per_bin))
    # as many rounds as completions of full length need, but equal ones: none is half empty
    full = -(-device_samples // per_bin)
    rounds = -(-full // most)
    return Shape(length, -(-full // rounds) * shards)


def choose_shapes(
    *,
    prompt_length: int,
    completion_length: int,
    num_generations: int,
    rows: int,
    samples: int,
    shards: int,
) -> dict[int, Shape]:
    """Chooses shapes of bins by the longest completion that each is for, in ascending order.

    There are two if completions may be so long that a second, shorter one pays; see `choose_shape`.
    """

    def choose(completion_length: int, rows: int) -> Shape:
        return choose_shape(
            prompt_length=prompt_length,
            completion_length=completion_length,
            num_generations=num_generations,
            rows=rows,
            samples=samples,
            shards=shards,
        )

    shapes = {completion_length: choose(completion_length, rows)}
    if completion_length <= LONG:
        return shapes
    short = -(-completion_length // SHORT_SHARE)
    of_short = choose(short, rows * SHORT_SHARE)
    if of_short.length >= shapes[completion_length].length:
        return shapes
    return {short: of_short} | shapes


def sample_sizes(mask: Array) -> Array:
    """Counts the tokens [B, G] of samples up to the last whose mask [B, G, T] is not 0."""
    steps = mask.shape[-1]
    return jnp.max(jnp.where(mask > 0, jnp.arange(1, steps + 1, dtype=jnp.int32), 0), axis=-1)


def pack(lengths: Array, mask: Array, shape: Shape) -> Packing:
    """Packs samples by first fit, the longest groups first, and of a group the longest samples.

    `lengths` [B] int32 of the prompts; `mask` [B, G, T], of which the last token that is not 0 ends
    a sample. A sample without one is left out. A sample goes into the first bin that has its
    group's prompt already and room for it, else into the first that has room for both: a group's
    samples stay together, which first fit by length alone would scatter.
    """
    check_shapes(mask=(mask, "BGT"), lengths=(lengths, "B", int))
    groups, group_size, _ = mask.shape
    samples = groups * group_size
    size = sample_sizes(mask)
    of_group = jnp.argsort(-(jnp.sum(size, axis=1) + lengths), stable=True)
    of_sample = jnp.argsort(-size, axis=1, stable=True)[of_group]
    order = (of_group[:, None] * group_size + of_sample).reshape(-1).astype(jnp.int32)

    size = size.reshape(-1)[order]
    group = order // group_size
    prompt = lengths[group] - 1
    first = jnp.arange(samples, dtype=jnp.int32) % group_size == 0

    def put(
        carry: tuple[Array, Array], sample: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        # of each bin: its free slots, and the slot where the group's prompt begins, -1 = none
        free, prompt_offsets = carry
        size, prompt, first = sample
        prompt_offsets = jnp.where(first, -1, prompt_offsets)
        fits_next_to_prompt = (prompt_offsets >= 0) & (free >= size)
        fits_with_prompt = free >= size + prompt
        joins = jnp.any(fits_next_to_prompt)
        candidates = jnp.where(joins, fits_next_to_prompt, fits_with_prompt)
        chosen = jnp.argmax(candidates).astype(jnp.int32)
        added_prompt = jnp.where(joins, 0, prompt)
        offset = shape.length - free[chosen]
        exists = size > 0
        free = free.at[chosen].add(jnp.where(exists, -(size + added_prompt), 0))
        prompt_offset = jnp.where(exists & ~joins, offset, prompt_offsets[chosen])
        prompt_offsets = prompt_offsets.at[chosen].set(prompt_offset)
        return (free, prompt_offsets), (chosen, offset, added_prompt, prompt_offset)

    empty = (jnp.full(samples, shape.length, jnp.int32), jnp.full(samples, -1, jnp.int32))
    _, (chosen, offset, added_prompt, prompt_offset) = jax.lax.scan(
        put, empty, (size, prompt, first)
    )
    exists = size > 0
    nowhere = jnp.iinfo(jnp.int32).max
    start = jnp.where(exists, chosen * shape.length + offset, nowhere)
    by_start = jnp.argsort(start)
    return Packing(
        start=start[by_start],
        sample=order[by_start],
        prompt=added_prompt[by_start],
        prompt_start=(chosen * shape.length + prompt_offset)[by_start],
        size=size[by_start],
        count=jnp.max(jnp.where(exists, chosen + 1, 0)),
    )


def fill_bins(
    packing: Packing, shape: Shape, number: Array, prompts: Array, lengths: Array, tokens: Array
) -> Bins:
    """Fills the bins of round `number` with prompts [B, P] and tokens [B, G, T]."""
    groups, group_size, steps = tokens.shape
    slots = jnp.arange(shape.bins_per_round * shape.length, dtype=jnp.int32)
    slots = (number * slots.size + slots).reshape(shape.bins_per_round, shape.length)
    item = jnp.searchsorted(packing.start, slots, side="right").astype(jnp.int32) - 1
    begun = item >= 0
    item = jnp.maximum(item, 0)
    offset = slots - packing.start[item]
    in_prompt = offset < packing.prompt[item]
    time = offset - packing.prompt[item]
    valid = begun & (time < packing.size[item])
    sample = packing.sample[item]
    group = sample // group_size
    prompt_end = lengths[group] - 1
    time = jnp.clip(time, 0, steps - 1)
    position = jnp.where(in_prompt, offset, prompt_end + time)
    from_prompt = prompts[group, jnp.minimum(position, prompt_end)]
    from_tokens = tokens.reshape(-1, steps)[sample, jnp.maximum(time - 1, 0)]
    first_of_bin = slots[:, :1]
    prompt_number = first_of_bin - packing.prompt_start[item] - 1  # negative
    completion_number = packing.start[item] + packing.prompt[item] - first_of_bin
    return Bins(
        tokens=jnp.where(in_prompt | (time == 0), from_prompt, from_tokens),
        positions=jnp.where(valid, position, 0),
        valid=valid,
        segments=Segments(jnp.where(in_prompt, prompt_number, completion_number), prompt_number),
        predicts=valid & ~in_prompt,
        sample=sample,
        time=time,
    )
