"""Ablation sweeps: many edits of one model on many images, nothing computed twice, nothing lost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
