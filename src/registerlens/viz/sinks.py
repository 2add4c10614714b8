"""Maps layer x head: what kinds of sinks a model has, and what editing or restricting attention changes."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.analysis.faithfulness import Faithfulness
from registerlens.analysis.mechanism import SinkEffects
from registerlens.analysis.sink_counts import MECHANISMS
from registerlens.analysis.sink_kinds import SinkKinds
from registerlens.theory.value_update import ValueUpdate
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, RED, SKY, Mode, apply_theme

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
    figure = make_subplots(
        rows=1,
        cols=len(MECHANISMS),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[_TITLES[name] for name in MECHANISMS],
    )
    for column, (name, counts) in enumerate(zip(MECHANISMS, sinks.mechanisms[:, at], strict=True), start=1):
        figure.add_trace(
            go.Heatmap(
                z=counts / sinks.n_images,
                customdata=details,
                name=name,
                coloraxis="coloraxis",
                hovertemplate=(
                    "block %{y}, head %{x}: %{z:.0%} of images<br>the sink draws %{customdata[3]:.2f} on average<br>"
                    "it writes %{customdata[0]:.2f} x the others (values %{customdata[1]:.2f} x)<br>"
                    "stable rank %{customdata[2]:.2f}<extra></extra>"
                ),
            ),
            row=1,
            col=column,
        )
    layers, heads = sinks.received.shape
    figure.update_xaxes(title_text="head", tick0=0, dtick=max(1, heads // 6))
    figure.update_yaxes(tick0=0, dtick=max(1, layers // 12), autorange="reversed")
    figure.update_yaxes(title_text="block", row=1, col=1)
    figure.update_layout(
        height=420,
        title=f"{sinks.model}: sinks that {sinks.queries:.0%} of queries pay at least {threshold:g}",
        coloraxis={
            "cmin": 0,
            "cmax": 1,
            "colorscale": "Viridis",
            "colorbar": {"title": "share of images", "tickformat": ".0%"},
        },
    )
    return apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 90})


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
    figure = make_subplots(
        rows=1,
        cols=len(values),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[edit.replace("_", " ") for edit in effects.edits],
    )
    for column, (edit, one) in enumerate(zip(effects.edits, values, strict=True), start=1):
        figure.add_trace(
            go.Heatmap(
                z=one,
                customdata=effects.events,
                name=edit,
                coloraxis="coloraxis",
                hovertemplate="block %{y}, head %{x}: %{z:.3g}<br>%{customdata} images with a sink<extra></extra>",
            ),
            row=1,
            col=column,
        )
    layers, heads = effects.events.shape
    figure.update_xaxes(title_text="head", tick0=0, dtick=max(1, heads // 4))
    figure.update_yaxes(tick0=0, dtick=max(1, layers // 12), autorange="reversed")
    figure.update_yaxes(title_text="block", row=1, col=1)
    figure.update_layout(
        height=420,
        title=f"{effects.model}: {_MEASURES[measure]} when a head's sink is edited",
        coloraxis={"colorscale": "Viridis", "colorbar": {"title": "cosine" if "cosine" in measure else "change"}},
    )
    figure = apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 90})
    return figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def faithfulness_figure(found: Faithfulness, mode: Mode = "light") -> go.Figure:
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
        for name, share in zip(found.restrictions, found.attention, strict=True)
    ]
    bars = (
        ("output, cosine", found.cosine, BLUE),
        ("output, CKA", found.cka, SKY),
        ("update, cosine", found.update_cosine, RED),
        ("update, CKA", found.update_cka, ORANGE),
    )
    figure = go.Figure(
        [
            go.Bar(x=labels, y=values, name=name, marker={"color": colour}, hovertemplate="%{y:.3f}")
            for name, values, colour in bars
        ]
    )
    figure.update_yaxes(title_text="agreement with the unrestricted [CLS]")
    figure.update_layout(
        height=420, barmode="group", title=f"{found.model}: the last layer's [CLS] restricted to some tokens"
    )
    return apply_theme(figure, mode)


def value_update_figure(found: ValueUpdate, mode: Mode = "light") -> go.Figure:
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
    curves = (
        ("registers' update, cosine", found.cosine, RED),
        ("rest, cosine", found.rest_cosine, GREY),
        ("attention output, cosine", found.output_cosine, BLUE),
        ("attention to registers", found.attention, GREEN),
    )
    figure = go.Figure(
        [
            go.Scatter(
                x=list(found.conditions),
                y=values,
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": "dot" if name.startswith("attention to") else "solid"},
                hovertemplate="%{y:.3f}",
            )
            for name, values, colour in curves
        ]
    )
    figure.update_yaxes(title_text="cosine; share of attention")
    figure.update_layout(height=420, title=f"{found.model}: what registers write in block {found.layer}")
    return apply_theme(figure, mode)
