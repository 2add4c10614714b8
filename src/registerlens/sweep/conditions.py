"""A condition: one edit of one model on one set of images; its hash, its group, and edits that are yet to be fitted."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import ViTConfig
from registerlens.engine.backends import GROUP
from registerlens.errors import ConfigError, InterventionError, close_matches
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Edit, Host, Intervention, Scene, plan
from registerlens.interventions.choices import Mode
from registerlens.interventions.targets import Target
from registerlens.model.parts import tensor_hash


def content_hash(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `content(value)` as JSON with sorted keys.

    Example:
        >>> content_hash({"layer": 3}) == content_hash({"layer": 3}) != content_hash({"layer": 4})
        True
    """
    text = json.dumps(content(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content(value: Any) -> Any:
    """A value as JSON: a dataclass by the name of its class and its fields, a tensor by the hash of its bytes.

    Of register neurons only which they are counts, not their scores or where they came from. Fields that a dataclass
    leaves out of comparisons (compare=False) do not count: an edit has the same hash before and after it is fitted.

    Raises:
        ConfigError: it holds a function or an object whose content cannot be hashed.

    Example:
        >>> import registerlens as rl
        >>> content(rl.Ablate(rl.Heads([(2, 0)])))["target"]
        {'type': 'Heads', 'pairs': [[2, 0]]}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, RegisterNeurons):
        return {"type": "RegisterNeurons", "pairs": [list(pair) for pair in value.pairs]}
    if isinstance(value, Tensor):
        return {"type": "Tensor", "shape": list(value.shape), "dtype": str(value.dtype), "sha256": tensor_hash(value)}
    if is_dataclass(value) and not isinstance(value, type):
        inner = {item.name: content(getattr(value, item.name)) for item in fields(value) if item.compare}
        return {"type": type(value).__name__, **inner}
    if isinstance(value, dict):
        return {str(key): content(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [content(inner) for inner in value]
    raise ConfigError(
        f"A {type(value).__name__} has no content that could be hashed, so that a sweep could not be resumed with it. "
        f"Give patch indices or a grid of booleans in place of a function, and dataclasses in place of other objects."
    )


CLEAN = "clean"
"""Label of the unedited model."""
EDIT = "edit"
"""The factor that names a condition of an explicit list; its label leaves out the factor's name."""
Factor = str | int | float | bool | None
"""One setting of a condition, as it stands in a column of the result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """One row of an experiment's plan. Without interventions it is the clean run.

    Example:
        >>> import registerlens as rl
        >>> condition = Condition(interventions=(rl.Ablate(rl.Heads([(2, 0)])),), factors={"layer": 2, "head": 0})
        >>> condition.label, len(condition.key)
        ('layer=2 head=0', 16)
    """

    interventions: tuple[Intervention, ...] = ()
    """Applied together, in this order."""
    factors: dict[str, Factor] = field(default_factory=dict)
    """What distinguishes it from its neighbours: columns of the result."""
    model: str = "model"
    """Which of the sweep's models."""
    images: str = "images"
    """Which of the sweep's image sets."""
    control_of: str = ""
    """Key of the condition for which it is a matched control; empty for others."""

    def __post_init__(self) -> None:
        wrong = [edit for edit in self.interventions if not isinstance(edit, Intervention)]
        if wrong:
            raise ConfigError(
                f"A condition takes interventions such as rl.Ablate(neurons), got {type(wrong[0]).__name__}."
            )

    @cached_property
    def key(self) -> str:
        """Content hash of everything that decides the result."""
        parts = (self.interventions, self.factors, self.model, self.images, self.control_of)
        return content_hash(list(parts))

    @property
    def label(self) -> str:
        """The factors in words; "clean" for the unedited model."""
        if not self.interventions:
            return CLEAN
        factors = [str(value) if name == EDIT else f"{name}={value}" for name, value in self.factors.items()]
        return " ".join(factors) or " + ".join(type(edit).__name__ for edit in self.interventions)

    @property
    def n_registers(self) -> int:
        """Test-time registers it appends."""
        return sum(edit.n_registers for edit in self.interventions)

    def first_layer(self, host: Host) -> int:
        """The first block whose output it can change: a run may start from the clean residual stream before it.

        0 where the sequence itself is edited (test-time registers); the number of blocks for the clean run.

        Raises:
            InterventionError: it does not fit the model.
        """
        return plan(host, self.interventions).first_block(host.cfg.n_layers)


def group_conditions(
    conditions: Sequence[Condition], hosts: Mapping[str, Host], size: int = GROUP
) -> tuple[tuple[str, ...], ...]:
    """Keys of the conditions, group by group: those that share a model, images and a long clean prefix stand together.

    The grouping depends on the conditions alone, so that every run of the same grid makes the same tasks.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> late, early = (Condition(interventions=(rl.Ablate(rl.Heads([(at, 0)])),)) for at in (4, 1))
        >>> group_conditions([late, early], {"model": vit}, 1) == ((early.key,), (late.key,))
        True
    """

    def rank(condition: Condition) -> tuple:
        first = condition.first_layer(hosts[condition.model])
        return condition.model, condition.images, condition.n_registers, first, condition.key

    groups: list[list[str]] = []
    place = None
    for condition in sorted(conditions, key=rank):
        where = condition.model, condition.images
        if where != place or len(groups[-1]) == size:
            groups.append([])
            place = where
        groups[-1].append(condition.key)
    return tuple(map(tuple, groups))


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
