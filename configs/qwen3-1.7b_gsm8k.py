"""A public figure to be equal to: Qwen3-1.7B on GSM8K for 100 steps, mean reward 0.8077 +- 0.005.

    hf download Qwen/Qwen3-1.7B
    python -m configs.graders.tags train.jsonl data/gsm8k_tags_train.jsonl
    python -m configs.graders.tags test.jsonl data/gsm8k_tags_test.jsonl
    jaxrft train configs/qwen3-1.7b_gsm8k.py

train.jsonl and test.jsonl are those of github.com/openai/grade-school-math, in
grade_school_math/data. Start both programs in the folder that configs/ is in.

Hardware: one device of 80 GB (28 GB of parameters, gradients and moments, 7 GB of reference policy,
3 GB of parameters in bfloat16, 3 GB of key-value cache), or up to eight smaller ones, over which
the mesh splits the model.

Expected: eval/test/avg@1 of 0.8077, after 0.55 before training. The figure is MaxText's on 8 x 8
chips of TPU v6e, over several seeds, the mean reward with partial credit
(github.com/AI-Hypercomputer/maxtext, pull request 4015); NeMo-RL on GPUs is said to reach 0.8042 to
0.8199. The settings are those of the author's branch (github.com/py4/maxtext).

Not yet run.

The same: 4 tasks x 8 a step in two updates, temperature 1, 256 + 768 tokens, the rule of the
reward, a prompt without a chat template, AdamW with learning rate 2e-7, weight decay 0.01 and
warm-up over 125 updates, KL weight 0.04. Different: the prompt's wording; k3 instead of k2 for the
KL; unbiased standard deviations; a learning rate that stays after the warm-up, where theirs falls
over 500 steps.
"""

from jaxrft.config import Config, EvalConfig, MeshConfig, SelectConfig, TasksConfig

config = Config(
    model="Qwen/Qwen3-1.7B",
    tasks=TasksConfig(source="data/gsm8k_tags_train.jsonl"),
    evaluation=EvalConfig(
        tasks=(TasksConfig(source="data/gsm8k_tags_test.jsonl", name="test"),),
        num_samples=1,
        batch_size=64,
    ),
    select=SelectConfig(name="uniform"),
    mesh=MeshConfig(data=1, model=-1),
    output_dir="runs/qwen3-1.7b_gsm8k",
    steps=100,
    dtype="bfloat16",
    batch_size=4,
    mini_batch_size=2,
    num_generations=8,
    max_prompt_length=256,
    max_completion_length=768,
    rewards=("configs.graders.tags:partial_credit",),
    loss_type="dapo",
    kl_coef=0.04,
    learning_rate=2e-7,
    warmup_steps=125,
    weight_decay=0.01,
    eval_steps=50,
    save_steps=25,
)
