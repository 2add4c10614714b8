"""Commands that look and change nothing: trace, report, neurons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from registerlens.commands import options, shared
from registerlens.commands.printing import print_diagnosis, print_neurons, print_trace, print_words

if TYPE_CHECKING:
    from registerlens.data.examples import OwnImages
    from registerlens.data.images import ImageStream
    from registerlens.errors import NoOutliersError
    from registerlens.model.vit import HookedViT
    from registerlens.viz.study import Mechanism, RegisterStudy

MAPS = 4
"""Images with activation maps."""


def trace_command(
    model: options.Model,
    images: options.Images,
    layers: Annotated[bool, typer.Option("--layers", help="Print every sublayer, not only the telling ones")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the trace, trace.parquet, figure.html here")] = None,
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Follow patch norms and sinks through MODEL on IMAGES: which norm, which layer?"""
    shared.look_ahead(model)
    options.make_folder(out)
    vit, stream = shared.load(model, images, size, batch_size, device)
    from registerlens.analysis.trace import trace

    with shared.skips_named(stream):
        traced = trace(vit, stream)
        shared.note_images(vit, stream)
    print_trace(traced, layers)
    if out is not None:
        traced.save(out / "trace")
        shared.write_parquet(traced.to_dataframe(), out / "trace.parquet")
        shared.write_figure(traced.plot(), out / "figure.html")
        typer.echo(f"Wrote trace (a folder), trace.parquet and figure.html to {out}")


