"""One pass over images: reducers, clean prefixes, crews of workers, the store of their parts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
