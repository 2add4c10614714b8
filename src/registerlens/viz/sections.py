"""The sections of a report, each a pure function from results."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from registerlens.analysis.maps import NeuronMaps, PatchMaps
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import Trace
from registerlens.errors import NoOutliersError
from registerlens.evaluation.verdict import ConditionKind
from registerlens.viz.curves import trace_figure
from registerlens.viz.evaluation import evaluation_figure
from registerlens.viz.neurons import search_figure
from registerlens.viz.page import (
    Section,
    answer,
    beside,
    heading,
    map_picture,
    photograph,
    plotted,
    scale_bar,
    table,
)
from registerlens.viz.study import RegisterStudy
from registerlens.viz.tables import COLUMN_NOTE, COLUMNS, SCORE_WORDS, Cell, brief, evaluation_table, neuron_table

Display = UInt8[np.ndarray, "image height width rgb"]
LISTED = 50
"""Most neurons in the table of a page."""


# Answers, at the top -------------------------------------------------------------------------------------------------


def answers(trace: Trace, study: RegisterStudy | NoOutliersError | None) -> str:
    """What was found, in boxes: outliers, register neurons, the test-time register."""
    boxes = [answer(*_outliers(trace))]
    if trace.verdict == "absent":
        boxes.append(answer("calm", "Register neurons: nothing to look for", "No outliers, so no neurons behind them."))
    elif isinstance(study, NoOutliersError):
        boxes.append(answer("calm", "Register neurons: not looked for", html.escape(str(study))))
    elif study is not None:
        words = f'{html.escape(_found(study.neurons))} <a href="#neurons">More</a>'
        boxes.append(answer("bad", f"Register neurons: {len(study.neurons)}", words))
        verdict, _, reasons = study.words.partition(": ")
        head = f"{_title(study.condition)}: {verdict.lower()}"
        words = f'{html.escape(_title(reasons))} <a href="#register">More</a>'
        boxes.append(answer("good" if study.worked else "bad", head, words))
    return "".join(boxes)


def _outliers(trace: Trace) -> tuple[str, str, str]:
    words = html.escape(trace.explain())
    if trace.verdict == "absent":
        return "calm", "Outlier tokens: absent", words
    follow = trace.sink_is_outlier
    last = trace.n_layers - 1
    nxt = min((trace.onset_layer if trace.onset_layer is not None else -1) + 1, last)
    sinks = (
        f"In block {nxt}, the most attended patch is an outlier in {follow[nxt]:.0%} of images; in the last block, in "
        f"{follow[last]:.0%}."
    )
    return "bad", "Outlier tokens: present", f"{words}<br>{sinks}"


def _found(neurons: RegisterNeurons) -> str:
    if neurons.search is not None:
        return neurons.search.describe()
    return f"{len(neurons)} neurons in blocks {', '.join(map(str, neurons.by_layer()))} ({neurons.source})."


# Norms and sinks -----------------------------------------------------------------------------------------------------


def trace_section(trace: Trace) -> Section:
    """The curves over the layers."""
    return Section(id="norms", title="Which norm, which layer?", body=plotted(trace_figure(trace)))


def images_section(trace: Trace, maps: PatchMaps, display: Display, names: Sequence[str]) -> Section:
    """Norm and attention maps of single images."""
    query = "the [CLS] token's attention" if maps.sink_query == "cls" else "the average query's attention"
    which = ", ".join(str(layer) for layer in maps.layers)
    reason = "the onset, the next block and the last" if trace.onset_layer is not None else "first, middle and last"
    legend = (
        f"Blocks {which} ({reason}). For each: the norm of every patch after the block, and {query} to it, mean over "
        f"heads. Colours run {scale_bar()} from 0 to the largest value of the map, written below it."
    )
    rows = []
    for i, name in enumerate(names):
        pictures = [photograph(display[i], name)]
        for row, layer in enumerate(maps.layers):
            for kind, values in (("norm", maps.norms[row, i]), ("attention", maps.attention[row, i])):
                caption = f"block {layer} · {kind}<br>{_extent(values)}"
                what = f"{kind.capitalize()} of each patch, block {layer}, {name}"
                pictures.append(map_picture(values, float(values.max()), caption, display[i], what))
        rows.append(beside(pictures, len(pictures)))
    return Section(id="images", title="The images", body=f"<p>{legend}</p>{''.join(rows)}")


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
    caption = "Patch norms and sinks after every sublayer, means over images; marked: the onset of outliers."
    return Section(id="numbers", title="Numbers", body=table(headers, rows, marked, caption))


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
    figure = "" if neurons.search is None else plotted(search_figure(neurons.search))
    legend = (
        f"Activation of the first {len(maps.pairs)} neurons at every patch, beside the norm after block {block}: "
        f"a register neuron fires where the outliers are. Colours run {scale_bar()} from 0 to the neuron's largest "
        f"activation, or the largest norm, in any of the images shown; negative activations are drawn as 0."
    )
    rows = []
    for i, name in enumerate(names):
        pictures = [photograph(display[i], name)]
        caption = f"norm after block {block}<br>{_extent(norms[i])}"
        what = f"Norm of each patch after block {block}, {name}"
        pictures.append(map_picture(norms[i], float(norms.max()), caption, display[i], what))
        for (layer, neuron), values in zip(maps.pairs, maps.activations, strict=True):
            caption = f"block {layer}, neuron {neuron}<br>{_extent(values[i])}"
            what = f"Activation of neuron {neuron} of block {layer} at each patch, {name}"
            pictures.append(map_picture(values[i], max(float(values.max()), 0.0), caption, display[i], what))
        rows.append(beside(pictures, 2 + len(maps.pairs)))
    body = f"<p>{html.escape(_found(neurons))}</p>{figure}<p>{legend}</p>{''.join(rows)}{_neuron_table(neurons)}"
    return Section(id="neurons", title="Register neurons", body=body)


def _neuron_table(neurons: RegisterNeurons) -> str:
    frame = neuron_table(neurons)
    scores = [column for column in frame.columns if column not in ("layer", "neuron")]
    rows = [
        [f"{rank}", f"{row['layer']:.0f}", f"{row['neuron']:.0f}", *(brief(row[name]) for name in scores)]
        for rank, row in enumerate(frame.head(LISTED).to_dict("records"), start=1)
    ]
    more = f" The table lists the first {LISTED} of {len(frame)}." if len(frame) > LISTED else ""
    words = "; ".join(f"{name}: {SCORE_WORDS[name]}" for name in scores if name in SCORE_WORDS)
    note = f"<p>Scores: {words}.{more}</p>" if words or more else ""
    return note + table(["rank", "block", "neuron", *scores], rows, caption="The register neurons with their scores.")


def no_neurons_section(trace: Trace) -> Section:
    """What there is to say without outliers: that nothing is to be looked for, and why."""
    evidence = trace.evidence[trace.sublayers.index(trace.strongest)]
    gap = f"the widest gap between norms is a factor of {evidence.gap:.2f}" if evidence.gap > 1 else "there is no gap"
    body = (
        f"<p>There is nothing to look for: on these {trace.n_images} images the model has no outlier tokens, so that "
        f"no neuron makes any and a test-time register would have nothing to take over. The evidence: at "
        f"{trace.strongest}, where norms separate most, "
        f"{html.escape(evidence.reason)}; {gap}, and the largest patch norm is "
        f"{evidence.largest_over_median:.1f} x the image's median, mean over images.</p>"
    )
    return Section(id="neurons", title="Register neurons", body=body)


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
    detection = study.evaluation.detection
    legend = (
        f"Before and after, norms after block {before.layers[0]} and attention in block {before.layers[-1]}. Colours "
        f"run {scale_bar()} from 0 to the larger of the two maxima: the two maps of a pair share their scale. The "
        f"third map is the second again, from 0 to its own maximum, to show what is in it."
    )
    rows = []
    for i, name in enumerate(names):
        norms = before.norms[0, i], after.norms[0, i]
        attention = before.attention[-1, i], after.attention[-1, i]
        extra_norm = _extra("register", float(after.register_norm[0, i]))
        extra_attention = _extra("register or bias", float(after.register_attention[-1, i]))
        pictures = [photograph(display[i], name)]
        for kind, (old, new), extra in (("norm", norms, extra_norm), ("attention", attention, extra_attention)):
            highest, what = float(max(old.max(), new.max())), f"{kind.capitalize()} of each patch, {name},"
            pictures += [
                map_picture(old, highest, f"{kind} before<br>{_extent(old)}", display[i], f"{what} before"),
                map_picture(
                    new, highest, f"{kind} after, same scale<br>{_extent(new)}{extra}", display[i], f"{what} after"
                ),
                map_picture(
                    new, float(new.max()), f"{kind} after, own scale", display[i], f"{what} after, on its own scale"
                ),
            ]
        rows.append(beside(pictures, 7))
    body = (
        f"<p>{html.escape(study.words)}</p><p>{html.escape(study.samples)} Outliers are counted at "
        f"{detection.sublayer}, above {html.escape(str(detection.cutoff))}.</p><p>{legend}</p>{''.join(rows)}"
        f"{heading('Before, after and controls', 'register')}{plotted(evaluation_figure(study.evaluation))}"
        f"{_evaluated(study)}"
    )
    return Section(id="register", title=_title(study.condition), body=body)


def _evaluated(study: RegisterStudy) -> str:
    evaluation = study.evaluation
    metrics, conditions = evaluation_table(evaluation)
    headers = ["condition", *(html.escape(COLUMNS[metric]) for metric in metrics)]
    rows = [[html.escape(name), *(_cell(cells.get(metric)) for metric in metrics)] for name, cells in conditions]
    marked = [i for i, kind in enumerate(evaluation.kinds) if kind is ConditionKind.TESTED]
    note = (
        f"Means over {evaluation.n_images} images; below each mean, where it is not the same for every image, its 95% "
        f"bootstrap interval. {COLUMN_NOTE} Baselines: the same neurons set to zero or to their mean; "
        f"outliers overwritten by their neighbours. Controls: the same intervention on as many random neurons of each "
        f"block, on others that get about as active, and on random ones that get the register neurons' maxima."
    )
    if ConditionKind.BASELINE not in evaluation.kinds:
        note = note.partition(" Baselines:")[0]
    caption = "Every condition by every metric; marked: the intervention."
    return f"{table(headers, rows, marked, caption)}<p><small>{html.escape(note)}</small></p>"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return f"{cell}<small>{cell.interval}</small>" if cell.interval else f"{cell}"


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def _extent(values: np.ndarray) -> str:
    return f"max {values.max():.3g}<br>median {np.median(values):.2g}"


def _extra(what: str, value: float) -> str:
    return "" if np.isnan(value) else f"<br>{what} {value:.3g}"
