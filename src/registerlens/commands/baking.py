"""The command that saves a model with an intervention in it: bake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registerlens.commands.options import Debug, Model, read_neurons
from registerlens.commands.shared import look_ahead


def bake(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="A new folder for the model")],
    neurons: Annotated[
        str | None,
        typer.Option("--neurons", metavar="FILE|published:NAME", help="Register neurons, for a test-time register"),
    ] = None,
    bias: Annotated[
        Path | None,
        typer.Option(
            "--bias",
            metavar="FOLDER",
            help="A fitted attention bias instead (`register --bias --out`)",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many test-time registers")] = 1,
    debug: Debug = False,
) -> None:
    """Save MODEL, of transformers, timm or open_clip, with a test-time register in it, and a small loader.

    The folder is an ordinary model folder of that library; its load.py loads the model with the edit in place.
    """
    if (neurons is None) == (bias is None):
        raise typer.BadParameter("give one of --neurons and --bias.", param_hint="--neurons")
    if neurons == "auto":
        raise typer.BadParameter("give a file or a published list; `neurons --out` makes one.", param_hint="--neurons")
    look_ahead(model)
    known = None if neurons is None else read_neurons(neurons)
    from registerlens.interventions.attention_bias import AttentionBias  # noqa: PLC0415
    from registerlens.interventions.bake import bake as save  # noqa: PLC0415
    from registerlens.interventions.registers import TestTimeRegisters  # noqa: PLC0415

    if known is not None:
        folder = save(model, TestTimeRegisters(known, n=n), out)
    else:
        folder = save(model, AttentionBias.load(bias), out)  # type: ignore[arg-type]
    typer.echo(
        f"Wrote {folder}. In Python: from load import load_model (in that folder), or load_baked({str(folder)!r})"
    )
