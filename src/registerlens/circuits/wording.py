"""A circuit in words."""

from __future__ import annotations

from typing import Any

from registerlens.circuits.graph import OUTPUT, STREAM
from registerlens.circuits.records import AttentionCircuit


def circuit_in_words(circuit: AttentionCircuit) -> str:
    """What flows from the neurons to the reader, a sentence or two a step."""
    lines = [
        f"{circuit.model}: from {len(circuit.neurons)} neurons to {circuit.reader}, {circuit.n_used} of "
        f"{circuit.n_images} images with outliers (parts add up to within {circuit.sum_error:.0e}).",
        *_stream(circuit),
        *_heads(circuit),
        *_ends(circuit),
        *_paths(circuit),
        *circuit.notes,
    ]
    return "\n".join(lines)


def _stream(circuit: AttentionCircuit) -> list[str]:
    nodes: Any = circuit.nodes.set_index("name")
    edges: Any = circuit.edges
    into = edges[edges["receiver"] == STREAM]
    whole = nodes.loc[STREAM, "whole"]
    kept = into[into["sender"].map(nodes["kind"]) == "neuron"].sort_values("value", key=abs, ascending=False)
    share = kept["value"].sum() / whole
    largest = ", ".join(f"{row.sender[7:]} ({row.value / whole:.0%})" for row in kept.head(5).itertuples())
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
    told = ", ".join(
        f"{row['layer']}.{row['index']} ({row['attention']:.0%} of its attention; score {row['whole']:.3g}, of it "
        f"{by_stream[row['name']]:.3g} by the stream)"
        for row in heads.head(4).to_dict("records")
    )
    lines = [f"{len(heads)} heads look at the outliers, most of all {told}."]
    if circuit.checked:
        before, after = heads["attention"].mean(), heads["attention_without"].mean()
        lines.append(
            f"Without the shown neurons' writes in the outliers' keys, these heads pay them {after:.0%} of attention "
            f"on average instead of {before:.0%}."
        )
    return lines


def _ends(circuit: AttentionCircuit) -> list[str]:
    lines: list[str] = []
    nodes: Any = circuit.nodes.set_index("name")
    edges: Any = circuit.edges
    for receiver in (circuit.reader, OUTPUT):
        if receiver not in nodes.index:
            continue
        into = edges[edges["receiver"] == receiver]
        taken = into[into["via"] == "outliers"]["value"].sum()
        whole = nodes.loc[receiver, "whole"]
        what = f"norm of {receiver}" if receiver != OUTPUT else f"output ({circuit.output})"
        lines.append(f"What these heads take from outliers makes {taken / whole:+.1%} of the {what}, {whole:.3g}.")
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
        told = ", ".join(
            f"{edge} {difference:.0%}" for edge, difference in zip(frame["edge"], frame["difference"], strict=True)
        )
        lines.append(
            f"Every edge was cut alone. With scales held the receivers change as attributed (largest difference "
            f"{frame['difference_held'].max():.0e}); computed anew, with norms that rescale, they differ by: {told}."
        )
    return lines
