"""What a sink does, tested by editing it at fixed attention: is it a no-op, and would another value have been one?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.sink_edits import (
    EDITS,
    REFERENCE,
    Bank,
    Probe,
    ProbedLayer,
    SinkEdit,
    edit_sink,
    ordinary_value,
)
from registerlens.analysis.sink_events import QUERIES
from registerlens.config import TokenLayout, ViTConfig
from registerlens.data.batches import Images
from registerlens.display import grid_table
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import ConfigError, ImageError
from registerlens.model.block import require_linear_output, require_softmax
from registerlens.model.sublayers import require_heads
from registerlens.model.vit import Hook, HookedViT
from registerlens.results import ModelResult

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURES = ("head_output", "cls", "cls_cosine", "output", "output_cosine")
"""What is measured: ||change|| / ||before|| of what the head writes at all tokens, of the final [CLS] token (after the
final norm) and of the model's output; and the cosine of the last two before and after."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SinkEffects(ModelResult):
    """How much each head's sink matters: changes under edits of it, mean over the images in which the head has one."""

    n_images: int
    """Images measured."""
    n_reference: int
    """Other images, from which replaced values were taken."""
    threshold: float
    """Attention that `queries` of the queries must pay to the sink."""
    queries: float
    """Share of the queries that must pay it."""
    edits: tuple[SinkEdit, ...]
    """What was done; EDITS explains them."""
    events: Int[np.ndarray, "layer head"]
    """Images in which the head has a sink: over those the effects are means."""
    effects: Float[np.ndarray, "measure edit layer head"]
    """Measures as in MEASURES. NaN where there is no event, no [CLS], or no reference value of that head's sink."""

    def of(self, measure: str, edit: str) -> Float[np.ndarray, "layer head"]:
        """One measure under one edit.

        Raises:
            ConfigError: there is no such measure or edit.
        """
        if measure not in MEASURES or edit not in self.edits:
            raise ConfigError(f"No measure {measure!r} of {edit!r}. Measures: {MEASURES}; edits: {self.edits}.")
        return self.effects[MEASURES.index(measure), self.edits.index(cast(SinkEdit, edit))]

    def mean(self, measure: str, edit: str) -> float:
        """Mean over all events; NaN if none has a value.

        Raises:
            ConfigError: there is no such measure or edit.
        """
        values = self.of(measure, edit)
        there = np.isfinite(values)
        return float((values * self.events)[there].sum() / self.events[there].sum()) if there.any() else float("nan")

    def describe(self) -> str:
        """The result in words, one line an edit."""
        n = int(self.events.sum())
        lines = [
            f"{self.model}: {n} sinks in {self.n_images} images ({self.queries:.0%} of queries pay one token at least "
            f"{self.threshold:g})."
        ]
        for edit in self.edits if n else ():
            cls, output = self.mean("cls_cosine", edit), self.mean("output_cosine", edit)
            lines.append(
                f"{edit}: what the head writes changes by {self.mean('head_output', edit):.0%}, the model's output by "
                f"{self.mean('output', edit):.1%} (cosine {output:.4f}"
                f"{'' if np.isnan(cls) else f'; of [CLS] {cls:.4f}'})."
            )
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edit, layer and head."""
        n_layers, n_heads = self.events.shape
        axes = {"edit": self.edits, "layer": range(n_layers), "head": range(n_heads)}
        return grid_table(axes, events=self.events, **dict(zip(MEASURES, self.effects, strict=True)))

    def plot(self, measure: str = "output") -> go.Figure:
        """Maps layer x head of one measure, a panel for each edit.

        Raises:
            ConfigError: there is no such measure.
        """
        from registerlens.viz.sinks import effect_map

        return effect_map(self, measure)


def sink_no_op(
    vit: HookedViT,
    images: Images,
    *,
    reference: Images | None = None,
    edits: Sequence[SinkEdit] = EDITS,
    heads: Iterable[tuple[int, int]] | None = None,
    threshold: float = 0.3,
    queries: float = QUERIES,
    batch_size: int = 8,
) -> SinkEffects:
    """Edit one head's sink at fixed attention, and see what changes: the head, its layer, [CLS], the model's output.

    A sink that is a no-op can be set to zero without effect; its column cannot be removed without effect, for then the
    head speaks up. A sink that sends a message cannot be set to zero either. Zero is out of the model's range and may
    overstate; the other values stay within it.

    Cost: for every head that has a sink in some image of a batch, and every edit, blocks from that head's layer to the
    last run once more on those images, from the residual stream kept at that layer. A model without sinks costs one
    forward pass; one of L layers with h sinking heads in each, about 1 + h E (L + 1) / 2 passes for E edits. `heads`
    and `edits` bound it. The residual streams of one batch are held.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or an iterable of batches.
        reference: held-out images for the edits "mean" and "other_image"; default: the first of the tensor `images`,
            REFERENCE of them but at most half, which are then not measured.
        edits: which of EDITS.
        heads: (layer, head) pairs to look at; default: all.
        threshold: attention that makes a sink event, and
        queries: the share of queries that must pay it, as for `classify_sinks`.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: an edit, threshold or share does not exist, or images that are no tensor come without `reference`.
        ImageError: there are too few images.
        InterventionError: a head does not exist.
        UnsupportedArchitectureError: attention is no softmax, or a norm stands after the sublayers.

    Source: Fesser et al. 2026 (2606.08105), the edits at fixed A; Parodi et al. 2026 (2604.14433), why not zero alone.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = sink_no_op(vit, synthetic_images(8, 0).images, queries=0.75, edits=["remove", "zero"])
        >>> found.of("output", "remove").shape
        (6, 1)
    """
    require_softmax(vit.cfg, "Editing a sink at fixed attention")
    require_linear_output(vit.cfg, "Editing a sink at fixed attention")
    chosen = _checked(vit.cfg, edits, heads, threshold, queries)
    reference, measured = _held_out(images, reference)
    probe = Probe(vit, chosen, threshold, queries)
    [bank] = stream(
        vit, reference, [Bank(vit.cfg, probe)], description="looking at the reference", batch_size=batch_size
    )
    sums = _EffectSums(vit, bank, edits)
    [effects] = stream(vit, measured, [sums], description="editing sinks", batch_size=batch_size)
    return SinkEffects(
        **vit.identity,
        n_images=sums.n_images,
        n_reference=bank.n_images,
        threshold=float(threshold),
        queries=float(queries),
        edits=tuple(edits),
        events=sums.totals["events"].numpy(),
        effects=effects,
    )


def _checked(
    cfg: ViTConfig, edits: Sequence[str], heads: Any, threshold: float, queries: float
) -> set[tuple[int, int]]:
    if not edits or set(edits) - set(EDITS):
        raise ConfigError(f"edits must be some of {list(EDITS)}, got {list(edits)}.")
    if not (0 < threshold <= 1 and 0 < queries <= 1):
        raise ConfigError(f"threshold and queries are shares above 0 and at most 1; got {threshold} and {queries}.")
    if heads is None:
        return set(itertools.product(range(cfg.n_layers), range(cfg.n_heads)))
    chosen = {(int(layer), int(head)) for layer, head in heads}
    require_heads(sorted(chosen), cfg.n_layers, cfg.n_heads)
    return chosen


def _held_out(images: Images, reference: Images | None) -> tuple[Images, Images]:
    if reference is not None:
        return reference, images
    if not isinstance(images, Tensor):
        raise ConfigError("Images that come in batches need held-out images beside them: pass reference=<images>.")
    if len(images) < 2:
        raise ImageError(
            f"Got {len(images)} images: at least one to measure and one to hold out are needed. Give more, or "
            f"reference=<images>."
        )
    n = min(REFERENCE, len(images) // 2)
    return images[:n], images[n:]


# Measuring -----------------------------------------------------------------------------------------------------------


class _EffectSums(Sums):
    def __init__(self, vit: HookedViT, bank: Bank, edits: Sequence[SinkEdit]) -> None:
        super().__init__()
        self.vit, self.bank, self.probe, self.edits = vit, bank, bank.probe, edits
        cells = (vit.cfg.n_layers, vit.cfg.n_heads)
        self.totals["events"] = torch.zeros(cells, dtype=torch.int64)
        self.totals |= {
            name: torch.zeros(len(MEASURES), len(edits), *cells, dtype=torch.float64) for name in ("effect", "number")
        }

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """The hooks of the probe, and one that keeps the final stream."""
        self.layers: list[ProbedLayer] = []
        self.final: list[Float[Tensor, "batch pos d_model"]] = []
        last = f"blocks.{vit.cfg.n_layers - 1}.hook_resid_post"
        return [*self.probe.hooks(self.layers), (last, lambda resid, hook: self.final.append(resid))]

    def update(self, batch: Batch) -> None:
        """Edit the sinks of one batch."""
        vit, layout, tokens = self.vit, batch.layout, self.vit.ln_final(self.final.pop())
        for layer in self.layers:
            self.totals["events"][layer.index] += layer.event.sum(0).cpu()
            for head in layer.event.any(0).nonzero()[:, 0].tolist():
                images = layer.event[:, head].nonzero()[:, 0]
                v, position = layer.v[images, :, head], layer.key.position[images, head]
                v_sink = v[torch.arange(len(v), device=v.device), position]
                replacing: dict[str, Tensor | None] = {
                    "remove": None,
                    "zero": torch.zeros_like(v_sink),
                    "mean": self.bank.mean(layer.index, head),
                    "other_image": self.bank.others(layer.index, head, images + batch.start),
                    "ordinary": ordinary_value(v, position, layout),
                }
                factor = self.probe.factors[layer.index][head]
                for at, edit in enumerate(self.edits):
                    value = replacing[edit]
                    if value is not None and not value.isfinite().all():
                        continue  # no reference image has a sink here
                    change = partial(edit_sink, column=layer.key.column[images, head], v_sink=v_sink, value=value)
                    after, moved = _rerun(vit, layer, head, images, layout, change, factor)
                    values = torch.stack([moved, *_changes(vit, tokens[images], after, layout)]).double().cpu()
                    there = values.isfinite()
                    self.totals["effect"][:, at, layer.index, head] += values.where(there, 0).sum(1)
                    self.totals["number"][:, at, layer.index, head] += there.sum(1)
        self.add(n_images=len(batch))

    def result(self) -> Float[np.ndarray, "measure edit layer head"]:
        """Means over events."""
        return (self.totals["effect"] / self.totals["number"]).numpy()


def _rerun(
    vit: HookedViT,
    layer: ProbedLayer,
    head: int,
    images: Int[Tensor, " event"],
    layout: TokenLayout,
    change: Callable[[Tensor], Tensor],
    factor: Float[Tensor, "rank d_head"],
) -> tuple[Float[Tensor, "event pos d_model"], Float[Tensor, " event"]]:
    """Final tokens with one head's z changed, from its layer on; and how much what the head writes has changed."""
    moved: list[Tensor] = []

    def edit(z: Float[Tensor, "event query head d_head"], hook: Any) -> Tensor:
        before = z[:, :, head]
        after = change(before)
        written = [x.to(factor.dtype) @ factor.mT for x in (before, after)]
        moved.append((written[1] - written[0]).flatten(1).norm(dim=1) / written[0].flatten(1).norm(dim=1))
        edited = z.clone()
        edited[:, :, head] = after
        return edited

    with vit.hooks([(f"blocks.{layer.index}.attn.hook_z", edit)]):
        tokens = vit(layer.resid[images], start_at_layer=layer.index, layout=layout, return_type="tokens")
    return tokens, moved[0]


def _changes(
    vit: HookedViT, before: Float[Tensor, "event pos d_model"], after: Tensor, layout: TokenLayout
) -> list[Float[Tensor, " event"]]:
    """The measures that follow "head_output"."""
    output = [vit.head(tokens, layout).float().flatten(1) for tokens in (before, after)]
    cls = [torch.full_like(tokens[:, 0].float(), float("nan")) for tokens in (before, after)]
    if layout.cls is not None:
        cls = [tokens[:, layout.cls].float() for tokens in (before, after)]
    changes: list[Tensor] = []
    for then, now in (cls, output):
        changes += [(now - then).norm(dim=1) / then.norm(dim=1), F.cosine_similarity(now, then, dim=1)]
    return changes
