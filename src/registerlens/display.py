"""How results show themselves: a line in plain Python; words and a table in a notebook, all text escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from registerlens.markup import render

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

_LONGEST = 48
"""Characters of a text in a line."""
_FEW = 4
"""So many plain values of a tuple are written out."""
_PLAIN = (str, int, float, bool, type(None))


class Shown:
    """What a frozen dataclass inherits to be shown: what it is and its size in memory, instead of all its arrays.

    Example:
        >>> from dataclasses import dataclass
        >>> import numpy as np
        >>> @dataclass(frozen=True)
        ... class Norms(Shown):
        ...     model: str
        ...     values: np.ndarray
        >>> Norms("tiny", np.zeros((100, 5)))
        Norms(model='tiny'; 1 array [100, 5], 4 kB)
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = cls.__repr__  # the inherited one becomes the class's own: @dataclass leaves it in place

    def __repr__(self) -> str:
        return line(self)

    def _repr_html_(self) -> str:
        return card(self)


def drawn_by(name: str) -> Any:
    """A result's `plot`: a function of `registerlens.viz`, which is loaded when it is called.

    Example:
        >>> class Kernels:
        ...     plot = drawn_by("theory.kernel_figure")
        >>> Kernels.plot.__doc__
        'What `registerlens.viz.theory.kernel_figure` draws of the result.'
    """
    module, _, function = f"registerlens.viz.{name}".rpartition(".")

    def plot(result: Any) -> Any:
        return getattr(import_module(module), function)(result)

    plot.__doc__ = f"What `{module}.{function}` draws of the result."
    return plot


def grid_table(axes: Mapping[str, Sequence[Any] | np.ndarray], **columns: Any) -> pd.DataFrame:
    """One row a cell of a grid of these axes, the last axis fastest; columns are arrays to be broadcast over it.

    Example:
        >>> import numpy as np
        >>> grid_table({"layer": [3, 4], "head": ["a", "b"]}, share=np.array([[1.0], [2.0]])).values.tolist()
        [[3, 'a', 1.0], [3, 'b', 1.0], [4, 'a', 2.0], [4, 'b', 2.0]]
    """
    import numpy as np  # slow to import, as pandas
    import pandas as pd

    shape = [len(labels) for labels in axes.values()]
    labels = pd.MultiIndex.from_product(axes.values(), names=list(axes)).to_frame(index=False)
    return labels.assign(**{name: np.broadcast_to(values, shape).ravel() for name, values in columns.items()})


