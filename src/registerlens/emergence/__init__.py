"""Register neurons that emerge by training: a tiny ViT, its recipe, the criteria it must meet, and the way there."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
