"""The sections of a report, each a pure function from results; their words and structure are templates."""

import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8
from markupsafe import Markup

from registerlens.analysis.maps import NeuronMaps, PatchMaps
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.sink_edits import EDITS
from registerlens.analysis.sink_events import GU_SINK
from registerlens.analysis.sink_kinds import SinkKinds
from registerlens.analysis.trace import Trace
from registerlens.diagnosis.findings import Diagnosis
from registerlens.errors import NoOutliersError, RegisterLensError
from registerlens.evaluation.controls import ConditionKind
from registerlens.explorer.page import page_script
from registerlens.markup import environment
from registerlens.pictures import colour_bar, data_uri
from registerlens.theory.kernels import KernelReport
from registerlens.viz.detection import search_figure, trace_figure
from registerlens.viz.evaluation import evaluation_figure
from registerlens.viz.page import Section, map_picture, photograph, plotted
from registerlens.viz.reconcile import reconcile
from registerlens.viz.study import HEADS, THRESHOLD, Mechanism, RegisterStudy
from registerlens.viz.tables import (
    COLUMN_NOTE,
    COLUMNS,
    KERNEL_NOTE,
    SCORE_WORDS,
    brief,
    evaluation_table,
    kernel_table,
    neuron_table,
    sink_table,
)

Display = UInt8[np.ndarray, "image height width rgb"]
LISTED = 50
"""Most neurons in the table of a page."""


@runtime_checkable
class Told(Protocol):
    """What every result can do."""

    def describe(self) -> str:
        """The result in words."""
        ...

    def plot(self) -> go.Figure:
        """The result as a picture."""
        ...


# Filters of the templates --------------------------------------------------------------------------------------------


def _found(neurons: RegisterNeurons) -> str:
    if neurons.search is not None:
        return neurons.search.describe()
    return f"{len(neurons)} neurons in blocks {', '.join(map(str, neurons.by_layer()))} ({neurons.source})."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


_TEMPLATES = environment(plotted=plotted, found=_found, sentence=_sentence, slug=_slug, percent="{:.0%}".format)


def _filled(template: str, **values: Any) -> Markup:
    return Markup(_TEMPLATES.get_template(f"report/{template}.html").render(bar=data_uri(colour_bar()), **values))


def _section(id: str, title: str, template: str = "", **values: Any) -> Section:
    return Section(id=id, title=title, body=_filled(template or id, **values))


# Answers, at the top -------------------------------------------------------------------------------------------------


def diagnosis_section(found: Diagnosis) -> Section:
    """What is wrong, and what to do about it: what a page begins with."""
    return _section("diagnosis", "Diagnosis", found=found)


def answers(trace: Trace, study: RegisterStudy | NoOutliersError | None) -> Markup:
    """What was found, in boxes: outliers, register neurons, the test-time register."""
    return _filled("answers", trace=trace, study=study)


def mechanism_answer(found: Mechanism, circuit: object) -> Markup:
    """A box for the top of the page: are the sinks no-ops, and how do the answers to that go together?"""
    return _filled("mechanism_answer", kernels=found.kernels, together=reconcile(found, circuit))


# Norms and sinks -----------------------------------------------------------------------------------------------------


def trace_section(trace: Trace) -> Section:
    """The curves over the layers."""
    return _section("norms", "Which norm, which layer?", figure=trace_figure(trace))


def images_section(trace: Trace, maps: PatchMaps, display: Display, names: Sequence[str]) -> Section:
    """Norm and attention maps of single images."""
    rows = []
    for i, name in enumerate(names):
        pictures = [photograph(display[i], name)]
        for row, layer in enumerate(maps.layers):
            for kind, values in (("norm", maps.norms[row, i]), ("attention", maps.attention[row, i])):
                caption = (f"block {layer} · {kind}", *_extent(values))
                what = f"{kind.capitalize()} of each patch, block {layer}, {name}"
                pictures.append(map_picture(values, float(values.max()), caption, display[i], what))
        rows.append(pictures)
    return _section("images", "The images", maps=maps, onset=trace.onset_layer, rows=rows)


