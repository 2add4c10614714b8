"""Attention heads side by side through CircuitsVis, offline: tokens named by their place, few enough to be read."""

import base64
import gzip
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, UInt8
from markupsafe import Markup
from torch import Tensor
from transformer_lens import ActivationCache

from registerlens.config import TokenLayout, ViTConfig
from registerlens.data.images import to_display
from registerlens.errors import HookNameError, MissingExtraError, ShapeError
from registerlens.explorer.tokens import TokenName, token_index, token_names
from registerlens.markup import asset, policy, render, write_html
from registerlens.pictures import data_uri
from registerlens.viz.theme import BLUE, ink, paper

MOST_BYTES = 3_000_000
"""No view is larger."""

_PER_VALUE = 8
"""Bytes of a number as JSON, its comma included, at most."""
_MOST_REGISTERS = 16
"""More tokens than the grid explains are test-time registers only up to here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionView:
    """Attention heads as CircuitsVis draws them; shows itself in a notebook, without asking the network for anything.

    Rows are queries ("destination" in CircuitsVis), columns are keys ("source").
    """

    attention: Float[np.ndarray, "head query key"]
    """What is drawn, 0 to 1: the chosen tokens, and all other patches as one (queries averaged, keys summed)."""
    tokens: tuple[str, ...]
    """Names of the rows and columns."""
    heads: tuple[str, ...]
    """Names of the heads: "mean", or layer.head."""
    highest: float
    """What the darkest colour stands for: the most that a single token draws; what is pooled may be more."""
    caption: str
    """What was chosen."""
    thumbnails: tuple[str, ...] = field(default=(), repr=False)
    """A picture of each token as a data: address; empty for those that are no single patch, or without images."""
    script: bool = True
    """Whether the view brings CircuitsVis's script (0.5 MB, compressed); one view on a page is enough."""

    def html(self) -> Markup:
        """A piece of HTML with everything in it."""
        data = {
            "attention": np.round(self.attention.astype(float), 5).tolist(),
            "attentionHeadNames": self.heads,
            "tokens": self.tokens,
            "maxValue": round(self.highest, 5),
            "minValue": 0,
            "maskUpperTri": False,  # CircuitsVis takes attention for causal unless it is told
            "positiveColor": BLUE,
        }
        return render(
            "heads.html",
            own=f"registerlens-heads-{uuid.uuid4().hex[:12]}",
            paper=paper(),
            ink=ink(),
            caption=self.caption,
            pictures=[(name, source) for name, source in zip(self.tokens, self.thumbnails, strict=False) if source],
            data=data,
            library=_library() if self.script else None,
            script=asset("heads/heads.js"),
        )

    def save(self, path: str | Path) -> Path:
        """Write a page that needs no other file, whole or not at all; returns the path."""
        allowed = policy([asset("heads/heads.js"), _library_text()])
        about = {"title": "Attention heads", "policy": allowed, "body": self.html()}
        return write_html(path, render("plain.html", **about))

    def _repr_html_(self) -> str:
        return self.html()


