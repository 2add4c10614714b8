"""The result: a circuit as tables of nodes, edges, paths and parts, in words, as a graph and as a figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from registerlens.analysis.detection import Detection
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.circuits.contributions import OUTPUT, STREAM, Node
from registerlens.codecs import table_of
from registerlens.errors import check_choice
from registerlens.results import ModelResult

if TYPE_CHECKING:
    import networkx as nx
    import plotly.graph_objects as go

Table = Literal["edges", "nodes", "paths", "parts"]
_INTERVAL = ("low", "high")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttentionCircuit(ModelResult):
    """The path from register neurons over the outlier tokens and the heads that sink in them to [CLS] and the output.

    Every number is a mean over images. What flows into a node adds up to the node's quantity: a node "rest of ..."
    holds what is not shown. Quantities: of the outlier stream, and of [CLS] (or the mean patch), the residual norm; of
    a head its score q . k / sqrt(d_head) of the reader's query with the outliers; of the output a logit, or its norm.
    """

    detection: Detection
    """Which patches are outliers."""
    neurons: RegisterNeurons
    """The neurons that were asked about."""
    block: int
    """The outliers' stream is taken after this block; heads of later blocks read it."""
    reader: str
    """Where the path ends: "[CLS]", or "mean patch" (the mean over ordinary patches), where there is no [CLS], or the
    output is a mean of other tokens."""
    output: str | None
    """What of the output is measured, in words; None where it is no part of the circuit."""
    min_share: float
    """The smallest share of a node's inflow that is shown."""
    n_images: int
    """Images that went through."""
    n_used: int
    """How many of these have an outlier and an ordinary patch; means are over them."""
    checked: bool
    """Whether edges were patched one by one."""
    sum_error: float
    """Largest relative difference between a sum of parts and its whole, over batches and receivers."""
    neuron_share: float
    """Share of the given neurons in what all neurons contribute to the outliers' stream."""
    onset_share: float
    """The same in the given neurons' blocks alone."""
    notes: tuple[str, ...]
    """What a reader of the numbers should know."""
    nodes: pd.DataFrame = field(
        metadata=table_of(
            words=("name", "kind", "unit"),
            numbers=("layer", "index", "whole", *_INTERVAL, "attention", "attention_without"),
        )
    )
    """name, kind ("neuron", "stream", "head", "reader", "output", "rest"), layer, index (-1: none), whole and unit (the
    node's quantity; NaN for what only sends), low, high, attention (a head's, to outliers) and attention_without (what
    is left of it when the shown neurons' writes are taken out of the outliers' keys; NaN if unchecked)."""
    edges: pd.DataFrame = field(
        metadata=table_of(
            words=("sender", "receiver", "via"),
            numbers=("value", *_INTERVAL, "share", "effect", "effect_low", "effect_high", "effect_held"),
        )
    )
    """sender, receiver, via (the group of keys that a head took it from), value, low, high (95% interval),
    share (of all magnitudes that flow into the receiver), effect (by how much the receiver's quantity falls when this
    edge alone is cut, and its norms take their scales anew; NaN if unchecked), effect_low, effect_high, effect_held
    (the same with scales and directions held, where it must be the value)."""
    paths: pd.DataFrame = field(
        metadata=table_of(
            words=(),
            numbers=(
                *("layer", "neuron", "head_layer", "head", "score", *_INTERVAL, "share", "attention", "strength"),
                *("effect", "effect_attention", "effect_held"),
            ),
        )
    )
    """Neuron by head, strongest first: layer, neuron, head_layer, head, score (the neuron's part of the head's score),
    low, high, share (of all magnitudes in that score), attention (of the head, to outliers), strength (share times the
    head's share of all attention to outliers), effect and effect_attention (by how much score and attention fall when
    the neuron's write is taken out of the head's keys), effect_held (of the score, with scales held)."""
    parts: pd.DataFrame = field(
        metadata=table_of(words=("receiver", "part", "via"), numbers=("value", *_INTERVAL, "share"))
    )
    """What each node's inflow is made of, unpruned: receiver, part, value, low, high, share."""

    def to_dataframe(self, table: str = "edges") -> pd.DataFrame:
        """A copy of one table: "edges", "nodes", "paths" or "parts".

        Raises:
            ConfigError: there is no such table.
        """
        check_choice("table", table, get_args(Table))
        return getattr(self, table).copy()

    @property
    def agreement(self) -> pd.DataFrame:
        """How well attributions foretell what cutting an edge does, one row a kind of edge: edge, n, correlation (NaN
        for fewer than 3), difference (sum of |effect - value| over sum of |value|), difference_held (with scales held).

        Where neurons write the same direction, a norm that takes its scale anew hides each of them: the live effect of
        one neuron on a score is far smaller than its part of the score.
        """
        frame: Any = self.edges
        senders, receivers = ([Node(name).kind for name in frame[end]] for end in ("sender", "receiver"))
        groups = {
            f"{a} -> {b}": frame[(np.array(senders) == a) & (np.array(receivers) == b)]
            for a, b in (("neuron", "stream"), ("stream", "head"), ("head", "reader"), ("head", "output"))
        }
        groups["neuron -> head"] = self.paths.rename(columns={"score": "value"})
        rows = [{"edge": name, **_agreement(group)} for name, group in groups.items()]
        columns = ["edge", "n", "correlation", "difference", "difference_held"]
        return pd.DataFrame([row for row in rows if row["n"]], columns=columns)

    def describe(self) -> str:
        """The result in words."""
        lines = [
            f"{self.model}: from {len(self.neurons)} neurons to {self.reader}, {self.n_used} of "
            f"{self.n_images} images with outliers (parts add up to within {self.sum_error:.0e}).",
            *_stream(self),
            *_heads(self),
            *_ends(self),
            *_paths(self),
            *self.notes,
        ]
        return "\n".join(lines)

    def to_networkx(self) -> nx.MultiDiGraph:
        """A directed multigraph (networkx): nodes by name, an edge for each group of keys; columns as attributes.

        Example:
            >>> import registerlens as rl
            >>> from registerlens.data.synthetic import synthetic_images
            >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(4, 0).images
            >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
            >>> graph = rl.attention_circuit(vit, images, neurons).to_networkx()
            >>> list(graph.successors("neuron 1:183"))
            ['outlier stream']
        """
        import networkx as nx  # torch brings it along; only this needs it

        graph = nx.MultiDiGraph(model=self.model, reader=self.reader, block=self.block)
        for row in self.nodes.to_dict("records"):
            graph.add_node(row.pop("name"), **row)
        for row in self.edges.to_dict("records"):
            graph.add_edge(row.pop("sender"), row.pop("receiver"), key=row["via"], **row)
        return graph

    def plot(self, mode: Literal["light", "dark"] = "light") -> go.Figure:
        """Layers from left to right; an edge's width is its share, its colour the sign; numbers on hovering."""
        from registerlens.viz.circuit import circuit_figure

        return circuit_figure(self, mode)

    def __repr__(self) -> str:
        kinds = self.nodes["kind"].value_counts()
        return (
            f"AttentionCircuit({self.model}: {kinds.get('neuron', 0)} of {len(self.neurons)} neurons -> outlier stream "
            f"after block {self.block} -> {kinds.get('head', 0)} heads -> {self.reader}; {len(self.edges)} edges, "
            f"{self.n_used} of {self.n_images} images)"
        )


