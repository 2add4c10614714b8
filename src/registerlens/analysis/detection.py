"""Which patches are outliers: the place in the residual stream where they are clearest, a cut-off, and a mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.outliers import Answer, OutlierEvidence
from registerlens.analysis.trace import Trace, trace
from registerlens.data.batches import Images
from registerlens.engine.stream import batches
from registerlens.errors import ConfigError, NoOutliersError, ShapeError, close_matches
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import Sublayer, sublayer_of
from registerlens.model.vit import HookedViT
from registerlens.results import FINITE, ModelResult
from registerlens.stats.histograms import medians

if TYPE_CHECKING:
    import plotly.graph_objects as go

Rule = Literal["gap", "sigma", "mad", "fixed"]
Threshold = Literal["auto", "gap", "sigma", "mad"] | float | int
"""How the cut-off is chosen: "gap" ("auto" is the same), "sigma", "mad", or a residual norm."""

SIGMAS = 3.0
"""The rule "sigma" cuts at mean + this many standard deviations of all patch norms (Jiang et al. 2025, A.4)."""
MADS = 10.0
"""The rule "mad" cuts at median + this many median absolute deviations of all patch norms."""


@dataclass(frozen=True, kw_only=True)
class Cutoff:
    """Above which norm a patch is an outlier.

    Example:
        >>> Cutoff(value=2.0, relative=True).above(torch.tensor([[1.0, 1.0, 3.0]]))
        tensor([[False, False,  True]])
    """

    value: float
    """In units of the image's median patch norm if `relative`, else a residual norm."""
    relative: bool
    """Whether it scales with the image's median."""

    def above(
        self, norms: Float[Tensor, "image patch"], clean: Float[Tensor, "image patch"] | None = None
    ) -> Bool[Tensor, "image patch"]:
        """Which patches lie above it; `clean` has the norms whose median counts, so that edits do not move it."""
        if not self.relative:
            return norms > self.value
        return norms > self.value * medians(norms if clean is None else clean)

    def __str__(self) -> str:
        return f"{self.value:.3g} x the image's median norm" if self.relative else f"norm {self.value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Where to look for outliers, and how to tell them: what `find_outliers` and Algorithm 1 start from."""

    sublayer: Sublayer
    """Place in the residual stream: "embed", "5.attn", "5.mlp"."""
    cutoff: Cutoff
    """Above which a patch counts as an outlier there."""
    rule: Rule
    """How the cut-off was chosen."""
    onset: Sublayer | None
    """The sublayer at which the outliers there first arise; None where there are none or norms only drift apart."""
    onsets: tuple[Sublayer, ...]
    """Every onset of the whole model, whatever the place; `Trace.onsets` has their jumps."""
    evidence: OutlierEvidence
    """What the norms at that place say, whatever the rule."""

    @property
    def layer(self) -> int:
        """The block of the place; -1 for the embedding."""
        return self.sublayer.layer

    @property
    def hook_name(self) -> str:
        """The hook point of the place."""
        return self.sublayer.hook_name


@dataclass(frozen=True, kw_only=True, eq=False)
class Outliers(ModelResult):
    """Outlier patches of some images. [CLS], trained and test-time registers are never among them."""

    detection: Detection
    """Place, cut-off and evidence."""
    mask: Bool[Tensor, "image patch"]
    """Which patches are outliers; row by row over the grid."""
    norms: Float[Tensor, "image patch"] = field(metadata=FINITE)
    """Residual norm of each patch at the place."""
    grid: tuple[int, int]
    """Patches along height and width."""

    @property
    def verdict(self) -> Answer:
        """Whether the norms form a mode of outliers, whatever threshold was asked for."""
        return self.detection.evidence.verdict

    @property
    def layer(self) -> int:
        """The block after whose attention or MLP the norms were taken; -1 for the embedding."""
        return self.detection.layer

    @property
    def sublayer(self) -> Sublayer:
        """The place: "embed", "5.attn", "5.mlp"."""
        return self.detection.sublayer

    @property
    def threshold(self) -> float:
        """The cut-off; in units of the image's median norm for the rule "gap", else a norm."""
        return self.detection.cutoff.value

    @property
    def per_image(self) -> float:
        """Outliers per image."""
        return self.mask.sum().item() / len(self.mask)

    def describe(self) -> str:
        """The result in words."""
        evidence = self.detection.evidence
        flagged = f"{self.per_image:.2f} patches per image lie above {self.detection.cutoff} at {self.sublayer}"
        return f"Outlier tokens: {self.verdict} ({evidence.reason}); {flagged} (rule: {self.detection.rule})."

    def to_dataframe(self) -> pd.DataFrame:
        """One row an outlier patch: image, patch, row, column, norm, norm over the image's median."""
        image, patch = self.mask.nonzero().T.cpu().numpy()
        norms = self.norms.cpu()
        return pd.DataFrame(
            {
                "image": image,
                "patch": patch,
                "row": patch // self.grid[1],
                "column": patch % self.grid[1],
                "norm": norms[image, patch].numpy(),
                "relative_norm": (norms / medians(norms))[image, patch].numpy(),
            }
        )

    def plot(self) -> go.Figure:
        """Histogram of patch norms, outliers apart, with the cut-off."""
        from registerlens.viz.detection import norm_histogram

        return norm_histogram(self)


