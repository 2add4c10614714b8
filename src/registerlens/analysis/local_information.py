"""How much of its own patch a token still tells: its pixels, read linearly from outliers and from normal patches."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, detect, require_outliers
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import ImageError
from registerlens.model.block import Block
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import EVERYWHERE, sublayer_of, sublayers
from registerlens.model.vit import Hook, HookedViT
from registerlens.results import ModelResult
from registerlens.seeds import generator_of

GROUPS = ("outliers", "normal patches")
"""Whose tokens are read: the outliers, and as many normal patches of the same images, at random."""
FITTED, CHOSEN, TESTED = range(3)
"""What the images are for, in turn: the read-out's weights, its penalty, its quality."""
PENALTIES = 10.0 ** np.arange(-8, 1)
"""Ridge penalties to choose from, in units of the tokens' mean square (outliers, which are alike, vary far less)."""
FEWEST = 2
"""Tokens for each dimension of the stream that a map must be fitted to."""
PURPOSE = 0x10CA1
"""What normal patches are drawn for: see `generator_of`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalInformation(ModelResult):
    """What `local_information` found."""

    detection: Detection
    """Where and above which norm a patch is an outlier."""
    sublayers: tuple[str, ...]
    """Places in the stream: "embed", "0.attn", "0.mlp", ..."""
    readable: Float[np.ndarray, "group sublayer"]
    """R squared of the pixels of a token's own patch, read linearly from the token, on images that nothing was fitted
    to; 1 is all of their variance within the group, 0 no more than their mean tells. In the order of `GROUPS`."""
    likeness: Float[np.ndarray, "group sublayer"]
    """Mean cosine of two tokens of the group, of whatever images; as the next norm sees them, its weights left out."""
    n_tokens: Int[np.ndarray, "group use"]
    """Tokens of each group for weights, penalty and test."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row a place: R squared and likeness of both groups."""
        columns = {"sublayer": self.sublayers}
        for name, values in (("readable", self.readable), ("likeness", self.likeness)):
            columns |= {f"{name}_{group.split()[0]}": row for group, row in zip(GROUPS, values, strict=True)}
        return pd.DataFrame(columns)

    def describe(self) -> str:
        """The result in words."""
        onset = self.detection.onset or self.detection.sublayer
        at = self.sublayers.index(onset)
        sentences = [
            f"{group.capitalize()}: R squared {read[0]:.2f} at the embedding, {read[at]:.2f} after {onset}, "
            f"{read[-1]:.2f} at the end; cosine of two tokens {like[0]:.2f}, {like[at]:.2f}, {like[-1]:.2f}"
            for group, read, like in zip(GROUPS, self.readable, self.likeness, strict=True)
        ]
        words, fitted, width = ". ".join(sentences), self.n_tokens[0, FITTED], self.config.d_model
        return (
            f"{self.model}, pixels of a token's own patch, read from the token. {words}. The maps were fitted "
            f"to {fitted} outliers, {fitted / width:.1f} for each of {width} dimensions; more would read more."
        )

    plot = drawn_by("observables.local_information_figure")
    """Both measures, place by place."""


