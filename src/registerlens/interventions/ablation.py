"""Ablate neurons, heads or tokens: to zero, to something the model has met before, or by a dose between (`Scale`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.engine.stream import Batch, stream
from registerlens.errors import ConfigError, InterventionError, ShapeError, check_choice
from registerlens.interventions.base import Edit, Host, Intervention, Scene
from registerlens.interventions.choices import Mode
from registerlens.interventions.targets import Heads, Target, TargetPart, Tokens, parts_of
from registerlens.model.vit import Hook, HookedViT

BANK = 32
"""Reference images from which "shuffle" and "resample" draw; a random sample of those seen by `fit`."""
NEEDS_BANK = ("shuffle", "resample")
"""Modes that draw other images' activations."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the ablated features usually are, one entry a hook point, each with features of its own; by `Ablate.fit`."""

    mean: dict[str, Float[Tensor, "kind _feature"]]
    """Mean over images; a row for each prefix token and trained register, then one for all patches."""
    std: dict[str, Float[Tensor, "kind _feature"]]
    """Standard deviation over images (and patches)."""
    bank: dict[str, Float[Tensor, "image pos _feature"]]
    """Whole activations of a random sample of the images; empty where the mode needs none."""
    n_images: int
    """Images it was fitted on."""


class Fitter:
    """Streaming sums and a reservoir sample for each hook point.

    Args:
        parts: the hook points and their features; no point twice.
        keep_bank: whether whole activations of a sample of the images are kept.
        seed: of that sample.
    """

    def __init__(self, parts: list[TargetPart], keep_bank: bool, seed: int) -> None:
        self.parts, self.keep_bank = parts, keep_bank
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.bank: dict[str, list[Tensor]] = {part.point: [] for part in parts}
        self.generator = torch.Generator().manual_seed(seed)
        self.n_images = 0

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """The target's hook points."""
        self.slots: list[int | None] | None = None

        def hook_for(part: TargetPart) -> Hook:
            return part.point, lambda x, hook: self._take(part, part.read(x).detach(), layout)

        return [hook_for(part) for part in self.parts]

    def update(self, batch: Batch) -> None:
        """Count the images."""
        self.n_images += len(batch)

    def _draw_slots(self, n: int) -> list[int | None]:
        """Which place of the reservoir each of the next `n` images takes, the same at every hook point."""
        chosen: list[int | None] = []
        for i in range(self.n_images, self.n_images + n):
            slot = i if i < BANK else int(torch.randint(i + 1, (), generator=self.generator))
            chosen.append(slot if slot < BANK and self.keep_bank else None)
        return chosen

    def _take(self, part: TargetPart, x: Float[Tensor, "batch pos feature"], layout: TokenLayout) -> None:
        self.slots = self._draw_slots(len(x)) if self.slots is None else self.slots
        wide = x.double() if x.device.type != "mps" else x.float()
        kinds = _kinds(layout).to(x.device)
        n_kinds = layout.patches.start + 1
        shape = (n_kinds, x.shape[-1])
        zero = wide.new_zeros(shape)
        counts = torch.bincount(kinds, minlength=n_kinds).to(wide)[:, None] * len(x)
        new = (
            zero.index_add(0, kinds, wide.sum(0)),
            zero.index_add(0, kinds, wide.square().sum(0)),
            counts,
        )
        old = self.sums.get(part.point)
        self.sums[part.point] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]
        bank = self.bank[part.point]
        for row, slot in zip(x, self.slots, strict=True):
            if slot is not None:
                bank[slot : slot + 1] = [row.float().cpu().clone()]

    def result(self) -> Reference:
        """What was fitted.

        Raises:
            ShapeError: the images differ in size, and whole activations are kept.
        """
        mean, std = {}, {}
        for point, (total, square, n) in self.sums.items():
            average = total / n.clamp_min(1)
            mean[point] = average.float().cpu().clone()
            std[point] = (square / n.clamp_min(1) - average.square()).clamp_min(0).sqrt().float().cpu().clone()
        shapes = {row.shape for rows in self.bank.values() for row in rows}
        if self.keep_bank and len({shape[0] for shape in shapes}) > 1:
            raise ShapeError("Images of one size are needed to draw other images' activations; these differ.")
        bank = {point: torch.stack(rows).clone() for point, rows in self.bank.items() if rows}
        return Reference(mean=mean, std=std, bank=bank, n_images=self.n_images)


