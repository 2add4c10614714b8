"""The sections of a report on theory and mechanism, each a pure function from results, or their reasons."""

from __future__ import annotations

import html
from typing import Any, Protocol, runtime_checkable

import plotly.graph_objects as go

from registerlens.analysis.sink_edits import EDITS
from registerlens.analysis.sink_kinds import SinkKinds
from registerlens.analysis.trace import Trace
from registerlens.errors import RegisterLensError
from registerlens.theory.kernels import KernelReport
from registerlens.viz.mechanism import HALF, HEADS, THRESHOLD, Mechanism
from registerlens.viz.page import Section, answer, heading, plotted, table
from registerlens.viz.tables import KERNEL_NOTE, kernel_table

_EDIT_WORDS = {
    "remove": "its column taken out, the rest renormalised",
    "zero": "its value set to zero",
    "mean": "to the mean value of other tokens",
    "other_image": "to the sink's value in another image",
    "ordinary": "to the value of an ordinary patch",
}


@runtime_checkable
class Told(Protocol):
    """What every result can do."""

    def describe(self) -> str:
        """The result in words."""
        ...

    def plot(self) -> go.Figure:
        """The result as a picture."""
        ...


def mechanism_answer(found: Mechanism) -> str:
    """A box for the top of the page: are the sinks no-ops?"""
    more = '<a href="#kernels">More</a>'
    if isinstance(found.kernels, RegisterLensError):
        return answer("calm", "Kernel conditions: not asked", f"{html.escape(str(found.kernels))} {more}")
    head = {"holds": "yes", "holds approximately": "in part", "fails": "no", None: "nothing reads them"}
    words = f"{html.escape(found.kernels.conclusion())} {more}"
    return answer("calm", f"Sinks as no-ops, by the weights: {head[found.kernels.no_op]}", words)


def mechanism_sections(found: Mechanism) -> list[Section]:
    """All of them, in the order of the page."""
    return [kernels_section(found), sinks_section(found), observables_section(found), evidence_section(found)]


# Sections ------------------------------------------------------------------------------------------------------------


def kernels_section(found: Mechanism) -> Section:
    """The conditions of Proposition 1: conclusion, table, heat map, weights, and every sentence."""
    id, title = "kernels", "Kernel conditions"
    head = (
        "<p>Proposition 1 of Jiang et al. makes a sink on a register neuron's "
        "token a no-op where what the neuron reads (u1) and writes (u2) lies in the kernel of all that follows. No "
        "real weight matrix has an exact kernel, so that every number stands beside random directions and other "
        "neurons of the same block.</p>"
    )
    report = found.kernels
    if isinstance(report, RegisterLensError):
        return Section(id=id, title=title, body=head + _reason(report))
    sentences = "".join(f"<li>{html.escape(line)}</li>" for line in report.describe().splitlines()[:-1])
    body = (
        f"{head}<p><strong>{html.escape(report.conclusion())}</strong></p>{_kernel_table(report)}"
        f"{heading('Who reads it, block by block', id)}{plotted(report.plot())}"
        f"{heading('What the neurons write', id)}{plotted(report.plot_weights())}"
        f"<details><summary>Every condition in a sentence</summary><ul>{sentences}</ul></details>"
    )
    return Section(id=id, title=title, body=body)


def sinks_section(found: Mechanism) -> Section:
    """What kind of sink: kinds, causal edits, updates of one register and of several, what the last [CLS] rests on."""
    parts = [
        "<p>A NOP switches its head off: its value is next to nothing. A broadcast sends every token the same message. "
        "Kinds: Fesser et al. 2026.</p>",
        _kinds(found),
        _part(
            "sinks",
            f"Sinks edited, {found.n_few} images",
            f"Attention stays as it is, and one head's sink is changed at a time, in the {HEADS} heads at most that "
            f"have one most often: {'; '.join(f'{name}: {_EDIT_WORDS[name]}' for name in EDITS)}. A no-op can be set "
            f"to zero without effect. A third of the images (at most half) only gives the values.",
            found.effects,
        ),
        _part(
            "sinks",
            f"One register and several, {found.n_few} images",
            "What attention brings from test-time registers, against one of them (equation 19, table 8).",
            found.value_update,
        ),
        _part(
            "sinks",
            f"Faithfulness, {found.n_images} images",
            "The last block's [CLS] may look at some tokens only. A map of attention to patches explains an output as "
            "far as the patches alone give it.",
            found.faithfulness,
        ),
    ]
    return Section(id="sinks", title="What kind of sink?", body="".join(parts))


def observables_section(found: Mechanism) -> Section:
    """Massive activations, their overlap with outliers and sinks, and the direction that the weights predict."""
    parts = [
        f"<p>On {found.n_images} images.</p>",
        _part(
            "observables",
            "Massive activations",
            "All tokens of the stream count, [CLS] and registers too.",
            found.massive,
        ),
        _part(
            "observables",
            "Do the observables pick the same patches?",
            "By cut-offs of their own, and matched: in an image with k norm outliers, the first k patches by each.",
            found.overlap,
        ),
        _part(
            "observables",
            "Singular defects",
            "The direction that the blocks up to each one stretch most, from the weights alone (Wang et al. 2024).",
            found.defects,
        ),
    ]
    title = "Massive activations, overlap, singular defects"
    return Section(id="observables", title=title, body="".join(parts))


