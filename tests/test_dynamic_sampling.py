"""Dynamic sampling: rounds, the groups of the batch, the selector's update, and metrics."""

import dataclasses
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.config import Config, ReplayConfig, TasksConfig
from jaxrft.learn import grpo
from jaxrft.learn.replay import Groups
from jaxrft.rewards.grading import Rewards
from jaxrft.select import selectors
from jaxrft.train import loop, resample
from jaxrft.train.loop import train
from jaxrft.train.step import ScoredGroups
from jaxrft.types import Choice, Feedback

B, G, N, MOST = 8, 4, 40, 2


def run_of(**changes):
    """A step that knows its config and its number of tasks."""
    settings = {
        "batch_size": B,
        "num_generations": 2,
        "rewards": ("exact", "math"),
        "dynamic_sampling": MOST,
    }
    config = Config(model="m", tasks=TasksConfig("a.jsonl"), output_dir="run", **settings | changes)
    return SimpleNamespace(setup=helpers.bare_setup(config, num_tasks=N))


def groups_of(ids):
    """Groups of two samples whose every number is their task's."""
    ids = jnp.asarray(ids, jnp.int32)
    cells = jnp.ones((len(ids), 2, 3), jnp.int32) * ids[:, None, None]
    numbers = cells.astype(jnp.float32)
    of_samples = numbers[:, :, 0]
    valid = jnp.ones(of_samples.shape, bool)
    return Groups(
        cells[:, 0], ids, cells, numbers, numbers, of_samples, of_samples, valid, ids, ids
    )


def rolled_out(ids, successes):
    """A round of tasks `ids` with two successes each; the second reward always differs."""
    rewards, valid = helpers.masked_rewards(
        list(zip(np.ravel(successes), range(2 * len(ids)), strict=True))
    )
    shape = (len(ids), 2)
    is_informative = grpo.informative(
        jnp.array(rewards[:, 0].reshape(shape)), jnp.array(valid[:, 0].reshape(shape))
    )
    scored = ScoredGroups(groups_of(ids), None, is_informative, None, {})
    graded = Rewards(rewards, valid, ~valid, {"error": 1}, [])
    ids = np.array(ids, np.int32)
    return resample.Round(Choice(ids, None), ids, scored, np.asarray(is_informative), graded)


def test_reference_groups_replace_uninformative_groups():
    """Of 4 tasks, 3 and 9 are not informative: successes are all equal, or one is missing. The
    reference set has 4 informative groups.
    """
    chosen = rolled_out([3, 5, 7, 9], [[1, 1], [0, 1], [1, 0], [0, None]])
    distance = np.array([np.inf, 0.25, 0.0, 0.5, 0.125], np.float32)
    references = resample.ReferenceGroups(
        np.array([1, 2, 7, 4, 6], np.int32), distance, (groups_of([1, 2]), groups_of([7, 4, 6]))
    )
    slots = resample.Slots(size=5, fresh=4, exclude=np.array([6], np.int32))
    batch = resample.fill_slots(run_of(), chosen, references, slots)
    assert (
        batch.ids.tolist() == batch.groups.task.tolist() == [2, 5, 7, 4, 6]
        and batch.informative.all()
    )
    assert batch.metrics["select/references/trained"] == 3
    ((_, left),) = batch.surplus
    assert references.ids[left].tolist() == [7]  # which is in the batch by its choice
    plain = resample.fill_slots(run_of(dynamic_sampling=0), chosen, references, slots)
    assert plain.ids.tolist() == [3, 5, 7, 9, 6] and plain.metrics["rewards/error"] == 1


def test_round_size_follows_the_share_of_informative_groups():
    def size(num_slots, rolled_informative, informative, others=N):
        rounds = (resample.Round(None, None, None, np.arange(10) < rolled_informative, None),)
        batch = resample.Batch(
            None, np.zeros(num_slots, int), np.arange(num_slots) < informative, rounds, {}
        )
        return resample.round_size(run_of().setup, batch, others)

    assert size(8, 8, 8) == 0
    assert size(8, 5, 7) == 2  # one is missing, and half of the groups are informative
    assert size(8, 5, 6) == 4 and size(8, 4, 6) == 6 and size(8, 2, 6) == size(8, 0, 0) == 8
    assert size(8, 2, 6, others=7) == 6 and size(8, 2, 6, others=1) == 0  # the table has no more


def test_feedback_of_all_rounds_is_padded_to_one_size(mesh):
    def chosen(*ids):
        numbers = jnp.array(ids, jnp.float32)
        feedback = Feedback(jnp.array(ids, jnp.int32), numbers, numbers + 1, numbers + 2)
        scored = ScoredGroups(None, feedback, numbers > 3, None, {})
        return resample.Round(
            Choice(jnp.array(ids, jnp.int32), numbers / 10), None, scored, None, None
        )

    setup = dataclasses.replace(run_of().setup, mesh=mesh)
    first, (feedback, _) = resample.all_feedback(setup, (chosen(1, 2),))
    assert first.ids.tolist() == feedback.ids.tolist() == [1, 2]
    choice, (feedback, informative) = resample.all_feedback(
        setup, (chosen(1, 2), chosen(5), chosen(4))
    )
    # 8 (1 + 2) in all
    assert choice.ids.tolist() == feedback.ids.tolist() == [1, 2, 5, 4] + [N] * 20
    assert (
        feedback.trials.tolist() == [2, 3, 6, 5] + [0] * 20
        and informative.tolist() == [False] * 2 + [True] * 2 + [False] * 20
    )


