"""From contributions image by image to the circuit's tables: what is shown, what is the rest, means with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.circuits.contributions import LATER, OUTPUT, STREAM, VIA, Node, reader_parts, stream_parts
from registerlens.circuits.edge_checks import ALL_NEURONS, FIRST_NEURON, HELD, LIVE, NORMS, WHOLE_STREAM, Collected
from registerlens.config import ViTConfig
from registerlens.stats.intervals import mean_intervals

Row = tuple[dict[str, Any], Float[np.ndarray, " image"]]
"""Columns of a row, and its number an image."""


@dataclass(frozen=True)
class ShownNodes:
    """Which neurons and heads are nodes."""

    neurons: tuple[int, ...]
    """Places in the list of neurons."""
    heads: tuple[tuple[int, int], ...]
    """(layer, head)."""


@dataclass(frozen=True)
class Measured:
    """What the tables are made from."""

    cfg: ViTConfig
    neurons: RegisterNeurons
    block: int
    reader: str
    found: Collected

    @property
    def n_images(self) -> int:
        """Images that were measured."""
        return len(self.found["stream_norm"])

    def mean(self, name: str) -> np.ndarray:
        """Mean over images of one array."""
        return self.found[name].mean(0)

    @property
    def receivers(self) -> tuple[Node, ...]:
        """The ends of the path: the reader, and the output where it is part of it."""
        return (Node(self.reader), OUTPUT) if "output_whole" in self.found else (Node(self.reader),)

    @property
    def written(self) -> list[str]:
        """Names of what the outlier stream is made of."""
        return stream_parts(self.cfg, self.neurons, self.block)

    def field(self, receiver: str, name: str) -> np.ndarray:
        """An array of the reader or the output."""
        return self.found[f"{'output' if receiver == OUTPUT else 'reader'}_{name}"]

    def at(self, layer: int) -> int:
        """Where a block stands in arrays of later blocks."""
        return layer - self.block - 1


def select(measured: Measured, min_share: float) -> ShownNodes:
    """Neurons with this share of the outlier stream; heads with this share of all attention to outliers, or whose
    write from outliers has this share of the reader's stream."""
    stream, attention, heads = (measured.mean(name) for name in ("stream", "attention", "reader_heads"))
    gross = abs(heads).sum() + abs(measured.mean("reader_rest")).sum()
    neurons = abs(stream[: len(measured.neurons)]) >= min_share * abs(stream).sum()
    sinks = attention[..., 0] >= min_share * attention[..., 0].sum()
    kept = sinks | (abs(heads[..., 0]) >= min_share * gross)
    return ShownNodes(
        tuple(np.flatnonzero(neurons).tolist()),
        tuple((measured.block + 1 + layer, head) for layer, head in np.argwhere(kept).tolist()),
    )


# Tables --------------------------------------------------------------------------------------------------------------


def tabulate(rows: Sequence[Row], n_images: int, columns: Sequence[str], value: str = "value") -> pd.DataFrame:
    """Rows of columns, then the mean of their numbers with its interval."""
    frame = pd.DataFrame([labels for labels, _ in rows], columns=list(columns))
    numbers = np.stack([numbers for _, numbers in rows]) if rows else np.zeros((0, n_images))
    frame[value], frame["low"], frame["high"] = mean_intervals(numbers)
    return frame


def parts_table(measured: Measured, nodes: ShownNodes) -> pd.DataFrame:
    """What the inflow of each shown node is made of, with the share of all magnitudes there."""
    found, rows = measured.found, list[Row]()

    def add(receiver: str, names: Sequence[str], numbers: Float[np.ndarray, "image part"], via: str = "") -> None:
        for name, values in zip(names, numbers.T, strict=True):
            rows.append(({"receiver": receiver, "part": name, "via": via}, values))

    add(STREAM, measured.written, found["stream"])
    for layer, head in nodes.heads:
        add(Node.head(layer, head), [*measured.written, *LATER], found["scores"][:, :, measured.at(layer), head])
    rest = reader_parts(measured.cfg, measured.block)
    for receiver in measured.receivers:
        heads = measured.field(receiver, "heads")
        names = [Node.head(measured.block + 1 + i, head) for i, head in np.ndindex(heads.shape[1:3])]
        for i, via in enumerate(VIA):
            add(receiver, names, heads[..., i].reshape(len(heads), -1), via)
        add(receiver, rest if receiver != OUTPUT else [*rest, "other tokens"], measured.field(receiver, "rest"))
    frame = tabulate(rows, measured.n_images, ("receiver", "part", "via"))
    frame["share"] = frame["value"] / _gross(frame)
    return frame


def _gross(parts: pd.DataFrame) -> Any:
    """The sum of magnitudes that flow into each row's receiver."""
    return parts["value"].abs().groupby(parts["receiver"]).transform("sum")


