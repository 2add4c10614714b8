"""A direction as the model reads it: from its output back to the tokens that enter the final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from registerlens.config import TokenLayout
from registerlens.errors import ConfigError, ShapeError
from registerlens.model.norms import LayerNorm
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT
from registerlens.theory.readers import fold

Space = Literal["output", "tokens"]
Direction = int | Float[Tensor, " d_read"]
"""A class, or a vector: of the model's output (such as a text direction), or of its tokens after the final norm."""
PARTS = {
    "cls": "[CLS]",
    "distillation": "the distillation token",
    "mean": "the mean patch",
    "mean_all": "the mean token",
}


def output_width(vit: HookedViT) -> int:
    """Numbers a token or an image has in the model's output.

    Example:
        >>> import registerlens as rl
        >>> output_width(rl.HookedViT.from_pretrained("registerlens:tiny"))
        52
    """
    return vit.cfg.d_pooled if vit.cfg.d_out is None else vit.cfg.d_out


def space_of(vit: HookedViT, width: int, space: Space | None) -> Space:
    """Where vectors of a width live: in the model's output if they fit there, else among its tokens.

    Raises:
        ShapeError: they fit neither, or not where they are said to live.
    """
    fits: dict[str, int] = {"output": output_width(vit), "tokens": vit.cfg.d_model}
    for one, own in fits.items():
        if own == width and space in (None, one):
            return "output" if one == "output" else "tokens"
    raise ShapeError(
        f"A direction of {width} numbers does not fit{'' if space is None else f' space={space!r}'}: the model's "
        f"output has {fits['output']}, a token after the final norm {fits['tokens']}."
    )


def check_class(vit: HookedViT, index: int) -> None:
    """Refuse a class that the model does not have.

    Raises:
        ConfigError: the model has no head, so no classes.
        ShapeError: there are not so many.
    """
    if vit.head.linear is None:
        raise ConfigError(
            f"Class {index} was asked for, but this model has no head. Give a direction: a vector of "
            f"{vit.cfg.d_model} numbers, such as a row of a probe, or one of rl.evaluation.zero_shot_head for a "
            "CLIP-like model."
        )
    if not 0 <= index < output_width(vit):
        raise ShapeError(f"Class {index} does not exist: the model has classes 0 to {output_width(vit) - 1}.")


def pool_weights(part: str, layout: TokenLayout) -> Float[Tensor, " pos"]:
    """How much each token counts in what the head pools under this name; float64, on the CPU.

    Example:
        >>> import torch, registerlens as rl
        >>> layout = rl.HookedViT.from_pretrained("registerlens:tiny").layout(torch.rand(1, 3, 16, 16))
        >>> pool_weights("mean", layout)
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    weights = torch.zeros(layout.n_tokens, dtype=torch.float64)
    where = {
        "cls": layout.cls,
        "distillation": layout.distillation,
        "mean": layout.patches,
        "mean_all": slice(layout.patches.stop),
    }[part]
    weights[where] = 1.0
    return weights / weights.sum()


@dataclass(frozen=True)
class Readout:
    """A number for each image, linear in the tokens that enter the final norm once the norms' scales are known."""

    vit: HookedViT
    words: str
    space: Space
    vector: Float[Tensor, " d_read"]
    """In its space: a unit vector of the output for a class."""
    parts: dict[str, Float[Tensor, " d_model"]]
    """What each pooled token is multiplied with before the final norm divides; norms' weights folded in, float64."""
    pooled_constant: float
    """What the final norm's bias adds, before a norm after pooling divides."""
    constant: float
    """What later biases add."""

    @classmethod
    def of(cls, vit: HookedViT, direction: Direction, space: Space | None = None) -> Readout:
        """The reading of a class or a vector.

        Raises:
            ConfigError: a class of a model without head, or the output of attention pooling, which is not linear in
                the tokens.
            ShapeError: the class does not exist, or the vector does not fit.
        """
        head, cfg = vit.head, vit.cfg
        if isinstance(direction, int):
            check_class(vit, direction)
            words, space = f"class {direction}", "output"
            direction = torch.eye(output_width(vit))[direction]
        else:
            words, space = "a given direction", space_of(vit, len(direction), space)
        vector = direction.detach().double().cpu()
        token = "cls" if cfg.class_token else "mean"
        if space == "tokens":
            pooled, constant, names = vector, 0.0, (token,)
        else:
            if head.attn is not None:
                raise ConfigError(
                    f"This model pools by attention, so that its output is not linear in its tokens. Give a direction "
                    f"of the tokens (space='tokens', {cfg.d_model} numbers), or use rl.circuits.path_patching."
                )
            pooled, constant = _before_linear(head.linear, vector)
            names = cfg.pooling or (token,)
        ln = head.ln if space == "output" else None
        constant += _bias(ln, pooled)
        pooled = fold(ln or nn.Identity(), pooled[:, None].to(vit.device))[:, 0].cpu()
        shares = pooled.split(cfg.d_model)
        parts: dict[str, Tensor] = {}
        for name, share in zip(names, shares, strict=True):
            parts[name] = parts.get(name, 0) + fold(vit.ln_final, share[:, None].to(vit.device))[:, 0]
        inner = sum(_bias(vit.ln_final, share) for share in shares)
        where = " and ".join(PARTS[name] for name in parts)
        return cls(vit, f"{words} at {where}", space, vector, parts, inner, constant)

    @property
    def pool_norm(self) -> nn.Module | None:
        """The norm between pooling and what is read, if there is one."""
        return self.vit.head.ln if self.space == "output" else None

    def measure(self, tokens: Float[Tensor, "batch pos d_model"], layout: TokenLayout) -> Float[Tensor, " batch"]:
        """The number itself, from the tokens after the final norm, through the model's own modules; before a tanh."""
        head, wide = self.vit.head, at_least_float32(tokens.dtype)
        if self.space == "output":
            pooled = head.pool(tokens, layout)
            pooled = pooled if head.ln is None else head.ln(pooled)
            tokens = pooled if head.linear is None else head.linear(pooled)
        if tokens.ndim == 3:
            tokens = tokens[:, layout.cls] if layout.cls is not None else tokens[:, layout.patches].mean(1)
        return tokens.to(wide) @ self.vector.to(tokens.device, wide)


def _before_linear(linear: nn.Linear | None, vector: Tensor) -> tuple[Tensor, float]:
    if linear is None:
        return vector, 0.0
    weight = linear.weight.detach().double().cpu()
    constant = 0.0 if linear.bias is None else float(linear.bias.detach().double().cpu() @ vector)
    return weight.T @ vector, constant


def _bias(norm: nn.Module | None, vector: Tensor) -> float:
    """What a norm's bias adds to a reading; for parts side by side each part has the bias."""
    if not isinstance(norm, LayerNorm):
        return 0.0
    return float(norm.b.detach().double().cpu() @ vector)
