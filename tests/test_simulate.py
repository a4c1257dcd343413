import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import cli, simulate
from jaxrft.select import selectors
from jaxrft.select.dots import training
from jaxrft.select.dots.predictor import Origin, Predictor, save_predictor
from jaxrft.select.reference_groups import batch_size_index, batch_sizes
from jaxrft.simulate import command, trials, worlds
from jaxrft.types import Choice, Feedback, InputError

REAL = Path(__file__).parents[2] / "shared" / "data" / "responses_gsm8k.npz"
KEY = jax.random.key(0)


def matrix(policies=1000, num_tasks=40, seed=0):
    """Answers of policies whose ability rises with the row to tasks of even difficulty."""
    rng = np.random.default_rng(seed)
    logits = np.linspace(-3, 3, policies)[:, None] - np.linspace(-4, 4, num_tasks)
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int8)


def world_of(table, **options):
    return simulate.replay(worlds.Responses(table), **{"steps": 11, "num_generations": 4} | options)


def test_a_replayed_policy_is_the_window_around_its_quantile():
    table = matrix(100, 6)  # the window holds 4 of 100 rows
    world = world_of(table)
    for step, first in ((0, 13), (5, 48), (10, 83)):
        np.testing.assert_allclose(
            world.pass_rates((), step), table[first : first + 4].mean(axis=0), rtol=1e-6
        )
    tasks, _ = world.init(KEY)
    np.testing.assert_allclose(
        tasks.reference_pass_rates[:, 1], table[36:100].mean(axis=0), rtol=1e-6
    )
    np.testing.assert_allclose(
        tasks.reference_pass_rates[:, 0], table[0:64].mean(axis=0), rtol=1e-6
    )


def test_rollouts_are_drawn_without_replacement_and_missing_answers_left_out():
    table = matrix(100, 6)
    table[13:15, 2] = -1
    table[13:17, 3] = -1
    world, ids = world_of(table), jnp.array([5, 3, 2])
    found = world.roll_out(KEY, (), 0, ids)
    assert found.trials.tolist() == [4, 0, 2]  # all of the window
    assert found.successes.tolist() == [table[13:17, 5].sum(), 0, table[15:17, 2].sum()]
    rates = world.pass_rates((), 0)
    assert np.isnan(rates[3]) and rates[2] == table[15:17, 2].mean()
    # 10 of 40 rows: hypergeometric, narrower than binomial
    few = world_of(matrix(1000, 6), num_generations=10)
    keys = jax.random.split(KEY, 4000)
    draw = jax.jit(jax.vmap(lambda key: few.roll_out(key, (), 5, jnp.array([3])).successes[0]))
    counts = draw(keys)
    rate = float(few.pass_rates((), 5)[3])
    assert float(counts.mean()) == pytest.approx(10 * rate, abs=0.1)
    assert float(counts.var()) == pytest.approx(10 * rate * (1 - rate) * 30 / 39, rel=0.1)


@pytest.mark.parametrize("domain", [None, np.array(list("abcdabcd"))])
def test_every_domain_has_its_schedule(domain):
    # the window's place shows
    table = np.repeat((np.arange(1000) >= 500).astype(np.int8)[:, None], 8, axis=1)
    data = worlds.Responses(table, domain=domain)
    world = simulate.replay(
        data, steps=11, num_generations=4, schedule=("up", "still", "down", "jump")
    )
    rates = np.array([world.pass_rates((), step) for step in (0, 4, 5, 10)])
    assert np.array_equal(rates[:, :4], rates[:, 4:])
    assert rates[:, :4].tolist() == [
        [0, 0.5, 1, 0],
        [0, 0.5, 1, 0],
        [0.5, 0.5, 0.5, 1],
        [1, 0.5, 0, 1],
    ]


