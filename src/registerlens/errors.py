"""Every error RegisterLens raises on purpose: what was got, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class RegisterLensError(Exception):
    """Base class: `except RegisterLensError` catches everything this package raises on purpose."""


class HookNameError(RegisterLensError, KeyError):
    """A hook name is unknown, or a pattern matches no hook point."""

    def __str__(self) -> str:  # KeyError would show the message as a quoted repr
        return str(self.args[0])


class ShapeError(RegisterLensError, ValueError):
    """A tensor has a shape the model cannot take."""


class ConfigError(RegisterLensError, ValueError):
    """An architecture description is inconsistent."""


class WeightsError(RegisterLensError, ValueError):
    """A weight is missing, unexpected, unreadable or of the wrong shape."""


class UnsupportedArchitectureError(RegisterLensError, ValueError):
    """The model is not a ViT of a family RegisterLens knows."""


class ModelNotFoundError(RegisterLensError, OSError):
    """A model name leads nowhere: a typo, or no network."""


class ImageError(RegisterLensError, ValueError):
    """No usable image was given."""


class SourceError(RegisterLensError, OSError):
    """Images cannot be reached, or are no longer those that were listed: unlike a bad image, that may pass."""


class NonFiniteError(RegisterLensError, ArithmeticError):
    """A measurement met NaN or infinity."""


class OutOfMemoryError(RegisterLensError, MemoryError):
    """Not even the least that can be run at once fits into memory."""


class NoOutliersError(RegisterLensError, ValueError):
    """The model has no outlier tokens on these images; `evidence` (an OutlierEvidence) says why."""

    def __init__(self, message: str, evidence: Any = None) -> None:
        super().__init__(message)
        self.evidence = evidence


class InterventionError(RegisterLensError, ValueError):
    """An intervention names something that does not exist, never fires, or lacks what it needs."""


class StoreError(RegisterLensError, OSError):
    """A sweep's store is damaged, full, held by another run, or of another sweep; what was stored before is intact."""


class BackendError(RegisterLensError, RuntimeError):
    """Workers of a sweep cannot be had, or died again and again on the same task; what was stored is intact."""


class MissingExtraError(RegisterLensError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'registerlens[{extra}]' (in a clone: pip install '.[{extra}]')"
        )


def close_matches(name: str, known: Iterable[str], n: int = 3) -> str:
    """A clause naming the known names most like `name`, or an empty string if none is.

    Example:
        >>> close_matches("hook_embd", ["hook_embed", "hook_pos_embed"])
        " Did you mean 'hook_embed' or 'hook_pos_embed'?"
    """
    matches = get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
