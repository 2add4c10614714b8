"""One transformer block: attention, then MLP, each adding to the stream; and what analyses take for granted of it."""

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import ViTConfig
from registerlens.errors import UnsupportedArchitectureError
from registerlens.model.attention import Attention, Rotation
from registerlens.model.mlp import GatedMLP, PlainMLP
from registerlens.model.norms import NORMS


class Block(nn.Module):
    """A block that reads a normalised stream, and may normalise what it adds (`norm_after`); every tensor
    [batch, pos, d_model] on its way through has a hook point."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        norm = NORMS[cfg.norm]
        # In the order of the forward pass, here and in every part: hook names are listed in the order of their making.
        self.hook_resid_pre = HookPoint()
        self.ln1 = norm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ln1_post = norm(cfg.d_model, cfg.norm_eps) if cfg.norm_after else nn.Identity()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.ln2 = norm(cfg.d_model, cfg.norm_eps)
        self.mlp = GatedMLP(cfg) if cfg.gated_mlp else PlainMLP(cfg)
        self.ln2_post = norm(cfg.d_model, cfg.norm_eps) if cfg.norm_after else nn.Identity()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], rotation: Rotation | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block."""
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.ln1_post(self.attn(self.ln1(resid), rotation))))
        return self.hook_resid_post(resid + self.hook_mlp_out(self.ln2_post(self.mlp(self.ln2(resid)))))


_INSTEAD = "Measured things need no such assumption: trace, find_register_neurons, interventions, patching by hooks."


def require_softmax(cfg: ViTConfig, purpose: str) -> None:
    """Refuse a model whose patterns are no softmax.

    Args:
        cfg: the model's architecture.
        purpose: what assumes it, as the subject of a sentence.

    Raises:
        UnsupportedArchitectureError: attention is of another kind.

    Example:
        >>> from registerlens.emergence.config import ModelShape, TrainingConfig
        >>> require_softmax(TrainingConfig(model=ModelShape(attention="sigmoid")).vit_config, "The attention bias")
        Traceback (most recent call last):
        registerlens.errors.UnsupportedArchitectureError: The attention bias assumes that attention is a ...
    """
    if cfg.attention != "softmax":
        raise UnsupportedArchitectureError(
            f"{purpose} assumes that attention is a softmax; this model's is {cfg.attention}. {_INSTEAD}"
        )


def require_linear_output(cfg: ViTConfig, purpose: str) -> None:
    """Refuse a model in which a norm stands between what W_O and W_out write and the residual stream.

    Args:
        cfg: the model's architecture.
        purpose: what assumes it, as the subject of a sentence.

    Raises:
        UnsupportedArchitectureError: `norm_after` is set.
    """
    if cfg.norm_after:
        raise UnsupportedArchitectureError(
            f"{purpose} assumes that sublayers add to the residual stream what W_O and W_out write; in this model a "
            f"norm stands between (norm_after). {_INSTEAD}"
        )
