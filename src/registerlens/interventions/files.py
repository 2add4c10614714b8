"""Any intervention as a folder, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from registerlens.analysis.detection import Cutoff
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.errors import ConfigError, InterventionError
from registerlens.files import reading, write_json
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Intervention
from registerlens.interventions.interpolation import InterpolateOutliers
from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
from registerlens.interventions.scaling import Scale
from registerlens.interventions.targets import Heads, Tokens, target_from_dict, target_to_dict

_PLAIN: dict[str, type[Intervention]] = {
    kind.__name__: kind for kind in (TestTimeRegisters, MoveOutliers, InterpolateOutliers, Scale)
}
"""Interventions whose options are all they are."""
_WITH_TENSORS: dict[str, Any] = {kind.__name__: kind for kind in (AttentionBias, Ablate)}
"""Those that write files of their own."""


def save_intervention(intervention: Intervention, folder: str | Path) -> Path:
    """Write intervention.json, and what belongs to it; returns the folder.

    Raises:
        InterventionError: it cannot be written: positions given as a function, or a kind of your own.

    Example:
        >>> import tempfile
        >>> register = TestTimeRegisters(RegisterNeurons.from_pairs([(1, 183)]), n=2)
        >>> load_intervention(save_intervention(register, tempfile.mkdtemp())).n
        2
    """
    from registerlens import __version__  # noqa: PLC0415

    folder, kind = Path(folder), type(intervention).__name__
    options: dict[str, Any] = {}
    if kind in _WITH_TENSORS:
        intervention.save(folder)  # type: ignore[attr-defined]
    elif kind in _PLAIN:
        options = {item.name: _to_json(getattr(intervention, item.name)) for item in fields(intervention)}  # type: ignore[arg-type]
    else:
        raise InterventionError(f"{kind} cannot be written to a file; known: {[*_PLAIN, *_WITH_TENSORS]}.")
    write_json(folder / "intervention.json", {"version": __version__, "kind": kind, "options": options})
    return folder


def load_intervention(folder: str | Path) -> Intervention:
    """Read what `save_intervention` wrote.

    Raises:
        ConfigError: a file is missing or damaged, or of an unknown kind.
    """
    folder = Path(folder)
    with reading(folder / "intervention.json") as told:
        kind = told["kind"]
        if kind in _PLAIN:
            return _PLAIN[kind](**{name: _from_json(value) for name, value in told["options"].items()})
        if kind not in _WITH_TENSORS:
            raise ConfigError(f"unknown intervention {kind!r}; known: {[*_PLAIN, *_WITH_TENSORS]}.")
    return _WITH_TENSORS[kind].load(folder)


_CODED: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "neurons": (RegisterNeurons, RegisterNeurons.to_dict, RegisterNeurons.from_dict),
    "heads": (Heads, target_to_dict, target_from_dict),
    "tokens": (Tokens, target_to_dict, target_from_dict),
    "cutoff": (Cutoff, lambda cut: {"value": cut.value, "relative": cut.relative}, lambda told: Cutoff(**told)),
    "grid": (Tensor, Tensor.tolist, torch.tensor),
}
"""Tag -> type of a value, how it becomes JSON, and how it comes back."""


def _to_json(value: Any) -> Any:
    if callable(value):
        raise InterventionError("Positions given as a function cannot be written to a file; give indices or a grid.")
    value = torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    for tag, (kind, encode, _) in _CODED.items():
        if isinstance(value, kind):
            return {tag: encode(value)}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        [(tag, told)] = value.items()
        return _CODED[tag][2](told)
    return value
