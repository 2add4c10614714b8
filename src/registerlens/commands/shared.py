"""What every command does first and last: load the model, stream the images, name the skipped, write files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from registerlens.commands import options

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor

    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.data.examples import OwnImages
    from registerlens.data.images import ImageStream
    from registerlens.evaluation.effects import Evaluation
    from registerlens.model.vit import HookedViT
    from registerlens.sweep.yaml_config import SweepConfig


def look_ahead(
    model: str, layer: int | str = "auto", blocks: Sequence[int] = (), heads: Sequence[tuple[int, int]] = ()
) -> None:
    """Refuse a model that is nowhere, and places that it lacks, before the seconds that importing torch takes.

    What only the model's library can tell is refused later.
    """
    from registerlens.loading.sources import look_up
    from registerlens.model.sublayers import require_blocks, require_heads, sublayer_of

    if (family := look_up(model)) is None:
        return
    if layer != "auto":
        sublayer_of(layer, family.n_layers)
    require_blocks(blocks, family.n_layers)
    require_heads(heads, family.n_layers, family.n_heads)


def look_ahead_of_sweep(asked: SweepConfig) -> None:
    """The same for every model and condition of a sweep."""
    for model in asked.named_models.values():
        look_ahead(model)
        for i, condition in enumerate(asked.conditions):
            layers, heads = condition.axes.get("layers", ()), condition.axes.get("heads", ())
            if layers or heads:
                with asked.at("conditions", i):
                    look_ahead(model, blocks=layers, heads=() if heads == "all" else heads)


def load(
    model: str, images: list[str], size: int | None, batch_size: int, device: str
) -> tuple[HookedViT, ImageStream | OwnImages]:
    """The model, and a stream of the images named; of "synthetic", of its own kind."""
    from registerlens.config import Preprocess
    from registerlens.data.examples import OwnImages
    from registerlens.data.images import ImageStream

    vit = load_model(model, device)
    if images == [options.SYNTHETIC]:
        return vit, OwnImages(vit, batch_size=batch_size)
    # Files of all folders and globs among the arguments, in the order given.
    nothing = Preprocess(resize=(1, 1))
    names = [name for image in images for name in ImageStream(image, nothing).names]
    return vit, ImageStream(names, vit, batch_size=batch_size, size=size)


def load_model(model: str, device: str) -> HookedViT:
    """The model alone."""
    from registerlens.loading.pretrained import from_pretrained

    _check_device(device)
    return from_pretrained(model, device=device)


@contextmanager
def skips_named(stream: ImageStream | OwnImages) -> Iterator[None]:
    """Once the work is done, or has failed, say which images were skipped, without Python's decoration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for skipped in stream.skipped:
                typer.secho(f"Skipped {skipped}", fg=typer.colors.YELLOW, err=True)


def note_images(vit: HookedViT, stream: ImageStream | OwnImages) -> None:
    """Say so where the first images are of another kind than the model was trained on."""
    from registerlens.diagnosis.inputs import kind_of_images
    from registerlens.diagnosis.symptoms import PixelSums
    from registerlens.engine.stream import Batch

    _, pixels, _ = shown_images(vit, stream, stream.batch_size, None)
    sums = PixelSums()
    sums.update(Batch(pixels, vit.layout(pixels), 0))
    if (finding := kind_of_images(vit, sums.result())) is not None:
        typer.secho(f"{finding.words} {finding.advice}", fg=typer.colors.YELLOW, err=True)


def shown_images(
    vit: HookedViT, stream: ImageStream | OwnImages, n: int, size: int | None
) -> tuple[list[str], Tensor, np.ndarray]:
    """The first images that could be read: their names, pixels for the model, pixels to look at."""
    from registerlens.data.examples import OwnImages, example_pictures
    from registerlens.data.images import load_images, to_display

    names = stream.loaded[:n]
    if isinstance(stream, OwnImages):
        return names, stream.images[:n], example_pictures(vit, stream.images[:n])
    pixels = load_images(list(names), vit, size=size)
    return names, pixels, to_display(pixels, vit.preprocess)


def chosen_neurons(
    vit: HookedViT, stream: ImageStream | OwnImages, known: RegisterNeurons | None, where: dict[str, Any]
) -> RegisterNeurons:
    """Those that were given, if the model has them; else those that are found.

    Args:
        vit: the model.
        stream: where to search.
        known: those given.
        where: threshold and layer of the outliers.
    """
    from registerlens.interventions.search import find_register_neurons

    if known is not None:
        if words := known.check(vit.cfg).other_model(vit):
            typer.secho(words, fg=typer.colors.YELLOW, err=True)
        return known
    return find_register_neurons(vit, stream, threshold=where["threshold"], layer=where["layer"])


def on_which_images(neurons: RegisterNeurons, n_images: int, found_here: bool) -> str:
    """A sentence on whether the images of the evaluation are those that the neurons were found on."""
    if found_here:
        return (
            f"The neurons were found on the same {n_images} images as they are evaluated on, so that the evaluation is "
            f"not independent of the search; to keep them apart, give neurons found on other images with --neurons."
        )
    return f"The neurons were given ({neurons.source}), and not searched for in these {n_images} images."


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """A table, whole or not at all."""
    from registerlens.files import whole_file

    with whole_file(path) as temporary:
        frame.to_parquet(temporary)


def write_figure(figure: go.Figure, path: Path) -> None:
    """An interactive figure that needs no network, whole or not at all."""
    from registerlens.viz.drawing import save_figure

    save_figure(figure, path)


def write_evaluation(done: Evaluation, out: Path) -> None:
    """The folder evaluation, evaluation.parquet and figure.html."""
    done.save(out / "evaluation")
    write_parquet(done.to_dataframe(), out / "evaluation.parquet")
    write_figure(done.plot(), out / "figure.html")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"{device!r} is not available here: {reason}", param_hint="--device") from error
