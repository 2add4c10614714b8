"""What an intervention is: edits at named points of the model, and the `with` block in which they are in force."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons, warn_of_other_model
from registerlens.config import TokenLayout, ViTConfig
from registerlens.errors import InterventionError
from registerlens.model.names import TOKENS
from registerlens.model.vit import HookedViT
from registerlens.results import Saved


@runtime_checkable
class Host(Protocol):
    """What an intervention may ask of the model it is put into."""

    @property
    def cfg(self) -> ViTConfig:
        """Its architecture."""
        ...

    @property
    def ln_pre(self) -> Callable[[Tensor], Tensor] | None:
        """The LayerNorm before block 0, where there is one."""


@dataclass(frozen=True)
class Scene:
    """The batch that an edit is applied to."""

    layout: TokenLayout
    """Layout of the sequence inside the blocks, test-time registers included."""
    images: Float[Tensor, "batch channel height width"] | None = field(default=None, repr=False)
    """The preprocessed images; None where the model started from a residual stream."""

    def pixels(self) -> Float[Tensor, "batch channel height width"]:
        """The images.

        Raises:
            InterventionError: the model started in the middle, so that there are none.
        """
        if self.images is None:
            raise InterventionError(
                "This intervention depends on the images, but the model was started from a residual stream "
                "(start_at_layer). Run it from the images."
            )
        return self.images

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """One number an image, made of its pixels' bits: equal for equal images, whatever the batch.

        The pixels are rounded to bfloat16 first, so that a model in half precision makes the same draws.
        """
        flat = self.pixels().detach().to(torch.bfloat16).contiguous().view(torch.int16).flatten(1).long()
        weights = torch.arange(1, flat.shape[1] + 1, device=flat.device)
        return tuple(int(key) & (2**63 - 1) for key in (flat * weights).sum(1).cpu())

    def generators(self, seed: int) -> list[torch.Generator]:
        """One CPU generator an image, seeded by `seed` and the image: the same in a batch and alone."""
        return [torch.Generator().manual_seed((key ^ (seed * 0x9E3779B97F4A7C15)) & (2**63 - 1)) for key in self.keys]


@dataclass(frozen=True)
class Edit:
    """A change at one hook point of HookedViT; `attach` knows where that is in other libraries' models."""

    point: str
    """The hook point's name."""
    change: Callable[[Tensor, Scene], Tensor] = field(repr=False)
    """From the tensor there to the tensor that flows on; pure."""


class Intervention(Saved, ABC):
    """An edit of the model, described by a frozen object.

    A subclass says which edits it makes; `vit.edit` and `attach` put them in force. It works on whole batches, treats
    every image on its own, and is differentiable. A dataclass can be saved; `Intervention.load(folder)` reads any.
    """

    @property
    def n_registers(self) -> int:
        """Test-time registers it appends."""
        return 0

    @property
    def n_keys(self) -> int:
        """Keys, with their values, that it appends in every layer without a token for them."""
        return 0

    def aim(self, scene: Scene) -> Bool[Tensor, "batch patch"] | None:
        """The patches at which outliers shall appear; None for an intervention that has no such aim."""
        return None

    @abstractmethod
    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """The edits for one model.

        Args:
            host: the model.
            first_register: which of the sequence's test-time registers is this intervention's first one.

        Raises:
            InterventionError: the model lacks what is to be edited.
        """


@dataclass
class Plan:
    """The edits of several interventions for one model, and which interventions have fired so far."""

    interventions: tuple[Intervention, ...]
    edits: list[tuple[int, Edit]]
    """With the index of the intervention each belongs to."""
    n_registers: int
    """Test-time registers they append together."""
    fired: set[int] = field(default_factory=set)

    def note(self, index: int, edit: Edit) -> None:
        """An edit was made. Appending a token counts only where an intervention does nothing else."""
        mine = [other for owner, other in self.edits if owner == index]
        if edit.point != TOKENS or all(other.point == TOKENS for other in mine):
            self.fired.add(index)

    def change(self, point: str, x: Float[Tensor, "batch pos ..."], scene: Scene) -> Float[Tensor, "batch more ..."]:
        """What the edits at one point make of the tensor there, one after the other."""
        for index, edit in self.edits:
            if edit.point == point:
                self.note(index, edit)
                x = edit.change(x, scene).to(x.dtype)
        return x

    def first_block(self, n_layers: int) -> int:
        """The first block whose output it can change: a run may start from the clean residual stream before it.

        0 where the sequence itself is edited (test-time registers); the number of blocks where there is no edit.

        Raises:
            InterventionError: something outside the blocks is edited.
        """
        return min((_block_of(edit.point) for _, edit in self.edits), default=n_layers)

    def check_fired(self) -> None:
        """Complain about interventions that had something to do and never did it.

        Raises:
            InterventionError: there is one.
        """
        for index, intervention in enumerate(self.interventions):
            points = [edit.point for owner, edit in self.edits if owner == index]
            if points and index not in self.fired:
                raise InterventionError(
                    f"{type(intervention).__name__} never fired: the model was not run, or did not reach "
                    f"{points[-1]}. Run it inside the `with` block, far enough."
                )


