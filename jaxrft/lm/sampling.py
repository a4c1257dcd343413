"""Which tokens may be drawn, and how likely: repetition penalty, temperature, top-k, top-p and
min-p over logits, in the order of transformers.
"""

import math

import jax
import jax.numpy as jnp

from jaxrft.types import Array


def truncate(logits: Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Array:
    """Sets to -inf the logits [..., V] outside the k likeliest tokens (0 = off), outside the
    nucleus (1 = off), and of tokens less likely than `min_p` times the likeliest (0 = off).

    The nucleus is the smallest set of likeliest tokens whose probability reaches `top_p` (arXiv
    1904.09751), taken of what top-k leaves. `min_p` (arXiv 2407.01082) compares odds, which the two
    leave as they are. At least one token stays; tokens tied with the last one stay too.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        last = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def penalize(logits: Array, seen: Array | None, *, repetition_penalty: float = 1.0) -> Array:
    """Divides the logits [..., V] of tokens that were `seen` [..., V] by `repetition_penalty`, and
    multiplies them by it where they are below 0 (arXiv 1909.05858); None = no token was seen.
    """
    if seen is None:
        return logits
    penalized = jnp.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    return jnp.where(seen, penalized, logits)


def tokens_seen(prompts: Array, lengths: Array, vocab_size: int) -> Array:
    """Marks the tokens of each right-padded prompt [B, P] of `lengths` [B]; returns [B, V] bool."""
    rows = jnp.arange(prompts.shape[0], dtype=jnp.int32)[:, None]
    is_token = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    tokens = jnp.where(is_token, prompts, vocab_size)  # padding is dropped
    seen = jnp.zeros((prompts.shape[0], vocab_size), bool)
    return seen.at[rows, tokens].set(True, mode="drop")


def see(seen: Array | None, tokens: Array) -> Array | None:
    """Marks one more token [R] of each row in `seen` [R, V]; None stays None."""
    if seen is None:
        return None
    # a comparison, not a scatter: each shard of the vocabulary marks its own
    return seen | (jnp.arange(seen.shape[1], dtype=tokens.dtype)[None] == tokens[:, None])


def row_keys(
    key: Array, ids: Array, num_generations: int, first_sample: Array | None = None
) -> Array:
    """Derives the keys [R] of G samples of each task in `ids` [B], numbered from `first_sample` [B]
    on (None: 0).

    A sample's key depends on nothing but (key, task id, its number).
    """
    first = jnp.zeros_like(ids) if first_sample is None else first_sample
    numbers = jnp.arange(num_generations, dtype=first.dtype)
    fold = jax.random.fold_in

    def of_task(task: Array, first: Array) -> Array:
        return jax.vmap(lambda sample: fold(fold(key, task), sample))(first + numbers)

    return jax.vmap(of_task)(ids, first).reshape(-1)


def draw(keys: Array, number: Array, logits: Array) -> Array:
    """Draws a token a row from logits [R, V] by the Gumbel trick, the `number` [R] of its row's
    tokens, with the keys of rows [R].
    """

    def noise_of(key: Array, number: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), logits.shape[-1:], jnp.float32)

    noise = jax.vmap(noise_of)(keys, number)
    return jnp.argmax(logits + noise.astype(logits.dtype), axis=-1).astype(jnp.int32)


def pick(log_probabilities: Array, tokens: Array) -> Array:
    """Picks the log-probability [...] of each token [...] from those of the vocabulary [..., V]."""
    return jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0]


def log_probability(logits: Array, tokens: Array) -> Array:
    """Returns the log-probabilities [...] of tokens [...] under logits [..., V].

    log p = logit - largest - log sum exp(logits - largest): what `jax.nn.log_softmax` has at the
    tokens, without an array as large as the logits that goes to memory and back.
    """
    largest = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    return pick(logits, tokens) - largest - jnp.log(total)
