"""One forward pass, observed: norms, attention, tokens, predictions; how right they are, and what an edit changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Cutoff
from registerlens.config import TokenLayout, ViTConfig
from registerlens.engine.attention_received import attention_hooks
from registerlens.errors import ShapeError
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import EVERYWHERE
from registerlens.model.vit import HookedViT
from registerlens.stats.histograms import medians

METRICS = {
    "largest_norm": "largest patch norm where outliers are detected, in units of the clean image's median",
    "outliers": "outlier patches per image",
    "old_outliers": "of these, patches that are outliers in the clean run (and not aimed at)",
    "new_outliers": "of these, patches that are not (and not aimed at): outliers handed off to other patches",
    "placed": "share of the patches aimed at that are outliers, 0 to 1",
    "register_norm": "norm of the (largest) test-time register at the same place, in the same unit",
    "sink_patch": "largest attention to one patch, mean over heads and the layers after the onset",
    "sink_outliers": "attention to all patches that are outliers in the clean run (and not aimed at), same mean",
    "sink_elsewhere": "largest attention to one patch that is neither, same mean",
    "sink_aimed": "attention to all patches aimed at, same mean",
    "sink_register": "attention to the test-time registers or the attention bias, same mean",
    "cos_cls": "cosine of the final [CLS] token to the clean run",
    "cos_patches": "cosine of the final patch tokens to the clean run, mean over patches",
    "cos_normal": "the same over patches that are outliers neither in the clean run nor afterwards",
    "cos_output": "cosine of the pooled output to the clean run",
    "kl": "Kullback-Leibler divergence from the clean run, mean over all predictions, labelled or not; in nats",
    "accuracy": "share of labels predicted, 0 to 1",
}
"""What is measured of each image. NaN where a model has no such thing."""


@dataclass(frozen=True)
class Observation:
    """What one pass over a batch showed."""

    layout: TokenLayout
    norms: Float[Tensor, "sublayer batch pos"]
    """Residual norms after the embedding, and after each attention and MLP in turn."""
    attention: Float[Tensor, "layer batch key"]
    """Attention drawn by each key, of the queries asked for, mean over heads; an attention bias has the last column."""
    tokens: Float[Tensor, "batch pos d_model"]
    """After the final norm."""
    output: Float[Tensor, "batch *out"]


def observe(
    vit: HookedViT, batch: Float[Tensor, "batch channel height width"], queries: Literal["cls", "all"] = "cls"
) -> Observation:
    """Run the model, edited or not, and look.

    Args:
        vit: the model.
        batch: preprocessed images.
        queries: whose attention: that of [CLS] (without one, the mean over all), or the mean over all in any case.

    Example:
        >>> import registerlens as rl
        >>> with torch.no_grad():
        ...     seen = observe(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48))
        >>> seen.norms.shape, seen.attention.shape
        (torch.Size([13, 2, 36]), torch.Size([6, 2, 36]))
    """
    layout = vit.layout(batch)
    norms: list[Tensor] = []
    by_layer: dict[int, Tensor] = {}

    def receive(layer: int, attention: Tensor) -> None:
        by_layer[layer] = attention.mean(1)

    hooks: list[Any] = [(EVERYWHERE, lambda resid, hook: norms.append(token_norms(resid)))]
    asked = layout if queries == "cls" else replace(layout, class_token=False)
    hooks += attention_hooks(vit, asked, range(vit.cfg.n_layers), receive)
    with vit.hooks(hooks):
        tokens = vit(batch.to(vit.device), return_type="tokens")
    attention = torch.stack([by_layer[layer] for layer in range(vit.cfg.n_layers)])
    return Observation(layout, torch.stack(norms), attention, tokens, vit.head(tokens, layout))


@dataclass(frozen=True)
class Yardstick:
    """What an edited pass over a batch is held against: the clean pass, and where to look."""

    clean: Observation
    sublayer: int
    """Index of the place of detection among the sublayers."""
    cutoff: Cutoff
    layers: range
    """Layers after the onset."""
    labels: Int[Tensor, "batch ..."] | None
    cfg: ViTConfig

    @property
    def median(self) -> Float[Tensor, "batch 1"]:
        """The clean median patch norm at the place of detection: the unit of norms."""
        return medians(self._patch_norms(self.clean))

    @property
    def mask(self) -> Bool[Tensor, "batch patch"]:
        """Outliers of the clean pass."""
        return self.outlying(self.clean)

    def outlying(self, observed: Observation) -> Bool[Tensor, "batch patch"]:
        """Patches above the cut-off; a relative one counts in the clean median, so that edits do not move it."""
        return self.cutoff.above(self._patch_norms(observed), self._patch_norms(self.clean))

    def _patch_norms(self, observed: Observation) -> Float[Tensor, "batch patch"]:
        return observed.norms[self.sublayer][:, observed.layout.patches]

    def measure(
        self, observed: Observation, aim: Bool[Tensor, "#batch patch"] | None = None
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Every metric of METRICS that the model has, for each image; `aim` is where outliers are wanted."""
        layout, clean = observed.layout, self.clean
        patches, stop = layout.patches, layout.patches.stop
        norms = observed.norms[self.sublayer] / self.median
        outlying, before = self.outlying(observed), self.mask
        normal = ~(before | outlying)
        aimed = torch.zeros_like(before) if aim is None else aim.to(before.device).expand_as(before)
        old, other = before & ~aimed, ~(before | aimed)
        received = observed.attention[self.layers.start : self.layers.stop].mean(0)
        similar = F.cosine_similarity(observed.tokens[:, patches].float(), clean.tokens[:, patches].float(), dim=-1)
        numbers = {
            "largest_norm": norms[:, patches].amax(1),
            "outliers": outlying.sum(1),
            "old_outliers": (outlying & old).sum(1),
            "new_outliers": (outlying & other).sum(1),
            "sink_patch": received[:, patches].amax(1),
            "sink_outliers": (received[:, patches] * old).sum(1),
            "sink_elsewhere": (received[:, patches] * other).amax(1),
            "cos_patches": similar.mean(1),
            "cos_normal": (similar * normal).sum(1) / normal.sum(1),
        }
        if aim is not None:
            numbers["placed"] = (outlying & aimed).sum(1) / aimed.sum(1)
            numbers["sink_aimed"] = (received[:, patches] * aimed).sum(1)
        if layout.n_test_time_registers:
            numbers["register_norm"] = norms[:, stop:].amax(1)
        if received.shape[1] > stop:
            numbers["sink_register"] = received[:, stop:].sum(1)
        if layout.cls is not None:
            cls = [observation.tokens[:, layout.cls].float() for observation in (observed, clean)]
            numbers["cos_cls"] = F.cosine_similarity(*cls, dim=-1)
        if observed.output.ndim == 2:
            numbers["cos_output"] = F.cosine_similarity(observed.output.float(), clean.output.float(), dim=-1)
        if classifies(self.cfg) or self.labels is not None:
            numbers["kl"] = divergence(observed.output, clean.output, self.cfg.n_label_sets)
        if self.labels is not None:
            numbers["accuracy"] = accuracy(observed.output, self.labels)
        return numbers


