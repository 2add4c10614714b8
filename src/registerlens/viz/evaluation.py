"""What interventions do: norms and attention layer by layer, where they end up, the telling metrics' intervals."""

import re
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from registerlens.evaluation.controls import ConditionKind
from registerlens.evaluation.effects import Evaluation
from registerlens.evaluation.pruning import Pruning
from registerlens.evaluation.shifts import OutlierShift
from registerlens.stats.intervals import interval_words
from registerlens.viz.parts import bars, beside, curve, dots, finished, interval, legend, mark, note, ticks_of_blocks
from registerlens.viz.theme import BLUE, BROWN, GREEN, GREY, OLIVE, ORANGE, PALETTE, PURPLE, RED, SKY, Mode, ink

_INTERVENTIONS = (BLUE, GREEN, PURPLE)
_AGAINST = {"zeroed": RED, "mean": ORANGE, "random": GREY, "matched": SKY, "neighbours": OLIVE}
_BINS = 40
"""Bars of a histogram, from zero to the largest value."""
_WIDTHS = {ConditionKind.CLEAN: 5.0, ConditionKind.TESTED: 2.5}
FOREST = {
    "outliers": "outliers per image",
    "cos_cls": "cosine of [CLS]<br>to the clean run",
    "cos_normal": "cosine of normal patches<br>to the clean run",
    "kl": "KL from the clean run,<br>all predictions (nats)",
    "accuracy": "accuracy (0 to 1)",
}
"""Metrics with a panel of dots, and the titles of their axes."""


@dataclass(frozen=True)
class Group:
    """Conditions drawn alike: one, or the draws of the same control."""

    name: str
    """What the legend says."""
    members: tuple[int, ...]
    """Indices of the conditions."""
    colour: str
    """Colour of lines and dots."""
    width: float
    """Width of lines in pixels: wide for the clean model, which others lie on, thin for baselines and controls."""


def groups_of(evaluation: Evaluation, mode: Mode = "light") -> list[Group]:
    """The conditions, draws of the same control together; the clean model first.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> done = rl.evaluate_intervention(vit, synthetic_images(16, 0).images, rl.TestTimeRegisters(neurons))
        >>> [group.name for group in groups_of(done)][2:]
        ['zeroed', 'mean', 'neighbours', 'random (3 draws)', 'matched (3 draws)', 'random, copied maxima']
    """
    members: dict[tuple[ConditionKind, str], list[int]] = {}
    for i, (name, kind) in enumerate(zip(evaluation.conditions, evaluation.kinds, strict=True)):
        stem = re.sub(r" \d+$", "", name) if kind is ConditionKind.CONTROL else name
        members.setdefault((kind, stem), []).append(i)
    against = (ConditionKind.BASELINE, ConditionKind.CONTROL)
    colours = {stem: _AGAINST.get(stem, BROWN) for kind, stem in members if kind in against}
    taken = {*colours.values(), *_INTERVENTIONS}
    fresh = cycle([*_INTERVENTIONS, *(colour for colour in PALETTE["light"] if colour not in taken)])
    groups = []
    for (kind, stem), indices in members.items():
        colour = colours[stem] if kind in against else ink(mode) if kind is ConditionKind.CLEAN else next(fresh)
        name = f"{stem} ({len(indices)} draws)" if len(indices) > 1 else stem
        groups.append(Group(name, tuple(indices), colour, _WIDTHS.get(kind, 1.2)))
    return groups


def evaluation_figure(evaluation: Evaluation, mode: Mode = "light") -> go.Figure:
    """Above: the largest patch norm and the largest attention to a patch (mean over heads); dashed: the register's own.

    Below: the telling metrics of every condition, mean over images with a 95% interval. Baselines and
    controls are thin, the clean model is wide; draws of the same control share a colour and a line of the legend.

    Source: Jiang et al. 2025, figures 8, 22, 23 and 24.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> done = rl.evaluate_intervention(vit, synthetic_images(16, 0).images, rl.TestTimeRegisters(neurons))
        >>> figure = evaluation_figure(done)
        >>> sum(curve.line.dash == "dash" for curve in figure.data) > 0
        True
    """
    figure = go.Figure()
    groups = groups_of(evaluation, mode)
    n_layers = evaluation.sink_curve.shape[1]
    # Sublayer 0 is the embedding; the attention and the MLP of block l stand at l and l + 1/2.
    sublayers = np.arange(-1, len(evaluation.sublayers) - 1) / 2
    norms = (sublayers, evaluation.norm_curve, evaluation.register_curve, evaluation.sublayers)
    blocks = tuple(f"block {i}" for i in range(n_layers))
    attention = (np.arange(n_layers), evaluation.sink_curve, evaluation.register_sink_curve, blocks)
    for group in sorted(groups, key=lambda group: -group.width):  # wide ones below: where curves coincide, all show
        for axis, (x, patches, extra, places) in (("", norms), ("2", attention)):
            for member in group.members:
                for values, dash in ((patches[member], "solid"), (extra[member], "dash")):
                    if np.isfinite(values).any():
                        figure.add_trace(_curve(x, values, places, group, evaluation.conditions[member], dash, axis))
    for group in groups:
        figure.add_trace(_legend_entry(group))
    own = " (dashed: the register's own)" if np.isfinite(evaluation.register_curve).any() else ""
    extra = " (dashed: register, bias)" if np.isfinite(evaluation.register_sink_curve).any() else ""
    _panel(figure, "", (0.0, 0.44), f"Largest patch norm{own}", "residual norm")
    _panel(figure, "2", (0.56, 1.0), f"Largest attention to a patch{extra}", "attention (0 to 1)")
    figure.update_xaxes(title_text="block", **ticks_of_blocks(n_layers))
    figure.update_yaxes(rangemode="tozero")
    _forest(figure, evaluation, groups)
    return finished(figure, mode, height=780, legend=legend(-0.13), margin={"l": 130})


