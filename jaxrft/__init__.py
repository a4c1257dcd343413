"""jaxrft: reinforcement finetuning that chooses, before the rollouts, the tasks worth rolling
out.
"""

__version__ = "0.2.0"
