r"""The DOTS paper (arXiv 2506.05316), Qwen2.5-Math-1.5B on MATH: DOTS with rollout replay.

    hf download Qwen/Qwen2.5-Math-1.5B
    hf download --repo-type dataset openai/gsm8k
    hf download --repo-type dataset HuggingFaceH4/MATH-500
    hf download --repo-type dataset EleutherAI/hendrycks_math --local-dir data/math
    jaxrft prepare dataset math --file data/math/*/train-*.parquet
    jaxrft prepare pass-rates configs/dots/qwen2.5-math-1.5b_math.py --model MODEL --out data/math/rates.parquet
    jaxrft prepare embeddings configs/dots/qwen2.5-math-1.5b_math.py --out data/math/embeddings.safetensors
    jaxrft prepare predictor configs/dots/qwen2.5-math-1.5b_math.py --tasks.source data/math/rates.parquet \
        --out data/math/predictor.safetensors
    jaxrft train configs/dots/qwen2.5-math-1.5b_math.py

The pass rates are those of other policies, a column for each MODEL: the more, and the more
different, the better. The embeddings may be any policy's, as long as the predictor is trained on
the same. The five files beside this one change it. The paper's baseline, GRPO with uniform
selection: --select.name uniform --tasks.embeddings None --replay.capacity 0.

Hardware: 8 devices of 80 GB (8 x H100, v5p-16). Each holds 3 GB of parameters, gradients and
moments, and during a rollout 3 GB of parameters in bfloat16 and 47 GB of key-value cache; the TPU
compiler counts 58 GB in all. The paper's: 8 x L40S.

Expected: not stated in numbers; Figure 3 shows the mean accuracy over GSM8K, MATH500, Minerva Math
and OlympiadBench, sampled at temperature 0.6 and top-p 0.95, as curves (here: eval/gsm8k/avg@1 and
eval/MATH-500/avg@1). Table 1: 16.67 % fewer steps and 26.25 % less time than GRPO with uniform
selection to reach what that reaches in 60 steps.

Not yet run.

Different: the informative groups of a probe are trained on, where the paper throws them away: every
second step rolls out 64 to 256 tasks beside its 256. MATH's train split whole, where the paper
joins both splits, keeps levels 3 to 5 and leaves MATH500 out. Clipping of gradients at norm 1,
which it does not state.
"""  # noqa: E501

from jaxrft.config import Config, EvalConfig, MeshConfig, ReplayConfig, SelectConfig, TasksConfig

PROMPT = "Let's think step by step and output the final answer within \\boxed{}."

config = Config(
    model="Qwen/Qwen2.5-Math-1.5B",
    tasks=TasksConfig(
        source="tfds:math", system_prompt=PROMPT, embeddings="data/math/embeddings.safetensors"
    ),
    evaluation=EvalConfig(
        tasks=(
            TasksConfig(
                source="hub:openai/gsm8k", subset="main", split="test", system_prompt=PROMPT
            ),
            TasksConfig(
                source="hub:HuggingFaceH4/MATH-500",
                split="test",
                prompt_column="problem",
                system_prompt=PROMPT,
            ),
        ),
        num_samples=1,
    ),
    select=SelectConfig(
        name="dots",
        predictor="data/math/predictor.safetensors",
        num_references=256,
        reference_every=2,
        target=0.5,
        temperature=1e-3,
    ),
    replay=ReplayConfig(capacity=512, fresh_fraction=0.5),
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
