"""Seconds of an update of the policy, next to another commit and to other libraries.

The batch is one rollout of the sampler, graded and scored before the clock starts;
`benchmarks.rollout` says where its lengths come from. Peers update their model by random tokens of
the same lengths.
"""

import sys

from benchmarks import _run, _script, _serve, _turns

SERVE = "--serve"  # this process is a worker


def main(arguments: list[str]) -> None:
    """Runs the command."""
    _turns.run("learn", __doc__, arguments)


if __name__ == "__main__":
    if SERVE in sys.argv:
        _serve.serve(_run.open_subject)
    else:
        _script.run(main)
