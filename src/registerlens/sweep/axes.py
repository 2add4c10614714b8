"""Values for the axes of a grid: neurons, heads, tokens, neuron sets, doses."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.errors import ConfigError, close_matches
from registerlens.evaluation.controls import Activity, matched_neurons, random_neurons
from registerlens.interventions.base import Host
from registerlens.interventions.choices import Mode
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
    values = [_level(value, name, None if isinstance(value, Level) else label_of(name, value)) for value in axis]
    first: dict[tuple, Any] = {}
    for level in values:
        if level.value != first.setdefault(tuple(level.factors.items()), level.value):
            raise ConfigError(
                f"Two different values of the axis {name!r} are both called {dict(level.factors)}. "
                f"Tell them apart with a mapping {{label: value}}."
            )
    return values


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


REDRAWS = 20
"""Tries to draw a set that has not been drawn yet."""


# Places in the model ------------------------------------------------------------------------------------------------


def every_neuron(vit: Host, layers: Iterable[int] | None = None) -> dict[str, Level]:
    """Every neuron of some layers (default: all), one at a time; factors "layer" and "neuron".

    Raises:
        ConfigError: a layer does not exist, or none is given.

    Example:
        >>> import registerlens as rl
        >>> neurons = every_neuron(rl.HookedViT.from_pretrained("registerlens:tiny"), [1, 2])
        >>> len(neurons), neurons["1:183"].value.pairs
        (512, ((1, 183),))
    """
    return {
        f"{layer}:{neuron}": Level(RegisterNeurons.from_pairs([(layer, neuron)]), {"layer": layer, "neuron": neuron})
        for layer in _layers(vit, layers)
        for neuron in range(vit.cfg.d_mlp)
    }


def every_head(vit: Host, layers: Iterable[int] | None = None) -> dict[str, Level]:
    """Every attention head of some layers (default: all), one at a time; factors "layer" and "head".

    Raises:
        ConfigError: a layer does not exist, or none is given.

    Example:
        >>> import registerlens as rl
        >>> list(every_head(rl.HookedViT.from_pretrained("registerlens:tiny"), [0, 3]))
        ['0.0', '3.0']
    """
    return {
        f"{layer}.{head}": Level(Heads([(layer, head)]), {"layer": layer, "head": head})
        for layer in _layers(vit, layers)
        for head in range(vit.cfg.n_heads)
    }


def every_token(
    vit: Host, layers: Iterable[int] | None = None, patches: Mapping[str, Iterable[int]] | None = None
) -> dict[str, Level]:
    """Every kind of token after the blocks of some layers (default: all); factors "layer" and "tokens".

    Args:
        vit: the model.
        layers: blocks after which tokens are edited.
        patches: sets of patch indices by name, beside [CLS] and the trained registers where the model has them.

    Raises:
        ConfigError: a layer does not exist, none is given, or the model has neither kind and no patches are given.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")  # which has no [CLS]
        >>> list(every_token(vit, [0, 2], {"corner": [0], "top row": range(6)}))
        ['0 corner', '0 top row', '2 corner', '2 top row']
    """
    layout = vit.cfg.layout()
    kinds: dict[str, Any] = {} if layout.cls is None else {"cls": "cls"}
    if layout.n_trained_registers:
        kinds["trained_registers"] = "trained_registers"
    kinds |= {name: list(listed) for name, listed in (patches or {}).items()}
    if not kinds:
        raise ConfigError("The model has no [CLS] and no trained registers; give sets of patches by name.")
    return {
        f"{layer} {kind}": Level(Tokens(layer, which), {"layer": layer, "tokens": kind})
        for layer in _layers(vit, layers)
        for kind, which in kinds.items()
    }


def _layers(vit: Host, layers: Iterable[int] | None) -> list[int]:
    n_layers = vit.cfg.n_layers
    chosen = [int(layer) for layer in (range(n_layers) if layers is None else layers)]
    wrong = [layer for layer in chosen if not 0 <= layer < n_layers]
    if wrong or not chosen:
        what = f"Layers {wrong[:5]} do not exist" if wrong else "No layer was given"
        raise ConfigError(f"{what}: the model has blocks 0 to {n_layers - 1}.")
    return chosen


# Sets of neurons ----------------------------------------------------------------------------------------------------


def top_k(ranking: RegisterNeurons, ks: Iterable[int]) -> dict[int, Level]:
    """The first k neurons of a ranking, for several k; factor "k".

    Raises:
        ConfigError: a k below 1 or above the length of the ranking, or none at all.

    Example:
        >>> sets = top_k(RegisterNeurons.published("dinov2_vitl14"), [1, 10, 45])
        >>> [len(level.value) for level in sets.values()], sets[10].factors
        ([1, 10, 45], {'k': 10})
    """
    ks = [int(k) for k in ks]
    if not ks:
        raise ConfigError("No k was given: top_k needs numbers of neurons, such as [1, 2, 5, 10].")
    if not len(ranking):
        raise ConfigError(f"The ranking ({ranking.source}) has no neurons. Give one that has.")
    if wrong := [k for k in ks if not 1 <= k <= len(ranking)]:
        raise ConfigError(
            f"k must be from 1 to {len(ranking)}, the length of the ranking ({ranking.source}), got {wrong[:5]}."
        )
    return {k: Level(ranking.filter(top=k), {"k": k}) for k in ks}


def cumulative(ranking: RegisterNeurons) -> dict[int, Level]:
    """The first neuron of a ranking, the first two, and so on to all of them; factor "k".

    Raises:
        ConfigError: the ranking is empty.

    Example:
        >>> [level.value.pairs for level in cumulative(RegisterNeurons.from_pairs([(1, 3), (0, 2)])).values()]
        [((1, 3),), ((1, 3), (0, 2))]
    """
    return top_k(ranking, range(1, max(2, len(ranking) + 1)))


def random_sets(neurons: RegisterNeurons, n: int, d_mlp: int, seed: int = 0) -> dict[str, RegisterNeurons]:
    """Random sets with as many neurons in each layer as `neurons`, and none of these; "random 1" and so on.

    More of them begin with the same ones.

    Args:
        neurons: what they are to be compared with.
        n: how many sets.
        d_mlp: neurons a layer has.
        seed: of the draws.

    Raises:
        ConfigError: n is below 1, or there are no neurons.
        InterventionError: a layer has too few others.

    Example:
        >>> sets = random_sets(RegisterNeurons.from_pairs([(1, 3), (4, 5)]), 2, 256)
        >>> [(name, list(one.by_layer())) for name, one in sets.items()]
        [('random 1', [1, 4]), ('random 2', [1, 4])]
    """
    return _drawn("random", neurons, n, lambda generator: random_neurons(neurons, d_mlp, generator), seed)


def matched_sets(neurons: RegisterNeurons, n: int, activity: Activity, seed: int = 0) -> dict[str, RegisterNeurons]:
    """Like `random_sets`, of neurons that get about as active; "matched 1" and so on.

    Args:
        neurons: what they are to be compared with.
        n: how many sets.
        activity: from `evaluation.controls.neuron_activity`, of every layer that has neurons in the list.
        seed: of the draws.

    Raises:
        ConfigError: n is below 1, there are no neurons, or the activity of a layer is missing.
        InterventionError: a layer has too few others.

    Example:
        >>> import torch
        >>> sets = matched_sets(RegisterNeurons.from_pairs([(1, 0)]), 1, {1: torch.tensor([9.0, 8.0, 0.0])})
        >>> list(sets)
        ['matched 1']
    """
    if missing := sorted(set(neurons.by_layer()) - set(activity)):
        raise ConfigError(f"The activity of layers {missing[:5]} is missing; measure it with neuron_activity.")
    return _drawn("matched", neurons, n, lambda generator: matched_neurons(neurons, activity, generator), seed)


def _drawn(
    kind: str, neurons: RegisterNeurons, n: int, draw: Callable[[torch.Generator], RegisterNeurons], seed: int
) -> dict[str, RegisterNeurons]:
    """Sets that differ from each other, as far as there are so many."""
    if n < 1:
        raise ConfigError(f"At least one {kind} set is needed, got n={n}.")
    if not len(neurons):
        raise ConfigError(f"There are no neurons ({neurons.source}) to draw {kind} sets for. Give some.")
    generator = torch.Generator().manual_seed(seed)
    sets: list[RegisterNeurons] = []
    for _ in range(n):
        chosen = draw(generator)
        for _ in range(REDRAWS):
            if set(chosen.pairs) not in [set(other.pairs) for other in sets]:
                break
            chosen = draw(generator)
        sets.append(chosen)
    return {f"{kind} {i}": chosen for i, chosen in enumerate(sets, 1)}


# Doses --------------------------------------------------------------------------------------------------------------


def modes(*names: str) -> list[str]:
    """Ways to ablate, for the axis "mode" of `rl.Ablate`; without names, all of them.

    Raises:
        ConfigError: there is no such mode.

    Example:
        >>> modes(), modes("zero", "mean")
        (['zero', 'mean', 'noise', 'shuffle', 'resample'], ['zero', 'mean'])
    """
    known = list(get_args(Mode))
    for name in names:
        if name not in known:
            raise ConfigError(f"There is no mode {name!r}.{close_matches(name, known)} There are: {known}.")
    return list(names) or known


def scales(low: float | int = 0, high: float | int = 2, n: int = 5) -> list[float]:
    """`n` factors from `low` to `high` at equal distances, for the axis "factor" of `rl.interventions.Scale`.

    Raises:
        ConfigError: fewer than two, or not from low to high.

    Example:
        >>> scales(), scales(0, 1, 3)
        ([0.0, 0.5, 1.0, 1.5, 2.0], [0.0, 0.5, 1.0])
    """
    if n < 2 or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"scales needs low < high and n of at least 2, got low={low}, high={high}, n={n}.")
    return [float(low + (high - low) * i / (n - 1)) for i in range(n)]


def register_counts(most: int) -> list[int]:
    """Numbers of test-time registers: none, 1, 2, 4 and so on up to `most`, for the axis "n" of rl.TestTimeRegisters.

    Raises:
        ConfigError: `most` is below 1.

    Example:
        >>> register_counts(4), register_counts(6)
        ([0, 1, 2, 4], [0, 1, 2, 4, 6])
    """
    if most < 1:
        raise ConfigError(f"register_counts needs at least one register, got most={most}.")
    doubled = [2**i for i in range(most.bit_length())]
    return [0, *doubled] + [most] * (doubled[-1] != most)
