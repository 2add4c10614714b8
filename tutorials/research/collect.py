"""`python tutorials/research/collect.py RUNS_DIR`: what tutorial 11 shows of the research, taken from training runs.

Every folder in RUNS_DIR is a run of `registerlens emerge`. Written beside this file: runs.csv, one row a run; what came
first in runs whose checkpoints lie close enough together (`checkpoint_every: 20`); for seed 0 of some recipes, where
attention goes, and whether outliers have lost what their patches showed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import registerlens as rl
from registerlens.emergence.recipes import RECIPES, recipe_of
from registerlens.emergence.research import judge_run
from registerlens.emergence.run import held_out_images
from registerlens.progress import track

HERE = Path(__file__).parent
FINE = 20
"""Steps between checkpoints that are fine enough for the order of the signs."""
FOLLOWED = 64
"""Images that dynamics are followed on: some hundred kilobytes a run."""
READ = 768
"""Images that pixels are read on."""


WITH_PREFIX = ("cls", "registers")
VARIED = ("default", "gradients", "soft-noise", "photographs", "mixed")


def main(folder: Path) -> None:
    """Judge what is not judged yet, and write."""
    runs = [rl.TrainingRun.open(path) for path in sorted(folder.iterdir()) if (path / "config.json").exists()]
    table = rl.results_table(track([run.folder for run in runs], "judging", len(runs)))
    order = {recipe: i for i, recipe in enumerate([*RECIPES, "-"])}
    table = table.sort_values("seed").sort_values("recipe", key=lambda names: names.map(order), kind="stable")
    table.drop(columns="run").round(4).to_csv(HERE / "runs.csv", index=False)
    for run in track([run for run in runs if run.finished], "looking closer", None):
        recipe = recipe_of(run.config)
        name = "" if recipe is None else recipe.name
        if run.config.checkpoint_every <= FINE:
            found = rl.training_dynamics(run, judge_run(run).neurons, n_images=FOLLOWED)
            found.save(HERE / "dynamics" / f"seed_{run.config.seed}")
        if name in WITH_PREFIX and run.config.seed == 0:
            judge_run(run).save(HERE / "criteria" / name)
        if name in VARIED and run.config.seed == 0 and run.config.checkpoint_every > FINE:
            images = held_out_images(run.config, READ, part=5).images
            rl.local_information(run.vit(), images, batch_size=64).save(HERE / "local_information" / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
