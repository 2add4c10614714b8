"""Commands that say why outliers act as they do: kernels holds a model against the theory, circuit follows a sink."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from registerlens.commands import options, shared
from registerlens.commands.printing import print_kernels, print_words

if TYPE_CHECKING:
    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.circuits.records import AttentionCircuit
    from registerlens.theory.kernels import KernelReport


def kernels(
    model: options.Model,
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders or globs; without any, the weights alone are checked"),
    ] = None,
    neurons: options.NeuronsText = "auto",
    out: Annotated[Path | None, typer.Option(help="Write every number, the neurons and figures here")] = None,
    threshold: options.ThresholdText = "auto",
    layer: options.LayerText = "auto",
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Check on MODEL the conditions under which the theory makes a sink on register neurons' tokens a no-op.

    With IMAGES the neurons are found where none are given, and the outlier tokens themselves are measured. Without
    any, the weights alone are checked, and --neurons says which neurons.
    """
    where = {"threshold": options.read_threshold(threshold), "layer": options.read_layer(layer)}
    shared.look_ahead(model, where["layer"])
    known = options.read_neurons(neurons)
    if known is None and not images:
        raise typer.BadParameter(
            "weights alone do not say which neurons make outliers. Give IMAGES, on which they are found, or a FILE or "
            "published:NAME.",
            param_hint="--neurons",
        )
    options.make_folder(out)
    from registerlens.theory.kernels import check_kernels

    if images:
        vit, stream = shared.load(model, images, size, batch_size, device)
        with shared.skips_named(stream):
            report = check_kernels(vit, shared.chosen_neurons(vit, stream, known, where), images=stream)
    else:
        given = cast("RegisterNeurons", known)  # or it ended above
        report = check_kernels(shared.load_model(model, device), given)
    print_words(str(report.neurons))
    print_kernels(report)
    if out is not None:
        _write_kernels(report, out)


def _write_kernels(report: KernelReport, out: Path) -> None:
    report.save(out / "kernels")
    report.neurons.save(out)
    shared.write_parquet(report.to_dataframe(), out / "kernels.parquet")
    shared.write_figure(report.plot(), out / "figure.html")
    shared.write_figure(report.plot_weights(), out / "weights.html")
    typer.echo(
        f"Wrote kernels (a folder) and kernels.parquet (every number), register_neurons.json, figure.html and "
        f"weights.html to {out}"
    )


def circuit(
    model: options.Model,
    images: options.Images,
    neurons: options.NeuronsText = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the circuit, all tables, the neurons and a figure here"),
    ] = None,
    min_share: Annotated[
        float, typer.Option(min=0, max=0.999, help="Smallest share of a node's inflow that is shown")
    ] = 0.01,
    block: Annotated[
        int | None,
        typer.Option(min=0, help="Take the outliers' stream after this block; default: the onset's"),
    ] = None,
    target: Annotated[
        int | None, typer.Option(min=0, help="Output to explain; default: the output's own direction")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Cut every edge alone and measure what its receiver computes then")
    ] = True,
    threshold: options.ThresholdText = "auto",
    layer: options.LayerText = "auto",
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Follow the path from register neurons to [CLS]: outlier tokens, the heads that sink in them, what these write.

    Contributions add up at every node. Where no neurons are given, they are found on the same IMAGES.
    """
    where = {"threshold": options.read_threshold(threshold), "layer": options.read_layer(layer)}
    shared.look_ahead(model, where["layer"], blocks=[] if block is None else [block])
    known = options.read_neurons(neurons)
    options.make_folder(out)
    vit, stream = shared.load(model, images, size, batch_size, device)
    from registerlens.analysis.detection import detect
    from registerlens.circuits.attention_circuit import attention_circuit

    with shared.skips_named(stream):
        chosen = shared.chosen_neurons(vit, stream, known, where)
        detection = detect(vit, stream, **where) if chosen.search is None else chosen.search.detection
        measured = attention_circuit(
            vit,
            stream,
            chosen,
            min_share=min_share,
            check=check,
            block=block,
            target=target,
            detection=detection,
            batch_size=batch_size,
        )
        shared.note_images(vit, stream)
    print_words(str(chosen))
    print_words(measured.describe())
    print_words(shared.on_which_images(chosen, measured.n_images, known is None))
    if out is not None:
        _write_circuit(measured, out)


def _write_circuit(measured: AttentionCircuit, out: Path) -> None:
    measured.save(out / "attention_circuit")
    measured.neurons.save(out)
    for table in ("edges", "nodes", "paths", "parts"):
        shared.write_parquet(measured.to_dataframe(table), out / f"{table}.parquet")
    shared.write_figure(measured.plot(), out / "figure.html")
    typer.echo(
        f"Wrote attention_circuit (a folder with every number), edges, nodes, paths and parts as .parquet, "
        f"register_neurons.json and figure.html to {out}"
    )
