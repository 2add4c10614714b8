"""Grids: many conditions at once, which can be combined, filtered and checked before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product as combinations
from typing import Any, TypeVar, overload

import pandas as pd

from registerlens.errors import ConfigError, InterventionError, RegisterLensError, close_matches
from registerlens.evaluation.metrics import COLUMNS
from registerlens.interventions.base import Host, Intervention, plan
from registerlens.sweep.axes import Axis, levels
from registerlens.sweep.conditions import CLEAN, EDIT, Condition, Factor, PlannedAblation, plannable

RESERVED = (*COLUMNS, "label", "model", "images", "control_of")
"""Columns of the result that say which condition it is; no factor may have such a name."""
MOST_NAMED = 5
"""Problems that a message names."""
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Conditions:
    """An ordered collection of different conditions, at least one.

    Made by `grid` or `Conditions.of`. `a + b` is all of both; `a * b` every combination, both edits together;
    `a.zip(b)` the first with the first, the second with the second. Indexed by position, slice, key or label.

    Raises:
        ConfigError: none, the same condition twice, or a factor named like a column of the result.

    Example:
        >>> import registerlens as rl
        >>> heads = grid(lambda layer, head: rl.Ablate(rl.Heads([(layer, head)])), layer=[1, 2], head=[0])
        >>> len(heads), heads[0].label, heads["layer=2 head=0"].factors
        (2, 'layer=1 head=0', {'layer': 2, 'head': 0})
    """

    listed: tuple[Condition, ...]
    """The conditions, in order."""

    def __post_init__(self) -> None:
        if not self.listed:
            raise ConfigError("There is no condition: the collection is empty, or a filter has left nothing.")
        first: dict[str, Condition] = {}
        for condition in self.listed:
            if condition.key in first:
                raise ConfigError(
                    f"The same condition twice: {_quoted(first[condition.key])} and {_quoted(condition)} "
                    f"make the same edit with the same factors on the same model and images. Leave one out."
                )
            first[condition.key] = condition
            if wrong := [name for name in condition.factors if name in RESERVED]:
                raise ConfigError(
                    f"{wrong[0]!r} cannot be a factor: the result has a column of that name for every condition. "
                    f"Models and image sets are chosen by .over(models=[...], images=[...])."
                )

    # Making ----------------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, listed: Iterable[Condition | tuple[str, Intervention | tuple[Intervention, ...]]]) -> Conditions:
        """An explicit list of conditions, or of (label, intervention).

        Raises:
            ConfigError: something else is in the list, or what `Conditions` refuses.

        Example:
            >>> import registerlens as rl
            >>> Conditions.of([Condition(), ("head 0", rl.Ablate(rl.Heads([(2, 0)])))]).labels
            ('clean', 'head 0')
        """
        return cls(tuple(_condition(item) for item in listed))

    # Reading ---------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Condition]:
        return iter(self.listed)

    def __len__(self) -> int:
        return len(self.listed)

    def __contains__(self, item: object) -> bool:
        return any(
            item in (condition.key, condition.label) if isinstance(item, str) else item is condition
            for condition in self
        )

    @overload
    def __getitem__(self, which: int | str) -> Condition: ...
    @overload
    def __getitem__(self, which: slice) -> Conditions: ...
    def __getitem__(self, which: int | str | slice) -> Condition | Conditions:
        if isinstance(which, slice):
            return Conditions(self.listed[which])
        if isinstance(which, int):
            return self.listed[which]
        matches = [condition for condition in self if which in (condition.key, condition.label)]
        if len(matches) != 1:
            raise ConfigError(
                f"{len(matches)} conditions are called {which!r}."
                + (close_matches(which, self.labels) if not matches else " Use the position or the key.")
            )
        return matches[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each."""
        return tuple(condition.label for condition in self)

    @property
    def keys(self) -> tuple[str, ...]:
        """The content hash of each."""
        return tuple(condition.key for condition in self)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a condition: condition (its key), label, model, images, control_of, and a column a factor."""
        rows = [
            {"condition": condition.key, "label": condition.label, "model": condition.model, "images": condition.images}
            | {"control_of": condition.control_of, **condition.factors}
            for condition in self
        ]
        return pd.DataFrame(rows)

    # Combining -------------------------------------------------------------------------------------------------------

    def __add__(self, other: Conditions) -> Conditions:
        return Conditions((*self, *other))

    def __mul__(self, other: Conditions) -> Conditions:
        return Conditions(tuple(_both(first, second) for first, second in combinations(self, other)))

    def zip(self, other: Conditions) -> Conditions:
        """Pairwise: the edits of both together.

        Raises:
            ConfigError: not as many in both, or two that contradict each other.

        Example:
            >>> import registerlens as rl
            >>> early = grid(lambda early: rl.Ablate(rl.Heads([(early, 0)])), early=[0, 1])
            >>> late = grid(lambda late: rl.Ablate(rl.Heads([(late, 0)])), late=[5, 4])
            >>> early.zip(late).labels
            ('early=0 late=5', 'early=1 late=4')
        """
        if len(self) != len(other):
            raise ConfigError(f"zip takes as many conditions on both sides, got {len(self)} and {len(other)}.")
        return Conditions(tuple(_both(first, second) for first, second in zip(self, other, strict=True)))

    def over(self, *, models: Iterable[str] | None = None, images: Iterable[str] | None = None) -> Conditions:
        """Every condition for each model, on each image set, by their names in `run_sweep`; controls go with theirs.

        Raises:
            ConfigError: no names, or one string instead of a list.

        Example:
            >>> import registerlens as rl
            >>> heads = Conditions.of([("head 0", rl.Ablate(rl.Heads([(2, 0)])))])
            >>> [(one.model, one.images) for one in heads.over(models=["S", "B"])]
            [('S', 'images'), ('B', 'images')]
        """
        places = combinations(_names("models", models) or [None], _names("images", images) or [None])
        moved: list[Condition] = []
        for model, image_set in places:
            changes = {"model": model, "images": image_set}
            moved += _moved(self, {name: value for name, value in changes.items() if value is not None})
        return Conditions(tuple(moved))

    def filter(self, keep: Callable[[Condition], bool]) -> Conditions:
        """Those for which `keep(condition)` holds; the controls of what is dropped are dropped too.

        Raises:
            ConfigError: none is left.

        Example:
            >>> import registerlens as rl
            >>> heads = grid(lambda layer: rl.Ablate(rl.Heads([(layer, 0)])), layer=range(4))
            >>> heads.filter(lambda one: one.factors["layer"] > 1).labels
            ('layer=2', 'layer=3')
        """
        kept = [condition for condition in self if keep(condition)]
        dropped = set(self.keys) - {condition.key for condition in kept}
        return Conditions(tuple(condition for condition in kept if condition.control_of not in dropped))

    # Checking --------------------------------------------------------------------------------------------------------

    def check(self, hosts: Host | Mapping[str, Host]) -> Conditions:
        """The same conditions, if the models can do all of them.

        Patch indices, and positions of `MoveOutliers`, depend on the images and are not checked.

        Args:
            hosts: the model, or the models by the names that conditions use.

        Raises:
            InterventionError: a layer, neuron, head or kind of token does not exist, a model has not been named, or a
                control is left without its condition. All are counted, the first few listed.

        Example:
            >>> import registerlens as rl
            >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
            >>> grid(lambda layer: rl.Ablate(rl.Heads([(layer, 0)])), layer=[4, 5]).check(vit).labels
            ('layer=4', 'layer=5')
        """
        models, keys = by_name(hosts), set(self.keys)
        problems = [
            (_quoted(condition), problem) for condition in self if (problem := _problem(condition, models, keys))
        ]
        if not problems:
            return self
        named = "".join(f"\n  {label}: {problem}" for label, problem in problems[:MOST_NAMED])
        rest = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise InterventionError(f"{len(problems)} of {len(self)} conditions cannot be run:{named}{rest}")


def grid(make: Callable[..., Any], /, **axes: Axis) -> Conditions:
    """A condition for every combination of the axes' values, the last axis fastest.

    Args:
        make: an intervention, or a function that makes one, or a tuple of several, from one value of each axis, given
            by name. `rl.Ablate` in every mode and `rl.AttentionBias` can be named here without reference images; they
            are fitted by `fit_conditions` or `run_sweep`. In a function of your own write `ablation(target, mode)`.
        axes: each a list, or {label: value}; the names and labels become the factors of a condition. See `sweep.axes`
            for ready-made ones.

    Raises:
        ConfigError: an axis without values, an axis that `make` does not take, values that make no intervention.

    Example:
        >>> import registerlens as rl
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
        >>> grid(rl.Ablate, target={"both": neurons}, mode=["zero", "mean"]).labels
        ('target=both mode=zero', 'target=both mode=mean')
        >>> grid(lambda n: (rl.Ablate(neurons), rl.TestTimeRegisters(neurons, n)), n=[1, 2]).labels
        ('n=1', 'n=2')
    """
    make = plannable(make)
    if not axes:
        raise ConfigError("A grid needs at least one axis, such as grid(make, layer=[1, 2]).")
    _check_names(make, axes)
    every = [levels(name, axis) for name, axis in axes.items()]
    listed = []
    for chosen in combinations(*every):
        factors = reduce(_merged, [dict(level.factors) for level in chosen])
        try:
            edits = make(**{name: level.value for name, level in zip(axes, chosen, strict=True)})
        except RegisterLensError as error:
            raise ConfigError(f"No condition can be made for {_words(factors)}: {error}") from error
        listed.append(Condition(interventions=_as_tuple(edits, factors), factors=factors))
    return Conditions(tuple(listed))


def product(*collections: Conditions) -> Conditions:
    """Every combination of conditions of several collections, their edits together: `a * b * c`.

    Raises:
        ConfigError: two conditions that contradict each other.

    Example:
        >>> import registerlens as rl
        >>> first = grid(lambda a: rl.Ablate(rl.Heads([(1, a)])), a=[0, 1])
        >>> second = grid(lambda b: rl.Ablate(rl.Heads([(2, b)])), b=[0, 1])
        >>> product(first, second).labels
        ('a=0 b=0', 'a=0 b=1', 'a=1 b=0', 'a=1 b=1')
    """
    if not collections:
        raise ConfigError("product needs at least one collection of conditions.")
    return reduce(Conditions.__mul__, collections)


def by_name(models: Thing | Mapping[str, Thing]) -> Mapping[str, Thing]:
    """Models (or what else a sweep has one or several of) by name; a single one is called "model".

    Example:
        >>> by_name(3), by_name({"S": 3})
        ({'model': 3}, {'S': 3})
    """
    return models if isinstance(models, Mapping) else {"model": models}


def each_of(names: Iterable[str], shared: Any) -> dict[str, Any]:
    """What belongs to each model: its own where a mapping is given, the same thing for all otherwise.

    Raises:
        ConfigError: the mapping lacks a model.

    Example:
        >>> each_of(["S", "B"], 3), each_of(["S"], {"S": 4, "B": 5})
        ({'S': 3, 'B': 3}, {'S': 4})
    """
    names = list(names)
    if isinstance(shared, Mapping) and (missing := [name for name in names if name not in shared]):
        raise ConfigError(f"There are images for {list(shared)}, but none for the model {missing[0]!r}.")
    return {name: shared[name] if isinstance(shared, Mapping) else shared for name in names}


def _condition(item: Any) -> Condition:
    if isinstance(item, Condition):
        return item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        label, edits = item
        return Condition(interventions=_as_tuple(edits, {EDIT: label}), factors={EDIT: label})
    raise ConfigError(f"Expected conditions or (label, intervention), got {type(item).__name__}.")


def _as_tuple(value: Any, factors: Mapping[str, Factor]) -> tuple[Intervention, ...]:
    edits = tuple(value) if isinstance(value, tuple | list) else (value,)
    if wrong := [edit for edit in edits if not isinstance(edit, Intervention)]:
        raise ConfigError(
            f"For {_words(factors)} an intervention such as rl.Ablate(neurons), or a tuple of some, was expected, got "
            f"{type(wrong[0]).__name__}."
        )
    return edits


def _check_names(make: Callable[..., Any], axes: Mapping[str, Axis]) -> None:
    """Complain about axes that `make` does not take, or lacks, before it is called."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return  # a callable without a readable signature
    try:
        signature.bind(**axes)
    except TypeError as error:
        unknown = [name for name in axes if name not in signature.parameters]
        hint = close_matches(unknown[0], signature.parameters) if unknown else ""
        raise ConfigError(
            f"The axes {list(axes)} do not fit {getattr(make, '__name__', type(make).__name__)}"
            f"({', '.join(signature.parameters)}): {error}.{hint}"
        ) from error


