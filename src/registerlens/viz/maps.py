"""Patch maps as small PNG pictures: one pixel a patch, enlarged by whoever shows them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from plotly.colors import sample_colorscale, unlabel_rgb

_STEPS = 256


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


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
