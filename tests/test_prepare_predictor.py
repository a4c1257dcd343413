import dataclasses
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxrft import cli
from jaxrft.host.installation import install_command
from jaxrft.prepare import convert_predictor, predictor, score
from jaxrft.prepare.predictor import Data, FitConfig, Output
from jaxrft.select.dots import attention, training
from jaxrft.select.dots.predictor import Origin, load_predictor
from jaxrft.tasks import embeddings
from jaxrft.types import InputError

NAN = float("nan")
SMALL = dict(width=32, layers=2, num_references=40, batch_size=60, learning_rate=3e-3)


def quadrants(num_tasks=180, num_policies=8):
    """Policies and tasks on a circle, with noise, whose quadrants take turns at being easy: no line
    tells them.
    """
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, num_tasks)
    noise = 0.3 * rng.normal(size=(num_tasks, 4))
    ability = np.linspace(-2, 2, num_policies)[:, None]
    rates = rng.binomial(16, 1 / (1 + np.exp(2.5 * np.sign(np.sin(2 * angle)) - ability))) / 16
    rows = np.column_stack([np.cos(angle), np.sin(angle), noise]).astype(np.float32)
    return Data(rows, rates, tuple(f"policy {m}" for m in range(num_policies)), Origin("circle", 6))


@pytest.mark.slow
def test_predictor_beats_ridge_where_difficulty_is_not_linear(tmp_path, capsys):
    data, out, plot = quadrants(), tmp_path / "p.safetensors", tmp_path / "p.png"
    data.pass_rates[0, :30] = NAN  # 30 unknown
    options = Output(out=str(out), splits=1, plot=str(plot), fit=FitConfig(**SMALL, epochs=14))
    predictions = predictor.run(data, options, seed=0)
    pearson = lambda *key: score.values(predictions, data.pass_rates, *key)[0, 0]  # noqa: E731
    for group in score.GROUPS:
        ridge = max(pearson(group, "ridge on references"), pearson(group, "ridge on others"))
        assert pearson(group, "predictor") > max(0.6, ridge + 0.3), group
    known = "new policies, known tasks"
    assert pearson(known, "mean of others") > 0.6
    assert np.isnan(pearson("new policies, new tasks", "mean of others"))
    read = load_predictor(out)
    assert read.embeddings == Origin("circle", 6) and read.params.query.norm_out.bias.shape == (32,)
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (
        "8 policies (policy 0 to policy 7) on 180 tasks, embeddings by circle of width 6"
    ) in printed
    assert "split 1 of 1: loss 0." in printed and f"is in {out}" in printed.replace("\n", "")


def test_splits_take_turns_and_references_are_known_tasks_trained_on():
    # 10 unknown of the first policy
    rates = np.where(np.arange(40)[None] < [[10], [0], [0], [0], [0]], NAN, 0.5)
    found = score.splits(3, rates, count=5, held_out=0.2, num_references=15)
    assert [int(sum(each)) for each in zip(*(split.policies for split in found), strict=True)] == [
        1
    ] * 5
    assert [int(sum(each)) for each in zip(*(split.tasks for split in found), strict=True)] == [
        1
    ] * 40
    for split in found:
        assert not split.tasks[split.references].any() and (split.references[0] >= 10).all()
        assert all(len(set(row)) == 15 for row in split.references.tolist())
    again = score.splits(3, rates, count=5, held_out=0.2, num_references=15)
    assert all(np.array_equal(x, y) for x, y in zip(found[0], again[0], strict=True))


def test_figures_by_hand():
    found = np.array([[0.2, 0.4, 0.9, NAN], [0.5, 0.5, 0.5, 0.5]])
    rates = np.array([[0.0, 0.5, 1.0, 0.3], [0.0, 1.0, NAN, 0.5]])
    figures = score.figures(found, rates, np.ones((2, 4), bool))
    first = [
        np.corrcoef([0.2, 0.4, 0.9], [0, 0.5, 1])[0, 1],
        1.0,
        (0.04 + (0.18 + 0.08) + 0.01) / 3,
    ]
    # 0 for what tells no task from another
    assert figures["pearson"] == pytest.approx(first[0] / 2)
    assert figures["spearman"] == pytest.approx(0.5)
    assert figures["brier"] == pytest.approx((first[2] + 0.25) / 2)
    assert figures["error"] == pytest.approx(((0.04 + 0.01 + 0.01) / 3 + 0.5 / 3) / 2)
    assert np.isnan(score.figures(found, rates, np.zeros((2, 4), bool))["error"])
    assert np.isnan(score.correlation(np.array([0.1, 0.2, 0.3]), np.ones(3)))
    x, y = score.curve(np.linspace(0, 1, 20), np.linspace(1, 0, 20))
    assert len(x) == 10 and np.allclose(x + y, 1)


