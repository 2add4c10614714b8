"""A circuit as a layered graph: neurons, the outliers' stream, heads block by block, [CLS], the output."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from registerlens.circuits.contributions import STREAM, VIA, Node
from registerlens.circuits.records import AttentionCircuit
from registerlens.viz.parts import finished, legend
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Mode, ink, paper

Point = tuple[float, float]

_ADDS: dict[Mode, str] = {"light": BLUE, "dark": SKY}
_COLOURS = {"neuron": ORANGE, "stream": PURPLE, "head": GREEN, "rest": GREY}
_SIZES = {"rest": 7, "neuron": 13, "stream": 26, "head": 16, "reader": 26, "output": 26}
_NAMES = {"neuron": "neurons", "stream": "outlier stream", "head": "heads", "rest": "all that is not shown"}
_WIDEST = 14.0
"""Pixels of an edge that is all of what its receiver gets."""
_STEPS = 33
"""Points of a drawn edge, which can be hovered over."""
_LISTED = 8
"""Most parts that a hover text lists."""


def circuit_figure(circuit: AttentionCircuit, mode: Mode = "light") -> go.Figure:
    """The circuit from left to right: an edge is as wide as its share of what its receiver gets, blue where it adds to
    it and red where it takes away; grey is what is not shown. Numbers on hovering.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.attention_circuit import attention_circuit
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> circuit = attention_circuit(vit, images, rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)]), check=False)
        >>> len(circuit_figure(circuit).layout.annotations) > 4
        True
    """
    drawing = _Drawing(circuit, _places(circuit))
    kinds = [kind for kind in _SIZES if kind in set(circuit.nodes["kind"])]
    signs = ((_ADDS[mode], "adds"), (RED, "takes away"))
    figure = go.Figure(
        [
            *(drawing.edge(row, mode) for row in circuit.edges.to_dict("records")),
            *(drawing.nodes(kind, mode) for kind in kinds),
            *(go.Scatter(x=[None], y=[None], mode="lines", line={"color": c, "width": 5}, name=n) for c, n in signs),
        ]
    )
    rows = max((place[1] for place in drawing.places.values()), default=0.0)
    title = {"text": _title(circuit), "font": {"size": 15}, "x": 0.01, "y": 0.98, "yanchor": "top"}
    height = int(min(1400, max(480, 170 + 34 * 2 * rows)))
    margin = {"l": 20, "r": 70, "t": 100, "b": 40}
    finished(figure, mode, height=height, title=title, legend=legend(-0.02, yanchor="top"), margin=margin)
    for x, text in drawing.headings():
        figure.add_annotation(x=x, y=1, yref="paper", yanchor="bottom", text=text, showarrow=False, font={"size": 12})
    span = [min(x for x, _ in drawing.places.values()) - 0.8, max(x for x, _ in drawing.places.values()) + 1.2]
    figure.update_xaxes(visible=False, range=span)
    figure.update_yaxes(visible=False, range=[-rows - 1.2, rows + 0.9])
    return figure


def _title(circuit: AttentionCircuit) -> str:
    images = f"{circuit.n_used} image{'s' * (circuit.n_used != 1)}"
    return f"From register neurons to {circuit.reader}: {escape(circuit.model)}, mean of {images}"


# Where things stand --------------------------------------------------------------------------------------------------


def _places(circuit: AttentionCircuit) -> dict[str, Point]:
    """A point a node: columns are blocks, from the first neurons' to the last heads', then the reader and the output.

    A rest stands below and to the left of the node it flows into.
    """
    nodes: Any = circuit.nodes
    edges: Any = circuit.edges
    written = edges.groupby("sender")["value"].sum().abs().to_dict()
    columns = _columns(nodes[nodes["kind"] == "neuron"], written)
    places = {name: (float(x), _middle(names) - i) for x, names in enumerate(columns) for i, name in enumerate(names)}
    stream = float(len(columns))
    places |= {name: (stream, 0.0) for name in nodes[nodes["kind"] == "stream"]["name"]}
    heads = nodes[nodes["kind"] == "head"]
    columns = _columns(heads, dict(zip(heads["name"], heads["attention"], strict=True)))
    # A row for every head: in one line, an edge to a later block would run through the heads before it.
    every = [(x, name) for x, names in enumerate(columns) for name in names]
    middle = _middle(every)
    places |= {name: (stream + 1.2 + x, middle - i) for i, (x, name) in enumerate(every)}
    ends = nodes[nodes["kind"].isin(["reader", "output"])]["name"].tolist()
    apart = max(2.0, middle)
    places |= {name: (stream + 1.8 + len(columns), apart * (_middle(ends) - i)) for i, name in enumerate(ends)}
    for sender, receiver in zip(edges["sender"], edges["receiver"], strict=True):
        if sender not in places:
            x, y = places[receiver]
            places[sender] = (x - 0.3, y - (0.42 if receiver in set(heads["name"]) else 1.1))
    return places


def _columns(nodes: Any, strength: dict[str, float]) -> list[list[str]]:
    """Names by block, the strongest first."""
    names: dict[int, list[str]] = {}
    for name, layer in sorted(zip(nodes["name"], nodes["layer"], strict=True), key=lambda node: -strength[node[0]]):
        names.setdefault(layer, []).append(name)
    return [names[layer] for layer in sorted(names)]


def _middle(things: Sequence[object]) -> float:
    return (len(things) - 1) / 2


@dataclass(frozen=True)
class _Drawing:
    circuit: AttentionCircuit
    places: dict[str, Point]

    def edge(self, row: dict[str, Any], mode: Mode) -> go.Scatter:
        """One edge as a curve."""
        rest = Node(row["sender"]).kind == "rest"
        colour = GREY if rest else _ADDS[mode] if row["value"] >= 0 else RED
        # Several groups of keys make several edges between the same nodes.
        bend = -0.35 * VIA.index(row["via"]) if row["via"] else 0.0
        x, y = _curve(self.places[row["sender"]], self.places[row["receiver"]], bend)
        return go.Scatter(
            x=x,
            y=y,
            mode="lines",
            line={
                "color": colour,
                "width": 1 + (_WIDEST - 1) * abs(row["share"]),
                "dash": "solid" if row["via"] in ("", VIA[0]) else "dot",
            },
            opacity=0.45 if rest else 0.6,
            hovertemplate=f"{self._edge_text(row)}<extra></extra>",
            showlegend=False,
        )

    def _edge_text(self, row: dict[str, Any]) -> str:
        via = f" (from {row['via']})" if row["via"] else ""
        lines = [
            f"<b>{row['sender']} \u2192 {row['receiver']}</b>{via}",
            f"{_number(row)}, {row['share']:+.1%} of its inflow",
        ]
        if row["effect"] == row["effect"]:
            lines.append(f"cut alone: {row['effect']:.3g} less; with scales held {row['effect_held']:.3g}")
        return "<br>".join(lines)

    def nodes(self, kind: str, mode: Mode) -> go.Scatter:
        """All nodes of a kind."""
        every: Any = self.circuit.nodes
        chosen = every[every["kind"] == kind].to_dict("records")
        at = [self.places[row["name"]] for row in chosen]
        ends = kind in ("reader", "output")
        return go.Scatter(
            x=[x for x, _ in at],
            y=[y for _, y in at],
            mode="markers" if kind == "rest" else "markers+text",
            marker={
                "color": ink(mode) if ends else _COLOURS[kind],
                "size": _SIZES[kind],
                "symbol": "square" if kind == "head" else "circle",
                "line": {"color": paper(mode), "width": 1.5},
            },
            text=["" if kind in ("stream", "rest") else _label(row) for row in chosen],
            textposition={"neuron": "middle left", "head": "top right"}.get(kind, "middle right"),
            textfont={"size": 11},
            customdata=[self._node_text(row) for row in chosen],
            hovertemplate="%{customdata}<extra></extra>",
            name=_NAMES.get(kind, kind),
            showlegend=kind in _NAMES,
            cliponaxis=False,
        )

    def _node_text(self, row: dict[str, Any]) -> str:
        if row["kind"] == "rest":
            return self._rest_text(Node(row["name"]).receiver)
        lines = [f"<b>{row['name']}</b>"]
        if row["whole"] == row["whole"]:
            lines.append(f"{row['unit']} {_number(row | {'value': row['whole']})}")
        if row["attention"] == row["attention"]:
            lines.append(f"attention to outliers {row['attention']:.1%}")
        if row["attention_without"] == row["attention_without"]:
            lines.append(f"without the shown neurons in their keys {row['attention_without']:.1%}")
        return "<br>".join(lines)

    def _rest_text(self, receiver: Node) -> str:
        """The largest parts of a node's inflow that have no node of their own there."""
        edges: Any = self.circuit.edges
        senders = set(edges[edges["receiver"] == receiver]["sender"])
        parts: Any = self.circuit.parts
        hidden = parts[(parts["receiver"] == receiver) & ~parts["part"].isin(senders)]
        if receiver.kind == "head":  # the stream's parts come by way of the stream
            stream = set(parts[parts["receiver"] == STREAM]["part"])
            hidden = hidden[~hidden["part"].isin(stream - {"biases"})]
        largest = hidden.iloc[np.argsort(-np.abs(hidden["value"].to_numpy()))[:_LISTED]]
        listed = [
            f"{part['value']:+.3g}  {part['part']}{f', from {via}' if (via := part['via']) else ''}"
            for part in largest.to_dict("records")
        ]
        more = f"and {len(hidden) - len(listed)} more" if len(hidden) > len(listed) else ""
        return "<br>".join([f"<b>{Node.rest_of(receiver)}</b>", *listed, *([more] if more else [])])

    def headings(self) -> list[tuple[float, str]]:
        """What stands above the columns."""
        heading_at: dict[float, str] = {}
        nodes: Any = self.circuit.nodes
        for kind in ("neuron", "stream", "head"):
            for row in nodes[nodes["kind"] == kind].to_dict("records"):
                what = {"neuron": "neurons of", "stream": "outlier<br>stream after", "head": "heads of"}[kind]
                heading_at[self.places[row["name"]][0]] = f"{what}<br>block {row['layer']}"
        return list(heading_at.items())


def _label(row: dict[str, Any]) -> str:
    if row["kind"] == "neuron":
        return f"{row['layer']}:{row['index']} "
    if row["kind"] == "head":
        return f"{row['layer']}.{row['index']} ({row['attention']:.0%})"
    return f"  {row['name']}<br>  {row['unit']} {row['whole']:.3g}"


def _number(row: dict[str, Any]) -> str:
    interval = "" if row["low"] != row["low"] else f" [{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['value']:.3g}{interval}"


def _curve(start: Point, end: Point, bend: float) -> tuple[Float[np.ndarray, " step"], Float[np.ndarray, " step"]]:
    """A line that leaves and arrives level, pushed down in its middle by `bend`."""
    t = np.linspace(0, 1, _STEPS)
    ease = t * t * (3 - 2 * t)
    x = start[0] + (end[0] - start[0]) * t
    return x, start[1] + (end[1] - start[1]) * ease + bend * 4 * t * (1 - t)
