"""The DOTS paper (arXiv 2506.05316), Qwen2.5-3B on DeepMath: DOTS with rollout replay.

    hf download Qwen/Qwen2.5-3B
    hf download --repo-type dataset zwhe99/DeepMath-103K --local-dir data/deepmath
    jaxrft prepare dataset deepmath --file data/deepmath/data/train-*.parquet
    jaxrft train configs/dots/qwen2.5-3b_deepmath.py

All else, also how to make the embeddings and the predictor, is in qwen2.5-math-1.5b_math.py beside
this file. Completions of up to 4096 tokens.

Hardware: 16 devices of 80 GB (16 x H100, v5p-32). Each holds 3 GB of parameters, gradients and
moments, and during a rollout 6 GB of parameters in bfloat16 and 40 GB of key-value cache. The
paper's: 8 x L40S.

Expected: not stated in numbers (Figure 3, curves). Table 1: 56.67 % fewer steps and 61.65 % less
time than GRPO with uniform selection to reach what that reaches in 60 steps.

Not yet run.

Different: the paper draws 8,192 of its 103,000 tasks at random; here all are the pool.
"""

from dataclasses import replace
from pathlib import Path

from jaxrft.config import TasksConfig, load

base = load(str(Path(__file__).with_name("qwen2.5-math-1.5b_math.py")))
config = replace(
    base,
    model="Qwen/Qwen2.5-3B",
    tasks=TasksConfig(
        source="tfds:deepmath",
        system_prompt=base.task_sets[0].system_prompt,
        embeddings="data/deepmath/embeddings.safetensors",
    ),
    select=replace(base.select, predictor="data/deepmath/predictor.safetensors"),
    output_dir="runs/dots/qwen2.5-3b_deepmath",
    max_completion_length=4096,
)
