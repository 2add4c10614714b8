"""What the last [CLS] update is made of: its attention restricted to patches, registers or outliers, and the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, patch_norms
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import Sums, batches
from registerlens.errors import ConfigError, ShapeError
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult

RESTRICTIONS = {
    "patches": "all patches",
    "normal_patches": "patches that are no outliers",
    "outliers": "outlier patches",
    "trained_registers": "trained registers",
    "test_time_registers": "test-time registers",
    "cls": "[CLS] itself: what the residual stream alone gives",
}
"""Keys that the last layer's [CLS] may attend to; attention among them is renormalised."""
_MEANS = ("attention", "cosine", "update_cosine")
_ARRAYS = ("n_images", *_MEANS, "cka", "update_cka")


# CKA -----------------------------------------------------------------------------------------------------------------


def linear_cka(x: Float[Tensor, "image feature"], y: Float[Tensor, "_ other"]) -> float:
    """Linear centred kernel alignment of two representations of the same images: 1 if one is a rotation of the other.

    ||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F), columns centred, in float64. With fewer images than features it is
    biased upwards: unrelated representations score well above 0. NaN where one of them is constant.

    Raises:
        ShapeError: the numbers of images differ.

    Source: Kornblith et al. 2019, equation 4 with a linear kernel.

    Example:
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(x, 2 * x.flip(1) + 5), 6)
        1.0
    """
    if len(x) != len(y):
        raise ShapeError(
            f"CKA compares representations of the same images, got {len(x)} and {len(y)} of them."
            " Give both for the same images, in one order."
        )
    sums = CKASums()
    sums.add(x, y)
    return sums.result()


class CKASums:
    """Linear CKA of a stream of images: second moments, as large after a million images as after one."""

    def __init__(self) -> None:
        self.n = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sum = self._moments = torch.zeros((), dtype=torch.float64)

    def add(self, x: Float[Tensor, "image feature"], y: Float[Tensor, "image other"]) -> None:
        """Take in a batch."""
        if not len(x):
            return
        x, y = x.double().cpu(), y.double().cpu()
        if self._shift is None:  # near the mean, so that centring at the end loses no digits
            self._shift = (x.mean(0), y.mean(0))
        joined = torch.cat([x - self._shift[0], y - self._shift[1]], 1)
        self.n += len(joined)
        self._sum = self._sum + joined.sum(0)
        self._moments = self._moments + joined.T @ joined

    def result(self) -> float:
        """CKA of all images so far; NaN for fewer than two."""
        if self._shift is None or self.n < 2:
            return float("nan")
        covariance = self._moments - torch.outer(self._sum, self._sum) / self.n
        d = len(self._shift[0])
        own, other, cross = covariance[:d, :d].norm(), covariance[d:, d:].norm(), covariance[:d, d:].norm()
        return float(cross.square() / (own * other))


