"""A tiny policy learns to rewrite lists of digits, from this repository alone and in a minute of
two CPU cores.

    jaxrft train configs/quickstart.py
    jaxrft train configs/quickstart.py --select.name uniform --output-dir runs/quickstart-uniform

Half of the pool can never be solved and most of the rest not yet. BOTS finds tasks to learn from in
more than half of its groups, uniform selection in less than a quarter; see the README for what that
makes of the held-out tasks.
"""

from jaxrft.assets import TINY
from jaxrft.config import Config, EvalConfig, SelectConfig, TasksConfig

config = Config(
    model=TINY,
    tasks=TasksConfig(source="builtin:digits"),
    evaluation=EvalConfig(
        tasks=(TasksConfig(source="builtin:digits-test"),), num_samples=8, batch_size=128
    ),
    select=SelectConfig(name="bots"),
    output_dir="runs/quickstart",
    steps=160,
    batch_size=16,
    num_generations=8,
    max_prompt_length=16,
    max_completion_length=9,  # 8 digits and the end
    rewards=("exact",),
    learning_rate=1e-4,
    eval_steps=40,
    save_steps=80,
)
