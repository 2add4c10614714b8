"""The version of RegisterLens, which every file it writes tells."""

__version__ = "0.1.0"