def norms_figure(evaluation: Evaluation, mode: Mode = "light") -> go.Figure:
    """Largest patch norm, layer by layer, of the clean model and the interventions, without baselines and controls.

    Source: Jiang et al. 2025, figure 8.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> done = rl.evaluate_intervention(vit, synthetic_images(16, 0).images, {"zeroed": rl.Ablate(neurons)})
        >>> [curve.name for curve in norms_figure(done).data]
        ['clean', 'zeroed']
    """
    figure = go.Figure()
    sublayers = np.arange(-1, len(evaluation.sublayers) - 1) / 2
    for group in groups_of(evaluation, mode):
        for member in group.members:
            if evaluation.kinds[member] in (ConditionKind.CLEAN, ConditionKind.TESTED):
                values = evaluation.norm_curve[member]
                line = _curve(sublayers, values, evaluation.sublayers, group, group.name, "solid", "")
                # Interventions often coincide: all but the first are dashed.
                dash = "dash" if member > 1 else "solid"
                figure.add_trace(line.update(name=group.name, showlegend=True, line={"dash": dash}))
    ticks = ticks_of_blocks(evaluation.sink_curve.shape[1])
    figure.update_xaxes(title_text="block (attention, then MLP)", **ticks)
    figure.update_yaxes(title_text="residual norm", rangemode="tozero")
    title = f"{evaluation.model}: largest patch norm, mean over {evaluation.n_images} images"
    return finished(figure, mode, height=400, title=title, legend=legend(-0.2))


def shift_figure(shift: OutlierShift, mode: Mode = "light") -> go.Figure:
    """How many images have which largest norm, and attention: at the target, and at any other patch.

    Source: Jiang et al. 2025, figures 4, 22, 23, 24 and 29.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> from registerlens.evaluation.shifts import measure_shift
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> found = measure_shift(vit, synthetic_images(8, 0).images, rl.TestTimeRegisters(neurons))
        >>> [bars.name for bars in shift_figure(found).data][:2]
        ['other patches', 'test-time register']
    """
    query = "[CLS]" if shift.sink_query == "cls" else "the average query"
    panels = (
        ("Largest residual norm", "norm", shift.other_norm, shift.target_norm),
        (f"Largest attention of {query}", "attention (0 to 1)", shift.other_attention, shift.target_attention),
    )
    figure = beside(*(panel[0] for panel in panels))
    for column, (_, unit, other, target) in enumerate(panels, start=1):
        edges = np.linspace(0, max(float(other.max()), float(target.max())) or 1.0, _BINS + 1)
        middles, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
        for name, values, colour in (("other patches", other, BLUE), (shift.target, target, ORANGE)):
            hover = "%{x:.3g}: %{y} images<extra>" + name + "</extra>"
            histogram = bars(middles, np.histogram(values, edges)[0], name, colour, hover, width=width, opacity=0.75)
            figure.add_trace(histogram.update(legendgroup=name, showlegend=column == 1), 1, column)
        figure.update_xaxes(title_text=unit, rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title_text="images", col=1)
    title = f"{shift.model}: after block {shift.layer}, {shift.n_images} images"
    look = {"legend": legend(-0.3), "margin": {"t": 90}, "barmode": "overlay", "bargap": 0}
    return finished(figure, mode, height=400, title=title, **look)


