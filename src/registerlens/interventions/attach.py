"""The same interventions inside an unmodified transformers, timm or open_clip model: where they go in, and its runs.

Appended tokens exist inside blocks only: each block appends the ones the block before left, and takes them out of its
output again. So whatever the library reads between blocks has the shape it always has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from registerlens.analysis.neurons import warn_of_other_model
from registerlens.errors import InterventionError, UnsupportedArchitectureError
from registerlens.interventions.attach_attention import STAND_INS, with_still_tokens
from registerlens.interventions.base import Edit, Intervention, Plan, Scene, neurons_of, plan
from registerlens.loading.modules import find_vision, from_module, library_of
from registerlens.model.attention import final_point
from registerlens.model.names import TOKENS
from registerlens.model.vit import HookedViT


def attach(module: nn.Module, *interventions: Intervention) -> Attachment:
    """Put interventions in force inside a model of transformers, timm or open_clip, which is otherwise left as it is.

    With `with`, for the length of the block; without, until `remove()`. Either way the module is then exactly what it
    was. Outputs keep their shapes: appended tokens are taken out of hidden states, features and attention maps (whose
    rows then lack what went to them). Features, pooled outputs and gradients equal those of `HookedViT` under
    `vit.edit(...)`. Attaching again composes, in that order, and may be removed in any order.

    Training, autocast, `torch.compile`, `get_intermediate_layers`, `forward_intermediates` and non-reentrant gradient
    checkpointing (backward before removal, as it runs the blocks again) work. Threads must not share the module.

    Args:
        module: an instance of a class listed by `registerlens models`, or any model that holds exactly one, as CLIP or
            LLaVA. Called as always, on images [batch, channel, height, width].
        interventions: as for `vit.edit`, applied in the order given.

    Raises:
        InterventionError: one does not fit the model, edits a point that has no place here, or has not fired by the
            end of the `with` block.
        UnsupportedArchitectureError: there is no supported vision transformer in the module, or several.

    Source: Jiang et al. 2025, algorithm 2.

    Example:
        >>> import torch, transformers, registerlens as rl
        >>> from registerlens.interventions.attach import attach
        >>> config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                                    image_size=28)
        >>> model, images = transformers.Dinov2Model(config).eval(), torch.rand(2, 3, 28, 28)
        >>> before = model(images).pooler_output
        >>> register = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(0, 5), (1, 17)]))
        >>> with attach(model, register):
        ...     after = model(images)
        >>> after.last_hidden_state.shape, torch.equal(after.pooler_output, before)
        (torch.Size([2, 5, 32]), False)
        >>> torch.equal(model(images).pooler_output, before)
        True
    """
    if isinstance(module, HookedViT):
        raise InterventionError("attach is for models of other libraries; for a HookedViT use vit.edit(...).")
    if not isinstance(module, nn.Module):
        raise InterventionError(
            f"Expected a model of transformers, timm or open_clip, got {type(module).__name__}. "
            f"For a HookedViT use vit.edit(...)."
        )
    tower = Tower.of(module)
    added = tower.add(interventions)
    listed = [neurons for one in interventions if (neurons := neurons_of(one)) is not None and neurons.found]
    if listed:
        vit = from_module(module)  # a copy, whose weights have a fingerprint
        for neurons in listed:
            warn_of_other_model(vit, neurons)
    return Attachment(tower, added)


@dataclass(frozen=True, eq=False)
class Attachment:
    """Interventions in force in a model; made by `attach`. Works as a context manager, or until `remove()`."""

    tower: Tower
    plan: Plan

    def remove(self) -> None:
        """Take the interventions out again; a second time does nothing."""
        self.tower.remove(self.plan)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if kind is None:
            self.plan.check_fired()


_PLACES = r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_post|mlp\.hook_post|attn\.(?:{q}|{k}|hook_v|hook_z))"
_TAG = "_registerlens_call"


@dataclass(frozen=True, eq=False)
class _Call:
    """One run of the tower, as far as it has come."""

    edits: dict[str, list[tuple[Plan, int, Edit]]]
    """The edits it runs under."""
    layer: int
    """The block that comes next."""
    scene: Scene
    extra: Tensor | None = None
    """The appended tokens as that block shall find them, [batch, register, d_model]."""


class Tower:
    """A source library's vision transformer with the edits in force: where they go in, and what they share.

    While gradients are recorded, a run rides on the tensors between blocks, so that blocks which checkpointing runs
    again find the state of their own run, however many came in between. Otherwise it is only kept here.
    """

    def __init__(self, module: nn.Module) -> None:
        vision, family, self.cfg = find_vision(module)
        self.name = f"{family.library}'s {family.source_class}"
        # Where attention edits go in: queries and keys are reached as the scores take them, normalised and turned.
        self.attention_points = {kind: final_point(self.cfg, kind) for kind in ("q", "k")} | {
            "v": "hook_v",
            "z": "hook_z",
        }
        self.places = re.compile(_PLACES.format(**{kind: re.escape(at) for kind, at in self.attention_points.items()}))
        sites = family.sites
        # The library whose code runs: open_clip's TimmModel holds timm's.
        self.stand_in = STAND_INS[library_of(vision)]
        self.read_images = sites.read_images
        self.images = self._part(vision, sites.images)
        self.ln_pre = self._part(vision, sites.ln_pre) if sites.ln_pre and self.cfg.ln_pre else None
        self.blocks = [
            (block, *(self._part(block, path) for path in (sites.norm, sites.attention, sites.mlp_out)))
            for block in cast(nn.ModuleList, self._part(vision, sites.blocks))
        ]
        self.plans: list[Plan] = []
        self.edits: dict[str, list[tuple[Plan, int, Edit]]] = {}
        self.replaced: list[tuple[nn.Module, Any]] = []
        self.hooks: list[RemovableHandle] = []
        self.latest: _Call | None = None
        self.scene: Scene | None = None  # of the block that is running

    @classmethod
    def of(cls, module: nn.Module) -> Tower:
        """The tower of a module, the same one while edits are in force."""
        tower = cls(module)
        there = tower.images.__dict__.get("forward")
        return there.tower if isinstance(there, _Images) else tower

    def _part(self, module: nn.Module, path: str) -> nn.Module:
        try:
            return module.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedArchitectureError(
                f"{self.name} has no part {path!r} in the installed version of the library. Update the library."
            ) from error

    # Which edits are in force ----------------------------------------------------------------------------------------

    @property
    def n_registers(self) -> int:
        """Test-time registers that all attachments append together."""
        return sum(active.n_registers for active in self.plans)

    def add(self, interventions: Sequence[Intervention]) -> Plan:
        """Put interventions in force, after those that are.

        Raises:
            InterventionError: one does not fit the model.
        """
        added = plan(self, interventions, self.n_registers)
        for index, edit in added.edits:
            place = self.places.fullmatch(edit.point)
            if edit.point != TOKENS and (place is None or int(place[1]) >= self.cfg.n_layers):
                raise InterventionError(
                    f"{type(interventions[index]).__name__} edits {edit.point}, which has no place in {self.name}. "
                    f"Places are {TOKENS} and, in blocks 0 to {self.cfg.n_layers - 1}, hook_resid_pre, "
                    f"hook_resid_post, mlp.hook_post and attn.{', attn.'.join(self.attention_points.values())}. "
                    f"HookedViT has more."
                )
        self._install([*self.plans, added])
        return added

    def remove(self, removed: Plan) -> None:
        """Take a plan out of force, and let the registers of later ones move up."""
        self._install([other for other in self.plans if other is not removed])

    def _install(self, plans: list[Plan]) -> None:
        for module, before in reversed(self.replaced):
            del module.forward
            if before is not None:
                module.forward = before
        for hook in self.hooks:
            hook.remove()
        self.plans, self.edits, self.replaced, self.hooks = [], {}, [], []
        self.latest = self.scene = None
        for installed in plans:
            installed.edits = plan(self, installed.interventions, self.n_registers).edits
            self.plans.append(installed)
            for index, edit in installed.edits:
                self.edits.setdefault(edit.point, []).append((installed, index, edit))
        if not plans:
            return
        self._replace(self.images, _Images(self, self.images.forward))
        for layer, (block, norm, attention, mlp_out) in enumerate(self.blocks):
            self._replace(block, _Block(self, layer, block.forward))
            self.hooks.append(norm.register_forward_pre_hook(self._recall))
            self.hooks.append(attention.register_forward_hook(self._crop_maps, prepend=True))
            if any(f"blocks.{layer}.attn.{point}" in self.edits for point in self.attention_points.values()):
                self._replace(attention, self.stand_in(attention, partial(self._apply_in_attention, layer)))
            if f"blocks.{layer}.mlp.hook_post" in self.edits:
                self.hooks.append(mlp_out.register_forward_pre_hook(partial(self._edit_neurons, layer)))

    def _replace(self, module: nn.Module, forward: Any) -> None:
        self.replaced.append((module, module.__dict__.get("forward")))
        module.forward = forward

    # While the model runs --------------------------------------------------------------------------------------------

    def apply(self, point: str, x: Tensor) -> Tensor:
        """The tensor at a point after its edits, in its own number type."""
        edits = self.edits.get(point)
        if not edits:
            return x
        if self.scene is None:
            raise InterventionError(_PART)
        x = x.clone()  # an edit in place shall not reach the library's own tensors
        for owner, index, edit in edits:
            owner.note(index, edit)
            x = edit.change(x, self.scene).to(x.dtype)
        return x

    def start(self, images: Tensor) -> None:
        """A run begins with these images [batch, channel, height, width]."""
        layout = self.cfg.layout(images.shape[2], images.shape[3], self.n_registers)
        self.latest = _Call(self.edits, 0, Scene(layout, images))

    def call(self, layer: int, x: Tensor) -> _Call:
        """The run whose residual stream before this block is x.

        Raises:
            InterventionError: there is none, as a block was called on its own, or the tensor was exchanged.
        """
        for call in (getattr(x, _TAG, None), self.latest):
            if call is not None and call.edits is self.edits and call.layer == layer:
                return call
        raise InterventionError(_PART)

    def _recall(self, norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Checkpointing may run a block's inside again without its `forward`: then the input says which run it is."""
        if torch.is_grad_enabled():
            call = getattr(arguments[0], _TAG, None)
            if call is None:
                raise InterventionError(_PART)
            self.scene = call.scene

    def _edit_neurons(self, layer: int, linear: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.apply(f"blocks.{layer}.mlp.hook_post", arguments[0]), *arguments[1:])

    def _apply_in_attention(self, layer: int, kind: str, x: Tensor) -> Tensor:
        return self.apply(f"blocks.{layer}.attn.{self.attention_points[kind]}", x)

    def _crop_maps(self, attention: nn.Module, arguments: Any, output: Any) -> Any:
        """Attention maps [batch, head, query, key] without the added tokens, keys and values."""
        if not isinstance(output, tuple) or output[1] is None:
            return output
        n = output[1].shape[-2] - self.n_registers
        return output[0], output[1][..., :n, :n], *output[2:]


