"""prime-rl's orchestrator with tasks that jaxrft chooses: a TaskSampler that asks a session and
hears finalized groups.

    pip install .    # into prime-rl's own environment
    python notebooks/prime_rl_sampler.py @ orchestrator.toml    # in place of `orchestrator @ orchestrator.toml`
    python notebooks/prime_rl_sampler.py --simulate adaptive    # without policy and trainer
    python notebooks/prime_rl_sampler.py --simulate standard

Written for prime-rl 0.8.0 at commit 559b447, of 21 August 2026. Its `Curriculum` has a sampler and
a checkpoint for its state, but its config names two samplers only; `SessionSampler` takes the place
of the default one.

* prime-rl asks for one task at a time and reports one group at a time, in the order in which groups
  finish. To a selector `next` and `record` are steps: the sampler draws BATCH tasks, and gathers as
  many before it records them.
* Groups are in flight when others are chosen, so feedback is late by as many steps as there are
  batches in flight. Groups that prime-rl drops as stale are not heard of.
* Rollouts with errors, and those of agents that are not trained, are not counted.
* prime-rl saves the sampler's state with its checkpoint. Tasks in flight then are chosen again when
  it is their turn.
"""  # noqa: E501

import argparse
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from jaxrft.select import Session, selectors

try:
    from prime_rl.orchestrator.curriculum.samplers import TaskSampler
except ImportError:  # nothing below needs it, but prime-rl does
    TaskSampler = Iterator

SELECTOR = "adaptive"
GROUP = 16  # rollouts of a task: orchestrator.group_size
BATCH = 32  # tasks of a step: orchestrator.batch_size / group_size
TASKS = 1024  # of the simulation


class SessionSampler(TaskSampler):
    """The tasks of a finite task set, as the session chooses them."""

    def __init__(
        self, tasks: Sequence, *, selector: str = SELECTOR, group: int = GROUP, batch: int = BATCH
    ):
        """Raises TypeError for an infinite stream of tasks, which has no end to choose from."""
        if not isinstance(tasks, Sequence):
            raise TypeError(
                "the task set is an infinite stream: a selector chooses among a "
                "finite number of tasks"
            )
        self.tasks = tuple(tasks)
        self.ids = {task.key: i for i, task in enumerate(self.tasks)}
        self.batch = min(batch, len(self.tasks))
        self.session = Session(selectors.make(selector, group), len(self.tasks))
        self.chosen: deque[int] = deque()
        # task -> successes, trials and tokens that are not recorded yet
        self.heard: dict[int, np.ndarray] = {}

    def __next__(self):
        if not self.chosen:
            self.chosen.extend(self.session.next(self.batch).tolist())
        return self.tasks[self.chosen.popleft()]

    def observe(self, group: list) -> None:
        """Takes the episodes of one task; records those of a whole batch of tasks together."""
        traces = [trace for episode in group for trace in episode.traces]
        counted = [trace for trace in traces if not trace.has_error and trace.agent.trainable]
        if not counted:
            return
        task = self.ids[group[0].task.key]
        rewards = np.array([trace.reward for trace in counted])
        outcome = np.array(
            [(rewards > 0).sum(), len(rewards), sum(trace.num_output_tokens for trace in counted)]
        )
        self.heard[task] = self.heard.get(task, 0) + outcome
        if len(self.heard) == self.batch:
            self.session.record([*self.heard], *np.array([*self.heard.values()], float).T)
            self.heard.clear()

    def state_dict(self) -> dict:
        return {
            "session": self.session.state_dict(),
            "chosen": [*self.chosen],
            "heard": dict(self.heard),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.session.load_state_dict(state_dict["session"])
        self.chosen = deque(state_dict["chosen"])
        self.heard = dict(state_dict["heard"])


def install(selector: str) -> None:
    """Makes prime-rl's curricula use this sampler by default: they look the class up when they are
    built.
    """
    from prime_rl.orchestrator.curriculum import samplers

    samplers.StandardSampler = partial(SessionSampler, selector=selector)


def simulate(
    name: str, steps: int, *, in_flight: int = 2 * BATCH, dropped: float = 0.05
) -> list[float]:
    """Returns the share of informative groups of each batch; a student of jaxrft.simulate is the
    policy that learns.

    `in_flight` groups run at a time and finish in random order, a share `dropped` of them is stale.
    Curriculum, tasks and episodes are prime-rl's and verifiers'; dispatcher, rollouts and trainer
    are not.
    """
    import jax
    import verifiers.v1 as vf
    from prime_rl.orchestrator.curriculum import Curriculum

    from jaxrft.simulate import StudentConfig, students
    from jaxrft.types import Feedback

    world = students(StudentConfig(tasks=TASKS), num_generations=GROUP)
    roll_out, learn = jax.jit(world.roll_out), jax.jit(world.learn)
    keys = (jax.random.fold_in(jax.random.key(0), i) for i in range(10**9))
    _, student = world.init(next(keys))
    tasks = [vf.Task(vf.TaskData(idx=i, prompt=f"task {i}")) for i in range(TASKS)]
    if name != "standard":
        install(name)
    curriculum = Curriculum(None, tasks)

    def episodes(task: vf.Task) -> list[vf.Episode]:
        told = vf.TraceTask(type="Task", data=task.data, key=task.key, hash=task.hash)
        answers = (
            np.arange(GROUP)
            < roll_out(next(keys), student, 0, np.array([task.data.idx])).successes[0]
        )
        agent = vf.AgentInfo(config=vf.AgentConfig())
        rewards = [{"exact": vf.Reward(score=float(answer))} for answer in answers]
        traces = [vf.Trace(task=told, agent=agent, rewards=reward, ok=True) for reward in rewards]
        return [
            vf.Episode(env=vf.EnvInfo(id="simulated"), task=told, traces=[trace])
            for trace in traces
        ]

    rng = np.random.default_rng(0)
    running, shares = [], []
    for _ in range(steps):
        batch = []
        while len(batch) < BATCH:
            while len(running) < in_flight:
                running.append(episodes(next(curriculum.sampler)))
            group = running.pop(rng.integers(len(running)))
            if rng.random() < dropped:
                continue
            curriculum.on_result(group)
            batch.append(
                (group[0].task.data.idx, sum(episode.traces[0].reward for episode in group))
            )
        ids, successes = np.array(batch).T
        trials = np.full(BATCH, float(GROUP), np.float32)
        student = learn(
            next(keys),
            student,
            Feedback(ids.astype(int), successes.astype(np.float32), trials, trials),
        )
        shares.append(float(np.mean((successes > 0) & (successes < GROUP))))
    return shares


if __name__ == "__main__":
    if sys.argv[1:2] == ["--simulate"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--simulate", choices=["standard", *selectors.SELECTORS])
        parser.add_argument("--steps", type=int, default=100)
        options = parser.parse_args()
        shares = simulate(options.simulate, options.steps)
        print(
            f"{options.simulate}: informative groups {np.mean(shares):.3f} of {len(shares)} batches"
        )
    else:
        from prime_rl.entrypoints.orchestrator import main

        install(SELECTOR)
        main()
