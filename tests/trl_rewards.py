"""TRL's own reward functions as a user's module holds them; workers import this file."""

from trl import rewards

accuracy = rewards.accuracy_reward
reasoning_accuracy = rewards.reasoning_accuracy_reward
think_format = rewards.think_format_reward
overlong = rewards.get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=4)
repetition = rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
cosine = rewards.get_cosine_scaled_reward(max_len=8)
