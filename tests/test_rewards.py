"""The built-in rewards, by hand, and how a name or a function becomes something that a worker can
load.
"""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.assets import TINY
from jaxrft.config import Config, TasksConfig, search_for_rewards
from jaxrft.lm import tokenizer
from jaxrft.lm.rollout import Samples
from jaxrft.rewards import REWARDS, Pool, exact, gsm8k, resolve, verl
from jaxrft.rewards.grading import Grading, grade_rollout, open_rewards
from jaxrft.rewards.lookup import load, locate
from jaxrft.types import InputError, Rollout

# reward -> (completion, answer) worth 1, worth 0, and an answer that cannot be compared
CONTRACT = {
    "exact": ((" 3 1 2\n", "3 1 2"), ("3 1 2.", "3 1 2"), None),
    "gsm8k": (("so #### 72", "72"), ("so #### 71", "72"), "none"),
    "number": (("It is 72.", "72"), ("72 is 70 + 2", "72"), "none"),
    "math": ((r"so \boxed{72}", "72"), (r"so \boxed{71}", "72"), ""),
    "choice": (("The answer is (B).", "B"), ("The answer is (A).", "B"), "none"),
    "logic": (("<answer>[[1]]</answer>", [[1]]), ("<answer>[[2]]</answer>", [[1]]), "none"),
    "logic_solved": (("<answer>[[1]]</answer>", [[1]]), ("<answer>[[]]</answer>", [[1]]), "none"),
}


