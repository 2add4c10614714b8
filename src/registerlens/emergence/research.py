"""A table of many runs: what was set, what emerged, and how long it took; a recipe that fails is listed as failing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from registerlens.emergence.config import NO_SETTING, TrainingConfig, recipe_of
from registerlens.emergence.criteria import CRITERIA, EmergenceCriteria, emergence_criteria
from registerlens.emergence.run import TrainingRun, flat_settings, held_out_images, labels_of
from registerlens.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

RULES = 2
"""Raised whenever criteria, or how they are measured, change: what was judged by others is judged anew."""
JUDGED = 512
"""Held-out images for the criteria, of each half: for the selection and for the evaluation."""


_COLUMNS = (
    *("minutes", "cpu_minutes", "outliers", "onset", "neurons", "criteria", "of", "failing"),
    *("largest", "prefix_norm", "prefix_sink", *(criterion.name for criterion in CRITERIA)),
)
"""Columns of every row, NaN where a run has no such thing yet."""


def judge_run(run: TrainingRun, *, n_images: int = JUDGED, batch_size: int = 64) -> EmergenceCriteria:
    """The criteria of a run's last checkpoint, on held-out images of its task; kept in its folder, read from there.

    Args:
        run: the run.
        n_images: images of each half.
        batch_size: images at once.

    Raises:
        ConfigError: it has no checkpoint yet.
    """
    if not run.checkpoints:
        raise ConfigError(f"'{run.folder}' has no checkpoint to judge yet. Train it first.")
    folder = run.folder / "criteria" / f"step_{run.checkpoints[-1]:06d}_rules_{RULES}_images_{n_images}"
    if folder.exists():
        return EmergenceCriteria.load(folder)
    vit, batch = run.vit(), held_out_images(run.config, 2 * n_images, part=1)
    labels = labels_of(batch, vit.layout(batch.images))
    criteria = emergence_criteria(vit, batch.images, labels, batch_size=batch_size)
    criteria.save(folder)
    return criteria


def results_table(folders: Iterable[str | Path], *, n_images: int = JUDGED) -> pd.DataFrame:
    """One row a run: its recipe and what that changes of the default one, seed, whether it ended, what emerged, time.

    `largest` is the largest patch norm over the median at whatever sublayer it is largest, `prefix_norm` the largest of
    [CLS] and of trained registers in the same unit, and `prefix_sink` the attention to them all at the layer where
    that is largest: where outliers went if not to patches.

    Args:
        folders: of runs, finished or not.
        n_images: images of each half on which a run is judged that was not judged before.

    Raises:
        ConfigError: a folder holds no run.
    """
    import pandas as pd

    return pd.DataFrame([_row(TrainingRun.open(folder), n_images) for folder in folders])


def by_recipe(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Name, settings and runs of every recipe of a results table, in its order; the table may be read from a file."""
    groups: Any = table.fillna({"settings": ""}).groupby(["recipe", "settings"], sort=False)
    return [(recipe, settings, runs) for (recipe, settings), runs in groups]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row a recipe: seeds, in how many of them it emerged (outliers present), which criteria held in how many.

    Example:
        >>> import pandas as pd
        >>> row = {"recipe": "default", "settings": "", "seed": 0, "ended": "finished", "outliers": "present",
        ...        "criteria": 19, "failing": "", "minutes": 5.0}
        >>> summarise(pd.DataFrame([row, row | {"seed": 1, "criteria": 18}])).iloc[0].to_dict()
        {'recipe': 'default', 'settings': '', 'seeds': '0 1', 'emerged': '2 of 2', 'criteria': '19 18', 'minutes': 5.0}
    """
    import pandas as pd

    rows = []
    for recipe, settings, mine in by_recipe(table):
        ended = mine[mine["ended"] == "finished"]
        rows.append(
            {
                "recipe": recipe,
                "settings": settings,
                "seeds": " ".join(map(str, mine["seed"])),
                "emerged": f"{(ended['outliers'] == 'present').sum()} of {len(mine)}",
                "criteria": " ".join("-" if np.isnan(met) else f"{met:.0f}" for met in mine["criteria"]),
                "minutes": round(float(np.mean(mine["minutes"])), 1),
            }
        )
    return pd.DataFrame(rows)


def _row(run: TrainingRun, n_images: int) -> dict[str, Any]:
    ours, default = flat_settings(run.config), flat_settings(TrainingConfig())
    changed = [f"{name}={ours[name]}" for name in ours if ours[name] != default[name] and name not in NO_SETTING]
    recipe = recipe_of(run.config)
    row: dict[str, Any] = {"run": run.folder.name, "recipe": recipe.name if recipe else "-"}
    row |= {"settings": ", ".join(changed), "seed": run.config.seed, **dict.fromkeys(_COLUMNS, np.nan)}
    if not run.begun:
        return row | {"ended": "not begun"}
    step = run.checkpoints[-1] if run.checkpoints else 0
    ended = "finished" if run.finished else f"diverged at {run.diverged['step']}" if run.diverged else f"at step {step}"
    last = run.metrics().iloc[-1]
    row |= {"ended": ended, "minutes": last["seconds"] / 60, "cpu_minutes": last["cpu_seconds"] / 60}
    row |= {name: last[name] for name in last.index if name.startswith("accuracy_")}
    return row | _judged(run, n_images) if run.checkpoints else row


def _judged(run: TrainingRun, n_images: int) -> dict[str, Any]:
    """What emerged."""
    criteria = judge_run(run, n_images=n_images)
    failing = ", ".join(criterion.name for criterion in CRITERIA if not criteria.holds(criterion.name))
    return {
        "outliers": criteria.detection.evidence.verdict,
        "onset": criteria.onset,
        "neurons": len(criteria.neurons),
        "criteria": criteria.n_met,
        "of": len(CRITERIA),
        "failing": failing if criteria.n_met else "all",
        "largest": float(criteria.largest_over_median.max()),
        "prefix_norm": float(criteria.prefix_norm.max(initial=0)),
        "prefix_sink": float(criteria.prefix_sink.sum(1).max()),
        **dict(zip((criterion.name for criterion in CRITERIA), criteria.values.tolist(), strict=True)),
    }
