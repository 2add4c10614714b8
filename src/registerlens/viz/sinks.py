"""Maps layer x head: what kinds of sinks a model has, and what editing or restricting attention changes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from registerlens.analysis.faithfulness import Faithfulness
from registerlens.analysis.mechanism import SinkEffects
from registerlens.analysis.sink_events import MECHANISMS
from registerlens.analysis.sink_kinds import SinkKinds
from registerlens.theory.value_update import ValueUpdate
from registerlens.viz.parts import beside, curve, finished, ticks_of_blocks
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, RED, SKY, Mode

_TITLES = {"nop": "NOP: switches the head off", "broadcast": "Broadcast: one message to all", "other": "Other sinks"}
_MEASURES = {
    "head_output": "relative change of what the head writes",
    "cls": "relative change of the final [CLS]",
    "cls_cosine": "cosine of the final [CLS] to the unedited one",
    "output": "relative change of the output",
    "output_cosine": "cosine of the output to the unedited one",
}


def sink_map(sinks: SinkKinds, threshold: float, mode: Mode = "light") -> go.Figure:
    """Share of images in which a head has a sink, a panel for each kind.

    Raises:
        ConfigError: the sweep has no such threshold.

    Source: Fesser et al. 2026 (2606.08105).

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.analysis.sink_kinds import classify_sinks
        >>> found = classify_sinks(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48))
        >>> [panel.name for panel in sink_map(found, 0.3).data]
        ['nop', 'broadcast', 'other']
    """
    at = sinks.index(threshold)
    details = np.stack([sinks.output_ratio[at], sinks.value_ratio[at], sinks.stable_rank[at], sinks.received], -1)
    hover = (
        "head %{y}.%{x}: %{z:.0%} of images<br>the sink draws %{customdata[3]:.2f} on average<br>"
        "it writes %{customdata[0]:.2f} x the others (values %{customdata[1]:.2f} x)<br>"
        "stable rank %{customdata[2]:.2f}<extra></extra>"
    )
    titles = [_TITLES[name] for name in MECHANISMS]
    shares = sinks.mechanisms[:, at] / sinks.n_images
    figure = _maps(MECHANISMS, shares, details, hover, titles, gap=0.04, ticks=6)
    title = f"{sinks.model}: sinks that {sinks.queries:.0%} of queries pay at least {threshold:g}"
    bar = {"title": "share of images", "tickformat": ".0%"}
    colours = {"cmin": 0, "cmax": 1, "colorscale": "Viridis", "colorbar": bar}
    return finished(figure, mode, height=420, title=title, coloraxis=colours, margin={"t": 90})


def effect_map(effects: SinkEffects, measure: str = "output", mode: Mode = "light") -> go.Figure:
    """One measure of `SinkEffects`, a panel for each edit of the sink; blank where a head has no sink.

    Raises:
        ConfigError: there is no such measure.

    Source: Fesser et al. 2026 (2606.08105).

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.mechanism import sink_no_op
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(4, 0).images
        >>> found = sink_no_op(vit, images, queries=0.75, edits=["remove", "zero"])
        >>> [panel.name for panel in effect_map(found).data]
        ['remove', 'zero']
    """
    values = [effects.of(measure, edit) for edit in effects.edits]
    hover = "head %{y}.%{x}: %{z:.3g}<br>%{customdata} images with a sink<extra></extra>"
    titles = [edit.replace("_", " ") for edit in effects.edits]
    figure = _maps(effects.edits, values, effects.events, hover, titles, gap=0.03, ticks=4)
    title = f"{effects.model}: {_MEASURES[measure]} when a head's sink is edited"
    colours = {"colorscale": "Viridis", "colorbar": {"title": "cosine" if "cosine" in measure else "change"}}
    return finished(figure, mode, height=420, title=title, coloraxis=colours, margin={"t": 90}, grid=False)


def _maps(
    names: Sequence[str], values: Any, details: np.ndarray, hover: str, titles: Sequence[str], gap: float, ticks: int
) -> go.Figure:
    """Maps with a row a block and a column a head, beside each other on one colour scale.

    Args:
        names: one a map.
        values: what each shows.
        details: of every head, for the hover.
        hover: what it says.
        titles: above the maps.
        gap: between them.
        ticks: at some so many heads.
    """
    figure = beside(*titles, gap=gap, shared_yaxes=True)
    for column, (name, grid) in enumerate(zip(names, values, strict=True), start=1):
        cells = go.Heatmap(z=grid, customdata=details, name=name, coloraxis="coloraxis", hovertemplate=hover)
        figure.add_trace(cells, 1, column)
    layers, heads = details.shape[:2]
    figure.update_xaxes(title_text="head", **ticks_of_blocks(heads, ticks))
    figure.update_yaxes(autorange="reversed", **ticks_of_blocks(layers))
    return figure.update_yaxes(title_text="block", row=1, col=1)


def faithfulness_figure(faithfulness: Faithfulness, mode: Mode = "light") -> go.Figure:
    """What is left of the [CLS] output, and of its last update, when [CLS] may look at some tokens only.

    Source: Lappe and Giese 2025.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.analysis.faithfulness import faithfulness
        >>> cfg = rl.ViTConfig(n_layers=2, d_model=32, n_heads=2, d_mlp=64, image_size=(32, 32), patch_size=(8, 8))
        >>> found = faithfulness(rl.HookedViT(cfg), torch.rand(4, 3, 32, 32))
        >>> [bars.name for bars in faithfulness_figure(found).data]
        ['output, cosine', 'output, CKA', 'update, cosine', 'update, CKA']
    """
    labels = [
        f"{name.replace('_', ' ')}<br>{share:.0%} of attention"
        for name, share in zip(faithfulness.restrictions, faithfulness.attention, strict=True)
    ]
    bars = (
        ("output, cosine", faithfulness.cosine, BLUE),
        ("output, CKA", faithfulness.cka, SKY),
        ("update, cosine", faithfulness.update_cosine, RED),
        ("update, CKA", faithfulness.update_cka, ORANGE),
    )
    figure = go.Figure()
    for name, values, colour in bars:
        figure.add_bar(x=labels, y=values, name=name, marker={"color": colour}, hovertemplate="%{y:.3f}")
    figure.update_yaxes(title_text="agreement with the unrestricted [CLS]")
    title = f"{faithfulness.model}: the last layer's [CLS] restricted to some tokens"
    return finished(figure, mode, height=420, title=title, barmode="group", closest=False)


def value_update_figure(update: ValueUpdate, mode: Mode = "light") -> go.Figure:
    """Cosines of updates to the reference's, and the registers' share, condition by condition.

    Source: Jiang et al. 2025, equation 19 and table 8.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.theory.value_update import value_update
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> found = value_update(vit, torch.rand(2, 3, 48, 48), neurons, registers=[1, 2])
        >>> [curve.name for curve in value_update_figure(found).data]
        ["registers' update, cosine", 'rest, cosine', 'attention output, cosine', 'attention to registers']
    """
    figure = go.Figure()
    for name, values, colour, dash in (
        ("registers' update, cosine", update.cosine, RED, "solid"),
        ("rest, cosine", update.rest_cosine, GREY, "solid"),
        ("attention output, cosine", update.output_cosine, BLUE, "solid"),
        ("attention to registers", update.attention, GREEN, "dot"),
    ):
        figure.add_trace(curve(list(update.conditions), values, name, colour, "%{y:.3f}", dash=dash))
    figure.update_yaxes(title_text="cosine; share of attention")
    title = f"{update.model}: what registers write in block {update.layer}"
    return finished(figure, mode, height=420, title=title, closest=False)
