"""Histograms of where norm and attention end up when outliers are moved."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.evaluation.shifts import OutlierShift
from registerlens.viz.theme import BLUE, ORANGE, Mode, apply_theme

BINS = 40
"""Bars from zero to the largest value."""


def shift_figure(found: OutlierShift, mode: Mode = "light") -> go.Figure:
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
    query = "[CLS]" if found.sink_query == "cls" else "the average query"
    panels = (
        ("Largest residual norm", "norm", found.other_norm, found.target_norm),
        (f"Largest attention of {query}", "attention (0 to 1)", found.other_attention, found.target_attention),
    )
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1, subplot_titles=[panel[0] for panel in panels])
    for column, (_, unit, other, target) in enumerate(panels, start=1):
        edges = np.linspace(0, max(float(other.max()), float(target.max())) or 1.0, BINS + 1)
        for name, values, colour in (("other patches", other, BLUE), (found.target, target, ORANGE)):
            figure.add_trace(
                go.Bar(
                    x=(edges[:-1] + edges[1:]) / 2,
                    y=np.histogram(values, edges)[0],
                    width=edges[1] - edges[0],
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    opacity=0.75,
                    marker={"color": colour, "line": {"width": 0}},
                    hovertemplate="%{x:.3g}: %{y} images<extra>" + name + "</extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text=unit, rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title_text="images", col=1)
    figure.update_layout(
        height=400,
        barmode="overlay",
        bargap=0,
        title=f"{found.model}: after block {found.layer}, {found.n_images} images",
        legend={"orientation": "h", "x": 0, "y": -0.3},
    )
    return apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 90})
