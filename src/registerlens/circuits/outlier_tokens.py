"""One batch as a circuit needs it: what was written at the outlier tokens, and how the readers looked at them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, patch_norms
from registerlens.config import TokenLayout, ViTConfig
from registerlens.errors import InterventionError
from registerlens.model.attention import final_point
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT

VIA = ("outliers", "other patches", "prefix", "registers")
"""Groups of key tokens: outlier patches, other patches, [CLS] (and a distillation token), trained or test-time
registers."""


@dataclass(frozen=True)
class Located:
    """Which tokens of a batch are outliers, and who reads; every image has an outlier and an ordinary patch."""

    layout: TokenLayout
    """Of the batch."""
    image: Int[Tensor, " token"]
    """Index in the batch of each outlier token's image."""
    position: Int[Tensor, " token"]
    """Its place in the sequence."""
    groups: Float[Tensor, "batch pos via"]
    """1 where a token belongs to the group, in the order of `VIA`."""
    places: slice
    """Tokens that may read: [CLS] alone, or the patches."""
    readers: Float[Tensor, "batch reader"]
    """How much each of them counts: 1 for [CLS]; 1 / n for each of n ordinary patches, 0 for outliers."""

    @property
    def everywhere(self) -> Float[Tensor, "batch pos"]:
        """The readers' weights over the whole sequence."""
        weights = torch.zeros_like(self.groups[..., 0])
        weights[:, self.places] = self.readers
        return weights

    def mean(self, values: Float[Tensor, "*part token"]) -> Float[Tensor, "batch *part"]:
        """From a number an outlier token to the mean over each image's outliers."""
        flat = values.reshape(-1, values.shape[-1])
        total = flat.new_zeros(len(self.readers), len(flat)).index_add(0, self.image, flat.T)
        number = torch.bincount(self.image, minlength=len(self.readers))
        return (total / number[:, None]).reshape(len(self.readers), *values.shape[:-1])


def reads_by_cls(cfg: ViTConfig) -> bool:
    """Whether [CLS] is what the circuit ends in: where there is one, and the output is not a mean of other tokens.

    Example:
        >>> reads_by_cls(ViTConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, image_size=(8, 8), patch_size=(4, 4)))
        True
    """
    means_only = bool(cfg.pooling) and set(cfg.pooling) <= {"mean", "mean_all"}
    return cfg.class_token and not means_only


def locate(vit: HookedViT, batch: Tensor, detection: Detection) -> tuple[Bool[Tensor, " batch"], Located | None]:
    """Which images can be used, those with an outlier and an ordinary patch, and the tokens of these."""
    layout = vit.layout(batch)  # first, for its clear errors
    above = detection.cutoff.above(patch_norms(vit, batch, detection.sublayer))
    used = above.any(1) & ~above.all(1)
    above = above[used]
    if not len(above):
        return used, None
    image, patch = above.nonzero(as_tuple=True)
    dtype = at_least_float32(vit.dtype)
    groups = torch.zeros(len(above), layout.n_tokens, len(VIA), dtype=dtype, device=above.device)
    groups[:, layout.patches, 0], groups[:, layout.patches, 1] = above.to(dtype), (~above).to(dtype)
    groups[:, layout.prefix, 2] = 1
    groups[:, layout.trained_registers, 3] = groups[:, layout.test_time_registers, 3] = 1
    if reads_by_cls(vit.cfg) and layout.cls is not None:
        places, readers = slice(layout.cls, layout.cls + 1), groups.new_ones(len(above), 1)
    else:
        ordinary = groups[:, layout.patches, 1]
        places, readers = layout.patches, ordinary / ordinary.sum(1, keepdim=True)
    return used, Located(layout, image, patch + layout.patches.start, groups, places, readers)


