"""Shift register neurons: onto chosen patches (MoveOutliers), or onto an extra token (TestTimeRegisters)."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import TokenLayout
from registerlens.errors import ConfigError, InterventionError, check_choice
from registerlens.interventions.base import Edit, Host, Intervention, Scene
from registerlens.interventions.choices import Assign, Clear, Extreme, Start
from registerlens.model.names import TOKENS
from registerlens.model.norms import Norm

Positions = int | Sequence[int] | Bool[Tensor, "grid_h grid_w"] | Callable[[Tensor], Shaped[Tensor, "batch ..."]]
"""Patches by index (row by row), as a grid of booleans, or as a function of the images [batch, channel, height, width]
that gives indices [batch, n] or booleans [batch, grid_h, grid_w] or [batch, patch]."""


Target = Callable[[int, Scene], Tensor]
"""From a layer and the batch to the tokens that receive activations: booleans [batch, pos] or [batch, pos, neuron]."""


@dataclass(frozen=True)
class Shift(Intervention):
    """What both interventions share: register neurons, and how their activations move.

    Example:
        >>> post = torch.tensor([[[5.0], [1.0], [2.0]]])  # one image: [CLS] and two patches, one neuron
        >>> target = torch.tensor([[False, False, True]])
        >>> shift = MoveOutliers(RegisterNeurons.from_pairs([(0, 0)]), 1)
        >>> shift._moved(post, target, TokenLayout(grid=(1, 2), n_prefix=1))[0, :, 0]
        tensor([0., 0., 5.])
    """

    neurons: RegisterNeurons
    _: KW_ONLY
    extreme: Extreme = "per_neuron"
    source: Literal["all", "patches"] = "all"
    clear: Clear = "all"
    fill: Literal["zero", "mean"] = "zero"
    maxima_of: RegisterNeurons | None = None

    def __post_init__(self) -> None:
        known = {"extreme": get_args(Extreme), "source": ("all", "patches"), "clear": get_args(Clear)}
        for name, values in (known | {"fill": ("zero", "mean")}).items():
            check_choice(name, getattr(self, name), values)
        if self.maxima_of is not None:
            ours, theirs = (
                {layer: len(n) for layer, n in which.by_layer().items()} for which in (self.neurons, self.maxima_of)
            )
            if ours != theirs:
                raise ConfigError(f"maxima_of needs as many neurons in each layer: {theirs} for {ours}.")

    def _shifts(self, host: Host, target: Target) -> tuple[Edit, ...]:
        """One edit for each layer that has neurons."""
        maxima = self.maxima_of.by_layer() if self.maxima_of is not None else {}

        def change(layer: int, listed: list[int], post: Tensor, scene: Scene) -> Tensor:
            index = torch.tensor(listed, device=post.device)
            values = None
            if layer in maxima:
                values = self._values(post[..., torch.tensor(maxima[layer], device=post.device)], scene.layout)
            aim = target(layer, scene).to(post.device)
            moved = self._moved(post[..., index], aim, scene.layout, values)
            return post.index_copy(-1, index, moved.to(post.dtype))

        return tuple(
            Edit(f"blocks.{layer}.mlp.hook_post", partial(change, layer, list(listed)))
            for layer, listed in self.neurons.check(host.cfg).by_layer().items()
        )

    def _values(self, post: Float[Tensor, "batch pos neuron"], layout: TokenLayout) -> Float[Tensor, "batch 1 neuron"]:
        """What the target receives: the extreme of each neuron, or the one signed extreme of all of them."""
        candidates = post[:, layout.patches] if self.source == "patches" else post
        if self.extreme == "per_neuron":
            # Not amax: its gradient counts ties, which compilers that compute the activation again may not find.
            return candidates.gather(1, candidates.argmax(1, keepdim=True))
        flat = candidates.flatten(1)
        signed = flat.gather(1, flat.abs().argmax(1, keepdim=True))
        return signed[..., None].expand(-1, 1, post.shape[-1])

    def _moved(
        self,
        post: Float[Tensor, "batch pos neuron"],
        target: Bool[Tensor, "#batch pos"] | Bool[Tensor, "#batch pos neuron"],
        layout: TokenLayout,
        values: Float[Tensor, "batch 1 neuron"] | None = None,
    ) -> Float[Tensor, "batch pos neuron"]:
        """Activations with the extremes at the target and the other tokens cleared; images without target stay."""
        values = self._values(post, layout) if values is None else values
        target = target[..., None] if target.ndim == 2 else target
        rest = post
        if self.clear != "none":
            filling = torch.zeros_like(values) if self.fill == "zero" else post.mean(1, keepdim=True)
            rest = torch.where(self._cleared(post, layout), filling, post)
        moved = torch.where(target, values, rest)
        return torch.where(target.flatten(1).any(1)[:, None, None], moved, post)

    def _cleared(self, post: Tensor, layout: TokenLayout) -> Bool[Tensor, "..."]:
        cleared = torch.zeros(1, post.shape[1], 1, dtype=torch.bool, device=post.device)
        if self.clear == "patches":
            cleared[:, layout.patches] = True
        elif self.clear == "all":
            cleared[:] = True
        else:  # outliers: where a neuron exceeds half of its maximum over the patches
            cleared = post > post[:, layout.patches].amax(1, keepdim=True).clamp_min(0) / 2
        return cleared


@dataclass(frozen=True)
class MoveOutliers(Shift):
    """Make outliers appear at chosen patches: register neurons fire there, with their maxima, and nowhere else.

    Args:
        neurons: the register neurons.
        positions: see `Positions`. An image for which a function gives no patch is left as it is.
        extreme: "per_neuron": each neuron's own maximum over the tokens (the paper); "shared": the value of largest
            magnitude, sign kept, over all tokens and all listed neurons of a layer (the authors' code).
        source: tokens over which that is taken.
        clear: which other tokens lose the activation: all of them, [CLS] included (the paper), "patches" only (the
            authors' code), "outliers" (tokens above half of the neuron's maximum), or "none".
        fill: what they get instead: zero, or the neuron's mean over the image's tokens.
        maxima_of: neurons whose extremes are used instead, as many in each layer: the control of figure 24.

    Source: Jiang et al. 2025, algorithm 2 and figures 1, 4, 29.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> with torch.no_grad(), vit.edit(rl.MoveOutliers(neurons, 7)):
        ...     vit(images, stop_at_layer=2).norm(dim=-1).argmax(1)
        tensor([7, 7])
    """

    positions: Positions

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.positions):
            _mask_of(self.positions, None)

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """The shift in every layer that has neurons."""
        return self._shifts(host, lambda _, scene: self._target(scene))

    def aim(self, scene: Scene) -> Bool[Tensor, "#batch patch"]:
        """The chosen patches; one row for all images where they do not depend on the image."""
        if callable(self.positions):
            images = scene.pixels()
            chosen = torch.as_tensor(self.positions(images))
            if chosen.ndim < 1 + (chosen.dtype == torch.bool) or len(chosen) != len(images):
                raise InterventionError(
                    f"A function of the images gives a row of positions for each of them, got the shape "
                    f"{list(chosen.shape)} for {len(images)} images."
                )
            return _mask_of(chosen, scene.layout, batched=True)
        return _mask_of(self.positions, scene.layout)

    def _target(self, scene: Scene) -> Bool[Tensor, "#batch pos"]:
        layout, mask = scene.layout, self.aim(scene)
        target = torch.zeros(len(mask), layout.n_tokens, dtype=torch.bool, device=mask.device)
        target[:, layout.patches] = mask
        return target


@dataclass(frozen=True)
class TestTimeRegisters(Shift):
    """Append tokens that take the outliers over: register neurons fire there, with their maxima, and nowhere else.

    Args:
        neurons: the register neurons; with none of them, the extra token is an ordinary, unedited one.
        n: how many tokens to append, after the position embedding; they stand last.
        extreme, source, clear, fill, maxima_of: as for `MoveOutliers`.
        init: what the extra token starts as: zero, Gaussian with the mean and standard deviation of the image's
            patches, or their mean (A.6).
        assign: with several registers, each takes all neurons, or each neuron goes to one of them at random (A.5).
        before_ln_pre: append a zero token before CLIP's `ln_pre` (the authors' code): it starts as that norm's bias.
        seed: of the Gaussian, drawn anew for each image, and of the random assignment.

    Raises:
        ConfigError: an option is out of range.

    Source: Jiang et al. 2025, algorithm 2; A.5 and A.6 for the variants.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> with torch.no_grad(), vit.edit(rl.TestTimeRegisters(neurons)):
        ...     vit.layout(images).test_time_registers, vit(images, return_type="tokens").shape
        (slice(36, 37, None), torch.Size([2, 37, 64]))
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    n: int = 1
    _: KW_ONLY
    init: Start = "zero"
    assign: Assign = "all"
    before_ln_pre: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 0:
            raise ConfigError(f"n, the number of test-time registers, must be at least 0, got {self.n}.")
        check_choice("init", self.init, get_args(Start))
        check_choice("assign", self.assign, get_args(Assign))
        if self.before_ln_pre and self.init != "zero":
            raise ConfigError("before_ln_pre appends a zero token, as the authors' code does; it needs init='zero'.")

    @property
    def n_registers(self) -> int:
        """Test-time registers it appends."""
        return self.n

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """Appending the tokens, and the shift in every layer that has neurons."""
        self.neurons.check(host.cfg)
        if not self.n:
            return ()
        if self.before_ln_pre and host.ln_pre is None:
            raise InterventionError("before_ln_pre is for CLIP models; this one has no norm before block 0.")
        own = slice(first_register, first_register + self.n)
        shifts = self._shifts(host, partial(self._target, own, self._assignment()))
        return Edit(TOKENS, partial(self._append, host)), *shifts

    def _append(
        self, host: Host, tokens: Float[Tensor, "batch pos d_model"], scene: Scene
    ) -> Float[Tensor, "batch more d_model"]:
        return torch.cat([tokens, self._start(host, tokens, scene)], 1)

    def _start(self, host: Host, tokens: Tensor, scene: Scene) -> Float[Tensor, "batch register d_model"]:
        extra = tokens.new_zeros(len(tokens), self.n, tokens.shape[-1])
        if self.before_ln_pre and host.ln_pre is not None:
            norm = host.ln_pre
            # Without its hook points: they are for the tokens of the source model.
            return norm.normalise(extra) if isinstance(norm, Norm) else norm(extra)
        patches = tokens[:, scene.layout.patches]
        if self.init != "zero":
            extra = extra + patches.mean(1, keepdim=True)
        if self.init == "gaussian":
            shape = (self.n, tokens.shape[-1])
            noise = torch.stack([torch.randn(shape, generator=own) for own in scene.generators(self.seed)])
            extra = extra + noise.to(extra) * patches.std(1, correction=0, keepdim=True)
        return extra

    def _assignment(self) -> dict[int, Int[Tensor, " neuron"]] | None:
        """Which register each neuron of each layer goes to; None: all of them."""
        if self.assign == "all":
            return None
        generator = torch.Generator().manual_seed(self.seed)
        layers = self.neurons.by_layer().items()
        return {layer: torch.randint(self.n, (len(listed),), generator=generator) for layer, listed in layers}

    def _target(
        self, own: slice, assignment: dict[int, Tensor] | None, layer: int, scene: Scene
    ) -> Bool[Tensor, "1 pos"] | Bool[Tensor, "1 pos neuron"]:
        positions = torch.arange(scene.layout.n_tokens)[scene.layout.test_time_registers][own]
        if assignment is None:
            target = torch.zeros(1, scene.layout.n_tokens, dtype=torch.bool)
            target[:, positions] = True
            return target
        register = positions[assignment[layer]]
        return (torch.arange(scene.layout.n_tokens)[:, None] == register)[None]


