"""The command that trains a tiny ViT in which register neurons emerge: emerge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registerlens.commands.options import Debug
from registerlens.commands.printing import print_words
from registerlens.commands.shared import write_figure, write_parquet

if TYPE_CHECKING:
    from registerlens.emergence.criteria import EmergenceCriteria


def emerge(
    out: Annotated[Path, typer.Option("--out", help="The run's folder: checkpoints, metrics, criteria")],
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML or JSON; default: the recipe of registerlens:tiny"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the configuration's")] = None,
    debug: Debug = False,
) -> None:
    """Train a tiny ViT from scratch and say whether register neurons have emerged in it.

    The same command goes on where a stopped run was, to the same weights bit for bit. The default recipe takes some
    minutes.
    """
    from dataclasses import replace  # noqa: PLC0415

    from registerlens.emergence.config import TrainingConfig  # noqa: PLC0415
    from registerlens.emergence.dynamics import training_dynamics  # noqa: PLC0415
    from registerlens.emergence.research import judge_run  # noqa: PLC0415
    from registerlens.emergence.training import train  # noqa: PLC0415

    asked = TrainingConfig() if config is None else TrainingConfig.from_file(config)
    run = train(asked if seed is None else replace(asked, seed=seed), out)
    last = run.metrics().iloc[-1]
    accuracies = {name[9:]: last[name] for name in last.index if name.startswith("accuracy_")}
    told = ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
    print_words(f"Trained for {run.config.steps} steps in {last['seconds'] / 60:.1f} minutes. Accuracy: {told}.")
    found = judge_run(run)
    print_criteria(found)
    write_parquet(found.to_dataframe(), out / "criteria.parquet")
    written = "criteria.parquet"
    if len(found.neurons) and len(run.checkpoints) > 1:
        course = training_dynamics(run, found.neurons)
        print_words(course.describe())
        course.save(out)
        write_figure(course.plot(), out / "dynamics.html")
        written += ", dynamics.html (what came first), dynamics.json and .safetensors"
    typer.echo(
        f"Wrote {written} to {out}, beside checkpoints and metrics; the model is {run.checkpoint(run.config.steps)}"
    )


def print_criteria(found: EmergenceCriteria) -> None:
    """The criteria in words and as a table."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    print_words(found.describe(), style="bold")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in ("criterion", "value", "threshold", "holds"):
        table.add_column(header, justify="left" if header == "criterion" else "right")
    for row in found.to_dataframe().to_dict("records"):
        holds = "[green]yes" if row["holds"] else "[red]no"
        value = "-" if row["value"] != row["value"] else f"{row['value']:.3f}"
        table.add_row(row["criterion"], value, row["threshold"], holds)
    Console().print(table)
