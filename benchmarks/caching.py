"""`run_with_cache` against TransformerLens's own bridge around the same transformers ViT."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.harness import FULL, TINY, Row, Scale, check_equal, in_pairs, peak_memory
from benchmarks.models import pixels, random_vit
from registerlens import HookedViT

KINDS = {
    "all": "run_with_cache, all names",
    "every": "run_with_cache, '*': per-head results too",
    "same": "run_with_cache, the same tensors",
}
"""What is cached: what names_filter=None keeps on either side (neither has per-head results then), really every name of
ours against all of the bridge's, and what both have."""

ONLY_OURS = ("hook_patch_embed", "hook_embed", "hook_pos_embed", "hook_attn_scores", "hook_result", "head.hook_out")
"""What the bridge does not have: the parts of the embedding, per-head results (its set_use_attn_result refuses ViTs),
scores before the softmax (its hook_attn_scores holds the pattern a second time), and the head's output after tanh."""

_BECAUSE = (
    "ours keeps {:.0f} MiB, the bridge {:.0f} MiB: ours has scores before the softmax (the bridge's hook_attn_scores "
    "repeats the pattern) and, with '*', per-head results; the rows of the same tensors compare like with like"
)


def bridge_name(name: str) -> str:
    """The bridge's name for one of our tensors."""
    if name == "hook_tokens":
        return "embed.hook_out"
    return name.replace("hook_normalized", "hook_out")  # its hook_normalized lacks the affine map


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """Time and memory of every kind on both sides."""
    sides = {kind: (ours(scale.tiny, kind), theirs(scale.tiny, kind)) for kind in KINDS}
    check_same_tensors(*(side()[1] for side in sides["same"]))
    for kind, what in KINDS.items():
        mine, peer = sides[kind]
        cached = {"ours": describe(mine()[1]), "bridge": describe(peer()[1])}
        common: dict[str, Any] = {
            "benchmark": "cache",
            "peer": "TransformerLens's bridge",
            "at_most": 1.0,
            "missed_because": _BECAUSE.format(cached["ours"]["MiB"], cached["bridge"]["MiB"]) if kind != "same" else "",
        }
        yield in_pairs(mine, peer, pairs).row(what=what, details={"cached": cached}, **common)
        memory = [peak_memory(side, tiny=scale.tiny, kind=kind) for side in (ours, theirs)]
        yield Row(
            what=f"{what}: peak memory above the loaded model",
            unit="MiB",
            ours=memory[0]["growth"],
            theirs=memory[1]["growth"],
            ratio=memory[0]["growth"] / memory[1]["growth"],
            details={"ours": memory[0], "bridge": memory[1], "cached": cached},
            **common,
        )


def ours(tiny: bool, kind: str) -> Callable[[], tuple[Tensor, Mapping[str, Tensor]]]:
    """Our side: caching everything, or what the bridge has too."""
    scale = TINY if tiny else FULL
    vit = HookedViT.from_module(random_vit(scale)).eval()
    common = [name for name in vit.hook_dict if not name.endswith(ONLY_OURS)]
    names = {"all": None, "every": "*", "same": common}[kind]
    return functools.partial(vit.run_with_cache, _pixels(vit, scale), names_filter=names)


def theirs(tiny: bool, kind: str) -> Callable[[], tuple[Tensor, Mapping[str, Tensor]]]:
    """The bridge's side."""
    scale = TINY if tiny else FULL
    model = random_vit(scale)
    vit = HookedViT.from_module(model)
    bridge = bridge_around(model)
    images, names = _pixels(vit, scale), None
    if kind == "same":
        names = [bridge_name(name) for name in vit.hook_dict if not name.endswith(ONLY_OURS)]
    return functools.partial(bridge.run_with_cache, images, names_filter=names)


def bridge_around(model: nn.Module) -> Any:
    """A TransformerBridge; the empty folder it is named after keeps it from asking a hub for an image processor."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        return TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")


def check_same_tensors(cache: Mapping[str, Tensor], bridge_cache: Mapping[str, Tensor]) -> None:
    """Every tensor of ours is in the bridge's cache, with the same values; its aliases are further names of these."""
    if len({tensor.data_ptr() for tensor in bridge_cache.values()}) > len(cache):
        raise RuntimeError("The bridge cached more tensors than asked for.")
    for name in cache:
        check_equal(name, cache[name], bridge_cache[bridge_name(name)])


def describe(cache: Mapping[str, Tensor]) -> dict[str, float]:
    """How many names a cache has, how many distinct storages are behind them, and how large those are."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in cache.values()
        if tensor is not None
    }
    return {"names": len(cache), "storages": len(storages), "MiB": sum(storages.values()) / 2**20}


def _pixels(vit: HookedViT, scale: Scale) -> Tensor:
    return pixels(vit.cfg.image_size[0], scale.cached_batch)