# what runs in sandboxes has a contract of its own, in test_code and test_gym
@pytest.mark.parametrize("name", [name for name in REWARDS if name[:3] not in ("cod", "gym")])
def test_contract(name):
    """One reward each, in order, ignoring other columns; 0 for a completion, None for a gold that
    says nothing.
    """
    reward = resolve(name)
    right, wrong, unknown = CONTRACT[name]
    completions = [wrong[0], right[0], "", "?!", "\\boxed{\\frac{", right[0], right[0]]
    answers = [wrong[1], right[1], right[1], right[1], right[1], unknown, None]
    rewards = reward(["q"] * 7, completions, answer=answers, other=[0] * 7)
    assert rewards == [0.0, 1.0, 0.0, 0.0, 0.0, None, None]
    assert reward([], [], answer=[]) == []
    messages = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert reward([[{"role": "user", "content": "q"}]] * 7, messages, answer=answers) == rewards
    with pytest.raises(ValueError):
        reward(["q"], ["1"], answer=["1", "2"])


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("6 * 12 = 72\n#### 72", "She sold 6 * 12.\n#### 72", 1.0),
        ("#### 1,080", "1080", 1.0),
        ("#### $1,080.00.", 1080, 1.0),
        ("It costs $72.", "#### 72", 1.0),
        ("72 of 100", "72", 0.0),
        ("#### 72 and not 73", "72", 1.0),
        ("#### 5 \n#### 72", "72", 1.0),
        ("#### nothing, but 72", "72", 1.0),
        ("a loss of -5", "-5", 1.0),
        ("a loss of -$5", "#### -5", 1.0),
        ("10-5", "5", 1.0),
        ("one of 1,2345", "2345", 1.0),
        ("one half is .5", "0.50", 1.0),
        ("12345678901234567890", "12345678901234567891", 0.0),
        ("٣", "3", 0.0),
    ],
)
def test_gsm8k(completion, answer, expected):
    assert gsm8k(["q"], [completion], answer=[answer]) == [expected]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\dfrac12}", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{1/2}", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{(1,2]}", "(1,2]", 1.0),
        (r"\boxed{(1,2)}", "(1,2]", 0.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"\boxed{90^\circ}", "90", 1.0),
        (r"\boxed{x=5}", "5", 1.0),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{007}", "7", 1.0),
        (r"first \boxed{3}, no: \boxed{4}", "4", 1.0),
        (r"first \boxed{3}, no: \boxed{4}", "3", 0.0),
        (r"\boxed{4} and then \boxed{5", "4", 1.0),
        (r"\boxed{}", "4", 0.0),
        (r"The answer is $\sqrt{8}$.", r"2\sqrt{2}", 1.0),
        ("The answer is 1/2.", r"\frac12", 1.0),
        (r"\boxed{72}", "6 * 12 = 72\n#### 72", 1.0),
        (r"\boxed{-1 \le x < 2}", "[-1,2)", 1.0),
        (r"\boxed{-1 \le x < 2}", "[-1,2]", 0.0),
        (r"\boxed{x = 1 \text{ or } x = 2}", "2, 1", 1.0),
        (r"\boxed{\textbf{A}}", r"\text{(A)}", 1.0),
        (r"\boxed{\$5\text{ dollars}}", "5", 1.0),
        (r"\boxed{3}", r"\{x \mid 2 < x < 3\}", 0.0),  # its last number
        (r"\boxed{7\sqrt2}", r"7\sqrt{2}.", 1.0),
        (r"\boxed{__import__('os')._exit(1)}", "4", 0.0),
    ],
)
def test_math(completion, answer, expected):
    assert resolve("math")(["q"], [completion], answer=[answer]) == [expected]


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        (r"1.38\times10^{-23}", r"6.63\times10^{-34}", 0.0),
        ("1.38e-23", "6.63e-34", 0.0),
        ("6.63e-34", r"6.63\times10^{-34}", 1.0),
        ("0.0000008", "0.0000012", 0.0),
        ("0.0000008", "8e-7", 1.0),
        (r"0.0000008\%", r"0.0000012\%", 0.0),
        (r"1.38\times10^{-23}\text{ J}", r"6.63\times10^{-34}\text{ J}", 0.0),
        (r"1.38\times10^{-23}x", r"6.63\times10^{-34}x", 0.0),
        (r"(1.38\times10^{-23}, 2)", r"(6.63\times10^{-34}, 2)", 0.0),
        (
            r"\begin{pmatrix}0.0000008\\1\end{pmatrix}",
            r"\begin{pmatrix}0.0000012\\1\end{pmatrix}",
            0.0,
        ),
        ("x = 0.0000001", "x = 0", 0.0),
        ("0.0000001", "0", 0.0),
        ("0", "0.0000001", 0.0),
        ("0.0", "0", 1.0),
        ("0.333333", r"\frac13", 1.0),
        ("0.0333333", r"\frac1{30}", 1.0),
        ("0.03333", r"\frac1{30}", 0.0),
        ("(x+1)^2 - 2x - 1", "x^2", 1.0),
    ],
)
def test_math_compares_numbers_relatively(answer, gold, expected):
    assert resolve("math")(["q"], [f"\\boxed{{{answer}}}"], answer=[gold]) == [expected]


MATRIX = r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}"


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("2" + MATRIX, r"\begin{pmatrix}2&4\\6&8\end{pmatrix}", 1.0),
        (r"\begin{pmatrix}2&4\\6&8\end{pmatrix}", "2" + MATRIX, 1.0),
        ("2" + MATRIX, r"\begin{pmatrix}2&4\\6&9\end{pmatrix}", 0.0),
        (MATRIX + "+" + MATRIX, r"\begin{pmatrix}2&4\\6&8\end{pmatrix}", 1.0),
        (MATRIX + MATRIX, r"\begin{pmatrix}7&10\\15&22\end{pmatrix}", 1.0),
        (MATRIX + "^{2}", r"\begin{pmatrix}7&10\\15&22\end{pmatrix}", 1.0),
        (MATRIX + "+ 1", "5", 0.0),
        (r"\begin{pmatrix}1&2\end{pmatrix}\begin{pmatrix}1&2\end{pmatrix}", "5", 0.0),
        (r"32,\! 349", "32349", 1.0),
        ("32349", r"32,\! 349", 1.0),
        (r"1,\!234,\!  567", "1234567", 1.0),
        (r"32,\ 349", "32349", 0.0),
    ],
)
def test_math_reads_matrices_and_spaced_thousands(answer, gold, expected):
    assert resolve("math")(["q"], [f"\\boxed{{{answer}}}"], answer=[gold]) == [expected]