_PART = (
    "Edits need a call of the whole model, but a part of it ran without the rest, or a tensor between blocks was "
    "exchanged. Gradient checkpointing must be non-reentrant (use_reentrant=False)."
)


class _Images:
    """Stands in for the `forward` of the module that reads the images, and begins a run."""

    def __init__(self, tower: Tower, forward: Any) -> None:
        self.tower, self.forward = tower, forward

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.tower.start(self.tower.read_images(self.tower.cfg, *arguments, **options))
        return self.forward(*arguments, **options)


class _Block:
    """Stands in for a block's `forward`: the same on a sequence that includes the appended tokens."""

    def __init__(self, tower: Tower, layer: int, forward: Any) -> None:
        self.tower, self.layer, self.forward = tower, layer, forward

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tower = self.tower
        call = tower.call(self.layer, x)
        layout, tower.scene = call.scene.layout, call.scene
        n_registers = layout.n_test_time_registers
        masks = (*arguments, *(value for name, value in options.items() if name != "rope"))
        if n_registers and any(isinstance(value, Tensor) for value in masks):
            raise InterventionError("A mask says nothing of the appended tokens. Call the model without one.")
        _tag(x, call)
        full = x if call.extra is None else torch.cat([x, call.extra], 1)
        if self.layer == 0:
            full = tower.apply(TOKENS, full)
        if full.shape[1] != layout.n_tokens:
            raise InterventionError(
                f"Block {self.layer} got {full.shape[1]} tokens where these images have {layout.n_tokens}, "
                f"{n_registers} of them appended. Switch off what drops tokens, as patch dropout."
            )
        full = tower.apply(f"blocks.{self.layer}.hook_resid_pre", full)
        _tag(full, call)
        options = with_still_tokens(options, n_registers)
        out = tower.apply(f"blocks.{self.layer}.hook_resid_post", self.forward(full, *arguments, **options))
        extra = None
        if n_registers:
            # Copies, so that the stream looks as it always does in memory, and neither part keeps the other alive.
            out, extra = out[:, : x.shape[1]].contiguous(), out[:, x.shape[1] :].clone()
        tower.scene = tower.latest = None
        if self.layer + 1 < tower.cfg.n_layers:
            tower.latest = replace(call, layer=self.layer + 1, extra=extra)
            _tag(out, tower.latest)
        return out


def _tag(x: Tensor, call: _Call) -> None:
    if torch.is_grad_enabled():
        setattr(x, _TAG, call)
