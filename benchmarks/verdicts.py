"""How often the verdict on outliers is right: false alarms and power over named families of norms, for this rule.

The families are made of patch norms directly: no model runs. `python -m benchmarks.verdicts` prints the table and
writes it as JSON; the page docs/concepts/verdict.md shows it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT
from registerlens.analysis import outliers as rule
from registerlens.analysis.outliers import OutlierEvidence, judge
from registerlens.files import write_json
from registerlens.stats.histograms import LOG_HIGH, LOG_LOW, N_BINS

Norms = np.ndarray
Pair = tuple[Norms, Norms]
"""Norms [image, patch] at a place, and at the embedding."""
Draw = Callable[[np.random.Generator, int, int], Pair]

IMAGES, PATCHES = (1, 4, 16, 64), (36, 196, 1369)
ANSWERS = ("present", "too few images")
SURPRISES = (2.0, 5.0, 8.0, 12.0, 20.0, 40.0)
"""Values of the rule's constant MIN_SURPRISE along the ROC."""
BODIES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Norms]] = {
    **{f"lognormal {s}": lambda rng, size, s=s: np.exp(s * rng.standard_normal(size)) for s in (0.09, 0.2, 0.3, 0.5)},
    **{f"log-t4 {s}": lambda rng, size, s=s: np.exp(s * rng.standard_t(4, size)) for s in (0.1, 0.2, 0.3)},
    **{f"Pareto {a:g}": lambda rng, size, a=a: 1 + rng.pareto(a, size) for a in (1.0, 1.5, 2.0, 3.0)},
    "exponential": lambda rng, size: 0.05 + rng.exponential(1, size),
    **{f"gamma {k}": lambda rng, size, k=k: rng.gamma(k, 1, size) for k in (1.5, 3, 10)},
}
"""Norms of one mode."""


def one_mode(body: str) -> Draw:
    """Norms of one mode over a narrow embedding, so that nothing but their shape speaks against outliers."""
    return lambda rng, n, patches: (BODIES[body](rng, (n, patches)), _narrow(rng, n, patches))


def foreground(*, at_embedding: bool) -> Draw:
    """10 to 30% of the patches have 2.5 to 3.5 times the norm of the others: content."""

    def draw(rng: np.random.Generator, n: int, patches: int) -> Pair:
        share = rng.uniform(0.1, 0.3) * rng.uniform(0.6, 1.4, (n, 1))
        size = np.where(rng.random((n, patches)) < share.clip(0.1), rng.uniform(2.5, 3.5), 1.0)
        return size * _narrow(rng, n, patches), (size if at_embedding else 1.0) * _narrow(rng, n, patches)

    return draw


