from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft.learn import packing
from jaxrft.lm import attention


def sizes_mask(sizes, steps):
    return (np.arange(steps) < np.asarray(sizes)[..., None]).astype(np.float32)


@partial(jax.jit, static_argnames="length")
def all_bins(prompts, lengths, tokens, mask, length):
    """Returns the bins of a batch, and how many of them are in use."""
    shape = packing.Shape(length, mask.shape[0] * mask.shape[1])
    packed = packing.pack(lengths, mask, shape)
    return packing.fill_bins(packed, shape, 0, prompts, lengths, tokens), packed.count


def test_a_packing_by_hand():
    """Prompts of 3 and 1 tokens, bins of 8 slots: 2 + 4 + 2 of the longer group; its third sample,
    of 1, begins anew.

    The second group's prompt, of a single token, needs no slot of its own: its samples of 3 and 2
    come behind it.
    """
    prompts = np.array([[7, 8, 9], [5, 0, 0]], np.int32)
    lengths = np.array([3, 1], np.int32)
    tokens = np.array(
        [
            [[10, 11, 0, 0], [20, 21, 22, 23], [30, 0, 0, 0]],
            [[40, 41, 0, 0], [50, 51, 52, 0], [0] * 4],
        ]
    )
    mask = sizes_mask([[2, 4, 1], [2, 3, 0]], 4)
    bins, count = all_bins(prompts, lengths, tokens.astype(np.int32), mask, 8)
    bins = jax.tree.map(lambda x: x[:count], bins)
    np.testing.assert_array_equal(bins.valid, [[1] * 8, [1] * 8])
    np.testing.assert_array_equal(
        bins.tokens, [[7, 8, 9, 20, 21, 22, 9, 10], [7, 8, 9, 5, 50, 51, 5, 40]]
    )
    np.testing.assert_array_equal(
        bins.positions, [[0, 1, 2, 3, 4, 5, 2, 3], [0, 1, 2, 0, 1, 2, 0, 1]]
    )
    np.testing.assert_array_equal(
        bins.predicts, [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(
        bins.segments.ids, [[-1, -1, 2, 2, 2, 2, 6, 6], [-1, -1, 2, 3, 3, 3, 6, 6]]
    )
    np.testing.assert_array_equal(
        bins.segments.prompt, [[-1] * 8, [-1, -1, -1, -4, -4, -4, -4, -4]]
    )
    predicted = np.asarray(tokens).reshape(-1, 4)[bins.sample, bins.time]
    np.testing.assert_array_equal(predicted[0, 2:], [20, 21, 22, 23, 10, 11])
    np.testing.assert_array_equal(predicted[1, 2:], [30, 50, 51, 52, 40, 41])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_token_is_predicted_once_from_all_that_precedes_it(data):
    """Whatever the lengths: a slot sees the prompt and the completion up to itself, in order, and
    nothing else.
    """
    groups, group, prompt_length, steps = 4, 3, 5, 6
    number = st.integers(0, 2**31 - 1)
    rng = np.random.default_rng(data.draw(number))
    lengths = rng.integers(1, prompt_length + 1, groups, np.int32)
    sizes = np.array(
        data.draw(st.lists(st.integers(0, steps), min_size=groups * group, max_size=groups * group))
    )
    mask = sizes_mask(sizes.reshape(groups, group), steps)
    holes = rng.random(mask.shape) < 0.2
    holes &= np.arange(steps) != sizes.reshape(groups, group, 1) - 1  # the last one stays
    prompts = rng.integers(0, 99, (groups, prompt_length), np.int32)
    tokens = rng.integers(0, 99, (groups, group, steps), np.int32)
    length = data.draw(st.sampled_from([prompt_length - 1 + steps * held for held in (1, 2, 3)]))
    bins, count = jax.tree.map(
        np.asarray, all_bins(prompts, lengths, tokens, np.where(holes, 0, mask), length)
    )
    assert not bins.valid[count:].any()
    sees = np.asarray(attention.visible(bins.segments, bins.segments)) & bins.valid[:, None]
    sees &= bins.positions[:, None] <= bins.positions[:, :, None]
    predicted = np.zeros((groups * group, steps), int)
    for place in zip(*np.nonzero(bins.predicts), strict=True):
        sample, time = bins.sample[place], bins.time[place]
        predicted[sample, time] += 1
        task = sample // group
        before = [*prompts[task, : lengths[task]], *tokens.reshape(-1, steps)[sample, :time]]
        keys = np.flatnonzero(sees[place])
        assert bins.tokens[place[0], keys].tolist() == before
        assert bins.positions[place[0], keys].tolist() == list(range(len(before)))
        assert keys.max() == place[1]  # none lies behind it
    np.testing.assert_array_equal(predicted, mask.reshape(-1, steps))


def test_few_slots_are_free_at_geometric_lengths():
    """256 completions of 64 tokens in the mean, at most 256: slots computed over tokens, empty bins
    included.
    """
    rng = np.random.default_rng(0)
    lengths = np.full(32, 32, np.int32)
    for _ in range(5):
        sizes = np.minimum(rng.geometric(1 / 64, (32, 8)), 256)
        options = {"prompt_length": 32, "completion_length": 256, "num_generations": 8}
        shape = packing.choose_shape(**options, rows=256, samples=256, shards=1)
        count = int(packing.pack(lengths, sizes_mask(sizes, 256), shape).count)
        rounds = -(-count // shape.bins_per_round)
        assert rounds * shape.bins_per_round * shape.length <= 1.25 * sizes.sum()


@pytest.mark.parametrize(
    "changes, length, bins_per_round",
    [
        ({}, 31 + 2 * 256, 2),  # a sixteenth of 512 is 32; a sixty-fourth of the samples are 4
        ({"rows": 1}, 31 + 256, 1),  # memory for no more
        ({"rows": 6, "samples": 1024}, 31 + 2 * 256, 3),
        ({"shards": 4}, 31 + 2 * 256, 4 * 1),
        ({"completion_length": 8192}, 31 + 8192, 1),  # long enough
        ({"prompt_length": 2048}, 2047 + 8 * 256, 1),  # the whole group
        # 4 would do, and does not divide 6
        ({"num_generations": 6, "prompt_length": 60}, 59 + 6 * 256, 1),
        ({"samples": 4096}, 31 + 2 * 256, 15),  # 8,192 slots
        # 5 bins would do, but 8 are needed at most: two rounds of 4 leave none empty
        ({"prompt_length": 64, "completion_length": 16, "samples": 64}, 63 + 8 * 16, 4),
    ],
)
def test_a_shape_by_hand(changes, length, bins_per_round):
    sizes = {"prompt_length": 32, "completion_length": 256, "num_generations": 8}
    options = sizes | {"rows": 256, "samples": 256, "shards": 1} | changes
    assert packing.choose_shape(**options) == (length, bins_per_round)


def test_short_completions_have_bins_of_their_own_where_others_may_be_long():
    sizes = {"prompt_length": 32, "num_generations": 8, "rows": 64, "samples": 256, "shards": 1}
    assert packing.choose_shapes(**sizes, completion_length=256) == {256: (543, 2)}
    both = packing.choose_shapes(**sizes, completion_length=1024)
    assert both == {256: (31 + 2 * 256, 2), 1024: (31 + 1024, 4)}
    assert list(both) == [256, 1024]
    # a whole group either way: nothing is shorter
    long_prompts = sizes | {"prompt_length": 6000, "num_generations": 1}
    shapes = packing.choose_shapes(**long_prompts, completion_length=600)
    assert shapes == {150: (6149, 1), 600: (6599, 1)}
