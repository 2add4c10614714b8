"""`python tutorials/research/collect.py RUNS_DIR`: what tutorial 11 shows of the research, taken from training runs.

Every folder in RUNS_DIR is a run of `registerlens emerge`. Written beside this file: runs.csv, one row a run; what came
first in runs whose checkpoints lie close enough together (`checkpoint_every: 20`); for seed 0 of some recipes, where
attention goes, and whether outliers have lost what their patches showed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import registerlens as rl
from registerlens.emergence.config import RECIPES, recipe_of
from registerlens.emergence.research import judge_run
from registerlens.emergence.run import held_out_images
from registerlens.progress import track

HERE = Path(__file__).parent
FINE = 20
"""Steps between checkpoints that are fine enough for the order of the signs."""
FOLLOWED = 32
"""Images that dynamics are followed on: some hundred kilobytes a run."""
READING = 5
"""Part of the held-out images that pixels are read on; see `held_out_images`."""
READ = 3072
"""Images that pixels are read on: some 30 outliers for each dimension of the stream."""
WITH_PREFIX = ("cls", "registers")
VARIED = ("default", "gradients", "soft-noise", "photographs", "mixed")


def main(folder: Path) -> None:
    """Judge what is not judged yet, and write; the same run with closer checkpoints counts once."""
    paths = [path for path in sorted(folder.iterdir()) if (path / "config.json").exists()]
    order = {recipe: i for i, recipe in enumerate([*RECIPES, "-"])}
    table = rl.emergence.results_table(track(paths, "judging", len(paths)))
    table = table.sort_values("seed").sort_values("recipe", key=lambda names: names.map(order), kind="stable")
    table = table.drop(columns="run").drop_duplicates(["recipe", "settings", "seed"])
    table.round(4).to_csv(HERE / "runs.csv", index=False)
    runs = [run for run in map(rl.emergence.TrainingRun.open, paths) if run.finished]
    for run in track(runs, "looking closer", len(runs)):
        recipe, found = recipe_of(run.config), judge_run(run)
        name = "" if recipe is None else recipe.name
        if run.config.checkpoint_every <= FINE and len(found.neurons):
            followed = rl.emergence.training_dynamics(run, found.neurons, n_images=FOLLOWED)
            followed.save(HERE / "dynamics" / f"{name}_seed_{run.config.seed}")
        elif name in WITH_PREFIX and run.config.seed == 0:
            found.save(HERE / "criteria" / name)
        elif name in VARIED and run.config.seed == 0 and len(found.neurons):
            images = held_out_images(run.config, READ, part=READING).images
            rl.analysis.local_information(run.vit(), images, batch_size=64).save(HERE / "local_information" / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