def odd_image(rng: np.random.Generator, n: int, patches: int) -> Pair:
    """In one image of several, some patches have 3 to 20 times the norm of the others."""
    norms, k = _narrow(rng, n, patches), rng.integers(1, patches // 8)
    norms[0, rng.permutation(patches)[:k]] = rng.uniform(3, 20) * np.exp(0.15 * rng.standard_normal(k))
    return norms, _narrow(rng, n, patches)


def outliers(ratio: float, per_image: float, images: float, body: str) -> Draw:
    """So many outliers an image on average, in a share of the images, of `ratio` times the median norm of a body."""

    def draw(rng: np.random.Generator, n: int, patches: int) -> Pair:
        norms = BODIES[body](rng, (n, patches))
        norms /= np.median(norms, axis=1, keepdims=True)
        has = rng.random(n) < images
        has[rng.integers(n)] = True
        for i in has.nonzero()[0]:
            k = np.clip(rng.poisson(per_image / images), 1, patches // 4)
            norms[i, rng.permutation(patches)[:k]] = ratio * np.exp(0.15 * rng.standard_normal(k))
        return norms, BODIES[body](rng, (n, patches))

    return draw


def _narrow(rng: np.random.Generator, n: int, patches: int) -> Norms:
    return np.exp(0.12 * rng.standard_normal((n, patches)))


NEGATIVES: dict[str, Draw] = {
    **{f"one mode: {body}": one_mode(body) for body in BODIES},
    "foreground in the embedding too": foreground(at_embedding=True),
    "foreground that comes later": foreground(at_embedding=False),
    "one odd image of several": odd_image,
}
"""Norms in which nothing may be called present."""
SPREADS = ((0.1, 0.1), (1, 0.1), (1, 1), (3, 1), (10, 0.5))
"""Outliers an image on average, and the share of images that have any."""
POSITIVES: dict[str, list[Draw]] = {
    f"outliers at {ratio:g} x": [
        outliers(ratio, per_image, images, body)
        for per_image, images in SPREADS
        for body in ("lognormal 0.09", "lognormal 0.2")
    ]
    for ratio in (2.2, 2.6, 3, 4, 8, 20)
}


def judged(norms: Norms, embedding: Norms) -> OutlierEvidence:
    """The verdict at a place of which only the embedding is known beside."""
    relative, before = (each / np.median(each, axis=1, keepdims=True) for each in (norms, embedding))
    largest = relative.max(1)
    return judge(_histogram(relative), _histogram(largest), float(largest.mean()), earlier=[_histogram(before)])


def _histogram(ratios: Norms) -> np.ndarray:
    inside = np.log(ratios).clip(LOG_LOW + 1e-9, LOG_HIGH - 1e-9)
    return np.histogram(inside, bins=N_BINS, range=(LOG_LOW, LOG_HIGH))[0]


def answers(seeds: int, images: tuple[int, ...] = IMAGES, patches: tuple[int, ...] = PATCHES) -> pd.DataFrame:
    """One row a data set: family, whether it has outliers, images, patches, and the verdict."""
    return pd.DataFrame(_rows(seeds, images, patches))


def _rows(seeds: int, images: tuple[int, ...], patches: tuple[int, ...]) -> Iterator[dict[str, object]]:
    families = {name: [draw] for name, draw in NEGATIVES.items()} | POSITIVES
    for (name, draws), n, size in itertools.product(families.items(), images, patches):
        if name == "one odd image of several" and n == 1:
            continue
        for seed in range(seeds):
            rng = np.random.default_rng([seed, n, size])
            verdict = judged(*draws[seed % len(draws)](rng, n, size)).verdict
            yield {"family": name, "outliers": name in POSITIVES, "images": n, "patches": size, "verdict": verdict}


def rates(found: pd.DataFrame) -> pd.DataFrame:
    """Shares of "present" and "too few images" by family and number of images."""
    grouped = found.groupby(["family", "outliers", "images"], sort=False)["verdict"]
    shares = {name: grouped.agg(lambda verdicts, name=name: (verdicts == name).mean()) for name in ANSWERS}
    return pd.DataFrame(shares).reset_index()


def curve(seeds: int, images: tuple[int, ...] = IMAGES, patches: tuple[int, ...] = PATCHES) -> pd.DataFrame:
    """False alarms and power, over all families, as the surprise that is asked for changes: the ROC."""
    rows = []
    for least in SURPRISES:
        with patch.object(rule, "MIN_SURPRISE", least):
            found = answers(seeds, images, patches)
        present = (found["verdict"] == "present").groupby(found["outliers"]).mean()
        rows.append({"MIN_SURPRISE": least, "false alarms": present[False], "power": present[True]})
    return pd.DataFrame(rows)


def main() -> None:
    """Print and write everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="data sets a family and size (default: 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for verdicts.json")
    options = parser.parse_args()
    found, roc = rates(answers(options.seeds)), curve(max(options.seeds // 4, 1))
    table = Table(title=f"present / too few images, {options.seeds} data sets of each of {len(PATCHES)} sizes")
    for column in ("family", *(f"{n} images" for n in IMAGES)):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family, rows in found.groupby("family", sort=False):
        cells = {
            row["images"]: f"{row['present']:.3f} / {row['too few images']:.2f}" for row in rows.to_dict("records")
        }
        table.add_row(str(family), *(cells.get(n, "") for n in IMAGES))
    console = Console(width=120)
    console.print(table)
    console.print(roc.round(4).to_string(index=False))
    write_json(
        options.out / "verdicts.json",
        {"seeds": options.seeds, "rates": found.to_dict("records"), "roc": roc.to_dict("records")},
    )


if __name__ == "__main__":
    main()
