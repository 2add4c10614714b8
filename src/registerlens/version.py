"""The version of RegisterLens, which every file it writes names."""

__version__ = "0.1.0"
