"""Saying what an unsupported model is, in words a person can act on."""

from __future__ import annotations

from torch import nn

# Class-name fragments, most telling first.
_PARTS = (
    (("swin", "window"), "windowed attention"),
    (("rotary", "rope"), "rotary position embeddings"),
    (("relativeposition", "relpos"), "relative position biases"),
    (("swiglu", "glumlp"), "a gated MLP"),
    (("attentionpool", "attentionalpool", "multiheadattentionpooling"), "an attention-pooling head"),
    (("batchnorm", "frozenbatchnorm"), "BatchNorm layers"),
    (("lstm", "gru", "mamba"), "recurrent layers"),
)

_CONFIG_PARTS = (
    ("window_size", "windowed attention"),
    ("vocab_size", "a text vocabulary: it is a text model"),
    ("rope_theta", "rotary position embeddings"),
    ("rope_parameters", "rotary position embeddings"),
    ("use_swiglu_ffn", "a gated MLP"),
    ("depths", "several stages of different resolution"),
    ("num_channels", "an architecture that is no plain ViT"),
)


def parts_of_module(module: nn.Module) -> str:
    """What in a module keeps it from being a plain ViT, as a phrase; empty if nothing tells."""
    names = [type(part).__name__.lower() for part in module.modules()]
    found = [
        phrase for fragments, phrase in _PARTS if any(fragment in name for name in names for fragment in fragments)
    ]
    convolutions = sum(isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())
    if convolutions > 1:
        found.insert(0, f"a convolutional stem or backbone ({convolutions} convolutions, a plain ViT has one)")
    if any(isinstance(part, nn.Embedding) and part.num_embeddings > 10_000 for part in module.modules()):
        found.insert(0, "a text vocabulary")
    return ", ".join(found)


def parts_of_config(config: object) -> str:
    """The same from a transformers config object."""
    return next((phrase for name, phrase in _CONFIG_PARTS if getattr(config, name, None)), "")


def refusal(found: str, parts: str) -> str:
    """The message: what was found, and which part is in the way."""
    return f"{found} is not a model RegisterLens can load.{f' It has {parts}.' if parts else ''}"