def _both(first: Condition, second: Condition) -> Condition:
    """Both edits together."""
    if first.control_of or second.control_of:
        raise ConfigError("Controls cannot be combined; add them last, with with_controls(vit, conditions, ...).")
    if (first.model, first.images) != (second.model, second.images):
        raise ConfigError(
            f"{_quoted(first)} and {_quoted(second)} are for different models or images. Combine first, then "
            f".over(models=[...], images=[...])."
        )
    factors = _merged(first.factors, second.factors)
    return replace(first, interventions=first.interventions + second.interventions, factors=factors)


def _merged(first: dict[str, Factor], second: dict[str, Factor]) -> dict[str, Factor]:
    if clash := [name for name in first if name in second and first[name] != second[name]]:
        name = clash[0]
        raise ConfigError(
            f"A contradiction: the factor {name!r} would be {first[name]!r} and {second[name]!r} in one condition. "
            f"Call one of them something else, with an axis {{label: value}} of another name."
        )
    return first | second


def _names(what: str, names: Iterable[str] | None) -> list[str | None]:
    if names is None:
        return []
    listed = [] if isinstance(names, str) else list(names)
    if not listed:
        raise ConfigError(f"{what} takes a list of names, such as {what}=['a', 'b'], got {names!r}.")
    return [*listed]


