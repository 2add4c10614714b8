"""Contributions and effects of all images, one number an image and edge; no activation is kept."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from registerlens.circuits.contributions import Contributions, Received
from registerlens.circuits.edge_checks import EdgeEffects


class Collected:
    """Arrays of what came by, images first; attributes as those of `Contributions` and `EdgeEffects`.

    `Received` becomes three arrays: `reader_heads`, `reader_rest`, `reader_whole`.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}
        self.error = 0.0

    def add(self, found: Contributions | EdgeEffects) -> None:
        """Take in one batch."""
        self._take("", found)

    def __getitem__(self, name: str) -> np.ndarray:
        """All images of one array, float64; batches are put together once, as tables ask for an array edge by edge."""
        parts = self._parts[name]
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def _take(self, prefix: str, found: Any) -> None:
        for item in fields(found):
            value = getattr(found, item.name)
            if isinstance(value, Tensor):
                self._parts.setdefault(prefix + item.name, []).append(value.cpu().numpy().astype(np.float64))
            elif isinstance(value, Received):
                self._take(f"{item.name}_", value)
            elif isinstance(value, float):
                self.error = max(self.error, value)
