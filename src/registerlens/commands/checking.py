"""The command that holds a model against the theory: kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from registerlens.commands.options import (
    BatchSize,
    Debug,
    Device,
    LayerText,
    Model,
    NeuronsText,
    Size,
    ThresholdText,
    make_folder,
    read_layer,
    read_neurons,
    read_threshold,
)
from registerlens.commands.printing import print_kernels, print_words
from registerlens.commands.shared import (
    chosen_neurons,
    load,
    load_model,
    look_ahead,
    skips_named,
    write_figure,
    write_parquet,
)

if TYPE_CHECKING:
    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.theory.kernels import KernelReport


def kernels(
    model: Model,
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders or globs; without any, the weights alone are checked"),
    ] = None,
    neurons: NeuronsText = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Write every number, the neurons and figures here")] = None,
    threshold: ThresholdText = "auto",
    layer: LayerText = "auto",
    size: Size = None,
    batch_size: BatchSize = 16,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Check on MODEL the conditions under which the theory makes a sink on register neurons' tokens a no-op.

    With IMAGES the neurons are found where none are given, and the outlier tokens themselves are measured. Without
    any, the weights alone are checked, and --neurons says which neurons.
    """
    where = {"threshold": read_threshold(threshold), "layer": read_layer(layer)}
    look_ahead(model, where["layer"])
    known = read_neurons(neurons)
    if known is None and not images:
        raise typer.BadParameter(
            "weights alone do not say which neurons make outliers. Give IMAGES, on which they are found, or a FILE or "
            "published:NAME.",
            param_hint="--neurons",
        )
    if out is not None:
        make_folder(out)
    from registerlens.theory.kernels import check_kernels  # noqa: PLC0415

    if images:
        vit, stream = load(model, images, size, batch_size, device)
        with skips_named(stream):
            report = check_kernels(vit, chosen_neurons(vit, stream, known, where), images=stream)
    else:
        report = check_kernels(load_model(model, device), cast("RegisterNeurons", known))  # given, or it ended above
    print_words(str(report.neurons))
    print_kernels(report)
    if out is not None:
        _write(report, out)


def _write(report: KernelReport, out: Path) -> None:
    report.save(out / "kernels")
    report.neurons.save(out)
    write_parquet(report.to_dataframe(), out / "kernels.parquet")
    write_figure(report.plot(), out / "figure.html")
    write_figure(report.plot_weights(), out / "weights.html")
    typer.echo(
        f"Wrote kernels (a folder) and kernels.parquet (every number), register_neurons.json, figure.html and "
        f"weights.html to {out}"
    )