def diagnose_command(
    model: options.Model,
    images: options.Images,
    out: Annotated[Path | None, typer.Option(help="Write the diagnosis and its evidence here")] = None,
    evaluated: Annotated[int, typer.Option(min=1, help="On how many images remedies are measured, at most")] = 32,
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Say what is wrong with MODEL on IMAGES, with evidence, and what to do about it."""
    shared.look_ahead(model)
    options.make_folder(out)
    vit, stream = shared.load(model, images, size, batch_size, device)
    from registerlens.diagnosis.diagnose import diagnose

    with shared.skips_named(stream):
        found = diagnose(vit, stream, evaluated=evaluated, batch_size=batch_size)
    print_diagnosis(found)
    if out is not None:
        found.save(out / "diagnosis")
        shared.write_parquet(found.to_dataframe().astype({"value": str}), out / "diagnosis.parquet")
        typer.echo(f"Wrote diagnosis (a folder) and diagnosis.parquet to {out}")


def report(
    model: options.Model,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="The HTML file")] = Path("registerlens-report.html"),
    shown: Annotated[int, typer.Option(min=1, help="How many images to show maps of")] = 8,
    evaluated: Annotated[
        int, typer.Option(min=1, help="On how many images a test-time register is evaluated, at most")
    ] = 64,
    explained: Annotated[
        int,
        typer.Option(
            min=0,
            help="On how many images kernels, sinks and neurons are examined, at most; 0: not at all, and no circuit",
        ),
    ] = 64,
    explored: Annotated[
        int, typer.Option(min=0, help="How many images can be looked at by hand, at most; 0: none")
    ] = 3,
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Write one self-contained HTML page about MODEL on IMAGES: outliers, register neurons, a register, mechanism.

    Where there are outliers, also the circuit that they make; and images to look at by hand, patch by patch.
    """
    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder; name the HTML file.", param_hint="--out")
    shared.look_ahead(model)
    options.make_folder(out.parent)
    vit, stream = shared.load(model, images, size, batch_size, device)
    from registerlens.diagnosis.diagnose import conclude
    from registerlens.diagnosis.symptoms import measure
    from registerlens.viz.report import write_report
    from registerlens.viz.study import FOLLOWED, describe, explore_few, remedy_of, study_circuit

    with shared.skips_named(stream):
        symptoms = measure(vit, stream, batch_size)
        traced = symptoms.trace
        names, pixels, display = shared.shown_images(vit, stream, max(shown, explored), size)
        study = None if traced.verdict != "present" else _study(vit, stream, evaluated, size)
        diagnosis = conclude(symptoms, remedy_of(study))
        parts: dict[str, Any] = {"study": study, "diagnosis": diagnosis}
        if explained:
            parts["mechanism"] = _mechanism(vit, stream, study, explained, size)
            parts["circuit"] = study_circuit(vit, _first(vit, stream, min(explained, FOLLOWED), size), study)
        if explored:
            parts["explorer"] = explore_few(vit, pixels, display, traced, study, names=names, n=explored)
    print_words(diagnosis.describe())
    print_trace(traced, layers=False)
    if study is not None:
        print_words(describe(study))
    write_report(out, vit, pixels[:shown], display[:shown], traced, names=names[:shown], title=vit.source, **parts)
    typer.echo(f"Wrote {out}")


def _study(
    vit: HookedViT, stream: ImageStream | OwnImages, evaluated: int, size: int | None
) -> RegisterStudy | NoOutliersError:
    """Search in all images, evaluation on the first ones."""
    from registerlens.viz.study import study_registers

    n = len(stream.loaded)
    which = f"the first {evaluated} of them" if evaluated < n else "the same ones"
    samples = (
        f"The neurons were found on {n} images, and the register was evaluated on {which}: the evaluation is "
        f"not independent of the search."
    )
    return study_registers(vit, stream, _first(vit, stream, evaluated, size), samples)


def _mechanism(
    vit: HookedViT,
    stream: ImageStream | OwnImages,
    study: RegisterStudy | NoOutliersError | None,
    explained: int,
    size: int | None,
) -> Mechanism:
    """On the first images."""
    from registerlens.viz.study import RegisterStudy, study_mechanism

    neurons = study.neurons if isinstance(study, RegisterStudy) else study
    return study_mechanism(vit, _first(vit, stream, explained, size), neurons)


def _first(vit: HookedViT, stream: ImageStream | OwnImages, n: int, size: int | None) -> ImageStream | OwnImages:
    """The first images that could be read, at most `n`."""
    from registerlens.data.images import ImageStream

    if not isinstance(stream, ImageStream):
        return stream.first(n)
    return ImageStream(list(stream.loaded)[:n], vit, batch_size=stream.batch_size, size=size)


def neurons(
    model: options.Model,
    images: options.Images,
    out: Annotated[
        Path | None, typer.Option(help="Write register_neurons.json, all scores, figures and maps here")
    ] = None,
    threshold: options.ThresholdText = "auto",
    layer: options.LayerText = "auto",
    lowest_layer: Annotated[int, typer.Option(min=0, help="First block searched")] = 0,
    top_layer: Annotated[
        str, typer.Option(metavar="auto|N", help="Last block searched; auto: where outliers emerge")
    ] = "auto",
    top_k: Annotated[str, typer.Option(metavar="auto|N", help="How many neurons")] = "auto",
    score: Annotated[Literal["mean", "mean_abs", "contrast", "auc"], typer.Option(help="What ranks them")] = "mean",
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Find the register neurons of MODEL on IMAGES: those that decide where outliers appear."""
    how: dict[str, Any] = {
        "threshold": options.read_threshold(threshold),
        "layer": options.read_layer(layer),
        "lowest_layer": lowest_layer,
        "top_layer": options.read_auto_or_integer(top_layer, "--top-layer", 0),
        "top_k": options.read_auto_or_integer(top_k, "--top-k", 1),
        "score": score,
    }
    last = how["top_layer"]
    shared.look_ahead(model, how["layer"], blocks=[lowest_layer, *([] if last == "auto" else [last])])
    options.make_folder(out)
    vit, stream = shared.load(model, images, size, batch_size, device)
    from registerlens.interventions.search import find_register_neurons

    with shared.skips_named(stream):
        ranking = find_register_neurons(vit, stream, **how)
        shared.note_images(vit, stream)
    print_neurons(ranking)
    search = ranking.search
    if out is None or search is None:
        return
    from registerlens.viz.report import write_neuron_maps

    ranking.save(out)
    search.save(out / "neuron_search")
    shared.write_parquet(search.to_dataframe(), out / "neurons.parquet")
    shared.write_figure(search.plot(), out / "figure.html")
    names, pixels, display = shared.shown_images(vit, stream, MAPS, size)
    block = max(search.detection.layer, 0)
    write_neuron_maps(out / "maps.html", vit, pixels, display, ranking, names=names, block=block)
    typer.echo(
        f"Wrote register_neurons.json, neuron_search (a folder), neurons.parquet (all neurons), figure.html and "
        f"maps.html to {out}"
    )
