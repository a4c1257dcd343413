"""The table of evaluation suites: how the tasks of published benchmarks are asked and graded.

A suite reads a file that the user has, in the columns in which the benchmark is published. The
reading itself is in `jaxrft.tasks.suite_files`.
"""

from typing import NamedTuple

# DeepSeek-R1, github.com/deepseek-ai/DeepSeek-R1, README, Evaluation Results
TEMPERATURE = 0.6
TOP_P = 0.95
# Qwen2.5-Math, evaluation/math_eval.py, max_tokens_per_call. Models that reason at length want
# more, DeepSeek-R1 32,768.
MAX_COMPLETION_LENGTH = 2_048
MAX_PROMPT_LENGTH = 2_048  # the longest question of GPQA has about 1,500 tokens

# DeepSeekMath, README, Chat Completion; Qwen2.5-Math, evaluation/utils.py, qwen-boxed
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
# verl, examples/data_preprocess/gsm8k.py
HASHES = '{question} Let\'s think step by step and output the final answer after "####".'
# OpenAI's simple-evals, common.py, QUERY_TEMPLATE_MULTICHOICE
LETTER = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
    "step by step before answering.\n\n{question}\n\n{options}"
)


class Suite(NamedTuple):
    """A benchmark. Of columns with several names the first that a file has counts."""

    prompt: str  # with {question} and, of multiple choice, {options}
    reward: str  # which grades it
    question: tuple[str, ...]  # columns
    answer: tuple[str, ...] = ()
    solution: tuple[str, ...] = ()  # columns whose last box is the answer, if there is no other
    options: tuple[str, ...] = ()  # columns of the right option, then the wrong ones
    domain: tuple[str, ...] = ()
    num_samples: int = 4  # a task, unless the user says otherwise
    hub: str = ""  # where it is published: OWNER/NAME, split and configuration
    split: str = "test"
    subset: str | None = None


# The numbers of samples: 32 as DAPO's avg@32 (arXiv 2503.14476) for sets of a few dozen tasks; 4
# for the others, the least of DeepSeek-R1 ("between 4 and 64, depending on the test set size",
# arXiv 2501.12948) and that of simple-evals' gpqa_eval.py.
SUITES: dict[str, Suite] = {
    "gsm8k": Suite(
        HASHES,
        "gsm8k",
        question=("question",),
        answer=("answer",),
        hub="openai/gsm8k",
        subset="main",
    ),
    "math500": Suite(
        BOXED,
        "math",
        question=("problem", "question"),
        answer=("answer",),
        domain=("subject",),
        hub="HuggingFaceH4/MATH-500",
    ),
    "aime24": Suite(
        BOXED,
        "math",
        question=("problem", "Problem", "question"),
        answer=("answer", "Answer"),
        solution=("solution",),
        num_samples=32,
        hub="HuggingFaceH4/aime_2024",
        split="train",
    ),
    "aime25": Suite(
        BOXED,
        "math",
        question=("problem", "question"),
        answer=("answer",),
        num_samples=32,
        hub="math-ai/aime25",
    ),
    "amc23": Suite(
        BOXED,
        "math",
        question=("question", "problem"),
        answer=("answer",),
        num_samples=32,
        hub="math-ai/amc23",
    ),
    "minerva_math": Suite(
        BOXED,
        "math",
        question=("problem", "question"),
        answer=("answer",),
        solution=("solution",),
        domain=("type",),
        hub="math-ai/minervamath",
    ),
    "olympiadbench": Suite(
        BOXED,
        "math",
        question=("question",),
        answer=("final_answer",),
        domain=("subfield",),
        hub="Hothan/OlympiadBench",
        split="train",
        subset="OE_TO_maths_en_COMP",
    ),
    "gpqa_diamond": Suite(
        LETTER,
        "choice",
        question=("Question",),
        options=(
            "Correct Answer",
            "Incorrect Answer 1",
            "Incorrect Answer 2",
            "Incorrect Answer 3",
        ),
        domain=("High-level domain",),
        hub="Idavidrein/gpqa",
        split="train",
        subset="gpqa_diamond",
    ),
}
