"""The command that takes an attention sink apart: circuit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registerlens.commands.options import (
    BatchSize,
    Debug,
    Device,
    Images,
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
from registerlens.commands.printing import print_words
from registerlens.commands.shared import (
    chosen_neurons,
    load,
    look_ahead,
    on_which_images,
    skips_named,
    write_figure,
    write_parquet,
)

if TYPE_CHECKING:
    from registerlens.circuits.records import AttentionCircuit


def circuit(
    model: Model,
    images: Images,
    neurons: NeuronsText = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the circuit, all tables, the neurons and a figure here"),
    ] = None,
    min_share: Annotated[
        float, typer.Option("--min-share", min=0, max=0.999, help="Smallest share of a node's inflow that is shown")
    ] = 0.01,
    block: Annotated[
        int | None,
        typer.Option("--block", min=0, help="Take the outliers' stream after this block; default: the onset's"),
    ] = None,
    target: Annotated[
        int | None, typer.Option("--target", min=0, help="Output to explain; default: the output's own direction")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Cut every edge alone and measure what its receiver computes then")
    ] = True,
    threshold: ThresholdText = "auto",
    layer: LayerText = "auto",
    size: Size = None,
    batch_size: BatchSize = 16,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Follow the path from register neurons to [CLS]: outlier tokens, the heads that sink in them, what these write.

    Contributions add up at every node. Where no neurons are given, they are found on the same IMAGES.
    """
    where = {"threshold": read_threshold(threshold), "layer": read_layer(layer)}
    look_ahead(model, where["layer"], blocks=[] if block is None else [block])
    known = read_neurons(neurons)
    if out is not None:
        make_folder(out)
    vit, stream = load(model, images, size, batch_size, device)
    from registerlens.analysis.detection import detect  # noqa: PLC0415
    from registerlens.circuits.attention_circuit import attention_circuit  # noqa: PLC0415

    with skips_named(stream):
        chosen = chosen_neurons(vit, stream, known, where)
        detection = detect(vit, stream, **where) if chosen.search is None else chosen.search.detection
        found = attention_circuit(
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
    print_words(str(chosen))
    print_words(found.describe())
    print_words(on_which_images(chosen, found.n_images, known is None))
    if out is not None:
        _write(found, out)


def _write(found: AttentionCircuit, out: Path) -> None:
    found.save(out / "attention_circuit")
    found.neurons.save(out)
    for table in ("edges", "nodes", "paths", "parts"):
        write_parquet(found.to_dataframe(table), out / f"{table}.parquet")
    write_figure(found.plot(), out / "figure.html")
    typer.echo(
        f"Wrote attention_circuit (a folder with every number), edges, nodes, paths and parts as .parquet, "
        f"register_neurons.json and figure.html to {out}"
    )
