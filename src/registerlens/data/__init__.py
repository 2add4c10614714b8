"""Images in: decoding and preprocessing of photographs, and the seeded generator of synthetic ones."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