@pytest.mark.parametrize("error", [RecursionError, ZeroDivisionError, AssertionError])
def test_a_failed_comparison_of_math_is_logged_and_worth_0(monkeypatch, caplog, error):
    from jaxrft.rewards import mathematics

    def fail(*args, **options):
        raise error("no end")

    monkeypatch.setattr(mathematics, "verify", fail)
    mathematics._equal.cache_clear()
    mathematics._is_right.cache_clear()
    assert mathematics.math(
        ["q"] * 2, [r"\boxed{f(y)}", r"\boxed{y > 2}"], answer=["g(y)"] * 2
    ) == [0.0, 0.0]
    assert "math cannot compare" in caplog.text and "counts as wrong" in caplog.text


def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {
        "score": float(solution_str == ground_truth + data_source + str(extra_info)),
        "other": 1,
    }


scored = verl(compute_score)
made = functools.partial(exact, answer=["1"])


def test_verl():
    columns = {"answer": ["a", "a"], "data_source": ["b", "b"], "extra_info": [1, 2]}
    assert scored(["q", "q"], ["ab1", "ab1"], **columns) == [1.0, 0.0]
    messages = [[{"role": "assistant", "content": "ab1"}]]
    assert scored(["q"], messages, answer=["a"], data_source=["b"], extra_info=[1]) == [1.0]
    plain = verl(lambda data_source, solution_str, ground_truth, extra_info: 0.25)
    assert plain(["q"], ["x"], answer=["y"]) == [0.25]


def test_functions_are_located_in_their_modules():
    """By their own name; by another one, if their own leads to something else; else not at all."""
    assert resolve(exact) is exact
    assert resolve("jaxrft.rewards.functions:exact") is exact
    assert locate(exact).attribute == "exact"
    assert locate(scored).attribute == "scored"
    assert load(locate(scored)) is scored
    for hidden in (
        lambda prompts, completions: [1.0],
        functools.partial(exact),
        verl(compute_score),
    ):
        with pytest.raises(InputError, match="top level of a module"):
            locate(hidden)


def test_a_path_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "scores_here.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.5]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert resolve("scores_here:score")([], []) == [0.5]


SCORE = "def score(prompts, completions, **columns):\n    return [{}]\n"


def test_a_reward_is_named_by_the_path_of_its_file(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "scores.py").write_text("from half import score\n")
    (tmp_path / "one" / "half.py").write_text(SCORE.format(0.5))
    (tmp_path / "two" / "scores.py").write_text(SCORE.format(1.0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert resolve("one/scores.py:score")([], []) == [0.5]
    assert resolve(f"{tmp_path}/two/scores.py:score")([], []) == [1.0]
    monkeypatch.setenv("SCORES", str(tmp_path / "two"))
    assert locate("$SCORES/scores.py:score").file == str(tmp_path / "two" / "scores.py")


def test_a_reward_next_to_the_config_is_found_from_everywhere(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "scores_beside.py").write_text(SCORE.format(0.25))
    config = Config("model", TasksConfig("a.jsonl"), "run", reward_workers=1)
    monkeypatch.chdir(tmp_path)
    assert search_for_rewards(config, folder) == config
    for name in ("scores_beside:score", "scores_beside.py:score"):
        found = search_for_rewards(replace(config, rewards=(name,)), Path("configs"))
        assert found.reward_path == (str(folder),)
        assert search_for_rewards(found, folder) == found
        monkeypatch.chdir("/")
        with open_rewards(found) as pool:
            assert pool.grade(["q"], ["a"], {}).rewards == [[0.25]]
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere/scores.py:score", "there is no file .*/nowhere/scores.py: correct the path"),
        ("scores.py", "names a file only: give scores.py:FUNCTION"),
        ("no_such_module:score", "put the file next to the config or .* folder/file.py:function"),
        ("maths", "no reward is named 'maths': did you mean math"),
        ("zzz", "exact, gsm8k, .*, number, math or a path package.module:function"),
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("jaxrft.rewards.functions:gsmk", "did you mean gsm8k"),
        ("jaxrft.rewards.functions:_NUMBER", "is not a function"),
    ],
)
def test_unknown_names(name, said):
    with pytest.raises(InputError, match=said):
        resolve(name)


