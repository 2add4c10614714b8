"""Tables of pages, commands and notebooks: neurons with their scores, conditions with metrics or verdicts."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.sink_events import PLACES
from registerlens.analysis.sink_kinds import SinkKinds
from registerlens.errors import ConfigError
from registerlens.evaluation.effects import Evaluation
from registerlens.markup import asset
from registerlens.theory.kernels import KernelReport
from registerlens.theory.readers import KERNELS
from registerlens.theory.value_update import ValueUpdate
from registerlens.theory.verdicts import main_rows, select, title

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

SCORE_WORDS = {
    "mean": "mean activation at outliers",
    "mean_abs": "mean absolute activation there",
    "contrast": "contrast with normal patches, in standard deviations",
    "auc": "probability of being higher at an outlier than at a normal patch",
}
"""What each score is."""

COLUMNS = {
    "outliers": "outliers per image",
    "new_outliers": "of these, at new places",
    "largest_norm": "largest patch norm *",
    "register_norm": "norm of register *",
    "sink_patch": "attention to a patch",
    "sink_register": "attention to register or bias",
    "cos_cls": "cosine of [CLS] to clean",
    "cos_normal": "cosine of normal patches",
    "kl": "KL from clean, nats, all predictions",
    "accuracy": "accuracy",
}
"""Metrics that tables show, in this order, with their headings."""
COLUMN_NOTE = (
    "* in units of the clean image's median patch norm. Attention: the largest to one patch, or all to registers and "
    "bias; mean over heads and the blocks after the onset. Cosines: of the final tokens to those of the clean run. "
    "KL: mean over all predictions of an image, those of outlier and unlabelled patches among them."
)

KERNEL_UNITS = dict.fromkeys(KERNELS, "relative residual") | {
    "key": "nats over an ordinary key",
    "dominance": "x the largest other row",
    "concentration": "share in 3 dimensions",
    "alignment": "cosine",
    "agreement": "cosine",
}
"""In what each kernel condition is measured."""
KERNEL_NOTE = (
    "Numbers, nulls and one-sided p-values are medians over neurons and later blocks; as a key, the weakest block's "
    "best head counts. Relative residual: ||M'u|| / (sigma_max ||u||), 0 in an exact kernel; beside it, how strongly u "
    "is read as a multiple of a random direction."
)

# Nothing has a colour of its own, so that a notebook's theme decides; lines are the text's colour, thinned.
_LOOK: Any = json.loads(asset("page/tables.json"))


def neuron_table(neurons: RegisterNeurons) -> pd.DataFrame:
    """One row a register neuron: layer, neuron, and all four scores where a search found them, else the one known.

    Example:
        >>> neuron_table(RegisterNeurons.from_pairs([(5, 599), (6, 980)])).columns.tolist()
        ['layer', 'neuron']
    """
    frame = neurons.to_dataframe().drop(columns="rank")
    if neurons.search is None:
        return frame.dropna(axis="columns", how="all")
    scores = neurons.search.to_dataframe().query("chosen").drop(columns=["chosen", "round"])
    return frame.drop(columns="score").merge(scores, on=["layer", "neuron"], how="left")


def kernel_table(report: KernelReport) -> pd.DataFrame:
    """One row a kernel condition: in words, its unit, its number, both nulls with p-values, the verdict, as text.

    Example:
        >>> import registerlens as rl
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> frame = kernel_table(rl.check_kernels(vit, neurons))
        >>> frame.loc[4, ["condition", "unit", "verdict"]].tolist()
        ['u1 (what the neurons read) in the kernel of later MLPs (W_in), blocks 2 to 5', 'relative residual', 'fails']
    """
    main, rows = main_rows(report.table), []
    for finding in report.findings:
        mine = select(main, condition=finding.condition, vector=finding.vector)
        number = brief(finding.value)
        if finding.condition in KERNELS:
            number += f" ({brief(finding.effect)} x random)"
        row = {
            "condition": title(finding.condition, finding.vector, mine),
            "unit": KERNEL_UNITS[finding.condition],
            "number": number,
        }
        for null, p in (("random", finding.random_p), ("neurons", finding.neurons_p)):
            median = float(np.median(mine[null].to_numpy()))
            row[null] = "-" if np.isnan(median) else f"{brief(median)} (p = {p:.2g})"
        rows.append(row | {"verdict": finding.verdict})
    return pd.DataFrame(rows)


def sink_table(*sweeps: SinkKinds) -> pd.DataFrame:
    """One row a share of the queries and a threshold: how many sinks, of which kind, what they write, where, as text.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(8, 0).images
        >>> frame = sink_table(rl.analysis.classify_sinks(vit, images, queries=0.5))
        >>> frame.loc[1, ["of the queries", "pay at least", "broadcast"]].tolist()
        ['50%', '0.3', '0%']
    """
    rows = []
    for sinks, threshold in ((sweep, threshold) for sweep in sweeps for threshold in sweep.thresholds):
        counts, places = sinks.counts(threshold), sinks.places[:, sinks.index(threshold)].sum((1, 2))
        total = sum(counts.values())
        stand = (f"{name.replace('_', ' ')} {n / total:.0%}" for name, n in zip(PLACES, places, strict=True) if n)
        row = {
            "of the queries": f"{sinks.queries:.0%}",
            "pay at least": f"{threshold:g}",
            "sinks, of images and heads": f"{total / (sinks.n_images * sinks.gu_rate.size):.1%}",
            **{name: f"{n / total:.0%}" if total else "-" for name, n in counts.items()},
            "writes, x the others": f"{sinks.mean('output_ratio', threshold):.2f}" if total else "-",
            "stable rank": f"{sinks.mean('stable_rank', threshold):.2f}" if total else "-",
            "at": ", ".join(stand) or "-",
        }
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Cell:
    """A mean over images with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return _number(self.mean)

    @property
    def interval(self) -> str:
        """Low to high, as text; empty where they print the same."""
        low, high = _number(self.low), _number(self.high)
        return "" if low == high else f"{low} to {high}"


