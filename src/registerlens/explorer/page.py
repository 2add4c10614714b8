"""The explorer as HTML that carries its data: every map one byte a value, compressed, and as many as the budget allows.

What is kept is the same for all images and conditions, so that they can always be compared; see `order` for what comes
first. Where images have very many patches, these are pooled into cells.
"""

from __future__ import annotations

import base64
import gzip
import math
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.errors import ConfigError
from registerlens.explorer.attention import Head, RecordedAttention
from registerlens.explorer.codes import encode
from registerlens.explorer.explorer import CLEAN, Explorer
from registerlens.explorer.manifest import manifest
from registerlens.explorer.tokens import token_names
from registerlens.markup import asset, policy, render, write_html
from registerlens.model.names import runs
from registerlens.progress import track

Kind = tuple[int, Head]
"""A block and a head: one map for every image and condition."""

MOST_PATCHES = 420
"""Patches that a page shows one by one; more are pooled into cells."""
_CORE = 3
"""Blocks whose means, with rollout and the heads of the first one, shall fit; else the last images are left out."""
_REMARKS = 1500
"""Bytes for the lists of what was kept and left out."""


def script() -> Markup:
    """The explorer's JavaScript: an ES module, its files one after the other."""
    return asset("explorer/sources.js", "explorer/drawing.js", "explorer/explorer.js")


def page_script() -> Markup:
    """The same, which mounts what stands on a page."""
    return script() + asset("explorer/embedded.js")


def style() -> Markup:
    """The explorer's style sheet."""
    return asset("explorer/explorer.css")


def write(explorer: Explorer, path: Path, max_bytes: int) -> Path:
    """What `Explorer.to_html` does; see there."""

    def page(inside: str) -> Markup:
        title = f"{explorer.vit.source}: explorer"
        return render("explorer/page.html", title=title, policy=policy([page_script()]), section=inside)

    return write_html(path, page(section(explorer, max_bytes - len(page("").encode()))))


def section(explorer: Explorer, max_bytes: int) -> Markup:
    """What `Explorer.section` does; see there."""
    about = {"own": f"registerlens-explorer-{uuid.uuid4().hex[:12]}", "style": style(), "script": page_script()}
    frame = render("explorer/section.html", data="", **about)
    return render("explorer/section.html", data=collect(explorer, max_bytes - len(frame.encode())), **about)


