"""Arguments and options that commands share, and how their text is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registerlens.analysis.detection import Threshold
    from registerlens.analysis.neurons import RegisterNeurons

Model = Annotated[
    str,
    typer.Argument(
        help="Hub id or folder; timm:NAME; open_clip:MODEL/TAG; registerlens:tiny (see `registerlens models`)"
    ),
]
SYNTHETIC = "synthetic"
"""In place of images: the model's own kind, which needs no files."""
Images = Annotated[
    list[str], typer.Argument(help="Image files, folders or globs; synthetic: examples of the model's kind")
]
Size = Annotated[
    int | None, typer.Option("--size", min=1, help="Square image size in pixels; default: the model's own")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at once")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]
ThresholdText = Annotated[
    str,
    typer.Option(
        "--threshold",
        metavar="auto|gap|sigma|mad|NUMBER",
        help="What counts as an outlier; a NUMBER is a residual norm, and is taken even where outliers are absent",
    ),
]
LayerText = Annotated[
    str, typer.Option("--layer", metavar="auto|N|N.attn|N.mlp", help="Where norms are taken: a block, or a sublayer")
]
NeuronsText = Annotated[
    str,
    typer.Option(
        "--neurons",
        metavar="auto|LAYER:NEURON,...|FILE|published:NAME",
        help="Register neurons: found here, listed (5:94,5:12), from a file, or a published list",
    ),
]


def read_threshold(text: str) -> Threshold:
    """The rule, or the norm.

    Raises:
        BadParameter: it is neither.

    Example:
        >>> read_threshold("gap"), read_threshold("75")
        ('gap', 75.0)
    """
    if text in ("auto", "gap", "sigma", "mad"):
        return text  # type: ignore[return-value]
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise typer.BadParameter(
            f"expected auto, gap, sigma, mad or a norm above 0, got {text!r}.", param_hint="--threshold"
        )
    return value


def read_layer(text: str) -> Any:
    """ "auto", a block, or the name of a sublayer.

    Raises:
        BadParameter: it is none of them.

    Example:
        >>> read_layer("auto"), read_layer("-2"), read_layer("5.mlp")
        ('auto', -2, '5.mlp')
    """
    if re.fullmatch(r"auto|embed|\d+\.(attn|mlp)", text):
        return text
    return _integer(text, "--layer", "auto, a block such as 5, or a sublayer such as 5.mlp", -(10**6))


def read_auto_or_integer(text: str, option: str, lowest: int) -> Any:
    """ "auto", or an integer from `lowest`.

    Raises:
        BadParameter: it is neither.

    Example:
        >>> read_auto_or_integer("auto", "--top-k", 1), read_auto_or_integer("12", "--top-k", 1)
        ('auto', 12)
    """
    return text if text == "auto" else _integer(text, option, f"auto or an integer from {lowest}", lowest)


def read_neurons(text: str) -> RegisterNeurons | None:
    """The list that is meant; None where they are still to be found.

    Raises:
        BadParameter: there is no such file or list, or it is damaged or empty.

    Example:
        >>> read_neurons("5:94,5:12").pairs
        ((5, 94), (5, 12))
    """
    if text == "auto":
        return None
    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.errors import ConfigError

    if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        return RegisterNeurons.from_pairs([tuple(map(int, one.split(":"))) for one in text.split(",")])  # type: ignore[misc]
    kind, _, name = text.partition(":")
    try:
        neurons = RegisterNeurons.published(name) if kind == "published" else RegisterNeurons.load(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--neurons") from error
    if not len(neurons):
        raise typer.BadParameter(f"{text} lists no neuron.", param_hint="--neurons")
    return neurons


def read_heads(text: str) -> list[tuple[int, int]]:
    """(layer, head) of attention heads as "LAYER.HEAD,LAYER.HEAD".

    Raises:
        BadParameter: the text is no such list.

    Example:
        >>> read_heads("3.0,3.5")
        [(3, 0), (3, 5)]
    """
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", text):
        raise typer.BadParameter(f"expected LAYER.HEAD,... such as 3.0,3.5, got {text!r}.", param_hint="--heads")
    parts = [part.partition(".") for part in text.split(",")]
    return [(int(layer), int(head)) for layer, _, head in parts]


def read_tokens(text: str) -> tuple[int, Any]:
    """The block, and which tokens after it, of "LAYER:cls", "LAYER:trained_registers" or "LAYER:PATCH,PATCH".

    Raises:
        BadParameter: the text is nothing of the kind.

    Example:
        >>> read_tokens("3:cls"), read_tokens("3:0,7")
        ((3, 'cls'), (3, [0, 7]))
    """
    match = re.fullmatch(r"(\d+):(?:(cls|trained_registers)|(\d+(?:,\d+)*))", text)
    if match is None:
        raise typer.BadParameter(
            f"expected LAYER:cls, LAYER:trained_registers or LAYER:PATCH,PATCH, got {text!r}.", param_hint="--tokens"
        )
    layer, name, patches = match.groups()
    return int(layer), name or [int(patch) for patch in patches.split(",")]


def make_folder(folder: Path | None) -> None:
    """Make a folder for results, where there shall be one, before the work, not after it.

    Raises:
        BadParameter: nothing can be written there.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror}", param_hint="--out") from error


def _integer(text: str, option: str, expected: str, lowest: int) -> int:
    if not re.fullmatch(r"-?\d+", text) or int(text) < lowest:
        raise typer.BadParameter(f"expected {expected}, got {text!r}.", param_hint=option)
    return int(text)
