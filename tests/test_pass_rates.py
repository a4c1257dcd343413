"""Pass rates of a policy as a column of its tasks: right, the same after any interruption, joined
by task.
"""

import hashlib
import shutil
from collections import Counter

import graders
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrft import cli
from jaxrft.config import MeshConfig, TasksConfig
from jaxrft.lm.policy import fingerprint
from jaxrft.prepare import pass_rates, task_files
from jaxrft.prepare.journal import Journal
from jaxrft.tasks import sources
from jaxrft.tasks import table as tables
from jaxrft.types import InputError

LONG = "1" * 65  # a token more than a prompt may have
SAMPLES = 4


def rows():
    """Eighteen tasks of several lengths, the last two of which can have no pass rate."""
    further = [
        {"prompt": "7" * n + "=", "answer": "0123456", "weak": None, "strong": 0.5} for n in (3, 20)
    ]
    return [
        *helpers.task_rows(14),
        *further,
        {"prompt": LONG, "answer": "1"},
        {"prompt": "0=", "answer": None},
    ]


@pytest.fixture(scope="module")
def prepare(configure, world, tmp_path_factory):
    """(**changes) -> the config of a few batches of the policy `weaker`; its source is a file of
    `rows`.
    """
    source = helpers.write_rows(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", rows())
    # a folder of its own: a process that takes tests from another one makes this fixture twice
    weaker = tmp_path_factory.mktemp("models") / "weaker"
    weaker.symlink_to(world / "policy")
    settings = {
        "output_dir": "nowhere",
        "model": str(weaker),
        "tasks": TasksConfig(source),
    }
    settings |= {"batch_size": 4, "rewards": ("graders:unsure",)}
    return lambda **changes: configure(**settings | changes)


@pytest.fixture(scope="module")
def rates(prepare, tmp_path_factory):
    """(file of an uninterrupted run, where the grader noted what it was asked)."""
    folder = tmp_path_factory.mktemp("rates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORD", str(folder / "graded.txt"))
        assert pass_rates.measure(prepare(), folder / "rates.parquet")
    assert sorted(path.name for path in folder.iterdir()) == ["graded.txt", "rates.parquet"]
    return folder / "rates.parquet", folder / "graded.txt"


def completions(record):
    """Prompt -> its completions, in the order in which they were graded."""
    found = {}
    for line in record.read_text().splitlines():
        prompt, _, text = line.partition(" ")
        found.setdefault(prompt, []).append(text)
    return found


def columns(path):
    return pyarrow.parquet.read_table(path).to_pydict()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command(path, config, out, *flags, **environment):
    """`jaxrft prepare pass-rates` in a process of its own, which graders find through its
    journal.
    """
    file = helpers.write_config(path / "config.py", config)
    environment |= {"LOG": f"{out}.partial"}
    return helpers.jaxrft("prepare", "pass-rates", file, "--out", out, *flags, **environment)


def test_a_pass_rate_is_the_share_of_samples_that_succeed(rates):
    out, graded = rates[0], completions(rates[1])
    found = columns(out)
    assert found["prompt"] == [row["prompt"] for row in rows()]
    entries = zip(
        found["prompt"],
        found["answer"],
        found["weaker_pass_rate"],
        found["weaker_trials"],
        strict=True,
    )
    for prompt, answer, rate, trials in entries:
        if prompt == LONG or answer is None:
            assert rate is None and trials == 0 and (prompt in graded) == (answer is None)
        else:
            scores = graders.starts(
                [prompt] * len(graded[prompt]),
                graded[prompt],
                answer=[answer] * len(graded[prompt]),
            )
            assert rate == np.mean(scores) and trials == SAMPLES
    assert len(set(found["weaker_pass_rate"])) > 3


def test_the_columns_of_the_source_stay(rates):
    found = columns(rates[0])
    assert list(found) == [
        "prompt",
        "answer",
        "weak",
        "strong",
        "weaker_pass_rate",
        "weaker_trials",
    ]
    for name in ("prompt", "answer", "weak", "strong"):
        assert found[name] == [row.get(name) for row in rows()]


def test_the_file_is_a_source_of_tasks_with_reference_pass_rates(rates):
    found = sources.load(TasksConfig(str(rates[0]), pass_rate_columns=("weak", "weaker_pass_rate")))
    assert found.prompts == [row["prompt"] for row in rows()]
    wanted = [columns(rates[0])[name] for name in ("weak", "weaker_pass_rate")]
    np.testing.assert_array_equal(found.reference_pass_rates, np.array(wanted, np.float32).T)


@pytest.mark.slow
def test_killed_then_told_to_stop_it_writes_the_same_file(prepare, rates, tmp_path):
    out, record = tmp_path / "rates.parquet", tmp_path / "graded.txt"
    journal, sent = tmp_path / "rates.parquet.partial", tmp_path / "rates.parquet.partial.sent"
    # one batch is in the journal when the grader, in the next one, kills the process
    code, _, errors = command(tmp_path, prepare(), out, SEND="SIGKILL", LINES=2, RECORD=record)
    assert code == -9, errors
    assert len(journal.read_text().splitlines()) == 2 and not out.exists()
    sent.unlink()
    with journal.open("a") as file:
        file.write("[3, [[1.0, 2")  # as a kill in the middle of a write leaves it
    # the batch in hand is the fourth
    code, said, errors = command(tmp_path, prepare(), out, SEND="SIGTERM", LINES=4, RECORD=record)
    assert code == 143 and "stopped by a signal" in said, errors
    assert len(journal.read_text().splitlines()) == 5 and not out.exists()
    sent.unlink()
    code, said, errors = command(tmp_path, prepare(), out, RECORD=record)
    assert code == 0 and "resuming after 4 of 5 batches" in said, errors
    assert digest(out) == digest(rates[0])
    assert [path.name for path in tmp_path.glob("rates*")] == ["rates.parquet"]
    order = sorted(completions(rates[1]), key=len, reverse=True)  # longest first, batches of 4
    for number in (0, 3):  # no kill came while these were at hand
        for prompt in order[4 * number : 4 * number + 4]:
            assert len(completions(record)[prompt]) == SAMPLES, prompt


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(prepare, rates, tmp_path):
    path = helpers.write_config(tmp_path / "config.py", prepare(mesh=MeshConfig()))
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{helpers.free_port()}",
        "JAX_NUM_PROCESSES": 2,
    }
    processes = [
        helpers.start(
            *(
                "-m",
                "jaxrft",
                "prepare",
                "pass-rates",
                path,
                "--out",
                tmp_path / "rates.parquet",
                "--distributed",
            ),
            devices=1,
            JAX_PROCESS_ID=index,
            RECORD=tmp_path / f"graded{index}.txt",
            **variables,
        )
        for index in range(2)
    ]
    for code, _, errors in helpers.finish(*processes):
        assert code == 0, errors
    assert digest(tmp_path / "rates.parquet") == digest(rates[0])
    records = rates[1], tmp_path / "graded0.txt", tmp_path / "graded1.txt"
    whole, first, second = (Counter(record.read_text().splitlines()) for record in records)
    assert first + second == whole and first.total() == second.total()


