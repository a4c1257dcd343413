"""verl's scorer prime_code, as verl calls it, on the completions and tests of ours.

    python -m benchmarks.peers.verl_code REQUEST

REQUEST is a JSON file with `workers`, `completions` and `answers`. Gradings run in a pool of
processes, as in verl's reward manager of PRIME. Only the package prime_code is imported, which
needs numpy alone. After a few gradings to warm up, each line of stdin is answered with the seconds
of a batch, the processor seconds of all its processes, and the share of solved completions.
"""

import importlib
import importlib.util
import json
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

WARM_UP = 8  # gradings


def main(path: str) -> None:
    """Serves until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(Path(path).read_text())
    _load_scorer()  # here, too, where its absence is said
    tasks = list(zip(request["completions"], request["answers"], strict=True))
    with ProcessPoolExecutor(request["workers"], initializer=_load_scorer) as pool:
        list(pool.map(_score, tasks[:WARM_UP]))
        print(json.dumps({}), file=answers, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            scores, processor = zip(*pool.map(_score, tasks), strict=True)
            measured = {
                "seconds": time.perf_counter() - start,
                "processor_seconds": sum(processor),
                "solved_share": scores.count(1.0) / len(scores),
            }
            print(json.dumps(measured), file=answers, flush=True)


def _load_scorer() -> None:
    """Imports prime_code by itself, since verl's own modules need torch and ray."""
    verl = importlib.util.find_spec("verl")
    if verl is None or verl.origin is None:
        sys.exit("verl is not installed: pip install --no-deps -r benchmarks/peers/verl_code.txt")
    sys.path.insert(0, str(Path(verl.origin).parent / "utils/reward_score"))
    importlib.import_module("prime_code")


def _score(task: tuple[str, str]) -> tuple[float, float]:
    """Returns what prime_code gives, in the call of verl's `default_compute_score`, and the
    processor seconds of that, in this process and those that it has waited for.
    """
    prime_code = importlib.import_module("prime_code")
    completion, tests = task
    before = _processor_seconds()
    score, _ = prime_code.compute_score(completion, tests, continuous=True)
    return float(score), _processor_seconds() - before


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main(sys.argv[1])