def test_a_student_learns_by_hand():
    config = simulate.StudentConfig(tasks=4, skills=2, rate=0.1, transfer=0.5, forgetting=0.01)
    world = simulate.students(config, num_generations=8)
    student = worlds.Student(
        jnp.zeros(2), jnp.array([0.0, 1.0, 2.0, jnp.inf]), jnp.array([0, 1, 0, 1])
    )
    assert world.pass_rates(student, 0).tolist() == pytest.approx(
        [0.5, 0.268941, 0.119203, 0], abs=1e-6
    )
    # 4 v = 1 and 3/4 on skill 0, where a task of its own counts 0.5 + 0.5 * 2 and another 0.5
    feedback = Feedback(
        jnp.array([0, 2]), jnp.array([4.0, 2.0]), jnp.array([8.0, 8.0]), jnp.zeros(2)
    )
    after = world.learn(KEY, student, feedback).ability
    assert after.tolist() == pytest.approx(
        [0.1 * 1.5 * 0.875 - 0.01, 0.1 * 0.5 * 0.875 - 0.01], abs=1e-6
    )


def test_references_and_embeddings_follow_their_options():
    def tasks_of(**changes):
        world = simulate.students(simulate.StudentConfig(tasks=500, **changes), num_generations=8)
        tasks, state = world.init(KEY)
        return tasks, world.pass_rates(state, 0)

    def correlation(x, y):
        return float(np.corrcoef(x, y)[0, 1])

    for name, expected in (("good", 0.5), ("anti", -0.2)):
        tasks, truth = tasks_of(references=name)
        assert correlation(tasks.reference_pass_rates[:, 0], truth) * np.sign(expected) > abs(
            expected
        )
    assert np.array_equal(np.unique(tasks_of(references="zero")[0].reference_pass_rates), [0])
    assert tasks_of(references="none", width=0)[0][:2] == (None, None)
    for signal, low, high in ((0.0, 0.0, 0.2), (1.0, 0.8, 1.0)):
        tasks, truth = tasks_of(signal=signal, unsolvable=0.0)
        logit = np.log(truth) - np.log1p(-truth)
        weights = np.linalg.lstsq(tasks.embeddings[:250], logit[:250] + 2, rcond=None)[0]
        assert low <= max(correlation(tasks.embeddings[250:] @ weights, logit[250:]), 0.0) <= high


def test_noise_teaches_nothing():
    """Coins that fall as they like, and an ability that goes nowhere, by the steps that true
    rewards would make.
    """
    world = simulate.students(
        simulate.StudentConfig(skills=1, rate=0.1, rewards="noise"), num_generations=8
    )
    student = worlds.Student(jnp.zeros(1), jnp.full(200, jnp.inf), jnp.zeros(200, jnp.int32))
    feedback = world.roll_out(KEY, student, 0, jnp.arange(200))
    assert abs(float(feedback.successes.mean()) - 4) < 0.5
    half = Feedback(jnp.array([0]), jnp.array([4.0]), jnp.array([8.0]), jnp.zeros(1))
    moved = jax.vmap(lambda key: world.learn(key, student, half).ability)(
        jax.random.split(KEY, 2000)
    )
    assert abs(float(moved.mean())) < 0.01 and abs(float(moved.std()) - 0.1) < 0.01


def test_coverage_by_hand():
    ids = np.repeat([[0, 1], [2, 3], [2, 4]], (9, 1, 49), axis=0)
    assert trials.coverage(ids, np.ones_like(ids, bool), 10) == pytest.approx(0.3)
    assert trials.coverage(ids, ids != 4, 10) == pytest.approx(0.2)


def test_beliefs_are_scored_before_the_update():
    table = np.tile(np.array([0, 1] * 3, np.int8), (100, 1))
    world = world_of(table)
    counting = selectors.Selector(
        init=lambda tasks, num_tasks: jnp.zeros(num_tasks),
        select=lambda key, state, tasks, *, batch_size: (Choice(jnp.arange(2), state[:2]), state),
        update=lambda state, tasks, feedback: state.at[feedback.ids].set(
            feedback.successes / feedback.trials
        ),
        pass_rate=lambda state, tasks: state,
    )
    trace = trials.run(world, counting, 2, 3, batch_size=2)
    np.testing.assert_allclose(trace.squared_error, [[3 / 6, 2 / 6, 2 / 6]] * 2, rtol=1e-6)
    assert trace.believed.tolist() == [[[0, 0], [0, 1], [0, 1]]] * 2
    assert not trace.informative.any() and trace.ids.shape == (2, 3, 2)


