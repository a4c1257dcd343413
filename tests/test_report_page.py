"""jaxrft report: what the page of runs says, and that it works in a browser without a network."""

import json
import math
import shutil
import sys

import helpers
import numpy as np
import pytest

from jaxrft import config as configs
from jaxrft.report import charts, page, runs, selection
from jaxrft.report.completions import CompletionsLog, Rows
from jaxrft.report.selection import Chosen, SelectionLog
from jaxrft.types import InputError

STEPS = 6


def write_run(folder, configure, *, seed=0, gain=0.1, **changes):
    """A run of six steps in which the accuracy grows by `gain` a step."""
    folder.mkdir()
    config = configure(folder, seed=seed, **changes)
    (folder / "config.json").write_text(configs.to_json(config))
    (folder / "versions.json").write_text(json.dumps({"jax": "0.10"}))
    lines = [{"step": 0, "eval/digits/avg@8": 0.2}]
    log = SelectionLog(folder, 0)
    for step in range(1, STEPS + 1):
        line = {"step": step, "eval/digits/avg@8": 0.2 + gain * step, "reward": 0.5}
        line |= {"rollouts": 32 * step, "num_tokens": 100 * step, "step_time": 2.0}
        line |= {"timing/rollout": 1.5, "timing/learn": 0.5, "select/auc": None}
        lines.append(line | {"select/effective_group_ratio": 0.25})
        chosen = Chosen(
            pass_rate=np.array([0.52, 0.9], np.float32),
            successes=np.array([1, 4], np.float32),
            trials=np.array([4, 4], np.float32),
            domain=np.array([0, 1], np.int32),
        )
        entry = selection.record(step, chosen, ("sums", "products"))
        log.write(entry | {"belief": [8, *[0] * 18, 8]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = Rows(
        prompts=["<b>1+1=</b>", "2+2="],
        completions=["</script><script>document.title = 'taken'</script>", "5"],
        task_ids=[3, 4],
        domains=["sums", "sums"],
        rewards=np.array([[1.0], [0.0]], np.float32),
        valid=np.ones((2, 1), bool),
        success=np.array([1, 0], np.float32),
        advantages=np.array([0.7, -0.7], np.float32),
    )
    CompletionsLog(folder).write(STEPS, [rows], ("exact",))
    return folder


@pytest.fixture
def folders(configure, tmp_path):
    """Two seeds of one config, and a run of another."""
    return [
        write_run(tmp_path / "bots-seed0", configure),
        write_run(tmp_path / "bots-seed1", configure, seed=1, gain=0.2 / 3),
        write_run(tmp_path / "other", configure, learning_rate=1e-3),
    ]


def test_runs_that_differ_in_their_seeds_are_one_group(folders):
    groups = runs.grouped(runs.open_runs(folders))
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("bots (2 seeds)", 2),
        ("other", 1),
    ]


def test_a_curve_of_seeds_has_a_mean_and_an_interval_by_hand(folders):
    """After six steps 0.8 and 0.6: 0.7 +- 12.706 * 0.1414 / sqrt(2)."""
    group, other = runs.grouped(runs.open_runs(folders))
    found = runs.curve(group, "eval/digits/avg@8", "rollouts")
    assert found.x == [32 * step for step in range(STEPS + 1)]
    assert found.mean[-1] == pytest.approx(0.7)
    assert found.high[-1] == pytest.approx(0.7 + 12.706 * 0.1, rel=1e-3)
    alone = runs.curve(other, "eval/digits/avg@8", "seconds")
    assert alone.x == [2.0 * step for step in range(STEPS + 1)] and alone.low == []


def test_runs_of_one_name_are_told_apart_by_their_paths(configure, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name / "run", configure)
    opened = runs.open_runs([tmp_path / "a/run", tmp_path / "b/run"])
    assert [run.name for run in opened] == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]


def test_calibration_by_hand(folders):
    """Of tasks believed at 0.52 a quarter of the samples succeeds, of those at 0.9 all."""
    chart = charts.calibration(runs.grouped(runs.open_runs(folders)))
    _, line, _ = chart.plots[""].data
    assert line["x"] == pytest.approx([0.52, 0.9], abs=1e-4)
    assert line["y"] == [0.25, 1.0]
    assert line["customdata"] == ["48", "48"]  # two runs of six steps


