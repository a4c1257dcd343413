"""notebooks/verl_sampler.py: with stand-ins for verl's classes, and with verl's own loader and
replay buffer.
"""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from jaxrft.types import InputError

FILE = Path(__file__).parents[1] / "notebooks/verl_sampler.py"
CONFIG = SimpleNamespace(
    train_files="train.parquet",
    val_files="val.parquet",
    train_batch_size=2,
    session=SimpleNamespace(
        selector="adaptive", num_generations=2, get=lambda name, default: default
    ),
)


class Rows:
    """Stands for verl's RLHFDataset: six rows, each with an index of its file that says nothing."""

    def __init__(self, data_files, tokenizer, config, processor, max_samples):
        self.config = config

    def __len__(self):
        return 6

    def __getitem__(self, item):
        return {"raw_prompt": f"p{item}", "index": 0}


class Buffer:
    """Stands for verl's ReplayBuffer: gives out the batch that it holds."""

    def sample(self, global_steps, partition_id, batch_size):
        return self.batch, {"theirs": 1.0}


@pytest.fixture
def stand_ins(monkeypatch):
    """The example's names, where neither verl nor torch is needed; `fields` is what the
    TransferQueue holds.
    """
    fields = {}

    def kv_batch_get(keys, partition_id, select_fields):
        stored = [name for name in select_fields if all(name in fields[key] for key in keys)]
        return {name: [fields[key][name] for key in keys] for name in stored}

    modules = {
        "transfer_queue": {"KVBatchMeta": object, "kv_batch_get": kv_batch_get},
        "torch.utils.data": {"get_worker_info": lambda: None},
        "verl.trainer.ppo.v1.replay_buffer": {"ReplayBuffer": Buffer, "ReplayBufferAsync": Buffer},
        "verl.utils.dataset.rl_dataset": {"RLHFDataset": Rows},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(**runpy.run_path(str(FILE)), fields=fields)


def finished(fields, outcomes):
    """A batch of finished trajectories: (key, task, reward, tokens) each."""
    for key, task, reward, _ in outcomes:
        fields[key] = {"index": task, "rm_scores": np.array([0.0, reward])}
    keys, _, _, lengths = zip(*outcomes, strict=True)
    return SimpleNamespace(
        keys=list(keys), partition_id="train", tags=[{"response_len": n} for n in lengths]
    )


def test_rows_are_those_that_the_session_chose_whichever_are_asked(stand_ins):
    data = stand_ins.ChosenDataset("train.parquet", None, CONFIG)
    chosen = []
    data.session.next = lambda batch_size: (
        chosen.append(np.array([5, 3]) - len(chosen)) or chosen[-1]
    )
    rows = [data[0] for _ in range(4)]
    assert [row["index"] for row in rows] == [5, 3, 4, 2]
    assert rows[0]["raw_prompt"] == "p5"


def test_rows_of_validation_are_those_that_are_asked(stand_ins):
    data = stand_ins.ChosenDataset("val.parquet", None, CONFIG)
    assert data[4]["raw_prompt"] == "p4" and data.state_dict() == {}


def test_a_data_set_resumes_from_the_state_of_another(stand_ins):
    first = stand_ins.ChosenDataset("train.parquet", None, CONFIG)
    assert first[0]
    second = stand_ins.ChosenDataset("train.parquet", None, CONFIG)
    second.load_state_dict(first.state_dict())
    assert [first[0] for _ in range(7)] == [second[0] for _ in range(7)]


def test_one_file_for_training_and_validation_is_refused(stand_ins):
    config = SimpleNamespace(**{**vars(CONFIG), "val_files": "train.parquet"})
    with pytest.raises(InputError, match="give validation another file"):
        stand_ins.ChosenDataset("train.parquet", None, config)


def test_a_session_is_not_copied_into_workers_of_the_loader(stand_ins):
    stand_ins.ChosenDataset.__getitem__.__globals__["get_worker_info"] = lambda: "worker 0"
    data = stand_ins.ChosenDataset("train.parquet", None, CONFIG)
    with pytest.raises(InputError, match="dataloader_num_workers=0"):
        data[0]


def test_outputs_of_a_session_count_once_and_two_groups_of_a_task_together(stand_ins):
    outcomes = [
        ("a_0_0", 4, 1.0, 7),
        ("a_0_1", 4, 1.0, 3),  # a second output of the same session
        ("a_1_0", 4, 0.0, 5),
        ("b_0_0", 1, -1.0, 2),  # its other session failed
        ("c_0_0", 4, 1.0, 1),  # the task of a, chosen again
        ("c_1_0", 4, 1.0, 1),
    ]
    ids, successes, trials, tokens = stand_ins.tally(finished(stand_ins.fields, outcomes))
    assert (ids.tolist(), successes.tolist(), trials.tolist()) == ([1, 4], [0, 3], [1, 4])
    assert tokens.tolist() == [2, 17]


def test_groups_that_are_rewarded_after_the_buffer_are_refused(stand_ins):
    batch = finished(stand_ins.fields, [("a_0_0", 4, 1.0, 7)])
    del stand_ins.fields["a_0_0"]["rm_scores"]
    with pytest.raises(InputError, match="no rewards yet"):
        stand_ins.tally(batch)


def test_the_session_hears_of_batches_for_training_alone(stand_ins):
    data = stand_ins.ChosenDataset("train.parquet", None, CONFIG)
    told = []
    data.session.record = lambda *columns: told.append([column.tolist() for column in columns])
    buffer = stand_ins.RecordingBuffer()
    buffer.batch = finished(
        stand_ins.fields, [("a_0_0", 4, 1.0, 7), ("a_1_0", 4, 0.0, 5), ("b_0_0", 1, 0.0, 2)]
    )
    assert buffer.sample(1, "val", 2) == (buffer.batch, {"theirs": 1.0}) and not told
    batch, metrics = buffer.sample(1, "train", 2)
    assert batch is buffer.batch and metrics == {"theirs": 1.0, "training/informative_groups": 0.5}
    assert told == [[[1, 4], [0, 1], [1, 2], [2, 12]]]


def test_a_buffer_without_a_data_set_says_how_to_name_them(stand_ins):
    buffer = stand_ins.RecordingBuffer()
    buffer.batch = None
    with pytest.raises(InputError, match="pkg://verl_sampler"):
        buffer.sample(1, "train", 2)


@pytest.fixture
def verl(monkeypatch):
    """The example as verl imports it."""
    pytest.importorskip("verl")
    pytest.importorskip("transfer_queue")
    monkeypatch.syspath_prepend(FILE.parent)
    return __import__("verl_sampler")


@pytest.mark.parity
def test_verls_trainer_builds_both_classes_draws_chosen_rows_and_resumes(verl, tmp_path):
    import torch

    trainer = verl.simulated_trainer("adaptive", str(tmp_path))
    assert type(trainer.replay_buffer) is verl.RecordingBuffer
    assert type(trainer.train_dataset) is verl.ChosenDataset
    session = trainer.train_dataset.session
    for _ in range(3):
        tasks = list(trainer._next_train_batch()["index"])
        assert len(set(tasks)) == verl.TASKS
        session.record(tasks, np.arange(verl.TASKS) % 9, np.full(verl.TASKS, 8))
    torch.save(trainer.train_dataloader.state_dict(), tmp_path / "data.pt")
    other = verl.simulated_trainer("adaptive", str(tmp_path))
    # as verl loads it: arrays of numpy, in a file that this test has written
    other.train_dataloader.load_state_dict(torch.load(tmp_path / "data.pt", weights_only=False))
    for _ in range(40):  # over the end of an epoch
        assert list(trainer._next_train_batch()["index"]) == list(
            other._next_train_batch()["index"]
        )
    np.testing.assert_array_equal(other.train_dataset.session.pass_rate(), session.pass_rate())


@pytest.mark.parity
@pytest.mark.slow
def test_groups_that_pass_verls_transfer_queue_are_recorded(verl, monkeypatch):
    told = []
    record = verl.Session.record
    monkeypatch.setattr(
        verl.Session,
        "record",
        lambda self, *columns: told.append(columns) or record(self, *columns),
    )
    shares = verl.simulate("adaptive", 3)
    assert len(told) == 3
    for share, (ids, successes, trials, tokens) in zip(shares, told, strict=True):
        assert (
            len(ids) == verl.TASKS
            and (trials == verl.GENERATIONS).all()
            and (tokens == 2 * trials).all()
        )
        assert share == np.mean((successes > 0) & (successes < trials))
    assert max(shares) > 0
