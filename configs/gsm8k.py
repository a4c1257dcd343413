"""A start on real data: Qwen2.5-0.5B-Instruct learns GSM8K.

    hf download Qwen/Qwen2.5-0.5B-Instruct
    hf download --repo-type dataset openai/gsm8k
    jaxrft train configs/gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct

Hardware: one GPU of 24 GB or a TPU VM with eight v5e chips: all devices together hold 8 GB of
parameters, gradients and moments; each, 1 GB of parameters in bfloat16 for the rollout and its part
of 2 GB of key-value cache.

Selection is uniform: `bots` needs the pass rates of two reference policies on these tasks, a file
with a column each, named in `tasks.pass_rate_columns`.

Expected: not stated anywhere for these very settings.

Not yet run.
"""

from jaxrft.config import Config, EvalConfig, MeshConfig, SelectConfig, TasksConfig

PROMPT = "Reason step by step. End with a line of #### and the answer, a number, as in: #### 42"

config = Config(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    tasks=TasksConfig(source="hub:openai/gsm8k", subset="main", system_prompt=PROMPT),
    evaluation=EvalConfig(
        tasks=(
            TasksConfig(
                source="hub:openai/gsm8k", subset="main", split="test", system_prompt=PROMPT
            ),
        ),
        num_samples=1,
        batch_size=256,
    ),
    select=SelectConfig(name="uniform"),
    mesh=MeshConfig(data=1, fsdp=-1),
    output_dir="runs/gsm8k",
    steps=200,
    dtype="bfloat16",
    batch_size=32,
    num_generations=8,
    max_prompt_length=512,
    max_completion_length=512,
    rewards=("gsm8k",),
    micro_batch_size=32,
    learning_rate=1e-6,
    eval_steps=50,
    save_steps=25,
)
