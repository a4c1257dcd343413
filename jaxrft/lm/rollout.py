"""Rollouts: prefill a prompt once, decode its group from the shared cache, stop when all rows have ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrft.lm import sampling
from jaxrft.lm.model import Policy
from jaxrft.mesh import constrain
from jaxrft.types import Array, PyTree, Rollout


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
    """The last hidden states [B, D] of right-padded prompts [B, P], and their cache to be used as a prefix."""
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
    *,
    num_generations: int,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
) -> Rollout:
    """Samples G completions of each prompt; those of a prompt are next to each other.

    prompts [B, P] right-padded, lengths [B], ids [B] the tasks' ids. A sample depends on `key`, its task's id and its
    number in the group only: it is the same in another batch, in another bucket of prompts and on another mesh, up to
    the rounding of matrix products. Greedy decoding takes the likeliest token and ignores the key.
    """
    rows = prompts.shape[0] * num_generations
    keys = sampling.row_keys(key, ids, num_generations)
    first = constrain(jnp.repeat(lengths, num_generations), "batch")  # the position of a completion's first token
    ends = jnp.asarray(eos_ids, jnp.int32)

    def write(state: Decoding, hidden: Array) -> Decoding:
        """Draws the token after `hidden` [R, D] and writes it."""
        logits = policy.unembed(params, hidden) / temperature
        drawn = _draw(keys, state.time, logits, top_p=top_p, top_k=top_k, greedy=greedy)
        return _write(state, drawn, ends)

    def advance(state: Decoding) -> Decoding:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.time - 1, 1, axis=1)
        position = (first + state.time - 1)[:, None]
        hidden, cache = policy.apply(params, token, position, ~state.done[:, None], state.cache, prefix)
        return write(state._replace(cache=cache), hidden[:, 0])

    last, prefix = prefill(policy, params, prompts, lengths)
    shape = (rows, max_completion_length)
    empty = Decoding(
        time=jnp.zeros((), jnp.int32),
        done=constrain(jnp.zeros(rows, bool), "batch"),
        lengths=constrain(jnp.zeros(rows, jnp.int32), "batch"),
        tokens=constrain(jnp.zeros(shape, jnp.int32), "batch", None),
        logprobs=constrain(jnp.zeros(shape, jnp.float32), "batch", None),
        sampling_logprobs=constrain(jnp.zeros(shape, jnp.float32), "batch", None),
        cache=policy.init_cache(rows, max_completion_length),
    )
    state = write(empty, constrain(jnp.repeat(last, num_generations, axis=0), "batch", None))
    state = jax.lax.while_loop(lambda s: (s.time < max_completion_length) & ~jnp.all(s.done), advance, state)
    mask = jnp.arange(max_completion_length)[None] < state.lengths[:, None]
    return Rollout(state.tokens, state.lengths, mask.astype(jnp.float32), state.logprobs, state.sampling_logprobs)


def _draw(keys: Array, time: Array, logits: Array, *, top_p: float, top_k: int, greedy: bool) -> Drawn:
    """The rows' tokens number `time`, from their keys [R] and logits [R, V] at the sampling temperature."""
    allowed = sampling.truncate(logits, top_k=top_k, top_p=top_p)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32) if greedy else sampling.draw(keys, time, allowed)
    logprob = sampling.pick(jax.nn.log_softmax(logits), token)
    drawn_from = jnp.zeros_like(logprob) if greedy else sampling.pick(jax.nn.log_softmax(allowed), token)
    return Drawn(token, logprob, drawn_from)


def _write(state: Decoding, drawn: Drawn, ends: Array) -> Decoding:
    """Writes tokens at `time`, of which `ends` [E] end a row; rows that are done stay as they are."""
    live = ~state.done

    def put(buffer: Array, column: Array) -> Array:
        column = jnp.where(live, column, jnp.zeros_like(column))
        return jax.lax.dynamic_update_slice(buffer, column[:, None], (jnp.zeros_like(state.time), state.time))

    return Decoding(
        time=state.time + 1,
        done=state.done | jnp.any(drawn.token[:, None] == ends[None], axis=-1),
        lengths=state.lengths + live.astype(jnp.int32),
        tokens=put(state.tokens, drawn.token),
        logprobs=put(state.logprobs, drawn.logprob),
        sampling_logprobs=put(state.sampling_logprobs, drawn.sampling_logprob),
        cache=state.cache,
    )