def collect(explorer: Explorer, max_bytes: int) -> dict[str, Any]:
    """The manifest, and as many maps as fit into so many bytes of JSON.

    Raises:
        ConfigError: not even one map of one image fits.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.explorer.explorer import explore
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> data = collect(explore(vit, torch.rand(1, 3, 48, 48)), 1_000_000)
        >>> data["manifest"]["kept"][:2], data["manifest"]["left_out"]
        ([(5, 'mean'), (2, 'mean')], '')
    """
    data, kinds, cells = manifest(explorer), order(explorer), _cells(explorer)
    data |= _in_cells(data, explorer, cells)
    data["images"], images = [], data["images"]
    left = max_bytes - _size(data) - _REMARKS
    first = _scenes(explorer, range(1))
    core = min(_CORE, explorer.vit.cfg.n_layers) + 1 + explorer.vit.cfg.n_heads
    per_kind, per_image = _size(_maps(first, kinds[0], cells)), _size(_facts(explorer, first, cells))
    per_image += max(map(_size, images)) + per_kind * min(core, len(kinds))
    n_images = max(1, min(len(images), left // per_image))
    scenes = _scenes(explorer, range(n_images))
    facts, maps, kept = _facts(explorer, scenes, cells), {}, []
    left -= _size(facts) + _size(images[:n_images])
    for kind in track(kinds, "packing the page", len(kinds)):
        new = _maps(scenes, kind, cells)
        left -= _size(new)
        if left < 0:
            break
        maps |= new
        kept.append(kind)
    if not kept:
        raise ConfigError(
            f"The page has no room for a single map of one image: {-left} bytes are missing. Give a larger max_bytes, "
            f"fewer interventions, or smaller images."
        )
    left_out = " ".join(filter(None, [cells.words, _left_out(explorer, kinds, kept, n_images)]))
    about = {"images": images[:n_images], "kept": kept, "left_out": left_out}
    return {"manifest": data | about | {"start": _reachable(data["start"], kept)}, "facts": facts, "maps": maps}


def order(explorer: Explorer) -> list[Kind]:
    """Every kind of map, the most interesting first.

    Means over heads of the block that reads outliers first, the last one and the one where they arise; rollout of the
    last; the heads of the first of these; the means of all other blocks; then their heads and rollouts.
    """
    cfg, onset = explorer.vit.cfg, explorer.trace.onset_layer
    last = cfg.n_layers - 1
    first = [last, last // 2, 0] if onset is None else [min(onset + 1, last), last, onset]
    layers = list(dict.fromkeys([*first, *range(last, -1, -1)]))
    heads = range(cfg.n_heads) if cfg.n_heads > 1 else ()
    kinds: list[Kind] = [
        *((layer, "mean") for layer in layers[:_CORE]),
        (last, "rollout"),
        *((layers[0], head) for head in heads),
        *((layer, "mean") for layer in layers[_CORE:]),
        *((layer, head) for layer in layers[1:] for head in heads),
        *((layer, "rollout") for layer in layers if layer != last),
    ]
    return kinds


def _cells(explorer: Explorer) -> Cells:
    return Cells.few_enough(explorer.vit.cfg.layout(*explorer.images.shape[2:]))


def _in_cells(data: dict[str, Any], explorer: Explorer, cells: Cells) -> dict[str, Any]:
    """What changes in the manifest where cells take the place of patches."""
    if cells.side == 1:
        return {}
    rows, columns = cells.layout.grid
    covered = [
        share * cells.side * now / before
        for share, now, before in zip(data["grid"]["covered"], (columns, rows), cells.patches.grid[::-1], strict=True)
    ]
    conditions = []
    for condition in data["conditions"]:
        layout = replace(cells.layout, n_test_time_registers=condition["n_tokens"] - cells.patches.n_tokens)
        n_extra = len(condition["tokens"]) - condition["n_tokens"]
        tokens = token_names(layout, layout.n_tokens + n_extra)
        conditions.append(condition | {"tokens": tokens, "n_tokens": layout.n_tokens})
    patch = explorer.tokens(CLEAN).index(data["start"]["token"]) - cells.patches.patches.start
    row, column = (at // cells.side for at in divmod(patch, cells.patches.grid_width))
    return {
        "grid": data["grid"] | {"rows": rows, "columns": columns, "covered": covered},
        "conditions": conditions,
        "start": data["start"] | {"token": f"({row},{column})"},
    }


Scenes = dict[str, RecordedAttention]
"""By "image/condition", both as numbers."""


def _scenes(explorer: Explorer, images: range) -> Scenes:
    return {
        f"{image}/{index}": explorer.attention(image, name)
        for image in images
        for index, name in enumerate(explorer.conditions)
    }


def _facts(explorer: Explorer, scenes: Scenes, cells: Cells) -> dict[str, str]:
    """Norms [sublayer, pos], their medians [sublayer], strongest neurons [pos, rank, 4] and chosen ones [pos, n]."""
    packed = {}
    for scene, attention in scenes.items():
        recording = attention.recording
        clean = scenes[f"{scene.partition('/')[0]}/0"].recording  # the first condition
        n_more = recording.norms.shape[1] - clean.norms.shape[1]
        kept = cells.largest(torch.cat([clean.norms[explorer.place], torch.zeros(n_more)]))
        neurons = [recording.strongest[..., 0], recording.strongest[..., 1]]
        neurons += [recording.strongest_activation, recording.strongest_written]
        table = torch.stack([part.float() for part in neurons], -1)[kept]
        parts = (recording.norms[:, kept], recording.patch_medians, table, recording.chosen_activation[kept])
        packed[scene] = _compressed(*(part.numpy().astype("<f4") for part in parts))
    return packed


def _maps(scenes: Scenes, kind: Kind, cells: Cells) -> dict[str, str]:
    """The largest value of each row [pos], then the codes [pos, key]."""
    layer, head = kind
    packed = {}
    for scene, attention in scenes.items():
        codes, largest = encode(cells.pool(attention.whole(layer, head)).numpy())
        packed[f"{scene}/{layer}/{head}"] = _compressed(largest.astype("<f4"), codes)
    return packed


def _compressed(*arrays: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(b"".join(array.tobytes() for array in arrays), 6, mtime=0)).decode()


def _size(value: Any) -> int:
    """Bytes as JSON on the page, where some signs take six."""
    return len(htmlsafe_json_dumps(value, separators=(",", ":"))) + 1


def _reachable(start: dict[str, Any], kept: list[Kind]) -> dict[str, Any]:
    layers = [layer for layer, head in kept if head == "mean"]
    return start if start["layer"] in layers else start | {"layer": layers[0]}


def _left_out(explorer: Explorer, kinds: list[Kind], kept: list[Kind], n_images: int) -> str:
    """What the budget had no room for, in words; empty where all is there."""
    missing = []
    if n_images < len(explorer.images):
        missing.append(f"{len(explorer.images) - n_images} of {len(explorer.images)} images")
    absent = set(kinds) - set(kept)
    if means := sorted(layer for layer, head in absent if head == "mean"):
        missing.append(f"the mean over heads of blocks {_ranges(means)}")
    single = {kind for kind in absent if isinstance(kind[1], int)}
    if single:
        n = sum(isinstance(head, int) for _, head in kinds)
        missing.append(f"{len(single)} of {n} maps of single heads")
    if rollouts := sorted(layer for layer, head in absent if head == "rollout"):
        missing.append(f"rollout up to blocks {_ranges(rollouts)}")
    return f"Left out to keep this page small: {'; '.join(missing)}." if missing else ""


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words, neighbours joined.

    Example:
        >>> _ranges([0, 1, 2, 5])
        '0-2, 5'
    """
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs(numbers))


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Square cells of `side` x `side` patches; those at the right and lower edge may be cut off.

    Example:
        >>> cells = Cells.few_enough(TokenLayout(grid=(37, 37), n_prefix=1))
        >>> cells.side, cells.layout.grid
        (2, (19, 19))
    """

    side: int
    """Patches along a cell; 1 leaves everything as it is."""
    patches: TokenLayout
    """Where the patches are."""

    @classmethod
    def few_enough(cls, layout: TokenLayout) -> Cells:
        """The smallest cells of which there are no more than `MOST_PATCHES`."""
        side = 1
        while math.prod(cls(side=side, patches=layout).layout.grid) > MOST_PATCHES:
            side += 1
        return cls(side=side, patches=layout)

    @property
    def layout(self) -> TokenLayout:
        """The layout with cells in the place of patches."""
        rows, columns = (-(-length // self.side) for length in self.patches.grid)
        return replace(self.patches, grid=(rows, columns))

    @property
    def words(self) -> str:
        """What was pooled; empty where nothing was."""
        if self.side == 1:
            return ""
        return (
            f"To keep this page small, {self.side} x {self.side} patches share a cell, and (row,column) counts cells: "
            f"attention to a cell is summed, attention from it averaged; norm and neurons are those of its patch with "
            f"the largest norm in the clean model."
        )

    def pool(self, pattern: Float[Tensor, "pos key"]) -> Float[Tensor, "cell cell_or_key"]:
        """Attention from cells to cells: the mean over queries, the sum over keys; rows that sum to 1 still do.

        Example:
            >>> cells = Cells(side=2, patches=TokenLayout(grid=(2, 2), n_prefix=1))
            >>> cells.pool(torch.full((5, 5), 0.2))
            tensor([[0.2000, 0.8000],
                    [0.2000, 0.8000]])
        """
        if self.side == 1:
            return pattern
        belongs = self._belongs(len(pattern))
        columns = pattern @ self._belongs(pattern.shape[1])
        return belongs.T @ columns / belongs.sum(0)[:, None]

    def largest(self, norms: Float[Tensor, " pos"]) -> Int[Tensor, " cell"]:
        """For every cell its patch of largest norm; for other tokens themselves."""
        if self.side == 1:
            return torch.arange(len(norms))
        members = self._belongs(len(norms)).bool()
        return torch.where(members, norms[:, None], -math.inf).argmax(0)

    def _belongs(self, n: int) -> Float[Tensor, "pos cell"]:
        """Which cell each of `n` tokens or keys is in; those that are no patches have one of their own."""
        start, stop = self.patches.patches.start, self.patches.patches.stop
        rows, columns = (torch.arange(length) // self.side for length in self.patches.grid)
        cells = rearrange(rows[:, None] * self.layout.grid_width + columns, "h w -> (h w)") + start
        behind = torch.arange(n - stop) + self.layout.patches.stop
        index = torch.cat([torch.arange(start), cells, behind])
        return torch.eye(int(index.max()) + 1)[index]
