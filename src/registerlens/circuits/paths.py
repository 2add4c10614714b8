"""Path patching: what a part of the model does to a metric by way of chosen other parts, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.circuits.differentiable import Measure, metric_of
from registerlens.circuits.sites import (
    PairBatch,
    Place,
    Site,
    block_of,
    expand,
    firing_order,
    first_image,
    paired,
    sublayer_output,
)
from registerlens.config import TokenLayout
from registerlens.data.batches import Images, count
from registerlens.display import drawn_by
from registerlens.engine.views import View, Watched, run_clean, run_from
from registerlens.errors import ConfigError
from registerlens.evaluation.metrics import Metric, measured
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.results import ModelResult
from registerlens.stats.intervals import interval_words, mean_intervals

TOGETHER, TOTAL = "all receivers", "the whole corrupted image"


@dataclass(frozen=True, kw_only=True, eq=False)
class PathEffects(ModelResult):
    """What a patch does to a metric along direct paths, for each pair of images."""

    metric: str
    """Name of the metric."""
    words: str
    """The metric in words, with its unit."""
    sender: str
    """What takes its corrupted activation."""
    receivers: tuple[str, ...]
    """What may hear of it; empty for plain activation patching, where everything later may."""
    clean: Float[np.ndarray, " pair"]
    """The metric of each clean image."""
    corrupted: Float[np.ndarray, " pair"]
    """The metric of each corrupted image."""
    effects: Float[np.ndarray, "receiver pair"]
    """Change of the metric, in its unit, where one receiver alone hears of the patch."""
    together: Float[np.ndarray, " pair"]
    """The same where all receivers do; without receivers, the effect of plain activation patching."""
    identical: Bool[np.ndarray, " pair"]
    """Pairs that are one image twice: their effects are zero."""

    @property
    def total(self) -> Float[np.ndarray, " pair"]:
        """The metric of each corrupted image less that of its clean one."""
        return self.corrupted - self.clean

    def to_dataframe(self) -> pd.DataFrame:
        """One row a receiver, one for all of them, one for the whole image: mean effect, its 95% interval, and its
        share of the whole image's effect."""
        alone = list(zip(self.receivers, self.effects, strict=True)) if len(self.receivers) > 1 else []
        name = self.receivers[0] if len(self.receivers) == 1 else TOGETHER if self.receivers else "everything later"
        rows = [*alone, (name, self.together), (TOTAL, self.total)]
        values = np.stack([row for _, row in rows])
        mean, low, high = mean_intervals(values)
        share = mean / mean[-1] if mean[-1] else np.full_like(mean, np.nan)
        return pd.DataFrame(
            {"receiver": [row for row, _ in rows], "effect": mean, "low": low, "high": high, "share": share}
        )

    def pairs_dataframe(self) -> pd.DataFrame:
        """One row a pair: the metric clean and corrupted, the effect of all receivers and of each."""
        columns = {"clean": self.clean, "corrupted": self.corrupted, "effect": self.together}
        return pd.DataFrame(columns | dict(zip(self.receivers, self.effects, strict=True)))

    def describe(self) -> str:
        """The result in words."""
        table = self.to_dataframe()
        whole, total = table.iloc[-2], table.iloc[-1]
        way = f"by way of {whole['receiver']} alone" if self.receivers else "patched, with everything later free"
        ends = interval_words(whole["low"], whole["high"])
        sentences = [
            f"{self.sender} of the corrupted image, {way}, changes {self.words or self.metric} by "
            f"{whole['effect']:+.3g} ({ends}) on {len(self.clean)} pairs; the whole corrupted image by "
            f"{total['effect']:+.3g}."
        ]
        if len(self.receivers) > 1:
            alone = table.iloc[:-2]
            top = alone.iloc[np.argsort(-np.abs(alone["effect"].to_numpy()), kind="stable")[:3]]
            listed = ", ".join(f"{r} {e:+.3g}" for r, e in zip(top["receiver"], top["effect"], strict=True))
            sentences.append(f"Largest of the {len(self.receivers)} receivers: {listed}.")
        if self.identical.any():
            sentences.append(f"{self.identical.sum()} pairs are one image twice.")
        return " ".join(sentences)

    plot = drawn_by("patching.paths_figure")
    """Effects with their intervals, a bar a receiver."""


