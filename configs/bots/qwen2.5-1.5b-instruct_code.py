"""The BOTS paper (arXiv 2510.26374), Qwen2.5-1.5B-Instruct on GURU's code.

    hf download Qwen/Qwen2.5-1.5B-Instruct
    jaxrft train configs/bots/qwen2.5-1.5b-instruct_code.py

Data, settings and what differs are in qwen2.5-1.5b-instruct_math.py beside this file. Different,
too: programs are graded by the reward `code_solved` (docs/rewards.md), which needs bubblewrap, and
not by GURU's grader.

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
    "data/guru/train/codegen__leetcode2k_1.3k.parquet",
    "data/guru/train/codegen__livecodebench_440.parquet",
    "data/guru/train/codegen__primeintellect_7.5k.parquet",
    "data/guru/train/codegen__taco_8.8k.parquet",
)
HELD_OUT = (
    "data/guru/online_eval/codegen__humaneval_164.parquet",
    "data/guru/online_eval/codegen__mbpp_200.parquet",
)

config = replace(
    base,
    tasks=tuple(TasksConfig(source=source, pass_rate_columns=REFERENCES) for source in TRAIN),
    evaluation=replace(
        base.evaluation, tasks=tuple(TasksConfig(source=source) for source in HELD_OUT)
    ),
    rewards=("code_solved",),
    steps=564,  # one pass over some 18,000 tasks
    output_dir="runs/bots/qwen2.5-1.5b-instruct_code",
)