# The result ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Faithfulness(ModelResult):
    """How much of the model's [CLS] output remains when the last layer's [CLS] may look at some tokens only."""

    restrictions: tuple[str, ...]
    """Which tokens it may look at; RESTRICTIONS explains them."""
    n_images: Int[np.ndarray, " restriction"]
    """Images that have such tokens: over those the numbers are taken."""
    attention: Float[np.ndarray, " restriction"]
    """Attention the unrestricted [CLS] pays these tokens (0 to 1, mean over heads), mean over images."""
    cosine: Float[np.ndarray, " restriction"]
    """Cosine of the [CLS] output (after the final norm) to the unrestricted one, mean over images."""
    update_cosine: Float[np.ndarray, " restriction"]
    """The same of what the last attention adds to [CLS], without the residual stream that both share."""
    cka: Float[np.ndarray, " restriction"]
    """Linear CKA of the [CLS] outputs over the images."""
    update_cka: Float[np.ndarray, " restriction"]
    """The same of the updates."""

    def describe(self) -> str:
        """The result in words, one line a restriction."""
        lines = [f"{self.model}: [CLS] of the last layer restricted to some tokens, against all."]
        for i, name in enumerate(self.restrictions):
            lines.append(
                f"{RESTRICTIONS[name]} ({self.n_images[i]} images, {self.attention[i]:.0%} of its attention): output "
                f"cosine {self.cosine[i]:.3f}, CKA {self.cka[i]:.3f}; update cosine {self.update_cosine[i]:.3f}, CKA "
                f"{self.update_cka[i]:.3f}."
            )
        if self.n_images.max() < self.config.d_model:
            lines.append(f"With fewer images than the {self.config.d_model} dimensions, CKA is biased upwards.")
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a restriction."""
        return pd.DataFrame({"restriction": self.restrictions} | {name: getattr(self, name) for name in _ARRAYS})

    plot = drawn_by("sinks.faithfulness_figure")
    """Cosine and CKA of output and update, restriction by restriction."""


# Measuring -----------------------------------------------------------------------------------------------------------


def faithfulness(
    vit: HookedViT, images: Images, *, detection: Detection | None = None, batch_size: int = 16
) -> Faithfulness:
    """Restrict the last layer's [CLS] to some tokens, and compare the [CLS] output with the full one.

    A clean map is not a faithful one: what the map shows may not be what the output rests on. If [CLS] gives the same
    output from the registers alone as from all tokens, a map of its attention to patches explains little. The row "cls"
    is the baseline: what is left when [CLS] sees no other token.

    Test-time registers are restricted to where they are in force: call it inside `with vit.edit(register)`. The last
    block runs once more for each restriction; nothing that grows with the number of images is kept.

    Args:
        vit: the model, edited or not; it must have a [CLS].
        images: [image, channel, height, width], or an iterable of batches.
        detection: which patches are outliers, as in `rl.find_outliers(vit, images).detection`; adds two restrictions.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: the model has no [CLS].
        ImageError: there are no images.

    Source: Lappe and Giese 2025, for the test; Kornblith et al. 2019 for CKA.

    Example:
        >>> import registerlens as rl
        >>> cfg = rl.ViTConfig(n_layers=2, d_model=32, n_heads=2, d_mlp=64, image_size=(32, 32), patch_size=(8, 8))
        >>> faithfulness(rl.HookedViT(cfg), torch.rand(4, 3, 32, 32)).restrictions
        ('patches', 'cls')
    """
    if not vit.cfg.class_token:
        raise ConfigError(
            f"{vit.source} has no [CLS], so that there is no [CLS] output to restrict. What its output rests on can be "
            f"tested with rl.Ablate(rl.Tokens(layer, patches)), its sinks with sink_no_op(vit, images)."
        )
    sums: dict[str, _RestrictionSums] = {}
    with torch.inference_mode():
        for batch in batches(vit, images, batch_size, "restricting [CLS]"):
            layout = batch.layout
            mask = None
            if detection is not None:
                mask = detection.cutoff.above(patch_norms(vit, batch.images, detection.sublayer))
            resid = vit(batch.images, stop_at_layer=vit.cfg.n_layers - 1)
            full = _last(vit, resid, layout, None)
            for name, allowed in _restrictions(layout, mask, resid.device).items():
                keys = allowed.expand(len(batch), -1)
                there = keys.any(1)
                restricted = sums.setdefault(name, _RestrictionSums())
                if there.any():
                    restricted.take(full.of(there), _last(vit, resid[there], layout, keys[there]), keys[there])
    results = [restricted.result() for restricted in sums.values()]
    arrays = {name: np.array([result[name] for result in results]) for name in _ARRAYS}
    return Faithfulness(**vit.identity, restrictions=tuple(sums), **arrays)


def _restrictions(
    layout: TokenLayout, mask: Bool[Tensor, "batch patch"] | None, device: torch.device
) -> dict[str, Bool[Tensor, "#batch pos"]]:
    def tokens(where: slice | int, chosen: Tensor | bool = True) -> Tensor:
        allowed = torch.zeros(1 if isinstance(chosen, bool) else len(chosen), layout.n_tokens, dtype=torch.bool)
        allowed[:, where] = chosen
        return allowed.to(device)

    restrictions = {"patches": tokens(layout.patches)}
    if mask is not None:
        restrictions |= {
            "normal_patches": tokens(layout.patches, ~mask.cpu()),
            "outliers": tokens(layout.patches, mask.cpu()),
        }
    if layout.n_trained_registers:
        restrictions["trained_registers"] = tokens(layout.trained_registers)
    if layout.n_test_time_registers:
        restrictions["test_time_registers"] = tokens(layout.test_time_registers)
    return restrictions | {"cls": tokens(layout.prefix.start)}


@dataclass(frozen=True)
class _Cls:
    """[CLS] at the end of one pass through the last block."""

    output: Float[Tensor, "batch d_model"]
    update: Float[Tensor, "batch d_model"]
    attention: Float[Tensor, "batch key"]

    def of(self, images: Bool[Tensor, " batch"]) -> _Cls:
        """The same of some images."""
        return _Cls(self.output[images], self.update[images], self.attention[images])


def _last(
    vit: HookedViT,
    resid: Float[Tensor, "batch pos d_model"],
    layout: TokenLayout,
    keys: Bool[Tensor, "batch pos"] | None,
) -> _Cls:
    name, recorded = f"blocks.{vit.cfg.n_layers - 1}", dict[str, Tensor]()

    def restrict(scores: Float[Tensor, "batch head query key"], hook: Any) -> Tensor | None:
        if keys is None:
            return None
        scores = scores.clone()
        # An attention bias stands after all tokens, and is none of them.
        allowed = F.pad(keys, (0, scores.shape[-1] - keys.shape[1]))
        scores[:, :, layout.cls] = scores[:, :, layout.cls].masked_fill(~allowed[:, None], float("-inf"))
        return scores

    def attention(pattern: Tensor, hook: Any) -> None:
        recorded["attention"] = pattern[:, :, layout.cls].float().mean(1)

    def update(written: Tensor, hook: Any) -> None:
        recorded["update"] = written[:, layout.cls].float()

    hooks: list[Any] = [
        (f"{name}.attn.hook_attn_scores", restrict),
        (f"{name}.attn.hook_pattern", attention),
        (f"{name}.hook_attn_out", update),
    ]
    with vit.hooks(hooks):
        tokens = vit(resid, start_at_layer=vit.cfg.n_layers - 1, layout=layout, return_type="tokens")
    return _Cls(tokens[:, layout.cls].float(), recorded["update"], recorded["attention"])


class _RestrictionSums(Sums):
    """One restriction over all images."""

    def __init__(self) -> None:
        super().__init__()
        self.cka, self.update_cka = CKASums(), CKASums()

    def take(self, full: _Cls, restricted: _Cls, keys: Bool[Tensor, "some pos"]) -> None:
        """Images that have such tokens."""
        self.add(
            n_images=len(keys),
            attention=(full.attention[:, : keys.shape[1]] * keys).sum(),
            cosine=F.cosine_similarity(restricted.output, full.output, dim=1).sum(),
            update_cosine=F.cosine_similarity(restricted.update, full.update, dim=1).sum(),
        )
        self.cka.add(restricted.output, full.output)
        self.update_cka.add(restricted.update, full.update)

    def result(self) -> dict[str, float | int]:
        """Means, NaN where no image has such tokens."""
        n, nothing = self.n_images, torch.tensor(torch.nan)
        means = {name: float(self.totals.get(name, nothing)) / max(n, 1) for name in _MEANS}
        return means | {"n_images": n, "cka": self.cka.result(), "update_cka": self.update_cka.result()}