@pytest.fixture(scope="module")
def dynamic(world, configure):
    """(output_dir, **changes) -> the config of a run with dynamic sampling and replay on a pool
    with enough tasks for it.
    """
    tasks = TasksConfig(
        helpers.write_rows(world / "many.jsonl", helpers.task_rows(N)),
        pass_rate_columns=("weak", "strong"),
    )
    defaults = {"tasks": tasks, "dynamic_sampling": MOST, "steps": 4, "save_steps": 2}
    return lambda output_dir, **changes: configure(output_dir, **defaults | changes)


REPLAY = {"replay": ReplayConfig(capacity=64)}


@pytest.fixture(scope="module")
def resampled(dynamic, tmp_path_factory):
    """(folder, final state, what each step learned from, with the selector's state before and
    after).
    """
    folder, steps, learn = tmp_path_factory.mktemp("dynamic") / "run", [], loop.learn

    def note(step, state, batch):
        before = jax.device_get(state.selector)
        state, found = learn(step, state, batch)
        steps.append((batch, before, jax.device_get(state.selector), step.constants.tasks))
        return state, found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learn", note)
        return folder, train(dynamic(folder, **REPLAY)), steps


@pytest.mark.slow
def test_step_resamples_until_all_groups_are_informative_or_the_limit(resampled):
    folder, _, steps = resampled
    lines = helpers.metrics(folder)
    rolled = np.diff([0, *(line["rollouts"] for line in lines)])
    resamples = [line["dynamic_sampling/resamples"] for line in lines]
    assert max(resamples) > 0
    for line, rollouts, (batch, *_) in zip(lines, rolled, steps, strict=True):
        ids = np.concatenate([each.ids for each in batch.rounds])
        is_informative = np.concatenate([each.informative for each in batch.rounds])
        assert rollouts == G * len(ids) == G * len(set(ids.tolist()))  # none twice in a step
        assert line["dynamic_sampling/resamples"] == len(batch.rounds) - 1 <= MOST
        assert batch.informative.all() or len(batch.rounds) - 1 == MOST
        assert batch.informative.sum() == min(len(batch.ids), is_informative.sum())
        assert line["dynamic_sampling/informative"] == pytest.approx(batch.informative.mean())
        assert line["dynamic_sampling/rejected"] == pytest.approx(1 - is_informative.mean())
        assert line["dynamic_sampling/surplus"] == max(0, is_informative.sum() - len(batch.ids))
        assert line["select/effective_group_ratio"] == pytest.approx(is_informative.mean())
        for each in batch.rounds:
            assert np.array_equal(each.scored.informative, each.informative)


@pytest.mark.slow
def test_the_batch_keeps_its_size_and_holds_groups_of_the_right_tasks(resampled):
    _, _, steps = resampled
    # half of it is replayed when the buffer can give it
    assert {len(batch.ids) for batch, *_ in steps} == {4, 8}
    for batch, *_ in steps:
        rewards = np.asarray(batch.groups.rewards)
        assert np.array_equal(batch.groups.task, batch.ids) and len(set(batch.ids.tolist())) == len(
            batch.ids
        )
        assert np.array_equal(rewards.min(axis=1) < rewards.max(axis=1), batch.informative)
        assert np.array_equal(
            np.any(np.asarray(batch.groups.advantages) != 0, axis=1), batch.informative
        )


@pytest.mark.slow
def test_the_selector_learns_from_rejected_groups_too(resampled):
    """Once a step, by all groups together."""
    folder, _, steps = resampled
    selector, seen = selectors.bots(G), set()
    for line, (batch, before, after, tasks) in zip(helpers.metrics(folder), steps, strict=True):
        feedback = jax.tree.map(
            lambda *x: np.concatenate(x),
            *jax.device_get([each.scored.feedback for each in batch.rounds]),
        )
        assert set(feedback.trials.tolist()) == {G}
        expected = selector.update(
            *jax.device_get((before, tasks)), Feedback(*map(jnp.asarray, feedback))
        )
        helpers.assert_close(after, expected, atol=1e-5)
        seen |= set(feedback.ids.tolist())
        assert line["select/coverage"] == pytest.approx(len(seen) / N)
    assert any(not each.informative.all() for batch, *_ in steps for each in batch.rounds)


@pytest.mark.slow
def test_surplus_groups_enter_the_replay(resampled):
    _, state, steps = resampled
    groups = state.replay.groups
    stored = set(zip(groups.step.tolist(), groups.task.tolist(), strict=True))
    informative_groups = {
        (step, int(task))
        for step, (batch, *_) in enumerate(steps)
        for each in batch.rounds
        for task in np.asarray(each.choice.ids)[each.informative]
    }
    assert stored - {(-1, 0)} == informative_groups


@pytest.mark.slow
def test_resume_is_bit_for_bit(dynamic, resampled, tmp_path):
    folder, state, _ = resampled
    run = helpers.stopped_after(2, folder, tmp_path / "run")
    helpers.assert_same_bits(train(dynamic(run, **REPLAY)), state)
    assert helpers.metrics(run) == helpers.metrics(folder)


@pytest.mark.slow
def test_run_with_informative_groups_only_equals_a_run_without_resampling(dynamic, tmp_path):
    common = {"rewards": ("graders:spread",), "steps": 2}
    states = [
        train(dynamic(tmp_path / str(most), dynamic_sampling=most, **common)) for most in (0, MOST)
    ]
    helpers.assert_same_bits(*states)
    plain, lines = helpers.metrics(tmp_path / "0"), helpers.metrics(tmp_path / str(MOST))
    own = [
        {name: line.pop(name) for name in [*line] if name.startswith("dynamic_sampling/")}
        for line in lines
    ]
    assert lines == plain
    # informative, rejected, resamples, surplus
    assert [[*each.values()] for each in own] == [[1.0, 0, 0.0, 0]] * 2
