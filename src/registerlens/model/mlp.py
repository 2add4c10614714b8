"""The MLP of a block: neurons, with their pre- and post-activations as hook points."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import ViTConfig
from registerlens.model.norms import NORMS
from registerlens.model.parts import ACTIVATIONS, ResidualWriter, editable, listening

_CACHED_FLOATS = 2**20
"""Hidden units held at once on the CPU when nobody listens: 4 MiB stay in the cache, the whole layer would not."""

Watch = Callable[[str, Tensor], Tensor]
"""From a hook point's name and the tensor there to the tensor that flows on."""


class MLP(nn.Module):
    """A hidden layer between two maps; a neuron is one hidden unit as the last linear map reads it (`hook_post`).

    Where the hidden layer is normalised first (`ln`), `hook_mid` stands before that norm.
    """

    points: tuple[str, ...]
    """Its hook points before the nonlinearity."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.up = _linear(cfg)
        self.out = ResidualWriter(cfg.d_mlp, cfg.d_model, cfg.layer_scale)
        for point in self.points:
            setattr(self, point, HookPoint())  # [batch, pos, d_mlp], as all of them
        if cfg.mlp_norm:
            self.hook_mid = HookPoint()
        self.ln = NORMS[cfg.norm](cfg.d_mlp, cfg.norm_eps) if cfg.mlp_norm else None
        self.hook_post = HookPoint()

    @abstractmethod
    def _activate(self, x: Float[Tensor, "*batch d_model"], watch: Watch) -> Float[Tensor, "*batch d_mlp"]:
        """The hidden layer before any norm."""

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream, LayerScale included."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or self.watched:
            post = self._activate(x, self._hook)
            if self.ln is not None:
                post = self.ln(self.hook_mid(post))
            return self.out(self.hook_post(editable(post, self.hook_post)))
        return self._in_pieces(x)

    @property
    def watched(self) -> bool:
        """Whether anything listens inside the MLP."""
        return listening(*(part for part in self.modules() if part is not self))

    def neurons(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """The neurons' activations for a normalised stream, past all hook points: what `hook_post` has unedited."""
        hidden = self._activate(x, lambda point, tensor: tensor)
        return hidden if self.ln is None else self.ln.normalise(hidden)

    def _hook(self, point: str, x: Tensor) -> Tensor:
        return getattr(self, point)(x)

    def _in_pieces(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        # The same arithmetic, a few tokens at a time, so that the hidden layer never leaves the cache.
        tokens = x.flatten(0, 1)
        out = torch.empty_like(tokens)
        step = max(1, _CACHED_FLOATS // self.up.out_features)
        for start in range(0, len(tokens), step):
            out[start : start + step] = self.out(self.neurons(tokens[start : start + step]))
        return out.view_as(x)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights; column n feeds neuron n (in a gated MLP, the part that the gate multiplies)."""
        return self.up.weight.T

    @property
    def W_read(self) -> Float[Tensor, "d_model read"]:
        """All that reads the stream: W_in, and in a gated MLP W_gate beside it."""
        return self.W_in

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input biases."""
        return self.up.bias

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, LayerScale folded in; row n is what neuron n writes."""
        return self.out.effective_weight.T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias, LayerScale folded in."""
        return self.out.effective_bias


class PlainMLP(MLP):
    """act(W_in x + b_in)."""

    points = ("hook_pre",)

    def _activate(self, x: Float[Tensor, "*batch d_model"], watch: Watch) -> Float[Tensor, "*batch d_mlp"]:
        return self.act(watch("hook_pre", self.up(x)))


class GatedMLP(MLP):
    """act(W_gate x + b_gate) * (W_in x + b_in), as SwiGLU; `hook_pre` is before the nonlinearity, `hook_pre_linear` the
    other factor (TransformerLens's names)."""

    points = ("hook_pre", "hook_pre_linear")

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__(cfg)
        self.gate = _linear(cfg)

    def _activate(self, x: Float[Tensor, "*batch d_model"], watch: Watch) -> Float[Tensor, "*batch d_mlp"]:
        return self.act(watch("hook_pre", self.gate(x))) * watch("hook_pre_linear", self.up(x))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Gate weights; column n opens neuron n."""
        return self.gate.weight.T

    @property
    def W_read(self) -> Float[Tensor, "d_model read"]:
        """W_in and W_gate side by side."""
        return torch.cat([self.W_in, self.W_gate], 1)

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        """Gate biases."""
        return self.gate.bias


def _linear(cfg: ViTConfig) -> nn.Linear:
    linear = nn.Linear(cfg.d_model, cfg.d_mlp)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
