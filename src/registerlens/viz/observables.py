"""Massive activations, the overlap of the observables, and singular defects."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from registerlens.analysis.local_information import GROUPS, LocalInformation
from registerlens.analysis.massive import MassiveActivations
from registerlens.analysis.overlap import Overlap
from registerlens.analysis.singular_defects import SingularDefects
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, RED, SKY, Mode, apply_theme, on_cells

_NAMED = 5
"""Neurons named in the figure of singular defects."""

_MARK = {"color": GREY, "dash": "dot", "width": 1}


def massive_figure(found: MassiveActivations, mode: Mode = "light") -> go.Figure:
    """Largest and median magnitude, the companions, and the channels of largest magnitude where they stand out most.

    Source: Sun et al. 2024, figures 1 and 2.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.analysis.massive import massive_activations
        >>> found = massive_activations(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48))
        >>> [curve.name for curve in massive_figure(found).data][:2]
        ['largest magnitude', 'median magnitude']
    """
    at = int(found.ratio.argmax())
    figure = make_subplots(
        rows=1,
        cols=3,
        horizontal_spacing=0.08,
        subplot_titles=(
            "Magnitudes in the stream",
            "Free of the stream's scale",
            f"Channels at {found.places[at]}, by rank",
        ),
    )

    def curve(column: int, y: np.ndarray, name: str, colour: str, dash: str = "solid") -> None:
        figure.add_trace(
            go.Scatter(
                x=found.places,
                y=y,
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                hovertemplate="%{y:.3g}",
            ),
            row=1,
            col=column,
        )

    curve(1, found.largest, "largest magnitude", RED)
    curve(1, found.median, "median magnitude", GREY, "dot")
    curve(2, found.ratio, "largest / median", ORANGE)
    curve(2, found.kurtosis, "kurtosis, most peaked token", BLUE)
    curve(2, found.typical_kurtosis, "kurtosis, average token", SKY, "dot")
    order = np.argsort(-found.channel_largest[at], kind="stable")
    top = set(found.top_channels[at].tolist())
    figure.add_trace(
        go.Bar(
            x=np.arange(1, len(order) + 1),
            y=found.channel_largest[at][order],
            marker={"color": [RED if channel in top else BLUE for channel in order.tolist()], "line": {"width": 0}},
            text=[f"channel {channel}" for channel in order],
            textposition="none",
            showlegend=False,
            hovertemplate="%{text}: %{y:.3g}<extra></extra>",
        ),
        row=1,
        col=3,
    )
    figure.add_annotation(
        x=1,
        y=1,
        xref="x3 domain",
        yref="y3 domain",
        xanchor="right",
        yanchor="top",
        align="right",
        showarrow=False,
        text="<br>".join(
            f"channel {channel}: {found.channel_largest[at, channel]:.3g}" for channel in found.top_channels[at]
        ),
    )
    step = -(-len(found.places) // 8)  # eight ticks at most, or they touch
    ticks = found.places[::step]
    short = [place.removesuffix(".mlp") for place in ticks]
    for column in (1, 2):
        figure.update_xaxes(title_text="after block", tickvals=ticks, ticktext=short, tickangle=0, row=1, col=column)
        figure.update_yaxes(type="log", dtick=1, row=1, col=column)
    figure.update_xaxes(title_text="rank of the channel", row=1, col=3)
    figure.update_yaxes(title_text="magnitude (log)", row=1, col=1)
    figure.update_yaxes(title_text="no unit (log)", row=1, col=2)
    figure.update_yaxes(title_text="largest magnitude (log)", type="log", dtick=1, row=1, col=3)
    figure.update_layout(
        height=430,
        bargap=0,
        legend={"orientation": "h", "x": 0, "y": -0.22},
    )
    return apply_theme(figure, mode)


def overlap_figure(overlap: Overlap, mode: Mode = "light") -> go.Figure:
    """Conditional shares and Jaccard indices by cut-offs, and matched shares, as heat maps from 0 to 1.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.overlap import observable_overlap
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> len(overlap_figure(observable_overlap(vit, synthetic_images(16, 0).images)).data)
        3
    """
    panels = (
        ("Of the row's patches, this share<br>shows the column's observable", overlap.conditional),
        ("Both over either<br>(Jaccard index)", overlap.jaccard),
        (f"First k by both rankings, share<br>(unrelated: {overlap.chance:.2f})", overlap.matched_share),
    )
    figure = make_subplots(
        rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=[title for title, _ in panels]
    )
    names = [name.replace(" ", "<br>", 1) for name in overlap.observables]
    counts = np.diag(overlap.counts)
    for column, (_, values) in enumerate(panels, start=1):
        figure.add_trace(_heat_map(values, names, column == len(panels), mode), row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    figure.update_layout(
        height=430,
        title={
            "text": f"{overlap.model}: {overlap.n_patches} patches; "
            + ", ".join(f"{name} {n}" for name, n in zip(overlap.observables, counts, strict=True)),
            "font": {"size": 14},
        },
    )
    figure = apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 110, "l": 90})
    return figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def _heat_map(values: Float[np.ndarray, "row column"], names: list[str], scale: bool, mode: Mode) -> go.Heatmap:
    text = np.array([["none" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values])
    return go.Heatmap(
        z=values,
        x=names,
        y=names,
        zmin=0,
        zmax=1,
        colorscale="Viridis",
        showscale=scale,
        **on_cells(text, values, 0.0, 1.0, "Viridis", mode, width=220),
        customdata=text,
        hovertemplate="%{y}, %{x}: %{customdata}<extra></extra>",
    )


def defects_figure(defects: SingularDefects, mode: Mode = "light") -> go.Figure:
    """Angles of outliers and other patches to the singular direction; and every neuron's alignment, block by block.

    Source: Wang et al. 2024 (SINDER) for the angles.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.singular_defects import singular_defects
        >>> defects = singular_defects(rl.HookedViT.from_pretrained("registerlens:tiny"))
        >>> [curve.name for curve in defects_figure(defects).data][-2:]
        ['all neurons', 'best 5 neurons']
    """
    layers = np.arange(len(defects.directions))
    measured = defects.n_images > 0
    left = "First singular value over the second"
    if measured:
        left = "Angle of patches to the singular direction<br>(dashed: one random direction in 20 is below)"
    right = "|cos| of what each neuron writes to the direction<br>(dashed: one random direction in 20 is above)"
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.1,
        subplot_titles=(left, right),
    )
    curves = (
        (("outliers", defects.outlier_angle, RED, "solid"), ("other patches", defects.normal_angle, BLUE, "solid"))
        if measured
        else (("first / second singular value", defects.dominance, BLUE, "solid"),)
    )
    for name, y, colour, dash in curves:
        line = {"color": colour, "dash": dash}
        shown = {"name": name, "mode": "lines+markers", "line": line, "hovertemplate": "%{y:.3g}"}
        figure.add_trace(go.Scatter(x=layers, y=y, showlegend=measured, **shown), row=1, col=1)
    if measured:
        line = {"color": GREY, "dash": "dash", "width": 1}
        figure.add_hline(y=defects.random_angle, line=line, row=1, col=1)  # type: ignore[arg-type]
    _alignments(figure, defects)
    step = max(1, len(layers) // 12)
    figure.update_xaxes(title_text="block", tick0=0, dtick=step)
    if measured:
        figure.update_yaxes(title_text="degrees", range=[0, 92], row=1, col=1)
    else:
        figure.update_yaxes(title_text="ratio (1: arbitrary)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="|cos| (0 to 1)", range=[0, 1.05], row=1, col=2)
    figure.update_layout(height=450, legend={"orientation": "h", "x": 0, "y": -0.2})
    return apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 80})


def _alignments(figure: go.Figure, defects: SingularDefects) -> None:
    n_layers, d_mlp = defects.alignment.shape
    # Each block's neurons stand side by side in a strip, in the order of their index.
    strip = np.linspace(-0.35, 0.35, d_mlp)
    best = defects.neurons(top=_NAMED)
    shown = [
        ("all neurons", np.repeat(np.arange(n_layers), d_mlp), np.tile(np.arange(d_mlp), n_layers), BLUE, 3),
        (f"best {len(best)} neurons", best["layer"].to_numpy(), best["neuron"].to_numpy(), RED, 8),
    ]
    for name, layer, neuron, colour, size in shown:
        figure.add_trace(
            go.Scattergl(
                x=(layer + strip[neuron]).astype(np.float32),
                y=defects.alignment[layer, neuron],
                customdata=np.stack([layer, neuron], 1).astype(np.int32),  # half the page
                name=name,
                mode="markers",
                marker={"color": colour, "size": size, "opacity": 0.5 if size < 5 else 1.0},
                hovertemplate="block %{customdata[0]}, neuron %{customdata[1]}: %{y:.3f}<extra></extra>",
            ),
            row=1,
            col=2,
        )
    limit = float(np.cos(np.radians(defects.random_angle)))
    figure.add_hline(y=limit, line={"color": GREEN, "dash": "dash", "width": 1}, row=1, col=2)  # type: ignore[arg-type]


def local_information_figure(found: LocalInformation, mode: Mode = "light") -> go.Figure:
    """What can be read of its own patch from a token, and how alike tokens are, place by place; the onset is marked."""
    titles = ("Pixels of its own patch, read linearly", "Likeness of two tokens")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    onset = found.sublayers.index(found.detection.onset or found.detection.sublayer)
    for column, values in enumerate((found.readable, found.likeness), start=1):
        for group, row, colour, dash in zip(GROUPS, values, (RED, BLUE), ("solid", "dash"), strict=True):
            line = go.Scatter(x=found.sublayers, y=row, name=group, line={"color": colour, "dash": dash})
            line.update(legendgroup=group, showlegend=column == 1, hovertemplate=f"{group}: %{{y:.3f}}<extra></extra>")
            figure.add_trace(line, row=1, col=column)
        figure.add_vline(x=onset, line=_MARK, row=1, col=column)  # type: ignore[arg-type]
    figure.update_yaxes(title_text="R squared", row=1, col=1)
    figure.update_yaxes(title_text="mean cosine", row=1, col=2)
    figure.update_xaxes(title_text="after", tickangle=-60)
    figure.update_layout(height=380, legend={"orientation": "h", "x": 0, "y": 1.25})
    return apply_theme(figure, mode)
