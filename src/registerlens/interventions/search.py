"""Find register neurons: Algorithm 1, with its three hyperparameters chosen from the data unless they are given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from registerlens.analysis.detection import (
    Detection,
    Threshold,
    cuts_in,
    detect,
    detection_in,
    require_outliers,
)
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.scores import SCORES, Keep, NeuronScores, Score, score_neurons
from registerlens.analysis.top_outliers import NormsAndActivations
from registerlens.analysis.trace import Trace, trace
from registerlens.data.batches import Counted, Images, count, first_and_all
from registerlens.errors import ConfigError, ImageError, NoOutliersError, check_choice
from registerlens.interventions.choosing_k import MIN_DROP, Cuts, drop_needless, find_elbow, sweep
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.interventions.search_record import NeuronSearch
from registerlens.model.sublayers import sublayers
from registerlens.model.vit import HookedViT
from registerlens.stats.histograms import bin_edges

FEWEST_FIRST, MOST_FIRST = 8, 64
"""Place, cut-off and onset are found on an eighth of the images, but on no fewer and no more than these; on the most if
nobody knows how many images will come."""
HELD_OUT = 32
"""Most images held back for the sweep: a quarter of those there are, up to this many."""
FAR = 4
"""More neurons than this many times the elbow are not believed without a warning."""
MOST_TRIED = 32
"""A sweep that asks for more than these, where there is an elbow, has run away: the elbow counts, and what is left is
searched for again."""


def find_register_neurons(
    vit: HookedViT,
    images: Images,
    *,
    layer: Literal["auto"] | int | str = "auto",
    threshold: Threshold = "auto",
    lowest_layer: int = 0,
    top_layer: Literal["auto"] | int = "auto",
    top_k: Literal["auto"] | int = "auto",
    score: Score = "mean",
    keep: Keep = "telling",
    early_stop: bool = True,
    batch_size: int = 16,
) -> RegisterNeurons:
    """The neurons that decide where outliers appear: those most active at outlier patches.

    The first eighth of the images (at least 8, at most 64) goes through the whole model to find the place where
    outliers show best, their cut-off and their onset; then the others go as far as they must. Where outliers are not
    evident in the first images, all are looked at. With `top_k="auto"`, a quarter of the images (at most 32) is held
    back for the sweep and does not count for the scores; then the first 64 images go through the model with these
    neurons moved, and where outliers are left or new at any sublayer, they are searched for again there.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or batches of them; memory does not grow with their number.
        layer: where the norms of outliers are taken: a block, a sublayer, or "auto"; as for `find_outliers`.
        threshold: above which norm a patch is an outlier there. A number overrides a verdict of "absent".
        lowest_layer: the first layer whose neurons count; early layers can hold content.
        top_layer: the last one; "auto" is the layer at which outliers first emerge, and rises to where others do.
        top_k: how many neurons; "auto" takes the larger of two estimates: the elbow (largest relative drop) of the
            sorted scores, and the paper's sweep: upward by doubling, then bisection, until a test-time register leaves
            no outlier on the held-out images, at whatever sublayer.
        score: what ranks them: "mean" (Algorithm 1), "mean_abs", "contrast", "auc"; see `NeuronScores`.
        keep: which neurons may be register neurons: "telling", "sparse" or "all"; see `NeuronScores.candidates`.
        early_stop: leave out the layers after the last one that matters. The result is the same.
        batch_size: images at once when a tensor is given.

    Returns:
        the neurons, most important first; `.warnings` says what speaks against the choice, `.search` has all scores,
        curves and estimates.

    Raises:
        NoOutliersError: the model has no outliers on these images, or they are too few to tell, and how many to add; it
            carries the evidence.
        ConfigError: a layer, a number or a name is out of range, or no number of neurons suggests itself.
        ImageError: there are no images.

    Source: Jiang et al. 2025, algorithm 1 and appendix A.4.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> rl.find_register_neurons(vit, synthetic_images(128, 0).images).by_layer()
        {1: (183, 103, 219, 125, 55, 128, 177)}
    """
    _check(vit, lowest_layer, top_layer, top_k, score, keep)
    parts = _divide(images, check=top_k == "auto", batch_size=batch_size)
    options: dict[str, Any] = {"layer": layer, "threshold": threshold, "batch_size": batch_size}
    highest = vit.cfg.n_layers - 1 if top_layer == "auto" else top_layer
    traced, seen = _trace_first(vit, parts, range(lowest_layer, highest + 1))
    detection = detect(vit, parts.first, traced=traced, **options)
    if not detection.evidence.present and detection.rule != "fixed" and parts.more and _again(images):
        traced = trace(vit, images, batch_size=batch_size)  # outliers may be too rare for the first images
        detection = detect(vit, images, traced=traced, **options)
    require_outliers(detection, "Finding register neurons")
    choice = _Choice(top_layer=top_layer, lowest_layer=lowest_layer, top_k=top_k, score=score, keep=keep)
    cuts = cuts_in(traced) | {detection.sublayer: detection.cutoff}
    search = choice.make(vit, detection, cuts, parts.rest, parts.held_out, early_stop=early_stop, seen=seen)
    _check_still_present(detection, search.scores)
    if top_k == "auto":
        search = _go_on(vit, parts.kept, search, cuts, choice)
    return RegisterNeurons(
        pairs=tuple(search.chosen),
        scores=tuple(search.chosen.values()),
        source=f"found in {vit.source}",
        found=search.summary(),
        search=search,
    )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What was asked for, and how one search follows from it."""

    top_layer: Literal["auto"] | int
    lowest_layer: int
    top_k: Literal["auto"] | int
    score: Score
    keep: Keep

    def make(
        self, vit: HookedViT, detection: Detection, cuts: Cuts, images: Images, held_out: list[Tensor], **options: Any
    ) -> NeuronSearch:
        last = _top_layer(detection, self.top_layer, self.lowest_layer)
        scores = score_neurons(vit, images, detection, lowest_layer=self.lowest_layer, top_layer=last, **options)
        ranked = scores.ranked(self.score, keep=self.keep)
        if not ranked:
            raise ConfigError(
                f"No neuron of blocks {self.lowest_layer} to {last} is much more active at outliers than at normal "
                f"patches. Search other blocks with lowest_layer and top_layer, or rank all neurons with keep='all'."
            )
        values = [value for _, _, value in ranked]
        # What is no candidate counts as silent, so that all candidates may be register neurons.
        ending = [] if self.keep == "all" else [0.0]
        elbow = None if self.score == "auc" else find_elbow(values + ending)
        swept = sweep(vit, held_out, ranked, cuts)
        chosen = max(elbow or 0, swept.k or 0) or swept.best if self.top_k == "auto" else min(self.top_k, len(ranked))
        if not chosen:
            raise ConfigError(f"The scores have no elbow that tells how many neurons ({swept.note}). Give top_k.")
        taken = ranked[:chosen]
        if elbow and self.top_k == "auto" and chosen > elbow:
            # Between neurons that fire on few of the outliers each stand others that do nothing.
            taken = drop_needless(vit, held_out, taken, elbow, cuts) if chosen <= MOST_TRIED else ranked[:elbow]
        warnings = []
        if elbow is None and self.score != "auc":
            warnings.append(f"the scores have no elbow: from one to the next they fall by less than {MIN_DROP} times")
        elif elbow and max(len(taken), swept.k or 0) > FAR * elbow:
            warnings.append(f"{max(len(taken), swept.k or 0)} neurons are far more than the elbow suggests ({elbow})")
        return NeuronSearch(
            **vit.identity,
            detection=detection,
            scores=scores,
            score=self.score,
            keep=self.keep,
            lowest_layer=self.lowest_layer,
            top_layer=last,
            taken=tuple((layer, neuron) for layer, neuron, _ in taken),
            elbow=elbow,
            sweep=swept.k,
            sweep_curve=swept.curve,
            sweep_note=swept.note,
            warnings=tuple(warnings),
        )


