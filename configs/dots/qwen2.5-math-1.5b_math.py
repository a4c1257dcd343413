r"""The DOTS paper (arXiv 2506.05316), Qwen2.5-Math-1.5B on MATH: its baseline, GRPO with uniform selection.

    hf download Qwen/Qwen2.5-Math-1.5B
    hf download --repo-type dataset openai/gsm8k
    hf download --repo-type dataset HuggingFaceH4/MATH-500
    hf download --repo-type dataset EleutherAI/hendrycks_math --local-dir data/math
    jaxrft prepare dataset math --file data/math/*/train-*.parquet
    jaxrft train configs/dots/qwen2.5-math-1.5b_math.py

`dots` and rollout replay, the paper's subject, are to be switched on here and in the five files beside this one, which
change it, when the package has them: target 0.5, 256 reference tasks, temperature 1e-3, selection every 2 steps; half
of each batch fresh, a buffer of 256 or 512.

Hardware: 8 devices of 80 GB (8 x H100, v5p-16). Each holds 3 GB of parameters, gradients and moments, and during a
rollout 3 GB of parameters in bfloat16 and 47 GB of key-value cache; the TPU compiler counts 58 GB in all. The paper's:
8 x L40S.

Expected: not stated in numbers; Figure 3 shows the mean accuracy over GSM8K, MATH500, Minerva Math and OlympiadBench,
sampled at temperature 0.6 and top-p 0.95, as curves (here: eval/gsm8k/avg@1 and eval/MATH-500/avg@1). Table 1: DOTS
with replay needs 16.67 % fewer steps and 26.25 % less time to reach what this baseline reaches in 60 steps.

Not yet run.

Different: MATH's train split whole, where the paper joins both splits, keeps levels 3 to 5 and leaves MATH500 out;
clipping of gradients at norm 1, which it does not state.
"""

from jaxrft.config import Config, EvalConfig, MeshConfig, SelectConfig, TasksConfig

PROMPT = "Let's think step by step and output the final answer within \\boxed{}."

config = Config(
    model="Qwen/Qwen2.5-Math-1.5B",
    tasks=TasksConfig(source="tfds:math", system_prompt=PROMPT),
    evaluation=EvalConfig(
        tasks=(
            TasksConfig(source="hub:openai/gsm8k", subset="main", split="test", system_prompt=PROMPT),
            TasksConfig(
                source="hub:HuggingFaceH4/MATH-500", split="test", prompt_column="problem", system_prompt=PROMPT
            ),
        ),
        num_samples=1,
    ),
    select=SelectConfig(name="uniform"),
    mesh=MeshConfig(data=1, fsdp=-1),
    output_dir="runs/dots/qwen2.5-math-1.5b_math",
    steps=60,
    dtype="bfloat16",
    batch_size=512,
    mini_batch_size=64,
    micro_batch_size=64,
    num_generations=8,
    max_prompt_length=1024,
    max_completion_length=3072,
    temperature=0.6,
    top_p=0.95,
    rewards=("math",),
    loss_type="grpo",
    learning_rate=1e-6,
    eval_steps=10,
    save_steps=5,
)
