"""Results as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.analysis.trace import Trace
    from registerlens.diagnosis.findings import Diagnosis
    from registerlens.emergence.criteria import EmergenceCriteria
    from registerlens.evaluation.effects import Evaluation
    from registerlens.sweep.result import SweepResult
    from registerlens.theory.kernels import KernelReport

LISTED = 50
"""Most neurons that are printed."""


def print_diagnosis(found: Diagnosis) -> None:
    """Each finding: the cause, why, its evidence, and what to do."""
    from registerlens.viz.tables import brief

    print_words(f"{found.model}, {found.n_images} images")
    for one in found.findings:
        print_words(f"\n{one.title}", style="bold green" if one.sound else "bold red")
        print_words(f"{one.words}\n{one.advice}")
        table = _table("", "", ("evidence", "value"), left=("evidence",))
        for name, value in one.evidence.items():
            table.add_row(name, value if isinstance(value, str) else brief(value))
        _console().print(table)


def print_trace(traced: Trace, layers: bool) -> None:
    """The verdict in words, and a table of the telling sublayers or of all."""
    from rich.console import Console

    console = Console()
    colour = "red" if traced.verdict == "present" else "blue"
    console.print(traced.describe(), style=f"bold {colour}", markup=False, highlight=False)
    frame = traced.to_dataframe()
    if not layers:
        frame = frame.iloc[_telling(traced)]
    query = "[CLS]" if traced.sink_query == "cls" else "the average query"
    caption = f"Norms are of patches in the residual stream. Sink: attention that {query} pays its favourite patch."
    headers = (
        "after",
        "largest\nnorm",
        "median\nnorm",
        "\nratio",
        "\ngap",
        "share of\noutliers",
        "sink,\ntop head",
        "sink,\nmean",
        "sink is\noutlier",
    )
    title = f"{traced.model}, {traced.n_images} images"
    table = _table(title, caption, headers, left=("after",), no_wrap=True, vertical="bottom")
    for row in frame.to_dict("records"):
        attention = row["after"] == "attn"
        marked = row["verdict"] == "present"
        sinks = [f"{row['sink_largest_head']:.3f}", f"{row['sink_mean_head']:.3f}"] if attention else ["", ""]
        follows = f"{row['sink_is_outlier']:.0%}" if attention and traced.verdict == "present" else ""
        table.add_row(
            row["sublayer"],
            f"{row['largest_norm']:.2f}",
            f"{row['median_norm']:.2f}",
            f"{row['largest_over_median']:.2f}",
            f"{row['gap']:.2f}",
            f"{row['share_of_patches']:.1%}" if marked else "-",
            *sinks,
            follows,
            style="bold" if row["sublayer"] == traced.onset else "",
        )
    console.print(table)


def _telling(traced: Trace) -> list[int]:
    """Sublayers around the onset, and the last block; without an onset, the first, the strongest and the last."""
    last = len(traced.sublayers) - 1
    centre = traced.sublayers.index(traced.onset if traced.onset is not None else traced.strongest)
    chosen = {0, centre - 1, centre, centre + 1, centre + 2, last - 1, last}
    return sorted(i for i in chosen if 0 <= i <= last)


def print_neurons(neurons: RegisterNeurons) -> None:
    """How they were found in words, the estimates of top_k, and a table with every score."""
    from registerlens.viz.tables import brief, neuron_table

    search = neurons.search
    if search is not None:
        print_words(search.describe(), style="bold")
        elbow = "none" if search.elbow is None else str(search.elbow)
        sweep = search.sweep_note if search.sweep is None else f"{search.sweep} ({search.sweep_note})"
        print_words(f"Estimates of top_k: elbow {elbow}; sweep {sweep}; taken {search.top_k}.")
    frame = neuron_table(neurons)
    scores = [name for name in frame.columns if name not in ("layer", "neuron")]
    headers = ("rank", "neuron", *(name.replace("_", " ") for name in scores))
    table = _table(f"{len(neurons)} register neurons, best first", "", headers, no_wrap=True)
    for rank, row in enumerate(frame.head(LISTED).to_dict("records"), start=1):
        cells = (brief(row[name]) for name in scores)
        table.add_row(str(rank), f"{row['layer']:.0f}:{row['neuron']:.0f}", *cells)
    _console().print(table)
    if len(neurons) > LISTED:
        print_words(f"... and {len(neurons) - LISTED} more.")


def print_kernels(report: KernelReport) -> None:
    """What the conditions amount to, a table of them with numbers, nulls and verdicts, and what could not be asked."""
    from rich.text import Text

    from registerlens.viz.tables import KERNEL_NOTE, kernel_table

    print_words(report.conclusion(), style="bold")
    images = f"{report.n_images} images" if report.n_images else "weights only"
    headers = ("condition", "number", "random\ndirections", "other\nneurons", "verdict")
    title = f"{report.model}, {len(report.neurons)} neurons, {images}"
    table = _table(title, KERNEL_NOTE, headers, left=headers)
    colours = {"holds": "green", "holds approximately": "yellow", "fails": "red"}
    for row in kernel_table(report).to_dict("records"):
        number = f"{row['number']}\n{row['unit']}"
        nulls = (row[null].replace(" (", "\n(") for null in ("random", "neurons"))
        verdict = Text(row["verdict"], style=colours[row["verdict"]])
        table.add_row(*map(Text, (row["condition"], number, *nulls)), verdict)
    _console().print(table)
    for name, reason in report.not_applicable.items():
        print_words(f"Not applicable, {name}: {reason}.")
    for note in report.notes:
        print_words(f"Note: {note}")


def print_evaluation(done: Evaluation, samples: str) -> None:
    """The verdicts in words, and a table of means with 95% intervals, controls included."""
    from rich.text import Text

    from registerlens.evaluation.controls import ConditionKind
    from registerlens.viz.tables import COLUMNS, evaluation_table

    for name, verdict in done.verdicts.items():
        print_words(f"{name}: {verdict.words}", style="bold green" if verdict.worked else "bold yellow")
    if samples:
        print_words(samples)
    metrics, rows = evaluation_table(done)
    n, place = done.n_images, done.detection.sublayer
    caption = (
        "Below the means: 95% intervals, from 8 images on. * in units of the clean median patch norm. Attention: "
        "mean of heads, in the blocks after the onset. Cosines, KL: to the clean run."
    )
    title = f"{done.model}, {n} images, outliers above {done.detection.cutoff} at {place}"
    headers = ("condition", *(fill(COLUMNS[metric], 12) for metric in metrics))
    table = _table(title, caption, headers, left=("condition",))
    table.columns[0].min_width = 10
    for (name, cells), kind in zip(rows, done.kinds, strict=True):
        texts = (f"{cell}\n{cell.interval}" if cell else "-" for cell in map(cells.get, metrics))
        table.add_row(Text(name), *texts, style="bold" if kind is ConditionKind.TESTED else "")
    _console().print(table)


def print_sweep(result: SweepResult, n: int = 5) -> None:
    """For each metric the conditions that do most, with intervals and corrected p-values; skipped images."""
    from rich.text import Text

    from registerlens.evaluation.controls import ConditionKind
    from registerlens.viz.tables import brief

    frame: Any = result.to_dataframe()
    n_tested = sum(condition.kind is ConditionKind.TESTED for condition in result.conditions)
    caption = (
        "Differences to the clean run, and to the mean of matched random controls, paired by image; 95% intervals, "
        f"from 8 images on. p: sign-flip permutation test, Holm-corrected over the {n_tested} tested conditions."
    )
    headers = ("metric", "condition", "mean", "difference", "p (Holm)", "vs controls", "p (Holm)")
    title = f"Largest effects of {n_tested} conditions on {result.n_images} images"
    table = _table(title, caption, headers, left=headers[:2])
    shared = {condition.model for condition in result.conditions}, {condition.images for condition in result.conditions}
    for metric in result.metrics:
        tested = frame[(frame["metric"] == metric) & (frame["kind"] == ConditionKind.TESTED)]
        by = "difference" if tested["difference"].notna().any() else "mean"
        order = tested[by].abs().sort_values(ascending=False, kind="stable").index[:n]
        for place, row in enumerate(tested.loc[order].to_dict("records")):
            where = [row[name] for name, names in zip(("model", "images"), shared, strict=True) if len(names) > 1]
            cells = [
                brief(row["mean"]),
                _with_interval(row, "difference"),
                brief(row["p_holm"]),
                _with_interval(row, "vs_controls"),
                brief(row["p_controls_holm"]),
            ]
            name = " ".join([row["label"], *(f"({place})" for place in where)])
            table.add_row(Text("" if place else metric), Text(name), *cells)
    _console().print(table)
    for skipped in result.skipped:
        print_words(f"Skipped {skipped}", style="yellow")


def _with_interval(row: dict[str, Any], name: str) -> str:
    from registerlens.viz.tables import brief

    if row[name] != row[name]:
        return "-"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return brief(row[name]) + ("" if math.isnan(low) else f"\n{brief(low)} to {brief(high)}")


def print_criteria(criteria: EmergenceCriteria) -> None:
    """The criteria of emergence in words and as a table."""
    print_words(criteria.describe(), style="bold")
    table = _table("", "", ("criterion", "value", "threshold", "holds"), left=("criterion",))
    for row in criteria.to_dataframe().to_dict("records"):
        value = "-" if row["value"] != row["value"] else f"{row['value']:.3f}"
        table.add_row(row["criterion"], value, row["threshold"], "[green]yes" if row["holds"] else "[red]no")
    _console().print(table)


def print_runs(table: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Training runs, and below them their recipes."""
    from rich.text import Text

    columns = ["run", "recipe", "seed", "ended", "outliers", "onset", "neurons", "criteria", "failing", "minutes"]
    for title, frame in (("Runs", table.reindex(columns=columns)), ("Recipes", summary)):
        grid = _table(title, "", frame.columns, left=frame.columns)
        for cells in frame.itertuples(index=False):
            grid.add_row(*(Text(_cell(value)) for value in cells))
        _console().print(grid)


def _cell(value: Any) -> str:
    """One decimal, whole numbers as they are, and a dash for what is not there."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def print_words(text: str, style: str = "") -> None:
    """Text as it is: no markup, no highlighting."""
    _console().print(text, style=style, markup=False, highlight=False)


def _console() -> Any:
    """A terminal as wide as it is; anything else is taken to be wide enough for the tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def _table(title: str, caption: str, headers: Iterable[str], *, left: Collection[str] = (), **look: Any) -> Any:
    """An empty table; columns of numbers, which are all but those on the `left`, are flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=Text(title) if title else None,
        caption=caption or None,
    )
    for header in headers:
        table.add_column(header, justify="left" if header in left else "right", **look)
    return table