def attention_heads(
    cache: ActivationCache | Mapping[str, Tensor] | Float[Tensor, "*batch head query key"],
    layer: int,
    *,
    query: TokenName | Sequence[TokenName] | None = None,
    heads: Sequence[int] | None = None,
    image: int = 0,
    images: Float[Tensor, "image channel height width"] | None = None,
    layout: TokenLayout | None = None,
    tokens: int = 24,
    script: bool = True,
) -> AttentionView:
    """The heads of a block side by side, with CircuitsVis.

    A ViT has too many tokens to be drawn one by one. All tokens that are no patches are kept, the queries asked for,
    and the patches that draw most attention; the others are pooled into one, so that rows still sum to 1.

    Args:
        cache: from `vit.run_with_cache`, with `blocks.L.attn.hook_pattern`; or such a pattern.
        layer: the block.
        query: a patch as (row, column) or index, or a token by name ("cls"), or a list of these: the patches that
            they look at most are chosen. Default: those that all queries look at most.
        heads: which; default: all, after their mean.
        image: which of the batch.
        images: the batch that was cached, for thumbnails, and for the grid where it is not the native one.
        layout: of the tokens, where the cache does not know its model.
        tokens: patches shown one by one, at most.
        script: False where another view on the page brings CircuitsVis's script.

    Raises:
        HookNameError: the cache lacks the pattern.
        ShapeError: there is no such layer, head, image or query, more queries are asked for than `MOST_BYTES` hold, or
            the pattern does not fit the layout.
        MissingExtraError: circuitsvis is not installed.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
        >>> _, cache = vit.run_with_cache(images, names_filter="blocks.3.attn.hook_pattern")
        >>> view = attention_heads(cache, 3, query=(2, 4), tokens=4, images=images)
        >>> len(view.tokens), view.tokens[-1], view.heads
        (5, 'others(32)', ('3.0',))
    """
    if find_spec("circuitsvis") is None:
        raise MissingExtraError("circuitsvis", "notebooks", "Drawing attention heads")
    model = getattr(cache, "model", None)
    pattern = _one_image(_pattern(cache, layer, model), image)
    layout = _layout(pattern, None if model is None else model.cfg, images) if layout is None else layout
    if pattern.shape[1] != layout.n_tokens:
        raise ShapeError(f"The pattern has {pattern.shape[1]} queries, the layout {layout.n_tokens} tokens.")
    chosen_heads = _heads(heads, len(pattern))
    patterns = pattern[torch.tensor(chosen_heads)]
    names = [f"{layer}.{head}" for head in chosen_heads]
    if heads is None and len(names) > 1:
        patterns, names = torch.cat([patterns.mean(0, keepdim=True), patterns]), ["mean", *names]
    every = token_names(layout, pattern.shape[2])
    queries = list(range(layout.n_tokens)) if query is None else _queries(query, layout, pattern.shape[2])
    kept = _kept(patterns, layout, queries, tokens, [] if query is None else queries)
    pooled, n_others = _pooled(patterns, layout, kept)
    labels = [every[i] for i in kept] + ([f"others({n_others})"] if n_others else [])
    highest = float(pooled[:, :, : len(kept)].max())
    asked = "all queries" if query is None else ", ".join(every[i] for i in queries)
    caption = (
        f"Block {layer}, {len(chosen_heads)} of {len(pattern)} heads; rows look at columns. Shown are every token that "
        f"is no patch, and of {layout.n_patches} patches the {layout.n_patches - n_others} to which {asked} pay most "
        f"attention"
        + (f"; the other {n_others} are one row (their average) and one column (their sum)." if n_others else ".")
        + f" The darkest colour is {highest:.3g}."
    )
    return AttentionView(
        attention=pooled.numpy(),
        tokens=tuple(labels),
        heads=tuple(names),
        highest=highest,
        caption=caption,
        thumbnails=_thumbnails(model, images, image, layout, kept),
        script=script,
    )


def _pattern(cache: Any, layer: int, model: Any) -> Float[Tensor, "*batch head query key"]:
    if isinstance(cache, Tensor):
        return cache
    if model is not None and not 0 <= layer < model.cfg.n_layers:
        raise ShapeError(f"Block {layer} does not exist: the model has blocks 0 to {model.cfg.n_layers - 1}.")
    name = f"blocks.{layer}.attn.hook_pattern"
    if name not in cache.keys():  # noqa: SIM118  (an ActivationCache has no `in`)
        have = sorted(key for key in cache.keys() if key.endswith("hook_pattern"))  # noqa: SIM118
        raise HookNameError(
            f"The cache has no {name}{f', only {have}' if have else ''}. Add it: vit.run_with_cache(images, "
            f"names_filter=[..., '{name}'])."
        )
    return cache[name]


def _one_image(pattern: Tensor, image: int) -> Float[Tensor, "head query key"]:
    batch = pattern[None] if pattern.ndim == 3 else pattern
    if batch.ndim != 4:
        raise ShapeError(f"Expected a pattern [batch, head, query, key], got a tensor of shape {list(pattern.shape)}.")
    if not 0 <= image < len(batch):
        raise ShapeError(f"Image {image} does not exist: the batch has images 0 to {len(batch) - 1}.")
    return batch[image].detach().float().cpu()


def _layout(pattern: Tensor, cfg: ViTConfig | None, images: Tensor | None) -> TokenLayout:
    """The layout that explains the number of queries: patches of the images' grid, and test-time registers."""
    if cfg is None:
        raise ShapeError("The cache does not know its model. Pass layout=vit.layout(images).")
    base = cfg.layout() if images is None else cfg.layout(*images.shape[2:])
    registers = pattern.shape[1] - base.n_tokens
    if not 0 <= registers <= _MOST_REGISTERS:
        raise ShapeError(
            f"The pattern has {pattern.shape[1]} queries, images of {base.grid[0]} x {base.grid[1]} patches have "
            f"{base.n_tokens} tokens. Pass images= as they were cached, or layout=vit.layout(images)."
        )
    return cfg.layout(*((None, None) if images is None else images.shape[2:]), n_test_time_registers=registers)