def numbers_section(trace: Trace) -> Section:
    """Norms, evidence and sinks of every sublayer."""
    rows = []
    for row in trace.to_dataframe().to_dict("records"):
        share = row["share_of_patches"] if row["verdict"] == "present" else 0
        cells = [f"{row[name]:.2f}" for name in ("largest_norm", "median_norm", "largest_over_median", "gap")]
        sink = f"{row['sink_largest_head']:.3f}" if row["after"] == "attn" else ""
        rows.append([row["sublayer"], *cells, row["verdict"], f"{share:.2%}", sink])
    headers = ("after", "largest norm", "median", "ratio", "gap", "outliers", "of patches", "strongest sink")
    marked = [i for i, name in enumerate(trace.sublayers) if name == trace.onset]
    return _section("numbers", "Numbers", headers=headers, rows=rows, marked=marked)


# Register neurons ----------------------------------------------------------------------------------------------------


def neurons_section(
    neurons: RegisterNeurons,
    maps: NeuronMaps,
    norms: Float[np.ndarray, "image grid_h grid_w"],
    block: int,
    display: Display,
    names: Sequence[str],
) -> Section:
    """What was found, in words, as a figure, as a table, and as activation maps beside the norm map.

    Args:
        neurons: the register neurons.
        maps: of the first of them on the images shown.
        norms: residual norms of the same images.
        block: after which the norms were taken.
        display: the images.
        names: a caption for each.
    """
    rows = []
    for i, name in enumerate(names):
        caption = (f"norm after block {block}", *_extent(norms[i]))
        what = f"Norm of each patch after block {block}, {name}"
        pictures = [photograph(display[i], name), map_picture(norms[i], float(norms.max()), caption, display[i], what)]
        for (layer, neuron), values in zip(maps.pairs, maps.activations, strict=True):
            caption = (f"neuron {layer}:{neuron}", *_extent(values[i]))
            what = f"Activation of neuron {layer}:{neuron} at each patch, {name}"
            pictures.append(map_picture(values[i], max(float(values.max()), 0.0), caption, display[i], what))
        rows.append(pictures)
    frame = neuron_table(neurons)
    scores = [column for column in frame.columns if column not in ("layer", "neuron")]
    entries = [
        [f"{rank}", f"{row['layer']:.0f}:{row['neuron']:.0f}", *(brief(row[name]) for name in scores)]
        for rank, row in enumerate(frame.head(LISTED).to_dict("records"), start=1)
    ]
    return _section(
        "neurons",
        "Register neurons",
        neurons=neurons,
        figure=None if neurons.search is None else search_figure(neurons.search),
        n_mapped=len(maps.pairs),
        block=block,
        rows=rows,
        words="; ".join(f"{name}: {SCORE_WORDS[name]}" for name in scores if name in SCORE_WORDS),
        headers=["rank", "neuron", *scores],
        entries=entries,
    )


def no_neurons_section(trace: Trace) -> Section:
    """What there is to say without outliers: that nothing is to be looked for, and why."""
    evidence = trace.evidence[trace.sublayers.index(trace.strongest)]
    return _section("neurons", "Register neurons", "no_neurons", trace=trace, evidence=evidence)


# The test-time register ----------------------------------------------------------------------------------------------


