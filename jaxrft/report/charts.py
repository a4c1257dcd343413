"""The charts of `jaxrft report`, as traces and layouts of plotly.

A trace has no color of its own: `meta.color` is the number of a color of the page's theme,
`meta.band` marks an interval, and `meta.soft` a line that matters little.
"""

import html
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from jaxrft.host.files import JSON
from jaxrft.report.metrics import BINS
from jaxrft.report.picture import WINDOW
from jaxrft.report.runs import Curve, Group, Run, curve, metric_names, numbers
from jaxrft.report.selection import LISTS

Axis = Literal["rollouts", "tokens", "seconds", "steps"]
AXES = ("rollouts", "tokens", "seconds", "steps")
CENTERS = [(2 * i + 1) / (2 * BINS) for i in range(BINS)]  # of the bins of pass rates
SLOW = 10  # times the median of the seconds of a step
COLUMNS = 100  # of a heat map of the tasks chosen, and bars of a chart of domains
LAPS = ("select", "reference_set", "rollout", "reward", "resample", "learn", "report")
Object = dict[str, JSON]


class Menu(NamedTuple):
    """A choice between plots."""

    title: str
    options: tuple[str, ...]


class Plot(NamedTuple):
    """What plotly draws."""

    data: list[Object]
    layout: Object


class Chart(NamedTuple):
    """Plots under one title, one for each choice of its menus, joined by "|"."""

    key: str
    title: str
    note: str
    menus: tuple[Menu, ...]
    plots: dict[str, Plot]
    wide: bool = False

    @property
    def is_empty(self) -> bool:
        """Returns whether there is nothing to see."""
        return not any(plot.data for plot in self.plots.values())


def charts(groups: Sequence[Group]) -> list[Chart]:
    """Makes all charts that the runs have numbers for."""
    makers: tuple[Callable[[Sequence[Group]], Chart], ...] = (
        accuracy,
        informative,
        calibration,
        belief,
        chosen,
        domains,
        replay,
        seconds,
    )
    return [chart for make in makers if not (chart := make(groups)).is_empty]


def lines(curves: Sequence[tuple[str, Curve]], *, markers: bool = False) -> list[Object]:
    """Returns a line for each (name, curve), with a band where there is an interval."""
    data: list[Object] = []
    for color, (name, points) in enumerate(curves):
        if not points.x:
            continue
        shared = {"legendgroup": str(color), "x": points.x}
        band = shared | {"mode": "lines", "showlegend": False, "hoverinfo": "skip"}
        band["meta"] = {"color": color, "band": True}
        if points.low:
            data.append(band | {"y": _finite(points.low)})
            data.append(band | {"y": _finite(points.high), "fill": "tonexty"})
        data.append(
            shared
            | {
                "y": points.mean,
                "name": html.escape(name),
                "mode": "lines+markers" if markers else "lines",
                "line": {"width": 2},
                "showlegend": True,
                "meta": {"color": color},
                "hovertemplate": "%{y:.3f} at %{x:,.6~g}<extra>%{fullData.name}</extra>",
            }
        )
    return data


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values]


def _titles(x: str, y: str, **layout: JSON) -> Object:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}} | layout


def accuracy(groups: Sequence[Group]) -> Chart:
    """Draws the evaluations, and the reward in training, against what they cost."""
    runs = [run for group in groups for run in group.runs]
    metrics = metric_names(runs, "eval/")
    metrics = sorted(metrics, key=lambda name: ("/avg@" not in name, name.count("/")))
    options = tuple(name.removeprefix("eval/") for name in metrics)
    plots = {}
    for option, axis in product((*options, "reward in training"), AXES):
        held_out = option in options
        metric, window = (f"eval/{option}", 1) if held_out else ("reward", WINDOW)
        curves = [(each.name, curve(each, metric, axis, window=window)) for each in groups]
        unit = "training seconds" if axis == "seconds" else axis
        plots[f"{option}|{axis}"] = Plot(lines(curves, markers=held_out), _titles(unit, option))
    return Chart(
        "accuracy",
        "Accuracy",
        "Held-out accuracy at each evaluation, or the reward of the tasks chosen in training. "
        "Seconds are those of training steps.",
        (Menu("metric", (*options, "reward in training")), Menu("against", AXES)),
        plots,
        wide=True,
    )


