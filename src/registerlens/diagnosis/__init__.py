"""What is wrong with a model, by what is measured on its images, and what to do about it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
