"""verl's v1 trainer with prompts that jaxrft chooses: a data set that asks a session, a replay
buffer that tells it.

    pip install . 'verl[verl-core]==0.9.1'
    PYTHONPATH=notebooks python -m verl.trainer.main_ppo YOUR_OPTIONS \\
        data.custom_cls.path=pkg://verl_sampler data.custom_cls.name=ChosenDataset data.dataloader_num_workers=0 \\
        trainer.v1.sampler.custom_sampler.path=pkg://verl_sampler \\
        trainer.v1.sampler.custom_sampler.name=RecordingBuffer \\
        +data.session.selector=adaptive '+data.session.num_generations=${actor_rollout_ref.rollout.n}'
    python notebooks/verl_sampler.py --selector adaptive    # a simulation: no policy, no GPU
    python notebooks/verl_sampler.py --selector verl        # the same with verl's own choice

verl 0.9 has no hook that chooses prompts any more: its loader takes them at random or in order.
What it calls a custom sampler is its replay buffer, which takes finished groups of rollouts for
training. So the data set answers each request for a row with the row of the task that the session
chose, and the buffer tells the session what came of them.

* Name the file as pkg://verl_sampler for both: verl runs a file given by its path once for each
  class.
* The trainer's own process has to load the data: dataloader_num_workers=0.
* verl rewards groups while others roll out; a reward model on the trainer's GPUs comes too late for
  the buffer.
* With trainer_mode=sync feedback is there before the next prompts are chosen. The asynchronous
  modes are as far ahead as their num_warmup_batches say (take RecordingBufferAsync); groups that
  they drop as stale are not heard of.
* verl saves the data set's state, and so the session's, with its loader's in data.pt.
"""  # noqa: E501

import argparse
import tempfile
from collections import deque
from typing import ClassVar

import numpy as np
import transfer_queue as tq
from torch.utils.data import get_worker_info
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils.dataset.rl_dataset import RLHFDataset

from jaxrft.select import Session, selectors
from jaxrft.types import InputError

SIMULATED = 1024  # tasks of the simulation
TASKS = 32  # of a batch
GENERATIONS = 8  # of a task


class ChosenDataset(RLHFDataset):
    """verl's data set; that of the training files gives out the rows that its session chooses,
    whichever are asked.
    """

    training: ClassVar["ChosenDataset | None"] = None  # the one that `RecordingBuffer` tells

    def __init__(self, data_files, tokenizer, config, processor=None, max_samples=-1):
        """Raises InputError where training and validation files are the same: verl does not say
        which it makes.
        """
        super().__init__(data_files, tokenizer, config, processor, max_samples)
        self.chooses = data_files == config.train_files
        if not self.chooses:
            return
        if config.train_files == config.val_files:
            raise InputError(
                f"data.train_files and data.val_files are both {data_files}: give "
                "validation another file"
            )
        options = config.session
        selector = selectors.make(options.selector, options.num_generations)
        self.session = Session(selector, len(self), options.get("seed", 0))
        self.chosen: deque[int] = deque()
        ChosenDataset.training = self

    def __getitem__(self, item):
        if not self.chooses:
            return super().__getitem__(item)
        if get_worker_info() is not None:
            raise InputError(
                "a worker of the loader has a copy of the session: set "
                "data.dataloader_num_workers=0"
            )
        if not self.chosen:
            self.chosen.extend(self.session.next(self.config.train_batch_size).tolist())
        task = self.chosen.popleft()
        return super().__getitem__(task) | {"index": task}

    def state_dict(self) -> dict:
        return (
            {"session": self.session.state_dict(), "chosen": [*self.chosen]} if self.chooses else {}
        )

    def load_state_dict(self, state: dict) -> None:
        if self.chooses:
            self.session.load_state_dict(state["session"])
            self.chosen = deque(state["chosen"])