def test_ridge_fits_a_line_and_shrinks_noise_to_the_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5)) * [1, 100, 1, 1, 0] + 3
    y = 0.5 + 0.1 * (x[:, 0] - 3)
    np.testing.assert_allclose(score.ridge(x, np.where(np.arange(80) < 50, y, NAN)), y, atol=0.01)
    noise = score.ridge(x, rng.normal(size=80))
    assert noise.std() < 0.3
    np.testing.assert_allclose(score.ridge(x, np.full(80, 0.25)), 0.25)


def test_defaults_are_those_of_the_function():
    own = inspect.signature(training.fit).parameters
    assert {field.name: field.default for field in dataclasses.fields(FitConfig)} == {
        name: own[name].default
        for name in own
        if own[name].kind is own[name].KEYWORD_ONLY and name != "report"
    }


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            dict(policies=("a",)),
            {},
            "pass rates of a only: a predictor learns what several policies have in common",
        ),
        (
            {},
            dict(fit=FitConfig()),
            "num_references is 256, but at most half of the 24 tasks .* give 1 to 12",
        ),
        ({}, dict(splits=-1), "splits is -1"),
        ({}, dict(held_out=0.0), "held_out 0.0"),
        ({}, dict(held_out=0.9), "held_out is 0.9: it leaves none of the 3 policies"),
        (dict(unknown=(1, slice(None))), {}, "no pass rate of b is known"),
        ({}, dict(out="p.npz"), "cannot write to p.npz"),
        ({}, dict(out="no/p.safetensors"), "cannot write to no/p.safetensors"),
        ({}, dict(plot="p.txt"), "cannot write to p.txt"),
        ({}, dict(plot="p.png", splits=0), "plot shows held-out predictions, but splits is 0"),
        (dict(unknown=(1, slice(1, None))), dict(splits=5), "too few pass rates of b are known"),
    ],
)
def test_nonsense_is_refused_before_anything_is_done(change, options, message):
    names, rates = change.get("policies", ("a", "b", "c")), np.full((3, 30), 0.5)
    rates[change.get("unknown", (0, 0))] = NAN
    data = Data(np.zeros((30, 4), np.float32), rates[: len(names)], names, Origin("m", 4))
    given = {"out": "p.safetensors", "fit": FitConfig(num_references=4)} | options
    with pytest.raises(InputError, match=message):
        predictor.run(data, Output(**given), seed=0)


def test_a_response_matrix_becomes_policies_by_windows(tmp_path):
    answers = np.array(
        [[0, 0, -1], [0, 1, -1], [1, 1, -1], [1, 1, 0], [1, -1, 1], [1, 1, 1]], np.int8
    )
    rows = np.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "r.npz", responses=answers, embeddings=rows)
    options = predictor.ResponsesOptions(
        responses=str(tmp_path / "r.npz"), policies=2, out="p.safetensors"
    )
    data = predictor.of_responses(options)
    np.testing.assert_allclose(data.pass_rates, [[1 / 3, 2 / 3, NAN], [1, 1, 2 / 3]])
    assert data.origin == Origin("r.npz", 2) and np.array_equal(data.embeddings, rows)
    with pytest.raises(InputError, match="policies is 7: .* has 6 rows"):
        predictor.of_responses(dataclasses.replace(options, policies=7))
    np.savez(tmp_path / "r.npz", responses=answers)
    with pytest.raises(InputError, match="has no array `embeddings`"):
        predictor.of_responses(options)


def task_file(folder, count=60):
    """A config of tasks with the pass rates of three policies and embeddings of all but two of
    them; its path.
    """
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"p{i}",
            "answer": str(i),
            "b_pass_rate": i / count,
            "a_pass_rate": None if i == 5 else 0.25,
            "c": 1,
        }
        for i in range(count)
    ]
    rows.append(rows[3])
    (folder / "rates.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tensors = {
        "prompts": embeddings.digests([row["prompt"] for row in rows[2:-1]]),
        "embeddings": rng.normal(size=(count - 2, 3)).astype(np.float32),
    }
    made_by = {"model": "tiny", "width": 3, "digest of the model's parameters": "abc"}
    save_file(tensors, folder / "e.safetensors", metadata={"made_by": json.dumps(made_by)})
    (folder / "config.py").write_text(
        "from jaxrft.config import Config, TasksConfig\n"
        f"tasks = TasksConfig(source={str(folder / 'rates.jsonl')!r}, "
        f"embeddings={str(folder / 'e.safetensors')!r})\n"
        "config = Config(model='none', tasks=tasks, output_dir='none')\n"
    )
    return folder / "config.py", tensors["embeddings"]


