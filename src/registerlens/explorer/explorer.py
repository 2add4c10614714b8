"""`explore`: a model, its images and its interventions, as a widget for a notebook or a page to keep."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import Trace
from registerlens.analysis.trace import trace as trace_model
from registerlens.data.images import to_display
from registerlens.errors import ConfigError, ImageError, InterventionError, ShapeError
from registerlens.explorer.attention import RecordedAttention
from registerlens.explorer.recording import record
from registerlens.explorer.tokens import token_names
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Edits, Intervention, plan, several
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.model.sublayers import sublayers
from registerlens.model.vit import HookedViT

if TYPE_CHECKING:
    from anywidget import AnyWidget

CLEAN = "clean"
"""The name of the condition without an intervention."""

KEPT = 12
"""Recordings held at once; the one used longest ago is made anew when it is asked for again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explorer:
    """Images of one size, the conditions to compare, and what was recorded of them so far.

    In a notebook it shows itself as the widget. `to_html` writes a page that needs neither Python nor a network.
    """

    vit: HookedViT = field(repr=False)
    """The model; what is recorded later sees its edits of then."""
    images: Float[Tensor, "image channel height width"] = field(repr=False)
    """Preprocessed."""
    display: UInt8[np.ndarray, "image height width rgb"] = field(repr=False)
    """The same to look at."""
    names: tuple[str, ...]
    """One an image."""
    conditions: dict[str, tuple[Intervention, ...]]
    """Interventions by name, the clean model first."""
    neurons: RegisterNeurons | None
    """Whose activations are always shown."""
    trace: Trace = field(repr=False)
    """What says whether a token is an outlier, and where the norms are taken for that."""
    _recorded: OrderedDict[tuple[int, str], RecordedAttention] = field(default_factory=OrderedDict, repr=False)

    @property
    def place(self) -> int:
        """The row of `sublayers` where norms are clearest: outliers are judged there."""
        return self.trace.sublayers.index(self.trace.strongest)

    @property
    def threshold(self) -> float | None:
        """Norm over an image's median above which a patch is an outlier there; None where the model has none."""
        evidence = self.trace.evidence[self.place]
        return evidence.threshold if evidence.present else None

    def attention(self, image: int, condition: str) -> RecordedAttention:
        """One image under one condition: recorded when it is first asked for.

        Raises:
            ShapeError: there is no such image or condition.
        """
        if not 0 <= image < len(self.images) or condition not in self.conditions:
            raise ShapeError(
                f"There is no image {image!r} under {condition!r}: images count 0 to {len(self.images) - 1}, the "
                f"conditions are {list(self.conditions)}."
            )
        key = (image, condition)
        if key not in self._recorded:
            chosen = () if self.neurons is None else self.neurons.pairs
            recording = record(self.vit, self.images[image : image + 1], self.conditions[condition], chosen)
            self._recorded[key] = RecordedAttention(recording)
            if len(self._recorded) > max(KEPT, len(self.conditions)):
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]

    def tokens(self, condition: str) -> list[str]:
        """The names of the keys under a condition: tokens, then those of attention biases.

        Raises:
            ShapeError: there is no such condition.
        """
        if condition not in self.conditions:
            raise ShapeError(f"There is no condition {condition!r}; there are {list(self.conditions)}.")
        edits = self.conditions[condition]
        height, width = self.images.shape[2:]
        registers = self.vit.n_test_time_registers + sum(edit.n_registers for edit in edits)
        layout = self.vit.cfg.layout(height, width, registers)
        return token_names(layout, layout.n_tokens + sum(edit.n_keys for edit in edits))

    def widget(self) -> AnyWidget:
        """The live widget, for JupyterLab, VS Code and marimo; every answer is computed in this process.

        Raises:
            MissingExtraError: anywidget is not installed.
        """
        from registerlens.explorer.widget import make_widget  # anywidget is optional

        return make_widget(self)

    def to_html(self, path: str | Path, *, max_bytes: int = 5_000_000) -> Path:
        """Write a page that carries its data; whole or not at all.

        Args:
            path: the HTML file.
            max_bytes: the most it may weigh. Blocks and heads are left out until it fits, and the page says which.

        Returns:
            the path.

        Raises:
            ConfigError: not even one map fits.
        """
        from registerlens.explorer.page import write

        return write(self, Path(path), max_bytes)

    def section(self, *, max_bytes: int = 5_000_000) -> str:
        """The same as a piece of HTML for a page of your own; several on a page do not get into each other's way.

        Raises:
            ConfigError: as for `to_html`.
        """
        from registerlens.explorer.page import section

        return section(self, max_bytes)

    def _display_(self) -> Any:  # marimo asks for this
        return self.widget()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget()._repr_mimebundle_(**options)


