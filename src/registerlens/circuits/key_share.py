"""Why heads attend to outliers: the share of their keys' score that lies along one direction of the stream."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.detection import Detection, detect, require_outliers
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import need_some
from registerlens.circuits.heads import directions_met
from registerlens.circuits.neuron_effects import frozen_weights
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import Batch, batches, run_until_seen
from registerlens.errors import check_at_least
from registerlens.model.attention import final_point
from registerlens.model.block import require_linear_output, require_softmax
from registerlens.model.parts import token_norms
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult
from registerlens.stats.moments import Moments
from registerlens.theory.readers import directions as unit_directions


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyShare(ModelResult):
    """How much of what heads prefer in outliers comes from one direction; means over images.

    A head's advantage is the score (before the softmax, of [CLS], or of the mean query without one) of the mean outlier
    less that of the mean other patch. With the scales of norms held fixed it is a sum over directions of the stream.
    """

    direction: str
    """The direction, in words."""
    detection: Detection
    """Which patches are outliers."""
    n_images: int
    """Images that went through."""
    n_used: int
    """How many of these have an outlier and another patch."""
    advantage: Float[np.ndarray, "layer head"]
    """Score of outliers less that of other patches; NaN before the direction is written, and before outliers arise."""
    along: Float[np.ndarray, "layer head"]
    """The part of it along the direction."""
    null: Float[np.ndarray, "layer head"]
    """The magnitude of such a part that 97.5% of random directions stay below."""

    @property
    def share(self) -> Float[np.ndarray, "layer head"]:
        """along / advantage: 1 where outliers are preferred for this direction alone; means nothing where the advantage
        is near 0."""
        return np.divide(self.along, self.advantage, out=np.full_like(self.along, np.nan), where=self.advantage != 0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: advantage, the part along the direction, its share, and the null."""
        layer, head = np.isfinite(self.along).nonzero()
        columns = {name: getattr(self, name)[layer, head] for name in ("advantage", "along", "share", "null")}
        return pd.DataFrame({"layer": layer, "head": head, **columns})

    def describe(self) -> str:
        """The result in words."""
        table = self.to_dataframe()
        top = table.iloc[np.argsort(-np.asarray(table["advantage"]), kind="stable")[:5]]
        listed = ", ".join(
            f"{layer:.0f}.{head:.0f} ({advantage:+.3g}, {share:.0%} of it)"
            for layer, head, advantage, share in top[["layer", "head", "advantage", "share"]].itertuples(index=False)
        )
        beyond = int((np.abs(table["along"]) > table["null"]).sum())
        return (
            f"Advantage of outliers' keys over other patches' in the score, and the share of it along {self.direction} "
            f"({self.n_used} of {self.n_images} images). Heads that prefer outliers most: {listed}. In {beyond} of "
            f"{len(table)} heads the part is larger than along 97.5% of random directions."
        )

    plot = drawn_by("heads.key_share_figure")
    """Maps of the advantage and the part of it along the direction, layer by head."""


