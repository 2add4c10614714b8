"""How a sweep is cut into tasks, each small enough to be lost and large enough to share work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from registerlens.interventions.base import Host
from registerlens.sweep.conditions import Condition

GROUP = 64
"""Conditions of a task at most: they share the clean run."""


@dataclass(frozen=True, order=True)
class Task:
    """One group of conditions on one shard of images: what a worker does at a time, and one file of the store.

    Example:
        >>> Task(group=3, shard=12).name
        'g00003-s000012'
    """

    group: int
    """Index of the group of conditions."""
    shard: int
    """Index of the shard of images."""

    @property
    def name(self) -> str:
        """Its name in the store."""
        return f"g{self.group:05d}-s{self.shard:06d}"


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


def tasks_of(n_groups: int, n_shards: Mapping[int, int]) -> Iterator[Task]:
    """Every task; `n_shards` says for each group how many shards its image set has.

    Example:
        >>> [task.name for task in tasks_of(2, {0: 1, 1: 2})]
        ['g00000-s000000', 'g00001-s000000', 'g00001-s000001']
    """
    return (Task(group, shard) for group in range(n_groups) for shard in range(n_shards[group]))
