"""Other implementations of rollout and update, each a program for an environment of its own."""
