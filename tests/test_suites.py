"""Evaluation suites, on files of two rows in each published format."""

import json
import re
from dataclasses import replace

import helpers
import pytest

from jaxrft import cli
from jaxrft.assets import TINY
from jaxrft.config import Config, EvalConfig, TasksConfig, graded_by
from jaxrft.errors import InputError
from jaxrft.rewards.lookup import resolve
from jaxrft.suites import SUITES
from jaxrft.tasks import sources
from jaxrft.train import results

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTION = "What is $1+1$?"
GPQA = {
    "Question": "Which metal is red?",
    "Correct Answer": "copper",
    "Incorrect Answer 1": "tin",
    "Incorrect Answer 2": "zinc",
    "Incorrect Answer 3": "lead\n",
    "High-level domain": "Chemistry",
}
# suite -> (a row as published, the prompt, the ground truth, the domain, a right completion)
FORMATS = {
    "gsm8k": (
        {"question": QUESTION, "answer": "One and one.\n#### 1,002"},
        QUESTION + ' Let\'s think step by step and output the final answer after "####".',
        "1002",
        None,
        "#### 1002",
    ),
    "math500": (
        {
            "problem": QUESTION,
            "solution": "so $\\boxed{\\frac12}$",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/1.json",
        },
        QUESTION + BOXED,
        "\\frac{1}{2}",
        "Algebra",
        "\\boxed{0.5}",
    ),
    "aime24": (
        {"id": 60, "problem": QUESTION, "solution": "long", "answer": "025", "year": "2024"},
        QUESTION + BOXED,
        "025",
        None,
        "\\boxed{25}",
    ),
    "aime24 of Maxwell-Jia": (
        {"ID": "2024-I-1", "Problem": QUESTION, "Solution": "long", "Answer": 25},
        QUESTION + BOXED,
        25,
        None,
        "\\boxed{025}",
    ),
    "aime24 of math-ai": (
        {"id": "60", "problem": QUESTION, "solution": "\\boxed{204}", "url": "x"},
        QUESTION + BOXED,
        "204",
        None,
        "\\boxed{204}",
    ),
    "aime25": (
        {"problem": QUESTION, "answer": "70", "id": "0"},
        QUESTION + BOXED,
        "70",
        None,
        "\\boxed{70}",
    ),
    "aime25 of opencompass": (
        {"question": QUESTION, "answer": "70"},
        QUESTION + BOXED,
        "70",
        None,
        "\\boxed{70}",
    ),
    "amc23": (
        {"id": 0, "question": QUESTION, "answer": 27.0, "url": "x"},
        QUESTION + BOXED,
        27.0,
        None,
        "\\boxed{27}",
    ),
    "minerva_math": (
        {"problem": QUESTION, "solution": "then \\boxed{4.5e33} erg", "type": "Astronomy"},
        QUESTION + BOXED,
        "4.5e33",
        "Astronomy",
        "\\boxed{4.5 \\times 10^{33}}",
    ),
    "olympiadbench": (
        {
            "question": QUESTION,
            "final_answer": ["$3$", "$\\frac12$"],
            "unit": None,
            "subfield": "Algebra",
            "modality": "Text-only",
            "is_multiple_answer": True,
        },
        QUESTION + BOXED,
        ["3", "\\frac12"],
        "Algebra",
        "\\boxed{\\frac12, 3}",
    ),
    "gpqa_diamond": (
        GPQA,
        "Answer the following multiple choice question. The last line of your response should be "
        "of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. "
        "Think step by step before answering.\n\nWhich metal is red?\n\nA) zinc\nB) tin\n"
        "C) lead\nD) copper",
        "D",
        "Chemistry",
        "It is copper.\n\nAnswer: D",
    ),
}


def write(folder, name, *rows):
    return helpers.write_rows(folder / f"{name.split()[0]}.jsonl", list(rows))


@pytest.mark.parametrize("name", FORMATS)
def test_suite_reads_its_published_format(name, tmp_path):
    row, prompt, answer, domain, completion = FORMATS[name]
    suite = name.split()[0]
    config = TasksConfig(str(write(tmp_path, name, row, row)), suite=suite)
    rows = sources.load(config)
    assert rows.prompts == [[{"role": "user", "content": prompt}]] * 2
    assert rows.columns["answer"] == [answer] * 2
    assert rows.domains == (None if domain is None else [domain] * 2)
    reward = resolve(SUITES[suite].reward)
    assert reward(["q"] * 2, [completion, "?"], answer=[answer] * 2) == [1.0, 0.0]