def explore(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    neurons: RegisterNeurons | None = None,
    *,
    interventions: Mapping[str, Edits] | None = None,
    names: Sequence[str] | None = None,
    display: UInt8[np.ndarray, "image height width rgb"] | None = None,
    trace: Trace | None = None,
) -> Explorer:
    """Look at images patch by patch: attention, norms, neurons, with and without interventions.

    Args:
        vit: the model, edited or not.
        images: preprocessed, all of one size; a handful.
        neurons: register neurons, whose activations are shown at every token.
        interventions: what to compare the clean model with, by name: an intervention, or several in force together.
            Default: where neurons are given, these zeroed, a test-time register of them, and an attention bias
            fitted on `images`; nothing otherwise.
        names: one an image; any text, shown as it is.
        display: the images to look at, 0 to 255; default: `images` with the preprocessing undone.
        trace: of the model, over these or more images: it decides which tokens are outliers. Default: made here.

    Raises:
        ImageError: there is no image, or names or pictures are not one an image.
        ShapeError: the images do not fit the model.
        InterventionError: an intervention does not fit the model, or is called "clean".
        ConfigError: the trace is of a model with other blocks.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> found = explore(vit, synthetic_images(2, 0).images, neurons)
        >>> list(found.conditions)
        ['clean', 'zeroed', 'test-time register', 'attention bias']
        >>> found.attention(0, "clean").mean(3).shape
        torch.Size([36, 36])
    """
    if isinstance(images, Tensor) and images.ndim == 4 and not len(images):
        raise ImageError("No image to explore: the tensor is empty.")
    vit.layout(images)
    if neurons is not None:
        neurons.check(vit.cfg)
    names = [f"image {i}" for i in range(len(images))] if names is None else names
    display = to_display(images, vit.preprocess) if display is None else display
    if len(names) != len(images) or len(display) != len(images):
        raise ImageError(f"{len(images)} images came with {len(names)} names and {len(display)} pictures.")
    edits_by_name = _usual(vit, images, neurons) if interventions is None else interventions
    if CLEAN in edits_by_name:
        raise InterventionError(f"{CLEAN!r} is the model without interventions; give yours another name.")
    conditions = {CLEAN: ()} | {str(name): several(edits) for name, edits in edits_by_name.items()}
    for edits in conditions.values():
        plan(vit, edits, vit.n_test_time_registers)  # complains of what does not fit
    if trace is not None and trace.sublayers != sublayers(vit.cfg.n_layers):
        raise ConfigError(
            f"The trace is of a model with {trace.n_layers} blocks, this one has {vit.cfg.n_layers}. Give "
            f"rl.trace(vit, images) of this model, or none: it is made then."
        )
    return Explorer(
        vit=vit,
        images=images,
        display=display,
        names=tuple(map(str, names)),
        conditions=conditions,
        neurons=neurons,
        trace=trace_model(vit, images) if trace is None else trace,
    )


def _usual(vit: HookedViT, images: Tensor, neurons: RegisterNeurons | None) -> dict[str, Intervention]:
    if neurons is None or not len(neurons):
        return {}
    return {
        "zeroed": Ablate(neurons),
        "test-time register": TestTimeRegisters(neurons),
        "attention bias": AttentionBias.fit(vit, images, neurons),
    }
