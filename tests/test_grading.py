"""Which reward is success of a task, which may be, and what a run says of tasks that never have
one.
"""

import logging
from types import SimpleNamespace

import helpers
import numpy as np
import pytest

from jaxrft.config import Config, EvalConfig, TasksConfig
from jaxrft.report.visits import Visits
from jaxrft.rewards.grading import Rewards, check_rewards, without_none
from jaxrft.train.loop import train
from jaxrft.types import InputError

_ = None  # a reward that is not valid
NONE_LOST = dict.fromkeys(("timeout", "crash", "wrong_length", "error", "invalid"), 0)


def config_of(*rewards, **changes):
    return Config(
        model="m", tasks=TasksConfig("a.jsonl"), output_dir="run", rewards=rewards, **changes
    )


def check(config, rewards, pool=None, *, num_tasks, first=False, lost=()):
    """Checks the rewards [R, F], of which those at the indices `lost` are lost to failures."""
    rewards, valid = helpers.masked_rewards(rewards)
    flags = np.zeros(rewards.shape, bool)
    for index in lost:
        flags[index] = True
    rewards = Rewards(rewards, valid, flags, NONE_LOST, [])
    pool = SimpleNamespace(first_ranges={}) if pool is None else pool
    return check_rewards(config, rewards, pool, num_tasks=num_tasks, first=first)


def success_of(rewards):
    """The success of each row, None where it has none; what is not valid is 0."""
    assert not rewards.rewards[~rewards.valid].any()
    success = zip(rewards.success.tolist(), rewards.success_valid.tolist(), strict=True)
    return [value if valid else None for value, valid in success]


def test_none_becomes_the_mask_where_rewards_become_arrays():
    """None of a reward that does not apply is 0 under a mask of False; a reward of 0 is valid."""
    rewards, valid = without_none([[1.0, None, 0.0], [None, None, -0.5]])
    assert rewards.tolist() == [[1, 0, 0], [0, 0, -0.5]] and rewards.dtype == np.float32
    assert valid.tolist() == [[True, False, True], [False, False, True]]
    assert [array.shape for array in without_none([[], []])] == [(2, 0)] * 2


def test_success_is_the_first_reward_that_is_not_none_for_the_task():
    """A task of mathematics, one of code, one that both apply to, and one that neither does; two
    samples each.
    """
    rewards = [[1, _], [0, _], [_, 1], [_, 0], [0, 1], [1, 0], [_, _], [_, _]]
    found = check(config_of("math", "exact"), rewards, num_tasks=4, first=True)
    assert found.success_index.tolist() == [0, 1, 0, 0]
    assert success_of(found) == [1, 0, 1, 0, 0, 1, _, _]


def test_all_samples_of_a_task_have_the_same_reward_for_success():
    """One that is None for a sample of the task leaves that sample without success, not with
    another reward's.
    """
    found = check(config_of("math", "exact"), [[1, 0.5], [_, 0.5]], num_tasks=1)
    assert success_of(found) == [1, _]


def test_a_lost_reward_is_not_none():
    """Not even if it was lost on all samples: the format of an answer that timed out is not its
    success.
    """
    rewards = [[_, 1], [_, 1], [_, 0.5], [_, 0.5]]
    found = check(config_of("math", "exact"), rewards, num_tasks=2, lost=[(0, 0), (1, 0)])
    assert found.success_index.tolist() == [0, 1]
    assert success_of(found) == [_, _, 0.5, 0.5]
    assert found.failed.tolist() == [True, True, False, False]


def test_success_reward_alone_is_success_if_it_is_given():
    found = check(
        config_of("math", "exact", success_reward="exact"),
        [[1, _], [0, 1]],
        num_tasks=2,
        first=True,
    )
    assert success_of(found) == [_, 1]


def test_whether_a_reward_may_be_success_is_decided_once_a_reward():
    """A penalty for length is not success where it happens to lie in [0, 1], on no later sample
    either.
    """
    config, pool = config_of("math", "length"), SimpleNamespace(first_ranges={})
    first = check(config, [[1, -0.3], [_, 0.2]], pool, num_tasks=2, first=True)
    assert success_of(first) == [1, _]
    later = check(config, [[_, 0.5], [_, 0.0], [0, 0.1]], pool, num_tasks=3)
    assert success_of(later) == [_, _, 0]
    assert later.failures["invalid"] == 0 and not later.failed.any()


def test_a_reward_that_may_be_success_and_leaves_its_range_later_loses_that_value():
    config, pool = config_of("math", "bonus"), SimpleNamespace(first_ranges={})
    check(config, [[1, 0.5], [_, 1]], pool, num_tasks=2, first=True)
    later = check(config, [[_, 1.5], [_, 0.5], [1, 1.5]], pool, num_tasks=3)
    assert success_of(later) == [_, 0.5, 1]
    assert later.failures["invalid"] == 1 and later.failed.tolist() == [True, False, False]
    assert later.valid.tolist() == [[False, False], [False, True], [True, True]]
    assert later.rewards.tolist() == [[0, 0], [0, 0.5], [1, 1.5]]  # a bonus that is none is allowed