def tally(batch: tq.KVBatchMeta) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns tasks, successes, trials and tokens of a batch's trajectories.

    Their keys are PROMPT_SESSION_INDEX: all outputs of a session have its reward, a failed session
    has no output.
    """
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["index", "rm_scores"]
    )
    if "rm_scores" not in data.keys():  # noqa: SIM118, iterating over a TensorDict gives rows
        raise InputError(
            "the groups have no rewards yet: give a reward function, or the "
            "reward model its own GPUs"
        )
    tasks = np.array(list(data["index"]), int)
    solved = np.array([float(scores.sum()) > 0 for scores in data["rm_scores"]])
    lengths = np.array([tag["response_len"] for tag in batch.tags], float)
    _, first = np.unique([key.rpartition("_")[0] for key in batch.keys], return_index=True)
    ids, task_of_session = np.unique(tasks[first], return_inverse=True)
    successes = np.bincount(task_of_session, solved[first])
    return (
        ids,
        successes,
        np.bincount(task_of_session),
        np.bincount(np.searchsorted(ids, tasks), lengths),
    )


class Recording:
    """Tells the session of the groups that a replay buffer takes for training."""

    def sample(self, global_steps, partition_id, batch_size):
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "train":
            if ChosenDataset.training is None:
                raise InputError(
                    "no ChosenDataset has the training files: name both classes "
                    "in pkg://verl_sampler"
                )
            ids, successes, trials, tokens = tally(batch)
            ChosenDataset.training.session.record(ids, successes, trials, tokens)
            metrics["training/informative_groups"] = float(
                np.mean((successes > 0) & (successes < trials))
            )
        return batch, metrics


class RecordingBuffer(Recording, ReplayBuffer):
    """Of the synchronous trainer."""


class RecordingBufferAsync(Recording, ReplayBufferAsync):
    """Of the asynchronous trainers."""


class Simulated:
    """In the place of verl's agent loop manager: a student of jaxrft.simulate answers at once, and
    learns.
    """

    def __init__(self):
        import jax

        from jaxrft.simulate import StudentConfig, students

        world = students(StudentConfig(tasks=SIMULATED), num_generations=GENERATIONS)
        self.roll_out, self.teach = jax.jit(world.roll_out), jax.jit(world.learn)
        self.keys = (jax.random.fold_in(jax.random.key(0), i) for i in range(10**9))
        _, self.student = world.init(next(self.keys))

    def generate_sequences(self, prompts):
        """Puts the outputs of all sessions into the TransferQueue, then says that the prompts are
        finished.
        """
        from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        tasks = np.array(list(prompts["index"]), int)
        self.feedback = self.roll_out(next(self.keys), self.student, 0, tasks)
        keys, rows = [], []
        for uid, task, successes in zip(
            prompts["uid"], tasks, self.feedback.successes, strict=True
        ):
            for session in range(GENERATIONS):
                reward = float(session < successes)
                output = AgentLoopOutput(
                    prompt_ids=[1], response_ids=[2, 3], response_mask=[1, 1], reward_score=reward,
                    num_turns=2, metrics=AgentLoopMetrics(), extra_fields={},
                )  # fmt: skip
                keys.append(f"{uid}_{session}_0")
                rows.append(output.as_dict() | {"uid": uid, "index": int(task)})
        tags = [{"status": "success", "response_len": 2}] * len(keys)
        tq.kv_batch_put(
            keys=keys, fields=list_of_dict_to_tensordict(rows), tags=tags, partition_id="train"
        )
        finished = [{"status": "finished"}] * len(tasks)
        tq.kv_batch_put(keys=list(prompts["uid"]), tags=finished, partition_id="train")

    def learn(self):
        self.student = self.teach(next(self.keys), self.student, self.feedback)


def simulated_trainer(selector: str | None, folder: str):
    """Returns verl's synchronous trainer with its loader and its replay buffer, and with nothing
    that needs a GPU.

    None leaves the choice of prompts to verl.
    """
    import pandas as pd
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    rows = [
        {
            "prompt": [{"role": "user", "content": f"task {i}"}],
            "data_source": "simulated",
            "extra_info": {"index": i},
        }
        for i in range(SIMULATED)
    ]
    pd.DataFrame(rows).to_parquet(f"{folder}/train.parquet")
    pd.DataFrame(rows[:TASKS]).to_parquet(f"{folder}/val.parquet")
    here = "pkg://verl_sampler"
    data = {
        "train_files": f"{folder}/train.parquet",
        "val_files": f"{folder}/val.parquet",
        "train_batch_size": TASKS,
        "val_batch_size": None,
        "dataloader_num_workers": 0,
        "shuffle": True,
        "seed": 0,
        "filter_overlong_prompts": False,
        "cache_dir": folder,
        "custom_cls": {"path": here if selector else None, "name": "ChosenDataset"},
        "session": {"selector": selector, "num_generations": GENERATIONS},
    }
    sampler = {
        "max_off_policy_threshold": 8,
        "max_off_policy_strategy": "drop",
        "sampler_kwargs": {},
        "custom_sampler": {"path": here if selector else None, "name": "RecordingBuffer"},
    }
    steps = {"total_epochs": 1, "total_training_steps": None}
    trainer = PPOTrainerSync.__new__(PPOTrainerSync)
    trainer.config = OmegaConf.create(
        {
            "data": data,
            "trainer": {"v1": {"sync": {}, "sampler": sampler}, **steps},
            "algorithm": {},
        }
    )
    trainer.trainer_mode, trainer.parameter_sync_step, trainer.global_steps = "sync", 1, 0
    trainer.tokenizer = trainer.processor = None
    trainer.replay_buffer = trainer._build_replay_buffer()
    trainer._init_dataloader()
    trainer.agent_loop_manager = Simulated()
    return trainer


def simulated_step(trainer) -> float:
    """Returns the share of informative groups of a step: prompts, rollouts, replay buffer, and what
    is learned.
    """
    trainer.global_steps += 1
    trainer.prepare_step()
    batch, _ = trainer.replay_buffer.sample(
        global_steps=trainer.global_steps, partition_id="train", batch_size=TASKS
    )
    _, successes, trials, _ = tally(batch)
    trainer.agent_loop_manager.learn()
    tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
    return float(np.mean((successes > 0) & (successes < trials)))


def simulate(selector: str | None, steps: int) -> list[float]:
    """Returns the share of informative groups of each step."""
    import ray

    # as many as TransferQueue's processes ask for
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    tq.init()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = simulated_trainer(selector, folder)
            return [simulated_step(trainer) for _ in range(steps)]
    finally:
        tq.close()
        ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--selector", default="adaptive", choices=["verl", *selectors.SELECTORS])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    shares = simulate(None if options.selector == "verl" else options.selector, options.steps)
    print(
        f"{options.selector}: informative groups {np.mean(shares):.3f} of {len(shares)} "
        "batches, simulated"
    )
