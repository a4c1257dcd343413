"""Rollouts: prefill a prompt once, decode its group from the shared cache, stop when all rows have
ended.

A rollout is `start`, a few segments of `decode` and `finish`. `generate` joins them in one program;
`jaxrft.lm.segments.CompiledRollout` runs them one by one, leaves out the segments that no row
needs, and lets the rows that are left move into a smaller grid (`compact`). Where not all rows fit
into memory, it starts with an `empty` grid, and prompts are prefilled (`admit`) and `enter` it when
rows have left.

A row's tokens stand in the columns of `Samples` from the one in which it entered on; the cache has
a token in the slot of its column. In one step all rows write the same column.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxrft.lm import compaction, sampling, stop_strings
from jaxrft.lm.compaction import Grid, Moves
from jaxrft.lm.model import Policy
from jaxrft.lm.stop_strings import StopMatcher
from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree, Rollout

Tree = TypeVar("Tree")

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
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False


class Inputs(NamedTuple):
    """The constants of the decoding loop."""

    weights: PyTree  # see `Policy.prepare_weights`
    prompts: PyTree  # see `Policy.prepare_prompts`; leaves [blocks, ...]
    starts: Array  # [blocks] bool, whether a block is the first of its prompt
    keys: Array  # [R] keys of the samples
    first: Array  # [R] int32, the position of a completion's first token
    entered: Array  # [R] int32, the column of a completion's first token
    stop: StopMatcher | None = None  # of stop strings


class Samples(NamedTuple):
    """What was drawn, 0 before a row's first token and behind its last."""

    lengths: Array  # [R] int32, tokens up to and including the last
    ended: Array  # [R] bool, finished or at the limit
    finished: Array  # [R] bool, by EOS or a stop string
    stop_state: Array  # [R] int32, of the matcher of stop strings; 0 without
    tokens: Array  # [R, T] int32
    logprobs: Array  # [R, T] float32
    sampling_logprobs: Array  # [R, T] float32


class Decoding(NamedTuple):
    """The state of the decoding loop."""

    time: Array  # scalar int32, columns written
    samples: Samples
    cache: PyTree
    # [R, V] bool, tokens of the prompt and of the completion but its last; None without a
    # repetition penalty
    seen: Array | None = None


class Status(NamedTuple):
    """Why a segment stopped; replicated scalars."""

    ended: Array  # bool, whether no row needs another token
    time: Array  # int32
    grid: Array  # int32, the last of the segment's grids that the live rows fit
    free: Array  # int32, columns at the left that no live row uses


class Drawn(NamedTuple):
    """A token of each row."""

    token: Array  # [R] int32
    logprob: Array  # [R] float32
    sampling_logprob: Array  # [R] float32


class Entrants(NamedTuple):
    """Rows that are ready to be decoded, of B prompts."""

    prompts: PyTree  # see `Policy.prepare_prompts`; leaves [B, ...]
    keys: Array  # [R] keys of the samples
    first: Array  # [R] int32, the position of a completion's first token
    drawn: Drawn  # the first token
    seen: Array | None = None  # [R, V] bool, see `Decoding`


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
    stop: StopMatcher | None = None,
    **options: Any,
) -> Rollout:
    """Samples G completions of each prompt; those of a prompt are next to each other.

    prompts [B, P] right-padded, lengths [B], ids [B] the tasks' ids, first_sample [B] int32 the
    number of a group's first sample, None for 0. `stop` ends a completion with the token in which
    one of its strings ends, see `stop_strings`. `options` are the fields of `Sampling`. A sample
    depends on `key`, its task's id and its number only: it is the same in another batch, in another
    bucket of prompts and on another mesh, up to the rounding of matrix products. Greedy decoding
    takes the likeliest token and ignores the key.
    """
    settings = Sampling(**options)
    entrants = admit(policy, params, key, prompts, lengths, ids, first_sample, settings=settings)
    inputs, state = start(policy, params, entrants, stop, settings=settings)
    for length in cache_lengths(settings.max_completion_length):
        state = state._replace(cache=policy.resize_cache(state.cache, length, 0))
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


