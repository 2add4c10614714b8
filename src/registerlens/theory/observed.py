"""What images add to the weights: where outlier tokens point before and after they fire, and whom queries look for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.detection import Detection, detection_in
from registerlens.analysis.trace import trace
from registerlens.config import TokenLayout
from registerlens.data.batches import Images, count, first_and_all
from registerlens.model.block import Block
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import hook_of, layer_of
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.theory.subspaces import directions

FEWEST = 8
"""Outliers are looked for on an eighth of the images, and on no fewer than this."""
UNKNOWN_NUMBER = 64
"""On how many, if nobody knows how many images will come."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Means over images; directions are means of unit vectors, so that a dot product with one is a mean cosine."""

    detection: Detection
    """Where the outliers arise, on the first images."""
    n_images: int
    """Images that went through."""
    n_outliers: int
    """Outlier patches among them."""
    n_tokens: int
    """Tokens of the last image, so of a query's keys."""
    before: dict[int, Float[Tensor, " d_model"]]
    """Mean direction of the outlier tokens before the MLP of a block."""
    after: Float[Tensor, " d_model"]
    """Mean direction of the outlier tokens right after their onset."""
    query: dict[int, Float[Tensor, "head d_head"]]
    """Mean query of a block's ordinary tokens; of all tokens up to the onset."""
    key: dict[int, Float[Tensor, "head d_head"]]
    """Mean key of the same tokens."""

    @property
    def outlier_layer(self) -> int | None:
        """The block after which outliers are there; -1 for the embedding, None where there are none."""
        return layer_of(self.detection.sublayer) if self.n_outliers else None


def observe(
    vit: HookedViT, images: Images, neuron_layers: Iterable[int], first: int, *, batch_size: int = 16
) -> Observed:
    """Stream images once (an eighth of them twice: to find where outliers arise), in memory that does not grow.

    Args:
        vit: the model, edited or not.
        images: as for `rl.trace`.
        neuron_layers: blocks before whose MLPs the outlier tokens' direction is wanted.
        first: the first block whose queries and keys are wanted.
        batch_size: images at once when a tensor is given.

    Raises:
        ImageError: there are no images.
        ShapeError: they do not fit the model.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = observe(vit, synthetic_images(32, 0).images, [1], 2)
        >>> found.detection.sublayer, found.n_images, sorted(found.query)
        ('1.mlp', 32, [2, 3, 4, 5])
    """
    n = count(images)
    first_images, every = first_and_all(images, UNKNOWN_NUMBER if n is None else max(FEWEST, n // 8), batch_size)
    traced = trace(vit, first_images)
    detection = detection_in(traced, traced.onset or traced.strongest)
    sums = _Sums(vit, detection, tuple(neuron_layers), first)
    device = vit.device
    with torch.inference_mode():
        for batch in track(every, "checking kernels", n, len):
            watch = _Watch(vit.layout(batch), sums)
            with vit.hooks(watch.hooks(vit)):
                vit(batch.to(device), stop_at_layer=vit.cfg.n_layers)
            sums.add(watch)
    return sums.result()


class _Watch:
    """One batch: what must wait until the outliers are known, and running sums of queries and keys."""

    def __init__(self, layout: TokenLayout, sums: _Sums) -> None:
        self.layout, self.sums = layout, sums
        self.before: dict[int, Tensor] = {}
        self.after: Tensor | None = None
        self.outlier: Bool[Tensor, "batch pos"] | None = None

    def hooks(self, vit: HookedViT) -> list[Any]:
        heads = [f"blocks.{layer}.attn.hook_" for layer in range(self.sums.first, vit.cfg.n_layers)]
        # The onset first: where it is the place before a watched MLP too, both hooks see the same tensor.
        return [
            (hook_of(self.sums.detection.sublayer), self._at_onset),
            *((f"blocks.{layer}.hook_resid_mid", self._before) for layer in self.sums.neuron_layers),
            *((f"{name}{kind}", self._mean) for name in heads for kind in ("q", "k")),
        ]

    def _at_onset(self, resid: Tensor, hook: Any) -> None:
        patches = self.layout.patches
        mask = torch.zeros(resid.shape[:2], dtype=torch.bool, device=resid.device)
        mask[:, patches] = self.sums.detection.cutoff.above(token_norms(resid[:, patches]))
        self.outlier, self.after = mask, resid

    def _before(self, resid: Tensor, hook: Any) -> None:
        self.before[hook.layer()] = resid

    def _mean(self, x: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
        # Up to the onset nobody is an outlier yet.
        total, n = x.float().sum((0, 1)), x.shape[0] * x.shape[1]
        if self.outlier is not None and (few := int(self.outlier.sum())):
            total, n = total - x[self.outlier].float().sum(0), n - few
        self.sums.add_mean(hook.name, total, n)


class _Sums:
    """Running sums: as large after a million images as after one."""

    def __init__(self, vit: HookedViT, detection: Detection, neuron_layers: tuple[int, ...], first: int) -> None:
        self.vit, self.detection, self.neuron_layers, self.first = vit, detection, neuron_layers, first
        zeros = torch.zeros(vit.cfg.d_model, dtype=torch.float64)
        self.before = {layer: zeros.clone() for layer in neuron_layers}
        self.after = zeros.clone()
        self.means: dict[str, tuple[Tensor, int]] = {}
        self.n_images = self.n_outliers = self.n_tokens = 0

    def add_mean(self, name: str, total: Float[Tensor, "head d_head"], n: int) -> None:
        """Take in one batch's queries or keys of a block."""
        before, so_far = self.means.get(name, (torch.zeros(total.shape, dtype=torch.float64), 0))
        self.means[name] = (before + total.double().cpu(), so_far + n)

    def add(self, watch: _Watch) -> None:
        """Take in one batch's outlier tokens."""
        outlier, after = cast(Tensor, watch.outlier), cast(Tensor, watch.after)
        blocks = self.vit.blocks
        for layer, resid in watch.before.items():
            norm = cast(Block, blocks[layer]).ln2
            self.before[layer] += directions(norm, resid[outlier]).sum(0).cpu()
        self.after += directions(cast(Block, blocks[0]).ln1, after[outlier]).sum(0).cpu()
        self.n_images += len(outlier)
        self.n_outliers += int(outlier.sum())
        self.n_tokens = watch.layout.n_tokens

    def result(self) -> Observed:
        """Everything, as means."""
        n = max(1, self.n_outliers)
        means = {name: total / max(1, n) for name, (total, n) in self.means.items()}
        layers = range(self.first, self.vit.cfg.n_layers)
        return Observed(
            detection=self.detection,
            n_images=self.n_images,
            n_outliers=self.n_outliers,
            n_tokens=self.n_tokens,
            before={layer: total / n for layer, total in self.before.items()},
            after=self.after / n,
            query={layer: means[f"blocks.{layer}.attn.hook_q"] for layer in layers},
            key={layer: means[f"blocks.{layer}.attn.hook_k"] for layer in layers},
        )