def evaluation_table(evaluation: Evaluation) -> tuple[list[str], list[tuple[str, dict[str, Cell]]]]:
    """The metrics of COLUMNS that the model has, and for each condition its cells.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> images = synthetic_images(16, 0).images
        >>> done = rl.evaluate_intervention(vit, images, rl.Ablate(neurons), controls=False)
        >>> metrics, rows = evaluation_table(done)
        >>> rows[0][0], str(rows[0][1]["new_outliers"])
        ('clean', '0')
    """
    frame = evaluation.to_dataframe()
    metrics = [metric for metric in COLUMNS if metric in set(frame["metric"])]
    cells: dict[str, dict[str, Cell]] = {condition: {} for condition in evaluation.conditions}
    for row in frame.to_dict("records"):
        cells[row["condition"]][row["metric"]] = Cell(row["mean"], row["low"], row["high"])
    return metrics, list(cells.items())


def value_update_table(update: ValueUpdate) -> pd.DataFrame:
    """One row a condition: cosines to the reference and the registers' shares, as numbers (table 8).

    Example:
        >>> import torch, registerlens as rl
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> found = rl.theory.value_update(vit, torch.rand(2, 3, 48, 48), neurons, registers=[1, 2])
        >>> value_update_table(found)["cosine of their update"].round(3).tolist()[0]
        1.0
    """
    names = {
        "condition": "condition",
        "reference": "compared with",
        "cosine": "cosine of their update",
        "rest_cosine": "cosine of the rest",
        "output_cosine": "cosine of the attention output",
        "share": "share of the update",
        "attention": "attention to them",
    }
    frame: Any = update.to_dataframe()[list(names)]
    return frame.rename(columns=names)


def brief(value: float) -> str:
    """Three significant digits, or a whole number.

    Example:
        >>> brief(0.12345), brief(16312.0), brief(float("nan"))
        ('0.123', '16312', '-')
    """
    if np.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


@singledispatch
def styled(result: Any, caption: str = "") -> Styler:
    """A table to look at in a notebook, light or dark: a result, or any dataframe, with a caption.

    Args:
        result: `RegisterNeurons`, `KernelReport`, `Evaluation`, `ValueUpdate` (table 8), or a dataframe, such as one of
            benchmark numbers of your own.
        caption: above the table; results have one of their own.

    Raises:
        ConfigError: the result is of another kind.

    Example:
        >>> neurons = RegisterNeurons.from_pairs([(5, 599), (6, 980)])
        >>> "<caption>" in styled(neurons).to_html()
        True
    """
    known = [kind.__name__ for kind in styled.registry if kind is not object]
    raise ConfigError(
        f"There is no table of {type(result).__name__}; there is one of {known}. "
        f"Most results have to_dataframe(): pass styled(result.to_dataframe())."
    )


@styled.register(pd.DataFrame)
def _(result: pd.DataFrame, caption: str = "") -> Styler:
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in result.dtypes]
    sides = [(i, "right" if number else "left") for i, number in enumerate(numeric)]
    styler: Any = result.style.hide(axis="index").format(precision=3, escape="html", na_rep="-")
    numbers = {name: _digits(result[name]) for name in result.columns if pd.api.types.is_float_dtype(result[name])}
    styler = styler.format(numbers, escape="html").format_index(escape="html", axis=1)
    look = [*_LOOK, *({"selector": f"td.col{i}, th.col{i}", "props": f"text-align: {side}"} for i, side in sides)]
    styler = styler.set_table_styles(look)
    return styler.set_caption(html.escape(caption)) if caption else styler


@styled.register(RegisterNeurons)
def _(result: RegisterNeurons, caption: str = "") -> Styler:
    return styled(neuron_table(result), caption or f"{len(result)} register neurons ({result.source})")


@styled.register(KernelReport)
def _(result: KernelReport, caption: str = "") -> Styler:
    return styled(kernel_table(result), caption or f"Conditions of Proposition 1 in {result.model}. {KERNEL_NOTE}")


@styled.register(ValueUpdate)
def _(result: ValueUpdate, caption: str = "") -> Styler:
    about = f"What registers write in block {result.layer} of {result.model}, {result.n_images} images."
    return styled(value_update_table(result), caption or about)


@styled.register(Evaluation)
def _(result: Evaluation, caption: str = "") -> Styler:
    metrics, rows = evaluation_table(result)
    frame = pd.DataFrame(
        [
            {"condition": name}
            | {COLUMNS[metric]: _with_interval(cells[metric]) if metric in cells else "-" for metric in metrics}
            for name, cells in rows
        ]
    )
    about = f"{result.model}, {result.n_images} images: mean and 95% interval. {COLUMN_NOTE}"
    return styled(frame, caption or about)


def _digits(column: Any) -> Callable[[float], str]:
    """Shares and cosines with three decimals, so that they can be compared; other numbers with three digits."""
    return (lambda value: f"{value:.3f}") if column.abs().max() <= 1 else brief


def _with_interval(cell: Cell) -> str:
    return f"{cell} ({cell.interval})" if cell.interval else str(cell)