def edges_table(
    measured: Measured, nodes: ShownNodes, parts: pd.DataFrame, effects: Collected | None, min_share: float
) -> pd.DataFrame:
    """Every shown edge, and for each node one from the rest, so that the inflow adds up to the node's quantity."""
    rows, cut = list[Row](), list[Float[np.ndarray, "image norm"]]()
    unknown = np.full((measured.n_images, len(NORMS)), np.nan)
    gross = _gross(parts).groupby(parts["receiver"]).first()

    def add(sender: str, receiver: str, values: np.ndarray, effect: np.ndarray, via: str = "") -> None:
        rows.append(({"sender": sender, "receiver": receiver, "via": via}, values))
        cut.append(effect)

    def close(receiver: str, whole: np.ndarray) -> None:
        into = [values for labels, values in rows if labels["receiver"] == receiver]
        add(Node.rest_of(receiver), receiver, whole - np.sum(into, 0) if into else whole, unknown)

    def effect(name: str, *index: int) -> np.ndarray:
        return unknown if effects is None else effects[name][(slice(None), slice(None), *index)]

    found, n = measured.found, len(measured.written)
    for row, i in enumerate(nodes.neurons):
        add(measured.written[i], STREAM, found["stream"][:, i], effect("stream", row))
    close(STREAM, found["stream_norm"])
    for column, (layer, head) in enumerate(nodes.heads):
        score = found["scores"][:, :n, measured.at(layer), head].sum(1)
        add(STREAM, Node.head(layer, head), score, effect("score", WHOLE_STREAM, column))
        close(Node.head(layer, head), found["score"][:, measured.at(layer), head])
    for receiver in measured.receivers:
        for column, (layer, head) in enumerate(nodes.heads):
            values = measured.field(receiver, "heads")[:, measured.at(layer), head]
            for i, via in enumerate(VIA):
                if i == 0 or abs(values[:, i].mean()) >= max(min_share * gross[receiver], _NOTHING):
                    cutting = effect("output" if receiver == OUTPUT else "reader", column, i)
                    add(Node.head(layer, head), receiver, values[:, i], cutting, via)
        close(receiver, measured.field(receiver, "whole"))
    frame = tabulate(rows, measured.n_images, ("sender", "receiver", "via"))
    frame["share"] = frame["value"] / gross[frame["receiver"]].to_numpy()
    live, held = (
        tabulate([({}, effect[:, i]) for effect in cut], measured.n_images, (), "effect") for i in (LIVE, HELD)
    )
    frame = frame.assign(effect=live["effect"], effect_low=live["low"], effect_high=live["high"])
    return frame.assign(effect_held=held["effect"])


_NOTHING = 1e-12
"""Below this a group of keys has no tokens."""


def nodes_table(measured: Measured, nodes: ShownNodes, edges: pd.DataFrame, effects: Collected | None) -> pd.DataFrame:
    """Every node with its quantity, in the order of the path."""
    found, unknown = measured.found, np.full(measured.n_images, np.nan)
    rows: list[Row] = []

    def add(node: Node, whole: np.ndarray, unit: str, **more: float) -> None:
        layer, index = node.place
        rows.append(({"name": node, "kind": node.kind, "layer": layer, "index": index, "unit": unit, **more}, whole))

    for i in nodes.neurons:
        add(Node.neuron(*measured.neurons.pairs[i]), unknown, "")
    add(STREAM, found["stream_norm"], "norm", layer=measured.block)
    for column, (layer, head) in enumerate(nodes.heads):
        at = measured.at(layer)
        paid = found["attention"][:, at, head, 0].mean()
        fall = np.nan if effects is None else effects["attention"][:, LIVE, ALL_NEURONS, column].mean()
        score = found["score"][:, at, head]
        shares = {"attention": paid, "attention_without": paid - fall}
        add(Node.head(layer, head), score, "score", **shares)
    for receiver in measured.receivers:
        add(receiver, measured.field(receiver, "whole"), "projection" if receiver == OUTPUT else "norm")
    for sender in map(Node, edges["sender"]):
        if sender.kind == "rest":
            add(sender, unknown, "")
    columns = ("name", "kind", "layer", "index", "unit", "attention", "attention_without")
    return tabulate(rows, measured.n_images, columns, "whole")


_CUT = ("effect", "effect_attention", "effect_held")


def paths_table(measured: Measured, nodes: ShownNodes, effects: Collected | None) -> pd.DataFrame:
    """Every shown neuron's path through every shown head, strongest first."""
    scores, attention = measured.mean("scores"), measured.mean("attention")[..., 0]
    rows: list[Row] = []
    for column, (layer, head) in enumerate(nodes.heads):
        at = measured.at(layer)
        gross = abs(scores[:, at, head]).sum()
        for row, i in enumerate(nodes.neurons):
            share = scores[i, at, head] / gross if gross > 0 else 0.0
            place = dict(zip(("layer", "neuron"), measured.neurons.pairs[i], strict=True))
            labels = {**place, "head_layer": layer, "head": head, "share": share, "attention": attention[at, head]}
            labels["strength"] = share * attention[at, head] / attention.sum()
            changes = [np.nan] * 3
            if effects is not None:
                places = (("score", LIVE), ("attention", LIVE), ("score", HELD))
                changes = [effects[name][:, norm, FIRST_NEURON + row, column].mean() for name, norm in places]
            labels |= dict(zip(_CUT, changes, strict=True))
            rows.append((labels, measured.found["scores"][:, i, at, head]))
    columns = ("layer", "neuron", "head_layer", "head", "share", "attention", "strength", *_CUT)
    frame = tabulate(rows, measured.n_images, columns, "score")
    order = np.argsort(-np.abs(frame["strength"].to_numpy(dtype=float)), kind="stable")
    return frame.iloc[order].reset_index(drop=True)