def test_the_belief_is_shown_as_shares_of_the_table(folders):
    chart = charts.belief(runs.grouped(runs.open_runs(folders)))
    (trace,) = chart.plots["other"].data
    assert trace["x"] == [1, 2, 3, 4, 5, 6]
    assert np.array(trace["z"])[[0, 19]] == pytest.approx(math.sqrt(0.5), abs=1e-4)
    assert np.array(trace["customdata"]).sum(axis=0).tolist() == [16] * 6


def test_time_leaves_out_steps_that_compile(folders):
    text = (folders[2] / "metrics.jsonl").read_text()
    slow = {"step": 7, "step_time": 80.0, "timing/rollout": 79.0}
    (folders[2] / "metrics.jsonl").write_text(text + json.dumps(slow) + "\n")
    chart = charts.seconds(runs.grouped(runs.open_runs(folders[2:])))
    means = {trace["name"]: trace["x"] for trace in chart.plots[""].data}
    assert means == {"rollout": [1.5], "learn": [0.5]}
    assert "but 1 that took 10 times the median or more, 80 s in all" in chart.note


def test_metrics_that_a_run_did_not_record_have_no_chart(folders):
    (folders[2] / selection.FILE).unlink()
    made = charts.charts(runs.grouped(runs.open_runs(folders[2:])))
    assert [chart.key for chart in made] == ["accuracy", "informative", "seconds"]


def test_the_page_without_plotly_is_one_sentence(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match=r"needs the package plotly: pip install .*\[report\]"):
        page.page(runs.open_runs(folders))


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    code, _, errors = helpers.jaxrft("report", str(tmp_path), "--out", str(tmp_path / "a.html"))
    assert code == 2 and "give the output_dir of a run" in errors and "Traceback" not in errors


@pytest.fixture
def content(folders, monkeypatch):
    """The page without the script of plotly."""
    monkeypatch.setattr(page, "plotly_js", lambda: "")
    return page.page(runs.open_runs(folders))


def test_the_page_has_completions_config_and_versions_as_text(content):
    assert "&lt;/script&gt;&lt;script&gt;" in content and "<b>1+1=" not in content
    assert "bots-seed0, step 6: 1 of 2 rewarded" in content
    assert "<tr><th>learning_rate</th><td>0.01</td><td>0.01</td><td>0.001</td></tr>" in content
    assert "<tr><th>jax</th><td>0.10</td></tr>" in content
    assert "0.200 first, 0.800 best, 0.800 last" in content


def test_the_page_loads_nothing(content):
    assert "http:" not in content and "https:" not in content
    assert "default-src 'none'" in content


@pytest.fixture
def browser_page(folders, tmp_path):
    """The page in Chromium, without a network."""
    pytest.importorskip("plotly")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    (tmp_path / "page.html").write_text(page.page(runs.open_runs(folders)))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 360, "height": 800}, offline=True)
        view = context.new_page()
        view.errors = []
        view.on("pageerror", lambda error: view.errors.append(str(error)))
        view.goto((tmp_path / "page.html").as_uri())
        view.wait_for_selector("#accuracy .legendtoggle")
        yield view
        browser.close()


def test_the_page_in_a_browser(browser_page):
    """On a phone nothing overflows; a click on the legend hides a run; a tap reads a value."""
    view = browser_page
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert view.title() == "bots (2 seeds), other"
    points = view.locator("#accuracy .scatterlayer .points path")
    assert points.count() == 2 * (STEPS + 1)
    view.locator("#accuracy .legendtoggle").last.click()
    view.wait_for_timeout(800)  # plotly waits for a second click
    assert points.count() == STEPS + 1
    view.select_option("#accuracy-1", "tokens")
    view.wait_for_timeout(300)
    box = points.last.bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    view.wait_for_selector("#accuracy .hovertext")
    assert "0.700 at 600" in view.locator("#accuracy .hovertext").text_content()
    assert view.errors == []