def _block_of(point: str) -> int:
    if point == TOKENS:
        return 0
    kind, _, rest = point.partition(".")
    if kind != "blocks":
        raise InterventionError(
            f"A sweep cannot tell before which block '{point}' is edited. Edit a hook point of a block, or hook_tokens."
        )
    return int(rest.partition(".")[0])


Edits = Intervention | Sequence[Intervention] | None
"""One intervention, several at once, or None for the model as it is."""


def several(edits: Edits) -> tuple[Intervention, ...]:
    """Edits one by one; none for None."""
    if edits is None:
        return ()
    return (edits,) if isinstance(edits, Intervention) else tuple(edits)


def neurons_of(intervention: Intervention) -> RegisterNeurons | None:
    """The register neurons an intervention is about, if it is about neurons."""
    target = getattr(intervention, "neurons", getattr(intervention, "target", None))
    return target if isinstance(target, RegisterNeurons) else None


def plan(host: Host, interventions: Sequence[Intervention], first_register: int = 0) -> Plan:
    """The edits for a model, in the order of the interventions.

    Raises:
        InterventionError: something else than an intervention was given, or one does not fit the model.
    """
    edits: list[tuple[int, Edit]] = []
    registers = first_register
    for index, intervention in enumerate(interventions):
        if not isinstance(intervention, Intervention):
            raise InterventionError(
                f"Expected interventions such as rl.TestTimeRegisters(neurons), got {type(intervention).__name__}."
            )
        edits += [(index, edit) for edit in intervention.edits(host, registers)]
        if isinstance(host, HookedViT) and (neurons := neurons_of(intervention)) is not None:
            warn_of_other_model(host, neurons)
        registers += intervention.n_registers
    return Plan(tuple(interventions), edits, registers - first_register)


def stacked_hooks(plans: Sequence[Plan], scenes: Sequence[Scene]) -> list[Any]:
    """Hooks, one for each point, by which every plan edits its own share of the batch; the shares are equally large.

    Args:
        plans: in the order of their shares.
        scenes: the batch that each plan's share belongs to; filled when the model is run.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> plans = [plan(vit, [rl.Ablate(rl.Heads([(layer, 0)]))]) for layer in (2, 2, 4)]
        >>> [name for name, _ in stacked_hooks(plans, [])]
        ['blocks.2.attn.hook_z', 'blocks.4.attn.hook_z']
    """

    # One hook a point and one pass for all plans: a forward pass costs far more than cutting and joining its batch.
    def hook_for(point: str) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            if len(scenes) != len(plans):
                raise InterventionError("Edits need a call of the whole model; a part of it was called on its own.")
            shares = x.chunk(len(plans)) if len(plans) > 1 else (x,)  # chunks could not be edited in place
            changed = [one.change(point, share, scene) for one, share, scene in zip(plans, shares, scenes, strict=True)]
            return changed[0] if len(changed) == 1 else _joined(changed, point)

        return point, hook

    return [hook_for(point) for point in dict.fromkeys(edit.point for one in plans for _, edit in one.edits)]


def _joined(shares: list[Tensor], point: str) -> Tensor:
    shapes = sorted({tuple(share.shape[1:]) for share in shares})
    if len(shapes) > 1:
        raise InterventionError(
            f"Edits at {point} that leave shapes as different as {list(shapes[0])} and {list(shapes[-1])} cannot share "
            f"a batch. An intervention that appends tokens or keys says how many by its `n_registers` or `n_keys`."
        )
    return torch.cat(shares)


@contextmanager
def edited(vit: HookedViT, interventions: Sequence[Intervention]) -> Iterator[None]:
    """What `HookedViT.edit` does; see there."""
    before = vit.n_test_time_registers
    active = plan(vit, interventions, before)
    scene: list[Scene] = []

    def enter(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        images = arguments[0] if arguments else options["images"]
        if options.get("start_at_layer") is None:
            scene[:] = [Scene(vit.layout(images), images)]
        else:
            layout = options.get("layout") or vit.cfg.layout(n_test_time_registers=vit.n_test_time_registers)
            scene[:] = [Scene(layout)]

    def leave(module: Any, arguments: Any, output: Any) -> None:
        scene.clear()

    entering = vit.register_forward_pre_hook(enter, with_kwargs=True)
    leaving = vit.register_forward_hook(leave, always_call=True)
    vit.n_test_time_registers = before + active.n_registers
    try:
        with vit.hooks(stacked_hooks([active], scene)):
            yield
        active.check_fired()
    finally:
        vit.n_test_time_registers = before
        entering.remove()
        leaving.remove()
