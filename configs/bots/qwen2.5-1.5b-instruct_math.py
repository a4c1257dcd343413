"""The BOTS paper (arXiv 2510.26374), Qwen2.5-1.5B-Instruct on GURU's mathematics.

    hf download Qwen/Qwen2.5-1.5B-Instruct
    hf download --repo-type dataset LLM360/guru-RL-92k --local-dir data/guru --include 'train/*' 'online_eval/*'
    jaxrft train configs/bots/qwen2.5-1.5b-instruct_math.py
    jaxrft train configs/bots/qwen2.5-1.5b-instruct_math.py --select.name uniform --output-dir runs/bots/uniform

The files of GURU bring the reference pass rates that BOTS needs. The five files beside this one
change it.

Hardware: 8 devices of 40 GB (8 x A100, v5p-16). Each holds 3 GB of parameters, gradients and
moments, and during a rollout 3 GB of parameters in bfloat16 and 16 GB of key-value cache. The
published example: 8 GPUs.

Expected: TTB(100 %) 0.64: `bots` needs 64 % of the steps of random selection to reach what that
reaches at its end. Accuracies: not found in what could be read. Measured on MATH500 and AIME 2024
(here: eval/math500/avg@1 and eval/aime/avg@1).

Not yet run.

The settings are those of the published example (github.com/modelscope/Trinity-RFT, examples/bots):
32 tasks x 16, one pass over the tasks. Different: its grader of mathematics; a KL of the weight
that Trinity-RFT has by default, here 0.
"""  # noqa: E501

from jaxrft.config import Config, EvalConfig, MeshConfig, SelectConfig, TasksConfig

REFERENCES = ("qwen2.5_7b_pass_rate", "qwen3_30b_pass_rate")

config = Config(
    model="Qwen/Qwen2.5-1.5B-Instruct",
    tasks=TasksConfig(
        source="data/guru/train/math__combined_54.4k.parquet", pass_rate_columns=REFERENCES
    ),
    evaluation=EvalConfig(
        tasks=(
            TasksConfig(source="data/guru/online_eval/math__math_500.parquet", name="math500"),
            TasksConfig(
                source="data/guru/online_eval/math__aime_repeated_8x_240.parquet", name="aime"
            ),
        ),
        num_samples=1,
    ),
    select=SelectConfig(name="bots", decay=0.1, rho=0.1, target=0.5),
    mesh=MeshConfig(data=1, fsdp=-1),
    output_dir="runs/bots/qwen2.5-1.5b-instruct_math",
    steps=1700,  # one pass over 54,400 tasks
    dtype="bfloat16",
    batch_size=32,
    micro_batch_size=16,
    num_generations=16,
    max_prompt_length=4096,
    max_completion_length=8192,
    temperature=1.0,
    rewards=("math",),
    loss_type="dapo",
    learning_rate=1e-6,
    eval_steps=40,
    save_steps=40,
)
