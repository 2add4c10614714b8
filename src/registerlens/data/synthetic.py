"""The images on which register neurons emerged in `registerlens:tiny`: textures to read, marks that need look-ups.

Every image is a grid of patches with roles placed at random. A normal patch shows one texture for each attribute and
must report its own classes. A key patch is a normal one with a mark. A trigger shows only a mark and must report, for
attribute k, the class of the key of type (type + k) mod 4. A flat patch is one colour: it has nothing to report, and
that is where outlier tokens appear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.data.flat_content import flat_contents
from registerlens.data.synthetic_task import SyntheticTask

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
        shown = ((self.roles == NORMAL) | (self.roles == KEY))[..., None].long().expand_as(self.labels)
        counts = shown.new_zeros(len(shown), int(self.labels.max()) + 1, shown.shape[-1])
        return counts.scatter_add(1, self.labels, shown).argmax(1)


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

    shown = torch.stack([textures[k][own[..., k]] for k in range(task.n_attributes)]).sum(0)
    brightness = 0.2 + 0.8 * torch.rand(*roles.shape, 3, 1, 1, generator=generator)
    noise = torch.randn(shown.shape, generator=generator)
    flat = roles == FLAT
    shown[flat] = flat_contents(int(flat.sum()), task.patch, task.flat_content, generator)
    return (
        shown * ~only(TRIGGER)
        + keys[types] * only(KEY)
        + triggers[types] * only(TRIGGER)
        + brightness * ~only(TRIGGER)
        + noise * torch.where(only(FLAT), task.flat_noise, task.noise)
    )
