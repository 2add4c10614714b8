"""Edits inside timm's attention with rotary positions, norms on queries and keys, and a norm before the last map."""

from dataclasses import dataclass

import pytest
import torch
from families import TIMM
from helpers import randomise, relative

from registerlens import HookedViT, RegisterNeurons
from registerlens.errors import InterventionError
from registerlens.interventions.attach import attach
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Edit, Intervention
from registerlens.interventions.registers import TestTimeRegisters

TOLERANCE = 1e-5
REGISTERS = TestTimeRegisters(RegisterNeurons.from_pairs([(0, 3), (0, 40), (2, 7)]), n=2)
ROPE = ["timm EVA-02 base", "timm EVA-02 tiny", "timm DINOv3", "timm mixed RoPE", "timm RoPE with everything else"]


@dataclass(frozen=True)
class Doubled(Intervention):
    """The last token's part doubled in place, and the tensor shown."""

    point: str
    seen: list

    def edits(self, host, first_register):
        def change(x, scene):
            self.seen.append(x.clone())
            x[:, -1] *= 2
            return x

        return [Edit(self.point, change)]


def made(name):
    case = TIMM[name]
    module = randomise(case.make(case.native))
    return module, HookedViT.from_module(module)


def pictures(vit):
    return torch.randn(2, vit.cfg.n_channels, *vit.cfg.image_size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["q", "k", "v", "z"])
@pytest.mark.parametrize("name", [*ROPE, "timm q/k norm and inner norms"])
def test_queries_keys_values_and_heads_are_those_of_hooked_vit(name, kind, fused):
    module, vit = made(name)
    for block in module.blocks:
        block.attn.fused_attn = fused
    at = f"hook_{kind}"
    if kind in "qk":
        at = f"hook_rot_{kind}" if vit.cfg.rope is not None else f"{kind}_norm.hook_normalized"
    seen, images = [], pictures(vit)
    edit = Doubled(f"blocks.1.attn.{at}", seen)
    with torch.no_grad(), attach(module, REGISTERS, edit):
        output = module(images)
    with torch.no_grad(), vit.edit(REGISTERS, edit):
        expected = vit(images)
    assert seen[0].shape[1] == vit.cfg.layout().n_tokens + 2
    assert relative(*seen) <= TOLERANCE and relative(output, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ROPE)
def test_appended_tokens_have_no_position(name):
    """Were they turned, their queries and keys would not be those before the turn."""
    module, vit = made(name)
    queries, keys = [], []
    edits = [Doubled(f"blocks.0.attn.hook_rot_{kind}", seen) for kind, seen in (("q", queries), ("k", keys))]
    images = pictures(vit)
    with torch.no_grad(), attach(module, REGISTERS, *edits):
        module(images)
    point = "blocks.0.attn.{}_norm.hook_normalized" if vit.cfg.qk_norm else "blocks.0.attn.hook_{}"
    with torch.no_grad(), vit.edit(REGISTERS):
        _, cache = vit.run_with_cache(images, names_filter=[point.format(kind) for kind in "qk"])
    for kind, (seen,) in (("q", queries), ("k", keys)):
        before = cache[point.format(kind)]
        still = [*range(vit.cfg.layout().patches.start), -2, -1]
        assert relative(seen[:, still], before[:, still]) <= TOLERANCE
        assert relative(seen[:, vit.cfg.layout().patches], before[:, vit.cfg.layout().patches]) > 1e-2


@pytest.mark.parametrize("name", ROPE)
def test_gradients_with_and_without_checkpointing(name):
    module, vit = made(name)
    images = pictures(vit)
    gradients = []
    for checkpointing in (False, True):
        module.set_grad_checkpointing(checkpointing)
        module.zero_grad()
        with attach(module, REGISTERS, Doubled("blocks.1.attn.hook_z", [])):
            module(images).square().mean().backward()
        gradients.append({key: weight.grad for key, weight in module.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(relative(gradients[1][key], value) <= TOLERANCE for key, value in gradients[0].items())


def test_intermediate_features_of_eva():
    module, vit = made("timm DINOv3")
    images = pictures(vit)
    with torch.no_grad(), attach(module, REGISTERS):
        features = module.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    with torch.no_grad(), vit.edit(REGISTERS):
        _, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_post")
        layout = vit.layout(images)
    for layer, got in zip((0, 2), features, strict=True):
        expected = cache[f"blocks.{layer}.hook_resid_post"][:, layout.patches].mT.unflatten(2, layout.grid)
        assert relative(got, expected) <= TOLERANCE


def test_masks_beside_rotary_positions():
    module, vit = made("timm DINOv3")
    images, n = pictures(vit), vit.cfg.layout().n_tokens
    mask = torch.ones(n, n, dtype=torch.bool).tril() | torch.eye(n, dtype=torch.bool)
    with pytest.raises(InterventionError, match="mask"), attach(module, REGISTERS):
        module(images, attn_mask=mask)
    bias = AttentionBias.fit(vit, images, REGISTERS.neurons)
    with torch.no_grad(), attach(module, bias):
        masked, open_ = module(images, attn_mask=mask), module(images)
    assert relative(masked, open_) > 1e-3
    with pytest.raises(InterventionError, match="causal"), attach(module, bias):
        module(images, is_causal=True)
