"""What registers write through attention: the value-update decomposition, and what more registers change."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import Sums, batches
from registerlens.errors import ConfigError
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.model.block import Block, require_linear_output, require_softmax
from registerlens.model.sublayers import sublayer_of
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult

_ARRAYS = ("cosine", "rest_cosine", "output_cosine", "share", "attention")


@dataclass(frozen=True)
class Update:
    """What one layer's attention adds to each token, less its output bias, in two parts."""

    registers: Float[Tensor, "batch pos d_model"]
    """The sum over registers i of p_ti v_i, through W_O with LayerScale, all heads."""
    rest: Float[Tensor, "batch pos d_model"]
    """The same sum over all other keys."""
    attention: Float[Tensor, "batch pos"]
    """The sum of p_ti over registers, mean over heads."""


def split_update(
    vit: HookedViT, resid: Float[Tensor, "batch pos d_model"], layer: int, layout: TokenLayout, registers: slice
) -> Update:
    """Attention output = registers' part + rest, exactly: both add up to what attention writes less its output bias.

    Args:
        vit: the model, edited or not.
        resid: the residual stream before the block.
        layer: the block.
        layout: of that stream.
        registers: positions of the keys in the first part.

    Source: Jiang et al. 2025, equation 19 (A.5).

    Example:
        >>> import registerlens as rl
        >>> cfg = rl.ViTConfig(
        ...     n_layers=2, d_model=16, n_heads=2, d_mlp=8, image_size=(8, 8), patch_size=(4, 4), n_trained_registers=2
        ... )
        >>> vit, images = rl.HookedViT(cfg), torch.rand(1, 3, 8, 8)
        >>> layout = vit.layout(images)
        >>> with torch.no_grad():
        ...     update = split_update(vit, vit(images, stop_at_layer=1), 1, layout, layout.trained_registers)
        >>> update.registers.shape
        torch.Size([1, 7, 16])
    """
    recorded: dict[str, Tensor] = {}
    name = f"blocks.{layer}.attn"
    hooks: list[Any] = [
        (f"{name}.hook_v", lambda v, hook: recorded.update(v=v)),
        (f"{name}.hook_pattern", lambda pattern, hook: recorded.update(pattern=pattern)),
    ]
    stop = None if layer == vit.cfg.n_layers - 1 else layer + 1
    with vit.hooks(hooks):
        vit(resid, start_at_layer=layer, stop_at_layer=stop, layout=layout, return_type="tokens")
    pattern, v, W_O = recorded["pattern"], recorded["v"], cast(Block, vit.blocks[layer]).attn.W_O
    keys = torch.zeros(pattern.shape[-1], dtype=torch.bool, device=v.device)
    keys[registers] = True

    def written(which: Tensor) -> Tensor:
        z = einsum(pattern[..., which], v[:, which], "batch head query key, batch key head d -> batch query head d")
        return einsum(z, W_O, "batch query head d, head d d_model -> batch query d_model")

    return Update(written(keys), written(~keys), pattern[..., keys].sum(-1).mean(1))


