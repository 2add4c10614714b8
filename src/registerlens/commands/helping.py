"""The command that prints the page of an error: help."""

from __future__ import annotations

from typing import Annotated

import typer

from registerlens.errors import close_matches, kinds, page_of


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
