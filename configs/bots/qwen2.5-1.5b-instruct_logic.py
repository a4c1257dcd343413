"""The BOTS paper (arXiv 2510.26374), Qwen2.5-1.5B-Instruct on GURU's logic.

    hf download Qwen/Qwen2.5-1.5B-Instruct
    jaxrft train configs/bots/qwen2.5-1.5b-instruct_logic.py

Data, settings and what differs are in qwen2.5-1.5b-instruct_math.py beside this file. Different,
too: answers are graded by the reward `logic` (docs/rewards.md) and not by GURU's graders.

Hardware: 8 devices of 40 GB (8 x A100, v5p-16). Each holds 3 GB of parameters, gradients and
moments, and during a rollout 3 GB of parameters in bfloat16 and 16 GB of key-value cache. The
published example: 8 GPUs.

Expected: not found in what could be read of the paper.

Not yet run.
"""

from dataclasses import replace
from pathlib import Path

from jaxrft.config import TasksConfig, load

base = load(str(Path(__file__).with_name("qwen2.5-1.5b-instruct_math.py")))
REFERENCES = base.task_sets[0].pass_rate_columns
TRAIN = (
    "data/guru/train/logic__arcagi1_111.parquet",
    "data/guru/train/logic__arcagi2_190.parquet",
    "data/guru/train/logic__barc_1.6k.parquet",
    "data/guru/train/logic__graph_logical_1.2k.parquet",
    "data/guru/train/logic__ordering_puzzle_1.9k.parquet",
    "data/guru/train/logic__zebra_puzzle_1.3k.parquet",
)
HELD_OUT = (
    "data/guru/online_eval/logic__arcagi1_200.parquet",
    "data/guru/online_eval/logic__ordering_puzzle_dataset_100.parquet",
    "data/guru/online_eval/logic__zebra_puzzle_dataset_200.parquet",
)

config = replace(
    base,
    tasks=tuple(TasksConfig(source=source, pass_rate_columns=REFERENCES) for source in TRAIN),
    evaluation=replace(
        base.evaluation, tasks=tuple(TasksConfig(source=source) for source in HELD_OUT)
    ),
    rewards=("logic",),
    steps=196,  # one pass over some 6,300 tasks
    output_dir="runs/bots/qwen2.5-1.5b-instruct_logic",
)
