"""The BOTS paper (arXiv 2510.26374), Qwen2.5-7B on GURU's code.

    hf download Qwen/Qwen2.5-7B
    jaxrft train configs/bots/qwen2.5-7b_code.py

Data, graders, settings and what differs are in qwen2.5-1.5b-instruct_math.py and
qwen2.5-1.5b-instruct_code.py beside this file.

Hardware: 8 devices of 95 GB (v5p-16) or 16 of 80 GB (16 x H100). Each of 8 holds 15 GB of
parameters, gradients and moments, and during a rollout 15 GB of parameters in bfloat16 and 31 GB of
key-value cache; the TPU compiler counts 74 GB in all.

Expected: not found in what could be read of the paper.

Not yet run.
"""

from dataclasses import replace
from pathlib import Path

from jaxrft.config import load

config = replace(
    load(str(Path(__file__).with_name("qwen2.5-1.5b-instruct_code.py"))),
    model="Qwen/Qwen2.5-7B",
    output_dir="runs/bots/qwen2.5-7b_code",
)
