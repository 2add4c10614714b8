"""Every error RegisterLens raises on purpose: what was got, what was expected, what to do."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class RegisterLensError(Exception):
    """Base class: `except RegisterLensError` catches everything this package raises on purpose.

    The message says what was got, what was expected and what to do. A note under the traceback, which notebooks show
    too, names the command that prints the page of the error's class; `str(error)` is without it.

    Example:
        >>> ShapeError("Expected a batch.").__notes__
        ['The usual causes, and what to do: registerlens help ShapeError']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        self.add_note(f"The usual causes, and what to do: registerlens help {own.__name__}")


class HookNameError(RegisterLensError, KeyError):
    """A hook name is unknown, or a pattern matches no hook point."""

    def __str__(self) -> str:  # KeyError would show the message as a quoted repr
        return str(self.args[0])


class ShapeError(RegisterLensError, ValueError):
    """A tensor has a shape or a kind of number that cannot be used here, or an index lies outside."""


class ConfigError(RegisterLensError, ValueError):
    """An option, a configuration, or a file that describes something is inconsistent or incomplete."""


class WeightsError(RegisterLensError, ValueError):
    """A weight is missing, unexpected, unreadable or of the wrong shape."""


class UnsupportedArchitectureError(RegisterLensError, ValueError):
    """The model is not a ViT of a family RegisterLens knows."""


class ModelNotFoundError(RegisterLensError, OSError):
    """A model name leads nowhere: a typo, or no network."""


class ImageError(RegisterLensError, ValueError):
    """No usable image was given."""


class SourceError(RegisterLensError, OSError):
    """Images cannot be reached, or are no longer those that were listed: unlike a bad image, this may be temporary."""


class NonFiniteError(RegisterLensError, ArithmeticError):
    """A measurement met NaN or infinity."""


class DivergedError(RegisterLensError, ArithmeticError):
    """Training went astray: a loss or gradient is not finite, or the loss exploded; the last checkpoint is kept."""


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
    """A sweep's store is damaged, full, another run's or another sweep's; what was stored before is intact."""


class BackendError(RegisterLensError, RuntimeError):
    """Workers of a sweep cannot be had, or died or hung again and again on a task; what was stored is intact."""


class DrawingError(RegisterLensError, RuntimeError):
    """A still picture of a figure could not be drawn: no browser is there, or it failed or gave no answer."""


@contextmanager
def needing(package: str, extra: str, purpose: str) -> Iterator[None]:
    """Where an optional dependency is imported.

    Raises:
        MissingExtraError: it is not installed; the message says what `purpose` needs, and how to install it.

    Example:
        >>> with needing("no-such-package", "demo", "This example"):
        ...     import no_such_package
        Traceback (most recent call last):
        registerlens.errors.MissingExtraError: This example needs the package 'no-such-package', which is not ...
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(package, extra, purpose) from error


class MissingExtraError(RegisterLensError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'registerlens[{extra}]' (in a clone: pip install '.[{extra}]')"
        )
        self._given = (package, extra, purpose)

    def __reduce__(self) -> tuple[Any, ...]:  # it is made from other arguments than the message that it holds
        return type(self), self._given, self.__dict__


def close_matches(name: str, known: Iterable[str], n: int = 3) -> str:
    """A clause naming the known names most like `name`, or an empty string if none is.

    Example:
        >>> close_matches("hook_embd", ["hook_embed", "hook_pos_embed"])
        " Did you mean 'hook_embed' or 'hook_pos_embed'?"
    """
    matches = get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse a value that an option does not have.

    Example:
        >>> check_choice("mode", "zeros", ("zero", "mean"))
        Traceback (most recent call last):
        registerlens.errors.ConfigError: mode must be one of ['zero', 'mean'], got 'zeros'. Did you mean 'zero'?
        ...
    """
    choices = list(known)
    if value not in choices:
        raise ConfigError(f"{name} must be one of {choices}, got {value!r}.{close_matches(str(value), choices)}")


def check_at_least(least: int, **options: float | int | None) -> None:
    """Refuse options that are too small; None is an option that was not given.

    Example:
        >>> check_at_least(1, steps=8, batch_size=0)
        Traceback (most recent call last):
        registerlens.errors.ConfigError: batch_size must be at least 1, got 0.
        ...
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")


def check_finite(values: Any, what: str, suspects: str = "the images") -> None:
    """Refuse a tensor with NaN or infinity; `what` says so, and where it was met.

    Raises:
        NonFiniteError: it has some; the message says what to look at.
    """
    if not values.isfinite().all():
        raise NonFiniteError(f"{what}. Check {suspects}; if the model is in float16, use bfloat16 or float32.")


def kinds() -> list[type[RegisterLensError]]:
    """Every class of error, the base class first."""
    classes = [
        value for value in globals().values() if isinstance(value, type) and issubclass(value, RegisterLensError)
    ]
    return sorted(classes, key=lambda kind: kind is not RegisterLensError)


def page_of(kind: type[RegisterLensError]) -> Path:
    """The page, Markdown, about a class of error: what it means, its usual causes, what to do."""
    return Path(__file__).parent / "assets" / "errors" / f"{kind.__name__}.md"
