"""What graders say of a batch, as the jitted program of a step takes it."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.config import Config, TasksConfig
from jaxrft.learn import replay
from jaxrft.train.resample import take_groups
from jaxrft.train.step import _stored, score_groups
from jaxrft.types import Rollout

_ = None  # a reward that is not valid
B, G, T = 3, 4, 2


def judged(rewards, success_index, **changes):
    """The groups of three tasks with four completions of two tokens each, whose rewards are [B, G,
    F].
    """
    rewards, valid = helpers.masked_rewards(rewards)
    names = ("exact", "gsm8k", "math", "a:b", "c:d")[: rewards.shape[-1]]
    config = Config(
        model="m", tasks=TasksConfig("a.jsonl"), output_dir="run", rewards=names, **changes
    )
    setup = helpers.bare_setup(config)
    cells = jnp.ones((B * G, T))
    finished = jnp.arange(B * G) % G != 0  # the first of each group was cut
    rollouts = Rollout(
        jnp.ones((B * G, T), jnp.int32), jnp.full(B * G, T), cells, cells, cells, finished
    )
    prompts = jnp.ones((B, 8), jnp.int32), jnp.ones(B, jnp.int32)
    success_index = jnp.array(success_index, jnp.int32)
    return setup, score_groups(
        setup, jnp.int32(5), jnp.arange(B), prompts, rollouts, rewards, valid, success_index
    )


WEIGHTS = {"reward_weights": (0.1, 0.2, 0.7, 0.5, 0.3)}
EQUAL = [[0, 1, 1, 0, 0], [1, 0, 0, 1, 1]] * 2  # 0.2 + 0.7 and 0.1 + 0.5 + 0.3
OTHER = [[0, 1, 1, 0, 0], [1, 1, 0, 1, 1]] * 2
LENGTHS = {"max_completion_length": 8, "overlong_buffer": 8, "overlong_penalty": 0.7}


@pytest.mark.parametrize(
    "changes", [{"scale_rewards": "group"}, {"scale_rewards": "none"} | LENGTHS]
)
def test_sums_that_differ_by_rounding_are_not_informative(changes):
    """Neither in its advantages, nor in metrics, nor when it joins another batch or would enter a
    replay.
    """
    setup, found = judged([EQUAL, OTHER, EQUAL], [0, 0, 0], **WEIGHTS, **changes)
    assert [row.any() for row in np.asarray(found.groups.advantages)] == [False, True, False]
    np.testing.assert_allclose(found.metrics["frac_reward_zero_std"], 2 / 3, rtol=1e-6)
    again = take_groups(setup, found.groups, (), jnp.array([0, 1, 2]))
    np.testing.assert_array_equal(again.advantages, found.groups.advantages)
    memory = replay.ring(capacity=8, batch_size=2)
    buffer = memory.add(memory.init(found.groups), found.groups)
    assert buffer.groups.task.tolist()[:1] == [1] and (buffer.groups.step >= 0).sum() == 1


def test_success_of_each_task_is_its_own_reward():
    """The first by reward 0 at the rate 1/4, the second by reward 1 at 3/4 of 4, the third by
    none.
    """
    first = [[1, _], [0, _], [0, _], [0, _]]
    second = [[_, 1], [_, 0], [_, 1], [_, 1]]
    _setup, found = judged([first, second, [[_, _]] * 4], [0, 1, 0])
    assert found.feedback.successes.tolist() == [1, 3, 0] and found.feedback.trials.tolist() == [
        4,
        4,
        0,
    ]
    assert found.informative.tolist() == [True, True, False]
    assert found.distance.tolist() == [0.25, 0.25, np.inf]
    assert (found.groups.advantages[:2] != 0).all() and not found.groups.mask[2].any()


@pytest.mark.parametrize("changes", [{}, LENGTHS])
def test_sample_without_reward_is_masked_from_grader_to_loss(changes):
    """None on one sample of the first group and on all of the third; the penalty is of samples with
    a reward only.
    """
    setup, found = judged(
        [[[1], [_], [0], [0]], [[1], [1], [0], [0]], [[_]] * 4], [0, 0, 0], **changes
    )
    assert found.groups.valid.tolist() == [[True, False, True, True], [True] * 4, [False] * 4]
    assert found.feedback.successes.tolist() == [1, 2, 0] and found.feedback.trials.tolist() == [
        3,
        4,
        0,
    ]
    for groups in (found.groups, take_groups(setup, found.groups, (), jnp.array([0, 1, 2]))):
        hidden = ~np.asarray(groups.valid)
        for values in (groups.rewards, groups.advantages, groups.mask.max(axis=2)):
            assert not np.asarray(values)[hidden].any()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(groups))
    memory = replay.ring(capacity=8, batch_size=2)
    buffer = memory.add(memory.init(found.groups), found.groups)
    assert buffer.groups.task.tolist()[:2] == [0, 1] and (buffer.groups.step >= 0).sum() == 2
    assert buffer.groups.valid.tolist()[0] == [True, False, True, True]


def test_store_groups_adds_masked_rows_only():
    setup, found = judged([[[1], [0], [0], [0]]] * 3, [0, 0, 0])
    setup = dataclasses.replace(setup, replay=replay.ring(capacity=8, batch_size=2))
    buffer = setup.replay.init(found.groups)
    buffer = _stored(setup, buffer, (found.groups,), jnp.array([False, True, False]))
    assert buffer.groups.task.tolist()[:1] == [1] and (buffer.groups.step >= 0).sum() == 1


@pytest.mark.parametrize("masked", [False, True])
def test_completions_that_did_not_finish_are_truncated(masked):
    """The first of each group."""
    rewards = [[[1], [0], [0], [0]]] * 3
    _, found = judged(rewards, [0, 0, 0], mask_truncated_completions=masked)
    assert float(found.metrics["completions/clipped_ratio"]) == 1 / G
    assert found.groups.mask[:, 0].max() == (0.0 if masked else 1.0)
    assert found.groups.mask[:, 1:].min() == 1.0