def _agreement(edges: Any) -> dict[str, Any]:
    there = edges[np.isfinite(edges["effect"]) & np.isfinite(edges["value"])]
    value, effect, held = (there[name].to_numpy(dtype=float) for name in ("value", "effect", "effect_held"))
    varied = len(there) > 2 and np.ptp(value) > 0 and np.ptp(effect) > 0
    gross = abs(value).sum() or np.nan
    return {
        "n": len(there),
        "correlation": float(np.corrcoef(value, effect)[0, 1]) if varied else np.nan,
        "difference": float(abs(effect - value).sum() / gross),
        "difference_held": float(abs(held - value).sum() / gross),
    }


def _stream(circuit: AttentionCircuit) -> list[str]:
    nodes: Any = circuit.nodes.set_index("name")
    edges: Any = circuit.edges
    into = edges[edges["receiver"] == STREAM]
    whole = nodes.loc[STREAM, "whole"]
    senders = into.join(nodes[nodes["kind"] == "neuron"][["layer", "index"]], on="sender", how="inner")
    kept = senders.sort_values("value", key=abs, ascending=False)
    share = kept["value"].sum() / whole
    listed = kept.head(5).to_dict("records")
    largest = ", ".join(f"{row['layer']:.0f}:{row['index']:.0f} ({row['value'] / whole:.0%})" for row in listed)
    return [
        f"Outlier stream after block {circuit.block}, norm {whole:.3g}: {share:.0%} from {len(kept)} shown neurons"
        f"{f', largest {largest}' if largest else ''}; the given ones carry {circuit.neuron_share:.1%} of what all "
        f"neurons write there, {circuit.onset_share:.1%} at the onset."
    ]


