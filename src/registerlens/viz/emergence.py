"""Figures of training: which sign of register neurons comes first, and which recipes they emerge under."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool
from plotly.subplots import make_subplots

from registerlens.config import ViTConfig
from registerlens.emergence.criteria import CRITERIA, EmergenceCriteria
from registerlens.emergence.dynamics import HALFWAY, SIGNS, Dynamics, order_of_signs
from registerlens.emergence.research import by_recipe
from registerlens.errors import ConfigError
from registerlens.model.sublayers import sublayers
from registerlens.viz.parts import beside, curve, dots, finished, interval, legend, mark
from registerlens.viz.theme import BLUE, GREY, ORANGE, RED, Mode, on_cells

_COLOURS = dict(zip(SIGNS, (RED, ORANGE, BLUE), strict=True))


def dynamics_figure(runs: Sequence[Dynamics], mode: Mode = "light") -> go.Figure:
    """Which comes first, run by run: each sign on its way from its first value to its last, and when it was halfway.

    Above, one panel a run, with the neurons' activation at outliers; below, the step at which each sign was first
    halfway, with its 95% interval over images, and (hollow) from when on it was so for good.

    Args:
        runs: one for each; three or more seeds say whether an order is the rule.
        mode: "light" or "dark".

    Raises:
        ConfigError: none was given.
    """
    if not runs:
        raise ConfigError("Give the dynamics of at least one run.")
    n = len(runs)
    figure = make_subplots(
        rows=2,
        cols=n,
        specs=[[{} for _ in runs], [{"colspan": n}, *(None for _ in runs[1:])]],
        row_heights=[0.6, 0.4],
        vertical_spacing=0.2,
        horizontal_spacing=0.04,
        shared_yaxes=True,
        subplot_titles=[*(f"seed {run.seed} ({run.run})" for run in runs), "Step at which each sign is halfway"],
    )
    for column, run in enumerate(runs, start=1):
        for sign in SIGNS:
            _course(figure, column, run, run.share(sign), sign, _COLOURS[sign], "solid")
        active = run.activation.mean(1)
        _course(figure, column, run, active / active.max(), "neurons' activation", GREY, "dot")
        mark(figure, column, y=HALFWAY)
    onsets = order_of_signs(runs)
    for sign in SIGNS:
        mine = onsets[onsets["sign"] == sign]
        names = [f"seed {seed} ({run})" for seed, run in zip(mine["seed"], mine["run"], strict=True)]
        error = interval(mine["step"], mine["low"], mine["high"])
        for when, words, symbol, bar in (
            ("step", "first halfway", "circle", error),
            ("lasting", "for good", "circle-open", None),
        ):
            hover = f"{sign}, {words}: step %{{x:.0f}}"
            points = dots(mine[when], names, sign, _COLOURS[sign], 9, hover, look={"symbol": symbol}, error_x=bar)
            figure.add_trace(points.update(showlegend=False), 2, 1)
    figure.update_xaxes(title_text="step", rangemode="tozero")
    figure.update_yaxes(title_text="share of the way", row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=2, col=1)
    margin = {"r": 40}  # the last label of an axis stands half outside
    return finished(figure, mode, height=620, legend=legend(-0.12), margin=margin, closest=False)


def _course(figure: go.Figure, column: int, run: Dynamics, y: object, name: str, colour: str, dash: str) -> None:
    line = curve(run.steps, y, name, colour, "%{y:.2f}", dash=dash, mode=None)
    figure.add_trace(line.update(legendgroup=name, showlegend=column == 1), 1, column)


def criteria_figure(criteria: EmergenceCriteria, mode: Mode = "light") -> go.Figure:
    """Where large norms are along the depth, and where attention goes: to outliers, or to what precedes the patches.

    Left, in units of the image's median patch norm: the largest patch, the same with random weights, and the largest of
    [CLS] and trained registers; right, the mean over all queries of the attention to outliers and to those tokens.
    """
    figure = beside("Norm over the median patch norm", "Attention, mean over queries", gap=0.12)
    places, layers = sublayers(criteria.config.n_layers), list(range(criteria.config.n_layers))
    curves = [
        ("largest patch", criteria.largest_over_median, RED, "solid"),
        ("largest patch, untrained", criteria.untrained, GREY, "dot"),
    ]
    attention = [("outliers", criteria.sink, RED, "solid")]
    if criteria.prefix_norm.shape[1]:
        what = _prefix_told(criteria.config)
        curves.append((what, criteria.prefix_norm.max(1), BLUE, "dash"))
        attention.append((what, criteria.prefix_sink.sum(1), BLUE, "dash"))
    for column, (x, lines) in enumerate(((places, curves), (layers, attention)), start=1):
        for name, values, colour, dash in lines:
            line = curve(x, values, name, colour, f"{name}: %{{y:.2f}}<extra></extra>", dash=dash, mode=None)
            line.update(legendgroup=name, showlegend=column == 1 or name == "outliers")
            figure.add_trace(line, 1, column)
    figure.update_xaxes(title_text="after", tickangle=-60, row=1, col=1)
    figure.update_xaxes(title_text="block", dtick=1, row=1, col=2)
    figure.update_yaxes(type="log", tickvals=[0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100], row=1, col=1)
    figure.update_yaxes(range=[0, 1.02], row=1, col=2)
    return finished(figure, mode, height=400, legend=legend(1.25), closest=False)


def _prefix_told(cfg: ViTConfig) -> str:
    """What stands before the patches, in words."""
    n = cfg.n_trained_registers
    there = {"[CLS]": cfg.class_token, "distillation token": cfg.distillation_token, f"{n} trained registers": n}
    return " and ".join(name for name, some in there.items() if some)


def research_figure(table: pd.DataFrame, mode: Mode = "light") -> go.Figure:
    """Which criteria hold under which recipe, and how far the largest norms rise.

    Left, the share of a recipe's seeds in which a criterion holds (a run that diverged or was not finished meets none);
    right, the largest patch norm over the median at whatever sublayer it is largest, one point a run.

    Args:
        table: as `results_table` makes it, or read from a file of it.
        mode: "light" or "dark".

    Raises:
        ConfigError: the table has no row.
    """
    if not len(table):
        raise ConfigError("The table holds no run. Give results_table(folders).")
    groups = [
        (f"{recipe}{'' if recipe != '-' else f' {settings}'}", runs) for recipe, settings, runs in by_recipe(table)
    ]
    names = [f"{name} ({len(runs)})" for name, runs in groups]
    held = [_held(runs) for _, runs in groups]
    shares = np.stack([each.mean(0) for each in held])
    counts = np.stack([each.sum(0) for each in held]).astype(str)
    texts = [[f"{count} of {len(each)}" for count in row] for row, each in zip(counts, held, strict=True)]
    titles = ("Seeds in which a criterion holds", "Largest norm over the median")
    figure = beside(*titles, gap=0.03, column_widths=[0.72, 0.28], shared_yaxes=True)
    cells = go.Heatmap(z=shares, x=[one.name for one in CRITERIA], y=names, zmin=0, zmax=1, customdata=texts)
    cells.update(colorscale="Viridis", xgap=1, ygap=1, showscale=False)
    cells.update(on_cells(counts, shares, 0.0, 1.0, "Viridis", mode, width=600))
    cells.update(hovertemplate="%{y}, %{x}: holds in %{customdata}<extra></extra>")
    figure.add_trace(cells, 1, 1)
    for name, (_, runs), each in zip(names, groups, held, strict=True):
        met = zip(runs["seed"], each.sum(1), strict=True)
        words = [f"seed {seed}: {n} of {len(CRITERIA)}" for seed, n in met]
        points = dots(runs["largest"], [name] * len(runs), None, RED, 8, "%{text}, %{x:.1f} x", text=words)
        figure.add_trace(points.update(showlegend=False), 1, 2)
    figure.update_xaxes(tickangle=-60, row=1, col=1)
    figure.update_xaxes(type="log", tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500], row=1, col=2)
    figure.update_yaxes(autorange="reversed")
    return finished(figure, mode, height=240 + 24 * len(names), closest=False)


def _held(runs: pd.DataFrame) -> Bool[np.ndarray, "run criterion"]:
    """Which criteria hold in which runs; those that were not finished hold none."""
    finished = (runs["ended"] == "finished").to_numpy()[:, None]
    return np.array([[one.holds(value) for value in runs[one.name].astype(float)] for one in CRITERIA]).T & finished