def classifies(cfg: ViTConfig) -> bool:
    """Whether the output are logits of classes, rather than a projection or a pooled token."""
    return cfg.d_out is not None and cfg.head_bias and cfg.head_act is None


def divergence(
    output: Float[Tensor, "batch *out"],
    clean: Float[Tensor, "batch *out"],
    n_sets: int = 1,
) -> Float[Tensor, " batch"]:
    """Kullback-Leibler divergence of the predictions from the clean ones, in nats.

    The mean over all predictions of an image, those of every patch and label set, whether labelled or not.

    Args:
        output: logits [batch, class], or [batch, ..., class] where there are several predictions an image.
        clean: those of the clean run.
        n_sets: equal groups of the last axis, each a prediction with a softmax of its own.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[50.0, 0.0]]))  # from sure to undecided: log 2
        tensor([0.6931])
    """
    now, then = (_log_probabilities(logits, n_sets) for logits in (output, clean))
    return (then.exp() * (then - now)).sum(-1).mean(1)


def agreement(
    output: Float[Tensor, "batch *out"],
    clean: Float[Tensor, "batch *out"],
    n_sets: int = 1,
) -> Float[Tensor, " batch"]:
    """Share of all predictions of an image whose most likely class is the clean run's; arguments as for `divergence`.

    Example:
        >>> agreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
        tensor([1., 0.])
    """
    now, then = (_log_probabilities(logits, n_sets) for logits in (output, clean))
    same = (now.argmax(-1) == then.argmax(-1)).float()
    unknown = now.isnan().any(-1) | then.isnan().any(-1)
    return same.masked_fill(unknown, torch.nan).mean(1)