def collapse(registers: Float[Tensor, "batch register d_model"]) -> Float[Tensor, "batch 1 d_model"]:
    """Several registers as one token: in each dimension the entry of largest magnitude, sign kept.

    Source: Jiang et al. 2025, A.5.

    Example:
        >>> collapse(torch.tensor([[[1.0, -2.0], [-3.0, 1.0]]]))
        tensor([[[-3., -2.]]])
    """
    return registers.gather(1, registers.abs().argmax(1, keepdim=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueUpdate(ModelResult):
    """Updates that registers write in one layer, each against a reference; means over images.

    An image's update is that of all its tokens but the registers, as one long vector: a token that pays the registers
    nothing has no direction of its own to count.
    """

    layer: int
    """The block."""
    n_images: int
    """Images that went through."""
    conditions: tuple[str, ...]
    """"1 test-time register", ...; "trained registers", "trained registers, collapsed"."""
    references: tuple[str, ...]
    """The condition that each one's cosines are to."""
    cosine: Float[np.ndarray, " condition"]
    """Cosine of what the registers write to what they write in the reference."""
    rest_cosine: Float[np.ndarray, " condition"]
    """The same of what all other tokens write."""
    output_cosine: Float[np.ndarray, " condition"]
    """The same of the sum of both: the attention output, less its bias."""
    share: Float[np.ndarray, " condition"]
    """||registers' part|| / (||registers' part|| + ||rest||)."""
    attention: Float[np.ndarray, " condition"]
    """Attention to the registers (0 to 1), mean over heads."""

    def describe(self) -> str:
        """The result in words, one line a condition."""
        lines = [f"What registers write in block {self.layer} of {self.model} ({self.n_images} images)."]
        for i, (name, reference) in enumerate(zip(self.conditions, self.references, strict=True)):
            against = "" if name == reference else f", cosine {self.cosine[i]:.3f} to {reference}"
            lines.append(
                f"{name}: {self.attention[i]:.0%} of attention, {self.share[i]:.0%} of the update{against} (attention "
                f"output {self.output_cosine[i]:.3f})."
            )
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a condition."""
        columns: dict[str, Any] = {"condition": self.conditions, "reference": self.references}
        return pd.DataFrame(columns | {name: getattr(self, name) for name in _ARRAYS})

    plot = drawn_by("sinks.value_update_figure")
    """The cosines of table 8, and the attention to registers."""


def value_update(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons | None = None,
    *,
    registers: Sequence[int] = (1, 2, 3, 4, 5),
    layer: int = -1,
    assign: Literal["random", "all"] = "random",
    seed: int = 0,
    batch_size: int = 16,
) -> ValueUpdate:
    """Does one register write what several do? Updates with 1 to 5 test-time registers, and trained ones collapsed.

    Args:
        vit: the model.
        images: [image, channel, height, width], or an iterable of batches.
        neurons: register neurons for the test-time registers; None leaves them out.
        registers: how many to append; the first number is the others' reference.
        layer: the block whose attention is split; negative counts from the end (the paper: the last).
        assign, seed: how neurons go to several registers, as for `TestTimeRegisters`. With "all" the registers are
            copies of one another, and only the softmax tells them from one.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: there are neither neurons nor several trained registers, or a number of registers is below 1.
        ImageError: there are no images.
        InterventionError: the model lacks a neuron, or all neurons lie beyond the layer.
        ShapeError: the layer does not exist.
        UnsupportedArchitectureError: attention is no softmax, or a norm stands after the sublayers.

    Source: Jiang et al. 2025, equation 19 and table 8 (A.5).

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> found = value_update(vit, synthetic_images(8, 0).images, neurons, registers=[1, 2])
        >>> found.conditions, found.cosine[0].round(3).item()
        (('1 test-time register', '2 test-time registers'), 1.0)
    """
    require_softmax(vit.cfg, "The split of the value update")
    require_linear_output(vit.cfg, "The split of the value update")
    layer = sublayer_of(layer, vit.cfg.n_layers).layer
    if neurons is None and vit.cfg.n_trained_registers < 2:
        raise ConfigError("Nothing to compare: give register neurons, or a model with several trained registers.")
    if neurons is not None and (not registers or min(registers) < 1):
        raise ConfigError(f"registers are numbers of tokens to append, each at least 1; got {list(registers)}.")
    appended = [] if neurons is None else [TestTimeRegisters(neurons, n, assign=assign, seed=seed) for n in registers]
    sums, references = Sums(), dict[str, str]()
    with torch.inference_mode():
        for batch in batches(vit, images, batch_size, "splitting updates"):
            sums.add(n_images=len(batch))
            held: dict[str, Update] = {}  # references alone, which come before what is compared with them
            for name, reference, update in _conditions(vit, batch.images, layer, appended):
                references[name] = reference
                sums.add(**{name: _compared(update, held.setdefault(reference, update))})
    means = sums.means()
    arrays = dict(zip(_ARRAYS, np.stack([means[name] for name in references], 1), strict=True))
    described = {"conditions": tuple(references), "references": tuple(references.values())}
    return ValueUpdate(**vit.identity, layer=layer, n_images=sums.n_images, **described, **arrays)


Condition = tuple[str, str, Update]
"""Its name, its reference's, and the update of the tokens that every condition has: prefix and patches."""


def _conditions(
    vit: HookedViT, batch: Tensor, layer: int, appended: Iterable[TestTimeRegisters]
) -> Iterator[Condition]:
    reference = ""
    for register in appended:
        name = f"{register.n} test-time register{'s' * (register.n > 1)}"
        reference = reference or name
        with vit.edit(register):
            layout = vit.layout(batch)
            resid = vit(batch, stop_at_layer=layer)
            yield name, reference, _common(split_update(vit, resid, layer, layout, layout.test_time_registers), layout)
    if vit.cfg.n_trained_registers < 2:
        return
    layout, name = vit.layout(batch), "trained registers"
    resid = vit(batch, stop_at_layer=layer)
    yield name, name, _common(split_update(vit, resid, layer, layout, layout.trained_registers), layout)
    single = replace(layout, n_trained_registers=1)
    token = collapse(resid[:, layout.trained_registers])
    resid = torch.cat([resid[:, layout.prefix], token, resid[:, layout.trained_registers.stop :]], 1)
    yield f"{name}, collapsed", name, _common(split_update(vit, resid, layer, single, single.trained_registers), single)


def _common(update: Update, layout: TokenLayout) -> Update:
    def kept(x: Tensor) -> Tensor:
        return torch.cat([x[:, layout.prefix], x[:, layout.patches]], 1)

    return Update(kept(update.registers), kept(update.rest), kept(update.attention))


def _compared(update: Update, reference: Update) -> Float[Tensor, " quantity"]:
    """Sums over a batch of what `ValueUpdate` has means of, in the order of its arrays."""
    norms = [x.float().flatten(1).norm(dim=1) for x in (update.registers, update.rest)]
    values = (
        _cosine(update.registers, reference.registers),
        _cosine(update.rest, reference.rest),
        _cosine(update.registers + update.rest, reference.registers + reference.rest),
        norms[0] / (norms[0] + norms[1]),
        update.attention.float().mean(1),
    )
    return torch.stack([value.sum() for value in values])


def _cosine(x: Float[Tensor, "batch pos d_model"], y: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
    return F.cosine_similarity(x.float().flatten(1), y.float().flatten(1), dim=1)