def informative(groups: Sequence[Group]) -> Chart:
    """Draws the share of groups whose successes are not all equal."""
    name = "select/effective_group_ratio"
    curves = [(each.name, curve(each, name, "steps", window=WINDOW)) for each in groups]
    layout = _titles("step", "share of groups")
    layout["yaxis"]["range"] = [0, 1]
    note = f"Groups with successes and failures; others teach nothing. Mean of {WINDOW} steps."
    return Chart("informative", "Informative groups", note, (), {"": Plot(lines(curves), layout)})


def _sums(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Sums each list [BINS] of selection.jsonl over the steps of all runs."""
    entries = [entry for run in runs for entry in run.choices]
    zeros = {name: [0.0] * BINS for name in LISTS}
    return {name: np.sum([each[name] for each in (zeros, *entries)], axis=0) for name in LISTS}


def calibration(groups: Sequence[Group]) -> Chart:
    """Draws observed over believed pass rates, by bin of belief."""
    data: list[Object] = []
    for color, group in enumerate(groups):
        sums = _sums(group.runs)
        seen = sums["trials"] > 0
        trials = sums["trials"][seen]
        if not len(trials):
            continue
        observed = sums["successes"][seen] / trials
        data.append(
            {
                "x": (sums["believed"][seen] / trials).tolist(),
                "y": observed.tolist(),
                "customdata": [f"{count:,.0f}" for count in trials],
                "name": html.escape(group.name),
                "mode": "lines+markers",
                "line": {"width": 1},
                "marker": {"size": (5 + 13 * np.sqrt(trials / trials.max())).tolist()},
                "meta": {"color": color},
                "showlegend": True,
                "hovertemplate": "believed %{x:.2f}, observed %{y:.2f}<br>%{customdata} samples"
                "<extra>%{fullData.name}</extra>",
            }
        )
    diagonal = {"x": [0, 1], "y": [0, 1], "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    diagonal |= {"line": {"dash": "dot", "width": 1}, "meta": {"soft": True}}
    layout = _titles("believed pass rate", "observed pass rate")
    layout["xaxis"]["range"] = layout["yaxis"]["range"] = [-0.03, 1.03]
    note = (
        "Pass rates that the selector believed of the tasks it chose, and what their rollouts "
        "gave, over all steps. On the dotted line belief and result agree; a larger dot has more "
        "samples."
    )
    plot = Plot([diagonal, *data] if data else [], layout)
    return Chart("calibration", "Believed and observed pass rates", note, (), {"": plot})


def _heat_map(steps: Sequence[int], counts: Sequence[Sequence[float]], unit: str) -> Plot:
    """Draws counts [n, BINS] over steps [n] and pass rates, shaded by the root of their share."""
    table = np.array(counts, float).T  # [BINS, n]
    share = table / np.maximum(table.sum(axis=0), 1)
    trace = {
        "type": "heatmap",
        "x": list(steps),
        "y": CENTERS,
        "z": np.sqrt(share).round(4).tolist(),
        "customdata": table.round(2).tolist(),
        "showscale": False,
        "hovertemplate": f"step %{{x}}, pass rate %{{y:.2f}}<br>%{{customdata:,.6~g}} {unit}"
        "<extra></extra>",
    }
    layout = _titles("step", "believed pass rate")
    layout["yaxis"]["range"] = [0, 1]
    return Plot([trace], layout)


def _by_run(groups: Sequence[Group], plot: Callable[[Run], Plot | None]) -> dict[str, Plot]:
    """Returns the plot of each run that has one, by name."""
    plots = {run.name: plot(run) for group in groups for run in group.runs}
    return {name: each for name, each in plots.items() if each is not None}


def _menu(plots: dict[str, Plot]) -> tuple[Menu, ...]:
    return (Menu("run", tuple(plots)),) if plots else ()


def belief(groups: Sequence[Group]) -> Chart:
    """Draws the pass rates that are believed of all tasks, over steps."""

    def plot(run: Run) -> Plot | None:
        entries = [entry for entry in run.choices if sum(entry.get("belief", ())) > 0]
        steps = [entry["step"] for entry in entries]
        counts = [entry["belief"] for entry in entries]
        return _heat_map(steps, counts, "tasks") if entries else None

    plots = _by_run(groups, plot)
    note = "What the selector believes of all tasks of the table. Stronger color: more tasks."
    return Chart("belief", "The belief over the table", note, _menu(plots), plots)


def blocks(run: Run) -> list[list[Object]]:
    """Splits the choices of a run into at most COLUMNS parts of the same number of steps."""
    size = max(1, -(-len(run.choices) // COLUMNS))
    return [run.choices[i : i + size] for i in range(0, len(run.choices), size)]


def chosen(groups: Sequence[Group]) -> Chart:
    """Draws the believed pass rates of the tasks that were chosen, over steps."""

    def plot(run: Run) -> Plot | None:
        parts = blocks(run)
        counts = [np.sum([entry["groups"] for entry in part], axis=0) for part in parts]
        if not np.sum(counts):
            return None
        return _heat_map([part[-1]["step"] for part in parts], counts, "groups")

    plots = _by_run(groups, plot)
    note = "What was believed of the tasks rolled out, before that. Stronger color: more groups."
    return Chart("chosen", "Tasks chosen, by belief", note, _menu(plots), plots)


def domains(groups: Sequence[Group]) -> Chart:
    """Draws the share of each domain among the groups rolled out."""

    def plot(run: Run) -> Plot | None:
        parts = blocks(run)
        counted = [entry["domains"] for entry in run.choices if "domains" in entry]
        names = sorted({name for counts in counted for name in counts})
        steps = [part[-1]["step"] for part in parts]
        data = []
        for color, name in enumerate(names):
            groups_of = [sum(e.get("domains", {}).get(name, 0) for e in part) for part in parts]
            every = [sum(sum(e.get("domains", {}).values()) for e in part) for part in parts]
            share = np.array(groups_of) / np.maximum(every, 1)
            data.append(
                {
                    "type": "bar",
                    "x": steps,
                    "y": share.round(4).tolist(),
                    "name": html.escape(name),
                    "meta": {"color": color},
                    "showlegend": True,
                    "hovertemplate": "%{y:.0%}<extra>%{fullData.name}</extra>",
                }
            )
        layout = _titles("step", "share of groups", barmode="stack", bargap=0)
        return Plot(data, layout) if data else None

    plots = _by_run(groups, plot)
    note = "Which domains the groups rolled out came from."
    return Chart("domains", "Tasks chosen, by domain", note, _menu(plots), plots)


def replay(groups: Sequence[Group]) -> Chart:
    """Draws the mean age and the share of replayed groups."""
    titles = {"replay/age": "mean age in steps", "replay/fraction": "share of groups"}
    plots = {}
    for name, title in titles.items():
        curves = [(each.name, curve(each, name, "steps", window=WINDOW)) for each in groups]
        plots[title] = Plot(lines(curves), _titles("step", title))
    note = "Groups of earlier steps that were trained on again."
    return Chart("replay", "Replay", note, (Menu("show", tuple(plots)),), plots)


def seconds(groups: Sequence[Group]) -> Chart:
    """Draws the mean seconds of a step by stage, a bar a group, without slow steps."""
    every = [run for group in groups for run in group.runs]
    data: list[Object] = []
    for color, lap in enumerate(LAPS):
        means = [_mean_seconds(group, f"timing/{lap}") for group in groups]
        if not any(means):
            continue
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": [html.escape(_cut(group.name)) for group in groups],
                "x": means,
                "name": lap.replace("_", " "),
                "meta": {"color": color},
                "showlegend": True,
                "hovertemplate": "%{x:.3~g} s<extra>%{fullData.name}</extra>",
            }
        )
    layout = _titles("seconds a step", "", barmode="stack")
    slow = [numbers(run, "step_time")[step] for run in every for step in slow_steps(run)]
    note = f"Mean of all steps but {len(slow)} that took {SLOW} times the median or more"
    note += f", {sum(slow):,.0f} s in all, since programs were compiled." if slow else "."
    return Chart("seconds", "Where the time went", note, (), {"": Plot(data, layout)})


def _cut(name: str) -> str:
    """Cuts the middle out of a long name, for which a phone has no room."""
    return name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"


def slow_steps(run: Run) -> set[int]:
    """Returns the steps that took SLOW times the median or more, in which programs are compiled."""
    seconds = numbers(run, "step_time")
    limit = SLOW * float(np.median([*seconds.values()])) if seconds else 0.0
    return {step for step, value in seconds.items() if value >= limit > 0}


def _mean_seconds(group: Group, name: str) -> float:
    """Returns the seconds of a lap over the number of steps, of all runs but their slow steps."""
    total = 0.0
    count = 0
    for run in group.runs:
        steps = numbers(run, "step_time").keys() - slow_steps(run)
        laps = numbers(run, name)
        total += sum(laps.get(step, 0.0) for step in steps)
        count += len(steps)
    return total / max(count, 1)
