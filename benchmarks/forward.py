"""The plain forward pass against transformers (SDPA), timm, and the matrix products it cannot do without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Row, Scale, check_equal, in_pairs
from benchmarks.models import focus_timm, focus_transformers, focus_vit, pixels
from registerlens import HookedViT


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """Three rows a size."""
    vit, transformers_vit = focus_vit(scale), focus_transformers(scale)
    timm_vit = focus_timm(vit)
    vit_of_timm = HookedViT.from_module(timm_vit).eval()  # resamples positions as timm does
    for size, batch in scale.sizes:
        images = pixels(size, batch)
        what = f"forward, {size} px, batch {batch}"
        sides = (
            ("transformers (SDPA)", lambda x: vit(x), lambda x: transformers_vit(x).pooler_output),
            ("timm", lambda x: vit_of_timm(x), lambda x: timm_vit(x)),
        )
        for peer, ours, theirs in sides:
            difference = check_equal(f"{what}, {peer}", ours(images), theirs(images))
            times = in_pairs(lambda ours=ours, x=images: ours(x), lambda theirs=theirs, x=images: theirs(x), pairs)
            details = {"largest_relative_difference": difference}
            yield times.row(benchmark="forward", what=what, peer=peer, at_most=1.0, details=details)
        limit = MatmulLimit(vit, images)
        yield in_pairs(lambda x=images: vit(x), limit, pairs).row(
            invert=True,
            benchmark="forward",
            what=f"share of the matrix-multiply limit, {size} px, batch {batch}",
            peer="its matrix products alone",
            at_least=0.8,
            missed_because="the rest is softmax, GELU, LayerNorm, residual additions and the layout of q, k and v",
            details=limit.describe(),
        )


class MatmulLimit:
    """The matrix products of one forward pass and nothing else, each in the fastest form found.

    In it, with the model's own weights in the model's order: the patch embedding as a product over unfolded patches;
    in each block q, k, v, the attention output and the two maps of the MLP, with their biases (`addmm` into buffers
    that exist already, so that no page is faulted in); and attention's two products. Those are batched over heads;
    how many heads, and how many queries at a time so that the block of scores stays in the cache, is what was
    fastest here among all candidates.

    Not in it: softmax, activations, LayerNorm, LayerScale, residual additions, unfolding the patches, the layout of q,
    k and v (they lie contiguous by head here), position embeddings, the head, and any allocation.
    """

    def __init__(self, vit: HookedViT, images: Tensor) -> None:
        cfg, layout = vit.cfg, vit.layout(images)
        self.vit = vit
        batch, n, heads = len(images), layout.n_tokens, len(images) * cfg.n_heads
        self.patches = torch.randn(batch * layout.n_patches, cfg.n_channels * cfg.patch_size[0] * cfg.patch_size[1])
        self.embedded = torch.empty(len(self.patches), cfg.d_model)
        self.x, self.y = torch.randn(batch * n, cfg.d_model), torch.empty(batch * n, cfg.d_model)
        self.qkv = torch.empty(batch * n, 3 * cfg.n_heads * cfg.d_head)
        self.hidden = torch.randn(batch * n, cfg.d_mlp)
        self.q, self.k, self.v, self.z = (torch.randn(heads, n, cfg.d_head) for _ in range(4))
        self.scores = torch.empty(heads * n * n)  # touched only as far as a form of attention needs it
        self.candidates = {
            (group, queries): self._attention_seconds(group, queries)
            for group in sorted({1, 2, cfg.n_heads, 2 * cfg.n_heads, heads})
            for queries in sorted({min(64, n), min(256, n), n})
        }
        self.group, self.queries = min(self.candidates, key=lambda form: self.candidates[form])

    def __call__(self) -> None:
        """One forward pass's worth of products."""
        _product(self.patches, self.vit.embed.patch.weight.flatten(1), self.vit.embed.patch.bias, self.embedded)
        for block in self.vit.blocks:
            attn, mlp = block.attn, block.mlp
            _product(self.x, attn.qkv.weight, attn.qkv.bias, self.qkv)
            self._attention(self.group, self.queries)
            _product(self.x, attn.out.weight, attn.out.bias, self.y)
            _product(self.x, mlp.up.weight, mlp.up.bias, self.hidden)
            _product(self.hidden, mlp.out.weight, mlp.out.bias, self.y)

    def describe(self) -> dict[str, object]:
        """How attention's products were taken, and what each other form would have cost."""
        return {
            "heads_at_once": self.group,
            "queries_at_once": self.queries,
            "attention_seconds_a_layer": {f"{g} heads, {q} queries": s for (g, q), s in self.candidates.items()},
            "gflop": self.flop() / 1e9,
        }

    def flop(self) -> float:
        """Floating-point operations, two a multiply-add."""
        maps = self.patches.shape[1] * self.embedded.numel()
        block = self.x.shape[1] * (self.qkv.numel() + self.y.numel() + 2 * self.hidden.numel())
        attention = 2 * self.q.numel() * self.q.shape[1]
        return 2.0 * (maps + len(self.vit.blocks) * (block + attention))

    def _attention(self, group: int, queries: int) -> None:
        heads, n, _ = self.q.shape
        for head in range(0, heads, group):
            at = slice(head, min(head + group, heads))
            keys, values = self.k[at].transpose(1, 2), self.v[at]
            for start in range(0, n, queries):
                rows = slice(start, min(start + queries, n))
                scores = self.scores[: len(keys) * (rows.stop - start) * n].view(len(keys), -1, n)
                torch.bmm(self.q[at, rows], keys, out=scores)
                torch.bmm(scores, values, out=self.z[at, rows])

    def _attention_seconds(self, group: int, queries: int) -> float:
        task = lambda: self._attention(group, queries)  # noqa: E731
        return min(in_pairs(task, lambda: None, 3).ours)


def _product(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    torch.addmm(bias, x, weight.T, out=out)