def grid_lengths(lengths: tuple[int, ...], grid: int, grids: int) -> tuple[int, ...]:
    """Returns the lengths of the cache of the grid number `grid` of `grids`: all for the first and
    the last, every second for those between.

    The first is there while the cache fills where all completions are long, and the last for most
    tokens where few are. So the programs of four grids and four lengths are 12.
    """
    return lengths if grid in (0, grids - 1) else lengths[::-1][::2][::-1]


def _round_up(number: float, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def admit(
    policy: Policy,
    params: PyTree,
    key: Array,
    prompts: Array,
    lengths: Array,
    ids: Array,
    first_sample: Array | None = None,
    *,
    settings: Sampling,
) -> Entrants:
    """Computes the prompts and draws the first token of each sample; see `generate`."""
    last, prefix = prefill(policy, params, prompts, lengths)
    keys = sampling.row_keys(key, ids, settings.num_generations, first_sample)
    logits = jnp.repeat(policy.unembed(params, last), settings.num_generations, axis=0)
    logits = constrain(logits, "batch", "vocab")
    seen = None
    if settings.repetition_penalty != 1.0:
        seen = sampling.tokens_seen(prompts, lengths, logits.shape[-1])
        seen = constrain(jnp.repeat(seen, settings.num_generations, axis=0), "batch", "vocab")
    return Entrants(
        prompts=policy.prepare_prompts(prefix),
        keys=keys,
        first=constrain(jnp.repeat(lengths, settings.num_generations), "batch"),
        drawn=_draw(keys, jnp.zeros(keys.shape, jnp.int32), logits, seen, settings),
        seen=seen,
    )


def start(
    policy: Policy,
    params: PyTree,
    entrants: Entrants,
    stop: StopMatcher | None = None,
    *,
    settings: Sampling,
) -> tuple[Inputs, Decoding]:
    """Returns the state of a rollout whose prompts all enter at once."""
    rows = entrants.first.shape[0]
    inputs = Inputs(
        weights=policy.prepare_weights(params),
        prompts=entrants.prompts,
        starts=constrain(jnp.ones(rows // settings.num_generations, bool), "batch"),
        keys=entrants.keys,
        first=entrants.first,
        entered=constrain(jnp.zeros(rows, jnp.int32), "batch"),
        stop=jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), stop),
    )
    samples = _no_samples(rows, settings.max_completion_length)
    time = jnp.zeros((), jnp.int32)
    return inputs, Decoding(
        time=time + 1,
        samples=_write(samples, time, entrants.drawn, inputs.stop, settings),
        cache=policy.init_cache(rows, cache_lengths(settings.max_completion_length)[0]),
        seen=entrants.seen,
    )


def empty(
    policy: Policy, weights: PyTree, entrants: Entrants, *, full: Grid, settings: Sampling
) -> tuple[Inputs, Decoding]:
    """Returns the state of a grid without live rows, which can take rows like the `entrants`.

    Its inputs have no matcher of stop strings.
    """
    shards = 2 * entrants.first.shape[0] // full.rows
    blocks = shards * full.blocks
    rows = shards * full.rows

    def zeros(x: Array) -> Array:
        return constrain(jnp.zeros((blocks, *x.shape[1:]), x.dtype), "batch")

    seen = None
    if entrants.seen is not None:
        seen = constrain(jnp.zeros((rows, entrants.seen.shape[1]), bool), "batch", "vocab")

    samples = _no_samples(rows, settings.max_completion_length)
    no_rows = constrain(jnp.zeros(rows, jnp.int32), "batch")
    inputs = Inputs(
        weights=weights,
        prompts=jax.tree.map(zeros, entrants.prompts),
        starts=constrain(jnp.ones(blocks, bool), "batch"),
        keys=jnp.broadcast_to(entrants.keys[:1], (rows,)),
        first=no_rows,
        entered=no_rows,
    )
    return inputs, Decoding(
        time=jnp.ones((), jnp.int32),
        samples=samples._replace(ended=constrain(jnp.ones(rows, bool), "batch")),
        cache=policy.init_cache(rows, cache_lengths(settings.max_completion_length)[0]),
        seen=seen,
    )


def _no_samples(rows: int, max_completion_length: int) -> Samples:
    """Returns the samples of rows of which no token was drawn."""
    cells = (rows, max_completion_length)
    return Samples(
        lengths=constrain(jnp.zeros(rows, jnp.int32), "batch"),
        ended=constrain(jnp.zeros(rows, bool), "batch"),
        finished=constrain(jnp.zeros(rows, bool), "batch"),
        stop_state=constrain(jnp.zeros(rows, jnp.int32), "batch"),
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
    last = min(length, settings.max_completion_length - 1)

    def fits(state: Decoding, smaller: Grid) -> Array:
        return compaction.fits(state.samples.ended, inputs.starts, grids[0], smaller)

    def needed(state: Decoding) -> Array:
        more = (state.time <= last) & ~jnp.all(state.samples.ended)
        return more & ~fits(state, grids[1]) if len(grids) > 1 else more

    def advance(state: Decoding) -> Decoding:
        slot = state.time - 1
        tokens = jax.lax.dynamic_index_in_dim(state.samples.tokens, slot, axis=1, keepdims=False)
        positions = inputs.first + slot - inputs.entered
        logits, cache = policy.decode(
            inputs.weights, inputs.prompts, tokens, positions, slot, state.cache
        )
        number = state.time - inputs.entered
        seen = _constrain_seen(sampling.see(state.seen, tokens))
        drawn = _draw(inputs.keys, number, logits, seen, settings)
        samples = _write(state.samples, state.time, drawn, inputs.stop, settings)
        return Decoding(state.time + 1, samples, cache, seen)

    state = jax.lax.while_loop(needed, advance, state)
    grid = jnp.zeros((), jnp.int32)
    for number, smaller in enumerate(grids[1:], start=1):
        grid = jnp.where(fits(state, smaller), number, grid)
    ended = state.samples.ended
    free = jnp.min(jnp.where(ended, state.time - 1, inputs.entered))
    return state, Status(jnp.all(ended), state.time, grid, free)


class Left(NamedTuple):
    """The rows of a grid, and what is known of all rows of the rollout."""

    rows: Array  # [R'] int32, the number of each among the rows of its shard
    # of all rows, as far as they were drawn when rows moved last; first tokens in the first column
    samples: Samples


def nothing_left(rows: int, grid_rows: int, max_completion_length: int) -> Left:
    """Returns what is known of `rows` before the first of them enters."""
    numbers = constrain(jnp.full(grid_rows, rows, jnp.int32), "batch")
    return Left(numbers, _no_samples(rows, max_completion_length))


def compact(
    policy: Policy,
    inputs: Inputs,
    state: Decoding,
    left: Left | None,
    free: Array,
    *,
    now: Grid,
    smaller: Grid,
    length: int,
) -> tuple[Inputs, Decoding, Left]:
    """Moves the live rows into a smaller grid, or one of the same size, with a cache of `length`
    slots, and drops the first columns, `free` in all of them.

    `left` is what the move before returned, None at the first. `inputs` come without weights, which
    do not move.
    """
    moves, left = _leave(inputs, state, left, now=now, smaller=smaller)
    moved, samples, left = _move(inputs, state.samples, left, moves, free)
    cache = policy.resize_cache(compaction.take(state.cache, moves.rows), length, free)
    seen = _constrain_seen(compaction.take(state.seen, moves.rows))
    return moved, Decoding(state.time - free, samples, cache, seen), left


def enter(
    policy: Policy,
    inputs: Inputs,
    state: Decoding,
    left: Left,
    free: Array,
    entrants: Entrants,
    first_row: Array,
    *,
    full: Grid,
    half: Grid,
    length: int,
    settings: Sampling,
) -> tuple[Inputs, Decoding, Left]:
    """Moves the live rows of the `full` grid into one half of it, and the `entrants` into the
    other.

    `first_row` [] int32 is the number of the first entrant among the rows of its shard; entrants
    behind the end of the shard are padding. The other arguments are those of `compact`.
    """
    shards = state.samples.ended.shape[0] // full.rows
    moves, left = _leave(inputs, state, left, now=full, smaller=half)
    moved, samples, left = _move(inputs, state.samples, left, moves, free)

    time = state.time - free
    numbers = jnp.tile(first_row + jnp.arange(half.rows, dtype=jnp.int32), shards)
    is_padding = numbers >= left.samples.lengths.shape[0] // shards
    new = _no_samples(shards * half.rows, settings.max_completion_length)
    new = new._replace(ended=is_padding)
    new = _write(new, time - 1, entrants.drawn, inputs.stop, settings)
    blocks_of_prompt = settings.num_generations // half.width
    block = jnp.arange(shards * half.blocks) % blocks_of_prompt

    def of_blocks(x: Array) -> Array:
        return jnp.repeat(x, blocks_of_prompt, axis=0)

    def append(first: Tree, second: Tree) -> Tree:
        return compaction.append(first, second, shards)

    joined = Inputs(
        weights=inputs.weights,
        prompts=append(moved.prompts, jax.tree.map(of_blocks, entrants.prompts)),
        starts=append(moved.starts, block == 0),
        keys=append(moved.keys, entrants.keys),
        first=append(moved.first, entrants.first),
        entered=append(moved.entered, jnp.full(numbers.shape, time - 1)),
        stop=inputs.stop,
    )
    # the second half of a shard's places is taken from anywhere, and then empty: one copy
    index = jnp.pad(moves.rows, ((0, 0), (0, half.rows)))
    taken = policy.resize_cache(compaction.take(state.cache, index), length, free)
    is_new = jnp.arange(shards * full.rows) % full.rows >= half.rows

    def clear(x: Array, zeros: Array) -> Array:
        return jnp.where(is_new.reshape(-1, *(1,) * (x.ndim - 1)), zeros, x)

    cache = jax.tree.map(clear, taken, policy.init_cache(shards * full.rows, length))
    seen = _constrain_seen(append(compaction.take(state.seen, moves.rows), entrants.seen))
    left = Left(append(left.rows, numbers), left.samples)
    return joined, Decoding(time, append(samples, new), cache, seen), left


def finish(
    samples: Samples, entered: Array | None = None, left: Left | None = None, shards: int = 1
) -> Rollout:
    """Returns what was sampled.

    `entered` is that of `Inputs`, and `left` what the last move returned, None where no rows have
    moved.
    """
    if left is not None and entered is not None:
        samples = _merged(left, samples, entered, shards)
    mask = jnp.arange(samples.tokens.shape[1], dtype=jnp.int32)[None] < samples.lengths[:, None]
    return Rollout(
        samples.tokens,
        samples.lengths,
        mask.astype(jnp.float32),
        samples.logprobs,
        samples.sampling_logprobs,
        samples.finished,
    )


def _leave(
    inputs: Inputs, state: Decoding, left: Left | None, *, now: Grid, smaller: Grid
) -> tuple[Moves, Left]:
    """Plans the moves of the live rows, and keeps what was drawn so far."""
    ended = state.samples.ended
    shards = ended.shape[0] // now.rows
    moves = compaction.plan(ended, inputs.starts, now, smaller)
    if left is None:
        numbers = jnp.tile(jnp.arange(now.rows, dtype=jnp.int32), shards)
        return moves, Left(numbers, state.samples)
    return moves, left._replace(samples=_merged(left, state.samples, inputs.entered, shards))


def _move(
    inputs: Inputs, samples: Samples, left: Left, moves: Moves, free: Array
) -> tuple[Inputs, Samples, Left]:
    """Moves all of the live rows but their cache, and drops the first columns."""
    numbers, keys, first, entered, samples = compaction.take(
        (left.rows, inputs.keys, inputs.first, inputs.entered, samples), moves.rows
    )

    filled = moves.filled.reshape(-1)
    behind = left.samples.lengths.shape[0]  # the end of any shard
    return (
        Inputs(
            weights=inputs.weights,
            prompts=compaction.take(inputs.prompts, moves.blocks),
            starts=constrain(moves.starts.reshape(-1), "batch"),
            keys=keys,
            first=first,
            entered=entered - free,
            stop=inputs.stop,
        ),
        _with_columns(
            samples._replace(ended=samples.ended | ~filled), lambda x: jnp.roll(x, -free, axis=1)
        ),
        Left(jnp.where(filled, numbers, behind), left.samples),
    )


def _merged(left: Left, samples: Samples, entered: Array, shards: int) -> Samples:
    """Returns the samples of all rows, those of the rows of the grid being `samples`."""
    aligned = _with_columns(samples, lambda x: _shift(x, entered))
    return compaction.put(left.samples, left.rows.reshape(shards, -1), aligned)


def _with_columns(samples: Samples, change: Callable[[Array], Array]) -> Samples:
    """Changes the columns [R, T] of samples."""
    return samples._replace(
        tokens=change(samples.tokens),
        logprobs=change(samples.logprobs),
        sampling_logprobs=change(samples.sampling_logprobs),
    )


def _shift(columns: Array, count: Array) -> Array:
    """Moves the columns [R, T] of each row to the left by `count` [R]; the first become the
    last.
    """
    index = jnp.arange(columns.shape[1], dtype=jnp.int32)[None] + count[:, None]
    return jnp.take_along_axis(columns, index % columns.shape[1], axis=1)


def _constrain_seen(seen: Array | None) -> Array | None:
    """Shards the tokens that rows have seen [R, V] as their logits are."""
    return None if seen is None else constrain(seen, "batch", "vocab")


def _draw(
    keys: Array, number: Array, logits: Array, seen: Array | None, settings: Sampling
) -> Drawn:
    """Draws the tokens `number` [R] of the rows, from their keys [R] and the policy's logits
    [R, V].

    `logprob` is of softmax(logits / temperature), which is what the learner computes, and
    `sampling_logprob` of what was drawn from: penalized, divided by the temperature, and truncated.
    """
    penalty = settings.repetition_penalty
    penalized = sampling.penalize(logits, seen, repetition_penalty=penalty)
    scaled = penalized / settings.temperature
    allowed = sampling.truncate(
        scaled, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
    )
    token = (
        jnp.argmax(scaled, axis=-1).astype(jnp.int32)
        if settings.greedy
        else sampling.draw(keys, number, allowed)
    )
    logprob = sampling.log_probability(logits / settings.temperature, token)
    drawn_from = (
        jnp.zeros_like(logprob) if settings.greedy else sampling.log_probability(allowed, token)
    )
    return Drawn(token, logprob.astype(jnp.float32), drawn_from.astype(jnp.float32))


def _write(
    samples: Samples, column: Array, drawn: Drawn, stop: StopMatcher | None, settings: Sampling
) -> Samples:
    """Writes a token of each row to a column; rows that have ended stay as they are."""
    live = ~samples.ended
    ends = jnp.asarray(settings.eos_ids, jnp.int32)

    def put(buffer: Array, values: Array) -> Array:
        values = jnp.where(live, values, jnp.zeros_like(values))
        return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], column, axis=1)

    lengths = samples.lengths + live.astype(jnp.int32)
    is_end = jnp.any(drawn.token[:, None] == ends[None], axis=-1)
    stop_state = samples.stop_state
    if stop is not None:
        stop_state = stop_strings.advance(stop, stop_state, drawn.token)
        is_end |= stop_strings.has_ended(stop, stop_state)
    return Samples(
        lengths=lengths,
        ended=samples.ended | is_end | (lengths >= settings.max_completion_length),
        finished=samples.finished | (live & is_end),
        stop_state=stop_state,
        tokens=put(samples.tokens, drawn.token),
        logprobs=put(samples.logprobs, drawn.logprob),
        sampling_logprobs=put(samples.sampling_logprobs, drawn.sampling_logprob),
    )
