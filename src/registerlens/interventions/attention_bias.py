"""The attention bias that replaces a test-time register: one more key and value in every head, and no extra token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import ViTConfig
from registerlens.data.batches import Images
from registerlens.engine.stream import MeansAt, stream
from registerlens.errors import InterventionError
from registerlens.interventions.base import Edit, Host, Intervention, Scene
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.model.attention import final_point
from registerlens.model.block import require_softmax
from registerlens.model.vit import HookedViT
from registerlens.results import FINITE


@dataclass(frozen=True, eq=False)
class AttentionBias(Intervention):
    """softmax(Q [K; k']^T / sqrt(d_head)) [V; v'] in every head, with the register neurons zeroed.

    The pair stands after all tokens and takes no position: it is appended to what leaves the key projection, norms and
    rotations included. Nothing in the residual stream has an outlier norm any more.

    Made by `AttentionBias.fit` or `load`.

    Source: Jiang et al. 2025, section on attention biases and figure 8; Sun et al. 2024.
    """

    neurons: RegisterNeurons
    """The register neurons, set to zero at every token."""
    k: Float[Tensor, "layer head d_head"] = field(repr=False, metadata=FINITE)
    """k' of each head: the mean key of the test-time register."""
    v: Float[Tensor, "layer head d_head"] = field(repr=False, metadata=FINITE)
    """v' of each head: its mean value."""
    n_images: int = 0
    """Images the means were taken over."""

    @classmethod
    def fit(
        cls,
        vit: HookedViT,
        images: Images,
        neurons: RegisterNeurons,
        *,
        batch_size: int = 16,
        register: TestTimeRegisters | None = None,
    ) -> AttentionBias:
        """Mean keys and values of the test-time register over images, in one streaming pass.

        Args:
            vit: the model, edited or not.
            images: preprocessed, as a tensor or in batches; the paper takes 1000.
            neurons: its register neurons.
            batch_size: images at once when a tensor is given.
            register: with other options than the defaults; it must append exactly one token.

        Raises:
            ImageError: there are no images.
            InterventionError: the register appends no or several tokens, or the model lacks a neuron.
            UnsupportedArchitectureError: attention is no softmax.

        Example:
            >>> import registerlens as rl
            >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
            >>> bias = rl.AttentionBias.fit(vit, images, rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)]))
            >>> with torch.no_grad(), vit.edit(bias):
            ...     vit(images).shape, bias.k.shape
            (torch.Size([2, 36, 52]), torch.Size([6, 1, 64]))
        """
        require_softmax(vit.cfg, "An attention bias")
        register = TestTimeRegisters(neurons) if register is None else register
        if register.n != 1 or register.neurons.pairs != neurons.pairs:
            raise InterventionError(
                "An attention bias stands for exactly one test-time register of the same neurons. Leave register= out."
            )
        # The register is the last token; behind it stand the keys of attention biases that are in force already.
        pairs = MeansAt(
            [f"blocks.*.attn.{point}" for point in _points(vit.cfg).values()],
            lambda x, layout: x[:, layout.test_time_registers.stop - 1],
        )
        with vit.edit(register):
            [means] = stream(vit, images, [pairs], batch_size=batch_size, description="fitting the attention bias")
        k, v = (
            torch.stack([means[f"blocks.{layer}.attn.{point}"] for layer in range(vit.cfg.n_layers)])
            for point in _points(vit.cfg).values()
        )
        return cls(neurons, k, v, pairs.n_images)

    @property
    def n_keys(self) -> int:
        """The one that stands after all tokens."""
        return 1

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """Zeroing the neurons, and one more key and value in every layer."""
        cfg = host.cfg
        require_softmax(cfg, "An attention bias")
        expected = (cfg.n_layers, cfg.n_heads, cfg.d_head)
        if tuple(self.k.shape) != expected or tuple(self.v.shape) != expected:
            raise InterventionError(
                f"The bias has keys of shape {list(self.k.shape)} [layer, head, d_head], the model needs "
                f"{list(expected)}. It was fitted on another architecture."
                " Fit it on this one: rl.AttentionBias.fit(vit, images, neurons)."
            )
        zeroing = [
            Edit(f"blocks.{layer}.mlp.hook_post", partial(_zero, list(listed)))
            for layer, listed in self.neurons.check(cfg).by_layer().items()
        ]
        pairs = [
            Edit(f"blocks.{layer}.attn.{point}", partial(_append, {"k": self.k, "v": self.v}[kind][layer]))
            for layer in range(cfg.n_layers)
            for kind, point in _points(cfg).items()
        ]
        return [*zeroing, *pairs]


def _points(cfg: ViTConfig) -> dict[str, str]:
    """Where keys and values are as attention uses them."""
    return {"k": final_point(cfg, "k"), "v": "hook_v"}


def _zero(listed: list[int], post: Float[Tensor, "batch pos d_mlp"], scene: Scene) -> Float[Tensor, "batch pos d_mlp"]:
    return post.index_fill(-1, torch.tensor(listed, device=post.device), 0)


def _append(
    row: Float[Tensor, "head d_head"], x: Float[Tensor, "batch pos head d_head"], scene: Scene
) -> Float[Tensor, "batch more head d_head"]:
    return torch.cat([x, repeat(row.to(x), "head d -> batch 1 head d", batch=len(x))], 1)
