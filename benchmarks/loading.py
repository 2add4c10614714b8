"""Loading a 300 M-parameter model from safetensors against the source library's own loader: time, and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Row, Scale, Task, in_pairs, peak_memory
from registerlens import HookedViT

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32}


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """Time and memory until every weight has been read once; a random ViT-L, separate q, k and v in the file."""
    with tempfile.TemporaryDirectory() as folder:
        weights = _save(folder, scale)
        times = in_pairs(loading_task(folder), peers_task(folder), pairs)
        memory = peak_memory(loading_task, folder=folder)
        peers = peak_memory(peers_task, folder=folder)
    shared: dict[str, Any] = {"benchmark": "loading", "what": f"load {weights:.0f} MiB of weights"}
    yield times.row(**shared, peer="transformers' from_pretrained", at_most=1.20)
    yield Row(
        benchmark="loading",
        what=f"load {weights:.0f} MiB of weights, peak memory",
        peer="the weights themselves",
        ours=memory["growth"],
        theirs=weights,
        ratio=memory["growth"] / weights,
        unit="MiB",
        at_most=None if scale.tiny else 1.30,  # beside a tiny model the interpreter itself is large
        details={"ours": memory, "transformers": peers},
    )


def _save(folder: str, scale: Scale) -> float:
    """A random model on disk; its weights in MiB."""
    transformers = _import()
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**_TINY if scale.tiny else _LARGE), add_pooling_layer=False)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def loading_task(folder: str) -> Task:
    """Ours."""
    _import()
    return lambda: _touch(HookedViT.from_pretrained(Path(folder)))


def peers_task(folder: str) -> Task:
    """transformers' own loader, with the same weights."""
    transformers = _import()
    return lambda: _touch(transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False))


def _import() -> Any:
    """transformers, with the modules both loaders need: code is no part of what is measured."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.AutoConfig.for_model("vit")
    transformers.ViTModel(transformers.ViTConfig(**_TINY))
    return transformers


def _touch(model: nn.Module) -> float:
    """Read every weight once: files may be mapped into memory and read only then."""
    with torch.no_grad():
        return float(sum(parameter.sum() for parameter in model.parameters()))
