import dataclasses
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.learn import update
from jaxrft.lm import model, rollout, stop_strings
from jaxrft.lm.policy import LanguageModel
from jaxrft.lm.segments import compile_rollout
from jaxrft.streams import stream_key

CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
POLICY = model.decoder(CONFIG, remat="none")
GROUP, TIME = 2, 6
EOS = (0, 1)

# Three prompts of different lengths, right-padded.
PROMPTS = np.array([[5, 7, 0, 0, 0, 0], [9, 2, 3, 8, 4, 6], [11, 12, 13, 14, 0, 0]], np.int32)
LENGTHS = np.array([2, 6, 4], np.int32)
IDS = np.array([40, 7, 23], np.int32)


@pytest.fixture(scope="module")
def params():
    # quicker than compiling model.init; norms and biases are random too
    rng = np.random.default_rng(0)
    draws = {
        row.name: rng.normal(row.constant, (row.fan_in or 16) ** -0.5, row.shape)
        for row in model.table(CONFIG)
    }
    return {name: jnp.asarray(draw, jnp.float32) for name, draw in draws.items()}


# The temperature is traced here, so that all tests share a compilation.
options = {"num_generations": GROUP, "max_completion_length": TIME, "eos_ids": EOS}
sample = jax.jit(partial(rollout.generate, POLICY, **options))
learner_logprobs = jax.jit(partial(update.completion_logprobs, POLICY))
greedy = jax.jit(partial(rollout.generate, POLICY, **options, greedy=True))


