"""TransformerLens's ActivationCache, which says what it holds, completes names, and tells what to do about a gap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
from torch import Tensor
from transformer_lens import ActivationCache

from registerlens.display import html_card, size_text, text_table
from registerlens.errors import HookNameError, close_matches
from registerlens.model.block import require_linear_output
from registerlens.model.names import pooled

_ROWS = 60
"""Most rows of a table that is shown."""


class Cache(ActivationCache):
    """What `run_with_cache` returns: an `ActivationCache` in every respect.

    Example:
        >>> import torch, registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> _, cache = vit.run_with_cache(torch.rand(2, 3, 48, 48), names_filter="blocks.*.hook_resid_post")
        >>> cache
        ActivationCache of registerlens:tiny: 6 entries, 111 kB
          name                          shape        dtype    size
          blocks.{0..5}.hook_resid_post [2, 36, 64]  float32  6 x 18.4 kB
    """

    @property
    def nbytes(self) -> int:
        """Bytes held. Entries may be views of one tensor, which counts once."""
        return bytes_held(self.cache_dict.values())

    def to_dataframe(self) -> pd.DataFrame:
        """One row an entry, in the order in which they were reached: name, shape, dtype, bytes."""
        rows = [
            {"name": name, "shape": tuple(tensor.shape), "dtype": dtype_text(tensor), "bytes": tensor.nbytes}
            for name, tensor in self.cache_dict.items()
        ]
        return pd.DataFrame(rows, columns=["name", "shape", "dtype", "bytes"])

    def __getitem__(self, key: Any) -> Tensor:
        try:
            return super().__getitem__(key)
        except KeyError as error:
            raise HookNameError(self._lacking(str(error.args[0]))) from None

    def _ensure_head_results(self) -> bool:
        self._refuse_norms_after("The split of attention by heads")
        return super()._ensure_head_results()

    def _refuse_norms_after(self, purpose: str) -> None:
        cfg: Any = self.model.cfg  # a ViTConfig, where TransformerLens expects its own
        require_linear_output(cfg, purpose)

    def get_neuron_results(self, *args: Any, **options: Any) -> Any:
        """What each neuron of a block writes; as TransformerLens's.

        Raises:
            UnsupportedArchitectureError: a norm stands after the sublayers.
        """
        self._refuse_norms_after("The split of an MLP by neurons")
        return super().get_neuron_results(*args, **options)

    def stack_neuron_results(self, *args: Any, **options: Any) -> Any:
        """What the neurons of several blocks write; as TransformerLens's.

        Raises:
            UnsupportedArchitectureError: a norm stands after the sublayers.
        """
        self._refuse_norms_after("The split of MLPs by neurons")
        return super().stack_neuron_results(*args, **options)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> Cache:
        """A cache of some images only; as TransformerLens's."""
        part = super().apply_slice_to_batch_dim(batch_slice)
        return type(self)(part.cache_dict, part.model, has_batch_dim=part.has_batch_dim)

    def _lacking(self, name: str) -> str:
        if name in getattr(self.model, "hook_dict", ()):
            return f"The cache lacks {name!r}. Run again with it: vit.run_with_cache(images, names_filter=[{name!r}])"
        near = close_matches(name, self.cache_dict)
        return f"There is no hook point {name!r}.{near} List what the cache holds with: list(cache)"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.cache_dict)

    def __repr__(self) -> str:
        return f"{self._head()}\n{text_table(*self._table())}"

    def _repr_html_(self) -> str:
        return html_card(self._head(), tables=[self._table()])

    def _head(self) -> str:
        n = len(self.cache_dict)
        source = getattr(self.model, "source", type(self.model).__name__)
        return f"ActivationCache of {source}: {n} {'entry' if n == 1 else 'entries'}, {size_text(self.nbytes)}"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        return ("name", "shape", "dtype", "size"), shape_rows(
            {name: (tuple(tensor.shape), dtype_text(tensor), tensor.nbytes) for name, tensor in self.cache_dict.items()}
        )


def shape_rows(points: dict[str, tuple[tuple[int, ...], str, int]]) -> list[tuple[str, ...]]:
    """Rows of a table: name, shape, dtype and bytes, blocks that agree in these pooled."""
    rows = [
        (name, str(list(shape)), dtype, f"{n} x {size_text(n_bytes)}" if n > 1 else size_text(n_bytes))
        for name, n, (shape, dtype, n_bytes) in pooled(points)
    ]
    more = len(rows) - _ROWS
    return rows if more <= 0 else [*rows[:_ROWS], (f"and {more} more", "", "", "")]


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors; those that are views of one count once.

    Example:
        >>> import torch
        >>> whole = torch.zeros(4)
        >>> bytes_held([whole, whole[:2], torch.zeros(1)])
        20
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def dtype_text(tensor: Tensor) -> str:
    """The number type in a word: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
