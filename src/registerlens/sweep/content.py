"""What an edit is, in JSON, and a hash of it that does not change from run to run, machine to machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.errors import ConfigError


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
        ConfigError: it holds a function or an object whose content cannot be told.

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


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, wherever it is.

    Example:
        >>> tensor_hash(torch.zeros(2)) == tensor_hash(torch.zeros(2)) != tensor_hash(torch.ones(2))
        True
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