def test_workers_load_without_jax():
    code = (
        "import sys, jaxrft.rewards.worker, jaxrft.rewards.mathematics; assert 'jax' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def sampled(completion_ids, truncated, trainer_state, **kwargs):
    """The sampled tokens as the digits of a number, negative if cut, behind the point how far the
    run is.
    """
    (ids,), (cut,) = completion_ids, truncated
    return [
        (-1.0) ** cut
        * (float("".join(map(str, ids))) + trainer_state.global_step / trainer_state.max_steps)
    ]


def test_rewards_get_the_tokens_that_were_sampled_and_how_far_the_run_is():
    tokens = jnp.array([[3, 1, 4], [1, 5, 0]], jnp.int32)  # the last is padding
    mask = jnp.array([[1, 1, 1], [1, 1, 0]], jnp.float32)
    finished = jnp.array([False, True])
    rollout = Rollout(tokens, jnp.array([3, 2], jnp.int32), mask, mask, mask, finished)
    tasks = SimpleNamespace(prompts=["q"], columns={})
    config = SimpleNamespace(skip_special_tokens=False, rewards=("sampled",))
    lm = SimpleNamespace(tokenizer=tokenizer.load(str(TINY)), eos_ids=(5,))
    with Pool([("sampled", sampled)], workers=1) as pool:
        state = {"global_step": 1, "max_steps": 4}
        rewards = grade_rollout(
            config, lm, rollout, pool, tasks, np.array([0]), trainer_state=state
        )
    assert rewards.rewards.tolist() == [[-314.25], [15.25]]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("1,234", 1.0),
        (" $1234.00\n", 1.0),
        ("-1234", 0.0),
        ("1200 + 34", 0.0),  # the question
        ("1200 + 34 = 1234", 0.0),
        ("1234 1234", 0.0),
        ("", 0.0),
        ("twelve", 0.0),
    ],
)
def test_number_pays_for_one_number_alone(completion, reward):
    assert resolve("number")(["q"], [completion], answer=["1234"]) == [reward]


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("The answer is (B).", "B"),
        (r"Hence $\boxed{\text{B}}$", "B"),
        (r"\boxed{\textbf{(B)}\ 12}", "B"),
        ("Step 1: A is out.\n\nAnswer: B", "B"),
        ("Answer: $B$", "B"),
        ("**Answer:** B) 12 metres", "B"),
        ("So the answer is **B**: copper.", "B"),
        ("Answer: B (copper)", "B"),
        ("Answer: B - copper", "B"),
        ("answer: b", "B"),
        ("Option B is correct.", "B"),
        ("I choose option B", "B"),
        ("By these two, I choose option B.", "B"),
        ("A is too small. So I would pick **B**.", "B"),
        ("A is too small.\n\nTherefore, I choose option (B) copper.", "B"),
        ("I'll go with B) 12 metres.", "B"),
        ("I select option **B**, because A is too small.", "B"),
        ("The correct answer is B because A is too small.", "B"),
        ("Answer: A\nNo, wait.\nAnswer: B", "B"),
        ("<think>A or B?</think>\nB", "B"),
        ("The answer is B.\nA) 1\nB) 2", "B"),
        ("A) 1\nB) 2\n\nAnswer: B", "B"),
        # more than one letter, or none
        ("A, B, C, D", None),
        ("A. B. C. D.", None),
        ("(A) (B) (C) (D)", None),
        ("A\nB\nC\nD", None),
        ("- **A**\n- **B**", None),
        ("A) 1\nB) 2\nC) 3\nD) 4", None),
        ("Answer:\nA) 1\nB) 2\nC) 3\nD) 4", None),
        ("Answer: A or B", None),
        ("Answer: ABCD", None),
        ("Answer: A (B)", None),
        (r"\boxed{A, B}", None),
        ("Answer: not B", None),
        ("I would not choose option B.", None),
        ("If I choose B, it is copper", None),
        ("I choose B or C.", None),
        ("I choose a good one.", None),
        ("None of A, B, C and D.", None),
        ("The answer is a good one.", None),
        ("Answer: " + "B " * 10_000, None),
    ],
)
def test_choice_is_one_letter(completion, letter):
    from jaxrft.rewards.choice import chosen_letter

    assert chosen_letter(completion) == letter