def pruning_figure(pruning: Pruning, mode: Mode = "light") -> go.Figure:
    """Outliers left, and the cosines to the clean run, by the number of neurons moved; a line marks the smallest set.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> from registerlens.evaluation.pruning import prune
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> [one.name for one in pruning_figure(prune(vit, synthetic_images(8, 0).images, neurons)).data]
        ['outliers left', 'normal patches']
    """
    figure, numbers = beside("Outliers left", "Cosine to the clean run"), np.arange(len(pruning.outliers))
    hover = "%{x} neurons: %{y:.3g}"
    figure.add_trace(curve(numbers, pruning.outliers, "outliers left", RED, hover), 1, 1)
    for name, values, colour in (("[CLS]", pruning.cos_cls, BLUE), ("normal patches", pruning.cos_normal, GREEN)):
        if np.isfinite(values).all():
            figure.add_trace(curve(numbers, values, name, colour, hover), 1, 2)
    for column in (1, 2) if pruning.smallest is not None else ():
        mark(figure, column, x=pruning.smallest)
    figure.update_xaxes(title_text="neurons moved")
    figure.update_yaxes(title_text="outliers per image", rangemode="tozero", col=1)
    return finished(figure, mode, height=400, title=pruning.model, legend=legend(-0.25))


def _curve(
    x: np.ndarray, y: np.ndarray, places: tuple[str, ...], group: Group, condition: str, dash: str, axis: str
) -> go.Scatter:
    extra = "" if dash == "solid" else ", register or bias"
    hover = f"{condition}{extra}<br>%{{text}}: %{{y:.3g}}<extra></extra>"
    line = curve(x, y, None, group.colour, hover, dash=dash, mode="lines", text=places, showlegend=False)
    return line.update(line={"width": group.width}, legendgroup=group.name, xaxis=f"x{axis}", yaxis=f"y{axis}")


def _legend_entry(group: Group) -> go.Scatter:
    """A line for the legend alone, so that its order is that of the conditions."""
    line = {"color": group.colour, "width": group.width}
    return go.Scatter(x=[None], y=[None], mode="lines", name=group.name, legendgroup=group.name, line=line)


def _panel(figure: go.Figure, axis: str, x: tuple[float, float], title: str, unit: str) -> None:
    """One of the upper panels."""
    figure.update_layout(
        {
            f"xaxis{axis}": {"domain": x, "anchor": f"y{axis}"},
            f"yaxis{axis}": {"domain": (0.58, 1.0), "anchor": f"x{axis}", "title": {"text": unit}},
        }
    )
    size = 13  # the longest title has to fit above its panel
    where = {"xref": "paper", "yref": "paper", "yanchor": "bottom", "yshift": 8}
    note(figure, title, sum(x) / 2, 1, "center", font={"size": size}, **where)


def _forest(figure: go.Figure, evaluation: Evaluation, groups: list[Group]) -> None:
    """One panel of dots for each telling metric; rows are the groups, draws of one control side by side."""
    frame = evaluation.to_dataframe()
    metrics = [metric for metric in FOREST if metric in set(frame["metric"])]
    width = (1.0 - 0.04 * (len(metrics) - 1)) / len(metrics)
    for i, metric in enumerate(metrics):
        axis = str(i + 3)
        for row, group in enumerate(groups):
            figure.add_trace(_dots(evaluation, frame.loc[frame["metric"] == metric], row, group, axis))
        left = i * (width + 0.04)
        figure.update_layout(
            {
                f"xaxis{axis}": {
                    "domain": (left, left + width),
                    "anchor": f"y{axis}",
                    "title": {"text": FOREST[metric]},
                    "nticks": 5,
                },
                f"yaxis{axis}": {
                    "domain": (0.0, 0.42),
                    "anchor": f"x{axis}",
                    "range": [len(groups) - 0.5, -0.5],  # the clean model at the top
                    "tickvals": list(range(len(groups))),
                    "ticktext": [group.name for group in groups],
                    "showticklabels": i == 0,
                },
            }
        )


def _dots(evaluation: Evaluation, frame: pd.DataFrame, row: int, group: Group, axis: str) -> go.Scatter:
    names = [evaluation.conditions[member] for member in group.members]
    mine = frame.set_index("condition").reindex(names)
    spread = np.linspace(-0.2, 0.2, len(names)) if len(names) > 1 else np.zeros(1)
    middle, low, high = mine["mean"], mine["low"], mine["high"]
    ends = map(interval_words, low, high)
    text = [f"{name}: {mean:.4g} ({words})" for name, mean, words in zip(names, middle, ends, strict=True)]
    error = interval(middle, low, high, symmetric=False, thickness=1.2, width=3)
    size = 6 if group.width < 2 else 9
    marks = dots(middle, row + spread, None, group.colour, size, "%{text}", text=text, error_x=error, showlegend=False)
    return marks.update(legendgroup=group.name, xaxis=f"x{axis}", yaxis=f"y{axis}")