def path_patching(
    vit: HookedViT,
    clean: Images,
    corrupted: Images,
    sender: Place,
    receivers: Place | Sequence[Place] = (),
    *,
    metric: str | Metric | Measure,
    labels: Int[Tensor, "pair ..."] | None = None,
    batch_size: int = 16,
) -> PathEffects:
    """The effect of a sender's corrupted activation on a metric, along the direct paths to some receivers alone.

    Exactly, in three runs of each pair. The sender's activation on the corrupted image is put into the clean run, with
    the output of every attention and MLP held at its clean value, but for the sublayer the sender is in; what each
    receiver is then is recorded (LayerNorms are computed anew). Then the recorded values are put into the clean run at
    the receivers, and everything after them is free. Within its own sublayer a receiver hears of the patch by every
    way: name `hook_q` to leave keys and values out, or `hook_z` to have all three.

    With several receivers, each is also patched alone. Without any it is activation patching: everything after the
    sender is free. The direct effect on the output is that by way of the last `hook_resid_post`.

    Args:
        vit: the model, edited or not.
        clean: images, a tensor or batches that can be iterated several times.
        corrupted: as many, of the same sizes, in the same batches: an outlier taken away, another class, ...
        sender: one hook point, or a `Site` that chooses its heads, neurons or tokens.
        receivers: hook points or sites after the sender; of a glob, those after it count.
        metric: "largest_norm", "class_logit", "cls" (see `screen_neurons`), a `Metric`, or a function of
            (edited, clean) that gives one number an image.
        labels: one a pair, where the metric wants them.
        batch_size: pairs at once when tensors are given.

    Raises:
        ConfigError: the sender is several points, or a receiver comes before it.
        HookNameError: there is no such hook point.
        ImageError: there are no pairs, or all are one image twice.
        ShapeError: pairs do not fit, a site has no such heads, neurons or tokens, or the metric does not give one
            number an image.

    Source: Wang et al. 2022 (2211.00593), section 3 and appendix; Goldowsky-Dill et al. 2023 (2304.05969).

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(8, 0).images
        >>> sender = Site("blocks.1.mlp.hook_post", neurons=[183, 103, 219, 125, 55, 128, 177])
        >>> found = path_patching(
        ...     vit, images, images.roll(1, 0), sender, "blocks.*.attn.hook_k", metric="largest_norm@5.mlp"
        ... )
        >>> found.receivers[0], found.effects.shape
        ('blocks.2.attn.hook_k', (4, 8))
    """
    plan = _plan(vit, clean, sender, receivers)
    chosen = metric_of(metric, vit, clean, batch_size)
    columns: dict[str, list[Tensor]] = {"clean": [], "corrupted": [], "effects": [], "together": [], "identical": []}
    with torch.inference_mode():
        pairs = paired(vit, clean, corrupted, labels, batch_size)
        for pair in track(pairs, "patching paths", count(clean), lambda pair: len(pair.clean)):
            for name, values in _patched(vit, plan, chosen, pair).items():
                columns[name].append(values)
    return PathEffects(
        **vit.identity,
        metric=chosen.name,
        words=chosen.words,
        sender=plan.sender.label,
        receivers=tuple(site.label for site in plan.receivers),
        **{name: torch.cat(values, -1).numpy() for name, values in columns.items()},
    )


# What is run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    sender: Site
    receivers: list[Site]

    def frozen(self, vit: HookedViT) -> list[str]:
        """Outputs of the sublayers that are held at their clean values while receivers are recorded."""
        last = max(_known(block_of(site.name, vit)) for site in self.receivers)
        first = _known(block_of(self.sender.name, vit))
        outputs = [f"blocks.{layer}.hook_{kind}_out" for layer in range(first, last + 1) for kind in ("attn", "mlp")]
        return [name for name in outputs if name != sublayer_output(self.sender.name)]


def _plan(vit: HookedViT, clean: Images, sender: Place, receivers: Place | Sequence[Place]) -> _Plan:
    [source, *others] = expand(sender, vit)
    if others:
        raise ConfigError(f"The sender must be one hook point, but it stands for {[source.name, others[0].name]} ...")
    listed = [receivers] if isinstance(receivers, str | Site) else list(receivers)
    chosen = [(place, expand(place, vit)) for place in listed]
    every = [site for _, sites in chosen for site in sites]
    order = firing_order(vit, first_image(clean), [source, *every])
    start = order[source.name]
    for place, sites in chosen:
        if all(order[site.name] <= start for site in sites):
            name = place if isinstance(place, str) else place.name
            raise ConfigError(f"Receiver {name!r} comes before the sender {source.name}, which it cannot hear.")
    return _Plan(source, [site for site in every if order[site.name] > start])


def _known(block: int | None) -> int:
    return 0 if block is None else block


