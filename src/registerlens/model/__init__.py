"""The hooked vision transformer."""