def accuracy(output: Float[Tensor, "batch *out"], labels: Int[Tensor, "..."]) -> Float[Tensor, " batch"]:
    """Share of an image's labels that are the most likely class, 0 to 1; NaN for an image without labels.

    Args:
        output: logits [batch, class], or [batch, ..., class] where there are several predictions an image.
        labels: as the output's leading axes say, or with one more axis for several equal groups of classes; -1 where
            there is none.

    Raises:
        ShapeError: the labels do not fit.

    Example:
        >>> accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, -1]))
        tensor([1., 0., nan])
    """
    now = _log_probabilities(output, _label_sets(output, labels))
    right = (now.argmax(-1) == _flat(labels, now)).float()
    return _mean(right.masked_fill(now.isnan().any(-1), torch.nan), labels)


def cross_entropy(output: Float[Tensor, "batch *out"], labels: Int[Tensor, "..."]) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of an image's labels, in nats; arguments as for `accuracy`.

    Raises:
        ShapeError: the labels do not fit, or name a class that the output does not have.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -1]))
        tensor([1.3863,    nan])
    """
    now = _log_probabilities(output, _label_sets(output, labels))
    flat = _flat(labels, now)
    if int(flat.max()) >= now.shape[-1]:
        raise ShapeError(f"Label {int(flat.max())} does not exist: the output has classes 0 to {now.shape[-1] - 1}.")
    return _mean(-now.gather(-1, flat.clamp_min(0)[..., None])[..., 0], labels)


def _label_sets(output: Float[Tensor, "batch *out"], labels: Int[Tensor, "..."]) -> int:
    """How many label sets the labels have."""
    n_sets = labels.shape[-1] if labels.ndim == output.ndim else 1
    expected = (*output.shape[:-1], n_sets) if labels.ndim == output.ndim else output.shape[:-1]
    if labels.shape != expected or output.shape[-1] % n_sets:
        raise ShapeError(
            f"Labels of shape {list(labels.shape)} do not fit an output of shape {list(output.shape)}: "
            f"expected one label for each prediction, or one for each of several equal groups of classes on a "
            f"last axis; -1 where there is none."
        )
    return n_sets


def _log_probabilities(output: Float[Tensor, "batch *out"], n_sets: int) -> Float[Tensor, "batch prediction class"]:
    return output.float().unflatten(-1, (n_sets, -1)).log_softmax(-1).flatten(1, -2)


def _flat(labels: Int[Tensor, "..."], like: Float[Tensor, "batch prediction class"]) -> Int[Tensor, "batch prediction"]:
    return labels.to(like.device).reshape(like.shape[:-1])


def _mean(values: Float[Tensor, "batch prediction"], labels: Int[Tensor, "..."]) -> Float[Tensor, " batch"]:
    """Over those of an image's predictions that have a label."""
    there: Bool[Tensor, "batch prediction"] = (labels.to(values.device) >= 0).reshape(values.shape)
    return values.where(there, 0).sum(1) / there.sum(1)
