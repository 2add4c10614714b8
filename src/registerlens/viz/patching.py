"""Figures of patching: effects along paths, and attributions beside exact effects."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.circuits.attributions import Attributions
from registerlens.circuits.paths import PathEffects
from registerlens.viz.agreement import agreement_panel
from registerlens.viz.theme import BLUE, GREY, ORANGE, RED, Mode, apply_theme, ink

_DRAWN = 40
"""Receivers drawn at most, those with the largest effects."""


def paths_figure(found: PathEffects, mode: Mode = "light") -> go.Figure:
    """Mean effects with their 95% intervals: a bar a receiver, all of them together, and the whole corrupted image.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.paths import path_patching
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(4, 0).images
        >>> found = path_patching(
        ...     vit, images, images.roll(1, 0), "blocks.1.mlp.hook_post", "blocks.[23].attn.hook_k",
        ...     metric="largest_norm@5.mlp",
        ... )
        >>> len(paths_figure(found).data[0].y)
        4
    """
    table = found.to_dataframe()
    alone, sums = table.iloc[:-2], table.iloc[-2:]
    left_out = max(0, len(alone) - _DRAWN)
    if left_out:
        keep = np.sort(np.argsort(-np.abs(alone["effect"].to_numpy()), kind="stable")[:_DRAWN])
        alone = alone.iloc[keep]
    rows = [(alone, BLUE), (sums.iloc[:1], ORANGE), (sums.iloc[1:], GREY)]
    names = [name for some, _ in rows for name in some["receiver"]]
    effect, low, high = (
        np.concatenate([some[column].to_numpy() for some, _ in rows]) for column in ("effect", "low", "high")
    )
    interval = {"type": "data", "array": high - effect, "arrayminus": effect - low}
    interval |= {"thickness": 1.5, "width": 3, "color": ink(mode)}
    figure = go.Figure(
        go.Bar(
            x=effect,
            y=names,
            orientation="h",
            marker={"color": [colour for some, colour in rows for _ in range(len(some))]},
            error_x=interval,
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    title = f"{found.sender}, on {len(found.clean)} pairs"
    title += f" ({left_out} receivers with smaller effects left out)" if left_out else ""
    figure.update_layout(
        title={"text": title, "font": {"size": 14}}, height=170 + 26 * len(names), showlegend=False, bargap=0.35
    )
    figure = apply_theme(figure, mode).update_layout(hovermode="closest", margin={"l": 20})
    figure.update_xaxes(title_text=f"change of {found.words or found.metric}", zeroline=True, zerolinecolor=GREY)
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True, showgrid=False)


def attributions_figure(found: Attributions, mode: Mode = "light") -> go.Figure:
    """Left, each hook point as a whole, estimated and exact; right, single units, estimated against exact.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.attribution_patching import attribution_patching
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(4, 0).images
        >>> found = attribution_patching(
        ...     vit, images, images.roll(1, 0), "blocks.*.attn.hook_z", metric="largest_norm@5.mlp"
        ... )
        >>> [trace.name for trace in attributions_figure(found).data]
        ['attribution', 'exact', 'exact = estimated', 'random units', 'largest attributions']
    """
    titles = ("Whole hook points", f"Single units: {_agreement(found)}")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.14, subplot_titles=titles)
    for name, values, colour in (("attribution", found.by_name, BLUE), ("exact", found.whole, GREY)):
        figure.add_trace(
            go.Bar(
                x=values,
                y=[_short(point) for point in found.names],
                name=name,
                orientation="h",
                marker={"color": colour},
                hovertemplate="%{y}: %{x:.4g}<extra>" + name + "</extra>",
            ),
            row=1,
            col=1,
        )
    agreement_panel(figure, "attribution", "exact = estimated", _checked(found), "no unit was patched exactly")
    figure.update_annotations(font_size=13)
    height = 200 + max(260, 30 * len(found.names))
    figure.update_layout(height=height, legend={"orientation": "h", "x": 0, "y": -100 / height, "yanchor": "top"})
    figure = apply_theme(figure, mode).update_layout(hovermode="closest")
    figure.update_xaxes(title_text=f"change of {found.metric}", row=1, col=1)
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True, row=1, col=1)


def _checked(found: Attributions) -> list[go.Scatter]:
    """Units that were patched exactly, a trace a group."""
    table = found.to_dataframe().iloc[found.checked]
    dots = []
    for name, chosen, colour in (
        ("random units", ~found.is_candidate, ORANGE),
        ("largest attributions", found.is_candidate, RED),
    ):
        some = table[chosen]
        dots.append(
            go.Scatter(
                x=some["attribution"],
                y=some["exact"],
                text=[f"{n} {k} {u}" for n, k, u in zip(some["name"], some["kind"], some["unit"], strict=True)],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 8, "opacity": 0.8},
                hovertemplate="%{text}<br>attribution %{x:.4g}, exact %{y:.4g}<extra></extra>",
            )
        )
    return dots


def _agreement(found: Attributions) -> str:
    rho = found.on_sample
    return "rank correlation " + ("unknown" if np.isnan(rho.rho) else f"{rho.rho:.2f} (random, n = {rho.n})")


def _short(name: str) -> str:
    return name.replace("blocks.", "").replace("hook_", "")
