"""Seconds of a whole step and of its stages, next to another commit and to other libraries.

Times the stages of `jaxrft.train.step` with a random policy, prompts of one length and a grader
that does next to nothing, each until its results are there; in a training run the host does not
wait between score and learn. The update of the selector counts to `select`. `benchmarks.rollout`
says where the lengths come from.
"""

import sys

from benchmarks import _run, _script, _serve, _turns

SERVE = "--serve"  # this process is a worker


def main(arguments: list[str]) -> None:
    """Runs the command."""
    _turns.run("step", __doc__, arguments)


if __name__ == "__main__":
    if SERVE in sys.argv:
        _serve.serve(_run.open_subject)
    else:
        _script.run(main)
