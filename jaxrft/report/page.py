"""jaxrft report: one page of one or several runs, an HTML file that needs nothing else."""

import argparse
import html
import json
import logging
import re
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module, resources
from pathlib import Path

from jaxrft.config import flat
from jaxrft.errors import InputError
from jaxrft.fields import path_argument
from jaxrft.host.disk import writing
from jaxrft.host.files import JSON, replace_file
from jaxrft.host.installation import install_command
from jaxrft.report.charts import Chart, charts
from jaxrft.report.runs import (
    Run,
    grouped,
    metric_names,
    numbers,
    open_runs,
    positions,
    samples,
)

logger = logging.getLogger(__name__)

SHOWN = 4  # completions with a success, and without one
CUT = 1500  # characters of a prompt, whose end is shown, and of a completion


def main(arguments: list[str], prog: str) -> int:
    """Runs the command: writes the page of runs to a file."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Writes a page about one or several runs, an HTML file."
    )
    parser.add_argument("runs", nargs="+", type=path_argument, help="output_dir of a run")
    parser.add_argument(
        "--out", type=path_argument, default=Path("report.html"), help="file to write"
    )
    options = parser.parse_args(arguments)
    content = page(open_runs(options.runs))
    remedy = "give another file with --out"
    with writing(options.out, remedy):
        replace_file(options.out, content)
    logger.info("the page is in %s: open it in a browser", options.out)
    return 0


def page(runs: Sequence[Run]) -> str:
    """Returns the page about runs, with all that it needs."""
    groups = grouped(runs)
    drawn = charts(groups)
    names = ", ".join(group.name for group in groups)
    cards = [_card(chart) for chart in drawn]
    cards += [completions_card(runs), config_card(runs)]
    template = resources.files("jaxrft.assets").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(names),
        "HEAD": overview(runs, drawn),
        "CARDS": "\n".join(cards),
        "FIGURES": _script(json.dumps([_figure(chart) for chart in drawn], allow_nan=False)),
        "PLOTLY": plotly_js(),
    }
    return re.sub("%([A-Z]+)%", lambda match: parts[match[1]], template)


def plotly_js() -> str:
    """Returns the script of plotly; raises InputError if it is not installed."""
    try:
        offline = import_module("plotly.offline")
    except ImportError as error:
        raise InputError(
            f"the page of a run needs the package plotly: {install_command('report')}"
        ) from error
    return offline.get_plotlyjs()


def _script(text: str) -> str:
    """Returns JSON that no tag in its strings can end early."""
    return text.replace("<", "\\u003c")


def _figure(chart: Chart) -> dict[str, JSON]:
    plots = {name: {"data": plot.data, "layout": plot.layout} for name, plot in chart.plots.items()}
    return {"id": chart.key, "menus": [menu.title for menu in chart.menus], "plots": plots}


def _card(chart: Chart) -> str:
    """Returns a chart's title, note, menus and place."""
    menus = []
    for number, menu in enumerate(chart.menus):
        options = "".join(f"<option>{html.escape(option)}</option>" for option in menu.options)
        select = f'<select id="{chart.key}-{number}">{options}</select>'
        menus.append(f"<label>{menu.title} {select}</label>")
    body = f"<p>{html.escape(chart.note)}</p>"
    if menus:
        body += f'<div class="menus">{"".join(menus)}</div>'
    body += f'<div class="plot" id="{chart.key}"></div>'
    return section(chart.key, chart.title, body, wide=chart.wide)


def section(key: str, title: str, body: str, *, wide: bool = True) -> str:
    """Returns a card of the page."""
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}" id="card-{key}"><h2>{title}</h2>\n{body}\n</section>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of texts whose first column stays when it scrolls on a narrow screen."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = ""
    for name, *values in rows:
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        body += f"<tr><th>{html.escape(name)}</th>{cells}</tr>\n"
    return f'<div class="scroll"><table>\n<tr>{top}</tr>\n{body}</table></div>'