@pytest.mark.parametrize(
    ("config", "rewards", "wanted"),
    [
        (
            config_of("length", "math"),
            [[-3, 1], [-1, 0]],
            "length gave -3, .*name another with success_reward",
        ),
        (
            config_of("length"),
            [[-3], [-1]],
            "length gave -3, .*: scale it to .* --rewards length exact --reward-weights 1 0 "
            "--success-reward exact",
        ),
        (config_of("math", "points"), [[_, 7], [_, 0]], "points gave 7, .*must lie in"),
        (
            config_of("math", "points", success_reward="points"),
            [[1, 7], [0, 0]],
            "points gave 7, .*must lie in",
        ),
        (
            config_of("math", "exact"),
            [[_, _], [_, _]],
            "no completion of the first batch got a reward",
        ),
        (
            config_of("math", "exact", success_reward="math"),
            [[_, 1], [_, 1]],
            "no completion of the first batch",
        ),
    ],
)
def test_mistakes_show_in_the_first_batch(config, rewards, wanted):
    with pytest.raises(InputError, match=wanted):
        check(config, rewards, num_tasks=2, first=True)


def test_a_reward_that_shows_late_that_it_cannot_be_success_is_named_once(caplog):
    config, pool = config_of("math", "code"), SimpleNamespace(first_ranges={})
    check(config, [[1, _], [0, _]], pool, num_tasks=2, first=True)
    with caplog.at_level(logging.WARNING):
        for _repeat in range(2):
            found = check(config, [[1, _], [_, -1]], pool, num_tasks=2)
    assert success_of(found) == [1, _]
    assert [
        record.getMessage().count("the reward code gave -1 and is never success")
        for record in caplog.records
    ] == [1]


def visited(groups, success, *, tasks=20):
    """The sentences after so many groups of the domains x and y, of which y has the samples
    `success`.
    """
    visits = Visits(np.repeat([0, 1], tasks), ("x", "y"))
    said = []
    for number in range(groups):
        ids = np.array([number % tasks, tasks + number % tasks])
        visits.add(ids, *helpers.masked_rewards([[0.0, 1.0], success]))
        said.append(list(visits.news()))
    return said


def test_a_domain_to_which_no_reward_applies_is_named_once():
    """After 12 groups: fewer than 3 / 12 of its groups can have a success then, with 95 %
    confidence.
    """
    said = visited(40, [_, _])
    assert [number for number, sentences in enumerate(said, 1) if sentences] == [12]
    assert said[11][0].startswith(
        "domain y: no reward that counts as success applied to any of the 12 groups"
    )


def test_a_domain_without_any_success_above_0_is_named_once():
    said = visited(40, [0.0, _])
    assert [len(sentences) for sentences in said] == [0] * 11 + [1] + [0] * 28
    assert (
        "domain y: none of the 12 groups rolled out so far has a success above 0, and most "
        "likely fewer than 25% of its groups can" in said[11][0]
    )


def test_a_domain_with_a_single_success_is_never_named():
    visits = Visits(np.zeros(30, int), ("x",))
    visits.add(np.array([0]), *helpers.masked_rewards([0.0, 0.25]))
    for number in range(1, 30):
        visits.add(np.array([number]), *helpers.masked_rewards([0.0, 0.0]))
    assert list(visits.news()) == []


def test_tasks_without_a_reward_are_reported_for_their_domain():
    """After 3 visits each; the other task of the domain has successes."""
    visits = Visits(np.zeros(3, int), ("all",))
    for count in range(1, 5):
        visits.add(
            np.array([0, 1, 2, 2]), *helpers.masked_rewards([[1, 0], [_, _], [_, _], [0, 1]])
        )
        said = list(visits.news())
        assert bool(said) == (count == 3)
        assert not said or said[0].startswith(
            "domain all: 1 of its tasks were rolled out 3 times or more"
        )


@pytest.fixture
def rows(world):
    """Sixteen tasks of two domains that take turns."""
    found = [row | {"kind": ("even", "odd")[i % 2]} for i, row in enumerate(helpers.task_rows())]
    return helpers.write_rows(world / "kinds.jsonl", found)


@pytest.mark.slow
def test_two_domains_with_a_reward_each_are_both_learned_from(configure, rows, tmp_path, capsys):
    """Each reward is None on the other's tasks; evaluation counts both too. Without the second it
    is said.
    """
    tasks = TasksConfig(
        rows, name="all", domain_column="kind", pass_rate_columns=("weak", "strong")
    )
    held_out = EvalConfig(
        (TasksConfig(rows, name="held_out", domain_column="kind"),), num_samples=0
    )
    options = {"tasks": tasks, "steps": 4, "save_steps": 4}
    options["rewards"] = ("graders:even", "graders:odd")
    train(configure(tmp_path / "both", evaluation=held_out, eval_steps=4, **options))
    found = helpers.metrics(tmp_path / "both")
    for kind in ("even", "odd"):
        assert sum(line.get(f"select/effective_group_ratio/{kind}") or 0 for line in found) > 0, (
            kind
        )
    assert found[0]["eval/held_out/greedy"] > 0.2
    assert "domain " not in capsys.readouterr().out
    train(configure(tmp_path / "one", success_reward="graders:even", **options))
    assert (
        capsys.readouterr().out.count(
            "domain odd: no reward that counts as success applied to any of the"
        )
        == 1
    )
