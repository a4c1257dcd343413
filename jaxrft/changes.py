"""What of its config a run may find changed when it goes on."""

import json
from typing import Any

from jaxrft import config as configs
from jaxrft.config import Config

# Rule -> the fields, or whole sections of fields, that it is for; a field is in one of them.
RULES: dict[str, tuple[str, ...]] = {
    # Random streams, the selector's beliefs and the groups of a replay would not go on as they began.
    "kept": ("seed", "batch_size", "num_generations", "select.name", "select.per_domain")
    + ("select.per_token", "replay.capacity"),
    "kept with replay": ("max_completion_length", "importance_sampling_correction"),
    # Not by name: files may move, but what is in them is compared. `dtype` matters to the frozen weights of LoRA.
    "content": ("model", "tasks", "lora", "dtype", "max_prompt_length", "chat_template_kwargs", "chat_template_date")
    + ("select.predictor", "select.embeddings", "select.num_references"),
    "free": (
        *("output_dir", "evaluation", "mesh", "distributed", "gather_for_rollout", "steps", "resume"),
        *("temperature", "top_p", "top_k", "dynamic_sampling"),
        *("rewards", "reward_weights", "overlong_buffer", "overlong_penalty", "success_reward"),
        *("skip_special_tokens", "reward_timeout", "reward_workers", "reward_completions"),
        *("loss_type", "scale_rewards", "epsilon", "epsilon_high", "delta"),
        *("kl_coef", "kl_estimator", "entropy_coef", "mask_truncated_completions"),
        *("importance_sampling_cap", "importance_sampling_mode"),
        *("num_iterations", "mini_batch_size", "micro_batch_size", "learning_rate", "warmup_steps", "weight_decay"),
        *("max_grad_norm", "max_skipped_updates", "eval_steps", "save_steps", "keep_checkpoints", "keep_best"),
        *("log_completions_steps", "replay.fresh_fraction", "replay.max_age", "replay.draw", "replay.clip"),
        *("select.order", "select.decay", "select.rho", "select.momentum", "select.balance", "select.target"),
        *("select.tolerance", "select.measured", "select.measure_every", "select.prior", "select.discount"),
        *("select.candidates", "select.explore", "select.explore_step", "select.zero_variance"),
        *("select.probe_every", "select.temperature", "select.utility", "select.price", "select.curiosity"),
        *("select.floor", "select.cool_down"),
    ),
}


def rule(field: str) -> str:
    """The rule for a dotted field; KeyError for one that has none."""
    for name, fields in RULES.items():
        if any(field == each or field.startswith(f"{each}.") for each in fields):
            return name
    raise KeyError(field)


def kept(config: Config) -> dict[str, Any]:
    """Dotted field -> value for all that a run keeps from its beginning."""
    rules = ("kept", "kept with replay") if config.replay.capacity else ("kept",)
    fields = configs.flat(json.loads(configs.to_json(config)))
    return {field: fields[field] for each in rules for field in RULES[each]}
