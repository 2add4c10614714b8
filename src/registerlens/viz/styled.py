"""Results as tables to look at in a notebook, light or dark."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import pandas as pd

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.errors import ConfigError
from registerlens.evaluation.effects import Evaluation
from registerlens.theory.kernels import KernelReport
from registerlens.theory.value_update import ValueUpdate
from registerlens.viz.tables import (
    COLUMN_NOTE,
    COLUMNS,
    KERNEL_NOTE,
    Cell,
    brief,
    evaluation_table,
    kernel_table,
    neuron_table,
    value_update_table,
)

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


# Nothing has a colour of its own, so that a notebook's theme decides; lines are the text's colour, thinned.
_LOOK: Any = [
    {
        "selector": "caption",
        "props": "caption-side: top; text-align: left; font-weight: 600; padding: 0.4em 0; max-width: 60em",
    },
    {"selector": "", "props": "border-collapse: collapse; font-variant-numeric: tabular-nums; background: transparent"},
    {"selector": "th", "props": "text-align: left; vertical-align: bottom; padding: 0.3em 0.8em; max-width: 12em"},
    {"selector": "td", "props": "text-align: right; vertical-align: top; padding: 0.3em 0.8em"},
    {"selector": "thead th", "props": "border-bottom: 1.5px solid currentColor; background: transparent"},
    {
        "selector": "tbody tr",
        "props": "background: transparent !important; border-bottom: 1px solid rgba(127,127,127,0.35)",
    },
]


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
    told = f"What registers write in block {result.layer} of {result.model}, {result.n_images} images."
    return styled(value_update_table(result), caption or told)


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
    told = f"{result.model}, {result.n_images} images: mean and 95% interval. {COLUMN_NOTE}"
    return styled(frame, caption or told)


def _digits(column: Any) -> Callable[[float], str]:
    """Shares and cosines with three decimals, so that they can be compared; other numbers with three digits."""
    return (lambda value: f"{value:.3f}") if column.abs().max() <= 1 else brief


def _with_interval(cell: Cell) -> str:
    return f"{cell} ({cell.interval})" if cell.interval else str(cell)