def find_outliers(
    vit: HookedViT,
    images: Images,
    *,
    layer: Literal["auto"] | int | str = "auto",
    threshold: Threshold = "auto",
    batch_size: int = 16,
) -> Outliers:
    """Which patches are outliers, where that shows best, and whether there are any at all.

    Two passes: one finds the place and the cut-off, the other takes the norms there.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or batches of one size that can be iterated twice.
        layer: a block (after its MLP), a sublayer such as "5.attn", or "auto": where the evidence is strongest. That
            need not be the last layer, where the norm of outliers may drop.
        threshold: "gap" (the default) is the middle of the gap between the two modes of norms, relative to each image's
            median; "sigma" is mean + 3 standard deviations and "mad" median + 10 median absolute deviations of all
            patch norms, which flag something in every model; a number is a residual norm.
        batch_size: images at once when a tensor is given.

    Returns:
        the mask with its evidence. Unless the verdict is "present", the rule "gap" flags nothing.

    Raises:
        ImageError: there are no images, or they could be iterated only once.
        ShapeError: the layer does not exist, or the images differ in size.
        ConfigError: an unknown rule, or a threshold that is not above 0.

    Source: Jiang et al. 2025, section 3 and appendix A.4; Darcet et al. 2024 for fixed thresholds.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import FLAT, synthetic_images
        >>> vit, batch = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0)
        >>> found = find_outliers(vit, batch.images)
        >>> found.verdict, bool((found.mask == (batch.roles == FLAT)).all())
        ('present', True)
    """
    detection = detect(vit, images, layer=layer, threshold=threshold, batch_size=batch_size)
    norms, grid = _norms_at(vit, images, detection.sublayer, batch_size)
    return Outliers(
        **vit.identity,
        detection=detection,
        mask=detection.cutoff.above(norms),
        norms=norms,
        grid=grid,
    )


def detect(
    vit: HookedViT,
    images: Images,
    *,
    layer: Literal["auto"] | int | str = "auto",
    threshold: Threshold = "auto",
    batch_size: int = 16,
    traced: Trace | None = None,
) -> Detection:
    """Place, cut-off and evidence; arguments and errors as `find_outliers`; `traced` spares a trace of these images.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> found = detect(rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images)
        >>> found.onset, found.cutoff.relative
        ('1.mlp', True)
    """
    rule = _rule_of(threshold)
    place = None if layer == "auto" else sublayer_of(layer, vit.cfg.n_layers)
    by_gap = detection_in(traced or trace(vit, images, batch_size=batch_size), place)
    if rule == "gap":
        return by_gap
    if isinstance(threshold, str):
        value = _flagging(rule, _norms_at(vit, images, by_gap.sublayer, batch_size)[0])
    else:
        value = float(threshold)
    return replace(by_gap, rule=rule, cutoff=Cutoff(value=value, relative=False))


def detection_in(traced: Trace, sublayer: Sublayer | None = None) -> Detection:
    """What a trace says, by the gap: at one sublayer, or (None) where the evidence is strongest.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> found = rl.trace(rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images)
        >>> detection_in(found).sublayer, detection_in(found, found.onset).sublayer
        ('5.mlp', '1.mlp')
    """
    sublayer = sublayer or traced.strongest
    evidence = traced.evidence[traced.sublayers.index(sublayer)]
    return Detection(
        sublayer=sublayer,
        cutoff=Cutoff(value=evidence.threshold if evidence.present else float("inf"), relative=True),
        rule="gap",
        onset=traced.onset_before(sublayer),
        onsets=tuple(one.sublayer for one in traced.onsets),
        evidence=evidence,
    )