@dataclass
class OutlierRun:
    """What a run of a batch leaves behind, in float32 at least. Dictionaries are by block."""

    tokens: Located
    block: int
    """The block after which the outliers' stream is taken; heads of later blocks are looked into."""
    embedded: list[Tensor] = field(default_factory=list)
    """What enters block 0: [token, d_model] at the outliers, [batch, reader, d_model] at the readers."""
    attention: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What attention writes, at the outliers and at the readers."""
    neurons: dict[int, Tensor] = field(default_factory=dict)
    """Activations at the outliers [token, d_mlp], up to `block`."""
    mlp: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What the MLP writes, as `attention`."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """The stream before later blocks, at the outliers."""
    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    """The stream after `block`, at the outliers."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """The readers' mean query [batch, head, d_head] of later blocks, as the scores take it."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    """Its scores with the outliers as keys [token, head], as the model computed them."""
    pattern: dict[int, Tensor] = field(default_factory=dict)
    """The readers' mean attention to each group [batch, head, via]."""
    z: dict[int, Tensor] = field(default_factory=dict)
    """The readers' attention times value, apart for each group [batch, reader, via, head, d_head]."""
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    """The stream after the last block, all tokens."""


def look(vit: HookedViT, batch: Tensor, tokens: Located, block: int) -> OutlierRun:
    """Run the model and keep what a circuit needs.

    Raises:
        InterventionError: an edit in force adds keys that are no tokens.
    """
    seen, dtype, n_layers = OutlierRun(tokens, block), at_least_float32(vit.dtype), vit.cfg.n_layers
    rows, later, up_to = (tokens.image, tokens.position), range(block + 1, n_layers), range(block + 1)
    values: dict[int, Tensor] = {}

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[rows].to(dtype), x[:, tokens.places].to(dtype)

    def keep_scores(scores: Tensor, hook: Any) -> None:
        mean = einsum(scores[:, :, tokens.places].to(dtype), tokens.readers, "b head q key, b q -> b key head")
        seen.scores[hook.layer()] = mean[rows]

    def keep_pattern(pattern: Tensor, hook: Any) -> None:
        if pattern.shape[-1] != tokens.layout.n_tokens:
            raise InterventionError(
                "An edit in force adds keys that are no tokens (an attention bias), which a circuit has no node for. "
                "Measure the circuit of the unedited model, or use test-time registers instead."
            )
        read = pattern[:, :, tokens.places].to(dtype)
        seen.pattern[hook.layer()] = einsum(
            read, tokens.readers, tokens.groups, "b head q key, b q, b key via -> b head via"
        )
        grouped = "b head q key, b key via, b key head d -> b q via head d"
        seen.z[hook.layer()] = einsum(read, tokens.groups, values.pop(hook.layer()), grouped)

    def keep_query(q: Tensor, hook: Any) -> None:
        seen.queries[hook.layer()] = einsum(
            q[:, tokens.places].to(dtype), tokens.readers, "b q head d, b q -> b head d"
        )

    def points(layers: range, name: str) -> list[str]:
        return [f"blocks.{layer}.{name}" for layer in layers]

    every = range(n_layers)
    hooks: list[Any] = [
        ("blocks.0.hook_resid_pre", lambda x, hook: seen.embedded.extend(both(x))),
        (points(every, "hook_attn_out"), lambda x, hook: seen.attention.__setitem__(hook.layer(), both(x))),
        (points(up_to, "mlp.hook_post"), lambda x, hook: seen.neurons.__setitem__(hook.layer(), x[rows].to(dtype))),
        (points(every, "hook_mlp_out"), lambda x, hook: seen.mlp.__setitem__(hook.layer(), both(x))),
        (f"blocks.{block}.hook_resid_post", lambda x, hook: setattr(seen, "stream", x[rows].to(dtype))),
        (points(later, "hook_resid_pre"), lambda x, hook: seen.before.__setitem__(hook.layer(), x[rows].to(dtype))),
        (points(later, f"attn.{final_point(vit.cfg, 'q')}"), keep_query),
        (points(later, "attn.hook_v"), lambda v, hook: values.__setitem__(hook.layer(), v.to(dtype))),
        (points(later, "attn.hook_attn_scores"), keep_scores),
        (points(later, "attn.hook_pattern"), keep_pattern),
    ]
    with vit.hooks(hooks):
        seen.final = vit(batch.to(vit.device), stop_at_layer=n_layers).to(dtype)
    return seen
