"""Tokens a second of the sampler, next to another commit and to other libraries.

The prompts are the same in every run. Lengths come from the sampler itself: the policy's logits
make the end token as likely as the wanted mean length says (`_run.force_ends`), and what our
sampler draws at first is the list that all peers are given. With `--lengths geometric` that costs
one more log-sum-exp over the logits a token.
"""

import sys

from benchmarks import _run, _script, _serve, _turns

SERVE = "--serve"  # this process is a worker


def main(arguments: list[str]) -> None:
    """Runs the command."""
    _turns.run("rollout", __doc__, arguments)


if __name__ == "__main__":
    if SERVE in sys.argv:
        _serve.serve(_run.open_subject)
    else:
        _script.run(main)