def local_information(
    vit: HookedViT, images: Images, *, detection: Detection | None = None, batch_size: int = 16, seed: int = 0
) -> LocalInformation:
    """Whether outliers have lost what their patch showed: its pixels, read from the token by ridge regression.

    At every place in the residual stream the tokens are centred and scaled as the next block's norm does it, and the
    pixels of their own patch are read from them by one linear map for outliers and one for normal patches. Every third
    image fits the map, every third chooses its penalty, every third tests it. Whatever an image's outliers are, they
    have their equals among its normal patches, drawn at random. Compare the course of R squared along the depth with
    that of normal patches, not the groups at one place: they show different things (outliers often a plain background).

    What lies in directions of little variance takes many tokens to be read. In a tiny ViT, 8 outliers a dimension gave
    .67 at the embedding and .18 at the end, 32 gave .70 and .28: a fall is partly one of readability.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or batches of one size that can be iterated twice; some hundreds.
        detection: where, and above which norm, a patch is an outlier; default: found on the same images.
        batch_size: images at once when a tensor is given.
        seed: of the choice of normal patches.

    Raises:
        NoOutliersError: the model has no outliers on these images.
        ImageError: there are too few outliers: a third of the images must have FEWEST for each dimension of the stream.
        ShapeError: the detection is of a place that the model does not have.

    Source: Darcet et al. 2024, section 2.2 (pixels of a patch are read worse from outliers than from normal patches).

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = local_information(vit, synthetic_images(288, 0).images)
        >>> found.sublayers[4], found.likeness[:, 4].round(1).tolist()
        ('1.mlp', [1.0, 0.2])
    """
    detection = detection or detect(vit, images, batch_size=batch_size)
    require_outliers(detection, "Comparing outliers with normal patches")
    sublayer_of(detection.sublayer, vit.cfg.n_layers)  # refuses a place of another model
    sums = _PixelSums(vit, detection, generator_of(PURPOSE, seed))
    [information] = stream(vit, images, [sums], batch_size=batch_size, description="reading pixels")
    return information


def patch_pixels(
    images: Float[Tensor, "batch channel height width"], patch: tuple[int, int]
) -> Float[Tensor, "batch patch pixel"]:
    """The pixels of every patch, row by row; what is left at the right and below, no patch sees.

    Example:
        >>> patch_pixels(torch.arange(16.0).view(1, 1, 4, 4), (2, 2))[0, 1]
        tensor([2., 3., 6., 7.])
    """
    rows, columns = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
    whole = images[..., : rows * patch[0], : columns * patch[1]]
    return rearrange(whole, "b c (h p) (w q) -> b (h w) (p q c)", p=patch[0], q=patch[1])


