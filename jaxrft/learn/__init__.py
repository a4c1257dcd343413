"""What to learn from a batch: advantages, clipped objectives, replay and the training step."""
