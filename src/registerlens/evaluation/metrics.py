"""What is measured of each image under each condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Cutoff, Detection, after_onset
from registerlens.config import TokenLayout, ViTConfig
from registerlens.engine.views import View
from registerlens.errors import ConfigError, ShapeError, close_matches
from registerlens.evaluation.observe import METRICS, accuracy, agreement, classifies, cross_entropy, divergence
from registerlens.model.sublayers import sublayers
from registerlens.model.vit import HookedViT
from registerlens.stats.histograms import medians

COLUMNS = ("condition", "shard", "image")
"""Columns of a result that are no metrics."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number for each image of a batch.

    Example:
        >>> drift = Metric(name="drift", measure=lambda edited, clean: (edited.output - clean.output).norm(dim=-1))
        >>> drift.name
        'drift'
    """

    name: str
    """A column of the result."""
    measure: Callable[[View, View], Float[Tensor, " batch"]] = field(repr=False)
    """From (edited, clean) to one number an image, all images at once and each on its own: a batch may hold an image
    several times, under several conditions. NaN where an image has no such number."""
    norms: tuple[str, ...] = ()
    """Sublayers whose residual norms it looks at, named as in a trace: "embed", "3.attn", "3.mlp"."""
    attention: tuple[int, ...] = ()
    """Layers whose attention it looks at."""
    words: str = ""
    """The metric in words, with its unit."""


@dataclass(frozen=True)
class _WithLayout:
    """A function of (edited, clean, layout) as `Metric.measure` takes it; it can be sent to a worker."""

    function: Callable[[View, View, TokenLayout], Tensor]

    def __call__(self, edited: View, clean: View) -> Tensor:
        return self.function(edited, clean, edited.layout)


def metric(
    function: Callable[[View, View, TokenLayout], Tensor],
    *,
    name: str = "",
    norms: Sequence[str] = (),
    attention: Sequence[int] = (),
    words: str = "",
) -> Metric:
    """A metric of your own, from a function of (edited, clean, layout).

    Args:
        function: takes two `View`s, the edited and the clean run, and the edited run's `TokenLayout`; gives one number
            an image, [batch]. To be sent to worker processes it must be defined in a module.
        name: column of the result; default: the function's name.
        norms: sublayers whose residual norms the views shall have, such as "3.mlp".
        attention: layers whose attention they shall have.
        words: what it is, with its unit; default: the function's docstring.

    Example:
        >>> def drift(edited, clean, layout):
        ...     return (edited.tokens[:, layout.patches] - clean.tokens[:, layout.patches]).norm(dim=-1).amax(1)
        >>> metric(drift).name
        'drift'
    """
    name = name or getattr(function, "__name__", "")
    words = words or (getattr(function, "__doc__", None) or "").strip().partition("\n")[0]
    return Metric(name=name, measure=_WithLayout(function), norms=tuple(norms), attention=tuple(attention), words=words)


def check_metrics(metrics: Sequence[Metric], cfg: ViTConfig) -> None:
    """Refuse metrics that share a name, or look where the model has nothing.

    Raises:
        ConfigError: a name is empty, taken or used twice, or a sublayer or layer does not exist.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> check_metrics([largest_norm("6.mlp")], vit.cfg)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        registerlens.errors.ConfigError: Metric 'largest_norm' looks at the norms of '6.mlp', but the model has ...
    """
    names = [each.name for each in metrics]
    for each in metrics:
        if not each.name or each.name in COLUMNS:
            raise ConfigError(f"A metric needs a name of its own, other than {list(COLUMNS)}; got {each.name!r}.")
        if names.count(each.name) > 1:
            raise ConfigError(f"Two metrics are named {each.name!r}: every one is a column, so names must differ.")
        known, last = sublayers(cfg.n_layers), cfg.n_layers - 1
        for place in each.norms:
            if place not in known:
                raise ConfigError(
                    f"Metric {each.name!r} looks at the norms of {place!r}, but the model has blocks 0 to {last}, with "
                    f"sublayers such as 'embed', '0.attn', '{last}.mlp'.{close_matches(place, known)}"
                )
        wrong = [layer for layer in each.attention if not 0 <= layer <= last]
        if wrong:
            raise ConfigError(
                f"Metric {each.name!r} looks at the attention of layers {wrong}, but the model has blocks 0 to {last}."
            )


def measured(metrics: Sequence[Metric], edited: View, clean: View) -> Float[Tensor, "metric batch"]:
    """Every metric of a batch, in float64 on the CPU.

    Raises:
        ShapeError: a metric gives something else than one number an image.
    """
    n, device = len(edited.output), edited.output.device
    rows = []
    for one in metrics:
        try:
            row = one.measure(edited, clean)
        except Exception as error:
            error.add_note(f"This happened in the metric {one.name!r}.")
            raise
        if not isinstance(row, Tensor) or row.shape != (n,) or row.is_complex():
            got = f"a tensor of shape {list(row.shape)}" if isinstance(row, Tensor) else f"a {type(row).__name__}"
            raise ShapeError(
                f"Metric {one.name!r} gave {got} for a batch of {n}. It must give one number for each image, a tensor "
                f"of shape [{n}]."
            )
        rows.append(row.to(device, torch.promote_types(row.dtype, torch.float32)))
    if not rows:
        return torch.empty(0, n, dtype=torch.float64)
    return torch.stack(rows).cpu().double()


# Built in ------------------------------------------------------------------------------------------------------------


def default_metrics(vit: HookedViT, *, detection: Detection | None = None, labels: bool = False) -> tuple[Metric, ...]:
    """The metrics that a model has: norms, sinks, and how far tokens and predictions move from the clean run.

    Args:
        vit: the model.
        detection: where its outliers show, as `rl.find_outliers(vit, images).detection` says. Without it, or where it
            says that there are none, outliers and sinks are left out.
        labels: whether the images have labels.

    Returns:
        of these, those that make sense: largest_norm, outliers, sink_outliers, sink_patch, cos_cls, cos_patches,
        cos_output, kl, agreement, cross_entropy, accuracy.

    Source: Jiang et al. 2025, figures 4 and 8; `evaluate_intervention` measures the same in the same units.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> [one.name for one in default_metrics(vit)]
        ['largest_norm', 'cos_patches', 'kl', 'agreement']
    """
    cfg = vit.cfg
    place = f"{cfg.n_layers - 1}.mlp" if detection is None else detection.sublayer
    chosen = [largest_norm(place)]
    if detection is not None and (detection.evidence.present or detection.rule == "fixed"):
        layers = tuple(after_onset(detection, cfg.n_layers))
        chosen += [
            outliers(place, detection.cutoff),
            sink_outliers(place, detection.cutoff, layers),
            sink_patch(layers),
        ]
    chosen += [COS_CLS] if cfg.layout().cls is not None else []
    chosen += [_COS_PATCHES]
    chosen += [_COS_OUTPUT] if cfg.pooling else []
    chosen += _predictions(cfg.n_label_sets) if labels or classifies(cfg) else []
    return tuple(chosen + (_LABELLED if labels else []))


def largest_norm(place: str) -> Metric:
    """Largest patch norm at a sublayer, in units of the clean image's median patch norm there."""
    words = f"largest patch norm at {place}, in units of the clean image's median"
    return Metric(name="largest_norm", measure=partial(_largest_norm, place), norms=(place,), words=words)