def line(value: Any) -> str:
    """A dataclass in one line: plain values that are not the default, how many of the others, arrays and their size."""
    words, arrays = [], []
    for item in fields(value):
        held = getattr(value, item.name)
        if _is_array(held):
            arrays.append(held)
        elif item.repr and not _is_default(item, held) and (text := _entry_text(item.name, held)):
            words.append(text)
    text = ", ".join(words)
    if arrays:
        largest = max(arrays, key=lambda array: math.prod(array.shape))
        number = f"{len(arrays)} arrays up to" if len(arrays) > 1 else "1 array"
        text += f"; {number} {list(largest.shape)}"
    if n_bytes := memory(value):
        text += f"{', ' if arrays else '; '}{size_text(n_bytes)}"
    return f"{type(value).__name__}({text})"


Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headers and rows."""


def card(value: Any, *more: Table) -> Markup:
    """A dataclass as HTML: what `describe` says where there is one, its fields, and more tables between."""
    describe = getattr(value, "describe", None)
    rows = [[item.name, *_held(getattr(value, item.name))] for item in fields(value)]
    return html_card(
        type(value).__name__,
        size=size_text(n_bytes) if (n_bytes := memory(value)) else "",
        words="" if describe is None else describe(),
        tables=more,
        folded=(f"{len(rows)} fields", (("field", "what", "size"), rows)),
    )


def html_card(
    title: str,
    *,
    size: str = "",
    words: str = "",
    tables: Sequence[Table] = (),
    folded: tuple[str, Table | str] | None = None,
) -> Markup:
    """A title, words and tables for a notebook; all of it is text.

    Args:
        title, size, words: plain text.
        tables: headers and rows of each.
        folded: what stands in a fold, a table or text, after its summary.

    Example:
        >>> html_card("<b>", tables=[(["a"], [["1 & 2"]])])
        Markup('<div><strong>&lt;b&gt;</strong>...<td>1 &amp; 2</td></tr></tbody></table></div>')
    """
    return render("card.html", title=title, size=size, words=words, tables=tables, folded=folded)


def memory(value: Any) -> int:
    """Bytes of the arrays, tensors and tables in a value, however deep.

    Example:
        >>> import torch
        >>> memory({"a": (torch.zeros(3), [torch.zeros(2, dtype=torch.float64)]), "b": "text"})
        28
    """
    if (n_bytes := getattr(value, "nbytes", None)) is not None:
        return int(n_bytes)
    if hasattr(value, "memory_usage"):  # a frame
        return int(value.memory_usage(deep=True).sum())
    if is_dataclass(value):
        return sum(memory(getattr(value, item.name)) for item in fields(value))
    if isinstance(value, Mapping):
        return sum(memory(held) for held in value.values())
    return sum(memory(held) for held in value) if isinstance(value, (tuple, list)) else 0


def count_text(n: float | int) -> str:
    """A count with a letter for its unit, in powers of 1000.

    Example:
        >>> count_text(24_300_000), count_text(12)
        ('24.3 M', '12 ')
    """
    power = min(4, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}"


def size_text(n_bytes: float | int) -> str:
    """Bytes in words.

    Example:
        >>> size_text(812), size_text(12_345_678), size_text(3.2e12)
        ('812 bytes', '12.3 MB', '3.2 TB')
    """
    return f"{n_bytes:.0f} bytes" if n_bytes < 1000 else f"{count_text(n_bytes)}B"


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by blanks, two blanks in front.

    Example:
        >>> print(text_table(("name", "n"), [("hook_embed", "1")]))
          name        n
          hook_embed  1
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headers, *rows)
    ]
    return "\n".join(f"  {line}" for line in lines)


def _is_array(value: Any) -> bool:
    return hasattr(value, "nbytes") and hasattr(value, "shape") and hasattr(value, "dtype")


def _is_default(item: Field[Any], value: Any) -> bool:
    return item.default is not MISSING and isinstance(value, _PLAIN) and value == item.default


def _entry_text(name: str, value: Any) -> str:
    """`name=value` of a plain value or a few of them, the number of others; empty if there is no short form."""
    if isinstance(value, _PLAIN) or (isinstance(value, tuple) and 0 < len(value) <= _FEW and _all_plain(value)):
        return f"{name}={_cut(repr(value))}"
    if isinstance(value, Sized):
        what = f"rows of {name}" if hasattr(value, "shape") else name
        return f"{len(value)} {what}" if len(value) else ""
    return ""


def _held(value: Any) -> tuple[str, str]:
    """A field's cells: what it is, and its bytes."""
    n_bytes = memory(value)
    size = size_text(n_bytes) if n_bytes else ""
    if _is_array(value):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}", size
    if len(shape := getattr(value, "shape", ())) == 2:  # a frame or a table
        return f"{type(value).__name__}, {shape[0]} rows, {shape[1]} columns", size
    if isinstance(value, (tuple, list, Mapping)) and not (len(value) <= _FEW and _all_plain(value)):
        return f"{type(value).__name__} of {len(value)}", size
    return _cut(repr(value), 200), size


def _all_plain(values: Any) -> bool:
    every = values.values() if isinstance(values, Mapping) else values
    return all(isinstance(value, _PLAIN) or (isinstance(value, tuple) and _all_plain(value)) for value in every)


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
