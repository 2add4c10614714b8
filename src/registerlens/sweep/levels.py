"""What stands on an axis of a grid: values, and the factors by which they are known in the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.errors import ConfigError
from registerlens.interventions.targets import Heads, Tokens
from registerlens.sweep.conditions import Factor

NAMED = 3
"""Neurons or heads up to which a set is labelled by its members."""


@dataclass(frozen=True)
class Level:
    """A value on an axis, and the factors it stands for in place of one named after the axis.

    Example:
        >>> Level(Heads([(2, 0)]), {"layer": 2, "head": 0}).factors
        {'layer': 2, 'head': 0}
    """

    value: Any
    """What the maker of the intervention gets."""
    factors: Mapping[str, Factor]
    """Columns of the result, with their entries."""


Axis = list | tuple | range | np.ndarray | Mapping[Any, Any]
"""Values; or {label: value}. A value may be a `Level`."""


def levels(name: str, axis: Axis) -> list[Level]:
    """The values of an axis with their factors: its labels under its own name, unless a value is a `Level`.

    In a list, numbers, strings and None label themselves; neurons, heads and tokens are labelled by what they are.

    Raises:
        ConfigError: no values, no list or mapping, or values of a list that no label tells apart.

    Example:
        >>> [level.factors for level in levels("layer", range(2))]
        [{'layer': 0}, {'layer': 1}]
        >>> levels("target", [Heads([(2, 0), (2, 1)])])[0].factors
        {'target': '2.0 2.1'}
        >>> levels("target", {"pair": Heads([(2, 0), (2, 1)])})[0].factors
        {'target': 'pair'}
    """
    if not isinstance(axis, list | tuple | range | np.ndarray | Mapping):
        raise ConfigError(
            f"The axis {name!r} must be a list or a mapping {{label: value}}, got {type(axis).__name__}. "
            f"For a single value write {name}=[...]."
        )
    if not len(axis):
        raise ConfigError(f"The axis {name!r} has no values.")
    if isinstance(axis, Mapping):
        return [_level(value, name, label) for label, value in axis.items()]
    made = [_level(value, name, None if isinstance(value, Level) else label_of(name, value)) for value in axis]
    first: dict[tuple, Any] = {}
    for level in made:
        if level.value != first.setdefault(tuple(level.factors.items()), level.value):
            raise ConfigError(
                f"Two different values of the axis {name!r} are both called {dict(level.factors)}. "
                f"Tell them apart with a mapping {{label: value}}."
            )
    return made


def _level(value: Any, name: str, label: Any) -> Level:
    return value if isinstance(value, Level) else Level(_plain(value), {name: _factor(name, label)})


def label_of(name: str, value: Any) -> Factor:
    """What a value of the axis `name` is called.

    Raises:
        ConfigError: it has no obvious name.

    Example:
        >>> label_of("target", RegisterNeurons.from_pairs([(5, 599), (5, 846)])), label_of("target", Tokens(3, "cls"))
        ('5:599 5:846', '3 cls')
    """
    if isinstance(value, RegisterNeurons):
        few = " ".join(f"{layer}:{neuron}" for layer, neuron in value.pairs)
        return few if 0 < len(value) <= NAMED else f"{len(value)} neurons ({value.source})"
    if isinstance(value, Heads):
        few = " ".join(f"{layer}.{head}" for layer, head in value.pairs)
        return few if len(value.pairs) <= NAMED else f"{len(value.pairs)} heads"
    if isinstance(value, Tokens):
        return f"{value.layer} {value.which if isinstance(value.which, str) else f'{len(value.which)} patches'}"
    if value is None or isinstance(value, str | bool | int | float | np.generic):
        return _factor(name, value)
    raise ConfigError(
        f"The axis {name!r} has a {type(value).__name__}, which has no name of its own. "
        f"Give a mapping {{label: value}}."
    )


def _factor(name: str, label: Any) -> Factor:
    label = _plain(label)
    if not (label is None or isinstance(label, str | bool | int | float)):
        raise ConfigError(f"A label of the axis {name!r} must be a string or a number, got {type(label).__name__}.")
    if isinstance(label, float) and not math.isfinite(label):
        raise ConfigError(f"A label of the axis {name!r} must be finite, got {label}.")
    return label


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which have a content hash."""
    return value.item() if isinstance(value, np.generic) else value
