"""Recipes of published data sets: where their files are, and how a row becomes a task."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxrft.host.files import JSON
from jaxrft.rewards.ground_truth import gsm8k_number

# `prompt`, text or messages; `answer`, None or "" = unknown; the recipe's further columns
Task = dict[str, JSON]


class Recipe(NamedTuple):
    """How the files of a data set, as they are published, become tasks."""

    about: str
    files: str  # which to download, and where they are
    # columns that `task` looks at; the others of a parquet file are not read
    reads: tuple[str, ...]
    # of a row; KeyError where it has no such column, ValueError where it makes no sense
    task: Callable[[JSON], Task]
    columns: dict[str, type]  # of a task, next to prompt and answer: str or float


def _gsm8k(row: JSON) -> Task:
    number = gsm8k_number(row["answer"])
    if number is None:
        raise ValueError("an answer of GSM8K ends in #### and a number")
    return {"prompt": row["question"], "answer": number, "solution": row["answer"]}


def _math(row: JSON) -> Task:
    fields = {"level": row["level"], "domain": row["type"], "solution": row["solution"]}
    return {"prompt": row["problem"], "answer": _boxed(row["solution"]), **fields}


def _boxed(solution: str) -> str | None:
    r"""Extracts the final answer of a solution of MATH; None if there is none.

    It is in the last \boxed{...} or \fbox{...}, else in the last `\boxed 5`.
    """
    from jaxrft.rewards.boxes import last_boxed

    bare = re.findall(r"\\boxed (\S[^$]*)", solution)
    return last_boxed(solution) or (bare[-1].rstrip(". ") if bare else None)


def _deepscaler(row: JSON) -> Task:
    return {"prompt": row["problem"], "answer": row["answer"], "solution": row["solution"]}


def _orz(row: JSON) -> Task:
    question, answer = row
    return {"prompt": question["value"], "answer": answer["ground_truth"]["value"]}


def _deepmath(row: JSON) -> Task:
    fields = {"difficulty": row["difficulty"], "topic": row["topic"]}
    return {"prompt": row["question"], "answer": row["final_answer"], **fields}


RATES = ("qwen2.5_7b_pass_rate", "qwen3_30b_pass_rate")


def _guru(row: JSON) -> Task:
    fields = {
        "domain": row["ability"],
        "data_source": row["data_source"],
        "extra_info": row.get("extra_info"),
    }
    rates = {name: row.get(name) for name in RATES}
    return {
        "prompt": row["prompt"],
        "answer": row["reward_model"]["ground_truth"],
        **fields,
        **rates,
    }


def _scp25k(row: JSON) -> Task:
    return {
        "prompt": row["problem"],
        "answer": row["answer"],
        "domain": row.get("domain") or "science",
    }


RECIPES = {
    "gsm8k": Recipe(
        about="GSM8K: grade school mathematics, 7,473 tasks and 1,319 to test with (arXiv "
        "2110.14168)",
        files="train.jsonl or test.jsonl of github.com/openai/grade-school-math, in "
        "grade_school_math/data; or the parquet files in main/ of the hub's data set openai/gsm8k",
        reads=("question", "answer"),
        task=_gsm8k,
        columns={"solution": str},
    ),
    "math": Recipe(
        about="MATH: competition mathematics, 7,500 tasks and 5,000 to test with (arXiv "
        "2103.03874)",
        files="*/train-*.parquet or */test-*.parquet of the hub's data set "
        "EleutherAI/hendrycks_math; or the .json "
        "files in train/ or test/ of the original MATH.tar",
        reads=("problem", "solution", "level", "type"),
        task=_math,
        columns={"level": str, "domain": str, "solution": str},
    ),
    "deepscaler": Recipe(
        about="DeepScaleR-Preview: 40,315 competition problems",
        files="deepscaler.json of the hub's data set agentica-org/DeepScaleR-Preview-Dataset",
        reads=("problem", "answer", "solution"),
        task=_deepscaler,
        columns={"solution": str},
    ),
    "orz": Recipe(
        about="ORZ: 57k problems of Open-Reasoner-Zero (arXiv 2503.24290)",
        files="data/orz_math_57k_collected.json of "
        "github.com/Open-Reasoner-Zero/Open-Reasoner-Zero",
        reads=(),
        task=_orz,
        columns={},
    ),
    "deepmath": Recipe(
        about="DeepMath-103K: hard mathematics by topic (arXiv 2504.11456)",
        files="data/train-*.parquet of the hub's data set zwhe99/DeepMath-103K",
        reads=("question", "final_answer", "difficulty", "topic"),
        task=_deepmath,
        columns={"difficulty": float, "topic": str},
    ),
    "guru": Recipe(
        about="GURU: mathematics, code, logic and more, with the pass rates of two policies "
        "(arXiv 2506.14965)",
        files="train/*.parquet of the hub's data set LLM360/guru-RL-92k, all or some: "
        "math__combined_54.4k.parquet, codegen__*.parquet, logic__*.parquet; ground truths and "
        "extra_info that are no text become JSON",
        reads=("prompt", "reward_model", "ability", "data_source", "extra_info", *RATES),
        task=_guru,
        columns={
            "domain": str,
            "data_source": str,
            "extra_info": str,
            **dict.fromkeys(RATES, float),
        },
    ),
    "scp25k": Recipe(
        about="SCP-25K: science, on which the DOTS paper trains next to mathematics (arXiv "
        "2506.05316)",
        files="not published under that name; DOTS has it from ProRL (arXiv 2505.24864), which "
        "filtered the hub's data set EricLu/SCP-116K: a file of your own with the columns "
        "problem, answer (short) and, if you like, domain",
        reads=("problem", "answer", "domain"),
        task=_scp25k,
        columns={"domain": str},
    ),
}


def as_text(value: object) -> str:
    """Formats a value as text: text as it is, None as "", all else as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)
