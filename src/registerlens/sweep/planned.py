"""Edits that need reference images, as a grid can name them before there are any."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import ViTConfig
from registerlens.errors import ConfigError, InterventionError, close_matches
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Edit, Host, Intervention, Scene
from registerlens.interventions.choices import Mode
from registerlens.interventions.targets import Target


class Planned(Intervention):
    """An edit that is fitted later. Where it edits, and its content hash, are the same before and after."""

    fitted: Intervention | None

    @abstractmethod
    def stand_in(self, cfg: ViTConfig) -> Intervention:
        """An intervention with the same hook points that needs no fitting."""

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """The fitted intervention's edits; before it is fitted, edits at the same points that complain."""
        if self.fitted is not None:
            return self.fitted.edits(host, first_register)
        return [Edit(edit.point, self._refuse) for edit in self.stand_in(host.cfg).edits(host, first_register)]

    def _refuse(self, x: Float[Tensor, "..."], scene: Scene) -> Float[Tensor, "..."]:
        raise InterventionError(
            f"This {type(self).__name__} has not been fitted. Bind it first: fit_conditions(vit, images, conditions)."
        )


@dataclass(frozen=True)
class PlannedAblation(Planned):
    """`rl.Ablate` with a mode that needs reference activations, before they are known.

    Example:
        >>> from registerlens.interventions.targets import Heads
        >>> PlannedAblation(Heads([(2, 0)]), "mean")
        PlannedAblation(target=Heads(pairs=((2, 0),)), mode='mean', seed=0)
    """

    target: Target
    mode: Mode
    _: KW_ONLY
    seed: int = 0
    fitted: Intervention | None = field(default=None, compare=False, repr=False)
    """The ablation itself, once `fit_conditions` has made it; no part of the content hash."""

    def __post_init__(self) -> None:
        Ablate(self.target)  # refuses what is no target
        known = get_args(Mode)[1:]
        if self.mode not in known:
            raise ConfigError(
                f"mode must be one of {['zero', *known]}, got {self.mode!r}.{close_matches(str(self.mode), known)}"
            )

    def stand_in(self, cfg: ViTConfig) -> Ablate:
        """Zero ablation of the same target."""
        return Ablate(self.target)


@dataclass(frozen=True)
class PlannedBias(Planned):
    """`rl.AttentionBias` before its keys and values are known.

    Example:
        >>> PlannedBias(RegisterNeurons.from_pairs([(1, 183)])).fitted is None
        True
    """

    neurons: RegisterNeurons
    _: KW_ONLY
    fitted: Intervention | None = field(default=None, compare=False, repr=False)
    """The bias itself, once `fit_conditions` has made it; no part of the content hash."""

    @property
    def n_keys(self) -> int:
        """As many as the bias itself appends."""
        return 1

    def stand_in(self, cfg: ViTConfig) -> AttentionBias:
        """A bias of zeros."""
        zeros = torch.zeros(cfg.n_layers, cfg.n_heads, cfg.d_head)
        return AttentionBias(self.neurons, zeros, zeros)


def ablation(target: Target, mode: Mode = "zero", *, seed: int = 0) -> Ablate | PlannedAblation:
    """An ablation that a grid can name in every mode: fitted by `fit_conditions` (or `run_sweep`) where it must be.

    Args:
        target: a `RegisterNeurons`, `Heads` or `Tokens`.
        mode: as for `rl.Ablate`.
        seed: of the draws.

    Raises:
        ConfigError: an unknown mode, or another kind of target.

    Example:
        >>> from registerlens.interventions.targets import Heads
        >>> type(ablation(Heads([(2, 0)]))).__name__, type(ablation(Heads([(2, 0)]), "noise")).__name__
        ('Ablate', 'PlannedAblation')
    """
    return Ablate(target, seed=seed) if mode == "zero" else PlannedAblation(target, mode, seed=seed)


PLANNED: dict[Any, Callable[..., Intervention]] = {Ablate: ablation, AttentionBias: PlannedBias}
"""What a grid makes in place of interventions that need fitting."""


def plannable(make: Callable[..., Any]) -> Callable[..., Any]:
    """What makes the same edits without reference images: `ablation` for rl.Ablate, `PlannedBias` for rl.AttentionBias.

    Everything else is returned as it is; the arguments of a functools.partial are kept.

    Example:
        >>> plannable(Ablate) is ablation, plannable(len) is len
        (True, True)
    """
    if isinstance(make, partial):
        return partial(plannable(make.func), *make.args, **make.keywords)
    try:
        return PLANNED.get(make, make)
    except TypeError:  # a callable object that cannot be hashed
        return make