def _mask_of(chosen: Any, layout: TokenLayout | None, batched: bool = False) -> Bool[Tensor, "batch patch"]:
    """Positions as booleans; with `layout` None only what does not depend on the image's size is checked."""
    positions = torch.as_tensor(chosen)
    if positions.dtype == torch.bool:
        mask = positions.flatten(1) if batched else positions.flatten()[None]
        if not batched and not mask.any():
            raise InterventionError("The grid of positions has no patch set. Set at least one.")
        if layout is None:
            return mask
        if mask.shape[1] != layout.n_patches or (
            positions.ndim - batched == 2 and tuple(positions.shape[-2:]) != layout.grid
        ):
            raise InterventionError(
                f"The grid of positions has shape {list(positions.shape)}; these images have {layout.grid[0]} x "
                f"{layout.grid[1]} patches. Make it for this size, or give a function of the images."
            )
        return mask
    if positions.is_floating_point() or (not positions.numel() and not batched):
        raise InterventionError(
            f"Positions are patch indices, a grid of booleans or a function of the images, got {chosen!r}."
        )
    index = positions.reshape(len(positions), -1) if batched else positions.reshape(1, -1)
    highest = None if layout is None else layout.n_patches - 1
    outside = (index < 0) | (index > highest) if highest is not None else index < 0
    if outside.any():
        wrong = index[outside][:5].tolist()
        limit = "from 0" if highest is None else f"0 to {highest} for these images"
        raise InterventionError(f"Patches {wrong} do not exist: patches count {limit}, row by row.")
    if layout is None:
        return torch.ones(1, 1, dtype=torch.bool)
    mask = torch.zeros(len(index), layout.n_patches, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index.long(), True)