def test_every_suite_has_a_format_here():
    assert {name.split()[0] for name in FORMATS} == set(SUITES)


def test_order_of_options_depends_on_the_question_only(tmp_path):
    """Also where rows before it are left out; other questions have other orders."""
    rows = [GPQA | {"Question": f"Question {i}?"} for i in range(40)]
    config = TasksConfig(str(write(tmp_path, "all", *rows)), suite="gpqa_diamond")
    letters = sources.load(config).columns["answer"]
    some = TasksConfig(str(write(tmp_path, "some", *rows[7:])), suite="gpqa_diamond")
    assert sources.load(some).columns["answer"] == letters[7:]
    assert {letter: letters.count(letter) > 3 for letter in "ABCD"} == dict.fromkeys("ABCD", True)


def test_columns_may_be_named(tmp_path):
    row = {"q": QUESTION, "a": "2", "kind": "sums", "subject": "x"}
    config = TasksConfig(str(write(tmp_path, "own", row)), suite="math500")
    named = replace(config, prompt_column="q", answer_column="a", domain_column="kind")
    rows = sources.load(named)
    assert rows.prompts[0][0]["content"] == QUESTION + BOXED
    assert (rows.columns["answer"], rows.domains) == (["2"], ["sums"])


@pytest.mark.parametrize(
    ("suite", "rows", "said"),
    [
        (
            "math500",
            [{"text": "x", "answer": "2"}],
            "own.jsonl, suite math500: there is no column problem or question, only text, answer: "
            "give a file with the columns of hub:HuggingFaceH4/MATH-500, or name the column",
        ),
        ("aime25", [{"problem": "x"}], "suite aime25: there is no column answer, only problem"),
        (
            "gsm8k",
            [{"question": "x", "answer": "#### 3"}, {"question": "x", "answer": "#### three"}],
            "suite gsm8k: row 2, column answer is '#### three', but must be an answer that ends "
            "in #### and a number: correct the row or leave it out",
        ),
        (
            "math500",
            [{"problem": "x", "answer": "1"}, {"problem": None, "answer": "2"}],
            "suite math500: row 2, column problem is None, but must be a text",
        ),
        (
            "minerva_math",
            [{"problem": "x", "solution": "it is 4"}],
            "row 1, column solution is 'it is 4', but must be a text with its answer in \\boxed{}",
        ),
        (
            "gpqa_diamond",
            [{name: GPQA[name] for name in list(GPQA)[:3]}],
            "suite gpqa_diamond: there is no column Incorrect Answer 2, only Question",
        ),
        (
            "olympiadbench",
            [{"question": "x", "final_answer": ["1"], "modality": "Multimodal"}],
            "row 1, column modality is 'Multimodal', but must be Text-only",
        ),
        (
            "olympiadbench",
            [{"question": "x", "final_answer": []}],
            "row 1, column final_answer is [], but must be an answer",
        ),
    ],
)
def test_file_that_does_not_fit_is_one_sentence(suite, rows, said, tmp_path):
    with pytest.raises(InputError, match=re.escape(said)):
        sources.load(TasksConfig(str(write(tmp_path, "own", *rows)), suite=suite))


def test_held_out_sets_are_graded_and_sampled_as_their_suites_say():
    sets = (
        TasksConfig("a.jsonl", suite="gpqa_diamond"),
        TasksConfig("b.jsonl", suite="gsm8k", reward="math", num_samples=2),
        TasksConfig("c.jsonl"),
    )
    config = Config(
        "model", TasksConfig("t.jsonl"), "run", evaluation=EvalConfig(sets), rewards=("exact",)
    )
    assert [tasks.title for tasks in sets] == ["gpqa_diamond", "gsm8k", "c"]
    assert [graded_by(config, tasks).rewards for tasks in sets] == [
        ("choice",),
        ("math",),
        ("exact",),
    ]
    assert [config.samples_of(tasks) for tasks in sets] == [8, 2, 8]
    best = {"keep_best": "gsm8k/maj@2", "eval_steps": 1}
    assert replace(config, **best).keep_best == "gsm8k/maj@2"
    with pytest.raises(InputError, match="it must be a metric of the evaluations"):
        replace(config, **best | {"keep_best": "gsm8k/maj@8"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"suite": "math50"}, "the suite of a.jsonl is 'math50': did you mean math500?"),
        ({"suite": "zzz"}, "the suite of a.jsonl is 'zzz': it must be one of gsm8k, math500"),
        ({"num_samples": -1}, "num_samples is -1 for the held-out set a: it must be from 0 to"),
        (
            {"num_samples": 10**8},
            "num_samples is 100000000 for the held-out set a: it must be from 0 to 32,767",
        ),
    ],
)
def test_mistakes_of_a_held_out_set(changes, said):
    held_out = EvalConfig((TasksConfig("a.jsonl", **changes),))
    with pytest.raises(InputError, match=re.escape(said)):
        Config("model", TasksConfig("t.jsonl"), "run", evaluation=held_out)