def _go_on(vit: HookedViT, kept: list[Tensor], first: NeuronSearch, cuts: Cuts, choice: _Choice) -> NeuronSearch:
    """Search again in the model whose neurons found so far are moved, until no outlier is left or none is found."""
    search, remaining, place = first, math.inf, ""
    more: NeuronSearch | None = None
    while True:
        tried = search if more is None else replace(search, later=(*search.later, more))
        with vit.edit(TestTimeRegisters(RegisterNeurons.from_pairs(tried.chosen))):
            traced = trace(vit, kept)
            left = _left(traced, cuts)
            if left < remaining:
                search, remaining, place = tried, left, traced.strongest
            if not left or tried is not search:
                break
            detection = detection_in(traced) if traced.verdict == "present" else first.detection
            try:
                more = choice.make(vit, detection, dict(cuts) | cuts_in(traced), kept, kept)
            except (ConfigError, ImageError, NoOutliersError):  # nothing there that could be a register neuron
                break
    if not remaining:
        return search
    warning = f"with these neurons moved, outliers are left at {place} ({remaining:.2g} per image)"
    return replace(search, warnings=(*search.warnings, warning))


def _left(traced: Trace, cuts: Cuts) -> float:
    """Most outlier patches an image at any one sublayer: where some are present, or above the unedited model's cuts."""
    every = dict(cuts) | cuts_in(traced)
    counts = [
        traced.histogram[traced.sublayers.index(place), bin_edges()[:-1] >= cutoff.value].sum() / traced.n_images
        for place, cutoff in every.items()
        if cutoff.relative
    ]
    return float(max(counts, default=0.0))


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The images, and what each of them is for."""

    first: list[Tensor]
    """Images on which place, cut-off and onset are found."""
    held_out: list[Tensor]
    """Images kept for the sweep over k; the first ones too."""
    kept: list[Tensor]
    """All of these, and some more: on them the neurons found are tried."""
    rest: Counted
    """Images that count for the scores but have not passed yet: all but the held-out ones or, where none are held out,
    all but the first batch, of which the detection leaves everything behind."""
    more: bool
    """Whether there are others than the first."""


def _divide(images: Images, check: bool, batch_size: int) -> _Parts:
    n = count(images)
    n_first = MOST_FIRST if n is None else min(MOST_FIRST, max(FEWEST_FIRST, n // 8))
    n_held = 0 if not check else (HELD_OUT if n is None else min(HELD_OUT, n // 4))
    n_kept = MOST_FIRST if check else n_first
    held, every = first_and_all(images, n_kept, batch_size)
    if (come := sum(map(len, held))) < n_kept:  # these are all there are
        n, n_held = come, min(n_held, come // 4)
    first = _first(held, n_first)
    n_passed = n_held or len(first[0])
    return _Parts(
        first=first,
        held_out=_first(held, n_held),
        kept=held,
        rest=Counted(_without_first(every, n_passed), None if n is None else n - n_passed),
        more=n is None or n > n_first,
    )


def _first(batches: list[Tensor], n: int) -> list[Tensor]:
    taken, left = [], n
    for batch in batches:
        if left > 0:
            taken.append(batch[:left])
            left -= len(taken[-1])
    return taken


def _without_first(batches: Iterable[Tensor], n: int) -> Iterator[Tensor]:
    for batch in batches:
        if n < len(batch):
            yield batch[n:]
        n = max(0, n - len(batch))


def _trace_first(vit: HookedViT, parts: _Parts, layers: range) -> tuple[Trace, NormsAndActivations | None]:
    """A trace of the first images, and what their first batch leaves behind if it is not held out."""
    if parts.held_out:
        return trace(vit, parts.first), None
    recorded = NormsAndActivations(vit, vit.layout(parts.first[0]), layers, sublayers(vit.cfg.n_layers))
    with vit.hooks(recorded.hooks):
        return trace(vit, parts.first), recorded


def _again(images: Images) -> bool:
    """Whether the images can be had a second time."""
    return isinstance(images, Tensor) or iter(images) is not images


def _top_layer(detection: Detection, top_layer: Literal["auto"] | int, lowest_layer: int) -> int:
    if top_layer != "auto":
        return top_layer
    onset = detection.onset or detection.sublayer
    last = onset.layer - (onset.kind == "attn")  # after attention of block 5, block 4's neurons are last
    if last < 0:
        raise NoOutliersError(
            f"The outliers are there at '{onset}' already, before any neuron could have made them. Give top_layer to "
            f"search all the same.",
            detection.evidence,
        )
    if last < lowest_layer:
        raise ConfigError(
            f"lowest_layer={lowest_layer} lies above the onset of the outliers ({onset}), so that no layer is left. "
            f"Lower it, or give top_layer."
        )
    return last


def _check_still_present(detection: Detection, scores: NeuronScores) -> None:
    """What looked like outliers in the first images must do so in all."""
    if detection.rule != "fixed" and not scores.evidence.present:
        later = replace(detection, evidence=scores.evidence)
        require_outliers(later, "Finding register neurons")


def _check(vit: HookedViT, lowest: int, top: str | int, top_k: str | int, score: str, keep: str) -> None:
    last = vit.cfg.n_layers - 1
    if not 0 <= lowest <= last:
        raise ConfigError(f"lowest_layer must be 0 to {last}, got {lowest}.")
    if top != "auto" and not (isinstance(top, int) and lowest <= top <= last):
        raise ConfigError(f"top_layer must be 'auto' or {lowest} to {last}, got {top!r}.")
    if top_k != "auto" and not (isinstance(top_k, int) and top_k >= 1):
        raise ConfigError(f"top_k must be 'auto' or at least 1, got {top_k!r}.")
    check_choice("score", score, SCORES)
    check_choice("keep", keep, get_args(Keep))