def _heads(heads: Sequence[int] | None, n_heads: int) -> list[int]:
    chosen = list(range(n_heads)) if heads is None else [int(head) for head in heads]
    wrong = [head for head in chosen if not 0 <= head < n_heads]
    if wrong or not chosen:
        raise ShapeError(f"heads={heads!r} cannot be shown: the block has heads 0 to {n_heads - 1}. Give at least one.")
    return chosen


def _queries(query: TokenName | Sequence[TokenName], layout: TokenLayout, n_keys: int) -> list[int]:
    """Positions of the queries asked for; a pair of integers is one patch."""
    single = isinstance(query, SupportsIndex | str) or (
        isinstance(query, tuple) and len(query) == 2 and all(isinstance(part, SupportsIndex) for part in query)
    )
    several: Any = [query] if single else query
    positions = [token_index(layout, name, n_keys) for name in several]
    if not positions or any(index >= layout.n_tokens for index in positions):
        raise ShapeError(f"query={query!r} names no token that looks; the key of an attention bias is none.")
    return positions


def _kept(patterns: Tensor, layout: TokenLayout, queries: list[int], tokens: int, asked: list[int]) -> list[int]:
    """Tokens that are no patches, those asked for, and the patches that the queries look at most; in their order."""
    patches = range(layout.patches.start, layout.patches.stop)
    others = [index for index in range(patterns.shape[2]) if index not in patches]
    first = [index for index in dict.fromkeys(asked) if index in patches]
    most = _most(len(patterns), len(others))
    if len(first) > most:
        raise ShapeError(
            f"{len(first)} patches as queries do not fit into {MOST_BYTES / 1e6:g} MB with {len(patterns)} heads: "
            f"{most} do. Ask for fewer queries, or fewer heads."
        )
    if tokens < 1:
        raise ShapeError(f"tokens={tokens} shows no patch. Give at least 1.")
    received = patterns[:, queries].mean((0, 1))
    ranked = [layout.patches.start + i for i in received[layout.patches].argsort(descending=True).tolist()]
    chosen = list(dict.fromkeys([*first, *ranked]))[: max(min(tokens, most), len(first))]
    return sorted([*chosen, *others])


def _pooled(patterns: Tensor, layout: TokenLayout, kept: list[int]) -> tuple[Float[Tensor, "head token token"], int]:
    """The chosen rows and columns; all others as one more row (their mean) and column (their sum)."""
    n_keys = patterns.shape[2]
    queries = torch.cat(
        [patterns, patterns.new_zeros(len(patterns), n_keys - patterns.shape[1], n_keys)], 1
    )  # a bias looks at nothing
    others = torch.ones(n_keys, dtype=torch.bool)
    others[kept] = False
    if not others.any():
        return queries[:, kept][:, :, kept], 0
    rows = torch.cat([queries[:, kept], queries[:, others].mean(1, keepdim=True)], 1)
    return torch.cat([rows[:, :, kept], rows[:, :, others].sum(2, keepdim=True)], 2), int(others.sum())


def _most(n_heads: int, n_others: int) -> int:
    """Patches for which numbers and thumbnails of so many heads stay below `MOST_BYTES`."""
    room = MOST_BYTES - len(_library()) - 100_000
    side = int((room / (n_heads * _PER_VALUE)) ** 0.5)
    thumbnails = room // 8_000
    return max(1, min(side - n_others - 1, thumbnails))


def _thumbnails(model: Any, images: Tensor | None, image: int, layout: TokenLayout, kept: list[int]) -> tuple[str, ...]:
    if model is None or images is None:
        return ()
    if image >= len(images):
        raise ShapeError(f"images has {len(images)} images, and image {image} is shown. Pass the cached batch.")
    pixels: UInt8[np.ndarray, "height width rgb"] = to_display(images[image : image + 1], model.preprocess)[0]
    height, width = model.cfg.patch_size
    pictures = []
    for index in kept:
        at = index - layout.patches.start
        row, column = divmod(at, layout.grid_width)
        crop = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
        pictures.append(data_uri(np.ascontiguousarray(crop)) if 0 <= at < layout.n_patches else "")
    return tuple(pictures)


@lru_cache(maxsize=1)
def _library() -> str:
    """CircuitsVis's script, compressed, in base64."""
    return base64.b64encode(gzip.compress(_library_text().encode(), 9, mtime=0)).decode()


def _library_text() -> str:
    """The script as the installed package carries it."""
    text = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    return text.rpartition("//# sourceMappingURL")[0] or text