@jax.jit
def full_logits(params, tokens):
    """Logits [R, P + T, V] by a forward pass without cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = POLICY.apply(params, tokens, positions, jnp.ones(tokens.shape, bool))
    return POLICY.unembed(params, hidden)


def each_row(params, rollouts):
    """(row, its completion [length], the logits [length, V] before its tokens)."""
    spans = [(LENGTHS[row // GROUP], int(length)) for row, length in enumerate(rollouts.lengths)]
    # causal: what comes after changes nothing
    whole = np.zeros((len(spans), PROMPTS.shape[1] + TIME), np.int32)
    for row, (start, length) in enumerate(spans):
        whole[row, :start] = PROMPTS[row // GROUP, :start]
        whole[row, start : start + length] = rollouts.tokens[row, :length]
    logits = np.asarray(full_logits(params, whole))
    for row, (start, length) in enumerate(spans):
        yield (
            row,
            np.asarray(rollouts.tokens[row, :length]),
            logits[row, start - 1 : start - 1 + length],
        )


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_logprobs_are_those_of_the_full_forward_and_of_the_learner(params, temperature):
    got = sample(params, jax.random.key(1), PROMPTS, LENGTHS, IDS, temperature=temperature)
    learned, _ = learner_logprobs(params, PROMPTS, LENGTHS, got.tokens, temperature=temperature)
    np.testing.assert_allclose(got.logprobs, learned * got.mask, atol=1e-4)
    np.testing.assert_array_equal(got.sampling_logprobs, got.logprobs)  # nothing was cut off
    for row, completion, logits in each_row(params, got):
        want = log_softmax(logits / temperature, axis=-1)[np.arange(len(completion)), completion]
        np.testing.assert_allclose(got.logprobs[row, : len(completion)], want, atol=1e-4)


def test_greedy_takes_the_likeliest_token_and_ignores_the_key(params):
    got, again = (greedy(params, jax.random.key(seed), PROMPTS, LENGTHS, IDS) for seed in (1, 2))
    np.testing.assert_array_equal(got.tokens, again.tokens)
    np.testing.assert_array_equal(got.tokens[::GROUP], got.tokens[1::GROUP])
    assert not np.any(got.sampling_logprobs)  # it is certain of what it takes
    for _, completion, logits in each_row(params, got):
        np.testing.assert_array_equal(completion, logits.argmax(axis=-1))


def test_the_same_seed_and_step_give_the_same_samples_and_no_other_do(params):
    def tokens(seed, step):
        return sample(
            params, stream_key(seed, step, "rollout"), PROMPTS, LENGTHS, IDS, temperature=1.0
        ).tokens

    first = tokens(0, 1)
    np.testing.assert_array_equal(first, tokens(0, 1))
    for other in (tokens(0, 2), tokens(1, 1)):
        assert np.all(np.any(first != other, axis=1))  # each row
    # the samples of a group differ
    assert np.all(np.any(first[::GROUP] != first[1::GROUP], axis=1))


def test_a_sample_is_the_same_alone_in_its_group_in_another_batch_and_with_more_padding(params):
    key = jax.random.key(5)
    want = sample(params, key, PROMPTS, LENGTHS, IDS, temperature=1.0)

    def check(got, rows):
        for leaf, wanted in zip(got, want, strict=True):
            np.testing.assert_allclose(leaf, np.asarray(wanted)[np.array(rows)], atol=1e-5)

    other = np.array([1, 2, 0])
    check(
        sample(params, key, PROMPTS[other], LENGTHS[other], IDS[other], temperature=1.0),
        [2, 3, 4, 5, 0, 1],
    )
    padded = np.pad(PROMPTS, ((0, 0), (0, 4)), constant_values=3)  # another bucket
    check(sample(params, key, padded, LENGTHS, IDS, temperature=1.0), range(6))
    alone = jax.jit(partial(rollout.generate, POLICY, **options | {"num_generations": 1}))
    check(alone(params, key, PROMPTS[2:], LENGTHS[2:], IDS[2:]), [4])


def test_a_group_may_be_sampled_in_parts_by_the_number_of_its_first_sample(params):
    key = jax.random.key(5)
    want = sample(params, key, PROMPTS, LENGTHS, IDS, temperature=1.0)
    alone = jax.jit(partial(rollout.generate, POLICY, **options | {"num_generations": 1}))
    for number in range(GROUP):
        part = alone(params, key, PROMPTS, LENGTHS, IDS, np.full(3, number, np.int32))
        np.testing.assert_array_equal(part.tokens, want.tokens[number::GROUP])


@pytest.mark.parametrize(
    "slots", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_cache_that_grows_changes_no_sample(params, monkeypatch, slots):
    want = sample(params, jax.random.key(1), PROMPTS, LENGTHS, IDS, temperature=1.0)
    monkeypatch.setattr(rollout, "SLOTS", slots)
    got = jax.jit(partial(rollout.generate, POLICY, **options))(
        params, jax.random.key(1), PROMPTS, LENGTHS, IDS
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_lengths_of_the_cache_are_few_and_end_at_the_longest_completion():
    for longest in (1, 63, 64, 65, 256, 257, 1024, 1025, 2048, 2049, 32_768):
        lengths = rollout.cache_lengths(longest)
        assert lengths[-1] == longest and len(lengths) <= 4
        assert all(length % rollout.SLOTS == 0 for length in lengths[:-1])
        assert list(lengths) == sorted(set(lengths))


def test_a_rollout_has_at_most_twelve_programs_that_decode():
    config = Config("policy", TasksConfig(), "run", num_generations=8)
    lm = LanguageModel(CONFIG, POLICY, {}, {}, None, EOS, Path())
    mesh = meshes.make(1, 1, 1, devices=jax.devices()[:1])
    counts = []
    for longest in (64, 256, 300, 1024, 4096):
        config = dataclasses.replace(config, max_completion_length=longest)
        counts.append(compile_rollout(lm, config, mesh).num_programs(32))
    assert counts == [1, 12, 10, 12, 12]


# A policy whose next token depends on the last one only: params[i] are the logits after token i.
BIGRAM = model.Policy(
    apply=lambda params, tokens, positions, valid, prefix=None: (params[tokens], ()),
    unembed=lambda params, hidden: hidden,
    init_cache=lambda rows, length: (),
    resize_cache=lambda cache, length, first: cache,
    prepare_weights=lambda params: params,
    prepare_prompts=lambda prefix: (),
    decode=lambda weights, prompts, tokens, positions, slot, cache: (weights[tokens], cache),
)


def chain(follower):
    """Parameters of BIGRAM after which token i is followed by follower[i], as good as surely."""
    return 100.0 * jax.nn.one_hot(jnp.array(follower), len(follower), dtype=jnp.float32)


# 3 -> 4 -> 5 -> 1, an end; 6 -> 1 at once; 7 -> 2, the other end; 8 <-> 9 for ever; nothing follows
# padding but 9.
FOLLOWER = [9, 1, 2, 4, 5, 1, 1, 2, 9, 8]
ENDINGS = {3: [4, 5, 1], 6: [1], 7: [2], 8: [9, 8, 9, 8, 9]}


def follow(last_tokens, calls=None):
    """The rollout of prompts that end with these tokens, and a decoding call noted in `calls`
    each.
    """

    def decode(params, *arguments):
        if calls is not None:
            jax.debug.callback(lambda: calls.append(1))
        return BIGRAM.decode(params, *arguments)

    prompts = jnp.array([[8, last, 0] for last in last_tokens])
    lengths = jnp.full(len(last_tokens), 2)
    run = partial(
        rollout.generate, BIGRAM._replace(decode=decode), num_generations=2, max_completion_length=5
    )
    out = jax.jit(partial(run, eos_ids=(1, 2)))(
        chain(FOLLOWER), jax.random.key(0), prompts, lengths, jnp.arange(len(last_tokens))
    )
    jax.effects_barrier()
    return out


@pytest.mark.parametrize(("last_tokens", "segments"), [((6, 7), 1), ((3, 6), 1), ((3, 8), 2)])
def test_segments_that_no_row_needs_are_not_run(monkeypatch, last_tokens, segments):
    """Of two slots each; a completion of n tokens fills n - 1 of them. Each is traced once."""
    monkeypatch.setattr(rollout, "SLOTS", 2)
    config = Config("policy", TasksConfig(), "run", num_generations=2, max_completion_length=5)
    chex.clear_trace_counter()
    policy = BIGRAM._replace(decode=chex.assert_max_traces(BIGRAM.decode, segments))
    lm = LanguageModel(CONFIG, policy, {}, {}, None, (1, 2), Path())
    generate = compile_rollout(lm, config, meshes.make(1, 1, 1, devices=jax.devices()[:1]))
    run = []
    decode = generate.decode
    monkeypatch.setattr(
        generate,
        "decode",
        lambda *state, length, grids: (
            run.append(length) or decode(*state, length=length, grids=grids)
        ),
    )
    prompts = jnp.array([[8, last, 0] for last in last_tokens])
    data = prompts, jnp.full(len(last_tokens), 2), jnp.arange(len(last_tokens))
    for step in range(2):
        got = generate(chain(FOLLOWER), np.int32(step), *data)
        want = [ENDINGS[last] for last in last_tokens for _ in range(2)]
        assert [
            row[:length].tolist() for row, length in zip(got.tokens, got.lengths, strict=True)
        ] == want
    assert run == [2, 5][:segments] * 2


def test_a_completion_ends_with_any_end_at_the_first_token_or_never():
    got = follow(ENDINGS)
    for row, want in enumerate(ending for ending in ENDINGS.values() for _ in range(2)):
        rest = 5 - len(want)
        assert got.lengths[row] == len(want)
        assert got.tokens[row].tolist() == want + [0] * rest
        assert got.mask[row].tolist() == [1.0] * len(want) + [0.0] * rest
        assert not np.any(got.logprobs[row, len(want) :])


@pytest.mark.parametrize(("last_tokens", "passes"), [((6, 7), 0), ((3, 6, 7), 2), ((3, 8), 4)])
def test_decoding_stops_when_all_rows_have_ended(last_tokens, passes):
    """The prompt gives the first token, so that n tokens take n - 1 decoding passes."""
    calls = []
    follow(last_tokens, calls)
    assert len(calls) == passes


@pytest.mark.parametrize(
    ("cut", "temperature", "policy", "drawn_from"),
    [
        ({"top_p": 0.41}, 1.0, [0.4, 0.3], [4 / 7, 3 / 7]),
        # At temperature 1/2 probabilities are squared: 16, 9, 4, 1 of 30.
        ({"top_k": 2}, 0.5, [16 / 30, 9 / 30], [16 / 25, 9 / 25]),
        # More than 0.6 of the likeliest: tokens of the odds 4 and 3.
        ({"min_p": 0.6}, 1.0, [0.4, 0.3], [4 / 7, 3 / 7]),
    ],
)
def test_both_logprobs_of_a_truncated_distribution_by_hand(cut, temperature, policy, drawn_from):
    params = jnp.log(jnp.tile(jnp.array([0.4, 0.3, 0.2, 0.1], jnp.float32), (4, 1)))
    generate = partial(
        rollout.generate, BIGRAM, num_generations=8, max_completion_length=4, eos_ids=(3,), **cut
    )
    prompt = (jnp.zeros((2, 2), jnp.int32), jnp.array([1, 2]), jnp.array([0, 1]))
    got = jax.jit(partial(generate, temperature=temperature))(params, jax.random.key(0), *prompt)
    assert set(np.unique(got.tokens)) == {0, 1}
    np.testing.assert_allclose(got.logprobs, np.log(policy)[got.tokens], rtol=1e-5)
    np.testing.assert_allclose(got.sampling_logprobs, np.log(drawn_from)[got.tokens], rtol=1e-5)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_repetition_penalty_counts_prompt_and_completion_by_hand(greedy):
    """Logits log 8, log 4, log 2 and log 1, which a penalty of 2 makes their roots, before the
    temperature 1/2 squares the odds.
    """
    params = jnp.log(jnp.tile(jnp.array([8.0, 4.0, 2.0, 1.0], jnp.float32), (4, 1)))
    generate = partial(
        rollout.generate,
        BIGRAM,
        num_generations=8,
        max_completion_length=3,
        eos_ids=(3,),
        repetition_penalty=2.0,
        temperature=0.5,
        greedy=greedy,
    )
    prompts = jnp.array([[0, 2, 1]])  # 1 is padding
    got = jax.jit(generate)(params, jax.random.key(0), prompts, jnp.array([2]), jnp.array([0]))
    for row, length in enumerate(got.lengths):
        odds = np.array([64.0, 16.0, 4.0, 1.0])
        seen = {0, 2}
        for time, token in enumerate(got.tokens[row, :length].tolist()):
            drawn_from = np.array([x**0.5 if i in seen else x for i, x in enumerate(odds)])
            assert not greedy or drawn_from[token] == drawn_from.max()
            want = np.log(drawn_from[token] / drawn_from.sum()) if not greedy else 0.0
            np.testing.assert_allclose(got.sampling_logprobs[row, time], want, rtol=1e-5)
            np.testing.assert_allclose(got.logprobs[row, time], np.log(odds[token] / 85), rtol=1e-5)
            seen.add(token)
    # 16 is the largest odds, then the root of 64
    assert not greedy or got.tokens.tolist() == [[1, 0, 0]] * 8


@pytest.mark.parametrize(
    ("stop", "completion", "finished"),
    [
        # the tokens 9, 8, 9, ... spell xy, z, xy, ...
        ((), [9, 8, 9, 8, 9], False),
        (("x",), [9], True),  # in the first token, which has more
        (("yz", "unheard"), [9, 8], True),
        (("zxyzxy",), [9, 8, 9, 8, 9], True),  # in the last token that there is room for
        (("Qy",), [9, 8, 9, 8, 9], False),  # the Q is the prompt's
    ],
)
def test_a_completion_ends_with_the_token_in_which_a_stop_string_ends(stop, completion, finished):
    pieces = [b"-"] * 8 + [b"z", b"xy"]
    pieces[7] = b"Q"
    follower = [*FOLLOWER[:7], 9, *FOLLOWER[8:]]
    matcher = stop_strings.build(pieces, stop) if stop else None
    got = jax.jit(followed)(chain(follower), jnp.array([[8, 7]]), matcher)
    for row in range(2):
        assert got.tokens[row].tolist() == completion + [0] * (5 - len(completion))
        assert got.lengths[row] == len(completion) == got.mask[row].sum()
        assert not np.any(got.logprobs[row, len(completion) :])
        assert bool(got.finished[row]) == finished


def followed(params, prompts, stop):
    return rollout.generate(
        BIGRAM,
        params,
        jax.random.key(0),
        prompts,
        jnp.full(len(prompts), 2),
        jnp.arange(len(prompts)),
        stop=stop,
        num_generations=2,
        max_completion_length=5,
        eos_ids=(1, 2),
    )