@pytest.mark.slow
def test_reference_groups_are_counted_and_informative_ones_trained_on():
    params = training.initial(KEY, 6, width=8, layers=1)
    world = simulate.students(
        simulate.StudentConfig(tasks=24, width=6, difficulty=0.0), num_generations=8
    )

    selector = selectors.dots(8, predictor=params, num_references=12, temperature=0.1)
    trace = trials.run(world, selector, 3, 4, batch_size=8, predictor=params)
    assert trace.rolled[:, :, 8:].all(axis=2).tolist() == [[True, False] * 2] * 3
    informative = trace.informative[:, :, 8:].sum(axis=2)
    fresh = [
        [batch_sizes(8)[batch_size_index(8, count)] for count in row]
        for row in informative.tolist()
    ]
    assert trace.rolled[:, :, :8].sum(axis=2).tolist() == fresh and (informative[:, ::2] > 2).all()
    for ids, rolled, taught in zip(
        *(x.reshape(-1, 20) for x in (trace.ids, trace.rolled, trace.informative)), strict=True
    ):
        assert len(set(ids[:8].tolist())) == 8
        assert set(ids[:8][~rolled[:8]].tolist()) <= set(ids[8:][taught[8:]].tolist())
    np.testing.assert_array_equal(
        trials.scores(trace, 24)["groups"], np.sum(fresh, axis=1) + 2 * 12
    )


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real response matrix is not here")
def test_published_figures_on_real_responses():
    uniform, bots, adaptive = command.simulate(command.SimulateConfig(responses=str(REAL)))[1]
    assert uniform["effective_group_ratio"] == pytest.approx(0.704, abs=0.02)
    assert bots["effective_group_ratio"] == pytest.approx(0.887, abs=0.02)
    assert (uniform["mse"], bots["mse"]) == pytest.approx((0.018, 0.023), abs=0.003)
    assert (
        adaptive["effective_group_ratio"] > 0.92
        and adaptive["mse"] < 0.020
        and adaptive["coverage"] > 0.55
    )


@pytest.fixture
def file(tmp_path):
    """A file of answers with embeddings and domains."""
    np.savez(
        tmp_path / "answers.npz",
        responses=matrix(500),
        embeddings=np.ones((40, 3), np.float16),
        domain=np.arange(40) % 2,
    )
    return str(tmp_path / "answers.npz")


