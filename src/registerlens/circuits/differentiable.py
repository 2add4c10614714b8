"""Metrics with a slope at the clean run: what first-order screening can see.

First order sees what changes in proportion to a small edit. Every distance to the clean run (KL divergence, cosine,
squared distance) has its extremum at the clean run, so that its gradient there is zero and says nothing; a projection
on a fixed direction is the linear thing to ask instead. The direction must not be the token's own: after a LayerNorm a
token has (but for the weights) a constant norm, so that its projection on itself is a cosine again.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.detection import detect
from registerlens.data.batches import Images
from registerlens.engine.views import View
from registerlens.errors import ConfigError, ShapeError, close_matches
from registerlens.evaluation.metrics import Metric
from registerlens.model.sublayers import sublayer_of
from registerlens.model.vit import HookedViT


@runtime_checkable
class Measure(Protocol):
    """A function of (edited, clean) that is differentiable in `edited`; through `clean` no gradient flows."""

    def __call__(self, edited: View, clean: View, /) -> Float[Tensor, " batch"]:
        """One number an image."""
        ...


def largest_norm(sublayer: str) -> Metric:
    """The largest patch norm of an image after a sublayer such as "5.mlp".

    Example:
        >>> largest_norm("5.mlp").norms
        ('5.mlp',)
    """

    def measure(edited: View, clean: View) -> Float[Tensor, " batch"]:
        return edited.norms[sublayer][:, edited.layout.patches].amax(1)

    return Metric(
        name="largest_norm", measure=measure, norms=(sublayer,), words=f"the largest patch norm after {sublayer}"
    )


def cross_entropy() -> Metric:
    """The cross-entropy of the model's logits with the labels, in nats; NaN where the label is -1.

    Example:
        >>> cross_entropy().words
        'the cross-entropy with the labels, in nats'
    """

    def measure(edited: View, clean: View) -> Float[Tensor, " batch"]:
        logits, labels = _logits(edited, "cross_entropy"), edited.labels
        if labels is None or labels.ndim != 1:
            raise ShapeError("Metric 'cross_entropy' needs one label an image: pass labels=, a tensor [image].")
        _check_classes(labels, logits)
        loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=-1, reduction="none")
        return torch.where(labels < 0, torch.nan, loss)

    return Metric(name="cross_entropy", measure=measure, words="the cross-entropy with the labels, in nats")


def class_logit() -> Metric:
    """The logit of the image's label or, without labels, of the class that the clean run prefers.

    Example:
        >>> class_logit().name
        'class_logit'
    """

    def measure(edited: View, clean: View) -> Float[Tensor, " batch"]:
        logits = _logits(edited, "class_logit")
        chosen = _logits(clean, "class_logit").argmax(1) if edited.labels is None else edited.labels.long()
        if chosen.ndim != 1:
            raise ShapeError(f"Metric 'class_logit' needs one label an image, got labels {list(chosen.shape)}.")
        _check_classes(chosen, logits)
        logit = logits.float().gather(1, chosen.clamp_min(0)[:, None])[:, 0]
        return torch.where(chosen < 0, torch.nan, logit)

    return Metric(
        name="class_logit", measure=measure, words="the logit of the label, else of the clean run's first class"
    )


def cls_projection() -> Metric:
    """How far [CLS] stands out from the patches: its projection, after the final norm, on a direction of the clean run.

    The direction goes from the mean patch to [CLS]. Of a change of [CLS] it sees the part along it; the cosine and the
    distance to the clean [CLS], and its projection on itself, have no slope at the clean run.

    Example:
        >>> cls_projection().name
        'cls'
    """

    def measure(edited: View, clean: View) -> Float[Tensor, " batch"]:
        if edited.layout.cls is None:
            raise ConfigError("Metric 'cls' needs a [CLS] token, and this model has none. Use 'largest_norm'.")
        own, patches = clean.tokens[:, clean.layout.cls].float(), clean.tokens[:, clean.layout.patches].float()
        direction = F.normalize(own - patches.mean(1), dim=-1)
        return (edited.tokens[:, edited.layout.cls].float() * direction).sum(-1)

    return Metric(name="cls", measure=measure, words="[CLS] along its clean difference from the mean patch")


NAMED: dict[str, Callable[[], Metric]] = {
    "cross_entropy": cross_entropy,
    "class_logit": class_logit,
    "cls": cls_projection,
}
"""Metrics that need no more than their name; "largest_norm" needs to know where."""


def metric_of(metric: str | Metric | Measure, vit: HookedViT, images: Images, batch_size: int) -> Metric:
    """The metric a caller means: by name ("largest_norm", "largest_norm@5.mlp", ...), or a function of their own.

    "largest_norm" alone stands for the place where the evidence for outliers is strongest, for which it traces the
    images once.

    Raises:
        ConfigError: there is no metric of that name.
        ShapeError: there is no such sublayer.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> metric_of("largest_norm@1.mlp", vit, torch.rand(2, 3, 48, 48), 2).norms
        ('1.mlp',)
    """
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        if not callable(metric):
            raise ConfigError(f"A metric is a name, a Metric or a function of (edited, clean), got {metric!r}.")
        name = getattr(metric, "__name__", type(metric).__name__)
        return Metric(name=name, measure=metric)
    name, _, place = metric.partition("@")
    if name == "largest_norm":
        return largest_norm(
            sublayer_of(place, vit.cfg.n_layers) if place else detect(vit, images, batch_size=batch_size).sublayer
        )
    if metric not in NAMED:
        known = ["largest_norm", *NAMED]
        meant = close_matches(metric, known)
        raise ConfigError(f"There is no differentiable metric {metric!r}.{meant} Known: {known}.")
    return NAMED[metric]()


def _logits(view: View, metric: str) -> Float[Tensor, "batch class"]:
    if view.output.ndim != 2:
        raise ShapeError(
            f"Metric '{metric}' needs logits [batch, class], and the model returns {list(view.output.shape)}."
        )
    return view.output


def _check_classes(labels: Tensor, logits: Float[Tensor, "batch class"]) -> None:
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise ShapeError(f"Label {int(labels.max())} does not exist: the model has classes 0 to {logits.shape[1] - 1}.")