def _heads(circuit: AttentionCircuit) -> list[str]:
    nodes: Any = circuit.nodes
    heads = nodes[nodes["kind"] == "head"].sort_values("attention", ascending=False)
    if not len(heads):
        return ["No head after it pays the outliers a share of attention that is shown."]
    edges: Any = circuit.edges
    by_stream = edges[edges["sender"] == STREAM].set_index("receiver")["value"]
    listed = ", ".join(
        f"{row['layer']}.{row['index']} ({row['attention']:.0%} of its attention; score {row['whole']:.3g}, of it "
        f"{by_stream[row['name']]:.3g} by the stream)"
        for row in heads.head(4).to_dict("records")
    )
    lines = [f"{len(heads)} heads look at the outliers, most of all {listed}."]
    if circuit.checked:
        before, after = heads["attention"].mean(), heads["attention_without"].mean()
        lines.append(
            f"Without the shown neurons' writes in the outliers' keys, these heads pay them {after:.0%} of attention "
            f"on average instead of {before:.0%}."
        )
    return lines


def share_from_outliers(circuit: AttentionCircuit, receiver: str) -> float:
    """What the shown heads take from outliers, as a share of all that the receiver gets; it may be negative."""
    nodes: Any = circuit.nodes.set_index("name")
    edges: Any = circuit.edges
    into = edges[edges["receiver"] == receiver]
    return float(into[into["via"] == "outliers"]["value"].sum() / nodes.loc[receiver, "whole"])


def _ends(circuit: AttentionCircuit) -> list[str]:
    lines: list[str] = []
    nodes: Any = circuit.nodes.set_index("name")
    for receiver in (circuit.reader, OUTPUT):
        if receiver not in nodes.index:
            continue
        whole = nodes.loc[receiver, "whole"]
        what = f"norm of {receiver}" if receiver != OUTPUT else f"output ({circuit.output})"
        share = share_from_outliers(circuit, receiver)
        lines.append(f"What these heads take from outliers makes {share:+.1%} of the {what}, {whole:.3g}.")
    return lines


def _paths(circuit: AttentionCircuit) -> list[str]:
    if not len(circuit.paths):
        return []
    top = circuit.paths.iloc[0]
    checked = "" if not circuit.checked else f"; taken out of the keys, the score falls by {top['effect']:.3g}"
    lines = [
        f"Strongest path: neuron {top['layer']:.0f}:{top['neuron']:.0f} -> outlier stream -> head "
        f"{top['head_layer']:.0f}.{top['head']:.0f} -> {circuit.reader} ({top['score']:+.3g} of the score{checked})."
    ]
    if circuit.checked:
        frame = circuit.agreement
        listed = ", ".join(
            f"{edge} {difference:.0%}" for edge, difference in zip(frame["edge"], frame["difference"], strict=True)
        )
        lines.append(
            f"Every edge was cut alone. With scales held the receivers change as attributed (largest difference "
            f"{frame['difference_held'].max():.0e}); computed anew, with norms that rescale, they differ by: {listed}."
        )
    return lines
