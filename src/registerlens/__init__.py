"""RegisterLens: every intermediate of a vision transformer has a name.

What the first page of the README uses stands here; the rest in its room: `rl.analysis`, `rl.circuits`, `rl.sweep` and
so on. Names are listed once, in the stub beside each `__init__.py`, and imported on first use, so that
`import registerlens` is instant and has no side effects.
"""

import lazy_loader

from registerlens.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
