r"""GSM8K with its answer in tags: the prompts, and the reward
`configs.graders.tags:partial_credit`.

python -m configs.graders.tags train.jsonl data/gsm8k_tags_train.jsonl
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrft.rewards.functions import text_of

PROMPT = """Solve a problem of mathematics.
Think step by step inside <reasoning>...</reasoning>, then write the final number, and nothing else, inside \
<answer>\\boxed{{}}</answer>.

Problem: {question}
<reasoning>
"""  # noqa: E501


def partial_credit(
    prompts: Sequence, completions: Sequence, *, answer: Sequence, **columns: Any
) -> list[float]:
    r"""1 for the right number in the right form, 0.5 without the form, 0.1 for the form alone, else
    0.

    The form: one </reasoning>, then one <answer>, then one </answer>. The number: in the last
    \boxed{} of the last answer, or of the whole text if there is none; without any, nothing is
    earned.
    """
    return [
        _credit(text_of(completion), str(gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _credit(completion: str, gold: str) -> float:
    tags = re.findall(r"</reasoning>|</?answer>", completion)
    formed = tags == ["</reasoning>", "<answer>", "</answer>"]
    answers = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", answers[-1] if answers else completion)
    if not boxed:
        return 0.0
    right = _bare(boxed[-1]) == _bare(gold)
    return {(True, True): 1.0, (True, False): 0.5, (False, True): 0.1, (False, False): 0.0}[
        right, formed
    ]


def _bare(number: str) -> str:
    return number.replace(",", "").strip()


def main(source: str, target: str) -> None:
    """Writes GSM8K's file `source` again with these prompts, as text, and bare numbers as
    answers.
    """
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    tasks = [
        {
            "prompt": PROMPT.format(question=row["question"]),
            "answer": row["answer"].rpartition("####")[2].strip(),
        }
        for row in rows
    ]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
