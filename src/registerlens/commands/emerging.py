"""The commands that train tiny ViTs in which register neurons emerge, and list what came of it: emerge, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registerlens.commands.options import Debug
from registerlens.commands.printing import print_criteria, print_runs, print_words
from registerlens.commands.shared import write_figure, write_parquet


def emerge(
    out: Annotated[Path, typer.Option("--out", help="The run's folder: checkpoints, metrics, criteria")],
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML or JSON; default: the recipe of registerlens:tiny"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME", help="One of the research, by name: 'cls', 'gelu-4e-3', ..."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the configuration's")] = None,
    debug: Debug = False,
) -> None:
    """Train a tiny ViT from scratch and say whether register neurons have emerged in it.

    The same command goes on where a stopped run was, to the same weights bit for bit. The default recipe takes some
    minutes.
    """
    if config is not None and recipe is not None:
        raise typer.BadParameter("give --config or --recipe, not both", param_hint="--recipe")
    # Before torch is imported, for which wrong keys and names need not wait.
    from registerlens.emergence.config import TrainingConfig  # noqa: PLC0415
    from registerlens.emergence.config import recipe as recipe_called  # noqa: PLC0415

    asked = recipe_called(recipe or "default").config if config is None else TrainingConfig.from_file(config)
    from registerlens.emergence.dynamics import training_dynamics  # noqa: PLC0415
    from registerlens.emergence.research import judge_run  # noqa: PLC0415
    from registerlens.emergence.training import train  # noqa: PLC0415

    run = train(asked if seed is None else asked.changed(seed=seed), out)
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
        course.save(out / "dynamics")
        write_figure(course.plot(), out / "dynamics.html")
        written += ", dynamics.html (what came first) and dynamics (a folder)"
    typer.echo(
        f"Wrote {written} to {out}, beside checkpoints and metrics; the model is {run.checkpoint(run.config.steps)}"
    )


def runs(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Of runs that emerge trained")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The whole table, as .parquet")] = None,
    debug: Debug = False,
) -> None:
    """List training runs: recipe, seeds, how often register neurons emerged, which criteria hold; failures too.

    Runs that were not judged yet are judged now.
    """
    from registerlens.emergence.research import results_table, summarise  # noqa: PLC0415
    from registerlens.progress import track  # noqa: PLC0415

    table = results_table(track(folders, "runs", len(folders)))
    print_runs(table, summarise(table))
    if out is not None:
        write_parquet(table, out)
        typer.echo(f"Wrote {out}")