def test_from_task_files_by_the_command_line(tmp_path, capsys):
    path, rows = task_file(tmp_path)
    from jaxrft import config as configs

    data = predictor.of_tasks(configs.load(str(path)))
    assert data.policies == ("b_pass_rate", "a_pass_rate") and data.origin == Origin(
        "tiny", 3, "abc"
    )
    np.testing.assert_array_equal(data.embeddings, rows)
    np.testing.assert_allclose(data.pass_rates[0], np.arange(2, 60) / 60, rtol=1e-6)
    assert np.isnan(data.pass_rates[1, 3]) and np.nanmax(data.pass_rates[1]) == 0.25
    command = [
        "prepare",
        "predictor",
        str(path),
        "--out",
        str(tmp_path / "p.safetensors"),
        "--splits",
        "0",
    ]
    small = [
        "--fit.width",
        "8",
        "--fit.layers",
        "1",
        "--fit.num-references",
        "8",
        "--fit.epochs",
        "2",
    ]
    assert cli.main([*command, *small]) == 0
    assert (
        "2 policies (b_pass_rate, a_pass_rate) on 58 tasks, embeddings by tiny of width 3"
    ) in capsys.readouterr().out
    assert load_predictor(tmp_path / "p.safetensors").embeddings == Origin("tiny", 3, "abc")
    for flags, message in (
        (["--tasks.pass-rate-columns", "c"], "there are pass rates of c only"),
        (["--tasks.pass-rate-columns", "c", "no"], "has no column no"),
        (["--tasks.embeddings", "None"], "rates has no embeddings"),
    ):
        assert cli.main([*command, *small, *flags]) == 2
        assert message in capsys.readouterr().err


STATES = (
    "plain_layers1_topk0",
    "platt_layers1_topk8",
    "temperature_layers1_topk0",
    "group_logit_temp_layers3_topk8",
)
VECTORS = Path(__file__).parent / "vectors" / "dots.npz"


@pytest.mark.parity
@pytest.mark.parametrize("case", STATES)
def test_a_published_checkpoint_is_converted(tmp_path, case):
    torch = pytest.importorskip("torch")

    vectors = np.load(VECTORS)
    begin = f"{case}/param/"
    state = {
        f"regressor.{k[len(begin) :]}": torch.from_numpy(vectors[k])
        for k in vectors
        if k.startswith(begin)
    }
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "p.pt")
    top_k = int(case.rsplit("topk", 1)[1]) or None
    flags = ["--model", "org/name", *(["--top-k", str(top_k)] if top_k else [])]
    convert_predictor.main([str(tmp_path / "p.pt"), str(tmp_path / "p.safetensors"), *flags])
    params, calibration, temperature, read_top_k, origin = load_predictor(
        tmp_path / "p.safetensors"
    )
    assert (calibration, read_top_k, origin) == (
        case.rsplit("_", 2)[0],
        top_k,
        Origin("org/name", 48),
    )
    tables = (
        vectors[f"{name}_{kind}"]
        for name, kind in (("query", "embeddings"), ("reference", "embeddings"))
    )
    found = attention.predict(
        params,
        *tables,
        vectors["reference_pass_rates"],
        calibration=calibration,
        temperature=temperature,
        top_k=top_k,
    )
    np.testing.assert_allclose(found, vectors[f"{case}_tau1.0/prediction"], atol=1e-4)


@pytest.mark.parity
def test_other_files_than_checkpoints_are_refused(tmp_path):
    torch = pytest.importorskip("torch")

    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    torch.save({"other": torch.ones(2)}, tmp_path / "other.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    for name, message in {
        "absent": "no file",
        "text": "no torch checkpoint that holds tensors",
        "module": "no torch checkpoint that holds tensors",
        "tensor": "holds no state_dict",
        "other": "has 0 parts of sim_head.query_proj",
    }.items():
        with pytest.raises(InputError, match=message):
            convert_predictor.convert(tmp_path / f"{name}.pt", tmp_path / "p.safetensors", "m")


def test_without_torch_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        convert_predictor.main(
            [str(tmp_path / "p.pt"), str(tmp_path / "p.safetensors"), "--model", "m"]
        )
    assert install_command("parity") in capsys.readouterr().err
