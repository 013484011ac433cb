"""Coordinates in a picture that is padded to a square: shares of the square, whose middle the picture is."""

from __future__ import annotations

import numpy as np


def padded_coordinate(value: float, axis: int, size: tuple[int, int], scale: int) -> int:
    """A coordinate of the original picture (axis 0 is x; `size` is (width, height)) in `scale` units of the square's side."""
    longest = max(size)
    return max(0, min(round((value + (longest - size[axis]) // 2) * (scale / longest)), scale - 1))


def padded_coordinates(values: np.ndarray, axes: np.ndarray, widths: np.ndarray, heights: np.ndarray, scale: int) -> np.ndarray:
    """The same of many: int64 [C]."""
    longest, own = np.maximum(widths, heights), np.where(axes == 0, widths, heights)
    shares = np.rint((np.asarray(values, np.float64) + (longest - own) // 2) * (scale / longest))
    return np.clip(shares, 0, scale - 1).astype(np.int64)
