"""Attention in one byte a value: what a page and a widget are sent.

A row of attention is stored as the square roots of its shares of the row's largest value, in 255 steps. Attention is
mostly small beside a sink: square roots keep small values apart where equal steps would round them to nothing.
"""

import numpy as np
from jaxtyping import Float, UInt8

LEVELS = 255
"""Steps of the code."""

QUANTISATION = (
    f"Attention is stored in one byte a value: the square root of its share of the row's largest value, in {LEVELS} "
    f"steps. It is off by at most 1/{LEVELS} of that value, and by less where it is small."
)
"""The same in words, for those who read the numbers."""


def encode(rows: Float[np.ndarray, "row value"]) -> tuple[UInt8[np.ndarray, "row value"], Float[np.ndarray, " row"]]:
    """Codes, and the largest value of each row; values must not be negative.

    Example:
        >>> codes, largest = encode(np.array([[0.0, 0.2, 0.8]], np.float32))
        >>> codes.tolist(), largest.tolist() == [np.float32(0.8)]
        ([[0, 128, 255]], True)
    """
    largest = rows.max(1)
    share = rows / np.where(largest > 0, largest, 1)[:, None]
    return np.rint(np.sqrt(share) * LEVELS).astype(np.uint8), largest.astype(np.float32)
