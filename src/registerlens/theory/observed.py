"""What images add to the weights: where outlier tokens point before and after they fire, and whom queries look for."""

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
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.model.block import Block
from registerlens.model.parts import token_norms
from registerlens.model.vit import Hook, HookedViT
from registerlens.theory.readers import directions

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
        return self.detection.layer if self.n_outliers else None


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
    sums = _ObservedSums(vit, detection, tuple(neuron_layers), first)
    [observed] = stream(vit, every, [sums], description="checking kernels")
    return observed


class _ObservedSums(Sums):
    """Sums of directions over outlier tokens, and of queries and keys over the others."""

    def __init__(self, vit: HookedViT, detection: Detection, neuron_layers: tuple[int, ...], first: int) -> None:
        super().__init__()
        self.detection, self.neuron_layers, self.first = detection, neuron_layers, first
        self.blocks = [cast(Block, block) for block in vit.blocks]
        self.n_tokens = 0

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Streams, which must wait until the outliers are known, and queries and keys."""
        self.n_tokens = layout.n_tokens
        self.before: dict[int, Float[Tensor, "batch pos d_model"]] = {}
        self.after: Float[Tensor, "batch pos d_model"] | None = None
        self.outlier: Bool[Tensor, "batch pos"] | None = None

        def at_onset(resid: Tensor, hook: Any) -> None:
            mask = torch.zeros(resid.shape[:2], dtype=torch.bool, device=resid.device)
            mask[:, layout.patches] = self.detection.cutoff.above(token_norms(resid[:, layout.patches]))
            self.outlier, self.after = mask, resid

        def before(resid: Tensor, hook: Any) -> None:
            self.before[hook.layer()] = resid

        def mean(x: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            # Up to the onset nobody is an outlier yet.
            total, n = x.float().sum((0, 1)), x.shape[0] * x.shape[1]
            if self.outlier is not None and (few := int(self.outlier.sum())):
                total, n = total - x[self.outlier].float().sum(0), n - few
            self.add(**{hook.name: total, f"tokens of {hook.name}": n})

        heads = [f"blocks.{layer}.attn.hook_" for layer in range(self.first, len(self.blocks))]
        # The onset first: where it is the place before a watched MLP too, both hooks see the same tensor.
        return [
            (self.detection.hook_name, at_onset),
            *((f"blocks.{layer}.hook_resid_mid", before) for layer in self.neuron_layers),
            *((f"{name}{kind}", mean) for name in heads for kind in ("q", "k")),
        ]

    def update(self, batch: Batch) -> None:
        """Take in the outlier tokens of one batch."""
        outlier, after = cast(Tensor, self.outlier), cast(Tensor, self.after)
        before = {
            f"before {layer}": directions(self.blocks[layer].ln2, resid[outlier]).sum(0)
            for layer, resid in self.before.items()
        }
        after = directions(self.blocks[0].ln1, after[outlier]).sum(0)
        self.add(n_images=len(batch), n_outliers=outlier.sum(), after=after, **before)

    def result(self) -> Observed:
        """Everything, as means."""

        def mean(name: str, over: str = "n_outliers") -> Tensor:
            return (self.totals[name] / max(1, self.count(over))).cpu()

        def heads(kind: str) -> dict[int, Tensor]:
            points = {layer: f"blocks.{layer}.attn.hook_{kind}" for layer in range(self.first, len(self.blocks))}
            return {layer: mean(point, f"tokens of {point}") for layer, point in points.items()}

        return Observed(
            detection=self.detection,
            n_images=self.n_images,
            n_outliers=self.count("n_outliers"),
            n_tokens=self.n_tokens,
            before={layer: mean(f"before {layer}") for layer in self.neuron_layers},
            after=mean("after"),
            query=heads("q"),
            key=heads("k"),
        )