def test_the_command_prints_a_row_a_selector(file, tmp_path, capsys):
    flags = ["--steps", "30", "--seeds", "3", "--batch-size", "4", "--num-generations", "8"]
    replayed = ["simulate", "--responses", file, "--schedule", "up,still", *flags]
    assert (
        cli.main(
            [
                *replayed,
                "--json",
                "--selectors",
                "bots",
                "uniform",
                "--plot",
                str(tmp_path / "a.png"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [row["selector"] for row in rows] == ["bots", "uniform"]
    steps = [line for line in shown.err.splitlines() if "compiled" not in line]
    assert steps[0] == "simulating bots ..." and "simulating uniform ..." in steps
    assert steps[-1].startswith("selector 2/2")
    for row in rows:
        assert list(row) == ["selector", *command.FIGURES, "ci95"]
        assert all(
            row["ci95"][name][0] <= row[name] <= row["ci95"][name][1] for name in command.FIGURES
        )
    assert rows[0]["effective_group_ratio"] > rows[1]["effective_group_ratio"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


FEW = [
    *("--steps", "4", "--seeds", "2", "--batch-size", "4", "--num-generations", "8"),
    "--select.num-references=8",
]


@pytest.fixture
def simulate_dots(file, tmp_path):
    """(width of the embeddings of a new predictor) -> exit code of the command with it."""

    def run(width):
        params = training.initial(KEY, width, width=4, layers=1)
        predictor = Predictor(params, "group_logit_temp", 1.0, None, Origin("answers", width))
        path = str(tmp_path / "predictor.safetensors")
        save_predictor(path, predictor)
        compared = ["--selectors", "dots", "bots", "--json", "--predictor", path]
        return cli.main(["simulate", "--responses", file, *FEW, *compared])

    return run


@pytest.mark.slow
def test_dots_on_responses_with_embeddings(simulate_dots, capsys):
    assert simulate_dots(3) == 0
    dots, bots = json.loads(capsys.readouterr().out)
    assert bots["groups"] == 4 * 4 and 2 * 8 + 2 * 4 + 2 <= dots["groups"] <= 2 * 8 + 4 * 4
    assert dots["mse"] < 0.5


def test_a_predictor_of_other_embeddings_is_refused(simulate_dots, capsys):
    assert simulate_dots(5) == 2
    assert (
        "embeddings have shape (40, 3): the predictor was trained on [N, 5]"
    ) in capsys.readouterr().err


def test_students_report_their_ability(capsys):
    flags = [
        "--steps",
        "3",
        "--seeds",
        "1",
        "--students.tasks",
        "50",
        "--students.references",
        "none",
    ]
    assert cli.main(["simulate", *flags, "--selectors", "uniform"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "ability" and [line.split()[0] for line in lines] == ["uniform"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--responses", "nowhere.npz"], "no file nowhere.npz"),
        (["--schedule", "up", "down", "jump"], "3 schedules for 2 domains"),
        (["--schedule", "left"], "no schedule 'left': choose one of up, still, down, jump"),
        (
            ["--num-generations", "30"],
            "num_generations is 30 but a window holds 20 of the 500 policies",
        ),
        (["--selectors", "bot"], "did you mean bots?"),
        (["--selectors", "dots"], "the selector dots needs a file of `jaxrft prepare predictor`"),
        (
            ["--selectors", "dots", "--predictor", "nowhere.safetensors"],
            "no file nowhere.safetensors",
        ),
        (["--batch-size", "41"], "batch_size is 41 but there are 40 tasks"),
        (["--begin", "1.5"], "begin is 1.5"),
        (["--plot", "nowhere/a.png"], "cannot be written to nowhere/a.png"),
        (
            ["--plot", "a.foo"],
            "cannot be written to a.foo: name a file that ends in .png, .svg or .pdf",
        ),
        (["--plot", "/tmp"], "cannot be written to /tmp: name a file"),
        (["--selectors"], "selectors are none: name some of uniform"),
        (["--selectors", ""], "selectors are none: name some of uniform"),
        (["--selectors", ",,"], "selectors are none: name some of uniform"),
        (
            ["--selectors", "uniform,"],
            "selectors are 'uniform,': a name is missing next to a comma",
        ),
        (
            ["--selectors", "uniform", ""],
            "selectors are 'uniform ': a name is missing next to a comma",
        ),
        (
            ["--selectors", "uniform", "bots,uniform"],
            "selectors are 'uniform,bots,uniform': name uniform once",
        ),
        (["--selectors", "uniform", "bot"], "no selector 'bot': did you mean bots?"),
        (["--schedule", ""], "schedules are none: name some of up, still, down, jump"),
        (["--schedule"], "schedules are none: name some of up, still, down, jump"),
        (["--schedule", "up,,down"], "schedules are 'up,,down': a name is missing next to a comma"),
        (["--schedule", "stil"], "no schedule 'stil': did you mean still? (up, still, down, jump)"),
        (["--seeds", "0"], "seeds is 0: it must be at least 1"),
        (["--seeds", "-3"], "seeds is -3: it must be at least 1"),
        (["--steps", "2000000000"], "groups, all of which are held in memory: lower one of them"),
    ],
)
def test_a_mistake_is_one_sentence(file, flags, message, capsys):
    short = ["--steps", "2", "--seeds", "1", "--selectors", "uniform", "bots"]
    assert cli.main(["simulate", *short, "--responses", file, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--students.references", "none"],
            "students.references is none, but bots needs them: leave it out",
        ),
        (
            ["--schedule", "down"],
            "schedule is an option of a replayed policy, but --responses is missing",
        ),
        (["--end", "0.5"], "end is an option of a replayed policy"),
        (
            ["--select.name", "dots"],
            "select.name is an option of training, but here selectors are named with --selectors",
        ),
        (
            ["--select.embeddings", "policy"],
            "select.embeddings is an option of training, but here the world has its own: leave",
        ),
    ],
)
def test_a_mistake_about_students_is_one_sentence(flags, message, capsys):
    assert cli.main(["simulate", "--steps", "2", "--seeds", "1", *flags]) == 2
    assert message in capsys.readouterr().err


class Trap:
    """Something that leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_responses_that_unpack_to_more_than_memory_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", responses=np.zeros((2000, 2000), np.int8))
    monkeypatch.setattr("jaxrft.tasks.memory.available", lambda: 4_000_000)
    with pytest.raises(
        InputError,
        match="a.npz unpacks to more than 0.00 GiB, .*: give fewer tasks or policies, or",
    ):
        worlds.load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "values",
    [
        {"difficulty": float("nan")},
        {"spread": float("inf")},
        {"rate": 1e30},
        {"tasks": 10**12},
        {"skills": 10**9},
    ]
    + [
        {"width": 10**9},
        {"forgetting": -1.0},
        {"unsolvable": float("nan")},
        {"references": ""},
        {"rewards": "x"},
    ],
)
def test_invalid_students_are_refused(values):
    with pytest.raises(InputError, match=f"students.{next(iter(values))} is .*: it must be "):
        simulate.students(simulate.StudentConfig(**values), num_generations=8)


def test_a_file_that_does_not_fit_is_named(tmp_path):
    def problem(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(InputError) as caught:
            worlds.load(str(tmp_path / "a.npz"))
        return str(caught.value)

    assert "no array `responses`" in problem(answers=np.ones(3))
    assert "1 right, 0 wrong, -1 missing" in problem(responses=np.full((3, 2), 0.5))
    assert "1 right, 0 wrong, -1 missing" in problem(responses=np.full((3, 2), -1))
    assert "`domain` of" in problem(responses=np.ones((3, 2)), domain=np.ones(3))
    assert "give numbers" in problem(responses=np.ones((3, 2)), embeddings=np.array([["a"], ["b"]]))
    assert "1 right, 0 wrong, -1 missing" in problem(responses=np.full((3, 2), np.nan))
    assert "1 right, 0 wrong, -1 missing" in problem(responses=np.full((3, 2), "1"))
    assert "1 right, 0 wrong, -1 missing" in problem(responses=np.full((3, 2), 1j))
    assert "1 right, 0 wrong, -1 missing" in problem(responses=np.zeros((3, 0)))
    assert "not all finite" in problem(
        responses=np.ones((3, 2)), embeddings=np.full((2, 4), np.nan)
    )
    assert "not all finite" in problem(responses=np.ones((3, 2)), embeddings=np.full((2, 4), 1e300))
    assert "not all finite" in problem(
        responses=np.ones((3, 2)), embeddings=np.full((2, 4), np.inf, np.float16)
    )
    assert ("cannot be read as an .npz") in problem(
        responses=np.full((3, 2), Trap(tmp_path / "unpickled"), object)
    )
    assert not (tmp_path / "unpickled").exists()
    assert "has shape (2,)" in problem(responses=np.ones((3, 2)), embeddings=np.ones(2))
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    with pytest.raises(InputError, match="cannot be read as an .npz file: write it with"):
        worlds.load(str(tmp_path / "a.npy"))
    (tmp_path / "a.npz").write_text("responses")
    with pytest.raises(InputError, match="cannot be read as an .npz file"):
        worlds.load(str(tmp_path / "a.npz"))
    with pytest.raises(InputError, match="students.signal is 2"):
        simulate.students(simulate.StudentConfig(signal=2.0), num_generations=8)
