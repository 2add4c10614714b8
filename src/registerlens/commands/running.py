"""Commands that take long and go on where they stopped: sweep and its status; emerge, and runs, which lists them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from registerlens.commands.options import Debug, make_folder
from registerlens.commands.printing import print_criteria, print_runs, print_sweep, print_words
from registerlens.commands.shared import load_model, look_ahead_of_sweep, write_figure, write_parquet

if TYPE_CHECKING:
    from registerlens.sweep.result import SweepResult

RUN = "run"
"""The command that is meant where none is named."""


class _RunByDefault(TyperGroup):
    """`sweep CONFIG.yaml ...` is `sweep run CONFIG.yaml ...`: whatever does not begin with a command's name is run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Many edits of models on many images: `sweep CONFIG.yaml --store DIR` runs them, and goes on where a run "
    "stopped; `sweep status DIR` says how far it is.",
)


@app.command(RUN)
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to run; the documentation explains it")],
    store: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="Where results are kept: a folder or an fsspec URL")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in the store, or add new conditions to it")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster; 'auto' or 'local' too")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes, for CPUs; 0 works in this process")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many conditions there are and the cost")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the table of effects, the raw numbers and figures here")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run the sweep that CONFIG.yaml describes, keep every number in the store, and print the largest effects."""
    if not dry_run and store is None:
        raise typer.BadParameter("say where results are kept, or ask for --dry-run.", param_hint="--store")
    if ray is not None and workers:
        raise typer.BadParameter("give one of --ray and --workers.", param_hint="--workers")
    from registerlens.sweep.yaml_config import SweepConfig

    asked = SweepConfig.from_file(config)
    look_ahead_of_sweep(asked)
    from registerlens.sweep.from_config import prepare  # torch, once the file is known to be right

    make_folder(out)
    models = {name: load_model(model, asked.device) for name, model in asked.named_models.items()}
    prepared = prepare(asked, models)
    if dry_run:
        print_words(prepared.plan().describe())
        return
    backend: dict[str, Any] = {"backend": "ray", "address": ray} if ray else {"backend": "local"}
    if workers:
        backend = {"backend": "processes", "workers": workers}
    result = prepared.run(store=store, resume=resume, **backend)
    print_sweep(result)
    typer.echo(f"Every number is in {store}; read it with SweepResult.from_store({store!r}).")
    if out is not None:
        write_sweep(result, out)


@app.command("status")
def status(
    store: Annotated[str, typer.Argument(metavar="DIR|URL", help="The store of a sweep, at work or not")],
    debug: Debug = False,
) -> None:
    """Say how far the sweep in a store is, without touching it."""
    from registerlens.sweep.store import sweep_status

    print_words(sweep_status(store).describe())


def write_sweep(result: SweepResult, out: Path) -> None:
    """effects.parquet, the folder sweep, and every figure that the conditions allow, of each metric."""
    from registerlens.viz.sweep import drawable

    result.save(out / "sweep")
    write_parquet(result.to_dataframe(), out / "effects.parquet")
    names = [(metric, kind) for metric in result.metrics for kind in drawable(result, metric)]
    for metric, kind in names:
        write_figure(result.plot(kind, metric), out / f"{metric}-{kind}.html")
    typer.echo(
        f"Wrote effects.parquet (every effect with its interval), sweep (a folder: every image) and "
        f"{len(names)} figures to {out}"
    )


def emerge(
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoints, metrics, criteria")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML or JSON; default: the recipe of registerlens:tiny"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One of the research, by name: 'cls', 'gelu-4e-3', ..."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the configuration's")] = None,
    debug: Debug = False,
) -> None:
    """Train a tiny ViT from scratch and say whether register neurons have emerged in it.

    The same command goes on where a stopped run was, to the same weights bit for bit. The default recipe takes some
    minutes.
    """
    if config is not None and recipe is not None:
        raise typer.BadParameter("give --config or --recipe, not both", param_hint="--recipe")
    # Before torch is imported, for which wrong keys and names need not wait.
    from registerlens.emergence.config import TrainingConfig
    from registerlens.emergence.config import recipe as recipe_called

    asked = recipe_called(recipe or "default").config if config is None else TrainingConfig.from_file(config)
    from registerlens.emergence.dynamics import training_dynamics
    from registerlens.emergence.research import judge_run
    from registerlens.emergence.training import train

    run = train(asked if seed is None else asked.changed(seed=seed), out)
    last = run.metrics().iloc[-1]
    accuracies = {name[9:]: last[name] for name in last.index if name.startswith("accuracy_")}
    accuracy_text = ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
    print_words(
        f"Trained for {run.config.steps} steps in {last['seconds'] / 60:.1f} minutes. Accuracy: {accuracy_text}."
    )
    criteria = judge_run(run)
    print_criteria(criteria)
    write_parquet(criteria.to_dataframe(), out / "criteria.parquet")
    written = "criteria.parquet"
    if len(criteria.neurons) and len(run.checkpoints) > 1:
        course = training_dynamics(run, criteria.neurons)
        print_words(course.describe())
        course.save(out / "dynamics")
        write_figure(course.plot(), out / "dynamics.html")
        written += ", dynamics.html (what came first) and dynamics (a folder)"
    typer.echo(
        f"Wrote {written} to {out}, beside checkpoints and metrics; the model is {run.checkpoint(run.config.steps)}"
    )


def runs(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Of runs that emerge trained")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The whole table, as .parquet")] = None,
    debug: Debug = False,
) -> None:
    """List training runs: recipe, seeds, how often register neurons emerged, which criteria hold; failures too.

    Runs that were not judged yet are judged now.
    """
    from registerlens.emergence.research import results_table, summarise
    from registerlens.progress import track

    table = results_table(track(folders, "runs", len(folders)))
    print_runs(table, summarise(table))
    if out is not None:
        write_parquet(table, out)
        typer.echo(f"Wrote {out}")
