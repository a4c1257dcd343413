"""Rollouts: prefill a prompt once, decode its group from the shared cache, stop when all rows have
ended.

A rollout is `start`, a few segments of `decode` and `finish`. `generate` joins them in one program;
`jaxrft.lm.policy.CompiledRollout` runs them one by one, leaves out the segments that no row needs,
and lets the rows that are left move into a smaller grid (`compact`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.lm import compaction, sampling
from jaxrft.lm.compaction import Grid
from jaxrft.lm.model import Policy
from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree, Rollout

# Attention reads a cache up to its length, not up to what is written. So the cache starts short and
# grows to these parts of the longest completion. Each is a program to compile.
PARTS = (1 / 16, 1 / 4, 1 / 2)
QUARTERS = (1 / 4, 1 / 2, 3 / 4)
SLOTS = 64


class Sampling(NamedTuple):
    """The settings of sampling."""

    num_generations: int
    max_completion_length: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


class Inputs(NamedTuple):
    """The constants of the decoding loop."""

    weights: PyTree  # see `Policy.prepare_decode`
    prompts: PyTree  # likewise; leaves [blocks, ...]
    keys: Array  # [R] keys of the samples
    first: Array  # [R] int32, the position of a completion's first token


class Samples(NamedTuple):
    """What was drawn, 0 behind the end of a row."""

    lengths: Array  # [R] int32, tokens up to and including EOS
    tokens: Array  # [R, T] int32
    logprobs: Array  # [R, T] float32
    sampling_logprobs: Array  # [R, T] float32


class Decoding(NamedTuple):
    """The state of the decoding loop."""

    time: Array  # scalar int32, tokens written
    done: Array  # [R] bool, EOS was drawn
    samples: Samples
    cache: PyTree


class Status(NamedTuple):
    """Why a segment stopped; replicated scalars."""

    ended: Array  # bool, whether no row needs another token
    time: Array  # int32
    grid: Array  # int32, the last of the segment's grids that the live rows fit


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
    settings = Sampling(**options)
    inputs, state = start(
        policy, params, key, prompts, lengths, ids, first_sample, settings=settings
    )
    for length in cache_lengths(settings.max_completion_length):
        state = state._replace(cache=policy.grow_cache(state.cache, length))
        state, _ = decode(policy, inputs, state, settings=settings, length=length)
    return finish(state.samples)


def cache_lengths(max_completion_length: int) -> tuple[int, ...]:
    """Returns the lengths of the cache, from the shortest to that of the longest completion.

    Up to 256 tokens they are the quarters, in multiples of 64 slots. Above they are a sixteenth, a
    quarter and a half, since most completions are short where the longest is long, in multiples of
    128, which are a tile of a TPU. The last token of a completion is not written to the cache.

    >>> cache_lengths(60), cache_lengths(256), cache_lengths(600), cache_lengths(4096)
    ((60,), (64, 128, 192, 256), (128, 256, 384, 600), (256, 1024, 2048, 4096))
    """
    is_short = max_completion_length <= 4 * SLOTS
    tile = SLOTS if is_short else 2 * SLOTS
    parts = QUARTERS if is_short else PARTS
    lengths = {_round_up(part * max_completion_length, tile) for part in parts}
    shorter = sorted(length for length in lengths if length < max_completion_length - 1)
    return (*shorter, max_completion_length)


def grid_lengths(lengths: tuple[int, ...], grid: int) -> tuple[int, ...]:
    """Returns the lengths of the cache of the grid number `grid`: all or, from the third grid on,
    every second.

    A small grid has a small cache, of which free slots cost little. So the programs of four grids
    and four lengths are 12.
    """
    return lengths if grid < 2 else lengths[::-1][::2][::-1]


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
    settings: Sampling,
) -> tuple[Inputs, Decoding]:
    """Computes the prompts and draws the first token of each sample; see `generate`."""
    rows = prompts.shape[0] * settings.num_generations
    last, prefix = prefill(policy, params, prompts, lengths)
    weights, stored = policy.prepare_decode(params, prefix)
    inputs = Inputs(
        weights=weights,
        prompts=stored,
        keys=sampling.row_keys(key, ids, settings.num_generations, first_sample),
        first=constrain(jnp.repeat(lengths, settings.num_generations), "batch"),
    )
    empty = Decoding(
        time=jnp.zeros((), jnp.int32),
        done=constrain(jnp.zeros(rows, bool), "batch"),
        samples=_no_samples(rows, settings.max_completion_length),
        cache=policy.init_cache(rows, cache_lengths(settings.max_completion_length)[0]),
    )
    logits = jnp.repeat(policy.unembed(params, last), settings.num_generations, axis=0)
    return inputs, _advance(inputs, empty, constrain(logits, "batch", "vocab"), settings)


def _no_samples(rows: int, max_completion_length: int) -> Samples:
    """Returns the samples of rows of which no token was drawn."""
    cells = (rows, max_completion_length)
    return Samples(
        lengths=constrain(jnp.zeros(rows, jnp.int32), "batch"),
        tokens=constrain(jnp.zeros(cells, jnp.int32), "batch", None),
        logprobs=constrain(jnp.zeros(cells, jnp.float32), "batch", None),
        sampling_logprobs=constrain(jnp.zeros(cells, jnp.float32), "batch", None),
    )


def decode(
    policy: Policy,
    inputs: Inputs,
    state: Decoding,
    *,
    settings: Sampling,
    length: int,
    grids: tuple[Grid, ...] = (),
) -> tuple[Decoding, Status]:
    """Draws tokens until all rows have ended, the cache of `length` slots is full, or the live rows
    fit the next of `grids`, of which the first is that of the rows.
    """

    def needed(state: Decoding) -> Array:
        more = (state.time <= length) & ~_ended(state)
        if len(grids) > 1:
            more &= ~compaction.fits(state.done, grids[0], grids[1])
        return more

    def advance(state: Decoding) -> Decoding:
        slot = state.time - 1
        tokens = jax.lax.dynamic_index_in_dim(state.samples.tokens, slot, axis=1, keepdims=False)
        prepared = (inputs.weights, inputs.prompts)
        logits, cache = policy.decode(prepared, tokens, inputs.first + slot, slot, state.cache)
        return _advance(inputs, state._replace(cache=cache), logits, settings)

    state = jax.lax.while_loop(needed, advance, state)
    grid = jnp.zeros((), jnp.int32)
    for number, smaller in enumerate(grids[1:], start=1):
        grid = jnp.where(compaction.fits(state.done, grids[0], smaller), number, grid)
    return state, Status(_ended(state), state.time, grid)


class Left(NamedTuple):
    """The rows of a smaller grid, and what is known of all rows of the rollout."""

    rows: Array  # [R'] int32, the number of each among the first rows of its shard
    samples: Samples  # of all rows, as far as they were drawn at the last compaction


def compact(
    policy: Policy,
    inputs: Inputs,
    state: Decoding,
    left: Left | None,
    *,
    now: Grid,
    smaller: Grid,
    length: int,
) -> tuple[Inputs, Decoding, Left]:
    """Moves the live rows into a smaller grid, with a cache of `length` slots.

    `left` is what the compaction before returned, None at the first. `inputs` come without weights,
    which do not move.
    """
    shards = state.done.shape[0] // now.rows
    moves = compaction.plan(state.done, now, smaller)
    if left is None:
        numbers = jnp.tile(jnp.arange(now.rows, dtype=jnp.int32), shards)
        left = Left(numbers, state.samples)
    else:
        left = Left(left.rows, _merged(left, state.samples, shards))
    rows_of_shard = left.samples.lengths.shape[0] // shards
    rows = compaction.take(left.rows, moves.rows)
    filled = moves.filled.reshape(-1)
    keys, first, done, samples, cache = compaction.take(
        (inputs.keys, inputs.first, state.done, state.samples, state.cache), moves.rows
    )
    return (
        inputs._replace(
            prompts=compaction.take(inputs.prompts, moves.blocks),
            keys=keys,
            first=first,
        ),
        Decoding(state.time, done | ~filled, samples, policy.grow_cache(cache, length)),
        Left(jnp.where(filled, rows, rows_of_shard), left.samples),
    )


def finish(samples: Samples, left: Left | None = None, shards: int = 1) -> Rollout:
    """Returns what was sampled; `left` is what the last compaction returned."""
    if left is not None:
        samples = _merged(left, samples, shards)
    mask = jnp.arange(samples.tokens.shape[1], dtype=jnp.int32)[None] < samples.lengths[:, None]
    return Rollout(
        samples.tokens,
        samples.lengths,
        mask.astype(jnp.float32),
        samples.logprobs,
        samples.sampling_logprobs,
    )


def _merged(left: Left, samples: Samples, shards: int) -> Samples:
    """Returns the samples of all rows, those of the rows that were left being `samples`."""
    return compaction.put(left.samples, left.rows.reshape(shards, -1), samples)


def _ended(state: Decoding) -> Array:
    return jnp.all(state.done) | (state.time >= state.samples.tokens.shape[1])


def _advance(inputs: Inputs, state: Decoding, logits: Array, settings: Sampling) -> Decoding:
    """Draws the next token of each row from `logits` [R, V] and writes it."""
    drawn = _draw(inputs.keys, state.time, logits / settings.temperature, settings)
    return _write(state, drawn, jnp.asarray(settings.eos_ids, jnp.int32))


def _draw(keys: Array, time: Array, logits: Array, settings: Sampling) -> Drawn:
    """Draws the rows' tokens number `time`, from their keys [R] and logits [R, V] at the sampling
    temperature.
    """
    allowed = sampling.truncate(logits, top_k=settings.top_k, top_p=settings.top_p)
    token = (
        jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if settings.greedy
        else sampling.draw(keys, time, allowed)
    )
    logprob = sampling.log_probability(logits, token)
    drawn_from = (
        jnp.zeros_like(logprob) if settings.greedy else sampling.log_probability(allowed, token)
    )
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

    before = state.samples
    return Decoding(
        time=state.time + 1,
        done=state.done | jnp.any(drawn.token[:, None] == ends[None], axis=-1),
        samples=Samples(
            lengths=before.lengths + live.astype(jnp.int32),
            tokens=put(before.tokens, drawn.token),
            logprobs=put(before.logprobs, drawn.logprob),
            sampling_logprobs=put(before.sampling_logprobs, drawn.sampling_logprob),
        ),
        cache=state.cache,
    )
