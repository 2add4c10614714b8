"""Pictures inside a page, as data: addresses: patch maps of one pixel a patch, colour bars, photographs."""

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from plotly.colors import sample_colorscale, unlabel_rgb

_STEPS = 256
_QUALITY = 85
_SMALL = 160**2
"""Photographs of fewer pixels are kept as they are, as PNG: they will be enlarged."""


def _table(name: str) -> UInt8[np.ndarray, "step rgb"]:
    colours = sample_colorscale(name, np.linspace(0, 1, _STEPS).tolist())
    return np.array([unlabel_rgb(colour) for colour in colours]).round().astype(np.uint8)


def colour(
    values: Float[np.ndarray, "grid_h grid_w"], low: float, high: float, scale: str = "Viridis"
) -> UInt8[np.ndarray, "grid_h grid_w rgb"]:
    """Values as colours; below `low` and above `high` they are clipped.

    Example:
        >>> colour(np.array([[0.0, 1.0]]), 0.0, 1.0)[0, 1].tolist()
        [253, 231, 37]
    """
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return _table(scale)[(share * (_STEPS - 1)).round().astype(int)]


def colour_bar(width: int = 160, height: int = 10, scale: str = "Viridis") -> UInt8[np.ndarray, "height width rgb"]:
    """A horizontal strip from the lowest colour to the highest."""
    row = _table(scale)[np.linspace(0, _STEPS - 1, width).astype(int)]
    return np.broadcast_to(row, (height, width, 3)).copy()


def data_uri(pixels: UInt8[np.ndarray, "height width rgb"]) -> str:
    """A PNG as a data: address, for a page that needs no other file."""
    return _data_uri(Image.fromarray(pixels), "png", optimize=True)


def jpeg_uri(image: Image.Image, quality: int, **options: Any) -> str:
    """The same as a JPEG."""
    return _data_uri(image, "jpeg", quality=quality, **options)


def photograph_uri(pixels: UInt8[np.ndarray, "height width rgb"], longest: int = 640) -> str:
    """A photograph as a data: address: JPEG, made smaller where it is longer than `longest` pixels; PNG if tiny.

    Example:
        >>> photograph_uri(np.zeros((300, 400, 3), np.uint8))[:23]
        'data:image/jpeg;base64,'
    """
    image = Image.fromarray(pixels)
    if image.width * image.height <= _SMALL:
        return data_uri(pixels)
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return jpeg_uri(image, _QUALITY, subsampling=0)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