def _kinds(layout: TokenLayout) -> Int[Tensor, " pos"]:
    """A row index for each token: prefix tokens and trained registers have their own, all patches share the last."""
    return torch.arange(layout.n_tokens).clamp_max(layout.patches.start)


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Replace neurons (at every token), heads (at every token) or tokens by something uninformative.

    Zeroing leaves the range that later layers know and overstates what was lost (Parodi et al. 2026); the other modes
    stay within it. They need reference activations: `Ablate.fit(vit, images, target, mode)`.

    Args:
        target: a `RegisterNeurons`, `Heads` or `Tokens`.
        mode: "zero"; "mean" over images (and patches); "noise", Gaussian of that mean and standard deviation;
            "shuffle", the activations of another image as a whole; "resample", every value drawn on its own from other
            images and patches.
        reference: what was fitted.
        seed: of the draws. They differ from image to image and are the same for an image alone or in a batch.

    Raises:
        ConfigError: an unknown mode, or a mode without its reference.

    Source: Jiang et al. 2025 (zeroing); Parodi et al. 2026, 2604.14433 (mean, noise, shuffle).

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(4, 3, 48, 48)
        >>> ablation = rl.Ablate.fit(vit, images, rl.Heads([(2, 0)]), mode="mean")
        >>> with torch.no_grad(), vit.edit(ablation):
        ...     vit(images).shape
        torch.Size([4, 36, 52])
    """

    target: Target
    mode: Mode = "zero"
    _: KW_ONLY
    reference: Reference | None = field(default=None, repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_target("Ablate", self.target)
        check_choice("mode", self.mode, get_args(Mode))
        if self.mode != "zero" and self.reference is None:
            raise ConfigError(
                f"mode={self.mode!r} needs reference activations. Make it with "
                f"rl.Ablate.fit(vit, images, target, mode={self.mode!r})."
            )

    @classmethod
    def fit(
        cls,
        vit: HookedViT,
        images: Images,
        target: Target,
        mode: Mode = "mean",
        *,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Ablate:
        """Fit what the mode needs in one streaming pass over images.

        Args:
            vit: the model.
            images: preprocessed, as a tensor or in batches; for "shuffle" and "resample" all of one size.
            target: what will be ablated.
            mode: as above.
            seed: of the random sample of images, and of later draws.
            batch_size: images at once when a tensor is given.

        Raises:
            ImageError: there are no images.
            InterventionError: the model lacks what is to be ablated.
            ShapeError: the images differ in size where the mode needs one.
        """
        zeroing = cls(target)
        fitter = Fitter(parts_of(target, vit.cfg), mode in NEEDS_BANK, seed)
        [reference] = stream(vit, images, [fitter], batch_size=batch_size, description="fitting the ablation")
        return replace(zeroing, mode=mode, reference=reference, seed=seed)

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """One edit for each hook point of the target."""
        parts = parts_of(self.target, host.cfg)
        for part in parts:
            if self.mode != "zero" and part.point not in self._reference().mean:
                raise InterventionError(f"The reference has nothing for {part.point}; fit it on this model.")
        return [Edit(part.point, partial(self._change, part)) for part in parts]

    def _change(self, part: TargetPart, x: Tensor, scene: Scene) -> Tensor:
        chosen = part.read(x)
        return part.write(x, self._replacement(part.point, chosen, scene), scene.layout)

    def _replacement(self, point: str, x: Tensor, scene: Scene) -> Float[Tensor, "#batch #pos feature"]:
        if self.mode == "zero" or self.reference is None:
            return x.new_zeros(1, 1, x.shape[-1])
        kinds = _kinds(scene.layout)
        mean, std = self.reference.mean[point], self.reference.std[point]
        if mean.shape != (scene.layout.patches.start + 1, x.shape[-1]):
            raise InterventionError(f"The reference for {point} has shape {list(mean.shape)}; fit it on this model.")
        if self.mode == "mean":
            return mean[kinds][None].to(x.device)
        if self.mode == "shuffle":
            _check_length(self.reference.bank[point].shape[1], scene.layout)
        rows = [self._draw(point, mean[kinds], std[kinds], kinds, own) for own in self._generators(point, scene)]
        return torch.stack(rows).to(x.device)

    def _generators(self, point: str, scene: Scene) -> Iterator[torch.Generator]:
        # Another stream for every hook point, but for "shuffle": there one other image is taken throughout.
        offset = 0 if self.mode == "shuffle" else 1 + sorted(self._reference().mean).index(point)
        return iter(scene.generators(self.seed + 1000 * offset))

    def _draw(
        self, point: str, mean: Tensor, std: Tensor, kinds: Int[Tensor, " pos"], own: torch.Generator
    ) -> Float[Tensor, "pos feature"]:
        if self.mode == "noise":
            return mean + std * torch.randn(mean.shape, generator=own)
        bank = self._reference().bank[point]
        if self.mode == "shuffle":
            return bank[int(torch.randint(len(bank), (), generator=own))]
        n_prefix = int(kinds.max())
        samples = []
        for pool in (*bank[:, :n_prefix].unbind(1), rearrange(bank[:, n_prefix:], "image pos f -> (image pos) f")):
            n = int((kinds == len(samples)).sum())
            samples.append(pool.gather(0, torch.randint(len(pool), (n, pool.shape[1]), generator=own)))
        return torch.cat(samples)

    def _reference(self) -> Reference:
        if self.reference is None:  # __post_init__ has seen to it
            raise ConfigError(f"mode={self.mode!r} has no reference.")
        return self.reference


def _check_target(kind: str, target: object) -> None:
    if not isinstance(target, RegisterNeurons | Heads | Tokens):
        raise ConfigError(
            f"{kind} takes a RegisterNeurons, rl.Heads or rl.Tokens, got {type(target).__name__}. For a list of "
            f"(layer, neuron) use rl.RegisterNeurons.from_pairs."
        )


def _check_length(n_tokens: int, layout: TokenLayout) -> None:
    """Whole activations of other images fit a sequence of as many tokens only."""
    if n_tokens != layout.n_tokens:
        n_registers = layout.n_test_time_registers
        raise InterventionError(
            f"Other images' activations have {n_tokens} tokens, this sequence has {layout.n_tokens}"
            f"{f', {n_registers} of them test-time registers' if n_registers else ''}. Fit on images of this size, "
            f"inside the same vit.edit(...)."
        )


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiply neurons (at every token), heads (their output z, at every token) or tokens after a block by a factor.

    Args:
        target: a `RegisterNeurons`, `Heads` or `Tokens`.
        factor: 0 is zero ablation, 1 changes nothing, above 1 amplifies, below 0 turns round.

    Raises:
        ConfigError: another kind of target, or a factor that is no finite number.

    Example:
        >>> import torch, registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> with torch.no_grad(), vit.edit(Scale(neurons, 0.5)):
        ...     vit(images).shape
        torch.Size([2, 36, 52])
    """

    target: Target
    factor: float | int

    def __post_init__(self) -> None:
        _check_target("Scale", self.target)
        if not (isinstance(self.factor, int | float) and math.isfinite(self.factor)):
            raise ConfigError(f"The factor must be a finite number, got {self.factor!r}.")
        object.__setattr__(self, "factor", float(self.factor))  # 1 and 1.0 are the same edit, and have the same hash

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """One edit for each hook point of the target."""
        return [Edit(part.point, partial(self._change, part)) for part in parts_of(self.target, host.cfg)]

    def _change(
        self, part: TargetPart, x: Float[Tensor, "batch pos ..."], scene: Scene
    ) -> Float[Tensor, "batch pos ..."]:
        return part.write(x, part.read(x) * self.factor, scene.layout)