def key_share(
    vit: HookedViT,
    images: Images,
    direction: RegisterNeurons | Float[Tensor, " d_model"],
    *,
    detection: Detection | None = None,
    n_null: int = 200,
    seed: int = 0,
    batch_size: int = 16,
) -> KeyShare:
    """How much of each head's preference for outliers is due to one direction, such as what register neurons write.

    Queries are what they are; keys are linear in the stream once the scales of the norm before attention, and of one on
    keys, are held fixed. Rotary positions are taken into account.

    Args:
        vit: the model, edited or not. Its weights get no gradient.
        images: preprocessed, as a tensor or in batches that can be iterated twice.
        direction: register neurons, whose rows of W_out are summed, or a vector of the stream; as for `head_circuits`.
        detection: which patches are outliers; default: found here. Blocks up to its own are looked at too.
        n_null: random directions to compare with.
        seed: of them.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: fewer than 20 random directions.
        ImageError: there are no images, or none has an outlier.
        InterventionError: no neuron was given, or the model does not have one of them.
        NoOutliersError: the model has no outliers on these images.
        ShapeError: the vector does not fit.
        UnsupportedArchitectureError: attention is no softmax, or a norm stands after the sublayers.

    Source: Elhage et al. 2021 for QK circuits and frozen norms; Jiang et al. 2025, proposition 1, for u2.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> found = key_share(vit, images, neurons)
        >>> bool((found.share[2:4] > 0.5).all())
        True
    """
    require_softmax(vit.cfg, "The share of a key in the scores")
    require_linear_output(vit.cfg, "The share of a key in the scores")
    check_at_least(20, n_null=n_null)
    met, words = directions_met(vit, direction)
    detection = detection or detect(vit, images, batch_size=batch_size)
    require_outliers(detection, "The share of outliers' keys")
    layers = [layer for layer, vector in enumerate(met) if vector is not None]
    random = torch.randn(n_null, vit.cfg.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shape = (vit.cfg.n_layers, vit.cfg.n_heads)
    advantage, parts, n = Moments(*shape), Moments(*shape, n_null + 1), 0
    with frozen_weights(vit), torch.inference_mode(False):
        for batch in batches(vit, images, batch_size, "splitting key scores"):
            n, layout = n + len(batch), batch.layout
            streams, outlier = _look(vit, batch, layers, detection)
            whole = torch.full((len(batch), *shape), torch.nan, dtype=torch.float64)
            split = torch.full((len(batch), *shape, n_null + 1), torch.nan, dtype=torch.float64)
            for layer in layers:
                vectors = torch.cat([met[layer][None], random])  # type: ignore[index]
                units = unit_directions(vit.blocks[layer].ln1, vectors.to(vit.device))  # type: ignore[arg-type]
                whole[:, layer], split[:, layer] = _split(vit, streams.pop(layer), layer, layout, outlier, units)
            advantage.add(whole)
            parts.add(split)
    n_used = int(advantage.n.max())
    need_some(n, n_used)
    null = np.quantile(np.abs(parts.mean[..., 1:]), 0.975, axis=-1)
    return KeyShare(
        **vit.identity,
        direction=words,
        detection=detection,
        n_images=n,
        n_used=n_used,
        advantage=advantage.mean,
        along=np.ascontiguousarray(parts.mean[..., 0]),
        null=null,
    )


def _look(
    vit: HookedViT, batch: Batch, layers: list[int], detection: Detection
) -> tuple[dict[int, Tensor], Bool[Tensor, "batch patch"]]:
    """The stream before some blocks, and which patches are outliers."""
    layout, streams, norms = batch.layout, {}, []
    hooks: list[Any] = [
        (
            [f"blocks.{layer}.hook_resid_pre" for layer in layers],
            lambda x, hook: streams.update({hook.layer(): x.clone()}),
        ),
        (detection.hook_name, lambda x, hook: norms.append(token_norms(x[:, layout.patches]))),
    ]
    with torch.no_grad():
        run_until_seen(vit, batch.images, hooks)
    return streams, detection.cutoff.above(norms[0])


def _split(
    vit: HookedViT,
    resid: Float[Tensor, "batch pos d_model"],
    layer: int,
    layout: TokenLayout,
    outlier: Bool[Tensor, "batch patch"],
    units: Float[Tensor, "item d_model"],
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head item"]]:
    """The advantage of outliers in each head, and its parts along unit vectors; NaN for images without the contrast."""
    attn, recorded = f"blocks.{layer}.attn", {}
    q, k = f"{attn}.{final_point(vit.cfg, 'q')}", f"{attn}.{final_point(vit.cfg, 'k')}"
    scales = [f"blocks.{layer}.ln1.hook_scale"]
    scales += [f"{attn}.k_norm.norm.hook_scale"] if vit.cfg.qk_norm is not None else []
    hooks: list[Any] = [
        (scales, lambda scale, hook: scale.detach()),
        ([q, k], lambda x, hook: recorded.update({hook.name: x})),
    ]
    leaf = resid.detach().requires_grad_()
    with torch.enable_grad(), vit.hooks(hooks):
        vit(leaf, start_at_layer=layer, stop_at_layer=layer + 1, layout=layout)
        queries = recorded[q].detach()
        query = queries.mean(1) if layout.cls is None else queries[:, layout.cls]
        scores = einsum(recorded[k][:, layout.patches], query, "batch patch head d, batch head d -> batch patch head")
        yes, no = outlier.double(), (~outlier).double()
        weights = yes / yes.sum(1, keepdim=True) - no / no.sum(1, keepdim=True)
        there = weights.isfinite().all(1)
        each = einsum(
            scores, weights.nan_to_num(0.0, 0.0, 0.0).to(scores), "batch patch head, batch patch -> batch head"
        )
        each = each * vit.cfg.d_head**-0.5
    stream = resid.double() @ units.T
    parts = []
    for head in range(each.shape[1]):
        [slope] = torch.autograd.grad(each[:, head].sum(), [leaf], retain_graph=True)
        parts.append(((slope.double() @ units.T) * stream).sum(1))
    whole, split = each.detach().double().cpu(), torch.stack(parts, 1).cpu()
    there = there.cpu()
    return torch.where(there[:, None], whole, torch.nan), torch.where(there[:, None, None], split, torch.nan)
