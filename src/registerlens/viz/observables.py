"""Massive activations, the overlap of the observables, and singular defects."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from registerlens.analysis.local_information import GROUPS, LocalInformation
from registerlens.analysis.massive import MassiveActivations
from registerlens.analysis.overlap import Overlap
from registerlens.analysis.singular_defects import SingularDefects
from registerlens.viz.parts import bars, beside, curve, finished, legend, mark, note, sentence, ticks_of_blocks
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, RED, SKY, Mode, on_cells

_NAMED = 5
"""Neurons named in the figure of singular defects."""


def massive_figure(massive: MassiveActivations, mode: Mode = "light") -> go.Figure:
    """Largest and median magnitude, the companions, and the channels of largest magnitude where they stand out most.

    Source: Sun et al. 2024, figures 1 and 2.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.analysis.massive import massive_activations
        >>> found = massive_activations(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48))
        >>> [curve.name for curve in massive_figure(found).data][:2]
        ['largest magnitude', 'median magnitude']
    """
    at = int(massive.ratio.argmax())
    channels = f"Channels at {massive.places[at]}, by rank"
    figure = beside("Magnitudes in the stream", "Free of the stream's scale", channels, gap=0.08)
    for column, y, name, colour, dash in (
        (1, massive.largest, "largest magnitude", RED, "solid"),
        (1, massive.median, "median magnitude", GREY, "dot"),
        (2, massive.ratio, "largest / median", ORANGE, "solid"),
        (2, massive.kurtosis, "kurtosis, most peaked token", BLUE, "solid"),
        (2, massive.typical_kurtosis, "kurtosis, average token", SKY, "dot"),
    ):
        figure.add_trace(curve(massive.places, y, name, colour, dash=dash), 1, column)
    order = np.argsort(-massive.channel_largest[at], kind="stable")
    ranks, sizes = np.arange(1, len(order) + 1), massive.channel_largest[at][order]
    top = set(massive.top_channels[at].tolist())
    colours = [RED if channel in top else BLUE for channel in order.tolist()]
    trace = bars(ranks, sizes, None, colours, "%{text}: %{y:.3g}<extra></extra>", showlegend=False)
    figure.add_trace(trace.update(text=[f"channel {channel}" for channel in order], textposition="none"), 1, 3)
    listed = [f"channel {channel}: {massive.channel_largest[at, channel]:.3g}" for channel in massive.top_channels[at]]
    note(figure, "<br>".join(listed), 1, 1, "right", align="right", xref="x3 domain", yref="y3 domain")
    step = -(-len(massive.places) // 8)  # eight ticks at most, or they touch
    ticks = massive.places[::step]
    short = [place.removesuffix(".mlp") for place in ticks]
    for column in (1, 2):
        figure.update_xaxes(title_text="after block", tickvals=ticks, ticktext=short, tickangle=0, row=1, col=column)
        figure.update_yaxes(type="log", dtick=1, row=1, col=column)
    figure.update_xaxes(title_text="rank of the channel", row=1, col=3)
    figure.update_yaxes(title_text="magnitude (log)", row=1, col=1)
    figure.update_yaxes(title_text="no unit (log)", row=1, col=2)
    figure.update_yaxes(title_text="largest magnitude (log)", type="log", dtick=1, row=1, col=3)
    return finished(figure, mode, height=430, legend=legend(-0.22), bargap=0, closest=False)


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
    figure = beside(*(title for title, _ in panels), gap=0.04, shared_yaxes=True)
    names = [name.replace(" ", "<br>", 1) for name in overlap.observables]
    counts = np.diag(overlap.counts)
    for column, (_, values) in enumerate(panels, start=1):
        figure.add_trace(_heat_map(values, names, column == len(panels), mode), row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    sizes = ", ".join(f"{name} {n}" for name, n in zip(overlap.observables, counts, strict=True))
    title = sentence(f"{overlap.model}: {overlap.n_patches} patches; {sizes}")
    return finished(figure, mode, height=430, title=title, margin={"t": 110, "l": 90}, grid=False)


def _heat_map(values: Float[np.ndarray, "row column"], names: list[str], scale: bool, mode: Mode) -> go.Heatmap:
    text = np.array([["none" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values])
    cells = go.Heatmap(z=values, x=names, y=names, zmin=0, zmax=1, colorscale="Viridis", showscale=scale)
    cells.update(customdata=text, hovertemplate="%{y}, %{x}: %{customdata}<extra></extra>")
    return cells.update(on_cells(text, values, 0.0, 1.0, "Viridis", mode, width=220))


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
    figure = beside(left, right)
    curves = (
        (("outliers", defects.outlier_angle, RED), ("other patches", defects.normal_angle, BLUE))
        if measured
        else (("first / second singular value", defects.dominance, BLUE),)
    )
    for name, y, colour in curves:
        figure.add_trace(curve(layers, y, name, colour, dash="solid", showlegend=measured), 1, 1)
    if measured:
        mark(figure, 1, y=defects.random_angle)
    _alignments(figure, defects)
    figure.update_xaxes(title_text="block", **ticks_of_blocks(len(layers)))
    if measured:
        figure.update_yaxes(title_text="degrees", range=[0, 92], row=1, col=1)
    else:
        figure.update_yaxes(title_text="ratio (1: arbitrary)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="|cos| (0 to 1)", range=[0, 1.05], row=1, col=2)
    return finished(figure, mode, height=450, legend=legend(-0.2), margin={"t": 80})


def _alignments(figure: go.Figure, defects: SingularDefects) -> None:
    n_layers, d_mlp = defects.alignment.shape
    # Each block's neurons stand side by side in a strip, in the order of their index.
    strip = np.linspace(-0.35, 0.35, d_mlp)
    best = defects.neurons(top=_NAMED)
    traces = [
        ("all neurons", np.repeat(np.arange(n_layers), d_mlp), np.tile(np.arange(d_mlp), n_layers), BLUE, 3),
        (f"best {len(best)} neurons", best["layer"].to_numpy(), best["neuron"].to_numpy(), RED, 8),
    ]
    for name, layer, neuron, colour, size in traces:
        place = np.stack([layer, neuron], 1).astype(np.int32)  # half the page
        points = go.Scattergl(x=(layer + strip[neuron]).astype(np.float32), y=defects.alignment[layer, neuron])
        points.update(name=name, customdata=place, mode="markers")
        points.update(marker={"color": colour, "size": size, "opacity": 0.5 if size < 5 else 1.0})
        points.update(hovertemplate="neuron %{customdata[0]}:%{customdata[1]}: %{y:.3f}<extra></extra>")
        figure.add_trace(points, 1, 2)
    limit = float(np.cos(np.radians(defects.random_angle)))
    figure.add_hline(y=limit, line={"color": GREEN, "dash": "dash", "width": 1}, row=1, col=2)  # type: ignore[arg-type]


def local_information_figure(information: LocalInformation, mode: Mode = "light") -> go.Figure:
    """What can be read of its own patch from a token, and how alike tokens are, place by place; the onset is marked."""
    figure = beside("Pixels of its own patch, read linearly", "Likeness of two tokens", gap=0.12)
    onset = information.sublayers.index(information.detection.onset or information.detection.sublayer)
    for column, values in enumerate((information.readable, information.likeness), start=1):
        for group, row, colour, dash in zip(GROUPS, values, (RED, BLUE), ("solid", "dash"), strict=True):
            hover = f"{group}: %{{y:.3f}}<extra></extra>"
            line = curve(information.sublayers, row, group, colour, hover, dash=dash, mode=None)
            figure.add_trace(line.update(legendgroup=group, showlegend=column == 1), 1, column)
        mark(figure, column, x=onset, dash="dot")
    figure.update_yaxes(title_text="R squared", row=1, col=1)
    figure.update_yaxes(title_text="mean cosine", row=1, col=2)
    figure.update_xaxes(title_text="after", tickangle=-60)
    return finished(figure, mode, height=380, legend=legend(1.25), closest=False)
