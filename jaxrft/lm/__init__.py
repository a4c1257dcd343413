"""The policy: model, weights, tokenizer, sampling, rollout."""