@dataclass(frozen=True)
class CleanRun:
    """The clean run of some pairs, and runs from it with other activations at some sites."""

    vit: HookedViT
    pair: PairBatch
    layout: TokenLayout
    watched: Watched
    view: View
    resid: dict[int, Tensor]
    """The stream before the blocks of the sites."""
    at: dict[str, Tensor]
    """Activations at the hook points asked for."""

    @classmethod
    def of(
        cls, vit: HookedViT, pair: PairBatch, metric: Metric, sites: Sequence[Site], names: Iterable[str] = ()
    ) -> CleanRun:
        """Run the clean images, ready to start anew at any of the sites; keep the activations at some hook points."""
        watched, activations = Watched.by([metric]), dict[str, Tensor]()
        starts = {block for site in sites if (block := block_of(site.name, vit)) is not None}
        with vit.hooks([(name, keep(activations)) for name in names]):
            view, resid = run_clean(vit, pair.clean, pair.labels, watched, starts)
        return cls(vit, pair, vit.layout(pair.clean), watched, view, resid, activations)

    def corrupted(self, names: Iterable[str]) -> tuple[View, dict[str, Tensor]]:
        """The run of the corrupted images, and its activations at some hook points."""
        activations: dict[str, Tensor] = {}
        with self.vit.hooks([(name, keep(activations)) for name in names]):
            view = run_from(self.vit, self.pair.corrupted, None, self.layout, self.watched, before=self._labels)
        return view, activations

    def start(self, sites: Sequence[Site]) -> tuple[int | None, Tensor, View]:
        """From where to run what differs at these sites: block (None: the images), what enters it, what was before."""
        blocks = [block_of(site.name, self.vit) for site in sites]
        known = [block for block in blocks if block is not None]
        if len(known) < len(blocks):
            return None, self.pair.clean, self._labels
        return min(known), self.resid[min(known)], self.view

    def patched(self, sites: Sequence[Site], there: dict[str, Tensor]) -> View:
        """The run with other activations at some sites, by hook point, and everything later free."""
        block, x, before = self.start(sites)
        hooks = [patch(site, there[site.name], self.layout, self.pair.rows) for site in sites]
        return run_from(self.vit, x, block, self.layout, self.watched, hooks, before)

    @property
    def _labels(self) -> View:
        """A view to start from the images with, of which only the labels are carried on."""
        return replace(self.view, norms={}, attention={})


def _patched(vit: HookedViT, plan: _Plan, metric: Metric, pair: PairBatch) -> dict[str, Tensor]:
    """The metric of one batch under every patch, as changes."""
    held = plan.frozen(vit) if plan.receivers else []
    clean = CleanRun.of(vit, pair, metric, [plan.sender, *plan.receivers], {plan.sender.name, *held})
    corrupted, sent = clean.corrupted([plan.sender.name])

    def value(view: View) -> Float[Tensor, " batch"]:
        return measured([metric], view, clean.view)[0]

    base = value(clean.view)
    result = {"clean": base, "corrupted": value(corrupted), "identical": pair.identical}
    if not plan.receivers:
        together = value(clean.patched([plan.sender], sent)) - base
        return result | {"effects": torch.empty(0, len(base), dtype=torch.float64), "together": together}
    heard = _hear(plan, clean, held, sent[plan.sender.name])
    together = value(clean.patched(plan.receivers, heard)) - base
    alone = [together]
    if len(plan.receivers) > 1:
        alone = [value(clean.patched([site], heard)) - base for site in plan.receivers]
    return result | {"effects": torch.stack(alone), "together": together}


def _hear(plan: _Plan, clean: CleanRun, held: list[str], sent: Tensor) -> dict[str, Tensor]:
    """What each receiver is when it hears of the sender directly."""
    heard: dict[str, Tensor] = {}
    hooks: list[Any] = [
        patch(plan.sender, sent, clean.layout, clean.pair.rows),
        (sorted({site.name for site in plan.receivers}), keep(heard)),  # before: one may be a held output itself
        (held, lambda x, hook: clean.at[hook.name]),
    ]
    block, x, _ = clean.start([plan.sender])
    options: dict[str, Any] = {} if block is None else {"start_at_layer": block, "layout": clean.layout}
    if all(site.name.startswith("blocks.") for site in plan.receivers):
        options["stop_at_layer"] = 1 + max(_known(block_of(site.name, clean.vit)) for site in plan.receivers)
    with clean.vit.hooks(hooks):
        clean.vit(x, **options)
    return heard


def keep(into: dict[str, Tensor]) -> Any:
    """A hook that keeps what it meets, by name."""

    def hook(x: Tensor, hook: Any) -> None:
        into[hook.name] = x.detach().clone()

    return hook


def patch(site: Site, there: Tensor, layout: TokenLayout, rows: slice) -> tuple[str, Any]:
    """A hook that puts another activation where the site is; `rows` says which pairs the batch is."""

    def hook(x: Tensor, hook: Any) -> Tensor:
        return torch.where(site.mask(x, layout, rows), there.to(x.dtype), x)

    return site.name, hook