def overview(runs: Sequence[Run], drawn: Sequence[Chart]) -> str:
    """Returns links to the parts of the page, and a table with a row a run."""
    titles = {chart.key: chart.title for chart in drawn}
    titles |= {"completions": "Completions", "config": "Config and versions"}
    links = "".join(f'<a href="#card-{key}">{title}</a>' for key, title in titles.items())
    metrics = metric_names(runs, "eval/", "")
    metric = min(metrics, key=lambda name: ("/avg@" not in name, name), default="")
    rows = [
        ["selector", *(str(run.config.get("select.name", "")) for run in runs)],
        ["seed", *(str(run.config.get("seed", "")) for run in runs)],
    ]
    for axis in ("steps", "rollouts", "tokens"):
        rows.append([axis, *(f"{_last(run, axis):,.0f}" for run in runs)])
    seconds = [timedelta(seconds=round(_last(run, "seconds"))) for run in runs]
    rows.append(["time in steps", *map(str, seconds)])
    if metric:
        rows.append([metric.removeprefix("eval/"), *(_summary(run, metric) for run in runs)])
    card = table(["", *(run.name for run in runs)], rows)
    return f'<nav>{links}</nav>\n<div class="card">{card}</div><br>'


def _summary(run: Run, metric: str) -> str:
    """Returns the first, the best and the last value of a metric."""
    values = list(numbers(run, metric).values())
    if not values:
        return ""
    return f"{values[0]:.3f} first, {max(values):.3f} best, {values[-1]:.3f} last"


def _last(run: Run, axis: str) -> float:
    return max(positions(run, axis).values(), default=0.0)


def completions_card(runs: Sequence[Run]) -> str:
    """Returns rewarded and unrewarded completions of the last step that has some, by run."""
    body = ""
    for run in runs:
        rows = samples(run)
        if not rows:
            continue
        rewarded = [row for row in rows if (row["success"] or 0) > 0]
        unrewarded = [row for row in rows if row["success"] == 0]
        heading = f"{run.name}, step {rows[0]['step']}: {len(rewarded)} of {len(rows)} rewarded"
        chosen = [*_of_different_tasks(rewarded), *_of_different_tasks(unrewarded)]
        body += "<details>" if body else "<details open>"
        body += f"<summary>{html.escape(heading)}</summary>"
        body += f'<div class="samples">{"".join(map(_sample, chosen))}</div></details>\n'
    if not body:
        body = "<p>None are saved: set log_completions_steps to save those of some steps.</p>"
    return section("completions", "Completions", body)


def _of_different_tasks(rows: list[dict[str, JSON]]) -> list[dict[str, JSON]]:
    first = {row["task_id"]: row for row in reversed(rows)}
    return sorted(first.values(), key=lambda row: row["task_id"])[:SHOWN]


def _sample(row: dict[str, JSON]) -> str:
    """Returns a completion to read."""
    good = (row["success"] or 0) > 0
    facts = [f"task {row['task_id']} of {row['domain']}"]
    for name, value in row.items():
        if name.startswith("rewards/"):
            facts.append(f"{name.removeprefix('rewards/')} {_number(value)}")
    facts.append(f"advantage {_number(row['advantage'])}")
    prompt = str(row["prompt"])
    completion = str(row["completion"])
    prompt = prompt if len(prompt) <= CUT else f"... {prompt[-CUT:]}"
    completion = completion if len(completion) <= CUT else f"{completion[:CUT]} ..."
    return (
        f'<div class="sample{" good" if good else ""}">'
        f'<div class="head">{"rewarded" if good else "not rewarded"}: '
        f"{html.escape(', '.join(facts))}</div>"
        f'<div class="name">prompt</div><pre>{html.escape(prompt)}</pre>'
        f'<div class="name">completion</div><pre>{html.escape(completion)}</pre></div>'
    )


def _number(value: JSON) -> str:
    return "none" if value is None else f"{value:.3g}"


def config_card(runs: Sequence[Run]) -> str:
    """Returns the fields in which the runs differ, and all fields and versions of each run."""
    body = ""
    names = dict.fromkeys(name for run in runs for name in run.config)
    different = [name for name in names if len({str(run.config.get(name)) for run in runs}) > 1]
    if different:
        rows = [[name, *(str(run.config.get(name, "")) for run in runs)] for name in different]
        body += "<h3>Differences</h3>" + table(["field", *(run.name for run in runs)], rows)
    for run in runs:
        fields = [[name, str(value)] for name, value in run.config.items()]
        versions = [[name, str(value)] for name, value in flat(run.versions).items()]
        body += f"<details><summary>Config of {html.escape(run.name)}</summary>"
        body += f"{table(['field', 'value'], fields)}</details>\n"
        body += f"<details><summary>Versions of {html.escape(run.name)}</summary>"
        body += f"{table(['name', 'value'], versions)}</details>\n"
    return section("config", "Config and versions", body)
