"""Predictions image by image: how far they moved from another run's, and how right they are."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.config import ViTConfig
from registerlens.errors import ShapeError


def classifies(cfg: ViTConfig) -> bool:
    """Whether the output are logits of classes, rather than a projection or a pooled token."""
    return cfg.d_out is not None and cfg.head_bias and cfg.head_act is None


def divergence(
    output: Float[Tensor, "batch *out"],
    clean: Float[Tensor, "batch *out"],
    labels: Int[Tensor, "..."] | None = None,
) -> Float[Tensor, " batch"]:
    """Kullback-Leibler divergence of the predictions from the clean ones, in nats; mean over an image's predictions.

    With labels, over those that have one; NaN for an image without any.

    Args:
        output: logits [batch, class], or [batch, ..., class] where there are several predictions an image.
        clean: those of the clean run.
        labels: as the output's leading axes say, or with one more axis for several equal groups of classes; -1 where
            there is none.

    Raises:
        ShapeError: the labels do not fit.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[50.0, 0.0]]))  # from sure to undecided: log 2
        tensor([0.6931])
    """
    now, then = (_log_probabilities(logits, labels) for logits in (output, clean))
    return _mean((then.exp() * (then - now)).sum(-1), labels)


def agreement(
    output: Float[Tensor, "batch *out"],
    clean: Float[Tensor, "batch *out"],
    labels: Int[Tensor, "..."] | None = None,
) -> Float[Tensor, " batch"]:
    """Share of an image's predictions whose most likely class is the clean run's; arguments as for `divergence`.

    Example:
        >>> agreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
        tensor([1., 0.])
    """
    now, then = (_log_probabilities(logits, labels) for logits in (output, clean))
    same = (now.argmax(-1) == then.argmax(-1)).float()
    unknown = now.isnan().any(-1) | then.isnan().any(-1)
    return _mean(same.masked_fill(unknown, torch.nan), labels)


def accuracy(output: Float[Tensor, "batch *out"], labels: Int[Tensor, "..."]) -> Float[Tensor, " batch"]:
    """Share of an image's labels that are the most likely class, 0 to 1; NaN for an image without labels.

    Example:
        >>> accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, -1]))
        tensor([1., 0., nan])
    """
    now = _log_probabilities(output, labels)
    right = (now.argmax(-1) == _flat(labels, now)).float()
    return _mean(right.masked_fill(now.isnan().any(-1), torch.nan), labels)


def cross_entropy(output: Float[Tensor, "batch *out"], labels: Int[Tensor, "..."]) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of an image's labels, in nats; NaN for an image without labels.

    Raises:
        ShapeError: the labels do not fit, or name a class that the output does not have.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -1]))
        tensor([1.3863,    nan])
    """
    now = _log_probabilities(output, labels)
    flat = _flat(labels, now)
    if int(flat.max()) >= now.shape[-1]:
        raise ShapeError(f"Label {int(flat.max())} does not exist: the output has classes 0 to {now.shape[-1] - 1}.")
    return _mean(-now.gather(-1, flat.clamp_min(0)[..., None])[..., 0], labels)


def _log_probabilities(
    output: Float[Tensor, "batch *out"], labels: Int[Tensor, "..."] | None
) -> Float[Tensor, "batch prediction class"]:
    groups = 1
    if labels is not None:
        groups = labels.shape[-1] if labels.ndim == output.ndim else 1
        expected = (*output.shape[:-1], groups) if labels.ndim == output.ndim else output.shape[:-1]
        if labels.shape != expected or output.shape[-1] % groups:
            raise ShapeError(
                f"Labels of shape {list(labels.shape)} do not fit an output of shape {list(output.shape)}: "
                f"expected one label for each prediction, or one for each of several equal groups of classes on a "
                f"last axis; -1 where there is none."
            )
    return output.float().unflatten(-1, (groups, -1)).log_softmax(-1).flatten(1, -2)


def _flat(labels: Int[Tensor, "..."], like: Float[Tensor, "batch prediction class"]) -> Int[Tensor, "batch prediction"]:
    return labels.to(like.device).reshape(like.shape[:-1])


def _mean(values: Float[Tensor, "batch prediction"], labels: Int[Tensor, "..."] | None) -> Float[Tensor, " batch"]:
    """Over an image's predictions; with labels, over those that have one."""
    if labels is None:
        return values.mean(1)
    there: Bool[Tensor, "batch prediction"] = (labels.to(values.device) >= 0).reshape(values.shape)
    return values.where(there, 0).sum(1) / there.sum(1)
