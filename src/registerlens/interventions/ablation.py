"""Ablate neurons, heads or tokens: to zero, or to something the model has met before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import TokenLayout, ViTConfig
from registerlens.data.batches import Images, count, in_batches
from registerlens.errors import ConfigError, ImageError, InterventionError, ShapeError
from registerlens.files import read_tensors, reading, whole_file, write_json
from registerlens.interventions.base import Edit, Host, Intervention, Scene
from registerlens.model.vit import HookedViT
from registerlens.progress import track

Mode = Literal["zero", "mean", "noise", "shuffle", "resample"]
BANK = 32
"""Reference images from which "shuffle" and "resample" draw; a random sample of those seen by `fit`."""


# What is ablated -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Attention heads: what is ablated is their output z, before the output projection.

    Example:
        >>> Heads([(3, 0), (3, 5)]).pairs
        ((3, 0), (3, 5))
    """

    pairs: tuple[tuple[int, int], ...]
    """(layer, head) of each."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        object.__setattr__(self, "pairs", tuple((int(layer), int(head)) for layer, head in pairs))


@dataclass(frozen=True)
class Tokens:
    """Tokens of the residual stream after a block.

    Example:
        >>> Tokens(3, "trained_registers").layer, Tokens(3, [0, 7]).which
        (3, (0, 7))
    """

    layer: int
    """The block after which they are replaced."""
    which: Literal["cls", "trained_registers"] | tuple[int, ...]
    """[CLS], the trained registers, or patches by index (row by row)."""

    def __init__(self, layer: int, which: Literal["cls", "trained_registers"] | Iterable[int]) -> None:
        if isinstance(which, str) and which not in ("cls", "trained_registers"):
            raise ConfigError(f"which must be 'cls', 'trained_registers' or patch indices, got {which!r}.")
        chosen = which if isinstance(which, str) else tuple(int(patch) for patch in which)
        object.__setattr__(self, "layer", int(layer))
        object.__setattr__(self, "which", chosen)

    def positions(self, layout: TokenLayout) -> Bool[Tensor, " pos"]:
        """Where they are in a sequence.

        Raises:
            InterventionError: there are no such tokens.
        """
        mask = torch.zeros(layout.n_tokens, dtype=torch.bool)
        if self.which == "cls" and layout.cls is not None:
            mask[layout.cls] = True
        elif self.which == "trained_registers":
            mask[layout.trained_registers] = True
        elif not isinstance(self.which, str):
            wrong = [patch for patch in self.which if not 0 <= patch < layout.n_patches]
            if wrong:
                raise InterventionError(f"Patches {wrong[:5]} do not exist: there are 0 to {layout.n_patches - 1}.")
            mask[torch.tensor(self.which, dtype=torch.long) + layout.patches.start] = True
        if not mask.any():
            raise InterventionError(f"Nothing to ablate: the sequence has no tokens {self.which!r}.")
        return mask


Target = RegisterNeurons | Heads | Tokens


@dataclass(frozen=True)
class _Part:
    """One hook point, the features of it that are ablated, and whose tokens."""

    point: str
    index: tuple[int, ...] | None = None
    """Neurons, or heads; None is every feature."""
    tokens: Tokens | None = None
    """None is every token."""

    def read(self, x: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos feature"]:
        chosen = x if self.index is None else x[:, :, torch.tensor(self.index, device=x.device)]
        return chosen.flatten(2)

    def write(
        self, x: Float[Tensor, "batch pos ..."], new: Float[Tensor, "#batch #pos feature"], layout: TokenLayout
    ) -> Float[Tensor, "batch pos ..."]:
        if self.tokens is not None:
            return torch.where(self.tokens.positions(layout).to(x.device)[:, None], new.to(x.dtype), x)
        index = torch.tensor(self.index, device=x.device)
        shape = (len(x), x.shape[1], len(index), *x.shape[3:])
        return x.index_copy(2, index, new.to(x.dtype).expand(*shape[:2], -1).reshape(shape))


def _parts(target: Target, cfg: ViTConfig) -> list[_Part]:
    """The hook points a target stands for.

    Raises:
        InterventionError: the model has no such neuron, head, layer or kind of token.
    """
    if isinstance(target, RegisterNeurons):
        listed = target.check(cfg).by_layer()
        return [_Part(f"blocks.{layer}.mlp.hook_post", index) for layer, index in listed.items()]
    if isinstance(target, Heads):
        wrong = [(a, h) for a, h in target.pairs if not (0 <= a < cfg.n_layers and 0 <= h < cfg.n_heads)]
        if wrong:
            raise InterventionError(
                f"Heads {wrong[:5]} do not exist: the model has blocks 0 to {cfg.n_layers - 1} with heads 0 to "
                f"{cfg.n_heads - 1} each."
            )
        layers = sorted({layer for layer, _ in target.pairs})
        return [
            _Part(f"blocks.{layer}.attn.hook_z", tuple(sorted({h for at, h in target.pairs if at == layer})))
            for layer in layers
        ]
    if not 0 <= target.layer < cfg.n_layers:
        raise InterventionError(f"Block {target.layer} does not exist: there are 0 to {cfg.n_layers - 1}.")
    if isinstance(target.which, str):
        target.positions(cfg.layout())
    return [_Part(f"blocks.{target.layer}.hook_resid_post", tokens=target)]


# What it is ablated to -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reference:
    """What the ablated features usually are, one entry a hook point; fitted by `Ablate.fit`."""

    mean: dict[str, Float[Tensor, "kind feature"]]
    """Mean over images; a row for each prefix token and trained register, then one for all patches."""
    std: dict[str, Float[Tensor, "kind feature"]]
    """Standard deviation over images (and patches)."""
    bank: dict[str, Float[Tensor, "image pos feature"]]
    """Whole activations of a random sample of the images; empty where the mode needs none."""
    n_images: int
    """Images it was fitted on."""


class _Fitter:
    """Streaming sums and a reservoir sample for each hook point."""

    def __init__(self, parts: list[_Part], keep_bank: bool, seed: int) -> None:
        self.parts, self.keep_bank = parts, keep_bank
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.bank: dict[str, list[Tensor]] = {part.point: [] for part in parts}
        self.generator = torch.Generator().manual_seed(seed)
        self.n_images = 0

    def hooks(self, layout: TokenLayout, slots: list[int | None]) -> list[Any]:
        def hook_for(part: _Part) -> Any:
            return part.point, lambda x, hook: self._take(part, part.read(x).detach(), layout, slots)

        return [hook_for(part) for part in self.parts]

    def slots(self, n: int) -> list[int | None]:
        """Which place of the reservoir each of the next `n` images takes, the same at every hook point."""
        chosen: list[int | None] = []
        for i in range(self.n_images, self.n_images + n):
            slot = i if i < BANK else int(torch.randint(i + 1, (), generator=self.generator))
            chosen.append(slot if slot < BANK and self.keep_bank else None)
        self.n_images += n
        return chosen

    def _take(self, part: _Part, x: Float[Tensor, "batch pos feature"], layout: TokenLayout, slots: list) -> None:
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
        for row, slot in zip(x, slots, strict=True):
            if slot is not None:
                bank[slot : slot + 1] = [row.float().cpu().clone()]

    def result(self) -> Reference:
        if not self.n_images:
            raise ImageError("No image to fit the ablation on.")
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
    stay within it. They need reference activations: `Ablate.fit(vit, target, images, mode)`.

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
        >>> ablation = rl.Ablate.fit(vit, rl.Heads([(2, 0)]), images, mode="mean")
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
        if not isinstance(self.target, RegisterNeurons | Heads | Tokens):
            raise ConfigError(
                f"Ablate takes a RegisterNeurons, rl.Heads or rl.Tokens, got {type(self.target).__name__}. For a list "
                f"of (layer, neuron) use rl.RegisterNeurons.from_pairs."
            )
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {list(get_args(Mode))}, got {self.mode!r}.")
        if self.mode != "zero" and self.reference is None:
            raise ConfigError(
                f"mode={self.mode!r} needs reference activations. Make it with "
                f"rl.Ablate.fit(vit, target, images, mode={self.mode!r})."
            )

    @classmethod
    def fit(
        cls,
        vit: HookedViT,
        target: Target,
        images: Images,
        mode: Mode = "mean",
        *,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Ablate:
        """Fit what the mode needs in one streaming pass over images.

        Args:
            vit: the model.
            target: what will be ablated.
            images: preprocessed, as a tensor or in batches; for "shuffle" and "resample" all of one size.
            mode: as above.
            seed: of the random sample of images, and of later draws.
            batch_size: images at once when a tensor is given.

        Raises:
            ImageError: there are no images.
            InterventionError: the model has not what is to be ablated.
            ShapeError: the images differ in size where the mode needs one.
        """
        zeroing = cls(target)
        fitter = _Fitter(_parts(target, vit.cfg), mode in ("shuffle", "resample"), seed)
        with torch.inference_mode():
            for batch in track(in_batches(images, batch_size), "fitting the ablation", count(images), len):
                with vit.hooks(fitter.hooks(vit.layout(batch), fitter.slots(len(batch)))):
                    vit(batch.to(vit.device), stop_at_layer=vit.cfg.n_layers)
        return replace(zeroing, mode=mode, reference=fitter.result(), seed=seed)

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """One edit for each hook point of the target."""
        parts = _parts(self.target, host.cfg)
        for part in parts:
            if self.mode != "zero" and part.point not in self._reference().mean:
                raise InterventionError(f"The reference has nothing for {part.point}; fit it on this model.")
        return [Edit(part.point, partial(self._change, part)) for part in parts]

    def _change(self, part: _Part, x: Tensor, scene: Scene) -> Tensor:
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
        drawn = []
        for pool in (*bank[:, :n_prefix].unbind(1), rearrange(bank[:, n_prefix:], "image pos f -> (image pos) f")):
            n = int((kinds == len(drawn)).sum())
            drawn.append(pool.gather(0, torch.randint(len(pool), (n, pool.shape[1]), generator=own)))
        return torch.cat(drawn)

    def _reference(self) -> Reference:
        if self.reference is None:  # __post_init__ has seen to it
            raise ConfigError(f"mode={self.mode!r} has no reference.")
        return self.reference

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ablation.json and, where there is a reference, ablation.safetensors; returns the folder."""
        from registerlens import __version__  # noqa: PLC0415

        folder = Path(folder)
        n_images = 0
        if self.reference is not None:
            n_images = self.reference.n_images
            tensors = {
                f"{kind}/{point}": tensor.contiguous()
                for kind in ("mean", "std", "bank")
                for point, tensor in getattr(self.reference, kind).items()
            }
            with whole_file(folder / "ablation.safetensors") as temporary:
                save_file(tensors, temporary)
        described = {"version": __version__, "mode": self.mode, "seed": self.seed, "n_images": n_images}
        write_json(folder / "ablation.json", described | {"target": _target_to_dict(self.target)})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Ablate:
        """Read what `save` wrote.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        folder = Path(folder)
        with reading(folder / "ablation.json") as told:
            target, n_images = _target_from_dict(told["target"]), told["n_images"]
            mode, seed = told["mode"], told["seed"]
        reference = None
        if n_images:
            tensors = read_tensors(folder / "ablation.safetensors")
            parts = {
                kind: {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}
                for kind in ("mean", "std", "bank")
            }
            reference = Reference(**parts, n_images=n_images)
        return cls(target, mode, reference=reference, seed=seed)


def _check_length(n_tokens: int, layout: TokenLayout) -> None:
    """Whole activations of other images fit a sequence of as many tokens only."""
    if n_tokens != layout.n_tokens:
        n_registers = layout.n_test_time_registers
        raise InterventionError(
            f"Other images' activations have {n_tokens} tokens, this sequence has {layout.n_tokens}"
            f"{f', {n_registers} of them test-time registers' if n_registers else ''}. Fit on images of this size, "
            f"inside the same vit.edit(...)."
        )


def _target_to_dict(target: Target) -> dict[str, Any]:
    if isinstance(target, RegisterNeurons):
        return {"kind": "neurons", **target.to_dict()}
    if isinstance(target, Heads):
        return {"kind": "heads", "pairs": [list(pair) for pair in target.pairs]}
    which = target.which if isinstance(target.which, str) else list(target.which)
    return {"kind": "tokens", "layer": target.layer, "which": which}


def _target_from_dict(values: dict[str, Any]) -> Target:
    kind = values.get("kind")
    if kind == "neurons":
        return RegisterNeurons.from_dict(values)
    if kind == "heads":
        return Heads((layer, head) for layer, head in values["pairs"])
    if kind == "tokens":
        return Tokens(values["layer"], values["which"])
    raise ConfigError(f"Unknown kind of target {kind!r}: expected neurons, heads or tokens.")