@pytest.fixture(scope="module")
def stronger(prepare, rates, tmp_path_factory):
    """A config of the same tasks in reverse, which the policy `stronger` solves."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "stronger").mkdir()
    model = helpers.write_policy(folder / "stronger", helpers.SHAPE._replace(intermediate_size=16))
    return prepare(
        model=model, tasks=TasksConfig(helpers.write_rows(folder / "tasks.jsonl", rows()[::-1]))
    )


@pytest.fixture(scope="module")
def others(stronger, tmp_path_factory):
    """The file of the policy `stronger`."""
    out = tmp_path_factory.mktemp("others") / "others.parquet"
    assert pass_rates.measure(stronger, out)
    return out


def test_a_second_policy_joins_the_file_of_the_first(stronger, rates, others, tmp_path):
    out = tmp_path / "rates.parquet"
    shutil.copy(rates[0], out)
    assert pass_rates.measure(stronger, out)
    found, first, second = columns(out), columns(rates[0]), columns(others)
    assert list(found) == [*first, "stronger_pass_rate", "stronger_trials"]
    assert {name: found[name] for name in first} == first
    assert (
        found["stronger_pass_rate"]
        == second["stronger_pass_rate"][::-1]
        != first["weaker_pass_rate"]
    )


def test_files_made_apart_are_put_together(prepare, stronger, rates, others, tmp_path):
    out, again = tmp_path / "both.parquet", tmp_path / "again.parquet"
    assert pass_rates.run(
        pass_rates.Options(prepare(), str(out), merge=(str(rates[0]), str(others)))
    )
    shutil.copy(rates[0], again)
    pass_rates.merge(stronger, again, (str(others),))
    pass_rates.merge(stronger, again, (str(others),))  # what is the same in both is no conflict
    assert columns(out) == columns(again)
    assert list(columns(out))[-4:] == [
        "weaker_pass_rate",
        "weaker_trials",
        "stronger_pass_rate",
        "stronger_trials",
    ]


def test_tasks_that_occur_twice_keep_their_own_values(tmp_path):
    first, second = ({"prompt": "1", "answer": "2"}, {"prompt": "3", "answer": "4"})
    one = helpers.write_rows(tmp_path / "one.jsonl", [first, second, first])
    two = [second | {"a": 0.2}, first | {"a": 0.0}, first | {"a": 0.1}]
    two = helpers.write_rows(tmp_path / "two.jsonl", two)
    joined = task_files.join(*(task_files.load(TasksConfig(source)) for source in (one, two)))
    assert joined.table.column("a").to_pylist() == [0.0, 0.2, 0.1]


def test_each_set_of_a_mixture_gets_a_file(prepare, rates, tmp_path):
    halves = [rows()[:8], rows()[8:16]]
    sets = [
        helpers.write_rows(tmp_path / f"{name}.jsonl", half)
        for name, half in zip("ab", halves, strict=True)
    ]
    config = prepare(
        tasks=tuple(TasksConfig(source, weight=1.0 + (source == sets[0])) for source in sets)
    )
    with pytest.raises(InputError, match="rates.parquet: tasks is a mixture, so give a folder"):
        pass_rates.measure(config, tmp_path / "rates.parquet")
    with pytest.raises(InputError, match="tasks is a mixture of a, b: give a config of one"):
        pass_rates.merge(config, tmp_path / "rates", (str(rates[0]),))
    assert pass_rates.measure(config, tmp_path / "rates")
    assert sorted(path.name for path in (tmp_path / "rates").iterdir()) == [
        "a.parquet",
        "b.parquet",
    ]
    first, second = (columns(tmp_path / "rates" / f"{name}.parquet") for name in "ab")
    assert first["prompt"] + second["prompt"] == [row["prompt"] for row in rows()[:16]]
    # the same rows of their source
    assert first["weaker_pass_rate"] == columns(rates[0])["weaker_pass_rate"][:8]


def test_a_column_is_replaced_only_if_asked_for(prepare, rates, tmp_path):
    out = tmp_path / "rates.parquet"
    shutil.copy(rates[0], out)
    with pytest.raises(
        InputError,
        match="has a column weaker_pass_rate already: give another --name, or --overwrite",
    ):
        pass_rates.measure(prepare(), out)
    assert digest(out) == digest(rates[0])
    task_files.write(out, changed(rates[0]))
    assert pass_rates.measure(prepare(), out, overwrite=True)
    assert digest(out) == digest(rates[0])


def test_neither_a_users_column_nor_an_empty_journal_opens_the_way(prepare, rates, tmp_path):
    out, journal = tmp_path / "rates.parquet", tmp_path / "rates.parquet.partial"
    task_files.write(out, pyarrow.parquet.read_table(rates[0]).drop_columns("weaker_pass_rate"))
    assert "has a column weaker_trials already: give another --name" in refusal(prepare(), out)
    shutil.copy(rates[0], out)
    # of a process that was killed in its first batch
    journal.write_text('{"column": "weaker_pass_rate"}\n')
    assert "has a column weaker_pass_rate already: give another --name" in refusal(prepare(), out)
    assert digest(out) == digest(rates[0])


@pytest.mark.parametrize(
    "lines", ["5\n6\n", "{}\n5\n", '{}\n{"a": 1}\n', '{}\n["0", 1]\n', "[0, 1]\n", "{}\n[[0], 1]\n"]
)
def test_a_file_that_is_no_journal_is_left_alone(lines, tmp_path):
    path = tmp_path / "rates.parquet.partial"
    path.write_text(lines)
    with pytest.raises(
        InputError, match="rates.parquet.partial is not the journal of a command: move it away"
    ):
        Journal(path, {})
    assert path.read_text() == lines


def changed(path):
    """The tasks of a file with other pass rates."""
    return pyarrow.parquet.read_table(path).set_column(
        4, "weaker_pass_rate", pyarrow.array([0.5] * 18)
    )


def test_merging_refuses_two_values_of_one_column(prepare, rates, tmp_path):
    out = tmp_path / "rates.parquet"
    task_files.write(out, changed(rates[0]))
    with pytest.raises(
        InputError, match="different values in the column weaker_pass_rate: .* --overwrite"
    ):
        pass_rates.merge(prepare(), out, (str(rates[0]),))
    pass_rates.merge(prepare(), out, (str(rates[0]),), overwrite=True)
    assert digest(out) == digest(rates[0])


def refusal(config, out):
    """The sentence with which it ends."""
    with pytest.raises(InputError) as error:
        pass_rates.measure(config, out)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rewards": ("graders:nothing",)}, "defines no 'nothing'"),
        (
            {"rewards": ("graders:zero", "graders:three"), "success_reward": "graders:three"},
            "three gave 3",
        ),
        ({"rewards": ("graders:broken",)}, "no completion of the first batch got a reward"),
        ({"model": "nowhere"}, "no folder nowhere"),
        ({"batch_size": 6}, "batch_size 6 does not divide"),
        ({"tasks": TasksConfig("builtin:digits", prompt_column="question")}, "no column question"),
        ({"max_prompt_length": 1}, "no prompt of tasks is short enough"),
    ],
)
def test_a_mistake_leaves_no_files(changes, wanted, prepare, tmp_path):
    assert wanted in refusal(prepare(**changes), tmp_path / "rates.parquet")
    assert not list(tmp_path.iterdir())


def test_tasks_without_ground_truths_are_refused(prepare, tmp_path):
    tasks = TasksConfig(helpers.write_rows(tmp_path / "tasks.jsonl", [{"prompt": "1+1="}] * 8))
    assert ("exact needs ground truths") in refusal(
        prepare(tasks=tasks, rewards=("exact",)), tmp_path / "a.parquet"
    )


def test_a_column_that_parquet_cannot_hold_is_refused(prepare, tmp_path):
    for answers in ((1, "two"), (1, 10**30)):
        mixed = [{"prompt": "1", "answer": answer} for answer in answers]
        tasks = TasksConfig(helpers.write_rows(tmp_path / "tasks.jsonl", mixed))
        assert ("parquet cannot hold the column answer") in refusal(
            prepare(tasks=tasks), tmp_path / "a.parquet"
        )


def test_no_file_is_written_outside_of_the_folder_of_a_mixture(prepare, tmp_path):
    sets = [TasksConfig(prepare().task_sets[0].source, name=name) for name in ("a", "../b")]
    said = refusal(prepare(tasks=tuple(sets)), tmp_path / "rates")
    assert (
        "the set '../b' gives its name to a file, which cannot contain /: give it another" in said
    )
    assert not list(tmp_path.iterdir())


def test_other_tasks_than_those_of_the_file_are_refused(prepare, rates, tmp_path):
    out = tmp_path / "rates.parquet"
    shutil.copy(rates[0], out)
    tasks = TasksConfig(helpers.write_rows(tmp_path / "tasks.jsonl", rows()[:9]))
    said = refusal(prepare(tasks=tasks), out)
    assert "holds other tasks than" in said and "9 of its 18 are among the other's 9" in said
    assert digest(out) == digest(rates[0]) and not (tmp_path / "rates.parquet.partial").exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"temperature": 0.5}, "its temperature is 1.0, that of this command is 0.5"),
        ({"num_generations": 8}, "its num_generations is 4, that of this command is 8"),
        (
            {"model": None},
            "its column is 'weaker_pass_rate', that of this command is 'stronger_pass_rate'",
        ),
    ],
)
def test_journal_of_another_job_is_refused_and_the_difference_named(
    changes, wanted, prepare, stronger, monkeypatch, tmp_path
):
    out = tmp_path / "rates.parquet"
    monkeypatch.setattr(
        pass_rates, "roll_out", lambda job, journal, _: journal.add(0, [[1.0] * 4, [4] * 4])
    )
    assert not pass_rates.measure(prepare(), out)
    before = helpers.contents(tmp_path)
    changes = changes | ({"model": stronger.model} if "model" in changes else {})
    assert (f"{out}.partial holds the beginning of other work: {wanted}") in refusal(
        prepare(**changes), out
    )
    assert helpers.contents(tmp_path) == before


def test_a_column_is_named_after_its_model(tmp_path):
    (tmp_path / "a@b").mkdir()
    models = (
        "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen2.5-0.5B@v1",
        "runs/weak/policy",
        "a/tiny/",
        str(tmp_path / "a@b"),
    )
    names = [pass_rates.column_of(model).removesuffix("_pass_rate") for model in models]
    assert names == ["Qwen2.5-0.5B", "Qwen2.5-0.5B", "weak", "tiny", "a@b"]


def test_batches_hold_every_task_once_the_longest_first():
    lengths = np.array([3, 9, 3, 7, 9], np.int32)
    assert [part.tolist() for part in tables.batches(lengths, 2)] == [[1, 4], [3, 0], [2]]


def test_a_fingerprint_is_that_of_the_values_alone(mesh):
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    where = [P(), P("data"), P(("data", "fsdp"), "model")]
    same = {
        fingerprint({"a": jax.device_put(values, NamedSharding(mesh, spec))}, mesh)
        for spec in where
    }
    assert len(same) == 1
    swapped = values.copy()
    swapped[0, 0], swapped[0, 1] = values[0, 1], values[0, 0]
    for other in (swapped, values.T.copy(), values.astype(jnp.bfloat16)):
        assert fingerprint({"a": other}, mesh) not in same


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["prepare", "pass-rate"],
            "jaxrft prepare makes dataset, pass-rates, embeddings, predictor, not",
        ),
        (["prepare", "pass-rates"], "no config given: jaxrft prepare pass-rates CONFIG"),
    ],
)
def test_a_mistake_in_the_command(arguments, wanted, capsys):
    assert cli.main(arguments) == 2
    assert wanted in capsys.readouterr().err
