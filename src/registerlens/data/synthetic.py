"""The images on which register neurons emerged in `registerlens:tiny`: textures to read, marks that need look-ups.

Every image is a grid of patches with roles placed at random. A normal patch shows one texture for each attribute and
must report its own classes. A key patch is a normal one with a mark. A trigger shows only a mark and must report, for
attribute k, the class of the key of type (type + k) mod 4. A flat patch is one colour: it has nothing to report, and
that is where outlier tokens appear.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic_task import FlatContent, SyntheticTask
from registerlens.errors import ConfigError

CONTRAST = 0.4
"""Standard deviation of what is shown, in pixel units: that of the textures is 0.5, of the noise on them 0.6."""
SHRUNK_TO = 256
"""Height and width that photographs are shrunk to before patches are cut out."""
SMOOTHEST = 0.3
"""The share of a photograph's patches, those of least contrast, that count as background."""


def flat_contents(
    n: int, patch: int, kinds: tuple[FlatContent, ...], generator: torch.Generator
) -> Float[Tensor, "n 3 height width"]:
    """The content of `n` flat patches, each of a kind drawn from `kinds`; of mean zero over a patch.

    Raises:
        ConfigError: photographs are asked for, and no installed package has any.

    Example:
        >>> shown = flat_contents(4, 8, ("gradient", "soft_noise"), torch.Generator().manual_seed(0))
        >>> shown.shape, bool(shown.mean((2, 3)).abs().max() < 1e-6)
        (torch.Size([4, 3, 8, 8]), True)
    """
    of_kind = torch.stack([_CONTENT[kind](n, patch, generator) for kind in kinds])
    if len(kinds) == 1:
        return of_kind[0]
    choice = torch.randint(len(kinds), (n,), generator=generator)
    return of_kind[choice, torch.arange(n)]