def outliers(place: str, cutoff: Cutoff) -> Metric:
    """How many patches are outliers; a relative cut-off counts in the clean image's median."""
    words = f"outlier patches an image: above {_in_words(cutoff)} at {place}"
    return Metric(name="outliers", measure=partial(_outliers, place, cutoff), norms=(place,), words=words)


def sink_outliers(place: str, cutoff: Cutoff, layers: Sequence[int]) -> Metric:
    """Attention to all patches that are outliers in the clean run; NaN for an image that has none."""
    words = (
        f"attention to all patches that in the clean run are outliers, above {_in_words(cutoff)} at {place}; mean over "
        f"heads and {_layers(layers)}, 0 to 1"
    )
    measure = partial(_sink_outliers, place, cutoff, tuple(layers))
    return Metric(name="sink_outliers", measure=measure, norms=(place,), attention=tuple(layers), words=words)


def sink_patch(layers: Sequence[int]) -> Metric:
    """Largest attention to one patch."""
    words = f"largest attention to one patch, mean over heads and {_layers(layers)}, 0 to 1"
    measure = partial(_sink_patch, tuple(layers))
    return Metric(name="sink_patch", measure=measure, attention=tuple(layers), words=words)


def _in_words(cutoff: Cutoff) -> str:
    return f"{cutoff.value:.6g} x the clean image's median norm" if cutoff.relative else f"norm {cutoff.value:.6g}"


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"


