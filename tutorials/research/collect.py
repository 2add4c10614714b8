"""`python tutorials/research/collect.py RUNS_DIR`: what tutorial 11 shows of the research, taken from training runs.

Every folder in RUNS_DIR is a run of `registerlens emerge`. Written beside this file: runs.csv, one row a run, and the
dynamics of those runs whose checkpoints lie close enough together to say what comes first (`checkpoint_every: 20`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import registerlens as rl
from registerlens.emergence.recipes import RECIPES
from registerlens.emergence.research import judge_run
from registerlens.progress import track

HERE = Path(__file__).parent
FINE = 20
"""Steps between checkpoints that are fine enough for the order of the signs."""
FOLLOWED = 64
"""Images that dynamics are followed on: some hundred kilobytes a run."""


def main(folder: Path) -> None:
    """Judge what is not judged yet, and write."""
    runs = [rl.TrainingRun.open(path) for path in sorted(folder.iterdir()) if (path / "config.json").exists()]
    table = rl.results_table(track([run.folder for run in runs], "judging", len(runs)))
    order = [*RECIPES, "-"]
    table = table.sort_values(
        ["recipe", "seed"], key=lambda column: column.map(order.index) if column.name == "recipe" else column
    )
    table.drop(columns="run").round(4).to_csv(HERE / "runs.csv", index=False)
    for run in runs:
        if run.config.checkpoint_every <= FINE and run.finished:
            found = rl.training_dynamics(run, judge_run(run).neurons, n_images=FOLLOWED)
            found.save(HERE / "dynamics" / f"seed_{run.config.seed}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
