"""The graders that GURU was published with, for its code and logic: the reward
`configs.graders.reasoning360:score`.

    git clone https://github.com/LLM360/Reasoning360
    pip install torch tensordict ray pandas   # what its package imports; not its own requirements, which clash
    export PYTHONPATH=$PWD/Reasoning360

Its code grader runs the answers under bubblewrap (Debian's `bubblewrap`; CODER1_EXEC names other
sandboxes), and its grader of ordering puzzles evaluates text of the answer as Python: run them in a
container without secrets or network.
"""  # noqa: E501

try:
    from verl.utils.reward_score import default_compute_score as score  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        f"Reasoning360 cannot be imported ({error}): see configs/graders/reasoning360.py"
    ) from error