def register_section(
    study: RegisterStudy, before: PatchMaps, after: PatchMaps, display: Display, names: Sequence[str]
) -> Section:
    """The verdict, maps before and after on one scale, the figure, and the table with intervals and controls.

    Args:
        study: the intervention and its evaluation.
        before, after: maps of the images shown; norms are drawn of the first block, attention of the last.
        display: the images.
        names: a caption for each.
    """
    rows = []
    for i, name in enumerate(names):
        pictures = [photograph(display[i], name)]
        for kind, old, new, extra in (
            ("norm", before.norms[0, i], after.norms[0, i], _extra("register", after.register_norm[0, i])),
            (
                "attention",
                before.attention[-1, i],
                after.attention[-1, i],
                _extra("register or bias", after.register_attention[-1, i]),
            ),
        ):
            highest, what = float(max(old.max(), new.max())), f"{kind.capitalize()} of each patch, {name},"
            for values, top, caption, words in (
                (old, highest, (f"{kind} before", *_extent(old)), "before"),
                (new, highest, (f"{kind} after, same scale", *_extent(new), *extra), "after"),
                (new, float(new.max()), (f"{kind} after, own scale",), "after, on its own scale"),
            ):
                pictures.append(map_picture(values, top, caption, display[i], f"{what} {words}"))
        rows.append(pictures)
    evaluation = study.evaluation
    metrics, conditions = evaluation_table(evaluation)
    entries = [
        [name, *((str(cells[m]), cells[m].interval) if m in cells else "–" for m in metrics)]
        for name, cells in conditions
    ]
    return _section(
        "register",
        _sentence(study.condition),
        study=study,
        before=before,
        rows=rows,
        figure=evaluation_figure(evaluation),
        headers=["condition", *(COLUMNS[metric] for metric in metrics)],
        entries=entries,
        marked=[i for i, kind in enumerate(evaluation.kinds) if kind is ConditionKind.TESTED],
        column_note=COLUMN_NOTE,
        baselines=ConditionKind.BASELINE in evaluation.kinds,
    )


def _extent(values: np.ndarray) -> tuple[str, str]:
    return f"max {values.max():.3g}", f"median {np.median(values):.2g}"


def _extra(what: str, value: np.floating) -> tuple[str, ...]:
    return () if np.isnan(value) else (f"{what} {value:.3g}",)


# Theory and mechanism ------------------------------------------------------------------------------------------------


def mechanism_sections(found: Mechanism) -> list[Section]:
    """Kernel conditions, kinds of sinks, observables, evidence for the neurons: each result, or why there is none."""
    edits = {"edits": EDITS, "heads": HEADS, "threshold": THRESHOLD, "gu_sink": GU_SINK}
    swept = [one for one in (found.published_sinks, found.sinks) if isinstance(one, SinkKinds)]
    kinds = sink_table(*swept)
    observables = "Massive activations, overlap, singular defects"
    return [
        _kernels_section(found.kernels),
        _section(
            "sinks", "What kind of sink?", found=found, headers=list(kinds), rows=kinds.to_numpy().tolist(), **edits
        ),
        _section("observables", observables, found=found),
        _section("evidence", "Evidence for the neurons", found=found),
    ]


def _kernels_section(report: KernelReport | RegisterLensError) -> Section:
    """The conditions of Proposition 1: conclusion, table, heat map, weights, and every sentence."""
    rows, marked = [], []
    if isinstance(report, KernelReport):
        frame = kernel_table(report)
        marked = [i for i, verdict in enumerate(frame["verdict"]) if verdict == "holds"]
        for row in frame.to_dict("records"):
            number, _, multiple = row["number"].partition(" (")
            notes = (f"{multiple.removesuffix(')')}, " if multiple else "") + row["unit"]
            nulls = (row[null].partition(" (") for null in ("random", "neurons"))
            nulls = ((value, p.removesuffix(")")) for value, _, p in nulls)
            rows.append([row["condition"], (number, notes), *nulls, row["verdict"]])
    headers = ("condition", "number", "random directions", "other neurons", "verdict")
    table = {"headers": headers, "rows": rows, "marked": marked, "note": KERNEL_NOTE}
    return _section("kernels", "Kernel conditions", report=report, **table)


def circuit_section(circuit: Told | RegisterLensError) -> Section:
    """The path from register neurons to [CLS]: in words, and as a graph."""
    return _section("circuit", "Attention circuit", circuit=circuit)


def no_circuit_section(trace: Trace) -> Section:
    """What there is to say of it without outliers."""
    return _section("circuit", "Attention circuit", "no_circuit", trace=trace)


def explorer_section(explorer: str) -> Section:
    """Attention to look at by hand: HTML as `Explorer.section` makes it."""
    body = _filled("explorer", section=Markup(explorer))
    return Section(id="explorer", title="Look for yourself", body=body, scripts=(page_script(),))
