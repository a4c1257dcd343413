"""notebooks/prime_rl_sampler.py: its bookkeeping with stand-ins for tasks and episodes, and
prime-rl's own classes.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "notebooks/prime_rl_sampler.py"
TASKS = [SimpleNamespace(key=f"k{i}") for i in range(6)]


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(FILE))


@pytest.fixture
def sampler(example):
    return example["SessionSampler"](TASKS, selector="adaptive", group=2, batch=2)


def group(task, rewards, **trace):
    """One episode a reward, with one trace each."""
    usual = {
        "has_error": False,
        "agent": SimpleNamespace(trainable=True),
        "num_output_tokens": 5,
    } | trace
    return [
        SimpleNamespace(task=task, traces=[SimpleNamespace(reward=reward, **usual)])
        for reward in rewards
    ]


def told(sampler):
    """What the session is told from now on."""
    records = []
    sampler.session.record = lambda *columns: records.append([list(column) for column in columns])
    return records


def test_tasks_are_given_out_one_by_one_as_the_session_chose_them(sampler):
    chosen = []
    sampler.session.next = lambda batch_size: (
        chosen.append(np.arange(batch_size) + len(chosen)) or chosen[-1]
    )
    assert [next(sampler).key for _ in range(5)] == ["k0", "k1", "k1", "k2", "k2"]
    assert len(chosen) == 3


def test_groups_are_recorded_together_when_there_is_a_batch_of_them(sampler):
    records = told(sampler)
    sampler.observe(group(TASKS[3], [1.0, 0.0]))
    assert not records
    sampler.observe(group(TASKS[1], [1.0, 1.0]))
    assert records == [[[3, 1], [1, 2], [2, 2], [10, 10]]]


def test_two_groups_of_a_task_in_a_batch_count_as_one(sampler):
    records = told(sampler)
    sampler.observe(group(TASKS[3], [1.0, 0.0]))
    sampler.observe(group(TASKS[3], [1.0, 1.0]))
    sampler.observe(group(TASKS[0], [0.0, 0.0]))
    assert records == [[[3, 0], [3, 0], [4, 2], [20, 10]]]


def test_failed_and_untrained_rollouts_do_not_count(sampler):
    records = told(sampler)
    sampler.observe(group(TASKS[3], [1.0, 1.0], has_error=True))
    sampler.observe(group(TASKS[2], [1.0], agent=SimpleNamespace(trainable=False)))
    sampler.observe(group(TASKS[1], [1.0, 0.0]) + group(TASKS[1], [1.0], has_error=True))
    sampler.observe(group(TASKS[0], [0.0]))
    assert records == [[[1, 0], [1, 0], [2, 1], [10, 5]]]


def test_a_sampler_resumes_from_the_state_of_another(example, sampler):
    task = next(sampler)
    sampler.observe(group(task, [1.0, 0.0]))
    other = example["SessionSampler"](TASKS, selector="adaptive", group=2, batch=2)
    other.load_state_dict(sampler.state_dict())
    for pair in [sampler, other]:
        pair.observe(group(TASKS[(TASKS.index(task) + 1) % 6], [0.0, 0.0]))
    assert [next(sampler) for _ in range(6)] == [next(other) for _ in range(6)]


def test_an_infinite_stream_of_tasks_is_refused(example):
    with pytest.raises(TypeError, match="infinite stream"):
        example["SessionSampler"](iter(TASKS))


@pytest.mark.parity
def test_prime_rl_builds_asks_tells_and_resumes_the_sampler(example, monkeypatch):
    curricula = pytest.importorskip("prime_rl.orchestrator.curriculum")
    vf = pytest.importorskip("verifiers.v1")
    # put back afterwards
    monkeypatch.setattr(curricula.samplers, "StandardSampler", curricula.StandardSampler)
    example["install"]("adaptive")
    tasks = [vf.Task(vf.TaskData(idx=i, prompt=f"task {i}")) for i in range(64)]
    curriculum, other = (curricula.Curriculum(None, tasks) for _ in range(2))
    assert isinstance(curriculum.sampler, curricula.TaskSampler)
    for _ in range(40):
        task = next(curriculum.sampler)
        trace_task = vf.TraceTask(type="Task", data=task.data, key=task.key, hash=task.hash)
        agent = vf.AgentInfo(config=vf.AgentConfig())
        trace = vf.Trace(
            task=trace_task, agent=agent, rewards={"exact": vf.Reward(score=1.0)}, ok=True
        )
        assert curriculum.on_result([vf.Episode(task=trace_task, traces=[trace])]) is True
    assert np.isfinite(curriculum.sampler.session.pass_rate()).any()
    other.load_state_dict(curriculum.state_dict())
    assert [next(other.sampler).key for _ in range(64)] == [
        next(curriculum.sampler).key for _ in range(64)
    ]