class _PixelSums(Sums):
    """Second moments of tokens and pixels, for every use of the images, group and place; added in place."""

    def __init__(self, vit: HookedViT, detection: Detection, generator: torch.Generator) -> None:
        super().__init__()
        self.vit, self.detection, self.generator = vit, detection, generator
        self.places = sublayers(vit.cfg.n_layers)
        n_pixels = vit.cfg.n_channels * vit.cfg.patch_size[0] * vit.cfg.patch_size[1]
        shape = (3, len(GROUPS), len(self.places))
        width = vit.cfg.d_model + 1  # a one beside every token, for the means
        # Moments are nearly singular: they are summed in float64, where the device has that.
        self.device = torch.device("cpu") if vit.device.type == "mps" else vit.device
        as_sums: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.totals["tokens"] = torch.zeros(*shape, width, width, **as_sums)
        self.totals["both"] = torch.zeros(*shape, width, n_pixels, **as_sums)
        self.totals["pixels"] = torch.zeros(3, len(GROUPS), **as_sums)
        self.totals["units"] = torch.zeros(len(GROUPS), len(self.places), width - 1, **as_sums)

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Patches everywhere."""
        self.kept: list[Float[Tensor, "batch patch d_model"]] = []
        return [(EVERYWHERE, lambda resid, hook: self.kept.append(resid[:, layout.patches]))]

    def update(self, batch: Batch) -> None:
        """One batch: every third image fits, every third chooses, every third tests."""
        mask = self.detection.cutoff.above(token_norms(self.kept[self.places.index(self.detection.sublayer)]))
        mask, kept = mask.to(self.device), [resid.to(self.device) for resid in self.kept]
        images = batch.images.to(self.vit.dtype)
        pixels = patch_pixels(images, self.vit.cfg.patch_size).to(self.device, torch.float64)
        use = torch.arange(batch.start, batch.start + len(batch), device=self.device) % 3
        for group, chosen in enumerate((mask, _as_many_others(mask, self.generator))):
            for fold in range(3):
                image, patch = (chosen & (use == fold)[:, None]).nonzero(as_tuple=True)
                here = pixels[image, patch]
                self.totals["pixels"][fold, group] += here.square().sum()
                for place, resid in enumerate(kept):
                    self._add(fold, group, place, resid[image, patch], here)

    def _add(self, fold: int, group: int, place: int, resid: Tensor, pixels: Tensor) -> None:
        centred = cast(Block, self.vit.blocks[0]).ln1.centre(resid.double())
        unit = torch.nn.functional.normalize(centred, dim=-1)
        x = torch.cat([unit * unit.shape[-1] ** 0.5, torch.ones_like(unit[:, :1])], 1)
        self.totals["units"][group, place] += unit.sum(0)
        self.totals["tokens"][fold, group, place] += x.T @ x
        self.totals["both"][fold, group, place] += x.T @ pixels

    def result(self) -> LocalInformation:
        """What the maps read.

        Raises:
            ImageError: there were too few tokens.
        """
        vit = self.vit
        n = self.totals["tokens"][:, :, 0, -1, -1].round().T  # group use
        every, least = n.sum(1, keepdim=True), FEWEST * vit.cfg.d_model
        if n.min() < least:
            raise ImageError(
                f"Too few outliers, or too few other patches, to read pixels from: {n[0].long().tolist()} outliers and "
                f"{n[1].long().tolist()} others in the images for the map, its penalty and its test; each must have "
                f"{least}, {FEWEST} for each of {vit.cfg.d_model} dimensions. Give more images."
            )
        likeness = (self.totals["units"].square().sum(-1) - every) / (every * (every - 1))
        readable = [[self._readable(group, at) for at in range(len(self.places))] for group in range(len(GROUPS))]
        return LocalInformation(
            **vit.identity,
            detection=self.detection,
            sublayers=self.places,
            readable=np.array(readable),
            likeness=likeness.cpu().double().numpy(),
            n_tokens=n.long().cpu().numpy(),
        )

    def _readable(self, group: int, place: int) -> float:
        """R squared on the third fold, with the penalty that does best on the second."""
        tokens, both = (self.totals[name][:, group, place].cpu() for name in ("tokens", "both"))
        n = tokens[FITTED, -1, -1]
        unit = tokens[FITTED].diagonal()[:-1].mean()  # the tokens' mean square, times their number
        penalised = torch.ones(len(tokens[FITTED]), dtype=tokens.dtype)
        penalised[-1] = 0  # the mean is free
        maps = [torch.linalg.solve(tokens[FITTED] + p * unit * penalised.diag(), both[FITTED]) for p in PENALTIES]
        errors = [self._error(weights, tokens, both, CHOSEN, group) for weights in maps]
        best = maps[int(torch.stack(errors).argmin())]
        mean = both[FITTED, -1] / n
        constant = torch.zeros_like(best)
        constant[-1] = mean
        alone = self._error(constant, tokens, both, TESTED, group)
        return float(1 - self._error(best, tokens, both, TESTED, group) / alone)

    def _error(self, weights: Tensor, tokens: Tensor, both: Tensor, fold: int, group: int) -> Tensor:
        """Sum of squared errors of a map from tokens to pixels, from the moments alone."""
        fitted = (weights * (tokens[fold] @ weights)).sum()
        return self.totals["pixels"][fold, group].cpu() - 2 * (weights * both[fold]).sum() + fitted


def _as_many_others(mask: Bool[Tensor, "batch patch"], generator: torch.Generator) -> Bool[Tensor, "batch patch"]:
    """As many other patches of every image, at random; all others where there are fewer.

    Example:
        >>> mask = torch.tensor([[True, False, False, True, False], [False, False, False, False, False]])
        >>> others = _as_many_others(mask, torch.Generator().manual_seed(0))
        >>> others.sum(1).tolist(), bool((others & mask).any())
        ([2, 0], False)
    """
    keys = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(mask, -1)
    rank = keys.argsort(1, descending=True).argsort(1)
    return (rank < mask.sum(1, keepdim=True)) & ~mask