def test_choice_of_a_completion_that_was_cut_must_be_announced():
    columns = {"answer": ["B", "B"], "truncated": [True, True]}
    completions = ["Answer: B\nNow I check it", "It could be A, then\nB"]
    assert resolve("choice")(["q"] * 2, completions, **columns) == [1.0, 0.0]


def test_groups_are_graded_as_they_end():
    """Three groups of two; the last one ends first, and one row of the first group is not graded
    before the other has ended.
    """
    rollout = rollout_of([[3], [1, 4], [2, 2], [4, 1], [1], [2, 3]])
    names = {"q": ["x", "y", "z"]}
    with Pool([("weighed", weighed)], workers=2) as pool:
        grading = grading_of(pool, names)
        early = [[1, 0, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1]]
        for ended in early:
            grading.left(samples_of(rollout, ended))
            grading.wait(lambda: False)
        graded = grading.result(rollout)
        assert grading.result(rollout) is graded  # once
        at_once = grading_of(pool, names).result(rollout)
    assert graded.rewards.tolist() == [[-3], [-14], [-22], [-41], [-1], [-23]]
    assert graded.samples == at_once.samples
    for mine, other in zip(graded[:3], at_once[:3], strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_mistake_that_shows_while_others_are_decoded_is_raised_at_the_end():
    rollout = rollout_of([[3], [1]])
    with Pool([("weighed", weighed)], workers=1) as pool:
        grading = grading_of(pool, {"q": ["x"], "prompts": ["y"]})
        grading.left(samples_of(rollout, [1, 1]))
        with pytest.raises(InputError, match="column prompts has the name of another argument"):
            grading.result(rollout)


def test_pending_rewards_of_an_abandoned_rollout_are_dropped():
    with Pool([("weighed", weighed)], workers=1) as pool:
        given_up = rollout_of([[3], [1]])
        grading_of(pool, {"q": ["x"]}).left(samples_of(given_up, [1, 1]))
        graded = grading_of(pool, {"q": ["x"]}).result(rollout_of([[2], [4]]))
    assert graded.rewards.tolist() == [[-2], [-4]]


def weighed(prompts, completions, *, q, completion_ids, **columns):
    """Less the digits of the tokens."""
    return [-float("".join(map(str, ids))) for ids in completion_ids]


def rollout_of(rows):
    tokens = np.zeros((len(rows), 2), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    mask = (np.arange(2) < lengths[:, None]).astype(np.float32)
    finished = np.ones(len(rows), bool)
    return Rollout(*(jnp.asarray(x) for x in (tokens, lengths, mask, mask, mask, finished)))


def samples_of(rollout, ended):
    return Samples(
        lengths=rollout.lengths,
        ended=jnp.array(ended, bool),
        finished=rollout.finished,
        stop_state=jnp.zeros_like(rollout.lengths),
        tokens=rollout.tokens,
        logprobs=rollout.logprobs,
        sampling_logprobs=rollout.sampling_logprobs,
    )


def grading_of(pool, columns):
    count = len(next(iter(columns.values())))
    return Grading(
        SimpleNamespace(skip_special_tokens=False, rewards=("weighed",)),
        SimpleNamespace(tokenizer=tokenizer.load(str(TINY)), eos_ids=(5,)),
        pool,
        SimpleNamespace(prompts=["?"] * count, columns=columns),
        np.arange(count),
    )


def test_a_function_made_by_a_call_is_located_in_its_module():
    """As TRL's `get_soft_overlong_punishment(100, 20)` at the top level of a module; here of this
    one.
    """
    assert locate(made).attribute == "made" and load(locate(made)) is made