def test_fields_of_held_out_sets_are_refused_in_training():
    with pytest.raises(
        InputError, match="reward is 'math' for the set a, but only held-out sets have"
    ):
        Config("model", TasksConfig("a.jsonl", reward="math"), "run")
    with pytest.raises(
        InputError, match="num_samples is 4 for the set a, but only .*num_generations"
    ):
        Config("model", TasksConfig("a.jsonl", num_samples=4), "run")


def test_suites_of_the_command_line():
    config = results.suite_defaults()
    options = results.Options(config, suite=("math500=m.jsonl", "aime24=hub:HuggingFaceH4/aime"))
    sets = results.evaluated_config(options).evaluation.tasks
    assert [(tasks.suite, tasks.source, tasks.num_samples, tasks.split) for tasks in sets] == [
        ("math500", "m.jsonl", 4, "train"),
        ("aime24", "hub:HuggingFaceH4/aime", 32, "train"),
    ]
    few = results.evaluated_config(replace(options, num_samples=2, limit=3)).evaluation.tasks
    assert [(tasks.num_samples, tasks.limit) for tasks in few] == [(2, 3), (2, 3)]
    assert (config.temperature, config.top_p) == (0.6, 0.95)
    for suite, said in {
        ("math500",): "--suite is 'math500': give NAME=FILE, such as math500=test.jsonl",
        ("math5=a.jsonl",): "--suite is 'math5=a.jsonl': did you mean math500?",
        ("gsm8k=a.jsonl", "gsm8k=b.jsonl"): "--suite gsm8k is given twice",
    }.items():
        with pytest.raises(InputError, match=re.escape(said)):
            results.evaluated_config(replace(options, suite=suite))


def test_suite_without_config_needs_a_model(capsys):
    assert cli.main(["eval", "--suite", "gsm8k=a.jsonl"]) == 2
    assert "no model given: add --model MODEL" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["eval", "--suite", "gsm8k=a.jsonl", "--help"])
    page = capsys.readouterr().out
    assert "--suite NAME=SOURCE" in page and "(default: 0.6)" in page


@pytest.mark.slow
def test_two_suites_at_once_by_the_command_line(tmp_path, monkeypatch, capsys):
    """Each is graded by its own reward; the table, the file and its name have both."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}+1=", "answer": f"#### {i + 1}"} for i in range(3)]
    choices = [GPQA | {"Question": f"Q{i}", "High-level domain": "PB"[i % 2]} for i in range(2)]
    files = write(tmp_path, "gsm", *rows), write(tmp_path, "gpqa", *choices)
    suites = [f"gsm8k={files[0]}", f"gpqa_diamond={files[1]}"]
    flags = "--max-prompt-length 400 --max-completion-length 4 --batch-size 8 --num-samples 2"
    arguments = ["eval", "--suite", suites[0], f"--suite={suites[1]}", "--model", TINY]
    assert cli.main([*arguments, *flags.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "gsm8k: 3 tasks, 2 samples each"
    assert "gpqa_diamond: 2 tasks, 2 samples each" in lines
    assert [line.split()[0] for line in lines if line.startswith(("all", "P ", "B "))] == [
        "all",
        "all",
        "P",
        "B",
    ]
    (path,) = (tmp_path / "evaluations").iterdir()
    assert path.name == "assets-tiny-gsm8k-gpqa_diamond.json"
    document = json.loads(path.read_text())
    assert document["tasks"]["gpqa_diamond"]["domain"] == ["P", "B"]
    assert document["tasks"]["gsm8k"]["row"] == [1, 2, 3]
    names = {f"eval/gpqa_diamond/{kind}" for kind in ("maj@2", "P/pass@2", "B/maj@2", "avg@2")}
    assert names <= document["metrics"].keys()
    assert "eval/gsm8k/median_length" in document["metrics"]