def evidence_section(found: Mechanism) -> Section:
    """Activations, summed updates, output weights and causal order of the neurons; a shared reason is said once."""
    parts: list[tuple[str, str, Any]] = [
        (
            "Activations",
            "At the top outlier of each image and at a random normal patch of it (figures 20 and 27).",
            found.distributions,
        ),
        ("Summed updates", "Against random sets of as many neurons of the same block (figure 21).", found.updates),
        ("Output weights", "Over the dimensions of the residual stream (figure 25).", found.weights),
        ("Causal order", "Neurons of one block edited: what becomes of those of later blocks?", found.order),
    ]
    head = f"<p>On {found.n_images} images.</p>"
    reasons = {str(result) for _, _, result in parts if isinstance(result, RegisterLensError)}
    if len(reasons) == 1 and all(isinstance(result, RegisterLensError) for _, _, result in parts):
        body = _reason(parts[0][2])
    else:
        body = "".join(_part("evidence", *part) for part in parts)
    return Section(id="evidence", title="Evidence for the neurons", body=head + body)


def circuit_section(circuit: Told | RegisterLensError) -> Section:
    """The path from register neurons to [CLS]: in words, and as a graph."""
    head = (
        "<p>How register neurons reach the output: what they write into outlier tokens, the heads that look there, and "
        "what these bring. An edge is as wide as its share of what its receiver gets: blue adds to it, red takes away, "
        "grey is all that has no edge of its own.</p>"
    )
    if isinstance(circuit, RegisterLensError):
        told = _reason(circuit)
    else:
        told = _words(circuit) + plotted(circuit.plot(), circuit.describe())
    return Section(id="circuit", title="Attention circuit", body=head + told)


def no_circuit_section(trace: Trace) -> Section:
    """What there is to say of it without outliers."""
    body = (
        f"<p>There is no path to follow: on these {trace.n_images} images the model has no outlier tokens, over which "
        f"one would lead.</p>"
    )
    return Section(id="circuit", title="Attention circuit", body=body)


# Their parts ---------------------------------------------------------------------------------------------------------


def _kernel_table(report: KernelReport) -> str:
    frame, rows = kernel_table(report).map(html.escape), []
    for row in frame.to_dict("records"):
        number, _, multiple = row["number"].partition(" (")
        notes = (f"{multiple.removesuffix(')')}, " if multiple else "") + row["unit"]
        nulls = (row[null].partition(" (") for null in ("random", "neurons"))
        cells = [(number, notes), *((value, p.removesuffix(")")) for value, _, p in nulls)]
        small = [f"{cell}<small>{note}</small>" if note else cell for cell, note in cells]
        rows.append([row["condition"], *small, row["verdict"]])
    headers = ("condition", "number", "random directions", "other neurons", "verdict")
    marked = [i for i, verdict in enumerate(frame["verdict"]) if verdict == "holds"]
    notes = [f"Not applicable, {name}: {reason}." for name, reason in report.not_applicable.items()]
    notes += report.notes
    note = f"{KERNEL_NOTE} {' '.join(notes)}"
    told = table(headers, rows, marked, "The conditions beside their nulls; marked: what holds.")
    return f"{told}<p><small>{html.escape(note)}</small></p>"


def _kinds(found: Mechanism) -> str:
    """By the published criterion in words; by the softer one in words and as a map."""
    title, published, half = f"Sinks found, {found.n_images} images", found.published_sinks, found.sinks
    if isinstance(half, RegisterLensError) or isinstance(published, RegisterLensError):
        return _part("sinks", title, "", half)
    softer = (
        f"Where several outliers share the sink, few queries look at any one of them. So once more, for tokens that "
        f"{HALF:.0%} of the queries pay at least the threshold:"
    )
    drawn = plotted(half.plot(threshold=THRESHOLD))
    return f"{heading(title, 'sinks')}{_words(published)}<p>{softer}</p>{_words(half)}{drawn}"


def _part(at: str, title: str, note: str, result: Told | SinkKinds | RegisterLensError) -> str:
    """A heading, what is asked, and the result in words and as a picture, or why there is none."""
    head = heading(title, at) + (f"<p>{html.escape(note)}</p>" if note else "")
    if isinstance(result, RegisterLensError):
        return head + _reason(result)
    return f"{head}{_words(result)}{plotted(result.plot())}"


def _words(result: Told | SinkKinds) -> str:
    return f"<p>{'<br>'.join(html.escape(line) for line in result.describe().splitlines())}</p>"


def _reason(error: RegisterLensError) -> str:
    return f'<p class="reason">Not shown: {html.escape(str(error))}</p>'