def cuts_in(traced: Trace) -> dict[Sublayer, Cutoff]:
    """Above which norm patches are outliers, wherever some are present.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> found = rl.trace(rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images)
        >>> list(cuts_in(found))[:2]
        ['1.mlp', '2.attn']
    """
    return {
        place: Cutoff(value=evidence.threshold, relative=True)
        for place, evidence in zip(traced.sublayers, traced.evidence, strict=True)
        if evidence.present
    }


def require_outliers(detection: Detection, purpose: str) -> None:
    """Go on only where there are outliers, or where the caller insists on a threshold of their own.

    Raises:
        NoOutliersError: outliers are absent or the images too few to tell, and the cut-off is not a number the caller
            gave.
    """
    evidence = detection.evidence
    if evidence.present or detection.rule == "fixed":
        return
    if evidence.more_images:
        found = f"these images are too few to tell whether there are any at {detection.sublayer}"
        todo = f"Give about {evidence.more_images} more, or"
    else:
        found, todo = f"there are none at {detection.sublayer}", "See rl.trace(vit, images).plot() for every layer, or"
    raise NoOutliersError(
        f"{purpose} needs outlier tokens, and {found}: {evidence.reason}. {todo} insist on a cut-off of your own with "
        f"threshold=<norm>.",
        evidence,
    )


def _rule_of(threshold: str | float | int) -> Rule:
    if isinstance(threshold, str):
        rules = {"auto": "gap", "gap": "gap", "sigma": "sigma", "mad": "mad"}
        if threshold not in rules:
            raise ConfigError(
                f"threshold must be a norm or one of {list(rules)}, got {threshold!r}.{close_matches(threshold, rules)}"
            )
        return rules[threshold]  # type: ignore[return-value]
    if not threshold > 0:
        raise ConfigError(f"A threshold is a residual norm above 0, got {threshold}.")
    return "fixed"


def _flagging(rule: Rule, norms: Float[Tensor, "image patch"]) -> float:
    """The norm above which the rules "sigma" and "mad" flag a patch."""
    if rule == "sigma":
        return float(norms.double().mean() + SIGMAS * norms.double().std())
    every = norms.flatten()
    return float(medians(every) + MADS * medians((every - medians(every)).abs()))


def _norms_at(
    vit: HookedViT, images: Images, sublayer: str, batch_size: int
) -> tuple[Float[Tensor, "image patch"], tuple[int, int]]:
    norms: list[Tensor] = []
    grids: set[tuple[int, int]] = set()
    with torch.inference_mode():
        for batch in batches(vit, images, batch_size, "finding outliers"):
            grids.add(batch.layout.grid)
            norms.append(patch_norms(vit, batch.images, sublayer).cpu())
    if len(grids) > 1:
        raise ShapeError(
            f"One mask [image, patch] needs images of one size, got grids {sorted(grids)}. Call once for each size, or "
            f"load with size=..."
        )
    return torch.cat(norms).clone(), grids.pop()


def patch_norms(
    vit: HookedViT, batch: Float[Tensor, "batch channel height width"], sublayer: str
) -> Float[Tensor, "batch patch"]:
    """Residual norms of the patches at a sublayer, float32, in a pass that stops there.

    Example:
        >>> import registerlens as rl
        >>> patch_norms(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48), "1.mlp").shape
        torch.Size([2, 36])
    """
    norms: list[Tensor] = []
    patches = vit.layout(batch).patches
    place = Sublayer(sublayer)
    hook: Any = (place.hook_name, lambda resid, hook: norms.append(token_norms(resid[:, patches])))
    with vit.hooks([hook]):
        vit(batch.to(vit.device), stop_at_layer=max(place.layer, 0) + 1)
    return norms[0]


def after_onset(detection: Detection, n_layers: int) -> range:
    """The layers in which attention meets the outliers: those after the onset, or the last one.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> found = detect(rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images)
        >>> found.onset, after_onset(found, 6)
        ('1.mlp', range(2, 6))
    """
    onset = detection.onset or detection.sublayer
    return range(min(onset.layer + 1, n_layers - 1), n_layers)


# Names of places -----------------------------------------------------------------------------------------------------
