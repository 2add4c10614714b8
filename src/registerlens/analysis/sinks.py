"""Attention that the [CLS] query (or, without [CLS], the average query) pays to each key, without whole patterns."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.config import TokenLayout

_SCORES_AT_ONCE = 2**20
"""Scores held at once where every query counts: 4 MiB in float32."""


def received_attention(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"], layout: TokenLayout
) -> Float[Tensor, "batch head key"]:
    """Attention paid to each key: by [CLS] where there is one, else the mean over all queries; float32.

    Args:
        q: queries after `hook_q`; only the [CLS] row is read where there is one.
        k: keys after `hook_k`.
        layout: where [CLS] is.

    Returns:
        probabilities; over the keys they sum to 1.

    Source: Jiang et al. 2025, figures 2 and 26 ([CLS] query); Gu et al. 2025 for the mean over queries.

    Example:
        >>> layout = TokenLayout(grid=(2, 2), n_prefix=1)
        >>> received_attention(torch.zeros(1, 5, 2, 8), torch.randn(1, 5, 2, 8), layout)[0, 0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    scale = q.shape[-1] ** -0.5
    if layout.cls is not None:
        row = q[:, layout.cls] * scale
        return torch.einsum("bhd,bkhd->bhk", row, k).softmax(-1, dtype=torch.float32)
    keys = k.permute(0, 2, 3, 1)  # batch head d_head key
    queries = (q * scale).transpose(1, 2)
    batch, head, n, _ = queries.shape
    total = torch.zeros(batch, head, n, dtype=torch.float32, device=q.device)
    step = max(1, _SCORES_AT_ONCE // (batch * head * n))
    for start in range(0, n, step):
        total += (queries[:, :, start : start + step] @ keys).softmax(-1, dtype=torch.float32).sum(2)
    return total / n
