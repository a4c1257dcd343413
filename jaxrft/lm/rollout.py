"""Rollouts: prefill a prompt once, decode its group from the shared cache, stop when all rows have
ended.

A rollout is `start`, a few segments of `decode` and `finish`. `generate` joins them in one program;
`jaxrft.lm.policy.CompiledRollout` runs them one by one, and leaves out the segments that no row
needs.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.lm import sampling
from jaxrft.lm.model import Policy
from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree, Rollout

# Attention reads a cache up to its length, not up to what is written. So the cache starts short and
# grows: to a quarter of the completion at a time, or to an eighth where that is long. Each of the
# SEGMENTS at most is a program to compile.
SLOTS = 64
QUARTERS = 4
SEGMENTS = 8


class Sampling(NamedTuple):
    """How completions are drawn."""

    num_generations: int
    max_completion_length: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


class Inputs(NamedTuple):
    """What the decoding loop reads, and does not change."""

    prepared: PyTree  # see `Policy.prepare_decode`
    keys: Array  # [R] keys of the samples
    first: Array  # [R] int32, the position of a completion's first token


class Decoding(NamedTuple):
    """What the decoding loop carries."""

    time: Array  # scalar int32, tokens written
    done: Array  # [R] bool, EOS was drawn
    lengths: Array  # [R] int32, tokens up to and including EOS
    tokens: Array  # [R, T] int32
    logprobs: Array  # [R, T] float32
    sampling_logprobs: Array  # [R, T] float32
    cache: PyTree


class Drawn(NamedTuple):
    """A token of each row."""

    token: Array  # [R] int32
    logprob: Array  # [R] float32
    sampling_logprob: Array  # [R] float32


def prefill(policy: Policy, params: PyTree, prompts: Array, lengths: Array) -> tuple[Array, PyTree]:
    """Computes the last hidden states [B, D] of right-padded prompts [B, P], and their cache.

    The cache serves as the prefix of the completions.
    """
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32)[None], prompts.shape)
    hidden, prefix = policy.apply(params, prompts, positions, positions < lengths[:, None])
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], prefix


def generate(
    policy: Policy,
    params: PyTree,
    key: Array,
    prompts: Array,
    lengths: Array,
    ids: Array,
    first_sample: Array | None = None,
    **options: Any,
) -> Rollout:
    """Samples G completions of each prompt; those of a prompt are next to each other.

    prompts [B, P] right-padded, lengths [B], ids [B] the tasks' ids, first_sample [B] int32 the
    number of a group's first sample, None for 0. `options` are the fields of `Sampling`. A sample
    depends on `key`, its task's id and its number only: it is the same in another batch, in another
    bucket of prompts and on another mesh, up to the rounding of matrix products. Greedy decoding
    takes the likeliest token and ignores the key.
    """
    how = Sampling(**options)
    inputs, state = start(policy, params, key, prompts, lengths, ids, first_sample, how=how)
    for length in cache_lengths(how.max_completion_length):
        state = state._replace(cache=policy.grow_cache(state.cache, length))
        state, _ = decode(policy, inputs, state, how=how, length=length)
    return finish(state)


def cache_lengths(max_completion_length: int) -> tuple[int, ...]:
    """Returns the lengths of the cache, one a segment: multiples of one step, and the last as long
    as a completion.

    The step is a quarter of the completion, or an eighth in multiples of 256 where that is shorter.
    A quarter is a multiple of 64 slots; above that of 128, which are a tile of a TPU. The last
    token of a completion is not written to the cache.

    >>> cache_lengths(60), cache_lengths(256), cache_lengths(600), cache_lengths(4096)[:3]
    ((60,), (64, 128, 192, 256), (256, 512, 600), (512, 1024, 1536))
    """
    tile = SLOTS if max_completion_length <= QUARTERS * SLOTS else 2 * SLOTS
    quarter = _round_up(max_completion_length / QUARTERS, tile)
    eighth = _round_up(max_completion_length / SEGMENTS, QUARTERS * SLOTS)
    step = min(quarter, eighth)
    return (*range(step, max_completion_length - 1, step), max_completion_length)


def _round_up(number: float, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def start(
    policy: Policy,
    params: PyTree,
    key: Array,
    prompts: Array,
    lengths: Array,
    ids: Array,
    first_sample: Array | None,
    *,
    how: Sampling,
) -> tuple[Inputs, Decoding]:
    """Computes the prompts and draws the first token of each sample; see `generate`."""
    rows = prompts.shape[0] * how.num_generations
    last, prefix = prefill(policy, params, prompts, lengths)
    inputs = Inputs(
        prepared=policy.prepare_decode(params, prefix),
        keys=sampling.row_keys(key, ids, how.num_generations, first_sample),
        first=constrain(jnp.repeat(lengths, how.num_generations), "batch"),
    )
    cells = (rows, how.max_completion_length)
    empty = Decoding(
        time=jnp.zeros((), jnp.int32),
        done=constrain(jnp.zeros(rows, bool), "batch"),
        lengths=constrain(jnp.zeros(rows, jnp.int32), "batch"),
        tokens=constrain(jnp.zeros(cells, jnp.int32), "batch", None),
        logprobs=constrain(jnp.zeros(cells, jnp.float32), "batch", None),
        sampling_logprobs=constrain(jnp.zeros(cells, jnp.float32), "batch", None),
        cache=policy.init_cache(rows, cache_lengths(how.max_completion_length)[0]),
    )
    logits = jnp.repeat(policy.unembed(params, last), how.num_generations, axis=0)
    return inputs, _advance(inputs, empty, constrain(logits, "batch", "vocab"), how)


def decode(
    policy: Policy, inputs: Inputs, state: Decoding, *, how: Sampling, length: int
) -> tuple[Decoding, Array]:
    """Draws tokens until all rows have ended or the cache of `length` slots is full; whether all
    have ended [].
    """

    def needed(state: Decoding) -> Array:
        return (state.time <= length) & ~_ended(state)

    def advance(state: Decoding) -> Decoding:
        slot = state.time - 1
        tokens = jax.lax.dynamic_index_in_dim(state.tokens, slot, axis=1, keepdims=False)
        logits, cache = policy.decode(
            inputs.prepared, tokens, inputs.first + slot, slot, state.cache
        )
        return _advance(inputs, state._replace(cache=cache), logits, how)

    state = jax.lax.while_loop(needed, advance, state)
    return state, _ended(state)


def finish(state: Decoding) -> Rollout:
    """Returns what was sampled."""
    mask = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None] < state.lengths[:, None]
    return Rollout(
        state.tokens,
        state.lengths,
        mask.astype(jnp.float32),
        state.logprobs,
        state.sampling_logprobs,
    )


def _ended(state: Decoding) -> Array:
    return jnp.all(state.done) | (state.time >= state.tokens.shape[1])


def _advance(inputs: Inputs, state: Decoding, logits: Array, how: Sampling) -> Decoding:
    """Draws the next token of each row from `logits` [R, V] and writes it."""
    drawn = _draw(inputs.keys, state.time, logits / how.temperature, how)
    return _write(state, drawn, jnp.asarray(how.eos_ids, jnp.int32))


def _draw(keys: Array, time: Array, logits: Array, how: Sampling) -> Drawn:
    """Draws the rows' tokens number `time`, from their keys [R] and logits [R, V] at the sampling
    temperature.
    """
    allowed = sampling.truncate(logits, top_k=how.top_k, top_p=how.top_p)
    token = (
        jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if how.greedy
        else sampling.draw(keys, time, allowed)
    )
    logprob = sampling.log_probability(logits, token)
    drawn_from = jnp.zeros_like(logprob) if how.greedy else sampling.log_probability(allowed, token)
    return Drawn(token, logprob.astype(jnp.float32), drawn_from.astype(jnp.float32))


def _write(state: Decoding, drawn: Drawn, ends: Array) -> Decoding:
    """Writes tokens at `time`, of which `ends` [E] end a row; rows that are done stay as they
    are.
    """
    live = ~state.done

    def put(buffer: Array, column: Array) -> Array:
        column = jnp.where(live, column, jnp.zeros_like(column))
        return jax.lax.dynamic_update_slice(
            buffer, column[:, None], (jnp.zeros_like(state.time), state.time)
        )

    return Decoding(
        time=state.time + 1,
        done=state.done | jnp.any(drawn.token[:, None] == ends[None], axis=-1),
        lengths=state.lengths + live.astype(jnp.int32),
        tokens=put(state.tokens, drawn.token),
        logprobs=put(state.logprobs, drawn.logprob),
        sampling_logprobs=put(state.sampling_logprobs, drawn.sampling_logprob),
        cache=state.cache,
    )