def patch_norms(view: View, place: str) -> Float[Tensor, "batch patch"]:
    """Residual norms of the patches at a sublayer that the view has."""
    return view.norms[place][:, view.layout.patches]


def _largest_norm(place: str, edited: View, clean: View) -> Float[Tensor, " batch"]:
    return patch_norms(edited, place).amax(1) / medians(patch_norms(clean, place))[:, 0]


def above(place: str, cutoff: Cutoff, view: View, clean: View) -> Bool[Tensor, "batch patch"]:
    """Which patches are outliers at a sublayer; a relative cut-off counts in the clean image's median."""
    return cutoff.above(patch_norms(view, place), patch_norms(clean, place))


def _outliers(place: str, cutoff: Cutoff, edited: View, clean: View) -> Float[Tensor, " batch"]:
    unknown = (patch_norms(edited, place) + patch_norms(clean, place)).isnan().any(1)
    return above(place, cutoff, edited, clean).sum(1).float().masked_fill(unknown, torch.nan)


def _drawn(layers: tuple[int, ...], view: View) -> Float[Tensor, "batch patch"]:
    """Attention that each patch draws, mean over heads and layers."""
    return torch.stack([view.attention[layer].mean(1) for layer in layers]).mean(0)[:, view.layout.patches]


def _sink_outliers(
    place: str, cutoff: Cutoff, layers: tuple[int, ...], edited: View, clean: View
) -> Float[Tensor, " batch"]:
    mask = above(place, cutoff, clean, clean)
    return (_drawn(layers, edited) * mask).sum(1).masked_fill(~mask.any(1), torch.nan)


def _sink_patch(layers: tuple[int, ...], edited: View, clean: View) -> Float[Tensor, " batch"]:
    return _drawn(layers, edited).amax(1)


def _cos_cls(edited: View, clean: View) -> Float[Tensor, " batch"]:
    tokens = (view.tokens[:, view.layout.prefix][:, view.layout.cls or 0].float() for view in (edited, clean))
    return F.cosine_similarity(*tokens, dim=-1)


def _cos_patches(edited: View, clean: View) -> Float[Tensor, " batch"]:
    patches = (view.tokens[:, view.layout.patches].float() for view in (edited, clean))
    return F.cosine_similarity(*patches, dim=-1).mean(1)


def _cos_output(edited: View, clean: View) -> Float[Tensor, " batch"]:
    return F.cosine_similarity(edited.output.float(), clean.output.float(), dim=-1)


def _predictions(n_sets: int) -> list[Metric]:
    return [
        Metric(name="kl", measure=partial(_kl, n_sets), words=METRICS["kl"]),
        Metric(name="agreement", measure=partial(_agreement, n_sets), words=_AGREEMENT),
    ]


def _kl(n_sets: int, edited: View, clean: View) -> Float[Tensor, " batch"]:
    return divergence(edited.output, clean.output, n_sets)


def _agreement(n_sets: int, edited: View, clean: View) -> Float[Tensor, " batch"]:
    return agreement(edited.output, clean.output, n_sets)


def _labels(view: View) -> Int[Tensor, "batch ..."]:
    if view.labels is None:
        raise ShapeError("Cross-entropy and accuracy need labels, and these images have none. Give labels=.")
    return view.labels


def _cross_entropy(edited: View, clean: View) -> Float[Tensor, " batch"]:
    return cross_entropy(edited.output, _labels(edited))


def _accuracy(edited: View, clean: View) -> Float[Tensor, " batch"]:
    return accuracy(edited.output, _labels(edited))


def _named(measure: Callable[[View, View], Tensor], words: str) -> Metric:
    return Metric(name=measure.__name__.removeprefix("_"), measure=measure, words=words)


COS_CLS = _named(_cos_cls, "cosine of the final [CLS] token to the clean run, -1 to 1")
_COS_PATCHES = _named(_cos_patches, "cosine of the final patch tokens to the clean run, mean over patches, -1 to 1")
_COS_OUTPUT = _named(_cos_output, "cosine of the pooled output to the clean run, -1 to 1")
_AGREEMENT = "share of all predictions, labelled or not, whose most likely class is the clean run's, 0 to 1"
_LABELLED = [
    _named(_cross_entropy, "cross-entropy of the labels, in nats"),
    _named(_accuracy, "share of labels predicted, 0 to 1"),
]