def _nothing(n: int, patch: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(n, 3, patch, patch)


def _gradients(n: int, patch: int, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * torch.rand(n, 1, 1, 1, generator=generator)
    slope = torch.randn(n, 3, 1, 1, generator=generator)
    steps = torch.linspace(-1, 1, patch)
    ramp = steps * angle.cos() + steps[:, None] * angle.sin()
    return slope * ramp / steps.std(correction=0) * CONTRAST


def _soft_noise(n: int, patch: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(n, 3, 3, 3, generator=generator)
    soft = F.interpolate(coarse, size=(patch, patch), mode="bicubic", align_corners=True)
    soft = soft - soft.mean((2, 3), keepdim=True)
    return soft / soft.std((1, 2, 3), keepdim=True, correction=0) * CONTRAST


def _photographs(n: int, patch: int, generator: torch.Generator) -> Tensor:
    bank = _backgrounds(patch)
    return bank[torch.randint(len(bank), (n,), generator=generator)]


@lru_cache(maxsize=2)
def _backgrounds(patch: int) -> Float[Tensor, "n 3 height width"]:
    """The smoothest patches of every photograph at hand, brought to equal contrast."""
    import numpy as np  # only where photographs are asked for
    from PIL import Image

    cuts = []
    for path in shipped_photographs():
        small = Image.open(path).convert("RGB").resize((SHRUNK_TO, SHRUNK_TO), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.array(small)).float() / 255
        whole = SHRUNK_TO // patch * patch
        cut = rearrange(pixels[:whole, :whole], "(h p) (w q) c -> (h w) c p q", p=patch, q=patch)
        cut = cut - cut.mean((2, 3), keepdim=True)
        spread = cut.std((1, 2, 3), correction=0)
        order = spread.argsort()[: int(SMOOTHEST * len(cut))]
        cuts.append((cut / spread.clamp_min(1e-3)[:, None, None, None] * CONTRAST)[order])
    if not cuts:
        raise ConfigError(
            "flat_content 'photographs' needs the photographs that come with scikit-image, scikit-learn or matplotlib; "
            "none is installed. Install one of them, or take 'soft_noise'."
        )
    return torch.cat(cuts)


_CONTENT: dict[FlatContent, Callable[[int, int, torch.Generator], Tensor]] = dict(
    zip(get_args(FlatContent), (_nothing, _gradients, _soft_noise, _photographs), strict=True)
)


NORMAL, KEY, TRIGGER, FLAT = range(4)
ROLES = ("normal", "key", "trigger", "flat")


@dataclass(frozen=True, kw_only=True)
class SyntheticBatch:
    """Images with what every patch is and must report."""

    images: Float[Tensor, "batch 3 height width"]
    """Pixels, ready for the model."""
    labels: Int[Tensor, "batch patch attribute"]
    """The class of each attribute; `n_classes` ("none") on flat patches."""
    roles: Int[Tensor, "batch patch"]
    """NORMAL, KEY, TRIGGER or FLAT."""
    types: Int[Tensor, "batch patch"]
    """Type of a key or trigger; 0 elsewhere."""

    @property
    def image_labels(self) -> Int[Tensor, "batch attribute"]:
        """What a [CLS] token must report: for each attribute, the class that most of the patches show which show one
        (normal ones and keys); of equally frequent ones the lowest."""
        carries = ((self.roles == NORMAL) | (self.roles == KEY))[..., None].long().expand_as(self.labels)
        counts = carries.new_zeros(len(carries), int(self.labels.max()) + 1, carries.shape[-1])
        return counts.scatter_add(1, self.labels, carries).argmax(1)


@lru_cache(maxsize=8)
def _banks(task: SyntheticTask) -> tuple[Tensor, Tensor, Tensor]:
    """Textures [attribute, class, 3, p, p], trigger marks and key marks [type, 3, p, p], of equal contrast."""
    generator = torch.Generator().manual_seed(task.texture_seed)

    def bank(n: int) -> Tensor:
        raw = torch.randn(n, 3, task.patch, task.patch, generator=generator)
        raw = raw - raw.mean((2, 3), keepdim=True)
        norm = raw.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return raw / norm * 0.5 * math.sqrt(3 * task.patch**2)

    textures = bank(task.n_attributes * task.n_classes).unflatten(0, (task.n_attributes, task.n_classes))
    triggers, keys = bank(task.n_types), bank(task.n_types)
    triggers[0] = 0  # the blank trigger: noise alone
    return textures, triggers, keys


def synthetic_images(n: int, seed: int = 0, task: SyntheticTask | None = None) -> SyntheticBatch:
    """Draw `n` images; equal seeds give equal bits.

    Args:
        n: how many.
        seed: of everything drawn.
        task: settings; default: those `registerlens:tiny` was trained on.

    Example:
        >>> batch = synthetic_images(2, 0)
        >>> batch.images.shape, batch.labels.shape
        (torch.Size([2, 3, 48, 48]), torch.Size([2, 36, 4]))
    """
    task = task or SyntheticTask()
    generator = torch.Generator().manual_seed(seed)
    roles, types, key_positions = _place(n, task, generator)
    own = torch.randint(0, task.n_classes, (n, task.grid**2, task.n_attributes), generator=generator)
    labels = _labels(own, roles, types, key_positions, task)
    patches = _paint(own, roles, types, task, generator)
    images = rearrange(patches, "n (h w) c p q -> n c (h p) (w q)", h=task.grid)
    return SyntheticBatch(images=images, labels=labels, roles=roles, types=types)


def _place(n: int, task: SyntheticTask, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Roles and types [n, patch], and where the key of each type is [n, type]."""
    order = torch.rand(n, task.grid**2, generator=generator).argsort(1)
    key_positions, rest = order[:, : task.n_types], order[:, task.n_types :]
    fewest, most = task.flats
    n_flat = fewest + torch.randint(0, most - fewest + 1, (n, 1), generator=generator)
    rank = torch.arange(rest.shape[1]).expand(n, -1)
    chosen = torch.where(rank < n_flat, FLAT, torch.where(rank < n_flat + task.n_triggers, TRIGGER, NORMAL))
    roles = torch.full((n, task.grid**2), NORMAL).scatter(1, rest, chosen).scatter(1, key_positions, KEY)
    types = torch.zeros_like(roles).scatter(1, key_positions, torch.arange(task.n_types).expand(n, -1))
    asked = torch.randint(0, task.n_types, roles.shape, generator=generator)
    return roles, torch.where(roles == TRIGGER, asked, types), key_positions


def _labels(own: Tensor, roles: Tensor, types: Tensor, key_positions: Tensor, task: SyntheticTask) -> Tensor:
    labels = own.clone()
    for k in range(task.n_attributes):
        source = key_positions.gather(1, (types + k) % task.n_types)
        labels[..., k] = torch.where(roles == TRIGGER, own[..., k].gather(1, source), own[..., k])
    return labels.masked_fill((roles == FLAT)[..., None], task.n_classes)


def _paint(own: Tensor, roles: Tensor, types: Tensor, task: SyntheticTask, generator: torch.Generator) -> Tensor:
    textures, triggers, keys = _banks(task)  # type: ignore[arg-type]  (what is frozen has a hash)

    def only(*which: int) -> Tensor:
        return torch.isin(roles, torch.tensor(which))[..., None, None, None]

    pixels = torch.stack([textures[k][own[..., k]] for k in range(task.n_attributes)]).sum(0)
    brightness = 0.2 + 0.8 * torch.rand(*roles.shape, 3, 1, 1, generator=generator)
    noise = torch.randn(pixels.shape, generator=generator)
    flat = roles == FLAT
    pixels[flat] = flat_contents(int(flat.sum()), task.patch, task.flat_content, generator)
    return (
        pixels * ~only(TRIGGER)
        + keys[types] * only(KEY)
        + triggers[types] * only(TRIGGER)
        + brightness * ~only(TRIGGER)
        + noise * torch.where(only(FLAT), task.flat_noise, task.noise)
    )