def _moved(conditions: Iterable[Condition], changes: dict[str, str]) -> list[Condition]:
    """The same conditions elsewhere; controls point to the moved conditions."""
    conditions = list(conditions)
    moved = {condition.key: replace(condition, **changes) for condition in conditions if not condition.control_of}

    def move(condition: Condition) -> Condition:
        if not condition.control_of:
            return moved[condition.key]
        whose = moved.get(condition.control_of)
        return replace(condition, control_of=whose.key if whose else condition.control_of, **changes)

    return [move(condition) for condition in conditions]


def _problem(condition: Condition, models: Mapping[str, Host], keys: set[str]) -> str:
    """What keeps a condition from being run; empty if nothing does."""
    if condition.model not in models:
        return f"there is no model {condition.model!r}, only {list(models)}"
    if condition.control_of and condition.control_of not in keys:
        return "the condition whose control it is has been left out"
    shuffled = any(isinstance(edit, PlannedAblation) and edit.mode == "shuffle" for edit in condition.interventions)
    if condition.n_registers and shuffled:
        return "other images' activations as a whole (shuffle) have none for a test-time register; take another mode"
    try:
        plan(models[condition.model], condition.interventions)
    except RegisterLensError as error:
        return str(error)
    return ""


def _quoted(condition: Condition) -> str:
    """A label between quotes, with the model and the images where they have names of their own."""
    where = [place for place, usual in ((condition.model, "model"), (condition.images, "images")) if place != usual]
    return f"'{condition.label}'" + (f" ({', '.join(where)})" if where else "")


def _words(factors: Mapping[str, Factor]) -> str:
    return " ".join(f"{name}={value}" for name, value in factors.items()) or CLEAN
